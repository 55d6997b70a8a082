"""Small networks for 8 x 8 digits, trained in about a second, with parameters that a seed draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from models.randomness import resample
from trainers.attacks import pgd

NUM_TEST = 400

Activation = Callable[[], nn.Module]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (N, 1, 8, 8) in [0,1] and labels, test images and labels; the split is always the same."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return images[train], labels[train], images[test], labels[test]


class WinnersTakeAll(nn.Module):
    """Keep the largest share of a feature map and set the rest to zero: the gradient is one of a patchwork of linear pieces.

    Reference: Xiao, Zhong, Zheng, Enhancing Adversarial Defense by k-Winners-Take-All, ICLR 2020.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        smallest = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return torch.where(flat >= smallest, flat, 0.0).view_as(x)


def small_network(
    activation: Activation = nn.ReLU,
    *,
    channels: int = 1,
    width: int = 8,
    num_classes: int = 10,
    after_first: tuple[nn.Module, ...] = (),
    first: nn.Module | None = None,
) -> nn.Sequential:
    """Return two convolutions and a linear layer for 8 x 8 images.

    Args:
        channels: of the images. width: channels of the first convolution; the second has twice as many.
        after_first: modules between the first convolution and its activation. first: in the place of the first convolution.
    """
    return nn.Sequential(
        first if first is not None else nn.Conv2d(channels, width, 3, padding=1),
        *after_first,
        activation(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(32 * width, num_classes),
    )


def train(
    network: nn.Module,
    *,
    radius: float,
    seed: int,
    steps: int = 250,
    norm: Literal["linf", "l2"] = "linf",
    trades: bool = False,
    noise: float = 0.0,
    smoothing: float = 0.0,
    classes: Callable[[Tensor], Tensor] = lambda labels: labels,
) -> nn.Module:
    """Train on digits, adversarially within a radius (0: on clean images), and return the network in eval mode.

    Args:
        steps: optimizer steps of 64 images. norm: of the radius, `linf` or `l2`. trades: the loss of TRADES with beta 6 instead of that
            of adversarial training. noise: standard deviation of Gaussian noise on the images. smoothing: of the labels.
        classes: digit to class.
    """
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        rows = torch.randint(0, len(images), (64,), generator=generator)
        x, y = images[rows], classes(labels[rows])
        if noise:
            x = (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        resample(network, generator)
        attacked = x
        if radius:
            attacked = pgd(network, x, y, epsilon=radius, step_size=radius / 1.5, steps=3, norm=norm, generator=generator)
        optimizer.zero_grad()
        if trades:
            clean, other = network(x), network(attacked)
            distance = functional.kl_div(other.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean")
            loss = functional.cross_entropy(clean, y) + 6 * distance
        else:
            loss = functional.cross_entropy(network(attacked), y, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=8)
def _trained(seed: int, radius: float) -> nn.Module:
    torch.manual_seed(seed)
    return train(small_network(), radius=radius, seed=seed)


def plain_network(seed: int, radius: float = 0.0) -> nn.Module:
    """Return a network of a seed, trained (adversarially, where there is a radius) once and copied from then on."""
    return copy.deepcopy(_trained(seed, radius))
