"""`--until`: images, or draws, are added in blocks until the interval of T1 is narrow or the data ends.

A look is an evaluation of the attacks under T1 on the first images of the class-balanced order, so later blocks join the earlier ones in
the same records, and a killed command looks again at what is there. The other protocols and the studies run once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from analysis.attacked_model.draws import all_configurations
from analysis.evaluate import BlockTask
from analysis.evaluation.cost import scoring_cost
from analysis.evaluation.points import PointPurpose
from analysis.evaluation.suites import load_suite
from analysis.evaluation.tasks import MAX_BLOCK_SIZE
from analysis.reporting.tables import format_estimate
from analysis.result import EvaluationResult
from analysis.statistics import accuracy_interval
from analysis.statistics.stopping import (
    MOST_DOUBLINGS,
    Position,
    Prices,
    Widths,
    expected_end,
    next_position,
    planned_looks,
    widths_of,
)
from models.errors import UserError
from orchestration import console
from orchestration.evaluating.evaluation_cost import megabytes, processes_for, seconds_per_pass
from orchestration.evaluating.evaluation_run import EvaluationSettings, Job, Until, data_of, prepare, test_images
from orchestration.home import Workplace
from orchestration.trained_models.targets import Target

_FEWEST_BLOCKS = 10


@dataclass
class GrowingEvaluation:
    """An evaluation whose numbers of images and draws are not known beforehand.

    Attributes:
        name, target, workplace: as for `prepare`. settings: what was asked, with the rule.
        x, y: all test images and labels. start: where the first look is. keeps_points: draws may be added, so points are kept.
    """

    name: str
    target: Target
    workplace: Workplace
    settings: EvaluationSettings
    until: Until
    x: Tensor
    y: Tensor
    start: Position
    keeps_points: bool

    def job(self, position: Position, *, whole: bool) -> Job:
        """Return the evaluation at a position: of what the look needs, or the whole of the suite."""
        draws = position.draws if position.draws != self.start.draws else self.settings.num_draws
        settings = replace(self.settings, num_samples=position.images, num_draws=draws)
        points: PointPurpose | None = "reuse" if self.keeps_points else None
        job = prepare(self.name, self.target, settings, self.workplace, (self.x, self.y), points=points)
        return job if whole else replace(job, plan=[task for task in job.plan if _is_looked_at(task)])

    def prices(self, job: Job) -> Prices:
        """Return what an image more and a draw more cost, in forward passes."""
        attacks = [task for task in job.plan if task.kind == "attack" and _is_looked_at(task)]
        growing = [task for task in attacks if task.item is not None and task.item.num_samples is None and task.block == 0]
        attack = sum((task.cost - scoring_cost(task)) / len(task.ids) for task in growing)
        return Prices(attack=max(attack, 1.0), score=len(growing) + 1.0)

    def seconds_left(self, end: Position, workers: int | None, gpus: float) -> float:
        """Return the time from here to the end of the evaluation that stops at `end`."""
        job = self.job(end, whole=True)
        passes = sum(_cost_left(task, job) for task in job.pending)
        return passes * seconds_per_pass(job, gpus) / processes_for(passes, workers, gpus)


def begin(name: str, target: Target, settings: EvaluationSettings, workplace: Workplace, points: float, *, keep: bool) -> GrowingEvaluation:
    """Plan an evaluation that grows until its interval is `points` wide.

    Args:
        points: width in points, from the lower to the upper end. settings: `num_samples` is the most; None: all test images.
        keep: keep perturbed images whether or not draws may be added.

    Raises:
        UserError: a width that no interval of accuracy has, or no attack under T1.
    """
    if not 0 < points < 100:
        raise UserError(f"--until is {points:g}; it is the width of an interval of accuracy in points, above 0 and below 100, e.g. 1")
    x, y = test_images(data_of(target, settings), workplace.data_root, None)
    suite = load_suite(settings.suite, target.defence)
    model = target.load()
    draws = settings.num_draws or suite.scoring.num_evaluation_draws
    up_to = suite.scoring.enumerate_up_to if settings.num_draws is None else min(suite.scoring.enumerate_up_to, draws)
    sampled = all_configurations(model, up_to) is None
    count = min(len(x), settings.num_samples or len(x))
    block_size = min(MAX_BLOCK_SIZE, max(16, -(-count // _FEWEST_BLOCKS // 16) * 16))
    looks = planned_looks(count, block_size, points / 100, doublings=MOST_DOUBLINGS if sampled else 0)
    until = Until(points / 100, looks, block_size)
    start = Position(looks.images[0], draws, looks.doublings)
    growing = GrowingEvaluation(name, target, workplace, replace(settings, until=until, suite=suite), until, x, y, start, sampled or keep)
    if not any(task.kind == "attack" for task in growing.job(start, whole=False).plan):
        raise UserError(f"no attack of suite {suite.name!r} runs under T1 within the threat model: there is no interval to watch")
    return growing


def grow(growing: GrowingEvaluation, run: Callable[[Job], None], workers: int | None, gpus: float = 0) -> Job:
    """Add images or draws until the interval is narrow or the data ends; return the whole evaluation there, with its blocks run.

    Args:
        run: runs what is left of a job. workers, gpus: as for `run_jobs`, for the expected time.
    """
    position, looked = growing.start, 0
    while True:
        job = growing.job(position, whole=False)
        run(job)
        looked += 1
        result = job.result()
        if result.headline is None or not result.finished:
            return job  # a block could not be run: whoever runs them says so
        widths, prices = _seen(result, growing.until), growing.prices(job)
        where = f"look {looked} of at most {growing.until.looks.count}: {format_estimate(result.headline)}, {_points(widths.total)}"
        where += f" wide on {position.images} images" + (f" and {position.draws} draws" if widths.draws else "")
        if widths.total <= growing.until.width:
            console.say(f"{where}: narrow enough")
            break
        further = next_position(position, widths, growing.until.looks, prices)
        if further is None:
            console.say(
                f"{where}: the data ends here, {_points(growing.until.width)} would need about {_needed(widths, growing.until.width)}"
            )
            break
        end, reached = expected_end(position, widths, growing.until.looks, prices, growing.until.width)
        console.say(f"{where}; {_expectation(growing, end, reached, workers, gpus)}; next: {_step(position, further)}")
        position = further
    job = growing.job(position, whole=True)
    run(job)
    return job


def forecast(growing: GrowingEvaluation, workers: int | None, gpus: float = 0) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what is to be expected of an evaluation that grows, as JSON types and as rows for a person; nothing is run."""
    job, looks = growing.job(growing.start, whole=False), growing.until.looks
    if job.pending:
        accuracy, why = _guess(growing.target)
        widths = _assumed(growing.start, accuracy, looks.level_of_each)
    else:
        result = job.result()
        accuracy, why = (result.headline.value if result.headline else 0.5), "as the first look says"
        widths = _seen(result, growing.until)
    end, reached = expected_end(growing.start, widths, looks, growing.prices(job), growing.until.width)
    seconds = growing.seconds_left(end, workers, gpus)
    expected = {"images": end.images, "draws": end.draws, "seconds": seconds, "reached": reached, "accuracy": accuracy}
    doubled = f"; draws doubled up to {looks.doublings} times" if looks.doublings else ""
    rows = [
        ("until", f"the interval of T1 is {_points(growing.until.width)} wide"),
        ("looks", f"at most {looks.count}, each interval at {100 * looks.level_of_each:.2f} %, all together at {100 * looks.level:.0f} %"),
        ("looks at", f"{', '.join(map(str, looks.images))} images{doubled}"),
        ("expected", f"{_expectation(growing, end, reached, workers, gpus)}, if accuracy is {100 * accuracy:.0f} % ({why})"),
    ]
    if growing.keeps_points:
        size = sum(task.num_points * len(task.ids) for task in growing.job(end, whole=True).plan if task.has_points)
        rows.append(
            ("perturbed images", f"about {megabytes(size * growing.x[0].numel() * growing.x.element_size())}, for draws to be added")
        )
    return {"until": growing.until.to_json(), "level_of_each_look": looks.level_of_each, "expected": expected}, rows


