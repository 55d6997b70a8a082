"""`rayndom status` and `rayndom watch`: what sweeps are doing, from another terminal."""

from __future__ import annotations

import argparse
import dataclasses
import time

from orchestration import console
from orchestration.commands.command import Command, add_study, number, use_study


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", help="name or key of a sweep that was started in this home folder (default: all of them)")
    add_study(parser)
    parser.add_argument("--all", action="store_true", help="all trials of the sweep, not only those that say most")


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", help="name or key of a sweep (default: the one that changed last)")
    add_study(parser)
    parser.add_argument("--interval", type=number(0, 86_400, above=True), default=5, help="seconds between two looks (default 5)")


def _status(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home, readable
    from orchestration.sweeping.status import find_sweep, list_sweep_keys, sweep_status

    use_study(arguments)
    home = Home.to_read(arguments.home)
    if arguments.sweep:
        found = [sweep_status(home, find_sweep(home, arguments.sweep))]
    else:
        found = list(readable(lambda key: sweep_status(home, key), list_sweep_keys(home)))
    console.result(
        [
            {
                "sweep": each.key,
                "done": each.done,
                "wanted": each.wanted,
                "best": each.best,
                "mlflow": each.link,
                "trials": [dataclasses.asdict(trial) for trial in each.trials],
            }
            for each in found
        ]
    )
    if not found:
        console.say(f"no sweep was started in {home.root}")
    if arguments.sweep:
        (whole,) = found
        shown = whole if arguments.all else whole.most_telling()
        count = "" if shown is whole else f": {len(shown.trials)} of {len(whole.trials)} trials (--all shows all)"
        console.table(whole.key + count, shown.columns, shown.rows)
        for warning in shown.warnings:
            console.warn(warning)
    for each in found:
        console.say(each.summary)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home
    from orchestration.sweeping.status import find_sweep, list_sweep_keys, sweep_status

    use_study(arguments)
    home = Home.to_read(arguments.home)
    keys = list_sweep_keys(home)
    key = find_sweep(home, arguments.sweep or (keys[-1] if keys else ""))
    status = sweep_status(home, key)
    said = ""
    with console.Board(key, status.columns) as board:
        while True:
            # Without a terminal a line when something changed, not one per look.
            event = "; ".join([status.summary, *(f"trial {each.number} {each.state} {each.epoch}" for each in status.trials[-4:])])
            board.show(status.most_telling().rows, status.summary, event if event != said or console.is_terminal() else None)
            said = event
            if status.done >= status.wanted:
                break
            time.sleep(arguments.interval)
            status = sweep_status(home, key)
    console.say(f"{key} has all its trials")
    return 0


STATUS = Command(
    "status",
    "show what the sweeps of the home folder are doing, once",
    ("rayndom status", "rayndom status ctrw_bounds_digits", "rayndom status --json"),
    _add,
    _status,
)
WATCH = Command(
    "watch",
    "follow a running sweep from another terminal: a live table of its trials, until it has all of them",
    ("rayndom watch", "rayndom watch ctrw_bounds_digits --interval 2"),
    _add_watch,
    _watch,
)
