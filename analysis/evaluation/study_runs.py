"""Running one block of a study. Every study returns the correctness of its images, and facts for its check.

Shapes: S samples, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from analysis.attacked_model.draws import ONLY_DRAW, Draw, FreshDraws, seeded_draws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.registry import AttackOutput, AttackProblem, attack_entry, parse_attack_parameters
from analysis.evaluation.planted_points import run_unit_test
from analysis.evaluation.protocols import BlockOutcome, BlockSetting, run_protocol, score_clean, score_draws
from analysis.evaluation.studies import StudyPoint, doublings, halves
from models.threat_model import ThreatModel
from trainers.attacks import AttackLoss, ball_around, cross_entropy

_LAST_STEPS = 10
_SMALL_CHANGE = 0.01


@dataclass(frozen=True)
class Study:
    """A block's study with everything it needs. `threat_model` has the study's own radius."""

    point: StudyPoint
    setting: BlockSetting
    threat_model: ThreatModel
    num_classes: int

    def attack(self, steps: int) -> Callable[[AttackedModel, int], AttackOutput]:
        """Return the study's attack with this many steps."""
        name = self.point.settings.attack
        parameters = parse_attack_parameters(name, {"steps": steps})

        def run(model: AttackedModel, seed: int) -> AttackOutput:
            problem = AttackProblem(self.setting.x, self.setting.y, self.threat_model, self.num_classes, seed)
            return attack_entry(name).run(model, problem, parameters)

        return run


StudyOutcome = tuple[BlockOutcome, dict[str, Any]]
"""What a study measured, and JSON-able facts for its check."""


def run_study(study: Study) -> StudyOutcome:
    """Run a block of a study of the model; return its outcome and JSON-able facts. A calibration studies the harness: see `evaluate`."""
    runners: dict[str, Callable[[Study], StudyOutcome]] = {
        "epsilon": _epsilon,
        "steps": _steps,
        "draws": _draws,
        "random_search": _random_search,
        "gradient_resolution": _gradient_resolution,
        "progress": _progress,
        "unit_test": _unit_test,
    }
    return runners[study.point.name](study)


def _epsilon(study: Study) -> StudyOutcome:
    outcome = run_protocol("T1", study.setting, study.attack(study.point.settings.steps))
    return outcome, {}


def _steps(study: Study) -> StudyOutcome:
    settings = study.point.settings
    levels = doublings(settings.steps, settings.max_steps)
    return _until_converged(halves(settings.steps), levels, lambda level: (study.setting, study.attack(level)))


def _draws(study: Study) -> StudyOutcome:
    settings = study.point.settings
    attack = study.attack(settings.steps)
    levels = doublings(settings.num_draws, settings.max_draws)
    if study.setting.configurations is not None:
        # Beyond the number of configurations the gradient is exact.
        total = len(study.setting.configurations)
        levels = [level for level in levels if level < total]
        if total <= settings.max_draws or len(levels) < 2:
            levels.append(total)
    return _until_converged(halves(settings.num_draws), levels, lambda level: (replace(study.setting, num_draws=level), attack))


def _until_converged(
    below: list[int], levels: list[int], at: Callable[[int], tuple[BlockSetting, Callable[[AttackedModel, int], AttackOutput]]]
) -> StudyOutcome:
    """Attack at rising levels until accuracy falls by less than a point or two standard errors; keep the last two.

    Args:
        below: levels that are only for the curve. levels: those that decide; the first is the suite's.
        at: the setting and the attack at a level.
    """
    accuracies = [run_protocol("T1", *at(level)).correct["evaluation"].double().mean().item() for level in below]
    previous: BlockOutcome | None = None
    for level in levels:
        outcome = run_protocol("T1", *at(level))
        shares_S = outcome.correct["evaluation"].double().mean(1)
        accuracies.append(shares_S.mean().item())
        if previous is not None:
            outcome.correct["previous"] = previous.correct["evaluation"]
            gain_S = previous.correct["evaluation"].double().mean(1) - shares_S
            error = gain_S.std().item() / math.sqrt(len(gain_S)) if len(gain_S) > 1 else 0.0
            if gain_S.mean().item() < max(_SMALL_CHANGE, 2 * error):
                break
        previous = outcome
    reached = [*below, *levels][: len(accuracies)]
    return outcome, {"levels": reached, "accuracies": accuracies, "at_cap": reached[-1] == levels[-1]}


