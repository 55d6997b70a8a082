"""`rayndom data`: which data sets are at hand, and `rayndom data get NAME`, which fetches one."""

from __future__ import annotations

import argparse
import time

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command, add_data_root

SHOWN_EVERY_S = 2.0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "get"), default="list", help="list (default) or get")
    parser.add_argument("name", nargs="?", help="data set to get")
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> None:
    from trainers.data.location import data_root

    root = data_root(arguments.data_root)
    if arguments.action == "list":
        if arguments.name is not None:
            raise UserError(f"unexpected {arguments.name!r:.100}; `rayndom data get NAME` fetches a data set")
        _list(arguments.json, arguments.data_root)
        return
    if arguments.name is None:
        raise UserError("name the data set: rayndom data get NAME; `rayndom data` lists what can be fetched")
    from orchestration.single_process import ADVICE, ENDING_S, only_process
    from trainers.data.download import PUBLISHED, address_of, download
    from trainers.data.sets import DATASETS

    name = arguments.name
    if name in DATASETS and name not in PUBLISHED:
        how = DATASETS[name].how_to_obtain.format(root=root)
        raise UserError(f"{name} cannot be fetched by its name. {how}" if how else f"{name} needs no download")
    for file in PUBLISHED.get(name, ()):
        console.say(f"{name}: {address_of(file)}")
    with only_process(root / ".download.lock", f"the download to {root}", advice=ADVICE, patience_s=ENDING_S):
        found = download(name, root, _Lines())
    console.result({"name": name, "files": [str(path) for path in found]})
    console.say(f"{name} is in {', '.join(str(path) for path in found)}")


class _Lines:
    """A line every few seconds, with how far a file is."""

    def __init__(self) -> None:
        self.last, self.file = time.monotonic(), ""

    def __call__(self, file: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < SHOWN_EVERY_S and done != total:
            return
        self.last = now
        share = "" if not total else f" of {total / 1e6:.1f} MB, {100 * done / total:.0f} %"
        console.say(f"{file}: {done / 1e6:.1f} MB{share}" if share else f"{file}: {done / 1e6:.1f} MB")


def _list(as_json: bool, root: str | None) -> None:
    from trainers.data.download import PUBLISHED
    from trainers.data.location import data_root, locate
    from trainers.data.sets import DATASETS

    found = []
    for name, info in DATASETS.items():
        if info.needs_folder:
            continue
        try:
            place = "inside scikit-learn" if name == "digits" else "of a plug-in" if info.read else str(locate(info, data_root(root)))
        except UserError:
            place = ""
        found.append({"name": name, "place": place or None, "can_be_fetched": name in PUBLISHED, "description": info.description})
    console.result(found)
    if as_json:
        return
    rows = [
        (row["name"], row["place"] or ("rayndom data get " + str(row["name"]) if row["can_be_fetched"] else "not here"), row["description"])
        for row in found
    ]
    console.table(None, ["data set", "where", "what it is"], rows)
    console.say(f"data root {data_root(root)} (--data-root, else RAYNDOM_DATA, else ./data)")


DATA = Command(
    "data",
    "list the data sets that are at hand, or fetch one",
    ("rayndom data", "rayndom data get cifar10", "rayndom data get svhn --data-root /datasets"),
    _add,
    _run,
)
