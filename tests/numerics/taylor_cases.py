"""Small networks and run contexts for the tests of the TRADES and Taylor family. Float64, 8x8 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.classifier import Classifier, InputNormalization
from models.threat_model import ThreatModel
from trainers.hardware import FULL, Precision
from trainers.objective import Objective, objective_entry
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

NUM_CLASSES = 4


class TinyBackbone(nn.Module):
    """Two convolutions with batch normalization, a residual branch, max-pooling, mean, linear classifier."""

    def __init__(self, activation: Callable[[], nn.Module], width: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = activation()
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(width, NUM_CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.pool(self.act2(self.bn2(self.conv2(x)) + x))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))


def tiny_network(activation: Callable[[], nn.Module] = nn.Softplus, *, width: int = 4, bias: bool = False, seed: int = 0) -> Classifier:
    """Return a network in train mode with batch normalization away from its initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(InputNormalization((0.5,) * 3, (0.25,) * 3), TinyBackbone(activation, width, bias)).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.train()


def batch(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images in [0.1, 0.9] and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 + 0.8 * torch.rand(size, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, NUM_CLASSES, (size,), generator=generator)


def nearby(x: Tensor, seed: int = 2) -> Tensor:
    """Return images within 0.05 of x, in place of adversarial ones."""
    generator = torch.Generator().manual_seed(seed)
    return (x + 0.05 * (2 * torch.rand(x.shape, dtype=x.dtype, generator=generator) - 1)).clamp(0, 1)


def gaussian_direction(model: nn.Module, sigma: float, seed: int = 3, only: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Return u ~ N(0, sigma^2) for the parameters whose name `only` accepts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: sigma * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        for name, parameter in model.named_parameters()
        if only(name)
    }


def context(
    *, steps: int = 2, seed: int = 0, epoch: int = 0, norm: str = "linf", precision: Precision = FULL, mode: str = "eval"
) -> StepContext:
    """Return a run context with an attack of a few steps."""
    epsilon, step_size = (8 / 255, 2 / 255) if norm == "linf" else (0.5, 0.2)
    streams = Streams(seed)
    streams.attack.manual_seed(seed)
    streams.noise.manual_seed(seed + 1)
    return StepContext(
        threat_model=ThreatModel(norm=norm, epsilon=epsilon),
        attack=InnerAttackConfig(steps=steps, step_size=step_size, mode=mode),
        redraw="attack_then_step",
        streams=streams,
        precision=precision,
        num_epochs=4,
        steps_per_epoch=1,
        epoch=epoch,
    )


def objective(name: str, **parameters: object) -> Objective:
    """Return an objective by name."""
    entry = objective_entry(name)
    return entry.create(entry.config(**parameters))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the accumulated gradients."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