@torch.no_grad()
def _random_search(study: Study) -> StudyOutcome:
    """Search uniformly in the ball around images that survive the attack; a flip is a majority of draws that errs."""
    settings, setting = study.point.settings, study.setting
    outcome = run_protocol("T1", setting, study.attack(settings.steps))
    clean, _ = score_draws(Predictor(setting.model), setting.x, setting.y, setting.scoring_draws()[0]["selection"])
    survives_S = _clearly_above_half(outcome.correct["selection"], outcome.exact) & _clearly_above_half(clean, outcome.exact)
    rows = survives_S.nonzero().squeeze(1)[: settings.num_searched]
    flipped = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    generator = torch.Generator().manual_seed(setting.seed_for("random search"))
    for point in range(settings.num_random_points):
        open_now = (~flipped).nonzero().squeeze(1)
        if open_now.numel() == 0:
            break
        chosen = rows[open_now]
        points = ball_around(setting.x[chosen], study.threat_model.epsilon, study.threat_model.norm).random_start(generator)
        flipped[open_now] = _majority_errs(study, points, setting.y[chosen], point)
    return outcome, {
        "num_searched": len(rows),
        "num_flipped": int(flipped.sum()),
        "num_points": settings.num_random_points,
        "num_votes": len(_voting_draws(study, 0, 0)),
    }


