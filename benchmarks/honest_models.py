"""Small models that mean no harm, of twenty families: whatever check fails on them is a false alarm.

A seed draws what a family leaves open: initial weights, radius of training, width, activation, and the radius of the evaluation.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.small_networks import WinnersTakeAll, digits, plain_network, small_network, train
from models.ensemble import Ensemble
from models.layers.random_normalization import RandomNormalization2d
from models.layers.random_weight import RandomFeatureWeight, SigmaBounds
from models.layers.stochastic_convolution import StochasticConv2d
from models.threat_model import ThreatModel

RADII = (8 / 255, 0.05, 0.08, 0.1, 0.12, 0.15)
"""Of evaluations, linf: most models are wrong on some images and right on others."""


@dataclass
class Subject:
    """A model with what it is evaluated on."""

    model: nn.Module
    threat_model: ThreatModel
    x: Tensor = field(default_factory=lambda: digits()[2])
    y: Tensor = field(default_factory=lambda: digits()[3])


@dataclass(frozen=True)
class HonestModel:
    """A family of models: `build(seed)` draws and trains one."""

    name: str
    make: Callable[[random.Random, int], nn.Module | Subject]

    def build(self, seed: int) -> Subject:
        """Return the model of a seed and what it is evaluated on."""
        drawn = random.Random(f"{self.name} {seed}")
        torch.manual_seed(drawn.randrange(2**31))
        made = self.make(drawn, seed)
        return made if isinstance(made, Subject) else Subject(made, ThreatModel(epsilon=drawn.choice(RADII)))


class Scaled(nn.Module):
    """Logits times a constant."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.factor


class MeanOf(nn.Module):
    """Mean of the probabilities of several networks, as logits."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x).softmax(1) for network in self.networks]).mean(0).clamp_min(1e-12).log()


class HalfPrecision(nn.Module):
    """A network that computes in bf16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(torch.bfloat16))


def _activation(drawn: random.Random) -> Callable[[], nn.Module]:
    return drawn.choice((nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU))


def _rounded_weights(drawn: random.Random, seed: int) -> nn.Module:
    network, levels = plain_network(seed, 0.1), drawn.choice((16, 32, 64))
    with torch.no_grad():
        for parameter in network.parameters():
            largest = parameter.abs().max()
            parameter.copy_((parameter / largest * levels).round() / levels * largest)
    return network


def _two_classes(drawn: random.Random, seed: int) -> Subject:
    count = drawn.choice((2, 3))
    _, _, x, y = digits()
    network = train(small_network(num_classes=count), radius=0.1, seed=seed, classes=lambda labels: labels % count)
    return Subject(network, ThreatModel(epsilon=drawn.choice(RADII)), x, y % count)


def _large_radius(drawn: random.Random, seed: int) -> Subject:
    network = train(small_network(), radius=drawn.uniform(0.2, 0.3), seed=seed)
    return Subject(network, ThreatModel(epsilon=drawn.choice((8 / 255, 0.1, 0.2, 0.25))))


def _euclidean(drawn: random.Random, seed: int) -> Subject:
    network = train(small_network(), radius=drawn.uniform(0.3, 0.8), norm="l2", seed=seed)
    return Subject(network, ThreatModel(norm="l2", epsilon=drawn.choice((0.25, 0.5, 1.0))))


def _random_weight(drawn: random.Random, seed: int) -> nn.Module:
    layer = RandomFeatureWeight((8, 8, 8), 1.0, drawn.uniform(0.1, 0.5), SigmaBounds("none", 0.0, 0.0))
    return train(small_network(after_first=(layer,)), radius=0.1, seed=seed)


def _random_normalization(drawn: random.Random, seed: int) -> nn.Module:
    pool = drawn.choice((("bn", "in"), ("bn", "gn_groups_4", "in"), ("bn", "ln", "gn_groups_4", "in")))
    return train(small_network(after_first=(RandomNormalization2d(8, pool),)), radius=0.1, seed=seed)


def _random_taps(drawn: random.Random, seed: int) -> nn.Module:
    return train(small_network(first=StochasticConv2d(1, 8, 3, drawn.choice((3, 5, 7)), bias=True)), radius=0.1, seed=seed)


def _random_member(drawn: random.Random, seed: int) -> nn.Module:
    members = [copy.deepcopy(plain_network(100 * seed + index, 0.1)) for index in range(drawn.choice((2, 3)))]
    return Ensemble(members, drawn.choice(("rsi_call", "rsi_sample"))).eval()


HONEST: tuple[HonestModel, ...] = (
    HonestModel("natural training", lambda drawn, seed: plain_network(seed)),
    HonestModel("adversarial training", lambda drawn, seed: train(small_network(), radius=drawn.uniform(0.05, 0.15), seed=seed)),
    HonestModel("adversarial training, large radius", _large_radius),
    HonestModel("TRADES", lambda drawn, seed: train(small_network(), radius=drawn.uniform(0.05, 0.2), seed=seed, trades=True)),
    HonestModel(
        "k-WTA with adversarial training",
        lambda drawn, seed: train(small_network(lambda: WinnersTakeAll(drawn.uniform(0.2, 0.5))), radius=0.1, seed=seed),
    ),
    HonestModel("smooth activations", lambda drawn, seed: train(small_network(_activation(drawn)), radius=0.1, seed=seed)),
    HonestModel("other widths", lambda drawn, seed: train(small_network(width=drawn.choice((4, 12, 16))), radius=0.1, seed=seed)),
    HonestModel(
        "batch normalization",
        lambda drawn, seed: train(small_network(after_first=(nn.BatchNorm2d(8),)), radius=drawn.choice((0.0, 0.1)), seed=seed),
    ),
    HonestModel(
        "multilayer perceptron",
        lambda drawn, seed: train(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), radius=drawn.choice((0.0, 0.1)), seed=seed
        ),
    ),
    HonestModel(
        "linear classifier",
        lambda drawn, seed: train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), radius=drawn.choice((0.0, 0.1)), seed=seed),
    ),
    HonestModel(
        "smoothed input",
        lambda drawn, seed: train(
            nn.Sequential(nn.AvgPool2d(drawn.choice((2, 3)), 1, 1), nn.Upsample((8, 8)), small_network()), radius=0.1, seed=seed
        ),
    ),
    HonestModel(
        "noise and smoothed labels",
        lambda drawn, seed: train(small_network(), radius=0.0, noise=drawn.uniform(0.1, 0.3), smoothing=drawn.uniform(0.0, 0.3), seed=seed),
    ),
    HonestModel("scaled logits", lambda drawn, seed: Scaled(plain_network(seed, 0.1), 10 ** drawn.uniform(-1, 0.7)).eval()),
    HonestModel("rounded weights", _rounded_weights),
    HonestModel("mean of an ensemble", lambda drawn, seed: MeanOf([plain_network(100 * seed + k, 0.1) for k in range(2)]).eval()),
    HonestModel("bf16", lambda drawn, seed: HalfPrecision(plain_network(seed, 0.1)).eval()),
    HonestModel("two or three classes", _two_classes),
    HonestModel("adversarial training, l2", _euclidean),
    HonestModel("random weights", _random_weight),
    HonestModel("random normalization", _random_normalization),
    HonestModel("random taps", _random_taps),
    HonestModel("random member", _random_member),
)
"""Families of honest models; the last four are random."""
