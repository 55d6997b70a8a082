"""Whole training steps of the Taylor family against Rayndom's own TRADES, and against the structure of the public code, in one run.

    python -m benchmarks.taylor [--json FILE]

Each measurement is a whole step: PGD-10 in eval mode by divergence from the clean logits, loss, backward, SGD. ResNet-8 on 3x32x32,
float32, one thread, CPU time, the variants taking turns.

* trades: the reference.
* taylor first, taylor second: `rat_taylor` of order 1 and 2, exact derivatives.
* antithetic second: the same by differences. direct: one sample of weight noise, no expansion.
* surrogate: what the public code computes, in Rayndom's form: clean probabilities once, two passes, one backward, closed-form
  gradients of the last layer.
* public structure: the same computation with all redundant passes of the public script: the clean probabilities anew at each attack step, a
  backward pass for each of the two last-layer gradients, a forward pass for each term of the loss (8 forward and 9 backward passes).

Exit code 1 if a bar is missed. The C library's allocator is told to keep freed memory, as the allocators of GPUs do: otherwise page faults
of large tensors are a good part of what is measured.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Timing, describe_hardware, hardware, interleaved, paired_ratio
from models import build_model
from models.threat_model import ThreatModel
from trainers.hardware import Precision, channels_last, to_channels_last_
from trainers.objective import objective_entry
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

TRADES, FIRST, SECOND, SURROGATE, PUBLIC = "trades", "taylor first", "taylor second", "surrogate", "public structure"

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    TRADES: ("trades", {}),
    FIRST: ("rat_taylor", {"order": 1, "eta": 0.3}),
    SECOND: ("rat_taylor", {"order": 2, "eta": 0.2}),
    "antithetic second": ("rat_taylor", {"order": 2, "eta": 0.2, "derivatives": "antithetic"}),
    "direct": ("rat_direct", {}),
    SURROGATE: ("rat_surrogate", {}),
}

# (slower, faster, the former takes at most / at least this many times as long)
AT_MOST = ((FIRST, TRADES, 1.35), (SECOND, TRADES, 2.2), (SURROGATE, TRADES, 1.05))
AT_LEAST = ((PUBLIC, SURROGATE, 2.1),)

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
ALPHA, BETA, SIGMA = 0.2, 6.0, 1e-4


def objective_step(name: str, parameters: Mapping[str, Any], x: Tensor, y: Tensor, precision: Precision) -> Callable[[], None]:
    """Return one training step of an objective, as `trainers.fit` makes it."""
    model, optimizer = _model_and_optimizer()
    to_channels_last_(model)
    x = channels_last(x)
    entry = objective_entry(name)
    objective = entry.create(entry.config(**parameters))
    objective.prepare(model)
    context = StepContext(
        threat_model=ThreatModel(epsilon=EPSILON),
        attack=InnerAttackConfig(steps=STEPS, step_size=STEP_SIZE, mode="eval"),
        redraw="attack_then_step",
        streams=Streams(0),
        precision=precision,
        num_epochs=1,
        steps_per_epoch=1,
    )

    def step() -> None:
        optimizer.zero_grad()
        objective.training_step(model, x, y, context)
        optimizer.step()
        objective.after_optimizer_step(model, context)

    return step


def public_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one training step with the passes of the public script, in its memory layout."""
    model, optimizer = _model_and_optimizer()

    def step() -> None:
        noisy = copy.deepcopy(model).eval()
        with torch.no_grad():
            for module in noisy.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.add_(SIGMA * torch.randn_like(module.weight))
        x_adv = public_attack(noisy, x, x + 0.001 * torch.randn_like(x), STEPS)
        public_loss(model, x, x_adv, y, ALPHA, BETA).backward()
        optimizer.step()

    return step


