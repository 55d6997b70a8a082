"""What the ingredients of a training cost: averaged weights, accumulation, single-step attacks. Ratios of CPU time in one run.

    python -m benchmarks.ingredients [--json FILE] [--rounds 12]

Each measurement is a training step of the loop of `trainers.fit` on the same images (CIFAR's shape, ResNet-8 and ResNet-18), variants
taking turns; what the average's batch statistics cost, once per validation, counts as a share of an epoch of 45,000 images.

Bars: EMA at most 2 % of an epoch, its statistics included; a single-step training (N-FGSM) at most 0.25 of PGD-10. Exit code 1 if one is
missed. Gradients in four parts of eight images have no bar: what they cost is what small batches cost on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Timing, describe_hardware, hardware, interleaved, paired_ratio
from models import build_model
from models.threat_model import ThreatModel
from trainers.averaging import AveragingConfig, recompute_batch_statistics
from trainers.config import TrainingConfig
from trainers.data import ArraySplit, Augmentation, Splits
from trainers.fit import TrainingLoop
from trainers.reporting import SilentReporter
from trainers.step import InnerAttackConfig

BATCH = 32
EPOCH_IMAGES = 45_000
PLAIN, EMA, PARTS, SINGLE, STATISTICS = "PGD-10", "PGD-10, EMA", "PGD-10 in 4 parts", "N-FGSM", "statistics"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    EMA: {"averaging": AveragingConfig(name="ema")},
    PARTS: {"accumulation": 4},
    SINGLE: {"attack": InnerAttackConfig(name="n_fgsm")},
}
BARS = {EMA: 1.02, SINGLE: 0.25}
"""Largest ratio over PGD-10; that of EMA with its statistics."""


def splits() -> Splits:
    """Return random images of CIFAR's shape, a batch for each split."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(BATCH) % 10
    names = tuple(map(str, range(10)))
    split = ArraySplit(images, labels, torch.arange(BATCH), names, (0.5,) * 3, (0.25,) * 3)
    return Splits(split, split, split)


def loop_of(backbone: str, **changes: Any) -> TrainingLoop:
    """Return a training of PGD-10 on them, with some settings changed."""
    settings: dict[str, Any] = {"epochs": 1, "batch_size": BATCH, "precision": "fp32", "attack": InnerAttackConfig(steps=10)}
    return TrainingLoop(
        build_model("at", backbone=backbone, num_classes=10, image_shape=(3, 32, 32)),
        splits(),
        ThreatModel(epsilon=8 / 255),
        TrainingConfig(**settings | changes),
        seed=0,
        device=torch.device("cpu"),
        augmentation=Augmentation(),
        reporter=SilentReporter(),
    )


def measured_steps(backbone: str) -> dict[str, Callable[[], object]]:
    """Return a step of each variant, and one batch of the statistics."""

    def step_of(loop: TrainingLoop) -> Callable[[], object]:
        ((x_BCHW, y_B),) = loop.batches(0)
        return lambda: loop.train_step(0, x_BCHW, y_B)

    loops = {name: loop_of(backbone, **changes) for name, changes in VARIANTS.items()}
    ((x_BCHW, _),) = loops[PLAIN].batches(0)
    model = loop_of(backbone).model
    return {name: step_of(loop) for name, loop in loops.items()} | {STATISTICS: lambda: recompute_batch_statistics(model, [x_BCHW], 0)}


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Return what each variant takes over PGD-10: an epoch, with the statistics that an average asks for."""
    found = {name: paired_ratio(timings[name], timings[PLAIN]) for name in (EMA, PARTS, SINGLE)}
    batches = AveragingConfig().statistics_images / BATCH
    found[EMA] += paired_ratio(timings[STATISTICS], timings[PLAIN]) * batches / (EPOCH_IMAGES / BATCH)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, return the exit code."""
    parser = argparse.ArgumentParser(description="What the ingredients of a training cost.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--backbones", nargs="+", default=["resnet8", "resnet18"])
    options = parser.parse_args(arguments)
    facts = hardware()
    write = sys.stdout.write
    write(f"{describe_hardware(facts)}\n")
    missed, record = False, {}
    for backbone in options.backbones:
        found = ratios(interleaved(measured_steps(backbone), options.rounds))
        record[backbone] = found
        for name, value in found.items():
            late = value > BARS.get(name, value)
            missed |= late
            bar = f" (at most {BARS[name]:.2f})" if name in BARS else ""
            write(f"{backbone}: {name} over {PLAIN}: {value:.3f}{bar}{'  MISSED' if late else ''}\n")
    if options.json:
        options.json.write_text(json.dumps({"hardware": facts, "ratios": record}, indent=2))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
