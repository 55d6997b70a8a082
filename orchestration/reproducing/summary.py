"""What there is to reproduce, and what a reproduction would do, as rows for the terminal and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.reproduction.outcome import ItemOutcome
from analysis.reproduction.papers import get_item, list_items
from analysis.reproduction.scale import SCALES
from models.errors import UserError
from orchestration.home import Home
from orchestration.reproducing.cost import evaluation_cost, total, training_cost
from orchestration.reproducing.ledger import read_outcome
from orchestration.reproducing.plan import Evaluation, ItemPlan, data_sources, evaluations, planned_trainings, readings
from orchestration.run_folder import RunFolder
from trainers.data import DATASETS
from trainers.data.location import data_root as locate_root
from trainers.data.location import locate

ESTIMATE = (
    "Estimated from counts of forward passes, at a quarter of an H100's or H200's bf16 speed in training, 50 TFLOP/s in evaluations and "
    "10 GFLOP/s of a CPU core; validation, studies and theory are not counted."
)


def catalogue() -> list[dict[str, Any]]:
    """Return one row per table and figure of all papers: name, kind, title, and how many trainings it needs at each scale."""
    rows = []
    for name in list_items():
        item = get_item(name)
        row: dict[str, Any] = {"item": name, "kind": item.kind, "title": item.title}
        for scale in SCALES:
            row[scale] = len({each.fingerprint for each in planned_trainings(item, scale)})
        rows.append(row)
    return rows


def describe(plans: Sequence[ItemPlan], home: Home) -> dict[str, Any]:
    """Return what reproducing the items would do.

    The cost of trainings and evaluations that several items share is counted once, with the first of them.
    """
    seen: set[str] = set()
    counted: set[tuple[str, str]] = set()
    items = []
    for planned in plans:
        fresh = [each for each in planned.unique if each.fingerprint not in seen]
        seen |= {each.fingerprint for each in fresh}
        done = [each for each in planned.unique if RunFolder(home.run(each.fingerprint)).result() is not None]
        attacks = {_content(each): each for each in evaluations(planned, home)}
        before = read_outcome(home, planned.item.name, planned.edition)
        evaluated = [key for key, each in attacks.items() if _is_evaluated(each, before)]
        lacking = [each for key, each in attacks.items() if key not in evaluated and key not in counted]
        counted |= attacks.keys()
        missing = [each for each in fresh if each not in done]
        cost = total([training_cost(each.experiment) for each in missing])
        cost += total([evaluation_cost(each.training.experiment, each.suite) for each in lacking])
        items.append(
            {
                "item": planned.item.name,
                "title": planned.item.title,
                "cells": sum(1 for _ in planned.cells()),
                "trainings": len(planned.unique),
                "already_trained": len(done),
                "evaluations": len(attacks),
                "already_evaluated": len(evaluated),
                "readings": len(readings(planned)),
                "forward_passes": cost.passes,
                "gpu_hours": cost.gpu_hours,
                "core_hours": cost.core_hours,
                "nothing_to_run": planned.item.nothing_to_run,
            }
        )
    return {"items": items, "scale": plans[0].scale if plans else None, "estimate": ESTIMATE}


def _content(evaluation: Evaluation) -> tuple[str, str]:
    """Return what makes two evaluations one."""
    network = f"{evaluation.training.fingerprint} {evaluation.training.run.evaluation_remark}"
    return network, evaluation.suite.model_dump_json(exclude={"name", "description"})


def _is_evaluated(evaluation: Evaluation, before: ItemOutcome | None) -> bool:
    """Return whether the item's outcome holds an evaluation. Records that other items left count only when it is run."""
    run = before.runs.get(evaluation.training.key) if before is not None else None
    return run is not None and run.fingerprint == evaluation.training.fingerprint and evaluation.name in run.checks


def training_rows(planned: ItemPlan, home: Home) -> list[tuple[str, str, str, str, str]]:
    """Return a row per training: row, recipe, overrides, fingerprint, state."""
    rows = []
    for each in planned.trainings.values():
        folder = RunFolder(home.run(each.fingerprint))
        state = "trained" if folder.result() else "interrupted, goes on" if folder.has_state else "new"
        rows.append((each.key, each.run.recipe, " ".join(each.run.overrides), each.fingerprint, state))
    return rows


def missing_datasets(plans: Sequence[ItemPlan], data_root: Path | None) -> list[str]:
    """Return the names of data sets whose files are not there, those of image folders with the folder."""
    missing = []
    for name, folder in data_sources(plans):
        info = DATASETS[name]
        if not info.files:
            continue
        try:
            locate(info, locate_root(data_root), folder)
        except UserError:
            missing.append(name if folder is None else f"{name} {folder}")
    return missing
