"""Scoring kept points again: on other draws of the model they were made on, or on another model. No attack runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, ValidationError

from analysis.evaluate import EvaluationResult, PointStore
from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.cost import scoring_cost
from analysis.evaluation.measurements import Measurement, common_rows, measurements
from analysis.evaluation.protocols import Scoring
from analysis.evaluation.records import read_records
from analysis.evaluation.suites import Suite
from analysis.evaluation.tasks import on_kept_points
from analysis.statistics import Estimate, paired_difference
from models.configuration import Config
from models.errors import UserError, unknown_name
from models.json_text import first_problem
from models.threat_model import ThreatModel
from orchestration.evaluating.evaluation_run import POINTS_FOLDER, RECORDS_FILE, EvaluationSettings, Job, Until, prepare
from orchestration.evaluating.stored_evaluation import Summary, read_kept
from orchestration.home import Home, Workplace
from orchestration.trained_models.targets import Target
from trainers.data import DataConfig

OTHERS_FOLDER = "points_of"


def kept_summary(target: Target, suite: str | None, home: Home) -> Summary:
    """Return what was kept of an evaluation of a model whose points are there.

    Args:
        suite: its name; None: the only one.

    Raises:
        UserError: there is none, none of this name, or several to choose from.
    """
    folder = target.records_folder(home, target.checkpoint())
    kept = {name: summary for name, summary in read_kept(folder).items() if "settings" in summary}
    if not kept or not (folder / POINTS_FOLDER).is_dir():
        raise UserError(f"{target.folder} has no evaluation that kept its points here; `rayndom evaluate` with `--keep-points` makes one")
    if suite is not None and suite not in kept:
        raise unknown_name("evaluation", suite, kept)
    if suite is None and len(kept) > 1:
        raise UserError(f"{target.folder} has several evaluations: choose one with --suite: {', '.join(sorted(kept))}")
    return kept[suite or next(iter(kept))]


class _Asked(Config):
    """What was asked of an evaluation, as it is kept beside its records."""

    suite: Suite = Field(description="The suite itself.")
    threat_model: ThreatModel = Field(description="Norm and radius.")
    data: DataConfig = Field(description="The data set.")
    num_samples: int | None = Field(ge=1, description="Images; none: the suite's.")
    num_draws: int | None = Field(ge=1, description="Scoring draws; none: the suite's.")
    seed: int = Field(description="Root of all seeds.")
    until: dict[str, Any] | None = Field(None, description="The rule that chose the numbers; earlier versions do not have it.")


def settings_of(summary: Summary) -> EvaluationSettings:
    """Return what was asked of a kept evaluation.

    Raises:
        UserError: what is kept of it is damaged.
    """
    try:
        asked = _Asked.model_validate(summary["settings"])
        until = None if asked.until is None else Until.from_json(asked.until)
    except (ValidationError, KeyError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else f"until: {error}"
        raise UserError(
            f"what is kept of the evaluation {summary['suite']} is damaged ({problem}); `rayndom evaluate` makes it again"
        ) from None
    return EvaluationSettings(asked.suite, asked.threat_model, asked.num_samples, asked.num_draws, asked.data, asked.seed, until)


def prepare_rescoring(name: str, target: Target, summary: Summary, num_draws: int | None, workplace: Workplace) -> Job:
    """Plan the scoring of a model's own points on other draws. The records are those that a fresh evaluation would make.

    Studies attack, so they are not measured again: those of the evaluation stand, with the draws they had.

    Args:
        summary: from `kept_summary`. num_draws: R; None: as many as there were.

    Raises:
        UserError: points are missing or not as they were written.
    """
    settings = settings_of(summary)
    before = prepare(name, target, settings, workplace)
    job = prepare(
        name, target, replace(settings, num_draws=num_draws or settings.num_draws), workplace, (before.x, before.y), points="score"
    )
    plan = [task.model_copy(update={"cost": scoring_cost(task)}) for task in job.plan if task.kind != "study"]
    plan += _studies_of(summary, before)
    plan = [task.model_copy(update={"position": place}) for place, task in enumerate(plan)]
    made = replace(job, plan=plan)
    check_points(made)
    return made


def _studies_of(summary: Summary, job: Job) -> list[BlockTask]:
    """Return the studies that a kept evaluation rests on, with the draws they had: it may have been scored again before."""
    known = read_records(job.records_path)
    headers = [known[key]["header"] for key in summary["records"] if key in known]
    scorings = {json.dumps(header["scoring"], sort_keys=True): header["scoring"] for header in headers if header["kind"] == "study"}
    found = []
    for task in job.plan:
        if task.kind == "study":
            made = [task.model_copy(update={"scoring": Scoring.model_validate(scoring)}) for scoring in scorings.values()]
            found += [each for each in made if each.key in known][:1]
    return found


def prepare_other_model(name: str, target: Target, points: Job, workplace: Workplace) -> Job:
    """Plan the scoring of a job's points on another model: a transfer attack on it.

    Args:
        points: the evaluation that kept them.

    Raises:
        UserError: the model does not fit the images, or points are missing.
    """
    plan = on_kept_points(points.plan, target.load(), points.x, points.y)
    # In a folder of their own: a file of records holds the attacks on one model, these were attacks on another.
    folder = target.records_folder(workplace.home, plan[0].checkpoint) / OTHERS_FOLDER / points.plan[0].checkpoint[:16]
    store = PointStore(points.records_path.parent / POINTS_FOLDER, "score")
    job = Job(
        name=name,
        target=target,
        settings=points.settings,
        plan=plan,
        x=points.x,
        y=points.y,
        records_path=folder / RECORDS_FILE,
        points=store,
    )
    check_points(job)
    return job


def check_points(job: Job) -> None:
    """Raise a `UserError` unless the points of all blocks that are left are there, before anything is scored."""
    for task in job.pending:
        if task.has_points and job.points is not None:
            job.points.read(task)


@dataclass(frozen=True)
class Transferred:
    """The points of one attack, on the model they were made on and on another.

    Attributes:
        attack: its name. own, other: accuracy on each. difference: other minus own, paired by image.
    """

    attack: str
    own: Estimate
    other: Estimate
    difference: Estimate


def transferred(own: EvaluationResult, other: EvaluationResult) -> list[Transferred]:
    """Return one row for clean images and one per attack under T1 that both models were scored under."""
    first, second = (_under_unknown_draw(result) for result in (own, other))
    rows = []
    for name in second:
        if name in first:
            mine, its = common_rows(first[name], second[name])
            exact = (second[name].exact, first[name].exact)
            difference = paired_difference(second[name].matrix()[its], first[name].matrix()[mine], exact=exact)
            rows.append(Transferred(name, first[name].estimate, second[name].estimate, difference))
    return rows


def _under_unknown_draw(result: EvaluationResult) -> dict[str, Measurement]:
    found: Sequence[Measurement] = measurements(result.records)
    return {each.name: each for each in found if each.kind in ("clean", "attack") and each.protocol == "T1"}
