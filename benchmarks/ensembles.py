"""Cost of ensembles: RED's training step against N adversarial trainings, N members against N networks, memory against N.

    python -m benchmarks.ensembles [--json FILE]

Time is CPU time of one thread, variants taking turns; memory is the peak of live tensors beyond what is alive before the step (weights,
optimizer, images), taken from the allocator's own record. ResNet-8, 3x32x32, float32.

* AT x N: N steps of PGD-10 adversarial training of single networks: the reference.
* RED: one step of the default objective, input gradients on clean and on adversarial images; `cached` (member by member) and `joint` (one
  backward pass), examples against a random member per step (default) or against the mean loss of all members.
* members: forward, backward and optimizer step of N members in one ensemble, against the same for N networks of their own.

Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Bar, Timing, describe_hardware, hardware, interleaved
from models import build_model
from models.threat_model import ThreatModel
from trainers.hardware import FULL, channels_last, to_channels_last_
from trainers.objective import Objective, objective_entry
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

AT, RED, RED_JOINT, RED_MEAN_LOSS = "AT x N", "RED cached", "RED joint", "RED cached, mean loss"
MEMBERS, NETWORKS = "N members", "N networks"

# RED's cost model: at most 1.35 times N adversarial trainings. A bar says how many times faster the variant is.
STEP_BARS = (Bar(RED, AT, 1 / 1.35), Bar(RED_JOINT, AT, 1 / 1.35))
PLAIN_BARS = (Bar(MEMBERS, NETWORKS, 1 / 1.05),)
LARGEST_MEMORY_GROWTH = 1.10
MEMORY_MEMBERS = (2, 4, 8)


def new_model(num_members: int) -> nn.Module:
    """Return an ensemble of ResNet-8 in training mode."""
    model = build_model("red", backbone="resnet8", image_shape=(3, 32, 32), num_members=num_members).train()
    to_channels_last_(model)
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(1)
    x_BCHW = channels_last(torch.rand(size, 3, 32, 32, generator=generator))
    return x_BCHW, torch.randint(0, 10, (size,), generator=generator)


def new_context(steps: int) -> StepContext:
    """Return the context of a run with PGD of `steps` steps."""
    return StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(steps=steps),
        redraw="attack_then_step",
        streams=Streams(0),
        precision=FULL,
        num_epochs=1,
        steps_per_epoch=1,
    )


def new_objective(name: str, **parameters: Any) -> Objective:
    """Return an objective."""
    entry = objective_entry(name)
    return entry.create(entry.config(name=name, **parameters))


def training_step(model: nn.Module, objective: Objective, batch_size: int, attack_steps: int = 10) -> Callable[[], None]:
    """Return a whole training step of one objective."""
    x_BCHW, y_B = batch(batch_size)
    context = new_context(attack_steps)
    context.streams.begin_epoch(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        objective.training_step(model, x_BCHW, y_B, context)
        optimizer.step()

    return step


def separate_steps(num_members: int, objective: Objective, batch_size: int, attack_steps: int) -> Callable[[], None]:
    """Return the steps of N networks that know nothing of one another."""
    steps = [training_step(copy.deepcopy(member), objective, batch_size, attack_steps) for member in new_model(num_members).members]

    def all_steps() -> None:
        for step in steps:
            step()

    return all_steps


def measure_steps(num_members: int, batch_size: int, rounds: int) -> dict[str, Timing]:
    """Return the timings of RED's step and of N adversarial trainings."""
    red = {
        RED: new_objective("red"),
        RED_JOINT: new_objective("red", computation="joint"),
        RED_MEAN_LOSS: new_objective("red", example="mean_loss"),
    }
    variants = {AT: separate_steps(num_members, new_objective("adversarial"), batch_size, 10)}
    variants |= {name: training_step(new_model(num_members), objective, batch_size) for name, objective in red.items()}
    return interleaved(variants, rounds)


def measure_plain(num_members: int, batch_size: int, rounds: int) -> dict[str, Timing]:
    """Return the timings of a natural training step of N members and of N networks."""
    return interleaved(
        {
            MEMBERS: training_step(new_model(num_members), new_objective("ensemble_adversarial"), batch_size, 0),
            NETWORKS: separate_steps(num_members, new_objective("natural"), batch_size, 0),
        },
        rounds,
    )


