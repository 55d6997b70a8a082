"""What the hardware decides: the arithmetic of training, the layout of images in memory, the peak of memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.accelerator import counts_memory

GPU_METRIC = "memory/peak_gpu_megabytes"
PROCESS_METRIC = "memory/peak_process_megabytes"
"""Code, libraries and data included, so it says less of a method than the GPU's number."""

_MEGABYTE = 2**20
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


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
    """Resolve `auto`: bf16 on CUDA and XPU devices that compute in bf16 and on CPUs with AMX or AVX-512 bf16 instructions, else fp32.

    Measured on a CPU with AVX-512 bf16 and without AMX, a PGD-10 training step takes 0.6 of its fp32 time; without either, bf16 is
    emulated and slower. That a bf16 attack reaches the loss of an fp32 one is tested.
    """
    if setting != "auto":
        return Precision(setting, device.type)
    if device.type == "cuda":
        return Precision("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32", "cuda")
    if device.type == "xpu":
        return Precision("bf16" if torch.xpu.is_bf16_supported(including_emulation=False) else "fp32", "xpu")
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = any(capabilities.get(name) for name in ("amx_bf16", "amx_tile", "avx512_bf16"))
    return Precision("bf16" if fast else "fp32", device.type)


def at_least_fp32(logits_BK: Tensor) -> Tensor:
    """Return half-precision logits in fp32, others as they are: losses are never computed in bf16."""
    return logits_BK.float() if logits_BK.dtype.itemsize < 4 else logits_BK


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last layout, faster for convolutions on CPUs and GPUs alike, if it has 4 dimensions, else as it is.

    Values and shape stay the same.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def to_channels_last_(model: nn.Module) -> nn.Module:
    """Lay out the 4-dimensional parameters and buffers of `model` channels last, in place, and return it.

    Values, names, shapes and identities of the parameters stay the same: optimizers built before keep working.
    """
    return model.to(memory_format=torch.channels_last)


class PeakMemory:
    """Peak memory of an epoch of training, from its making to each `metrics()`: what PyTorch held on the GPU, or what the whole process
    held where it trains on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if counts_memory(device):
            torch.accelerator.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self.known = False  # another system than Linux: the peak of an earlier training would be taken for this one's

    def metrics(self) -> dict[str, float]:
        """Return the peak in MB (2**20 bytes) under the name of what it is; empty where it cannot be known."""
        if not self.known:
            return {}
        if counts_memory(self.device):
            return {GPU_METRIC: torch.accelerator.max_memory_allocated(self.device) / _MEGABYTE}
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return {PROCESS_METRIC: int(line.split()[1]) * 1024 / _MEGABYTE}
