"""Averages of the weights along training: exponential (EMA) or of epochs (SWA), and the batch statistics that belong to them.

An average is taken over parameters: of a random weight over mu and sigma, of a hypernetwork over its own weights and never over those that
it makes. Constraints on parameters are convex sets, which averages do not leave. Batch statistics are no parameters: those of other weights
say nothing about the average, so they are taken anew from training images, as often as the average is validated.

Reference: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, section 3 (SWA, and statistics anew);
Gowal et al., Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples, "Model weight averaging" (EMA).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from models.configuration import Config
from models.constraints import apply_constraints
from models.ensemble import Ensemble
from models.modes import mode
from models.randomness import resample, seeded
from trainers.distributed import to_cpu
from trainers.labels import softened

FIRST_EPOCH = {"none": 0.0, "ema": 0.0, "swa": 0.75}


class AveragingConfig(Config):
    """An average of the weights along training. It is validated beside the weights themselves, and the better of the two is kept."""

    name: Literal["none", "ema", "swa"] = Field(
        "none",
        description="`none`; `ema`: exponential moving average after every step (Gowal et al. 2020); `swa`: mean of the weights at the end "
        "of epochs (Izmailov et al. 2018).",
    )
    decay: float = Field(0.995, ge=0, lt=1, description="ema: weight of the average so far (0.995: Gowal et al. 2020).")
    warmup: bool = Field(
        True,
        description="ema: after t updates the decay is at most (1 + t) / (10 + t), so that a short training is not its beginning.",
    )
    start: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the epochs before the average begins; none: 0 for ema, 0.75 for swa (Izmailov et al. 2018).",
    )
    statistics_images: int = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="Training images from which the batch statistics of the average are taken anew before each validation; at least one "
        "batch.",
    )

    label_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Self-distillation: share of the average's own probabilities in the labels, once it has begun (Chen et al. 2021).",
    )
    label_temperature: float = Field(2.0, gt=0, le=1000, description="Temperature of those probabilities (Chen et al. 2021: 2).")

    @model_validator(mode="after")
    def _labels_come_from_an_average(self) -> AveragingConfig:
        if self.label_weight and self.name == "none":
            raise ValueError("label_weight takes labels from an average, and averaging.name is none")
        return self

    @property
    def first_epoch(self) -> float:
        """Share of the epochs before the average begins."""
        return FIRST_EPOCH[self.name] if self.start is None else self.start


def ema_decay(config: AveragingConfig, updates: int) -> float:
    """Return the weight of the average so far after `updates` updates (the first of which took the weights as they were)."""
    return min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay


class WeightAverage:
    """The average of a model's parameters.

    Args:
        model: whose parameters. config: how. num_epochs: of the run.

    Attributes:
        updates: how often weights were taken in; 0: it has not begun.
    """

    def __init__(self, model: nn.Module, config: AveragingConfig, num_epochs: int) -> None:
        self.config, self.num_epochs = config, num_epochs
        self.parameters = dict(model.named_parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.updates = 0

    def after_step(self, epoch: float) -> None:
        """Take in the weights after an optimizer step; `epoch`: epochs that are over by now, with their fraction."""
        if self.config.name == "ema" and epoch > self.config.first_epoch * self.num_epochs:
            self._take_in(1 - ema_decay(self.config, self.updates))

    def after_epoch(self, epoch: int) -> None:
        """Take in the weights after an epoch; `epoch`: epochs that are over by now."""
        if self.config.name == "swa" and epoch > self.config.first_epoch * self.num_epochs:
            self._take_in(1 / (self.updates + 1))

    @torch.no_grad()
    def _take_in(self, share: float) -> None:
        weights = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(self.values, weights, share if self.updates else 1.0)
        self.updates += 1

    @torch.no_grad()
    def labels(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        """Return labels that the average has softened, (B, K), or as they are where it is not to or has not begun.

        It sees the images with their own batch statistics, under the model's draw.
        """
        if not self.config.label_weight or not self.updates:
            return y_B
        with mode(model, "train_without_update"):
            logits_BK = functional_call(model, dict(zip(self.parameters, self.values, strict=True)), (x_BCHW,))
        return softened(y_B, logits_BK, self.config.label_weight, self.config.label_temperature)

    @contextlib.contextmanager
    def in_the_model(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the averaged parameters inside; afterwards parameters and buffers are as before."""
        weights = [parameter.data for parameter in self.parameters.values()]
        buffers = {name: buffer.clone() for name, buffer in model.state_dict(keep_vars=True).items() if name not in self.parameters}
        try:
            for parameter, value in zip(self.parameters.values(), self.values, strict=True):
                parameter.data = value.clone()
            apply_constraints(model)  # the set is convex, but for the last bit
            yield
        finally:
            for parameter, weight in zip(self.parameters.values(), weights, strict=True):
                parameter.data = weight
            with torch.no_grad():
                for name, buffer in model.state_dict(keep_vars=True).items():
                    if name in buffers:
                        buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average as copies on the CPU."""
        return {"updates": self.updates, "weights": to_cpu(dict(zip(self.parameters, self.values, strict=True)))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        with torch.no_grad():
            for name, value in zip(self.parameters, self.values, strict=True):
                value.copy_(state["weights"][name])
        self.updates = state["updates"]


@torch.no_grad()
def recompute_batch_statistics(model: nn.Module, batches: Iterable[Tensor], seed: int) -> None:
    """Replace the running statistics of `model` by the mean of those of some batches, each under a draw of its own.

    A normalization that no batch passed (RNA: never drawn) keeps what it has. Modes, draws and streams are as before afterwards.

    Args:
        batches: training images (B, C, H, W). seed: of the draws.
    """
    normalizations: list[Any] = [module for module in model.modules() if _records(module)]
    if not normalizations:
        return
    momenta = [module.momentum for module in normalizations]
    before = [(module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone()) for module in normalizations]
    try:
        for module in normalizations:
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
        with mode(model, "train"), seeded(model, seed):
            for x_BCHW in batches:
                resample(model)
                # Every member is asked, whichever would answer.
                model.member_logits(x_BCHW) if isinstance(model, Ensemble) else model(x_BCHW)
    finally:
        for module, momentum, kept in zip(normalizations, momenta, before, strict=True):
            module.momentum = momentum
            if not module.num_batches_tracked:
                for buffer, value in zip((module.running_mean, module.running_var), kept, strict=False):
                    buffer.copy_(value)
            module.num_batches_tracked.copy_(kept[2])


def _records(module: nn.Module) -> bool:
    return getattr(module, "track_running_stats", False) is True and isinstance(getattr(module, "running_mean", None), Tensor)
