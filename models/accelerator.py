"""The accelerator of this process, whoever built it: NVIDIA and AMD (`cuda`), Intel (`xpu`), Apple (`mps`), as PyTorch finds it."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def accelerator() -> torch.device | None:
    """Return the accelerator that this process uses; None: this machine has none that PyTorch can use."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def device_for(wanted: object) -> torch.device:
    """Return the accelerator if one is wanted and there is one, else the CPU."""
    return (accelerator() if wanted else None) or CPU


def wait_for(device: torch.device) -> None:
    """Return when a device has done what it was asked: before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def counts_memory(device: torch.device) -> bool:
    """Return whether PyTorch counts what a device holds at its peak."""
    return has_module_like_cuda(device)


def has_module_like_cuda(device: torch.device) -> bool:
    """Return whether `torch.get_device_module(device)` has what `torch.cuda` has: names, generators, counts of memory (Apple's has not)."""
    return device.type in ("cuda", "xpu")
