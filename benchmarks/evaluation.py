"""Attacking finished models: Rayndom's evaluation against torchattacks on the same work, in one run.

    python -m benchmarks.evaluation [--json FILE]

Two models of one backbone, in eval mode: a deterministic one of which about half the images survive (15 % are misclassified from the
start, the radius is searched so that half are left), and CTRW. Each measurement attacks one batch:

* torchattacks: its PGD-20 and APGD-20, and EOTPGD-20 with 4 draws per gradient on CTRW redrawn at each forward.
* rayndom, every image to the end: the same number of passes, batch normalization folded; folding and its check are inside the time.
* rayndom, as it evaluates: images that err are left alone, which only a deterministic model allows.
* rayndom, bf16 proxy: PGD-20 in bf16, every image to the end, folded as well. No reported number is ever made this way. It is for
  networks like those of the papers: its bar is on ResNet-18, 5 steps at a fixed radius, where convolutions are nearly all of the work.

torchattacks' APGD leaves out what is misclassified from the start, so against it "to the end" is more work and has no bar.

Exit code 1 if a bar is missed: never slower than torchattacks on the same work, 1.5 times as fast on the half-robust model, and, on a
CPU with AMX, the bf16 proxy 3.5 times as fast as torchattacks on the same work.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws
from analysis.attacked_model.folding import folded_for_evaluation
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.registry import AttackProblem, attack_entry, parse_attack_parameters
from benchmarks.timing import Bar, Timing, describe_hardware, hardware, interleaved
from models import build_model
from models.randomness import ResampleOnForward
from models.threat_model import ThreatModel
from trainers.attacks import pgd
from trainers.hardware import channels_last, to_channels_last_

STEPS, DRAWS = 20, 4
DEEP, DEEP_STEPS, DEEP_EPSILON = "resnet18", 5, 2 / 255
NEVER_SLOWER = 0.98  # up to the noise of a shared machine
WRONG_SHARE, SURVIVING_SHARE = 0.15, 0.5
LIBRARY_PGD, LIBRARY_APGD, LIBRARY_EOT = "torchattacks PGD", "torchattacks APGD", "torchattacks EOTPGD"
FULL_PGD, EXIT_PGD, PROXY = "rayndom PGD, to the end", "rayndom PGD", "rayndom PGD, bf16 proxy"
FULL_APGD, EXIT_APGD, EOT = "rayndom APGD, to the end", "rayndom APGD", "rayndom EOT-PGD"

BARS = (
    Bar(FULL_PGD, LIBRARY_PGD, NEVER_SLOWER),
    Bar(EXIT_PGD, LIBRARY_PGD, 1.5),
    Bar(EXIT_APGD, LIBRARY_APGD, 1.5),
    Bar(EOT, LIBRARY_EOT, NEVER_SLOWER),
)
PROXY_BAR = Bar(PROXY, LIBRARY_PGD, 3.5)


def bars(backbone: str, amx: bool) -> tuple[Bar, ...]:
    """Return the bars of a backbone on this machine: bf16 is fast only where the CPU has matrix units for it."""
    if backbone != DEEP:
        return BARS
    return (BARS[0], PROXY_BAR) if amx else BARS[:1]


@dataclass(frozen=True)
class Case:
    """A model, its images and labels, and the radius at which half of them survive."""

    model: nn.Module
    x: Tensor
    y: Tensor
    epsilon: float


def half_robust(backbone: str, batch_size: int) -> Case:
    """Return a deterministic case with the shares of misclassified and of surviving images stated above."""
    model = _in_use(build_model("at", backbone=backbone, num_classes=10, image_shape=(3, 32, 32)))
    x = torch.rand(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[: round(WRONG_SHARE * batch_size)] += 1
    y %= 10
    low, high = 0.0, 64 / 255
    for _ in range(12):
        epsilon = (low + high) / 2
        low, high = (epsilon, high) if _surviving(model, x, y, epsilon) > SURVIVING_SHARE else (low, epsilon)
    return Case(model, x, y, high)


def at_fixed_radius(backbone: str, batch_size: int) -> Case:
    """Return a deterministic case whose images are all attacked to the end, so that it does not matter how many survive."""
    model = _in_use(build_model("at", backbone=backbone, num_classes=10, image_shape=(3, 32, 32)))
    x = torch.rand(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Case(model, x, model(x).argmax(1), DEEP_EPSILON)


def randomized(backbone: str, batch_size: int) -> Case:
    """Return a CTRW case; every image is attacked to the end whatever happens, so the radius does not matter."""
    model = _in_use(build_model("ctrw", backbone=backbone, num_classes=10, image_shape=(3, 32, 32)))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    return Case(model, x, torch.randint(0, 10, (batch_size,), generator=generator), 8 / 255)


def _in_use(model: nn.Module) -> nn.Module:
    """Give batch normalizations statistics as of a trained model, so that folding has something to fold."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return to_channels_last_(model.eval().requires_grad_(False))