def _is_looked_at(task: BlockTask) -> bool:
    inside = task.item is None or task.item.epsilon is None
    return task.kind in ("clean", "attack") and task.protocol == "T1" and inside


def _cost_left(task: BlockTask, job: Job) -> float:
    held = task.has_points and job.points is not None and job.points.path(task).is_file()
    return scoring_cost(task) if held else task.cost


def _seen(result: EvaluationResult, until: Until) -> Widths:
    worst = result.worst
    if worst is None or result.headline is None:
        raise ValueError("an evaluation without a headline has no interval")
    return widths_of(worst.correct_SR, exact=worst.exact, level=until.looks.level_of_each)


def _assumed(position: Position, accuracy: float, level: float) -> Widths:
    """Return the widths where images alone are chance, each right or wrong under all draws."""
    right = round(accuracy * position.images)
    width = accuracy_interval(np.arange(position.images) < right, 1, level=level).width
    return Widths(width, width, 0.0, position.images, 0)


def _guess(target: Target) -> tuple[float, str]:
    found = target.config["details"].get("training", {}).get("metrics", {}).get("validation/robust_accuracy")
    return (0.5, "where intervals are widest") if found is None else (float(found), "as on validation images")


def _expectation(growing: GrowingEvaluation, end: Position, reached: bool, workers: int | None, gpus: float) -> str:
    draws = f" and {end.draws} draws" if growing.until.looks.doublings else ""
    goal = f"to {_points(growing.until.width)}" if reached else f"to the end of the data, wider than {_points(growing.until.width)}"
    return f"about {end.images} images{draws}, {console.duration(growing.seconds_left(end, workers, gpus))} {goal}"


def _needed(widths: Widths, width: float) -> str:
    images = round(widths.images * (widths.total / width) ** 2)
    return f"{images} images" + (" and as many times the draws" if widths.of_draws > widths.of_images / 4 else "")


def _step(before: Position, after: Position) -> str:
    return f"{after.draws} draws, the cheaper" if after.draws > before.draws else f"{after.images} images"


def _points(width: float) -> str:
    value = f"{100 * width:.3g}"
    return f"{value} point" if value == "1" else f"{value} points"
