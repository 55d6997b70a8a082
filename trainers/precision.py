"""The arithmetic of training: fp32, or bf16 autocast where the hardware has matrix units for it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Precision:
    """A chosen arithmetic on a device type."""

    name: Literal["fp32", "bf16"]
    device_type: str

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16)


FULL = Precision("fp32", "cpu")


def choose_precision(setting: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on CUDA devices that compute in bf16 and on CPUs with AMX-bf16, else fp32.

    CPUs that only have vector bf16 instructions stay at fp32: their gain is small and depends on the layer shapes.
    """
    if setting != "auto":
        return Precision(setting, device.type)
    if device.type == "cuda":
        return Precision("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32", "cuda")
    fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return Precision("bf16" if fast else "fp32", device.type)
