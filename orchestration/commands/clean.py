"""`rayndom clean`: what a home holds that nothing needs any more; removed on request."""

from __future__ import annotations

import argparse

from orchestration import console
from orchestration.commands.command import Command, whole_number

KEPT = ("best", "last")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="remove it; without this flag it is only said what would go")
    parser.add_argument(
        "--keep",
        choices=KEPT,
        default="best",
        help="of finished runs: the selected weights alone (best, the default), or also the state after the last epoch (last)",
    )
    parser.add_argument(
        "--keep-every",
        type=whole_number(0, 100_000),
        metavar="N",
        help="of the weights that runs kept on the way (checkpoints.every) only those of every N-th epoch; 0: none (default: all of them)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.cleaning import clean, kept_on_the_way, removable
    from orchestration.home import Home

    home = Home.locate(arguments.home)
    found = removable(home, keep_last=arguments.keep == "last", keep_every=arguments.keep_every)
    rows = [(kind, len(each), _size(sum(item.size for item in each))) for kind, each in found.items()]
    total = sum(item.size for each in found.values() for item in each)
    removed = clean(found) if arguments.yes else 0
    on_the_way = kept_on_the_way(home)
    console.result(
        {
            "bytes": total,
            "removed_bytes": removed,
            "kept_on_the_way_bytes": on_the_way,
            "items": [{"what": kind, "paths": [str(item.path) for item in each]} for kind, each in found.items()],
        }
    )
    if on_the_way and arguments.keep_every is None:
        console.say(f"weights that runs kept on the way take {_size(on_the_way)} and stay; --keep-every says which of them shall")
    if not total:
        console.say(f"nothing in {home.root} can go")
        return 0
    console.table("removed" if arguments.yes else "what would go", ["what", "how many", "size"], rows)
    console.say(f"{_size(removed)} freed" if arguments.yes else f"{_size(total)} would be freed:  rayndom clean --yes")
    return 0


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


CLEAN = Command(
    "clean",
    "say what the home holds that nothing needs any more, and remove it with --yes",
    ("rayndom clean", "rayndom clean --yes", "rayndom clean --keep last --keep-every 10 --yes"),
    _add,
    _run,
)