def public_attack(model: nn.Module, x: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the attack of the public script: two forward passes per step."""
    x_adv = start.detach()
    for _ in range(steps):
        x_adv = x_adv.requires_grad_()
        target = functional.softmax(model(x), 1)
        loss = functional.kl_div(functional.log_softmax(model(x_adv), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        moved = x_adv.detach() + STEP_SIZE * gradient.sign()
        x_adv = torch.clamp(torch.min(torch.max(moved, x - EPSILON), x + EPSILON), 0, 1)
    return x_adv.detach()


def public_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the loss of the public script with its passes; clears `.grad`. The label matrices are built as the paper's code reads."""
    weight = model.backbone.classifier.weight
    model.zero_grad()
    cross_entropy = functional.cross_entropy(model(x), y)
    cross_entropy.backward(retain_graph=True)
    sums = weight.grad.sum(1)
    model.zero_grad()
    functional.cross_entropy(model(x_adv), y).backward()
    adversarial_sums = weight.grad.sum(1)
    model.zero_grad()

    def soft_labels(gap: Tensor) -> Tensor:
        num_classes = len(gap)
        smoothing = 1 - 2 / num_classes
        shares = (gap - gap.min()).repeat(num_classes, 1).fill_diagonal_(0)
        matrix = smoothing * shares / shares.sum(1, keepdim=True)
        return matrix.fill_diagonal_(1 - smoothing)[y]

    def divergence(images: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(functional.log_softmax(model(images), 1), target, reduction="batchmean")

    first_gap = sums.abs() - adversarial_sums.abs()
    second_labels = soft_labels(adversarial_sums.square() - sums.square())
    robust = functional.kl_div(functional.log_softmax(model(x_adv), 1), functional.softmax(model(x), 1), reduction="batchmean")
    first = 0.5 * (divergence(x_adv, soft_labels(first_gap)) + divergence(x, soft_labels(-first_gap)))
    second = 0.5 * (divergence(x_adv, second_labels) + divergence(x, second_labels))
    return (1 - alpha) * cross_entropy + beta * robust + alpha * first + 0.5 * alpha * second


def _model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model("trades", backbone="resnet8", num_classes=10, image_shape=(3, 32, 32)).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)


def measure(batch_size: int, rounds: int, names: list[str] | None = None) -> dict[str, Timing]:
    """Return the timings of the variants by name."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch_size,), generator=generator)
    precision = Precision("fp32", "cpu")
    steps = {name: objective_step(*entry, x, y, precision) for name, entry in OBJECTIVES.items() if names is None or name in names}
    if names is None or PUBLIC in names:
        steps[PUBLIC] = public_step(x, y)
    return interleaved(steps, rounds)


def bars_of(timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Return each bar with its measured ratio, the median over rounds."""
    rows = []
    for limits, kind in ((AT_MOST, "at_most"), (AT_LEAST, "at_least")):
        for slower, faster, limit in limits:
            ratio = paired_ratio(timings[slower], timings[faster])
            met = ratio <= limit if kind == "at_most" else ratio >= limit
            rows.append({"variant": slower, "reference": faster, "bar": kind, "limit": limit, "measured": ratio, "met": met})
    return rows


def table_of(timings: Mapping[str, Timing], bars: list[dict[str, Any]], batch_size: int) -> str:
    """Return timings and bars as text."""
    rounds = len(next(iter(timings.values())).milliseconds)
    lines = [
        f"resnet8, 3x32x32, batch {batch_size}, float32, PGD-{STEPS} and one SGD step, {rounds} rounds, CPU ms",
        f"{'':20s}{'median':>9s}{'min':>9s}{'max':>9s}{'over trades':>13s}",
    ]
    for name, timing in timings.items():
        ratio = paired_ratio(timing, timings[TRADES])
        lines.append(f"{name:20s}{timing.median:9.1f}{timing.minimum:9.1f}{timing.maximum:9.1f}{ratio:12.2f}x")
    for bar in bars:
        words = "at most" if bar["bar"] == "at_most" else "at least"
        verdict = "met" if bar["met"] else "MISSED"
        measured = f"{bar['variant']} takes {bar['measured']:.2f}x the time of {bar['reference']}"
        lines.append(f"bar {verdict}: {measured}, {words} {bar['limit']}x is required")
    return "\n".join(lines)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator not to give freed memory back; return whether that worked."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold = -1, -3
    return bool(library.mallopt(mmap_threshold, 1 << 30)) and bool(library.mallopt(trim_threshold, (1 << 31) - 1))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Training steps of the Taylor family against TRADES and the public structure.")
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error("fewer than 5 rounds say nothing")

    torch.set_num_threads(1)
    keeps = keep_freed_memory()
    facts = hardware() | {"keeps_freed_memory": keeps}
    print(describe_hardware(facts))
    timings = measure(options.batch_size, options.rounds)
    bars = bars_of(timings)
    print(table_of(timings, bars, options.batch_size))
    if options.json is not None:
        variants = {name: list(timing.milliseconds) for name, timing in timings.items()}
        record = {"hardware": facts, "batch_size": options.batch_size, "milliseconds": variants, "bars": bars}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
