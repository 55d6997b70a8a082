"""Small models that are known to fool evaluations, each around a network that is not robust: what attacks report of them is too high, or
is about something else than the model.

The tricks are those of the literature on gradient masking and of evaluations that were taken back.
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

from benchmarks.honest_models import WinnersTakeAll, small_network, train

_SHARPNESS = 1e3


class Around(nn.Module):
    """A trick around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class TorchNoise(Around):
    """Hidden randomness of PyTorch's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.1 * torch.randn(x.shape))


class NumpyNoise(Around):
    """Hidden randomness of NumPy's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.1 * torch.as_tensor(np.random.standard_normal(x.shape), dtype=x.dtype))  # noqa: NPY002  (the global generator is the point)


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

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + ((x * 8).round() / 8 - x).detach() - (x - x.detach()))


class Thermometer(Around):
    """Counts the levels that a pixel reaches: no gradient. Buckman et al., ICLR 2018, with the hard code."""

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.linspace(1 / 16, 15 / 16, 8).view(1, -1, 1, 1)
        return self.network((x >= levels).to(x).mean(1, keepdim=True) + 0 * x)


class OneHot(Around):
    """Only the class counts, with a tiny wave on top that has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return functional.one_hot(logits.argmax(1), logits.shape[1]) + 1e-3 * (_SHARPNESS * logits).sin()


class Saturated(Around):
    """Logits so large that cross-entropy has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.network(x)


class Tiny(Around):
    """Logits so small that cross-entropy is flat."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-8 * self.network(x)


class Detector(Around):
    """Notices pixels off the grid of its data and then answers without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        off_B = ((x * 16 - (x * 16).round()).abs().amax((1, 2, 3)) > 1e-3)[:, None]
        logits = self.network(x)
        return torch.where(off_B, logits.detach() + 0 * logits, logits)


class Purification(Around):
    """Smooths and rounds outside of autograd before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            smooth = 0.7 * x + 0.3 * functional.avg_pool2d(x, 3, 1, 1)
            clean = (smooth * 10).round() / 10
        return self.network(clean + 0 * x)


class OptimizingAtTestTime(Around):
    """Moves its input to where it is surer, and hides the way."""

    def forward(self, x: Tensor) -> Tensor:
        point = x.detach()
        with torch.enable_grad():
            for _ in range(3):
                leaf = point.clone().requires_grad_()
                sure = self.network(leaf).log_softmax(1).amax(1).sum()
                point = (point + 0.03 * torch.autograd.grad(sure, leaf)[0].sign()).clamp(0, 1)
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
    """A steep, tiny wave on each pixel: the value hardly changes, the gradient is all wave."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 1e-3 * (_SHARPNESS * 20 * x).sin())


@dataclass(frozen=True)
class BrokenModel:
    """A trick, and the network behind it, on which an attack finds the truth (None: there is no one number that is true)."""

    name: str
    build: Callable[[int], nn.Module]
    behind: Callable[[int], nn.Module] | None
    radius: float = 0.15


def _natural(seed: int) -> nn.Module:
    return train(small_network(), radius=0.0, seed=seed, steps=400)


def _winners(seed: int) -> nn.Module:
    return train(small_network(lambda: WinnersTakeAll(0.1)), radius=0.0, seed=seed, steps=400)


def _around(name: str, trick: type[Around], *, has_truth: bool = True) -> BrokenModel:
    return BrokenModel(name, lambda seed: trick(_natural(seed)).eval(), _natural if has_truth else None)


BROKEN: tuple[BrokenModel, ...] = (
    _around("global randomness of PyTorch", TorchNoise, has_truth=False),
    _around("global randomness of NumPy", NumpyNoise, has_truth=False),
    _around("global randomness of `random`", PythonNoise, has_truth=False),
    _around("counter", Counter, has_truth=False),
    _around("clock", Clock, has_truth=False),
    _around("quantization", Quantization),
    _around("thermometer code", Thermometer),
    BrokenModel("k-WTA", _winners, None),
    _around("one-hot output with a wave", OneHot),
    _around("saturated logits", Saturated),
    _around("tiny logits", Tiny),
    _around("detector of perturbed input", Detector),
    _around("purification", Purification),
    _around("test-time optimization", OptimizingAtTestTime),
    BrokenModel("member by the input's hash", lambda seed: ByHash([_natural(3 * seed + k) for k in range(3)]).eval(), None),
    _around("batch statistics", OnBatchStatistics, has_truth=False),
    _around("detection of queries", QueryDetection),
    _around("obfuscation under autograd", UnderAutograd),
    _around("negated gradients", NegatedGradients),
    _around("shattering activation", Shattering),
)
"""Kinds of broken models."""
