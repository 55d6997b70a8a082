"""What an item asks of an evaluation: suites, attacks and measures of the theory at a scale, and how numbers are read from a result."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.evaluation.protocols import ProtocolName, Scoring
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reproduction.papers.measures import Accuracy, Clean, Measure, Theory, TransferAccuracy, WorstCase, shipped_suite
from analysis.reproduction.papers.model import Column, Item, Run
from analysis.reproduction.scale import BUDGETS, EPOCHS, EvaluationBudget, Scale, parse_scale
from analysis.result import EvaluationResult, Row
from analysis.statistics import Estimate
from models.threat_model import parse_pixel_fraction

SMOKE_EPSILON = 0.1
_PAPER_EPSILON = 8 / 255
_SMOKE_FACTOR = SMOKE_EPSILON / _PAPER_EPSILON
_SMOKE_LIMITS = {"defence.position": 4, "defence.positions": 7}
_SMOKE_PATH_LENGTH = 9
_AUTOATTACK = "torchattacks_autoattack"
_SMOKE_THEORY = {
    "rna_paths.path_difference_transfer": {"num_pairs": 3},
    "landscape.input_landscape": {"num_positions": 11},
    "ensemble_gradients.member_landscapes": {"num_points": 11},
}

# Milestones are the defaults, so that rows whose schedules differ at paper scale alone become one experiment.
_ONE_CYCLE = ("training.schedule.name=one_cycle", "training.schedule.milestones=[100, 150]")
_SMOKE = (
    "backbone.name=resnet8",
    "data.name=digits",
    "data.image_size=16",
    "data.limit_train=640",
    "data.augmentation=none",
    "training.batch_size=32",
    "training.attack.steps=3",
    "training.validation.num_examples=64",
    "training.validation.steps=3",
    "training.validation.num_draws=2",
    "resources.gpus_per_worker=0",
    "resources.workers=1",
)
_SMOKE_BALL = {
    "linf": (f"threat_model.epsilon={SMOKE_EPSILON}", f"training.attack.step_size={SMOKE_EPSILON / 4}"),
    "l2": ("threat_model.epsilon=128/255", "training.attack.step_size=32/255"),
}


@dataclass(frozen=True)
class PlannedRun:
    """A training that an item needs.

    Attributes:
        item: name of the table or figure. row: key of its row. group: column group, empty if all columns share the run.
        scale: at which it is planned. recipe: its name. overrides: `section.field=value`. run: as the item has it.
    """

    item: str
    row: str
    group: str
    scale: Scale
    recipe: str
    overrides: tuple[str, ...]
    run: Run

    @property
    def flags(self) -> list[str]:
        """The overrides as typed on the command line."""
        return [f"--{override}" for override in self.overrides]


def plan(item: Item, scale: Scale, *, extra: bool = True) -> list[PlannedRun]:
    """Return the trainings that an item needs, row by row; equal experiments among them have equal fingerprints.

    Args:
        item: a table or figure.
        scale: `smoke`, `short` or `paper`.
        extra: with the rows that the paper does not have.

    Raises:
        UserError: there is no such scale.
    """
    parse_scale(scale)
    planned: dict[tuple[str, str], PlannedRun] = {}
    for row in item.rows:
        if row.extra and not extra:
            continue
        for column in item.columns:
            run = row.run_for(column)
            group = column.group if column.group in row.runs else ""
            if run is not None and (row.key, group) not in planned:
                planned[row.key, group] = PlannedRun(item.name, row.key, group, scale, run.recipe, overrides_at(run, scale), run)
    return list(planned.values())


def overrides_at(run: Run, scale: Scale) -> tuple[str, ...]:
    """Return a run's overrides at a scale."""
    parse_scale(scale)
    if scale == "paper":
        return run.overrides
    epochs = min(EPOCHS[scale], run.epochs)
    shortened = tuple(f"{name}={math.ceil(value * epochs / run.epochs)}" for name, value in run.in_epochs.items())
    schedule = (f"training.epochs={epochs}", *_ONE_CYCLE, *shortened)
    if scale == "short":
        return (*run.overrides, *schedule)
    return (*map(_clamped, run.overrides), *_SMOKE, *_SMOKE_BALL[run.norm], *schedule)


