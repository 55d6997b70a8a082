"""Small models that are known to fool evaluations, each around a network that is not robust: what attacks report of them is too high, or
is about something else than the model.

The tricks are those of the literature on gradient masking and of evaluations that were taken back; a seed draws their parameters.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.honest_models import Scaled, Subject
from benchmarks.small_networks import WinnersTakeAll, plain_network, small_network, train
from models.threat_model import ThreatModel


class Around(nn.Module):
    """A trick around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class TorchNoise(Around):
    """Hidden randomness of PyTorch's global generator."""

    def __init__(self, network: nn.Module, deviation: float = 0.1) -> None:
        super().__init__(network)
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.deviation * torch.randn(x.shape))


class NumpyNoise(Around):
    """Hidden randomness of NumPy's global generator."""

    def __init__(self, network: nn.Module, deviation: float = 0.1) -> None:
        super().__init__(network)
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.deviation * torch.as_tensor(np.random.standard_normal(x.shape), dtype=x.dtype))  # noqa: NPY002  (the global generator is the point)


class PythonNoise(Around):
    """Hidden randomness of `random`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.roll(random.choice((-1, 0, 1)), dims=3))


class Counter(Around):
    """Another function at each call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x.roll(self.calls % 3 - 1, dims=3))


class Clock(Around):
    """Another function at each moment."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.roll(time.perf_counter_ns() // 1000 % 3 - 1, dims=3))


class Quantization(Around):
    """Rounds its input: no gradient."""

    def __init__(self, network: nn.Module, levels: int = 8) -> None:
        super().__init__(network)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * self.levels).round() / self.levels)


class Thermometer(Around):
    """Counts the levels that a pixel reaches: no gradient. Buckman et al., ICLR 2018, with the hard code."""

    def __init__(self, network: nn.Module, levels: int = 8) -> None:
        super().__init__(network)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.linspace(0.5 / self.levels, 1 - 0.5 / self.levels, self.levels).view(1, -1, 1, 1)
        return self.network((x >= levels).to(x).mean(1, keepdim=True) + 0 * x)


class OneHot(Around):
    """Only the class counts, with a tiny wave on top that has a gradient."""

    def __init__(self, network: nn.Module, sharpness: float = 1e3) -> None:
        super().__init__(network)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return functional.one_hot(logits.argmax(1), logits.shape[1]) + 1e-3 * (self.sharpness * logits).sin()


class Detector(Around):
    """Notices pixels off the grid of its data and then answers without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        off_B = ((x * 16 - (x * 16).round()).abs().amax((1, 2, 3)) > 1e-3)[:, None]
        logits = self.network(x)
        return torch.where(off_B, logits.detach() + 0 * logits, logits)


class Purification(Around):
    """Smooths and rounds outside of autograd before it answers."""

    def __init__(self, network: nn.Module, share: float = 0.3, levels: int = 10) -> None:
        super().__init__(network)
        self.share, self.levels = share, levels

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            smooth = (1 - self.share) * x + self.share * functional.avg_pool2d(x, 3, 1, 1)
            clean = (smooth * self.levels).round() / self.levels
        return self.network(clean + 0 * x)


class OptimizingAtTestTime(Around):
    """Moves its input to where it is surer, and hides the way."""

    def __init__(self, network: nn.Module, steps: int = 3, step_size: float = 0.03) -> None:
        super().__init__(network)
        self.steps, self.step_size = steps, step_size

    def forward(self, x: Tensor) -> Tensor:
        point = x.detach()
        with torch.enable_grad():
            for _ in range(self.steps):
                leaf = point.clone().requires_grad_()
                sure = self.network(leaf).log_softmax(1).amax(1).sum()
                point = (point + self.step_size * torch.autograd.grad(sure, leaf)[0].sign()).clamp(0, 1)
        return self.network(point + (x - x.detach()) * 0.01)


class ByHash(nn.Module):
    """A hash of the image chooses the member that answers: random to a gradient, not to the model."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        answers_MBK = torch.stack([member(x) for member in self.members])
        chosen = [hashlib.sha256(image.detach().numpy().tobytes()).digest()[0] % len(self.members) for image in x]
        return answers_MBK[torch.tensor(chosen), torch.arange(len(x))]


class OnBatchStatistics(Around):
    """Normalizes by its batch: an image's answer depends on its company."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - x.mean(0)) / (x.std(0, correction=0) + 0.1) * 0.4 + 0.3)


class QueryDetection(Around):
    """Remembers its queries and answers a query that is near one of them, but another, with noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        near_B = torch.zeros(len(x), dtype=torch.bool)
        for before in self.seen[-20:]:
            if before.shape == x.shape:
                distance_B = (x.detach() - before).abs().amax((1, 2, 3))
                near_B |= (distance_B > 1e-6) & (distance_B < 0.3)
        self.seen.append(x.detach().clone())
        return torch.where(near_B[:, None], logits.flip(1), logits)


class UnderAutograd(Around):
    """Another function as soon as somebody asks for a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self.network(x.flip(3)).flip(1)
        return self.network(x)


class _Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return -gradient


