"""What the conformance suites run over: every defence of the registry, plug-ins' too, on the smallest network that carries it.

A new defence is tested without any edit here. One whose defaults are too large for a test names smaller ones in `SMALLER`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.randomness import num_configurations
from models.registry import build_model

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 4

SMALLER: dict[str, dict[str, Any]] = {name: {"num_members": 2} for name in ("red", "ps_red", "gal", "adp", "dverge", "trs")} | {
    "dcs": {"kernel_size": 3, "num_taps": 2}
}

# Further settings of a defence that its contracts must hold for, beside the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "ctrw-per_example": {"draw_scope": "per_example"},
    "ctrw-filter": {"variant": "filter"},
    "ctrw-both": {"variant": "both", "position": 1},
    "ctrw-project": {"constraint": "project", "lower_bound": 1000.0, "upper_bound": 2400.0},
}


def build_case(name: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return the model of a case, in eval mode."""
    defence = name.partition("-")[0]
    parameters = SMALLER.get(defence, {}) | VARIANTS.get(name, {}) | overrides
    backbone = "resnet18" if defence == "ps_red" else "resnet8"
    model = build_model(defence, backbone=backbone, num_classes=NUM_CLASSES, image_shape=IMAGE_SHAPE, seed=seed, **parameters)
    sharpen(model)
    return model.eval()


def sharpen(model: nn.Module) -> None:
    """Undo the tiny initial weights of the last layer, under which all outputs are nearly equal."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.std() < 0.05:
            with torch.no_grad():
                module.weight.mul_(0.3 / module.weight.std())


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    """Return a batch of images of the cases' shape."""
    return torch.rand((count, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(seed))


def labels(count: int = 6) -> torch.Tensor:
    """Return labels for `images`."""
    return torch.arange(count) % NUM_CLASSES


def is_random(name: str) -> bool:
    """Return whether the case has more than one configuration."""
    return num_configurations(build_case(name)) > 1
