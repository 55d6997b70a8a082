"""Attacks on models through which no gradient passes: a gradient is guessed, estimated or borrowed.

straight_through    gradients as if rounding, comparisons and choices of the largest entry were not there
smoothed_gradient   the gradient of the margin under Gaussian noise, from differences of answers alone
substitute          a small network learns the model's answers around the images, and its adversarial points are taken

Shapes: B batch, K classes; x is (B, C, H, W) in [0,1].

Reference: Athalye, Carlini, Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 4.1; Ilyas, Engstrom,
Athalye, Lin, Black-box Adversarial Attacks with Limited Queries and Information, ICML 2018, section 2.1 (antithetic differences);
Papernot et al., Practical Black-Box Attacks against Machine Learning, ASIA CCS 2017, Algorithm 1 (a substitute, retrained on its own
adversarial points).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws
from analysis.attacked_model.model import AttackedModel, BestPoint, Predictor
from analysis.attacked_model.straight_through import StraightThroughModel
from analysis.attacks.aggregated_momentum import AggregatedMomentumParameters, ascend_along_momenta
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import ball_around, cross_entropy, margin

_WIDTH = 16


class StraightThroughParameters(Config):
    """Ascent along several momenta, once on the margin and once on cross-entropy; the point with most errors is kept."""

    steps: int = Field(50, ge=1, description="Number of gradient steps of each run.")


class SmoothedGradientParameters(Config):
    """Gradient ascent on the margin, by differences along random directions."""

    steps: int = Field(30, ge=1, description="Number of steps.")
    num_directions: int = Field(16, ge=1, description="Random directions per step, each looked at forwards and backwards.")
    width: float = Field(0.5, gt=0, le=4, description="Deviation of the noise as a share of epsilon (l2: of epsilon / sqrt(D)).")


class SubstituteParameters(Config):
    """A substitute is trained, attacked, and trained again on what the model says of the points found."""

    rounds: int = Field(3, ge=1, description="Rounds of training and attacking.")
    updates: int = Field(100, ge=1, description="Updates of the substitute in each round.")
    steps: int = Field(20, ge=1, description="Steps of the attack on the substitute in each round.")


def _straight_through(model: AttackedModel, problem: AttackProblem, parameters: StraightThroughParameters) -> AttackOutput:
    surrogate = model.on(model.source, Predictor(StraightThroughModel(model.predictor.model)))
    momenta = AggregatedMomentumParameters(steps=parameters.steps)
    ball = ball_around(problem.x, problem.threat_model.epsilon, problem.threat_model.norm)
    best = BestPoint(exact=True)
    for index, loss in enumerate((margin, cross_entropy)):
        start = ball.random_start(torch.Generator().manual_seed(derive_seed(problem.seed, "start", index)))
        x_adv = ascend_along_momenta(surrogate, problem, start, momenta, loss)
        best.update_(x_adv, *model.score(x_adv, problem.y, margin))
    return AttackOutput(best.result()[0])


def _smoothed(model: AttackedModel, problem: AttackProblem, parameters: SmoothedGradientParameters) -> AttackOutput:
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    x, y = problem.x, problem.y
    generator = torch.Generator().manual_seed(problem.seed)
    ball = ball_around(x, epsilon, norm)
    deviation = parameters.width * epsilon / (1.0 if norm == "linf" else x[0].numel() ** 0.5)
    x_adv = ball.random_start(generator)
    best = BestPoint(exact=True)
    best.update_(x_adv, *model.score(x_adv, y, margin))
    for step in range(parameters.steps):
        gradient = torch.zeros_like(x)
        for _ in range(parameters.num_directions):
            direction = torch.randn(x.shape, generator=generator).to(x)
            ahead_B, _ = model.score((x_adv + deviation * direction).clamp(0, 1), y, margin)
            behind_B, _ = model.score((x_adv - deviation * direction).clamp(0, 1), y, margin)
            gradient += (ahead_B - behind_B).view(-1, 1, 1, 1) * direction
        x_adv = ball.ascend_(x_adv.clone(), gradient, epsilon / 2 * (1 - step / parameters.steps))
        best.update_(x_adv, *model.score(x_adv, y, margin))
    return AttackOutput(best.result()[0])


def _substitute(model: AttackedModel, problem: AttackProblem, parameters: SubstituteParameters) -> AttackOutput:
    x, y = problem.x, problem.y
    ball = ball_around(x, problem.threat_model.epsilon, problem.threat_model.norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed & 0x7FFFFFFF)
        network = _small_network(x[0], problem.num_classes).to(x)
    generator = torch.Generator().manual_seed(problem.seed)
    substitute = model.on(FixedDraws((ONLY_DRAW,)), Predictor(network))
    momenta = AggregatedMomentumParameters(steps=parameters.steps)
    seen = [x, *(ball.random_start(generator) for _ in range(3))]
    best = BestPoint(exact=True)
    for index in range(parameters.rounds):
        answers = [model.mean_log_probability(points).argmax(1) for points in seen]
        _learn(network, torch.cat(seen), torch.cat(answers), parameters.updates, generator)
        start = ball.random_start(torch.Generator().manual_seed(derive_seed(problem.seed, "start", index)))
        x_adv = ascend_along_momenta(substitute, problem, start, momenta, margin)
        best.update_(x_adv, *model.score(x_adv, y, margin))
        seen.append(x_adv)
    return AttackOutput(best.result()[0])


def _small_network(image: Tensor, num_classes: int) -> nn.Module:
    channels, height, width = image.shape
    flat = 2 * _WIDTH * -(-height // 2) * -(-width // 2)
    return nn.Sequential(
        nn.Conv2d(channels, _WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, num_classes),
    )


def _learn(network: nn.Module, x: Tensor, y: Tensor, updates: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(updates):
            rows = torch.randint(0, len(x), (min(64, len(x)),), generator=generator).to(x.device)
            optimizer.zero_grad()
            functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()


def _straight_through_cost(parameters: StraightThroughParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return Cost(2 * num_draws * (parameters.steps + 1), 2 * num_draws * parameters.steps)


def _smoothed_cost(parameters: SmoothedGradientParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return Cost(num_draws * (1 + parameters.steps * (2 * parameters.num_directions + 1)), 0)


def _substitute_cost(parameters: SubstituteParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return Cost(
        num_draws * parameters.rounds * (parameters.rounds + 5) + parameters.rounds * parameters.steps, parameters.rounds * parameters.steps
    )


def _entry(
    name: str,
    description: str,
    parameters: type[Config],
    run: Callable[..., AttackOutput],
    cost: Callable[..., Cost],
    *,
    is_transfer: bool,
) -> AttackEntry:
    norms: tuple[Norm, ...] = ("linf", "l2")
    return AttackEntry(
        name,
        description,
        parameters,
        norms,
        run,
        cost,
        is_transfer=is_transfer,
        uses_gradients=False,  # of the attacked function itself
        climbs_a_loss=False,
        ignores_scale=True,
    )


ATTACKS = (
    _entry(
        "straight_through",
        "gradients through rounding, comparisons and argmax as if they were not there",
        StraightThroughParameters,
        _straight_through,
        _straight_through_cost,
        is_transfer=True,
    ),
    _entry(
        "smoothed_gradient",
        "gradient of the margin under Gaussian noise, estimated from answers alone",
        SmoothedGradientParameters,
        _smoothed,
        _smoothed_cost,
        is_transfer=False,
    ),
    _entry(
        "substitute",
        "transfer from a small network that learns the model's answers",
        SubstituteParameters,
        _substitute,
        _substitute_cost,
        is_transfer=True,
    ),
)