def peak_memory(function: Callable[[], object]) -> int:
    """Return the largest number of bytes in tensors during a call, beyond those alive before it. CPU only."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    live = peak = 0
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure_memory(batch_size: int) -> dict[str, dict[int, int]]:
    """Return the peak memory of the regularized step by computation and number of members.

    The gradients of the weights exist before the step, as they do from the second step on; weights and optimizer are not part of it.
    """
    x_BCHW, y_B = batch(batch_size)
    peaks: dict[str, dict[int, int]] = {}
    for computation in ("cached", "joint"):
        peaks[computation] = {}
        for num_members in MEMORY_MEMBERS:
            model, context = new_model(num_members), new_context(1)
            objective = new_objective("red", computation=computation)

            def step(model: nn.Module = model, objective: Objective = objective, context: StepContext = context) -> None:
                objective.training_step(model, x_BCHW, y_B, context)

            step()
            peaks[computation][num_members] = peak_memory(step)
    return peaks


def timing_table(title: str, reference: str, timings: dict[str, Timing], bars: tuple[Bar, ...]) -> str:
    """Return timings as text."""
    lines = [title, f"{'':24s}{'median':>9s}{'min':>9s}{'max':>9s}{f'of {reference}':>16s}"]
    for name, timing in timings.items():
        share = timing.median / timings[reference].median
        lines.append(f"{name:24s}{timing.median:9.1f}{timing.minimum:9.1f}{timing.maximum:9.1f}{share:15.2f}x")
    for bar in bars:
        verdict = "met" if bar.is_met(timings) else "MISSED"
        lines.append(
            f"bar {verdict}: {bar.variant} takes {1 / bar.ratio(timings):.2f} of {bar.reference}, at most {1 / bar.at_least:.2f} is allowed"
        )
    return "\n".join(lines)


def memory_table(peaks: dict[str, dict[int, int]], batch_size: int) -> str:
    """Return peak memories as text."""
    lines = [
        f"peak memory of the regularized step, batch {batch_size}, MiB",
        f"{'':24s}" + "".join(f"{f'N = {count}':>9s}" for count in MEMORY_MEMBERS) + f"{'growth':>10s}",
    ]
    for computation, by_count in peaks.items():
        figures = "".join(f"{by_count[count] / 2**20:9.1f}" for count in MEMORY_MEMBERS)
        lines.append(f"{f'RED {computation}':24s}{figures}{memory_growth(by_count):9.2f}x")
    verdict = "met" if memory_growth(peaks["cached"]) <= LARGEST_MEMORY_GROWTH else "MISSED"
    lines.append(
        f"bar {verdict}: from N = {MEMORY_MEMBERS[0]} to {MEMORY_MEMBERS[-1]} the cached step's memory grows by "
        f"{memory_growth(peaks['cached']):.2f}, at most {LARGEST_MEMORY_GROWTH:.2f} is allowed"
    )
    return "\n".join(lines)


def memory_growth(by_count: dict[int, int]) -> float:
    """Return the ratio of the largest to the smallest number of members."""
    return by_count[MEMORY_MEMBERS[-1]] / by_count[MEMORY_MEMBERS[0]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Cost of RED's training step and of ensembles.")
    parser.add_argument("--members", nargs="+", type=int, default=[4, 8], help="numbers of members for the timings")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--memory-batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        parser.error("fewer than 3 rounds say nothing")

    torch.set_num_threads(1)
    facts = hardware()
    print(describe_hardware(facts))
    met: list[bool] = []
    record: dict[str, Any] = {"hardware": facts, "batch_size": options.batch_size, "steps": {}, "plain": {}}
    for count in options.members:
        parts = (
            ("steps", f"PGD-10 training step, N = {count}", AT, STEP_BARS, measure_steps),
            ("plain", f"natural training step, N = {count}", NETWORKS, PLAIN_BARS, measure_plain),
        )
        for kind, title, reference, bars, measure in parts:
            timings = measure(count, options.batch_size, options.rounds * (1 if kind == "steps" else 3))
            print("\n" + timing_table(f"{title}, batch {options.batch_size}, CPU ms", reference, timings, bars), flush=True)
            met += [bar.is_met(timings) for bar in bars]
            record[kind][count] = {name: list(timing.milliseconds) for name, timing in timings.items()}
    peaks = measure_memory(options.memory_batch_size)
    print("\n" + memory_table(peaks, options.memory_batch_size))
    met.append(memory_growth(peaks["cached"]) <= LARGEST_MEMORY_GROWTH)
    record["memory"] = {"batch_size": options.memory_batch_size, "peak_bytes": peaks}
    record["met"] = all(met)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
