"""Small models that mean no harm: trained on 8 x 8 digits in seconds, at several radii. Whatever check fails on them is a false alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from models import build_model
from models.randomness import resample
from trainers.attacks import pgd

NUM_TEST = 400


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


def small_network(activation: Callable[[], nn.Module] = nn.ReLU, channels: int = 1) -> nn.Sequential:
    """Return two convolutions and a linear layer for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        activation(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(network: nn.Module, *, radius: float, seed: int, steps: int, trades: bool = False) -> nn.Module:
    """Train on digits, adversarially within a radius (0: on clean images), and return the network in eval mode.

    Args:
        steps: optimizer steps of 64 images. trades: the loss of TRADES with beta 6 instead of that of adversarial training.
    """
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        rows = torch.randint(0, len(images), (64,), generator=generator)
        x, y = images[rows], labels[rows]
        resample(network, generator)
        attacked = pgd(network, x, y, epsilon=radius, step_size=radius / 2, steps=4, generator=generator) if radius else x
        optimizer.zero_grad()
        if trades:
            clean, other = network(x), network(attacked)
            distance = functional.kl_div(other.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean")
            loss = functional.cross_entropy(clean, y) + 6 * distance
        else:
            loss = functional.cross_entropy(network(attacked), y)
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def _registered(defence: str, **options: object) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        model = build_model(defence, **options, backbone="resnet8", image_shape=(1, 8, 8), num_classes=10)
        return train(model, radius=0.1, seed=seed, steps=200)

    return build


@dataclass(frozen=True)
class HonestModel:
    """A kind of model: how one is trained from a seed, and the radii at which it is evaluated."""

    name: str
    build: Callable[[int], nn.Module]
    radii: tuple[float, ...] = (8 / 255, 0.15)


def _plain(name: str, radius: float, radii: tuple[float, ...], **options: bool) -> HonestModel:
    return HonestModel(name, lambda seed: train(small_network(), radius=radius, seed=seed, steps=400, **options), radii)


HONEST: tuple[HonestModel, ...] = (
    _plain("natural", 0.0, (8 / 255, 0.15)),
    _plain("adversarial training, 0.1", 0.1, (8 / 255, 0.1, 0.2)),
    _plain("adversarial training, 0.25", 0.25, (8 / 255, 0.25)),
    _plain("TRADES, 0.1", 0.1, (8 / 255, 0.15), trades=True),
    HonestModel(
        "k-WTA with adversarial training",
        lambda seed: train(small_network(lambda: WinnersTakeAll(0.3)), radius=0.1, seed=seed, steps=400),
        (8 / 255, 0.1),
    ),
    HonestModel("ctrw", _registered("ctrw")),
    HonestModel("rna", _registered("rna")),
    HonestModel("dcs", _registered("dcs")),
    HonestModel("red", _registered("red", num_members=3)),
)
"""Kinds of honest models."""