def _surviving(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> float:
    x_adv = pgd(model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=STEPS)
    return _accuracy(model, x_adv, y)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


class InHalfPrecision(nn.Module):
    """A copy of a network with bf16 weights, from float32 pixels to float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.bfloat16()).float()


Attack = Callable[[], Tensor]


def rayndom(case: Case, name: str, parameters: dict[str, Any], *, stops: bool = False, draws: int = 0) -> Attack:
    """Return Rayndom's attack on a case, as a block of an evaluation runs it."""
    entry, parsed = attack_entry(name), parse_attack_parameters(name, parameters)

    def attack() -> Tensor:
        folded, _ = folded_for_evaluation(case.model, case.x[:2])
        source = FreshDraws(draws, "benchmark") if draws else FixedDraws((ONLY_DRAW,))
        model = AttackedModel(Predictor(folded), source, stops_at_success=stops)
        return entry.run(model, AttackProblem(channels_last(case.x), case.y, ThreatModel(epsilon=case.epsilon), 10, 0), parsed).x

    return attack


def library(case: Case, attack: torchattacks.attack.Attack) -> Attack:
    """Return torchattacks' attack on a case."""
    return lambda: attack(case.x, case.y).detach()


def to_the_end(case: Case, steps: int) -> dict[str, tuple[Case, Attack]]:
    """Return PGD on a deterministic model by the library, by Rayndom and by Rayndom in bf16, every image to the end, by name."""
    epsilon, model = case.epsilon, case.model

    def proxy() -> Tensor:
        folded, _ = folded_for_evaluation(model, case.x[:2])
        halved = InHalfPrecision(folded)
        return pgd(halved, channels_last(case.x), case.y, epsilon=epsilon, step_size=epsilon / 4, steps=steps)

    return {
        LIBRARY_PGD: (case, library(case, torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=steps))),
        FULL_PGD: (case, rayndom(case, "pgd", {"steps": steps})),
        PROXY: (case, proxy),
    }


def attacks(deterministic: Case, random: Case) -> dict[str, tuple[Case, Attack]]:
    """Return all variants by name."""
    epsilon, model = deterministic.epsilon, deterministic.model
    redrawn = ResampleOnForward(random.model, seed=0).eval()  # else torchattacks leaves its model in train mode
    whole, until_success = {"steps": STEPS}, {"steps": STEPS, "stop_at_success": True}
    return {
        **to_the_end(deterministic, STEPS),
        EXIT_PGD: (deterministic, rayndom(deterministic, "pgd", until_success, stops=True)),
        LIBRARY_APGD: (deterministic, library(deterministic, torchattacks.APGD(model, eps=epsilon, steps=STEPS))),
        FULL_APGD: (deterministic, rayndom(deterministic, "apgd_ce", whole)),
        EXIT_APGD: (deterministic, rayndom(deterministic, "apgd_ce", whole, stops=True)),
        LIBRARY_EOT: (
            random,
            library(random, torchattacks.EOTPGD(redrawn, eps=8 / 255, alpha=2 / 255, steps=STEPS, eot_iter=DRAWS)),
        ),
        EOT: (random, rayndom(random, "pgd", whole, draws=DRAWS)),
    }


def record_of(
    backbone: str, batch_size: int, timings: dict[str, Timing], accuracies: dict[str, float], epsilon: float, amx: bool
) -> dict[str, Any]:
    """Return the result for one backbone as data."""
    return {
        "backbone": backbone,
        "batch_size": batch_size,
        "steps": DEEP_STEPS if backbone == DEEP else STEPS,
        "epsilon": epsilon,
        "variants": [
            {
                "name": name,
                "median_ms": timing.median,
                "min_ms": timing.minimum,
                "max_ms": timing.maximum,
                "milliseconds": list(timing.milliseconds),
                "accuracy": accuracies[name],
                "reported": name != PROXY,
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
            for bar in bars(backbone, amx)
        ],
    }


def table_of(record: dict[str, Any]) -> str:
    """Return a record as text."""
    rounds = len(record["variants"][0]["milliseconds"])
    lines = [
        f"{record['backbone']}, 3x32x32, batch {record['batch_size']}, {record['steps']} steps, {rounds} rounds, CPU ms; "
        f"deterministic model at radius {255 * record['epsilon']:.2f}/255",
        f"{'':26s}{'median':>9s}{'min':>9s}{'max':>9s}{'accuracy %':>12s}",
    ]
    for row in record["variants"]:
        note = "" if row["reported"] else "  never a reported number"
        lines.append(f"{row['name']:26s}{row['median_ms']:9.1f}{row['min_ms']:9.1f}{row['max_ms']:9.1f}{100 * row['accuracy']:12.1f}{note}")
    for bar in record["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        required = f"at least {bar['at_least']}x is required"
        lines.append(f"bar {verdict}: {bar['variant']} is {bar['measured']:.2f}x as fast as {bar['reference']}, {required}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Evaluation attacks: Rayndom and torchattacks.")
    parser.add_argument("--backbones", nargs="+", choices=("resnet8", DEEP), default=["resnet8", DEEP])
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--batch-size", type=int, default=64, help="images per attack; half of them for draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error("fewer than 5 rounds say nothing")

    torch.set_num_threads(1)
    facts = hardware()
    print(describe_hardware(facts))
    records = []
    for backbone in options.backbones:
        if backbone == DEEP:
            deterministic = at_fixed_radius(backbone, options.batch_size)
            variants = to_the_end(deterministic, DEEP_STEPS)
        else:
            deterministic = half_robust(backbone, options.batch_size)
            variants = attacks(deterministic, randomized(backbone, max(options.batch_size // 2, 4)))
        accuracies = {name: _accuracy(case.model, attack(), case.y) for name, (case, attack) in variants.items()}
        timings = interleaved({name: attack for name, (_, attack) in variants.items()}, options.rounds)
        records.append(record_of(backbone, options.batch_size, timings, accuracies, deterministic.epsilon, facts["amx_bf16"]))
        print(f"\n{table_of(records[-1])}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"hardware": facts, "draws": DRAWS, "results": records}, indent=2) + "\n")
    missed = [bar for record in records for bar in record["bars"] if not bar["met"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
