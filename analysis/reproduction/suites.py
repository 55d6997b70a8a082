"""What an item asks of an evaluation: suites, attacks and measures of the theory at a scale, and how numbers are read from a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.evaluation.protocols import ProtocolName, Scoring
from analysis.evaluation.studies import StudySettings
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reproduction.papers.measures import Accuracy, Clean, Measure, Theory, TransferAccuracy, WorstCase, shipped_suite
from analysis.reproduction.papers.model import Column, Item, Row, Run
from analysis.reproduction.scale import BUDGETS, SMOKE_EPSILON, STAND_IN_SCALES, EvaluationBudget, Scale
from analysis.result import EvaluationResult
from analysis.result import Row as ResultRow
from models.threat_model import parse_pixel_fraction

_SMOKE_FACTOR = SMOKE_EPSILON / (8 / 255)
_AUTOATTACK = "torchattacks_autoattack"
_SMALL_THEORY = {
    "rna_path_transfer": {"num_pairs": 3, "difference": 9},
    "input_landscape": {"num_positions": 11},
    "member_landscapes": {"num_points": 11},
}
"""The most that parameters of quantities may be; the small network has 9 normalizations."""


def evaluation_suites(item: Item, row: Row, run: Run, scale: Scale, *, honest: bool = True) -> dict[str, Suite]:
    """Return what to evaluate a trained row with, by the name of the shipped suite that its columns draw on.

    Each holds the attacks of the paper's protocol and of the honest one. Columns that no attack fills (theory, timing, transfer between
    networks) are not in it. A row of clean images alone gives no suite.
    """
    columns = [column for column in item.columns if row.run_for(column) == run]
    measures = [measure for column in columns for measure in _measures(column, honest)]
    names = dict.fromkeys(measure.suite for measure in measures if isinstance(measure, Accuracy | WorstCase))
    return {name: _suite(name, measures, f"{item.name}/{row.key}", run, scale) for name in names}


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
    if scale not in STAND_IN_SCALES or not isinstance(measure, Theory):
        return measure
    factor = _attack_factor(run, scale)
    changed: dict[str, Any] = {}
    limits = _SMALL_THEORY.get(measure.name, {})
    for name, value in measure.parameters.items():
        if name in limits:
            changed[name] = min(value, limits[name])
        elif name in ("radius", "epsilon", "half_width") and isinstance(value, str):
            changed[name] = parse_pixel_fraction(value) * factor
    return replace(measure, parameters={**measure.parameters, **changed})


def transfer_suite(name: str, attacks: Iterable[AttackItem], title: str, run: Run, scale: Scale) -> Suite:
    """Return a suite of attacks from `transfer_item`, scored like the paper's suite `name`."""
    return _suite(name, (), title, run, scale).model_copy(update={"attacks": tuple(attacks)})


def suite_for(name: str, suite: Suite, measures: Iterable[Measure]) -> Suite | None:
    """Return what of a suite from `evaluation_suites`, there called `name`, is needed for some measures; None if nothing is.

    Attacks keep all their protocols, so that their blocks are those of the whole suite. A suite without attacks scores clean images.
    """
    kept: set[str] = set()
    needed = False
    for measure in measures:
        if isinstance(measure, WorstCase) and measure.suite == name:
            return suite
        if isinstance(measure, Accuracy) and measure.suite == name:
            kept.add(measure.row_name)
        needed = needed or isinstance(measure, Clean)
    attacks = tuple(attack for attack in suite.attacks if attack.name in kept)
    if not attacks and not needed:
        return None
    return suite.model_copy(update={"attacks": attacks, "studies": suite.studies if attacks else None})


def read_row(measure: Measure, result: EvaluationResult, name: str | None = None) -> ResultRow | None:
    """Return the row of an evaluation that a measure of an attack is read from; None if it is not in it.

    Args:
        name: of the attack, where it is not that of the measure.
    """
    if not isinstance(measure, Accuracy | TransferAccuracy):
        return None
    for row in result.rows:
        if row.attack == (name or measure.row_name) and measure.protocol in row.protocols:
            return row
    return None


def _measures(column: Column, honest: bool) -> Iterable[Measure]:
    yield column.measure
    counterpart = column.measure.honest
    if honest and counterpart is not None and not isinstance(column.measure, TransferAccuracy):
        yield counterpart


def _suite(name: str, measures: Iterable[Measure], title: str, run: Run, scale: Scale) -> Suite:
    base, budget = shipped_suite(name), BUDGETS[scale]
    rows: dict[str, AttackItem] = {}
    repetitions = base.scoring.num_repetitions
    for measure in measures:
        if isinstance(measure, WorstCase) and measure.suite == name:
            for attack in base.attacks:
                _merge(rows, _limited_attack(attack, run, scale))
        elif isinstance(measure, Accuracy) and measure.suite == name:
            _merge(rows, attack_item(measure, run, scale))
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
            "studies": _limited_studies(base.studies, budget),
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


def _limited_studies(studies: StudySettings | None, budget: EvaluationBudget) -> StudySettings | None:
    if studies is None or not budget.studies:
        return None
    return studies.changed(**{name: min(getattr(studies, name), limit) for name, limit in (budget.study_sizes or {}).items()})


def _limited_scoring(scoring: Scoring, budget: EvaluationBudget) -> Scoring:
    limits = budget.scoring or {}
    return scoring.model_copy(update={name: min(getattr(scoring, name), limit) for name, limit in limits.items()})


def _smaller(value: int | None, limit: int | None) -> int | None:
    return min((number for number in (value, limit) if number is not None), default=None)