def evaluation_suites(item: Item, planned: PlannedRun, *, honest: bool = True) -> tuple[Suite, ...]:
    """Return what to evaluate a trained row with: one suite per suite that its columns draw on, paper protocol and honest one together.

    Columns that no attack fills (theory, timing, transfer between networks) are not in it. A row of clean images alone gives no suite.
    """
    row = item.row(planned.row)
    columns = [column for column in item.columns if row.run_for(column) == planned.run]
    measures = [measure for column in columns for measure in _measures(column, honest)]
    names = dict.fromkeys(measure.suite for measure in measures if isinstance(measure, Accuracy | WorstCase))
    return tuple(_suite(name, measures, planned, f"{item.name}/{row.key}") for name in names)


def attack_item(measure: Accuracy, run: Run, scale: Scale) -> AttackItem:
    """Return the attack of a measure at a scale, for suites and for attacks between networks; its name is that of the measure."""
    return _limited_attack(measure.item, run, scale)


def transfer_item(measure: TransferAccuracy, run: Run, scale: Scale, surrogate: str | Path) -> AttackItem:
    """Return a transfer between networks as an attack of a suite, to be run on the network that answers.

    Args:
        measure: whose `row_name` becomes the name of the attack.
        run: a training of the row, for its norm.
        scale: whose limits hold.
        surrogate: folder of the exported network on which the examples are made.
    """
    base = attack_item(measure.attack, run, scale)
    assert base.attack in ("pgd", "fgsm"), f"{base.attack} does not transfer"
    return AttackItem(
        name=measure.row_name,
        attack="transfer_surrogate",
        parameters={**base.parameters, "method": base.attack, "surrogate": str(surrogate)},
        protocols=("T0",),
        epsilon=base.epsilon,
    )


def measure_at(measure: Measure, run: Run, scale: Scale) -> Measure:
    """Return a measure whose theory parameters fit the scale; attacks are fitted by `attack_item`."""
    parse_scale(scale)
    if scale != "smoke" or not isinstance(measure, Theory):
        return measure
    factor = _SMOKE_FACTOR if run.norm == "linf" else 1.0
    changed: dict[str, Any] = {}
    limits = _SMOKE_THEORY.get(measure.function, {})
    for name, value in measure.parameters.items():
        if name in limits:
            changed[name] = min(value, limits[name])
        if name == "differences":
            changed[name] = tuple(min(difference, _SMOKE_PATH_LENGTH) for difference in value)
        elif name in ("radius", "epsilon", "half_width") and isinstance(value, str):
            changed[name] = parse_pixel_fraction(value) * factor
    return replace(measure, parameters={**measure.parameters, **changed})


def transfer_suite(name: str, attacks: Iterable[AttackItem], planned: PlannedRun) -> Suite:
    """Return a suite of attacks from `transfer_item`, scored like the paper's suite `name`."""
    return _suite(name, (), planned, f"{planned.item}/{planned.row} transfer").model_copy(update={"attacks": tuple(attacks)})


def suite_for(suite: Suite, measures: Iterable[Measure]) -> Suite | None:
    """Return what of a suite from `evaluation_suites` is needed for some of its measures; None if nothing is.

    Attacks keep all their protocols, so that their blocks are those of the whole suite. A suite without attacks scores clean images.
    """
    kept: dict[str, AttackItem] = {}
    needed = False
    for measure in measures:
        if isinstance(measure, WorstCase) and _is_of(suite, measure.suite):
            return suite
        if isinstance(measure, Accuracy) and _is_of(suite, measure.suite):
            kept |= {attack.name: attack for attack in suite.attacks if attack.name == measure.row_name}
        needed = needed or isinstance(measure, Clean)
    if not kept and not needed:
        return None
    attacks = tuple(attack for attack in suite.attacks if attack.name in kept)
    return suite.model_copy(update={"attacks": attacks, "studies": suite.studies if attacks else None})


def _is_of(suite: Suite, name: str) -> bool:
    return suite.name.split()[-1] == name


def read_row(measure: Measure, result: EvaluationResult, name: str | None = None) -> Row | None:
    """Return the row of an evaluation that a measure of an attack is read from; None if it is not in it.

    Args:
        name: of the attack, where it is not that of the measure.
    """
    if not isinstance(measure, Accuracy | TransferAccuracy):
        return None
    protocol = measure.protocol if isinstance(measure, Accuracy) else measure.attack.protocol
    for row in result.rows:
        if row.attack == (name or measure.row_name) and protocol in row.protocols:
            return row
    return None


def read_estimate(measure: Measure, result: EvaluationResult) -> Estimate | None:
    """Return the number of a measure from an evaluation; None if it is not in it."""
    if isinstance(measure, Clean):
        return result.clean
    if isinstance(measure, WorstCase):
        return result.headline
    row = read_row(measure, result)
    return row.estimate if row is not None else None


