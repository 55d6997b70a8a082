"""The optimizer: its settings and how it is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from models.configuration import Config
from models.layers.channel_statistics import NormalizesGroups

Undecayed = Literal["sigma", "normalization", "bias"]


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw", "lion", "muon"] = Field(
        "sgd",
        description="`sgd` (all five papers), `adam` (GAL, ADP, TRS), `adamw`, `lion` (Chen et al. 2023), `muon` (Jordan et al. 2024: "
        "matrices and convolutions; AdamW for the rest). Both last ones are timm's.",
    )
    learning_rate: float = Field(0.1, gt=0, le=1000, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD and Muon.")
    nesterov: bool = Field(False, description="Nesterov momentum.")
    weight_decay: float = Field(
        5e-4, ge=0, le=10, description="L2 penalty coefficient (sgd, adam), or decoupled decay times the learning rate (adamw, lion, muon)."
    )
    no_weight_decay: tuple[Undecayed, ...] = Field(
        (),
        description="Parameters that weight decay leaves alone: `sigma` (standard deviations of random weights), `normalization` (scales "
        "and shifts), `bias` (all other biases). None is what the papers do.",
    )
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="Epsilon of Adam and AdamW.")
    gradient_clip_norm: float | None = Field(None, gt=0, description="Clip the global gradient norm; none: no clipping.")
    gradients_when_unused: Literal["none", "zero"] = Field(
        "none",
        description="`zero` fills the gradients of unused parameters with zeros, so weight decay and momentum still move them (what the "
        "official RNA code does, being written for PyTorch 1.7); `none` leaves them alone.",
    )

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerConfig:
        if self.name in ("sgd", "muon") and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if len(set(self.no_weight_decay)) < len(self.no_weight_decay):
            raise ValueError(f"no_weight_decay names one kind twice: {', '.join(self.no_weight_decay)}")
        return self


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over all trainable parameters.

    Fused kernels are left to GPUs: on CPUs they gain nothing and, in PyTorch 2.15, silently compute wrong weights where a gradient
    or a momentum buffer is laid out otherwise than its parameter.
    """
    fused = next(model.parameters()).device.type == "cuda"
    groups = parameter_groups(model, config.no_weight_decay)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "adam":
        return torch.optim.Adam(groups, eps=config.adam_epsilon, fused=fused, **settings)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, eps=config.adam_epsilon, fused=fused, **settings)
    if config.name in ("lion", "muon"):
        import timm.optim  # takes a second, and few trainings need it

        if config.name == "lion":
            return timm.optim.Lion(groups, **settings)
        return timm.optim.Muon(groups, momentum=config.momentum, nesterov=config.nesterov, **settings)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=fused, **settings)


def parameter_groups(model: nn.Module, no_weight_decay: Sequence[Undecayed]) -> list[dict[str, Any]]:
    """Return the trainable parameters as one group, or as two: those with weight decay, and those without."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    left_out = {id(parameter) for name, parameter in _kinds(model) if name in no_weight_decay}
    decayed = [parameter for _, parameter in trainable if id(parameter) not in left_out]
    others = [parameter for _, parameter in trainable if id(parameter) in left_out]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _kinds(model: nn.Module) -> list[tuple[Undecayed, nn.Parameter]]:
    """Return the kind of every parameter that has one. A layer normalizes if it has running statistics or groups of its own."""
    found: list[tuple[Undecayed, nn.Parameter]] = []
    for module in model.modules():
        normalizes = _normalizes(module)
        for name, parameter in module.named_parameters(recurse=False):
            if normalizes:
                found.append(("normalization", parameter))
            elif name == "sigma":
                found.append(("sigma", parameter))
            elif name.endswith("bias"):
                found.append(("bias", parameter))
    return found


def _normalizes(module: nn.Module) -> bool:
    known = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or isinstance(module, NormalizesGroups)