def _majority_errs(study: Study, points: Tensor, y: Tensor, number: int) -> Tensor:
    """Return which points most draws misclassify.

    A quarter of the draws sorts out most points. Among a thousand points chance alone would find an unlucky vote, so a flip must be
    confirmed, clearly, by draws that did not take part in finding it.
    """
    setting = study.setting
    predictor = Predictor(setting.model)
    draws = _voting_draws(study, number, 0)
    first, _ = score_draws(predictor, points, y, draws[: max(1, len(draws) // 4)])
    candidates = (first.double().mean(1) <= 0.5).nonzero().squeeze(1)
    errs = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    is_sampled = draws != setting.configurations
    for attempt in range(2 if is_sampled else 1):
        if candidates.numel() == 0:
            return errs
        correct, _ = score_draws(predictor, points[candidates], y[candidates], _voting_draws(study, number, attempt))
        clear = _clearly_above_half(~correct, not is_sampled or attempt == 0)
        candidates = candidates[clear]
    errs[candidates] = True
    return errs


def _voting_draws(study: Study, number: int, attempt: int) -> tuple[Draw, ...]:
    """Return the draws that vote on a random point: all configurations if they are few, else sampled ones."""
    setting, votes = study.setting, study.point.settings.num_votes
    if setting.configurations is not None and len(setting.configurations) <= votes:
        return setting.configurations
    return seeded_draws(votes, setting.seed_for("random search votes"), number, attempt)


def _clearly_above_half(votes_SR: Tensor, exact: bool) -> Tensor:
    """Return which rows hold more than one half, and, of sampled draws, two standard errors more."""
    noise = 0.0 if exact else 1 / math.sqrt(votes_SR.shape[1])
    return votes_SR.double().mean(1) > 0.5 + noise


def _gradient_resolution(study: Study) -> StudyOutcome:
    """Compare two independent averaged gradients at random starts, with twice as many draws each time until they agree."""
    settings, setting = study.point.settings, study.setting
    outcome = clean_outcome(setting)
    generator = torch.Generator().manual_seed(setting.seed_for("resolution start"))
    points = ball_around(setting.x, study.threat_model.epsilon, study.threat_model.norm).random_start(generator)
    predictor = Predictor(setting.model)
    models = [AttackedModel(predictor, FreshDraws(settings.num_draws, setting.seed_for("resolution", side))) for side in range(2)]
    sums = [torch.zeros_like(points) for _ in models]
    levels, cosines, taken = [], [], 0
    for level in doublings(settings.num_draws, settings.max_draws):
        while taken < level:
            for total, model in zip(sums, models, strict=True):
                total += model.gradient(points, setting.y, cross_entropy)[0]
            taken += settings.num_draws
        cosine_S = torch.nn.functional.cosine_similarity(sums[0].flatten(1).double(), sums[1].flatten(1).double(), eps=1e-300)
        levels.append(taken)
        cosines.append(cosine_S.median().item())
        if cosines[-1] >= 0.9:
            break
    return outcome, {"levels": levels, "cosines": cosines, "num_samples": len(points)}


class TracedModel(AttackedModel):
    """An attacked model that notes, at each point that an attack looks at, loss and errors of each example."""

    def __init__(self, model: AttackedModel) -> None:
        super().__init__(model.predictor, model.source, passes=model.passes)
        self.losses: list[Tensor] = []
        self.wrong: list[Tensor] = []

    def gradient(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor, Tensor]:
        gradient, loss_B, wrong_B = super().gradient(x_BCHW, y_B, loss)
        if self.is_exact:  # on fresh draws the losses of two points are not comparable; `score` gives those on common draws
            self._note(loss_B, wrong_B)
        return gradient, loss_B, wrong_B

    def score(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        loss_B, wrong_B = super().score(x_BCHW, y_B, loss)
        self._note(loss_B, wrong_B)
        return loss_B, wrong_B

    def _note(self, loss_B: Tensor, wrong_B: Tensor) -> None:
        self.losses.append(loss_B.cpu())
        self.wrong.append(wrong_B.cpu())


def _progress(study: Study) -> StudyOutcome:
    """Follow the best mean loss of the images that survive, and look for points that erred on the way but not at the end."""
    traces: list[TracedModel] = []
    attack = study.attack(study.point.settings.steps)

    def traced_attack(model: AttackedModel, seed: int) -> AttackOutput:
        traces.append(TracedModel(model))
        return attack(traces[-1], seed)

    outcome = run_protocol("T1", study.setting, traced_attack)
    losses_TS = torch.stack(traces[0].losses).cummax(dim=0).values
    survives_S = outcome.correct["evaluation"].double().mean(1).cpu() > 0.5
    facts: dict[str, Any] = {"num_survivors": int(survives_S.sum())}
    shown_TS = losses_TS[:, survives_S] if survives_S.any() else losses_TS
    curve_T = shown_TS.double().mean(1)
    facts["loss"] = curve_T.tolist()
    if survives_S.any():
        whole = (curve_T[-1] - curve_T[0]).item()
        late = (curve_T[-1] - curve_T[-min(_LAST_STEPS + 1, len(curve_T))]).item()
        facts["late_share"] = late / whole if whole > 0 else 0.0
    if traces[0].is_exact and not study.setting.randomized:
        erred_S = torch.stack(traces[0].wrong).amax(0) > 0
        facts["num_silent"] = int((erred_S & outcome.correct["evaluation"][:, 0].cpu()).sum())
    facts["num_samples"] = len(survives_S)
    return outcome, facts


def _unit_test(study: Study) -> StudyOutcome:
    setting = study.setting
    draw = seeded_draws(1, setting.seed_for("unit test"))[0] if setting.randomized else ONLY_DRAW
    facts = run_unit_test(
        setting.model,
        setting.x,
        draw,
        study.threat_model,
        attack_entry(study.point.settings.attack),
        parse_attack_parameters(study.point.settings.attack, {"steps": study.point.settings.steps}),
        seed=setting.seed_for("unit test attack"),
    )
    return clean_outcome(setting), facts


def clean_outcome(setting: BlockSetting) -> BlockOutcome:
    """Return the clean score on one draw: what a record must have."""
    few = setting.scoring.model_copy(update={"num_selection_draws": 1, "num_evaluation_draws": 1, "enumerate_up_to": 0})
    return score_clean(replace(setting, scoring=few))


__all__ = ["Study", "StudyOutcome", "TracedModel", "clean_outcome", "run_study"]
