"""The optimizer: its settings and how it is built."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from models.configuration import Config


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["sgd", "adam"] = Field("sgd", description="`sgd` (all five papers) or `adam` (GAL, ADP, TRS).")
    learning_rate: float = Field(0.1, gt=0, le=1000, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Nesterov momentum.")
    weight_decay: float = Field(5e-4, ge=0, le=10, description="L2 penalty coefficient on all parameters.")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="Epsilon of Adam.")
    gradient_clip_norm: float | None = Field(None, gt=0, description="Clip the global gradient norm; none: no clipping.")
    gradients_when_unused: Literal["none", "zero"] = Field(
        "none",
        description="`zero` fills the gradients of unused parameters with zeros, so weight decay and momentum still move them (what the "
        "official RNA code does, being written for PyTorch 1.7); `none` leaves them alone.",
    )

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerConfig:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over all trainable parameters.

    Fused kernels are left to GPUs: on CPUs they gain nothing and, in PyTorch 2.15, silently compute wrong weights where a gradient
    or a momentum buffer is laid out otherwise than its parameter.
    """
    fused = next(model.parameters()).device.type == "cuda"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon, fused=fused)
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )
