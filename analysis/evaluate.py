"""Evaluating a model: `evaluate(model, x, y, suite="quick")`, or block by block with `plan_blocks`, `run_block`, `collect`.

from analysis.evaluate import evaluate
from analysis.reporting.conclusion import to_markdown
result = evaluate(model, x, y, suite="quick", records="evaluation.jsonl")
result.headline            # worst attack per sample, unknown draw: value with interval
print(to_markdown(result))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.backward import with_backward
from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.blocks import measure_block
from analysis.evaluation.calibration import calibration_images, calibration_toys, toy_data
from analysis.evaluation.inputs import images_of
from analysis.evaluation.points import PointStore
from analysis.evaluation.queue import BlockQueue, E, Evaluation, Progress
from analysis.evaluation.records import Record
from analysis.evaluation.study_runs import Study, StudyOutcome, clean_outcome, run_study
from analysis.evaluation.suites import Suite
from analysis.evaluation.tasks import MAX_BLOCK_SIZE, bare_model, plan_blocks
from analysis.result import EvaluationResult, collect
from models.freed_memory import give_back_freed_memory, keep_freed_memory
from models.threat_model import ThreatModel

__all__ = [
    "BlockQueue",
    "BlockTask",
    "Evaluation",
    "EvaluationResult",
    "PointStore",
    "Progress",
    "calibrate",
    "collect",
    "evaluate",
    "plan_blocks",
    "run_block",
    "run_in_order",
]


RunBlocks = Callable[[BlockQueue[Evaluation]], None]
"""Takes all blocks of a queue, runs them, and gives their records back."""


@torch.inference_mode(False)
def evaluate(
    model: nn.Module,
    x: Any,
    y: Any,
    suite: str | Path | Suite = "quick",
    *,
    defence: str | None = None,
    threat_model: ThreatModel | None = None,
    seed: int = 0,
    batch_size: int = MAX_BLOCK_SIZE,
    num_draws: int | None = None,
    num_samples: int | None = None,
    records: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    run_tasks: RunBlocks | None = None,
    backward: nn.Module | None = None,
    points: str | Path | None = None,
) -> EvaluationResult:
    """Attack and score a model, and check whether the numbers can be believed.

    Args:
        model: maps pixels in [0,1] (B, C, H, W) to logits (B, K), or to a tuple or dictionary with them; evaluated in eval mode
            on the device of its parameters; modes, weights, draws and streams are as before afterwards. `ResampleOnForward` is taken off:
            protocols control the draws.
        x, y: test images (N, C, H, W) in [0,1] and labels (N,): tensors on any device, arrays or lists.
        suite: name, path of a YAML file, or a `Suite`; see `analysis.evaluation.suites.load_suite`.
        defence: its name, for suite `paper`; None: what the model says of itself.
        threat_model: norm and radius; None: linf 8/255.
        seed: root of all seeds: equal seeds give equal records, whoever runs the blocks.
        batch_size: images per block, at most 256. Starts and draws of attacks belong to a block, so it is part of the result.
        num_draws: R, draws that score; larger spaces of draws are then sampled, not enumerated. None: the suite's.
        num_samples: use the first n images of a class-balanced order; None: the suite's number.
        records: file of JSON lines to continue from and to append to.
        progress: called after each block, and once at the beginning.
        run_tasks: runs the blocks, e.g. on a cluster; None: one after the other in this process.
        backward: where the model cuts gradients, a module whose gradients attacks use in the place of the model's own: the same images
            to logits of the same shape, differentiably (BPDA). The model's answers stay its own.
        points: folder in which perturbed images are kept, bit by bit; blocks that have a record and no points are attacked again.

    Raises:
        UserError: anything that cannot be evaluated, before any work is done.
    """
    if backward is not None:
        spec = getattr(bare_model(model), "spec", None)
        defence = defence or (spec.defence if spec is not None else None)
        model = with_backward(bare_model(model), backward, images_of(x)[:2])
    plan = plan_blocks(
        model,
        x,
        y,
        suite,
        defence=defence,
        threat_model=threat_model,
        seed=seed,
        batch_size=batch_size,
        num_draws=num_draws,
        num_samples=num_samples,
    )
    store = None if points is None else PointStore(Path(points))
    evaluation = Evaluation(plan, x, y, None if records is None else Path(records), store)
    queue = BlockQueue([evaluation], progress)
    if run_tasks is not None:
        run_tasks(queue)
    else:
        run_in_order(queue, lambda _: model)
    return collect(evaluation.done.values(), plan)


def run_in_order(queue: BlockQueue[E], load: Callable[[E], nn.Module]) -> None:
    """Run the blocks of a queue in this process, one after the other.

    Args:
        load: returns the model of an evaluation; called for each block.
    """
    keep_freed_memory()
    try:
        while (taken := queue.take()) is not None:
            evaluation, task = taken
            try:
                record = run_block(load(evaluation), evaluation.x, evaluation.y, task, evaluation.points)
            except Exception as error:  # one model's failure must not end the evaluations of others; the queue decides
                queue.broke(evaluation, task, error)
            else:
                queue.finished(evaluation, task, record)
    finally:
        give_back_freed_memory()


def run_block(model: nn.Module, x: Tensor, y: Tensor, task: BlockTask, points: PointStore | None = None) -> Record:
    """Run one block of any kind and return its record; arguments and errors are those of `measure_block`."""
    return measure_block(model, x, y, task, _run_study, points)


def _run_study(study: Study) -> StudyOutcome:
    """Run a block of a study. A calibration looks at the harness, not at the model: it is an evaluation of its own."""
    if study.point.name == "calibration":
        return clean_outcome(study.setting), {"toys": calibrate(study.setting.x.device)}
    return run_study(study)


def calibrate(device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Evaluate the toys of `analysis.evaluation.calibration` and compare with what is stored.

    Returns:
        One row per expectation: `toy`, `what`, `expected`, `measured`, `met`.
    """
    data = toy_data()
    suite = Suite(name="calibration", **data["suite"])
    x, y = calibration_images()
    rows: list[dict[str, Any]] = []
    for name, toy in calibration_toys().items():
        result = evaluate(toy.to(device), x, y, suite, threat_model=ThreatModel(epsilon=data["epsilon"]))
        measured = {f"{row.attack} {row.protocol}": row.estimate.value for row in result.rows}
        measured["headline"] = result.headline.value if result.headline is not None else float("nan")
        expected = data["expected"][name]
        for what, value in expected["accuracies"].items():
            met = abs(measured[what] - value) <= expected["tolerance"] + 1e-9
            rows.append({"toy": name, "what": what, "expected": value, "measured": round(measured[what], 6), "met": met})
        statuses = {verdict.id: verdict.status.value for verdict in result.verdicts}
        for check, status in expected["verdicts"].items():
            rows.append({"toy": name, "what": check, "expected": status, "measured": statuses[check], "met": statuses[check] == status})
    return rows
