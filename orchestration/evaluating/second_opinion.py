"""A second opinion: an independent implementation attacks the same model on the same images, and both numbers stand side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from analysis.attacks.independent_autoattack import version
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from analysis.reporting.tables import format_estimate
from analysis.result import EvaluationResult
from analysis.statistics import Estimate, paired_difference
from models.errors import unknown_name
from models.randomness import is_randomized
from orchestration import console
from orchestration.evaluating.evaluation_run import EvaluationSettings, Job, prepare
from orchestration.home import Workplace
from orchestration.trained_models.targets import Target

OPINIONS = ("autoattack",)
AGREEMENT = 0.005
"""Within half a point two implementations agree on a deterministic model."""


@dataclass(frozen=True)
class SecondOpinion:
    """Both numbers, under an unknown draw (T1), on the same images.

    Attributes:
        implementation: whose the other number is, with its version. ours: worst attack per image of the evaluation. theirs: its own.
        difference: ours minus theirs, paired by image. randomized: the model has more than one draw.
    """

    implementation: str
    ours: Estimate
    theirs: Estimate
    difference: Estimate
    randomized: bool

    def to_json(self) -> dict[str, Any]:
        """Return both numbers as JSON types."""
        parts = {name: getattr(self, name) for name in ("ours", "theirs", "difference")}
        return {"implementation": self.implementation, "randomized": self.randomized} | {
            name: {"value": each.value, "low": each.low, "high": each.high, "num_samples": each.num_samples, "num_draws": each.num_draws}
            for name, each in parts.items()
        }

    @property
    def sentence(self) -> str:
        """What the two numbers say of each other."""
        points = 100 * self.difference.value
        between = f"{abs(points):.1f} points [{100 * self.difference.low:+.1f}, {100 * self.difference.high:+.1f}] of the same images"
        if self.difference.low > 0 or (not self.randomized and self.difference.value > AGREEMENT):
            return f"the independent attack leaves {between} less: ours is not the strongest attack here, and its number is too high"
        if self.difference.high < 0 or (not self.randomized and self.difference.value < -AGREEMENT):
            return f"ours leaves {between} less than the independent attack"
        if self.randomized:
            return f"they differ by {between}: no more than chance"
        return f"they agree within half a point: {between}"


def check_opinion(name: str) -> None:
    """Raise a `UserError` where there is no independent implementation of this name, or it is not installed."""
    if name not in OPINIONS:
        raise unknown_name("second opinion", name, OPINIONS)
    version()


def suite_against(target: Target) -> str:
    """Return the suite whose number is the counterpart, where none was asked for."""
    return "autoattack_rand" if is_randomized(target.load()) else "autoattack_standard"


def prepare_opinion(job: Job, target: Target, workplace: Workplace) -> Job:
    """Plan the independent attack on the images of a job; its records are beside those of the job.

    Raises:
        UserError: it does not fit the number of classes or the norm.
    """
    settings: EvaluationSettings = job.settings
    suite = load_suite(settings.suite, target.defence)
    attack = "pyautoattack_rand" if job.plan[0].randomized else "pyautoattack_standard"
    alone = Suite(
        name=f"against_{attack}",
        num_samples=suite.num_samples,
        scoring=suite.scoring,
        attacks=(AttackItem(name=attack, attack=attack),),
    )
    return prepare(f"{job.name}, independent", target, replace(settings, suite=alone), workplace, (job.x, job.y))


def compare_opinions(ours: EvaluationResult, theirs: EvaluationResult) -> SecondOpinion | None:
    """Return both numbers, or None where one of them has none."""
    if ours.worst is None or theirs.worst is None or ours.headline is None or theirs.headline is None:
        return None
    mine, its = ours.worst, theirs.worst
    if mine.ids.tolist() != its.ids.tolist() or mine.data != its.data:
        raise ValueError("the two evaluations are not of the same images")
    difference = paired_difference(mine.correct_SR, its.correct_SR, common_draws=not mine.exact, exact=(mine.exact, its.exact))
    return SecondOpinion(version(), ours.headline, theirs.headline, difference, ours.header["num_configurations"] != 1)


def show_opinion(opinion: SecondOpinion) -> None:
    """Print both numbers side by side, and what they say of each other."""
    console.table(
        "second opinion: the same images under an unknown draw (T1), 95 % intervals",
        ["ours, worst attack per image", opinion.implementation, "ours minus theirs, points"],
        [
            [
                format_estimate(opinion.ours),
                format_estimate(opinion.theirs),
                f"{100 * opinion.difference.value:+.1f} [{100 * opinion.difference.low:+.1f}, {100 * opinion.difference.high:+.1f}]",
            ]
        ],
    )
    console.say(f"second opinion: {opinion.sentence}")
