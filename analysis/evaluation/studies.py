"""Studies: extra blocks that measure the evaluation itself, for the checks that attacks alone cannot answer.

epsilon              accuracy over the radius (C6)
steps, draws         accuracy when the steps, or the draws per gradient, are doubled until nothing changes (C7)
random_search        random points around images that survived (C11)
gradient_resolution  agreement of two independent averaged gradients (C13)
progress             the loss along the attack (C14)
unit_test            a head for which an adversarial point provably exists (C15)
calibration          the harness on toys whose result is known (C19)

A study is planned, run, resumed and distributed like any other block.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field

from models.configuration import Config
from models.threat_model import ThreatModel

StudyName = Literal["epsilon", "steps", "draws", "random_search", "gradient_resolution", "progress", "unit_test", "calibration"]

_MULTIPLES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
_LARGEST_L2 = 50.0  # what a threat model admits


class StudySettings(Config):
    """Sizes of the studies."""

    names: tuple[StudyName, ...] = Field(get_args(StudyName), description="Studies to run.")
    num_samples: int = Field(200, ge=1, description="Images of the studies that attack: the first of the suite's.")
    attack: str = Field("apgd_ce", description="Attack of the studies; it must have the parameter `steps`.")
    steps: int = Field(50, ge=1, description="Its steps.")
    num_draws: int = Field(10, ge=1, description="E, draws averaged in each of its gradients.")
    max_steps: int = Field(800, ge=1, description="C7 doubles the steps at most up to here.")
    max_draws: int = Field(160, ge=1, description="C7 and C13 double the draws at most up to here.")
    num_searched: int = Field(100, ge=1, description="C11: images that survived and are searched around.")
    num_random_points: int = Field(1000, ge=1, description="C11: random points per image.")
    num_votes: int = Field(20, ge=1, description="C11: draws that vote on a point; a deterministic model has one.")
    num_gradients: int = Field(64, ge=1, description="C13: images whose gradient is measured.")
    num_tested: int = Field(64, ge=1, description="C15: images of the attack unit test.")


class StudyPoint(Config):
    """One block's study."""

    name: StudyName = Field(description="Which study.")
    level: float | None = Field(None, description="Radius, for `epsilon`.")
    settings: StudySettings = Field(description="Sizes.")


def full_range(threat_model: ThreatModel, num_pixels: int) -> float:
    """Return the radius that holds every image: 1, or under l2 the root of the number of values, at most 50."""
    return 1.0 if threat_model.norm == "linf" else min(math.sqrt(num_pixels), _LARGEST_L2)


def half_range(threat_model: ThreatModel, num_pixels: int) -> float:
    """Return the radius from which on every ball holds the image that is 1/2 everywhere."""
    return 0.5 if threat_model.norm == "linf" else 0.5 * math.sqrt(num_pixels)


def epsilon_levels(threat_model: ThreatModel, num_pixels: int) -> list[float]:
    """Return the radii of the curve: 1/8 to 8 epsilon (8/255: 1, 2, 4, ... 64 / 255), half of the range and the whole."""
    full = full_range(threat_model, num_pixels)
    wanted = [multiple * threat_model.epsilon for multiple in _MULTIPLES] + [half_range(threat_model, num_pixels), full]
    levels: list[float] = []
    for level in sorted(level for level in wanted if 0 < level <= full):
        if not levels or not math.isclose(level, levels[-1], rel_tol=1e-9):
            levels.append(level)
    return levels


def doublings(start: int, cap: int) -> list[int]:
    """Return start, 2 start, 4 start, ... up to the cap, at least two of them."""
    levels = [start, 2 * start]
    while 2 * levels[-1] <= cap:
        levels.append(2 * levels[-1])
    return levels


def halves(start: int) -> list[int]:
    """Return start / 4 and start / 2, as far as they are at least 1: the left part of a curve of convergence."""
    return sorted({level for level in (start // 4, start // 2) if level >= 1})


def applies(name: StudyName, *, randomized: bool, num_configurations: int | None, num_draws: int) -> bool:
    """Return whether a study says anything about a model: draws of a gradient matter only where they are sampled."""
    if name not in ("draws", "gradient_resolution"):
        return True
    return randomized and (num_configurations is None or num_configurations > num_draws)


def study_passes(point: StudyPoint, attack_passes: float, num_draws: int, scoring_draws: int, num_ids: int) -> float:
    """Return the estimated work of a study's block, in forward passes of one image.

    Args:
        attack_passes: of the study's attack per image at its own size. num_draws: E, 1 for a deterministic model.
        scoring_draws: draws that score. num_ids: images of the block.
    """
    settings = point.settings
    once = attack_passes + scoring_draws
    if point.name in ("steps", "draws"):
        return num_ids * 3.75 * once  # usually the first doubling decides
    if point.name == "random_search":
        votes = min(settings.num_votes, num_draws)
        return num_ids * once + min(settings.num_searched, num_ids) * settings.num_random_points * max(1, votes / 4)
    if point.name == "gradient_resolution":
        return num_ids * 6.0 * num_draws * 2
    if point.name == "unit_test":
        return num_ids * (attack_passes / num_draws + 300)
    if point.name == "calibration":
        return 2000.0
    return num_ids * once
