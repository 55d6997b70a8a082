"""The attack along several momenta: its recurrence against a naive loop, its box, and that it averages the noise of draws over steps."""

import math

import pytest
import torch
from evaluation_toys import AdditiveNoise, pattern
from pydantic import ValidationError

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.aggregated_momentum import AggregatedMomentumParameters
from analysis.attacks.registry import AttackProblem, attack_entry, check_attack, parse_attack_parameters
from models.errors import UserError
from models.threat_model import ThreatModel
from trainers.attacks import ball_around, margin

EPSILON = 0.05


class Curved(torch.nn.Module):
    """Two logits that are no linear function of the image, so that the order of the steps matters."""

    def __init__(self, generator):
        super().__init__()
        self.inner = torch.nn.Parameter(torch.randn(16, 64, generator=generator, dtype=torch.float64))
        self.outer = torch.nn.Parameter(torch.randn(3, 16, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x.flatten(1) @ self.inner.T) @ self.outer.T


def run(model, x, y, source=None, *, norm="linf", seed=0, num_classes=3, **parameters):
    attacked = AttackedModel(Predictor(model), source or FixedDraws((ONLY_DRAW,)))
    problem = AttackProblem(x, y, ThreatModel(norm=norm, epsilon=EPSILON), num_classes, seed)
    entry = attack_entry("aggregated_momentum")
    return entry.run(attacked, problem, parse_attack_parameters("aggregated_momentum", parameters)).x, attacked


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momenta", [(0.0,), (0.9,), (0.0, 0.5, 0.99)])
def test_it_is_the_recurrence_of_aggregated_momentum(norm, momenta):
    generator = torch.Generator().manual_seed(3)
    model = Curved(generator)
    x = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (5,), generator=generator)
    steps, first_step = 7, EPSILON / 2
    found, attacked = run(model, x, y, norm=norm, momenta=momenta, steps=steps)
    assert attacked.num_backward == steps * len(x)
    # The naive loop, image by image, from where a one-step attack of length zero stands: its start.
    start, _ = run(model, x, y, norm=norm, momenta=momenta, steps=1, step_size=1e-29)
    for image, begin, label, end in zip(x, start, y, found, strict=True):
        point, velocities = begin.clone(), [torch.zeros_like(begin) for _ in momenta]
        for step in range(steps):
            leaf = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(margin(model(leaf[None]), label[None]).sum(), leaf)
            gradient = gradient / gradient.abs().mean()
            velocities = [factor * velocity + gradient for factor, velocity in zip(momenta, velocities, strict=True)]
            direction = sum(velocities) / len(momenta)
            length = first_step * 0.5 * (1 + math.cos(math.pi * step / steps))
            if norm == "linf":
                point = (point + length * direction.sign()).clamp(image - EPSILON, image + EPSILON).clamp(0, 1)
            else:
                delta = point + length * direction / direction.norm() - image
                point = (image + delta * min(1.0, EPSILON / float(delta.norm()))).clamp(0, 1)
        assert torch.allclose(point, end, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_stay_in_the_ball_also_where_gradients_are_not_finite(norm):
    class Broken(torch.nn.Module):
        def forward(self, x):
            flat = x.flatten(1)
            return torch.stack([flat.sum(1), (flat - flat).sqrt().sum(1), flat[:, 0]], dim=1)

    x = torch.rand(4, 1, 8, 8)
    found, _ = run(Broken(), x, torch.tensor([0, 1, 2, 0]), norm=norm, steps=5)
    ball = ball_around(x, EPSILON, norm)
    assert found.isfinite().all()
    assert torch.allclose(ball.project_(found.clone()), found, atol=1e-6)


def test_momenta_average_the_noise_of_draws_over_steps():
    """With one noisy draw a step, it ends nearer to the optimum of the expected margin, a vertex of the box, than steps without memory."""
    model = AdditiveNoise(pattern(), spread=3.0)
    x = torch.full((20, 1, 8, 8), 0.5)
    y = torch.ones(20, dtype=torch.long)
    optimum = -EPSILON * pattern().sign().view(1, 1, 8, 8)

    def share_of_optimum(**parameters):
        found, _ = run(model, x, y, FreshDraws(1, 0, "noise"), num_classes=2, steps=60, **parameters)
        return float(((found - x) * optimum).mean() / optimum.square().mean())

    remembered, forgotten = share_of_optimum(), share_of_optimum(momenta=(0.0,))
    assert remembered > forgotten + 0.1


def test_held_draws_are_the_same_at_each_step_and_fresh_ones_are_not():
    model = AdditiveNoise(pattern(), spread=1.0)
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    _, held = run(model, x, y, FreshDraws(3, 0, "held"), num_classes=2, steps=5, draws="held")
    _, fresh = run(model, x, y, FreshDraws(3, 0, "fresh"), num_classes=2, steps=5)
    assert (len(held.used), len(fresh.used)) == (3, 15)


@pytest.mark.parametrize("momenta", [(), (1.0,), (-0.1,), (0.5, 1.5), (float("nan"),)])
def test_momenta_that_never_forget_are_refused(momenta):
    with pytest.raises((UserError, ValidationError), match="momenta"):
        AggregatedMomentumParameters(momenta=momenta)
    with pytest.raises(UserError, match="momenta"):
        check_attack("aggregated_momentum", {"momenta": momenta}, ThreatModel(), 10)
