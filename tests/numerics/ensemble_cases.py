"""Tiny ensembles and a training context for the tests of ensembles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.ensemble import Ensemble, ensemble_in
from models.randomness import seed_streams
from models.threat_model import ThreatModel
from trainers.hardware import FULL
from trainers.objective import Objective, objective_entry
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

SHAPE = (3, 8, 8)
NUM_CLASSES = 4


class TinyNet(nn.Module):
    """A convolution, a normalization, a smooth activation and a classifier: width 4."""

    def __init__(self, seed: int, normalized: bool = True, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4) if normalized else nn.Identity()
            self.act = activation()
            self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
            self.act2 = activation()
            self.classifier = nn.Linear(4, NUM_CLASSES)
            with torch.no_grad():
                self.classifier.weight.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act(self.norm(self.conv(x - 0.5)))))
        return self.classifier(x.mean(dim=(2, 3)))


def tiny_ensemble(num_members: int = 3, *, inference: str = "rsi_sample", **options: Any) -> Ensemble:
    """Return a float64 ensemble of tiny nets in training mode."""
    ensemble = Ensemble([TinyNet(seed, **options) for seed in range(num_members)], inference).double().train()
    seed_streams(ensemble, 0)
    return ensemble


def batch(count: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *SHAPE), dtype=dtype, generator=generator), torch.arange(count) % NUM_CLASSES


def context(model: nn.Module, *, steps: int = 2, epoch: int = 0, step: int = 0, **fields: Any) -> StepContext:
    """Return the context of a run at its beginning, streams of the epoch seeded."""
    attack = {"steps": steps, "mode": "eval"} | fields.pop("attack", {})
    result = StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(**attack),
        redraw=fields.pop("redraw", "attack_then_step"),
        streams=Streams(0),
        precision=FULL,
        num_epochs=fields.pop("num_epochs", 4),
        steps_per_epoch=fields.pop("steps_per_epoch", 2),
        epoch=epoch,
        step=step,
    )
    result.streams.begin_epoch(model, epoch)
    return result


def objective(name: str, **parameters: Any) -> Objective:
    """Return an objective by name."""
    entry = objective_entry(name)
    return entry.create(entry.config(**parameters))


def gradients(model: nn.Module) -> list[Tensor]:
    """Return copies of all gradients and clear them."""
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return found


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors."""
    assert len(first) == len(second)
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def members_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of the ensemble in `model`."""
    return list(ensemble_in(model).members)


@torch.no_grad()
def expected_correct(ensemble, x_BCHW, y_B):
    """Return, per example, the probability that a member chosen at random answers rightly: (B,), multiples of 1/N."""
    return (ensemble.member_logits(x_BCHW).argmax(dim=-1) == y_B).double().mean(dim=0)