def _measures(column: Column, honest: bool) -> Iterable[Measure]:
    yield column.measure
    counterpart = column.measure.honest
    if honest and counterpart is not None and not isinstance(column.measure, TransferAccuracy):
        yield counterpart


def _suite(name: str, measures: Iterable[Measure], planned: PlannedRun, title: str) -> Suite:
    base, budget = shipped_suite(name), BUDGETS[planned.scale]
    rows: dict[str, AttackItem] = {}
    repetitions = base.scoring.num_repetitions
    for measure in measures:
        if isinstance(measure, WorstCase) and measure.suite == name:
            for attack in base.attacks:
                _merge(rows, _limited_attack(attack, planned.run, planned.scale))
        elif isinstance(measure, Accuracy) and measure.suite == name:
            _merge(rows, attack_item(measure, planned.run, planned.scale))
            repetitions = max(repetitions, measure.num_repetitions or 1)
    scoring = base.scoring.model_copy(update={"num_repetitions": repetitions})
    return base.model_copy(
        update={
            "name": f"{title} {name}",
            "description": f"what {title} needs of {name}",
            "defences": (),
            "num_samples": _smaller(base.num_samples, budget.num_samples),
            "scoring": _limited_scoring(scoring, budget),
            "attacks": tuple(rows.values()),
            "studies": base.studies if budget.studies else None,
        }
    )


def _merge(rows: dict[str, AttackItem], item: AttackItem) -> None:
    """Add a row, or its protocols to the row of that name."""
    known = rows.get(item.name)
    if known is None:
        rows[item.name] = item
        return
    protocols: tuple[ProtocolName, ...] = tuple(dict.fromkeys(sorted((*known.protocols, *item.protocols))))
    rows[item.name] = known.model_copy(update={"protocols": protocols, "num_draws": max(known.num_draws, item.num_draws)})


def _limited_attack(item: AttackItem, run: Run, scale: Scale) -> AttackItem:
    budget = BUDGETS[scale]
    num_samples = _smaller(item.num_samples, budget.num_samples) if item.num_samples is not None else None
    if item.attack == _AUTOATTACK:
        num_samples = _smaller(num_samples, budget.autoattack_samples)
    return item.model_copy(
        update={
            "parameters": _limited_parameters(item, item.parameters, run, scale),
            "deterministic_parameters": _limited_parameters(item, item.deterministic_parameters, run, scale, own=False),
            "l2_parameters": _limited_parameters(item, item.l2_parameters, run, scale, own=False),
            "num_draws": _smaller(item.num_draws, budget.num_draws),
            "num_samples": num_samples,
            "epsilon": item.epsilon * _attack_factor(run, scale) if item.epsilon is not None else None,
        }
    )


def _limited_parameters(item: AttackItem, parameters: Mapping[str, Any], run: Run, scale: Scale, own: bool = True) -> dict[str, Any]:
    budget, factor = BUDGETS[scale], _attack_factor(run, scale)
    limits = {"steps": budget.max_steps, "rounds": budget.max_steps, "n_queries": budget.max_queries, "num_queries": budget.max_queries}
    limited: dict[str, Any] = {}
    for name, value in parameters.items():
        if limits.get(name) is not None:
            limited[name] = min(value, limits[name])
        elif name in ("step_size", "alpha") and factor != 1:
            limited[name] = parse_pixel_fraction(value) * factor
        else:
            limited[name] = value
    if own and item.attack == _AUTOATTACK and budget.autoattack_version is not None:
        limited["version"] = budget.autoattack_version
    return limited


def _attack_factor(run: Run, scale: Scale) -> float:
    return _SMOKE_FACTOR if scale == "smoke" and run.norm == "linf" else 1.0


def _limited_scoring(scoring: Scoring, budget: EvaluationBudget) -> Scoring:
    limits = budget.scoring or {}
    return scoring.model_copy(update={name: min(getattr(scoring, name), limit) for name, limit in limits.items()})


def _clamped(override: str) -> str:
    name, _, value = override.partition("=")
    if name not in _SMOKE_LIMITS:
        return override
    return f"{name}={re.sub(r'[0-9]+', lambda match: str(min(int(match[0]), _SMOKE_LIMITS[name])), value)}"


def _smaller(value: int | None, limit: int | None) -> int | None:
    return min((number for number in (value, limit) if number is not None), default=None)
