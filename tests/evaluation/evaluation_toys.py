"""Small models whose robustness is known on paper, and data for them."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from analysis.evaluation.suites import AttackItem, Suite
from models.randomness import RandomModule
from trainers.attacks import pgd

SIDE = 8
SIGNAL = 0.06
NUM_IMAGES, NUM_CLASSES = 16, 5
SMALL_SUITE = Suite(
    name="small",
    num_samples=NUM_IMAGES,
    attacks=(
        AttackItem(attack="apgd_ce", parameters={"steps": 5}),
        AttackItem(attack="square", parameters={"num_queries": 20}),
    ),
)


class MultiplicativeNoise(RandomModule):
    """Logits (-m, m) with m = sum of pattern * n * (x - 1/2), n = 1 + spread * normal, one n per draw."""

    def __init__(self, pattern: Tensor, spread: float) -> None:
        super().__init__()
        self.pattern = nn.Parameter(pattern)
        self.spread = spread
        self.register_draw("factors", torch.ones_like(pattern))
        self.take_first_draw()

    @property
    def num_configurations(self) -> float:
        return math.inf

    def draw(self, generator: torch.Generator) -> None:
        normal = torch.randn(self.pattern.shape, generator=generator)
        self.set_draw("factors", 1 + self.spread * normal)

    def forward(self, x: Tensor) -> Tensor:
        margin = ((x.flatten(1) - 0.5) * (self.pattern * self.factors)).sum(1)
        return torch.stack([-margin, margin], dim=1)


class AdditiveNoise(MultiplicativeNoise):
    """m = sum of (pattern + spread * normal) * (x - 1/2): normally distributed over draws."""

    def draw(self, generator: torch.Generator) -> None:
        normal = torch.randn(self.pattern.shape, generator=generator)
        self.set_draw("factors", 1 + self.spread * normal / self.pattern.detach().cpu())


class Choice(RandomModule):
    """One of several linear models answers: a finite space of draws."""

    def __init__(self, members: Tensor) -> None:
        super().__init__()
        self.members = nn.Parameter(members)
        self.register_draw("index", torch.tensor(0))
        self.take_first_draw()

    @property
    def num_configurations(self) -> int:
        return len(self.members)

    def configuration_probability(self, index: int) -> float:
        return 1 / self.num_configurations

    def draw(self, generator: torch.Generator) -> None:
        self.set_draw("index", torch.randint(0, len(self.members), (), generator=generator))

    def set_configuration(self, index: int) -> None:
        self.set_draw("index", torch.tensor(index))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.flatten(1) - 0.5, self.members[self.index])


class Quantized(nn.Module):
    """Rounds its input: right on clean images, without any gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 32).round() / 32)


def pattern(side: int = SIDE, seed: int = 0) -> Tensor:
    """Return a pattern of plus and minus ones (side * side,)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (side * side,), generator=generator) * 2 - 1).float()


def two_classes(count: int, side: int = SIDE, noise: float = 0.02, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, side, side) that carry plus or minus the pattern with amplitude SIGNAL around 1/2, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    signs = (2 * y - 1).float()[:, None]
    x = 0.5 + SIGNAL * signs * pattern(side) + noise * torch.randn(count, side * side, generator=generator)
    return x.clamp(0, 1).view(count, 1, side, side), y


def classifier(num_classes: int = 5, side: int = SIDE, seed: int = 2) -> nn.Module:
    """Return a small deterministic network with batch normalization and dropout, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(6 * side * side, num_classes),
        )
    return network.eval()


def labelled_by(network: nn.Module, count: int, side: int = SIDE, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Return random images and the labels that the network gives them."""
    x = torch.rand((count, 1, side, side), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, network(x).argmax(1)


def digits_classifier(adversarial_epsilon: float | None, steps: int = 400, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Train a small deterministic network on handwritten digits and return it with 400 test images and labels.

    Args:
        adversarial_epsilon: linf radius of adversarial training; None: natural training.
        steps: optimizer steps of 64 images.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:400], order[400:]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = train[torch.randint(0, len(train), (64,), generator=generator)]
        x, y = images[rows], labels[rows]
        if adversarial_epsilon is not None:
            x = pgd(network, x, y, epsilon=adversarial_epsilon, step_size=adversarial_epsilon / 3, steps=5, generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval().requires_grad_(False), images[test], labels[test]


class Wrapped(nn.Module):
    """A classifier whose answer goes through a function."""

    def __init__(self, answer, dtype=torch.float32):
        super().__init__()
        self.network = classifier(NUM_CLASSES).to(dtype)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.network, x)
