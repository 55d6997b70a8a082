"""How the points of a sweep are proposed: Optuna's samplers by name, with every argument said, and what each of them cannot do.

Arguments whose defaults moved between Optuna's versions stand here, so that a sweep proposes in the same way whichever is installed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from models.errors import UserError
from orchestration.search_space import as_proposed
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.trial_window import WindowedTPE

POPULATION = 20
"""Of the genetic samplers: small enough that a sweep of a hundred trials has several generations."""

MOST_GP_TRIALS = 1000
"""A Gaussian process takes the cube of its trials: beyond this, minutes for each proposal."""


@dataclass(frozen=True)
class Sampler:
    """One way to propose.

    Attributes:
        description: one line. make: (sweep, seed) -> the sampler of Optuna.
        choices, conditions, objectives: whether it can do dimensions without an order, dimensions that only some trials have, and
            several objectives. one_objective, one_dimension: whether it can do with a single one.
        shares: whether bounded dimensions are proposed as shares, see `search_space.suggest`: it looks at all dimensions together.
        steady_seed: whether a later start takes the seed of the first: a sequence must go on, others would propose the same again.
    """

    description: str
    make: Callable[[SweepConfig, int], optuna.samplers.BaseSampler]
    choices: bool = True
    conditions: bool = True
    objectives: bool = True
    one_objective: bool = True
    one_dimension: bool = True
    shares: bool = True
    steady_seed: bool = False


def _startup(config: SweepConfig) -> int:
    """Return how many points are random before a model of the trials is made."""
    return max(4, min((config.num_trials or 0) // 4, 100))


def _tpe(config: SweepConfig, seed: int, *, multivariate: bool, group: bool = False) -> optuna.samplers.BaseSampler:
    return WindowedTPE(
        seed=seed,
        n_startup_trials=_startup(config),
        n_ei_candidates=24,
        multivariate=multivariate,
        group=group,
        constant_liar=True,
    )


def _gp(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        n_startup_trials=_startup(config),
        deterministic_objective=False,
        warn_independent_sampling=False,
    )


def _cmaes(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.CmaEsSampler(
        seed=seed,
        sigma0=None,
        n_startup_trials=1,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_independent_sampling=False,
        consider_pruned_trials=config.stopping is not None,  # else it would learn from survivors alone
        use_separable_cma=False,
        with_margin=_has_whole_numbers(config),
        lr_adapt=False,
    )


def _has_whole_numbers(config: SweepConfig) -> bool:
    """Return whether a dimension has gaps between its values, which a normal distribution narrower than them would never leave."""
    return any(each.type == "int" or each.step is not None for each in (config.space or {}).values())


def _qmc(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.QMCSampler(
        qmc_type="sobol",
        scramble=True,
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_asynchronous_seeding=False,
        warn_independent_sampling=False,
    )


def _nsgaii(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=POPULATION, crossover_prob=0.9, swapping_prob=0.5, seed=seed)


def _nsgaiii(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIIISampler(
        population_size=POPULATION, crossover_prob=0.9, swapping_prob=0.5, seed=seed, dividing_parameter=3
    )


def _random(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS = {
    "tpe": Sampler(
        "good and bad trials as two densities (TPE); with one objective over all dimensions together",
        lambda config, seed: _tpe(config, seed, multivariate=len(config.objectives) == 1),
        shares=False,  # the studies of earlier sweeps do not have them
    ),
    "multivariate_tpe": Sampler(
        "TPE over all dimensions together, for several objectives as well",
        lambda config, seed: _tpe(config, seed, multivariate=True),
    ),
    "grouped_tpe": Sampler(
        "TPE over the dimensions that occur together: for conditional dimensions and several recipes",
        lambda config, seed: _tpe(config, seed, multivariate=True, group=True),
    ),
    "gp": Sampler("a Gaussian process: the fewest trials for few dimensions", _gp, conditions=False),
    "cmaes": Sampler(
        "CMA-ES: a normal distribution that moves and turns, for hundreds of trials of numbers",
        _cmaes,
        choices=False,
        conditions=False,
        objectives=False,
        one_dimension=False,
    ),
    "nsgaii": Sampler("NSGA-II: a population that crosses over, for fronts of two objectives and many trials", _nsgaii, conditions=False),
    "nsgaiii": Sampler("NSGA-III: as NSGA-II, for three objectives and more", _nsgaiii, conditions=False, one_objective=False),
    "qmc": Sampler("a Sobol sequence: covers the space more evenly than chance", _qmc, choices=False, conditions=False, steady_seed=True),
    "random": Sampler("chance", _random, shares=False),
    "grid": Sampler("every point, or the given ones", _random, shares=False),
}


def sampler_of(config: SweepConfig, trials: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a start of a sweep.

    Args:
        trials: that the study has already; with the seed of the first start a later one would propose that one's first points again.
    """
    sampler = SAMPLERS[config.sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # that it is one, docs/sweeps.md says once
        return sampler.make(config, config.seed if sampler.steady_seed else config.seed + trials)


def proposed(config: SweepConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a trial as Optuna is told to propose them."""
    return as_proposed(config.space or {}, values, shares=SAMPLERS[config.sampler].shares)


def check_sampler(config: SweepConfig) -> None:
    """Check that the sampler can do the space and the objectives.

    Raises:
        UserError: what it cannot do, and which can.
    """
    sampler, space = SAMPLERS[config.sampler], config.space or {}
    where = f"sweep {config.name}: sampler {config.sampler}"

    def refuse(reason: str, attribute: str) -> UserError:
        able = ", ".join(name for name, each in SAMPLERS.items() if getattr(each, attribute) and name != "grid")
        return UserError(f"{where}: {reason}; these can: {able}")

    conditional = [name for name, dimension in space.items() if dimension.when]
    if conditional and not sampler.conditions:
        raise refuse(f"it takes all dimensions together, and {conditional[0]} is one that only some trials have", "conditions")
    unordered = [name for name, dimension in space.items() if dimension.type == "choice"]
    if unordered and not sampler.choices:
        raise refuse(f"it moves along numbers, and {unordered[0]} is a choice", "choices")
    if len(config.objectives) > 1 and not sampler.objectives:
        raise refuse(f"it improves one objective, and there are {len(config.objectives)}", "objectives")
    if len(config.objectives) == 1 and not sampler.one_objective:
        raise refuse("it is for several objectives, and there is one", "one_objective")
    if len(space) == 1 and not sampler.one_dimension:
        raise refuse("it needs two dimensions, and there is one", "one_dimension")
    if sampler.shares:
        for point in config.points:
            halves = [name for name in point if space[name].above is not None and space[name].above not in point]
            if halves:
                raise UserError(f"{where}: the point {point} says {halves[0]} and not {space[halves[0]].above}, above which it lies")
    if config.sampler == "gp" and (config.num_trials or 0) > MOST_GP_TRIALS:
        raise UserError(f"{where}: its proposals take minutes beyond {MOST_GP_TRIALS} trials; ask for fewer, or take tpe")
    if config.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError(f"{where} needs the package cmaes: `make setup EXTRAS=cmaes` installs it")
