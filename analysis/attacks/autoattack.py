"""AutoAttack's two ensembles of attacks by name, at official strength, from this package's own attacks.

autoattack_standard   APGD-CE 100, targeted APGD 9 x 100, targeted FAB 9 x 100, Square 5000 queries: for deterministic models
autoattack_rand       APGD-CE 100 and APGD-DLR 100, gradients averaged over draws (E = 20 in the suites): for randomized models

Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020.
Deviation: on a randomized model no example is taken out after a single misclassification, and the attack of each example is the one
with the highest share of errors over common draws. Below 4 classes targeted APGD has no loss; the margin takes its place, and in
`autoattack_rand` it takes that of the ratio below 3.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks import apgd, fab, square
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.randomness import derive_seed
from trainers.attacks import margin


class StandardParameters(Config):
    """Sizes of AutoAttack's standard version; the defaults are the official ones."""

    steps: int = Field(100, ge=1, description="Steps of APGD and FAB.")
    num_targets: int = Field(9, ge=1, description="Target classes of APGD and FAB.")
    num_queries: int = Field(5000, ge=1, description="Queries of Square.")


class RandParameters(Config):
    """Sizes of AutoAttack's version for randomized models; the draws per gradient are the suite's (official: 20)."""

    steps: int = Field(100, ge=1, description="Steps of APGD.")


Part = tuple[AttackEntry, Config]


def _entry(entries: tuple[AttackEntry, ...], name: str) -> AttackEntry:
    return next(entry for entry in entries if entry.name == name)


def _standard_parts(parameters: StandardParameters, num_classes: int) -> list[Part]:
    steps, targets = parameters.steps, parameters.num_targets
    if num_classes < 4:
        second: Part = (_entry(apgd.ATTACKS, "apgd_margin"), apgd.ApgdParameters(steps=steps))
    else:
        second = (_entry(apgd.ATTACKS, "apgd_targeted"), apgd.TargetedApgdParameters(steps=steps, num_targets=targets))
    return [
        (_entry(apgd.ATTACKS, "apgd_ce"), apgd.ApgdParameters(steps=steps)),
        second,
        (_entry(fab.ATTACKS, "fab_targeted"), fab.FabParameters(steps=steps, num_targets=targets)),
        (_entry(square.ATTACKS, "square"), square.SquareParameters(num_queries=parameters.num_queries)),
    ]


def _rand_parts(parameters: RandParameters, num_classes: int) -> list[Part]:
    second = "apgd_dlr" if num_classes >= 3 else "apgd_margin"
    return [(_entry(apgd.ATTACKS, name), apgd.ApgdParameters(steps=parameters.steps)) for name in ("apgd_ce", second)]


def _run_parts(model: AttackedModel, problem: AttackProblem, parts: list[Part]) -> AttackOutput:
    best = BestPoint(exact=True)  # shares of errors are comparable between attacks, losses are not
    for entry, parameters in parts:
        rows = best.open_rows(model, problem.x)
        if rows.numel() == 0:
            break
        part = replace(problem, x=problem.x[rows], y=problem.y[rows], seed=derive_seed(problem.seed, entry.name))
        x_adv = entry.run(model, part, parameters).x
        best.update_rows_(rows, x_adv, *model.score(x_adv, part.y, margin))
    return AttackOutput(best.result()[0])


def _standard(model: AttackedModel, problem: AttackProblem, parameters: StandardParameters) -> AttackOutput:
    return _run_parts(model, problem, _standard_parts(parameters, problem.num_classes))


def _rand(model: AttackedModel, problem: AttackProblem, parameters: RandParameters) -> AttackOutput:
    return _run_parts(model, problem, _rand_parts(parameters, problem.num_classes))


def _cost_of(parts: list[Part], num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    costs = [entry.cost(parameters, num_draws, num_classes, fixed_draws) for entry, parameters in parts]
    return Cost(sum(cost.forward for cost in costs) + num_draws * len(parts), sum(cost.backward for cost in costs))


def _standard_cost(parameters: StandardParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    return _cost_of(_standard_parts(parameters, num_classes), num_draws, num_classes, fixed_draws)


def _rand_cost(parameters: RandParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    return _cost_of(_rand_parts(parameters, num_classes), num_draws, num_classes, fixed_draws)


ATTACKS = (
    AttackEntry(
        "autoattack_standard",
        "AutoAttack standard at official strength, for deterministic models",
        StandardParameters,
        ("linf", "l2"),
        _standard,
        _standard_cost,
        ignores_scale=True,
    ),
    AttackEntry(
        "autoattack_rand",
        "AutoAttack for randomized models: APGD-CE and APGD-DLR over averaged draws",
        RandParameters,
        ("linf", "l2"),
        _rand,
        _rand_cost,
        ignores_scale=True,
    ),
)
