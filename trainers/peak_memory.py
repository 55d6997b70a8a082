"""Peak memory of an epoch of training: what PyTorch held on the GPU, or what the whole process held where it trains on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch

GPU_METRIC = "memory/peak_gpu_megabytes"
PROCESS_METRIC = "memory/peak_process_megabytes"
"""Code, libraries and data included, so it says less of a method than the GPU's number."""

_MEGABYTE = 2**20
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """Measures from its making to each `metrics()`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self.known = False  # another system than Linux: the peak of an earlier training would be taken for this one's

    def metrics(self) -> dict[str, float]:
        """Return the peak in MB (2**20 bytes) under the name of what it is; empty where it cannot be known."""
        if not self.known:
            return {}
        if self.device.type == "cuda":
            return {GPU_METRIC: torch.cuda.max_memory_allocated(self.device) / _MEGABYTE}
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return {PROCESS_METRIC: int(line.split()[1]) * 1024 / _MEGABYTE}
