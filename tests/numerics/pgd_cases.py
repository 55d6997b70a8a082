"""Networks, batches and a naive loop for the tests of projected gradient descent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.randomness import RandomModule, seed_streams

EPSILONS = {"linf": 8 / 255, "l2": 0.5}
STEP_SIZES = {"linf": 2 / 255, "l2": 0.15}
NORMS = tuple(EPSILONS)


class SmallNet(nn.Module):
    """Smooth, so that rounding decides no sign; with batch norm, so that there are buffers to leave alone."""

    def __init__(self, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Softplus(beta=5),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Noise(RandomModule):
    """Adds its draw, one number per pixel position, to the image and counts the draws it has taken."""

    def __init__(self, std: float = 0.3) -> None:
        super().__init__()
        self.std = std
        self.num_taken = 0
        self.seen: list[Tensor] = []
        self.register_draw("noise", torch.zeros(1, 1, 8, 8, dtype=torch.float64))
        self.take_first_draw()

    @property
    def num_configurations(self) -> float:
        return math.inf

    def draw(self, generator: torch.Generator) -> None:
        self.num_taken += 1
        self.set_draw("noise", self.std * torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.noise.clone())
        return x + self.noise


class Shift(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class GradientOf(nn.Module):
    """Logits (0, <x, weights>), whose cross-entropy gradient for label 0 is a positive multiple of `weights`."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        score_B = (x * self.weights).flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(score_B), score_B], dim=1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, 1, 2, 3])


@pytest.fixture
def model() -> nn.Module:
    return SmallNet().double().eval()


@pytest.fixture
def noisy_model() -> nn.Module:
    noisy = nn.Sequential(Noise(), SmallNet()).double().eval()
    seed_streams(noisy, 7)
    return noisy


def settings(norm: str) -> dict:
    return {"norm": norm, "epsilon": EPSILONS[norm], "step_size": STEP_SIZES[norm]}


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    order = math.inf if norm == "linf" else 2
    return torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)


def naive_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, norm: str, steps: int) -> Tensor:
    """One image at a time, by the definition."""
    epsilon, step_size = EPSILONS[norm], STEP_SIZES[norm]
    results = []
    for index in range(len(x)):
        clean, point = x[index], start[index]
        for _ in range(steps):
            point = point.detach().requires_grad_()
            loss = functional.cross_entropy(model(point.unsqueeze(0)), y[index : index + 1])
            (gradient,) = torch.autograd.grad(loss, point)
            with torch.no_grad():
                if norm == "linf":
                    point = point + step_size * torch.sign(gradient)
                    point = torch.minimum(torch.maximum(point, clean - epsilon), clean + epsilon)
                else:
                    point = point + step_size * gradient / gradient.norm()
                    length = (point - clean).norm()
                    if length > epsilon:
                        point = clean + (point - clean) * epsilon / length
                point = point.clamp(0, 1)
        results.append(point.detach())
    return torch.stack(results)
