"""How a user names blocks of an evaluation: by the title that the progress line shows, by attack and protocol, or by the attack."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.evaluate import BlockTask
from analysis.evaluation.records import Record, comparable
from models.errors import unknown_name


def names_of(task: BlockTask) -> list[str]:
    """Return the names of a block, the most exact first, e.g. `pgd_20 T1 block 2/4`, `pgd_20 T1 2`, `pgd_20 T1`, `pgd_20`."""
    row = task.title.rpartition(" block ")[0]
    attack = row.rpartition(" ")[0].rstrip(",")
    return [task.title, f"{row} block {task.block + 1}", f"{row} {task.block + 1}", row, attack]


def keys_named(plan: Sequence[BlockTask], name: str) -> frozenset[str]:
    """Return the keys of the blocks that `name` names.

    Raises:
        UserError: none has this name; the nearest names are said.
    """
    wanted = " ".join(name.split())
    keys = frozenset(task.key for task in plan if wanted in names_of(task))
    if not keys:
        raise unknown_name("block", name, {each for task in plan for each in names_of(task)[2:]})
    return keys


def what_changed(before: Record, after: Record) -> str:
    """Return in words how a block that was measured again differs from what was known of it."""
    if comparable(before) == comparable(after):
        return "the same as before, to the last bit"
    means = []
    for record in (before, after):
        right = sum(record["samples"]["num_correct"]["evaluation"])
        means.append(100 * right / (len(record["samples"]["ids"]) * record["block"]["num_draws"]["evaluation"]))
    if means[0] != means[1]:
        return f"accuracy {means[1]:.1f} %, before {means[0]:.1f} %"
    old, new = comparable(before), comparable(after)
    places = [f"{part}.{name}" for part in ("samples", "block") for name in new[part] if old[part].get(name) != new[part][name]]
    return f"accuracy as before ({means[1]:.1f} %); other: {', '.join(places) or 'header'}"
