"""PGD-10 adversarial training steps: Rayndom's loop against the published loop and against torchattacks, in one run.

    python -m benchmarks.attack_step [--json FILE]

Each measurement is a whole step: random start, ten attack steps of 2/255 within 8/255, one SGD step on the result. All
variants train the same network on the same batch with batch statistics in attack and training, so they do the same work:

* plain: the loop of most published code. `loss.backward()` at each attack step, so weight gradients are computed, added
  up and thrown away; new tensors at each step; contiguous float32.
* torchattacks: its PGD (input gradient only) inside the same training step.
* rayndom fp32: `trainers.attacks.pgd`, channels last.
* rayndom bf16: the same under autocast to bf16. It is the default where `choose_precision("auto")` says so.

Exit code 1 if a bar that applies to this hardware is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Bar, Timing, describe_hardware, hardware, interleaved
from models import build_model
from models.modes import mode
from trainers.attacks import pgd
from trainers.hardware import FULL, Precision, channels_last, choose_precision, to_channels_last_

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
PLAIN, TORCHATTACKS, FP32, BF16 = "plain", "torchattacks", "rayndom fp32", "rayndom bf16"

FLOAT32_BARS = {
    "resnet8": (Bar(FP32, TORCHATTACKS, 0.98),),
    "resnet18": (Bar(FP32, PLAIN, 1.4), Bar(FP32, TORCHATTACKS, 0.98)),
}
AMX_BARS = {"resnet8": (Bar(BF16, PLAIN, 2.8), Bar(BF16, TORCHATTACKS, 2.1)), "resnet18": ()}


def plain_step(backbone: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return the published loop."""
    model, optimizer = _model_and_optimizer(backbone)

    def step() -> None:
        x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-EPSILON, EPSILON), 0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            functional.cross_entropy(model(x_adv), y).backward()
            moved = x_adv.detach() + STEP_SIZE * x_adv.grad.sign()
            moved = torch.min(torch.max(moved, x - EPSILON), x + EPSILON)
            x_adv = torch.clamp(moved, 0, 1)
        _train(model, optimizer, x_adv, y, FULL)

    return step


def torchattacks_step(backbone: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return torchattacks' PGD followed by the training step."""
    model, optimizer = _model_and_optimizer(backbone)
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS)
    # As the others; by default it would put the model into eval mode.
    attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)

    def step() -> None:
        _train(model, optimizer, attack(x, y), y, FULL)

    return step


def rayndom_step(backbone: str, x: Tensor, y: Tensor, precision: Precision) -> Callable[[], None]:
    """Return Rayndom's attack followed by the training step."""
    model, optimizer = _model_and_optimizer(backbone)
    to_channels_last_(model)
    x = channels_last(x)
    generator = torch.Generator().manual_seed(0)
    attack = {"epsilon": EPSILON, "step_size": STEP_SIZE, "steps": STEPS, "precision": precision}

    def step() -> None:
        with mode(model, "train_without_update"):
            x_adv = pgd(model, x, y, generator=generator, **attack)
        _train(model, optimizer, x_adv, y, precision)

    return step


def _model_and_optimizer(backbone: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model("at", backbone=backbone, num_classes=10, image_shape=(3, 32, 32)).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x_adv: Tensor, y: Tensor, precision: Precision) -> None:
    optimizer.zero_grad()
    with precision.autocast():
        logits_BK = model(x_adv)
    functional.cross_entropy(logits_BK.float(), y).backward()
    optimizer.step()


def measure(backbone: str, batch_size: int, rounds: int) -> dict[str, Timing]:
    """Return the timings of all variants by name."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch_size,), generator=generator)
    steps = {
        PLAIN: plain_step(backbone, x, y),
        TORCHATTACKS: torchattacks_step(backbone, x, y),
        FP32: rayndom_step(backbone, x, y, FULL),
        BF16: rayndom_step(backbone, x, y, Precision("bf16", "cpu")),
    }
    return interleaved(steps, rounds)


def applicable_bars(backbone: str, amx: bool) -> tuple[Bar, ...]:
    """Return the bars for a backbone on this kind of hardware."""
    return FLOAT32_BARS[backbone] + (AMX_BARS[backbone] if amx else ())


def record_of(backbone: str, batch_size: int, timings: Mapping[str, Timing], bars: tuple[Bar, ...]) -> dict[str, Any]:
    """Return the result for one backbone as data."""
    return {
        "backbone": backbone,
        "batch_size": batch_size,
        "variants": [
            {
                "name": name,
                "median_ms": timing.median,
                "min_ms": timing.minimum,
                "max_ms": timing.maximum,
                "milliseconds": list(timing.milliseconds),
                "over_plain": timings[PLAIN].median / timing.median,
                "over_torchattacks": timings[TORCHATTACKS].median / timing.median,
            }
            for name, timing in timings.items()
        ],
        "bars": [
            {
                "variant": bar.variant,
                "reference": bar.reference,
                "at_least": bar.at_least,
                "measured": bar.ratio(timings),
                "met": bar.is_met(timings),
            }
            for bar in bars
        ],
    }


def table_of(record: Mapping[str, Any]) -> str:
    """Return a record as text."""
    rounds = len(record["variants"][0]["milliseconds"])
    lines = [
        f"{record['backbone']}, 3x32x32, batch {record['batch_size']}, PGD-{STEPS} and one SGD step, {rounds} rounds, CPU ms",
        f"{'':14s}{'median':>9s}{'min':>9s}{'max':>9s}{'over plain':>12s}{'over torchattacks':>19s}",
    ]
    for row in record["variants"]:
        lines.append(
            f"{row['name']:14s}{row['median_ms']:9.1f}{row['min_ms']:9.1f}{row['max_ms']:9.1f}"
            f"{row['over_plain']:11.2f}x{row['over_torchattacks']:18.2f}x"
        )
    for bar in record["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(
            f"bar {verdict}: {bar['variant']} is {bar['measured']:.2f}x as fast as {bar['reference']}, "
            f"at least {bar['at_least']}x is required"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="PGD-10 training step: Rayndom, the published loop, torchattacks.")
    parser.add_argument("--backbones", nargs="+", choices=sorted(FLOAT32_BARS), default=["resnet8", "resnet18"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds for ResNet-8 (at least 5)")
    parser.add_argument("--large-rounds", type=int, default=5, help="rounds for ResNet-18 (at least 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, ResNet-8")
    parser.add_argument("--large-batch-size", type=int, default=8, help="images per step, ResNet-18")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    if options.rounds < 5 or options.large_rounds < 3:
        parser.error("fewer than 5 rounds (ResNet-18: 3) say nothing")

    torch.set_num_threads(1)
    facts = hardware()
    default = choose_precision("auto", torch.device("cpu")).name
    sizes = {
        "resnet8": (options.batch_size, options.rounds),
        "resnet18": (options.large_batch_size, options.large_rounds),
    }
    print(describe_hardware(facts))
    print(f"precision 'auto' is {default} here")
    records = []
    for backbone in options.backbones:
        batch_size, rounds = sizes[backbone]
        timings = measure(backbone, batch_size, rounds)
        records.append(record_of(backbone, batch_size, timings, applicable_bars(backbone, facts["amx_bf16"])))
        print(f"\n{table_of(records[-1])}", flush=True)
    if not facts["amx_bf16"]:
        print("\nThe bars for bf16 need AMX-bf16 and do not apply here; its rows are for information.")
    if options.json is not None:
        record = {"hardware": facts, "precision_auto": default, "epsilon": EPSILON, "steps": STEPS, "results": records}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    missed = [bar for record in records for bar in record["bars"] if not bar["met"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
