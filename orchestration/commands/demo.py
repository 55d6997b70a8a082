"""`rayndom demo`: the main job on real data, in minutes."""

from __future__ import annotations

import argparse

from orchestration import console
from orchestration.commands.command import Command, workplace_of

SWEEP = "ctrw_bounds_digits"


def _add(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def _run(arguments: argparse.Namespace) -> int:
    console.say(
        "Rayndom demo: search CTRW's bounds A and B on the sum of sigma, on 1,797 real handwritten digits;\n"
        "then attack the winner, adversarial training and natural training under three protocols.\n"
    )
    from orchestration.sweeping.loading import load_sweep
    from orchestration.sweeping.sweep import run_sweep

    summary = run_sweep(load_sweep(SWEEP), workplace_of(arguments))
    console.result(summary)
    flag = f" --home {arguments.home}" if arguments.home else ""
    console.say("\nnext:")
    console.say(f"  rayndom ui{flag}                                    see every run in MLflow")
    console.say(f"  rayndom evaluate {summary['export']} --suite standard{flag}    evaluate harder")
    console.say(f"  rayndom sweep {SWEEP} --num_trials 40{flag}     a bigger sweep; the trials done count")
    return 0


DEMO = Command(
    "demo",
    "a sweep, an honest evaluation and an export on real data, in minutes",
    ("rayndom demo", "rayndom demo --home /tmp/somewhere"),
    _add,
    _run,
)
