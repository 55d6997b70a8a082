"""Calibration: the harness on toys that come with the package and whose result is known.

adversarially_trained   a small deterministic network, adversarially trained on handwritten digits: accuracies must be the stored ones
masked                  the same network behind a rounding of its input, which has no gradient: it must be flagged
noisy                   the same network with random weights on its first feature map: the attack on a frozen draw must leave more
                        accuracy than the attack on an unknown draw, and be named a transfer attack

An installation whose numbers differ must not be trusted with others.
"""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers.random_weight import RandomFeatureWeight, SigmaBounds
from models.yaml_text import read_yaml

DATA_FILE = Path(__file__).with_name("calibration_toys.yaml")


class DigitsNetwork(nn.Module):
    """A small network for 8 x 8 digits: two convolutions and a linear layer, with room for something before each.

    Args:
        before: applied to the pixels. after_stem: applied to the first feature map (8, 8, 8).
    """

    def __init__(self, before: nn.Module | None = None, after_stem: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before or nn.Identity()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.after_stem = after_stem or nn.Identity()
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = functional.relu(self.after_stem(self.stem(self.before(x))))
        return self.head(functional.relu(self.body(features)).flatten(1))


class Rounding(nn.Module):
    """Round pixels to sixteenths: nearly the same image, no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 16).round() / 16


@functools.cache
def toy_data() -> dict[str, Any]:
    """Return the shipped weights (as stored), settings and expected values."""
    return read_yaml(DATA_FILE)


def calibration_toys() -> dict[str, nn.Module]:
    """Return the three toys, in eval mode and float64: sign gradients amplify rounding, and devices round differently."""
    data = toy_data()
    with torch.random.fork_rng(devices=[]):  # layers initialize themselves from the global generator
        noise = RandomFeatureWeight((8, 8, 8), 1.0, data["noise"], SigmaBounds("none", 0.0, 0.0))
        toys: dict[str, nn.Module] = {
            "adversarially_trained": DigitsNetwork(),
            "masked": DigitsNetwork(before=Rounding()),
            "noisy": DigitsNetwork(after_stem=noise),
        }
    for toy in toys.values():
        toy.load_state_dict(_stored_weights(data["weights"]), strict=False)
        toy.double().eval().requires_grad_(False)
    return toys


def calibration_images() -> tuple[Tensor, Tensor]:
    """Return the test images (N, 1, 8, 8) in [0,1] and labels (N,) of the calibration: digits the toys were not trained on."""
    from sklearn.datasets import load_digits  # here: its import is slow, and most evaluations never calibrate

    digits = load_digits()
    order = np.random.default_rng(toy_data()["split_seed"]).permutation(len(digits.target))[: toy_data()["num_images"]]
    x = torch.tensor(digits.images[order], dtype=torch.float64).unsqueeze(1) / 16
    return x, torch.tensor(digits.target[order])


def _stored_weights(stored: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(np.frombuffer(base64.b64decode(entry["values"]), dtype="<f2").astype(np.float32)).view(entry["shape"])
        for name, entry in stored.items()
    }
