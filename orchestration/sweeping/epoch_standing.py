"""What early stopping compares trials by after an epoch: the watched metric, or several objectives, and before them the constraints.

A trial that violates a constraint on a metric of epochs is worse than all that do not, and the worse the more it violates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.study import proxy_values

STANDING = "standing"
"""Of a trial: epoch -> its standing, where that is not the watched metric itself."""

Standing = float | tuple[float, ...]
"""More is better; of several objectives (violation, *losses), of each of which less is better."""


def standing(config: SweepConfig, result: Mapping[str, Any]) -> Standing | None:
    """Return how a trial stands after an epoch; None: the epoch does not say."""
    assert config.stopping is not None
    violation = sum(max(each.violation(result[each.metric]), 0.0) for each in config.constraints if each.metric in result)
    if config.stopping.scheduler == "pareto":
        signs = [1.0 if objective.mode == "min" else -1.0 for objective in config.objectives]
        losses = [sign * result.get(each.metric, math.nan) for sign, each in zip(signs, config.objectives, strict=True)]
        return (violation, *losses) if all(map(math.isfinite, (violation, *losses))) else None
    value = result.get(config.stopping.metric)
    if value is None or not math.isfinite(value):
        return None
    return -violation if violation > 0 or math.isnan(violation) else value


def is_kept(config: SweepConfig, result: Mapping[str, Any]) -> bool:
    """Return whether a study has to keep standings beside what it keeps anyway."""
    assert config.stopping is not None
    return config.stopping.scheduler == "pareto" or any(each.metric in result for each in config.constraints)


def standings(config: SweepConfig, trial: FrozenTrial) -> dict[int, Standing]:
    """Return epoch -> how a trial of the study stood."""
    kept = trial.user_attrs.get(STANDING)
    if kept is None:
        return dict(proxy_values(config, trial))
    return {int(epoch): tuple(value) if isinstance(value, list) else value for epoch, value in kept.items()}
