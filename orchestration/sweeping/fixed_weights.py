"""The weights that the trainings of a sweep begin with: what their names mean is looked up once, when the sweep begins, and kept.

An alias of a registered model may move while a sweep runs, a file may be written anew: trials that began with other weights than the
first ones could not be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.errors import UserError
from orchestration.home import Home
from orchestration.sweeping.config import SWEEP_FILE, FixedWeights, SweepConfig
from orchestration.sweeping.network_check import ends_of
from orchestration.sweeping.status import read_sweep
from orchestration.trained_models.initial_weights import InitialWeights, lasting_name, named_weights


def with_fixed_weights(config: SweepConfig, folder: Path, home: Home) -> tuple[SweepConfig, dict[str, InitialWeights]]:
    """Return a sweep whose experiments name weights by names that last, and those weights by these names.

    What a sweep has begun with, as its folder says, stays; one that an earlier version began has no record and keeps its names.

    Raises:
        UserError: weights are not there, or a name that has no lasting one means others than when the sweep began.
    """
    experiments = [experiment for _, experiment in ends_of(config)]
    experiments += [config.baseline_experiment(recipe) for recipe in config.baselines]
    names = sorted({each.training.initial_weights for each in experiments if each.training.initial_weights is not None})
    if not names:
        return config, {}
    begun = _begun(config, folder)
    if begun is None:
        return config, {name: _found(config, name, home) for name in names}
    fixed, weights = {}, {}
    for name in names:
        lasting = begun[name].name if name in begun else lasting_name(name, home)
        found = _found(config, lasting, home)
        if name in begun and begun[name].sha256 != found.sha256:
            raise UserError(
                f"sweep {config.name}: training.initial_weights: {name} is not what the sweep has begun with: its SHA-256 was "
                f"{begun[name].sha256[:16]}... and is {found.sha256[:16]}...; under another name the sweep begins anew, with what is there"
            )
        fixed[name], weights[lasting] = FixedWeights(name=lasting, sha256=found.sha256), found
    return config.model_copy(update={"fixed_weights": fixed}), weights


def _begun(config: SweepConfig, folder: Path) -> Mapping[str, FixedWeights] | None:
    """Return what names meant when the sweep began, empty if it has not; None: it began without a record of that."""
    if not (folder / SWEEP_FILE).is_file():
        return config.fixed_weights
    begun = read_sweep(folder)
    return begun.fixed_weights if "fixed_weights" in begun.model_fields_set else None


def _found(config: SweepConfig, name: str, home: Home) -> InitialWeights:
    try:
        return named_weights(name, home)
    except UserError as error:
        raise UserError(f"sweep {config.name}: {error}") from None
