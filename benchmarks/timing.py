"""Interleaved measurement of CPU time, for benchmarks on machines that others use too.

Wall time and several threads are useless there: a thread that is pre-empted stalls the others. So: one thread, CPU time
of the process, the variants taking turns in one run, and ratios instead of absolute figures.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """CPU milliseconds of each round of one variant."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def minimum(self) -> float:
        return min(self.milliseconds)

    @property
    def maximum(self) -> float:
        return max(self.milliseconds)


def paired_ratio(slower: Timing, faster: Timing) -> float:
    """Return the median over rounds of how many times as long `slower` took: rounds that the machine spent on others cancel."""
    return statistics.median(a / b for a, b in zip(slower.milliseconds, faster.milliseconds, strict=True))


@dataclass(frozen=True)
class Bar:
    """A speed that must be reached: `reference` must take at least `at_least` times as long as `variant` (medians)."""

    variant: str
    reference: str
    at_least: float

    def ratio(self, timings: Mapping[str, Timing]) -> float:
        return timings[self.reference].median / timings[self.variant].median

    def is_met(self, timings: Mapping[str, Timing]) -> bool:
        return self.ratio(timings) >= self.at_least


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time each variant `rounds` times in turns, with one thread.

    Args:
        variants: names and functions without arguments; each call is one measurement.
        rounds: number of measurements per variant. Each round begins with another variant.
        warmup: unmeasured calls of each variant before the first round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for function in variants.values():
            for _ in range(warmup):
                function()
        names = list(variants)
        milliseconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                begin = time.process_time()
                variants[name]()
                milliseconds[name].append(1000 * (time.process_time() - begin))
    finally:
        torch.set_num_threads(threads)
    return {name: Timing(tuple(values)) for name, values in milliseconds.items()}


def hardware() -> dict[str, Any]:
    """Return what a reader of a record must know of the machine."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": _cpu_name(),
        "amx_bf16": bool(capabilities.get("amx_bf16", False)),
        "avx512_bf16": bool(capabilities.get("avx512_bf16", False)),
        "torch": torch.__version__,
        "threads": 1,
    }


def describe_hardware(facts: Mapping[str, Any]) -> str:
    """Return `hardware()` as one line."""
    yes_no = {True: "yes", False: "no"}
    return (
        f"{facts['cpu']}, torch {facts['torch']}, {facts['threads']} thread, "
        f"AMX-bf16: {yes_no[facts['amx_bf16']]}, AVX512-bf16: {yes_no[facts['avx512_bf16']]}"
    )


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