class NegatedGradients(Around):
    """The right answer with a gradient of the wrong sign."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(_Negated.apply(x))


class Shattering(Around):
    """A steep, tiny wave on each pixel: the value hardly changes, the gradient is all wave.

    Args:
        frequency: of the wave. steepness: largest gradient of the wave, beside the 1 of the pixel.
    """

    def __init__(self, network: nn.Module, frequency: float = 2e4, steepness: float = 20.0) -> None:
        super().__init__(network)
        self.frequency, self.steepness = frequency, steepness

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.steepness / self.frequency * (self.frequency * x).sin())


class ManyResolutions(nn.Module):
    """Noisy copies of the image at several resolutions as channels, and the middle of what several layers say (CrossMax).

    After Fort and Lakshminarayanan, Ensemble Everything Everywhere, arXiv 2408.05446; broken in arXiv 2411.14834.
    """

    def __init__(self, deviation: float = 0.1) -> None:
        super().__init__()
        self.deviation = deviation
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(1024, 10), nn.Linear(512, 10), nn.Linear(64, 10)])

    def forward(self, x: Tensor) -> Tensor:
        scales = [x, *(functional.interpolate(functional.adaptive_avg_pool2d(x, side), 8) for side in (4, 2))]
        noisy = torch.cat([scale + self.deviation * torch.randn(scale.shape) for scale in scales], dim=1)
        layers = [self.first(noisy)]
        layers += [self.second(layers[0])]
        layers += [self.third(layers[1])]
        answers_LBK = torch.stack([head(layer.flatten(1)) for head, layer in zip(self.heads, layers, strict=True)])
        if self.training:
            return answers_LBK.mean(0)
        answers_LBK = answers_LBK - answers_LBK.amax(2, keepdim=True)
        return (answers_LBK - answers_LBK.amax(0, keepdim=True)).median(0).values


class RandomFilters(nn.Module):
    """A first convolution some filters of which are drawn anew at each call.

    After Dong and Xu, Adversarial Robustness via Random Projection Filters, CVPR 2023; weak under averaged gradients.
    """

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.num_random = int(32 * share)
        self.fixed = nn.Conv2d(1, 32 - self.num_random, 3, padding=1)
        self.rest = small_network(channels=32)

    def forward(self, x: Tensor) -> Tensor:
        drawn = functional.conv2d(x, torch.randn(self.num_random, 1, 3, 3) / 3, padding=1)
        return self.rest(torch.cat([self.fixed(x), drawn], dim=1))


@dataclass(frozen=True)
class BrokenModel:
    """A family of tricks.

    Attributes:
        make: draws a model from a seed. behind: whether a network answers behind a trick that hides its gradients, so that an attack with
            that network's gradients bounds the truth from above; else there is no one number that is true.
    """

    name: str
    make: Callable[[random.Random, int], nn.Module]
    behind: bool

    def build(self, seed: int) -> Subject:
        """Return the model of a seed and what it is evaluated on."""
        drawn = random.Random(f"{self.name} {seed}")
        torch.manual_seed(drawn.randrange(2**31))
        return Subject(self.make(drawn, seed).eval(), ThreatModel(epsilon=drawn.choice((0.1, 0.15, 0.2))))


def _winners(drawn: random.Random, seed: int) -> nn.Module:
    share = drawn.uniform(0.06, 0.15)
    return train(small_network(lambda: WinnersTakeAll(share)), radius=0.0, seed=seed)


def _around(
    name: str, trick: Callable[..., nn.Module], behind: bool = True, /, **ranges: Callable[[random.Random], float | int]
) -> BrokenModel:
    """Return a family around naturally trained networks, whose parameters are drawn by these functions."""
    return BrokenModel(name, lambda drawn, seed: trick(plain_network(seed), **{key: draw(drawn) for key, draw in ranges.items()}), behind)


def _uniform(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda drawn: drawn.uniform(low, high)


def _whole(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda drawn: drawn.randint(low, high)


def _power(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda drawn: 10 ** drawn.uniform(low, high)


BROKEN: tuple[BrokenModel, ...] = (
    _around("global randomness of PyTorch", TorchNoise, False, deviation=_uniform(0.02, 0.2)),
    _around("global randomness of NumPy", NumpyNoise, False, deviation=_uniform(0.02, 0.2)),
    _around("global randomness of `random`", PythonNoise, False),
    _around("counter", Counter, False),
    _around("clock", Clock, False),
    _around("quantization", Quantization, levels=_whole(3, 12)),
    _around("thermometer code", Thermometer, levels=_whole(4, 12)),
    BrokenModel("k-WTA", _winners, False),
    _around("one-hot output with a wave", OneHot, sharpness=_power(2.0, 4.0)),
    _around("saturated logits", Scaled, factor=_power(2.5, 5.0)),
    _around("tiny logits", Scaled, factor=_power(-9.0, -4.0)),
    _around("detector of perturbed input", Detector),
    _around("purification", Purification, share=_uniform(0.1, 0.6), levels=_whole(5, 12)),
    _around("test-time optimization", OptimizingAtTestTime, steps=_whole(1, 4), step_size=_uniform(0.01, 0.04)),
    BrokenModel("member by the input's hash", lambda drawn, seed: ByHash([plain_network(100 * seed + k) for k in range(3)]), False),
    _around("batch statistics", OnBatchStatistics, False),
    _around("detection of queries", QueryDetection),
    _around("obfuscation under autograd", UnderAutograd),
    _around("negated gradients", NegatedGradients),
    _around("shattering activation", Shattering, frequency=_power(3.3, 5.0), steepness=_uniform(10, 40)),
    BrokenModel(
        "noisy copies at many resolutions",
        lambda drawn, seed: train(ManyResolutions(drawn.uniform(0.05, 0.2)), radius=0.0, seed=seed),
        False,
    ),
    BrokenModel("random filters", lambda drawn, seed: train(RandomFilters(drawn.uniform(0.2, 0.7)), radius=0.0, seed=seed), False),
)
"""Families of broken models."""
