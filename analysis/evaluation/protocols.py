"""Who knows which draw: the named protocols under which a randomized model is attacked and scored.

T0 paper            a draw is attacked, another one scores, once: what the papers' own scripts do, a transfer attack between draws
T1 unknown draw     gradients are averaged over fresh draws, the perturbed points are scored on R others: the headline
T2 known draw       the draw that is attacked is the draw that scores: a lower bound, mean over draws
T3 repeated queries the worst of k draws on the points of T1
T4 averaged         the predictor that averages the probabilities of n draws is attacked and scored

Where the space of draws is small, sampling is replaced by enumeration: expectations are then exact. For a deterministic model all
protocols coincide and one pass is made.

Shapes: S samples of one block, R draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, Draw, DrawSource, FixedDraws, FreshDraws, all_configurations, seeded_draws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.registry import AttackOutput
from models.configuration import Config
from models.randomness import derive_seed, is_randomized
from models.shared_prefix import SharedPrefix
from trainers.attacks import margin

ProtocolName = Literal["T0", "T1", "T2", "T3", "T4"]

PROTOCOL_TITLES: dict[str, str] = {
    "T0": "paper: one draw attacked, another scores",
    "T1": "unknown draw, gradients averaged over draws",
    "T2": "known draw",
    "T3": "worst of k draws",
    "T4": "averaged predictor",
}

RunAttack = Callable[[AttackedModel, int], AttackOutput]
"""`(model, seed) -> AttackOutput`: an attack with its parameters, images and labels bound."""

SAMPLED = "sampled"
"""Draw set of T1 where the space of draws is enumerated: draws as inference takes them, which must agree with the enumeration (C17)."""

_SAMPLED_ON_CLEAN = 100
"""Fewest draws that an enumeration is held against on clean images, where they cost a pass each: a handful could not tell."""

_UNCHANGED = 1e-5  # far below 1/255, above what clamping for CW moves


class Scoring(Config):
    """How many draws attack and score."""

    num_selection_draws: int = Field(20, ge=1, description="R_sel: draws on which the worst attack of each sample is chosen.")
    num_evaluation_draws: int = Field(100, ge=1, description="R: other draws, on which it is scored (T1).")
    num_known_draws: int = Field(5, ge=1, description="T2: draws that are attacked and scored each for itself.")
    num_averaged_draws: int = Field(10, ge=2, description="T4: n, draws averaged in one prediction.")
    num_averaged_groups: int = Field(10, ge=1, description="T4: independent groups of n draws that score.")
    num_retries: int = Field(5, ge=1, description="T3: k, draws that the attacker may wait for.")
    num_repetitions: int = Field(1, ge=1, description="T0: repetitions, each with new draws.")
    attacked_draw: Literal["frozen", "each_forward"] = Field(
        "frozen",
        description="T0: the attack sees one draw (CTRW, RNA, DCS), or a new one at each forward (RED's inference inside `forward`).",
    )
    enumerate_up_to: int = Field(
        512, ge=0, description="Score all configurations instead of sampling, if there are at most this many; 0: always sample."
    )


@dataclass
class BlockOutcome:
    """What one attack under one protocol did to one block.

    Attributes:
        correct: by draw set (`selection`, `evaluation`, and `sampled` beside an enumeration), a boolean matrix (S, R).
        exact: the draws are the whole space of draws.
        margin_S: mean over evaluation draws of true logit minus largest other logit.
        linf_S, l2_S: largest distance of the sample's perturbed points from the image.
        num_unchanged_S: perturbed points that equal the image; where one known draw was attacked, points left alone because that
            draw errs on the image are not counted. num_points: perturbed points per sample.
        lowest, highest: extreme pixels. num_not_finite, num_out_of_range: images that had to be mended.
        num_forward, num_backward: passes per sample. draws_disjoint: no scoring draw was seen by the attack (None: not applicable).
        x: the perturbed images of the last attack. points: those of all attacks.
    """

    correct: dict[str, Tensor]
    exact: bool
    margin_S: Tensor
    linf_S: Tensor
    l2_S: Tensor
    num_unchanged_S: Tensor
    num_points: int
    lowest: float = 0.0
    highest: float = 1.0
    num_not_finite: int = 0
    num_out_of_range: int = 0
    num_forward: float = 0.0
    num_backward: float = 0.0
    draws_disjoint: bool | None = None
    x: Tensor | None = None
    points: tuple[Tensor, ...] = ()


@dataclass
class BlockSetting:
    """A block of samples with everything that decides which draws are taken. `attack_name` and `block` go into the attack's seeds;
    the scoring draws depend on `seed` alone, so that all blocks and all attacks share them.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    seed: int
    attack_name: str
    block: int
    scoring: Scoring
    num_draws: int = 1
    randomized: bool = field(init=False)
    configurations: tuple[Draw, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        self.randomized = is_randomized(self.model)
        self.configurations = all_configurations(self.model, self.scoring.enumerate_up_to)

    def seed_for(self, *parts: int | str) -> int:
        """Return a seed of this attack on this block."""
        return derive_seed(self.seed, "attack", self.attack_name, self.block, *parts)

    def scoring_draws(self) -> tuple[dict[str, tuple[Draw, ...]], bool]:
        """Return the draws of each set, and whether they are the whole space."""
        if self.configurations is not None:
            return {"selection": self.configurations, "evaluation": self.configurations}, True
        return {
            "selection": seeded_draws(self.scoring.num_selection_draws, self.seed, "selection"),
            "evaluation": seeded_draws(self.scoring.num_evaluation_draws, self.seed, "evaluation"),
        }, False

    def known_draws(self) -> tuple[Draw, ...]:
        """Return the draws of T2: all configurations if they are few enough."""
        if self.configurations is not None and len(self.configurations) <= self.scoring.num_known_draws:
            return self.configurations
        return seeded_draws(self.scoring.num_known_draws, self.seed, "known")

    def gradient_draws(self) -> DrawSource:
        """Return the draws that an attack averages over without knowing the defender's: all configurations if no more are asked for."""
        if not self.randomized:
            return FixedDraws((ONLY_DRAW,))
        if self.configurations is not None and len(self.configurations) <= self.num_draws:
            return FixedDraws(self.configurations)
        return FreshDraws(self.num_draws, self.seed_for("gradient draws"))


def run_protocol(protocol: ProtocolName, setting: BlockSetting, attack: RunAttack) -> BlockOutcome:
    """Attack and score one block under T0, T1, T2 or T4 (T3 is computed from the scores of T1)."""
    runners = {"T0": _paper, "T1": _unknown_draw, "T2": _known_draw, "T4": _averaged}
    return runners[protocol](setting, attack)


def score_clean(setting: BlockSetting, *, averaged: bool = False) -> BlockOutcome:
    """Score the unperturbed images on the draws of T1, or of T4."""

    def leave_alone(model: AttackedModel, seed: int) -> AttackOutput:
        del model, seed
        return AttackOutput(setting.x)

    outcome = _averaged(setting, leave_alone) if averaged else _unknown_draw(setting, leave_alone, num_sampled=_SAMPLED_ON_CLEAN)
    outcome.draws_disjoint = None
    return outcome


@torch.no_grad()
def score_draws(predictor: Predictor, x: Tensor, y: Tensor, draws: tuple[Draw, ...]) -> tuple[Tensor, Tensor]:
    """Return correctness (S, R) and the mean over draws of true logit minus largest other logit (S,)."""
    columns, margins = [], torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with SharedPrefix(predictor.model, x, len(draws) * predictor.num_averaged):
        for draw in draws:
            logits_SK = predictor.logits(x, draw)
            # The largest of NaN is NaN's own place: no answer, so not a right one.
            columns.append((logits_SK.argmax(1) == y) & ~logits_SK.isnan().any(1))
            margins -= margin(logits_SK, y)
    return torch.stack(columns, dim=1), margins / len(draws)


def _paper(setting: BlockSetting, attack: RunAttack) -> BlockOutcome:
    predictor = Predictor(setting.model)
    tally = _Tally(setting)
    each_forward = setting.randomized and setting.scoring.attacked_draw == "each_forward"
    for repetition in range(setting.scoring.num_repetitions):
        (attacked,) = seeded_draws(1, setting.seed_for("paper", repetition, "attacked"))
        (scoring,) = seeded_draws(1, setting.seed_for("paper", repetition, "scoring"))
        source: DrawSource = FixedDraws((attacked,))
        if each_forward:
            source = FreshDraws(1, setting.seed_for("paper", repetition, "gradient draws"))
        x_adv = tally.attack(predictor, source, attack, setting.seed_for("paper", repetition))
        tally.score("evaluation", predictor, x_adv, (scoring,))
        if not each_forward:
            clean, _ = score_draws(predictor, setting.x, setting.y, (attacked,))
            tally.allow_unchanged(~clean[:, 0])
    return tally.outcome(exact=not setting.randomized)


def _unknown_draw(setting: BlockSetting, attack: RunAttack, *, num_sampled: int = 0) -> BlockOutcome:
    predictor = Predictor(setting.model)
    tally = _Tally(setting)
    x_adv = tally.attack(predictor, setting.gradient_draws(), attack, setting.seed_for("unknown draw"))
    draws, exact = setting.scoring_draws()
    if exact:
        tally.score("evaluation", predictor, x_adv, draws["evaluation"])
        tally.correct["selection"] = tally.correct["evaluation"]
        if setting.randomized:
            count = max(num_sampled, setting.scoring.num_selection_draws)
            tally.score(SAMPLED, predictor, x_adv, seeded_draws(count, setting.seed, "selection"))
    else:
        tally.score("selection", predictor, x_adv, draws["selection"])
        tally.score("evaluation", predictor, x_adv, draws["evaluation"])
    disjoint = None if exact else tally.used.isdisjoint({*draws["selection"], *draws["evaluation"]})
    return tally.outcome(exact=exact, disjoint=disjoint)


def _known_draw(setting: BlockSetting, attack: RunAttack) -> BlockOutcome:
    predictor = Predictor(setting.model)
    tally = _Tally(setting)
    draws = setting.known_draws()
    for index, draw in enumerate(draws):
        x_adv = tally.attack(predictor, FixedDraws((draw,)), attack, setting.seed_for("known draw", index))
        tally.score("evaluation", predictor, x_adv, (draw,))
        clean, _ = score_draws(predictor, setting.x, setting.y, (draw,))
        tally.allow_unchanged(~clean[:, 0])
    return tally.outcome(exact=draws == setting.configurations)


def _averaged(setting: BlockSetting, attack: RunAttack) -> BlockOutcome:
    scoring = setting.scoring
    few = setting.configurations is not None and len(setting.configurations) <= scoring.num_averaged_draws
    tally = _Tally(setting)
    if few or not setting.randomized:
        predictor = Predictor(setting.model, averaged_draws=setting.configurations or (ONLY_DRAW,))
        draws: tuple[Draw, ...] = (ONLY_DRAW,)
        source: DrawSource = FixedDraws(draws)
    else:
        predictor = Predictor(setting.model, num_averaged=scoring.num_averaged_draws)
        draws = seeded_draws(scoring.num_averaged_groups, setting.seed, "averaged groups")
        source = FreshDraws(1, setting.seed_for("averaged gradient draws"))
    x_adv = tally.attack(predictor, source, attack, setting.seed_for("averaged"))
    tally.score("evaluation", predictor, x_adv, draws)
    disjoint = None if isinstance(source, FixedDraws) else tally.used.isdisjoint(draws)
    return tally.outcome(exact=isinstance(source, FixedDraws), disjoint=disjoint)


class _Tally:
    """Collects what the attacks of one block did, over the perturbed points of all repetitions or draws."""

    def __init__(self, setting: BlockSetting) -> None:
        self.setting = setting
        size, device = len(setting.x), setting.x.device
        self.correct: dict[str, Tensor] = {}
        self.margins: list[Tensor] = []
        self.linf_S = torch.zeros(size, dtype=torch.float64, device=device)
        self.l2_S = torch.zeros(size, dtype=torch.float64, device=device)
        self.num_unchanged_S = torch.zeros(size, dtype=torch.long, device=device)
        self.last_unchanged_S = torch.zeros(size, dtype=torch.bool, device=device)
        self.num_points = 0
        self.lowest, self.highest = float("inf"), float("-inf")
        self.num_not_finite = self.num_out_of_range = 0
        self.num_forward = self.num_backward = 0.0
        self.used: set[Draw] = set()
        self.points: list[Tensor] = []

    def attack(self, predictor: Predictor, source: DrawSource, attack: RunAttack, seed: int) -> Tensor:
        """Run the attack, measure its points, return them."""
        x = self.setting.x
        # The attacked function must be the one that scores, and answer each row of a batch by itself.
        is_scored = not self.setting.randomized or (predictor.averages_named_draws and isinstance(source, FixedDraws))
        attacked = AttackedModel(predictor, source, stops_at_success=is_scored)
        output = attack(attacked, seed)
        x_adv = output.x.detach()
        difference = (x_adv - x).flatten(1).double()
        linf_S = difference.abs().amax(1)
        self.linf_S = torch.maximum(self.linf_S, linf_S)
        self.l2_S = torch.maximum(self.l2_S, difference.norm(dim=1))
        self.last_unchanged_S = linf_S <= _UNCHANGED
        self.num_unchanged_S += self.last_unchanged_S
        self.num_points += 1
        lowest, highest = torch.stack(x_adv.aminmax()).tolist()
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        self.num_not_finite += output.num_not_finite
        self.num_out_of_range += output.num_out_of_range
        self.num_forward += attacked.num_forward / len(x)
        self.num_backward += attacked.num_backward / len(x)
        self.used |= attacked.used
        self.points.append(x_adv)
        return x_adv

    def allow_unchanged(self, legitimate_S: Tensor) -> None:
        """Do not count the last points of these samples as unchanged: the one draw that was attacked errs on them already."""
        self.num_unchanged_S -= (self.last_unchanged_S & legitimate_S).long()

    def score(self, name: str, predictor: Predictor, x_adv: Tensor, draws: tuple[Draw, ...]) -> None:
        """Append the draws' columns to a set; margins are kept of the evaluation set."""
        correct, margins = score_draws(predictor, x_adv, self.setting.y, draws)
        self.correct[name] = torch.cat([self.correct[name], correct], dim=1) if name in self.correct else correct
        if name == "evaluation":
            self.margins.append(margins)

    def outcome(self, *, exact: bool, disjoint: bool | None = None) -> BlockOutcome:
        """Return everything collected."""
        return BlockOutcome(
            correct=self.correct,
            exact=exact,
            margin_S=torch.stack(self.margins).mean(0),
            linf_S=self.linf_S,
            l2_S=self.l2_S,
            num_unchanged_S=self.num_unchanged_S,
            num_points=self.num_points,
            lowest=self.lowest,
            highest=self.highest,
            num_not_finite=self.num_not_finite,
            num_out_of_range=self.num_out_of_range,
            num_forward=self.num_forward,
            num_backward=self.num_backward,
            draws_disjoint=disjoint,
            x=self.points[-1] if self.points else None,
            points=tuple(self.points),
        )
