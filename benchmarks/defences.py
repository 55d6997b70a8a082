"""Cost of each defence: a PGD-10 adversarial training step relative to plain adversarial training, in one run.

    python -m benchmarks.defences [--backbones resnet8 resnet18] [--precision fp32] [--compiled] [--json FILE]

Each measurement is a whole step as the training loop does it: the attack's draw, ten attack steps, the training step's draw, one SGD
step and the constraints. With `--compiled`, the same steps as compiled code beside them (`training.compile: on`), and the seconds of the
first one; it has no bar. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Timing, describe_hardware, hardware, interleaved
from models import build_model
from models.constraints import apply_constraints
from models.layer_replacement import replace_named
from models.positions import convolutions
from models.threat_model import ThreatModel
from trainers.compilation import CompiledForward
from trainers.hardware import Precision, channels_last, to_channels_last_
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

STEPS = 10
AT, DENSE = "at", "at, dense 5x5"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    AT: ("at", {}),
    DENSE: ("at", {}),
    "ctrw": ("ctrw", {}),
    "rna bn+in": ("rna", {}),
    "rna, per example": ("rna", {"draw_scope": "per_example"}),
    "dcs k=3 n=4": ("dcs", {"kernel_size": 3, "num_taps": 4}),
    "dcs k=5 n=2": ("dcs", {"kernel_size": 5, "num_taps": 2}),
    "dcs k=5 n=4": ("dcs", {"kernel_size": 5, "num_taps": 4}),
    "dcs k=5 n=2, per example": ("dcs", {"kernel_size": 5, "num_taps": 2, "draw_scope": "per_example"}),
    "dcn": ("dcn", {}),
}

BARS = {  # variant: (reference, largest allowed ratio of times)
    "ctrw": (AT, 1.03),
    "rna bn+in": (AT, 1.40),
    "dcs k=3 n=4": (AT, 1.10),
    "dcs k=5 n=2": (DENSE, 1.00),
}


def paired_ratio(variant: Timing, reference: Timing) -> float:
    """Return the median over rounds of the ratio within a round: a machine that slows down for a while slows both."""
    return statistics.median(a / b for a, b in zip(variant.milliseconds, reference.milliseconds, strict=True))


def training_step(name: str, backbone: str, x: Tensor, y: Tensor, precision: Precision, *, compiled: bool = False) -> Callable[[], None]:
    """Return one adversarial training step of a variant."""
    defence, parameters = VARIANTS[name]
    model = build_model(defence, backbone=backbone, num_classes=10, image_shape=(3, 32, 32), **parameters)
    if name == DENSE:
        _widen_kernel(model)
    model.train()
    to_channels_last_(model)
    x = channels_last(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    context = StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(steps=STEPS),
        redraw="attack_then_step",
        streams=Streams(0),
        precision=precision,
        num_epochs=1,
        steps_per_epoch=1_000_000,
    )

    passes = CompiledForward(model) if compiled else contextlib.nullcontext

    def step() -> None:
        with passes():
            x_adv = context.adversarial_examples(model, x, y)
            optimizer.zero_grad()
            with precision.autocast():
                logits_BK = model(x_adv)
            functional.cross_entropy(logits_BK.float(), y).backward()
        optimizer.step()
        apply_constraints(model)
        context.step += 1

    return step


def _widen_kernel(model: nn.Module) -> None:
    """Give the convolution that DCS would replace a dense 5x5 kernel."""

    def dense(_name: str, conv: nn.Module) -> nn.Module:
        assert isinstance(conv, nn.Conv2d)
        return nn.Conv2d(conv.in_channels, conv.out_channels, 5, conv.stride, padding=2, bias=False)

    replace_named(model.backbone, convolutions(model.backbone, (2,)), dense)


def measure(backbone: str, names: list[str], batch_size: int, rounds: int, precision: Precision, *, compiled: bool) -> dict[str, Timing]:
    """Return the timings of the variants by name, and of each as compiled code if asked for."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch_size,), generator=generator)
    steps = {name: training_step(name, backbone, x, y, precision) for name in names}
    for name in names if compiled else ():
        steps[f"{name}, compiled"] = step = training_step(name, backbone, x, y, precision, compiled=True)
        began = time.perf_counter()
        step()
        print(f"{backbone}, {name}: the first compiled step took {time.perf_counter() - began:.0f} s", flush=True)
    return interleaved(steps, rounds)


def record_of(backbone: str, batch_size: int, precision: str, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Return the result for one backbone as data."""
    return {
        "backbone": backbone,
        "batch_size": batch_size,
        "precision": precision,
        "variants": [
            {
                "name": name,
                "median_ms": timing.median,
                "min_ms": timing.minimum,
                "over_at": paired_ratio(timing, timings[AT]),
                "over_at_of_minima": timing.minimum / timings[AT].minimum,
                "milliseconds": list(timing.milliseconds),
            }
            for name, timing in timings.items()
        ],
        "bars": [
            {"variant": variant, "reference": reference, "at_most": at_most, "measured": measured, "met": measured <= at_most}
            for variant, (reference, at_most) in BARS.items()
            if variant in timings and reference in timings
            for measured in [paired_ratio(timings[variant], timings[reference])]
        ],
    }


def table_of(record: Mapping[str, Any]) -> str:
    """Return a record as text."""
    rounds = len(record["variants"][0]["milliseconds"])
    lines = [
        f"{record['backbone']}, 3x32x32, batch {record['batch_size']}, {record['precision']}, PGD-{STEPS} step, {rounds} rounds, CPU ms",
        f"{'':26s}{'median':>9s}{'min':>9s}{'of at':>8s}{'of minima':>11s}",
    ]
    for row in record["variants"]:
        lines.append(f"{row['name']:26s}{row['median_ms']:9.1f}{row['min_ms']:9.1f}{row['over_at']:7.2f}x{row['over_at_of_minima']:10.2f}x")
    for bar in record["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(
            f"bar {verdict}: {bar['variant']} takes {bar['measured']:.3f}x of {bar['reference']}, at most {bar['at_most']:.2f}x is allowed"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Cost of each defence relative to plain adversarial training.")
    parser.add_argument("--backbones", nargs="+", choices=("resnet8", "resnet18"), default=["resnet8"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=11, help="measurements per variant (at least 5)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compiled", action="store_true", help="the same steps as compiled code beside them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error("fewer than 5 rounds say nothing")
    names = [name for name in VARIANTS if name == AT or name in options.variants]

    facts = hardware()
    print(describe_hardware(facts))
    records = []
    for backbone in options.backbones:
        precision = Precision(options.precision, "cpu")
        timings = measure(backbone, names, options.batch_size, options.rounds, precision, compiled=options.compiled)
        records.append(record_of(backbone, options.batch_size, options.precision, timings))
        print(table_of(records[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"hardware": facts, "records": records}, indent=2) + "\n")
    return 0 if all(bar["met"] for record in records for bar in record["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
