"""Homes of which one file or folder is not what it was: cut, flipped, swapped, of another type, a loop, a pipe; records and stores too."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 3.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../x", "a\0b", "\ud800", [], {}, [None], [[]],
    {"": None}, {"a": {"b": [None]}}, "9" * 400, [1] * 3000,
)  # fmt: skip
"""What a value of a JSON or YAML file may have become."""

OTHER_CONTENTS: tuple[bytes, ...] = (
    b"",
    b"not what it was\n",
    b"[]",
    b"null",
    b'{"a": 1}',
    b"a: [1, 2",
    b"\x89PNG\r\n\x1a\n" + bytes(60),
    b"PK\x03\x04" + bytes(200),
    b"SQLite format 3\0" + bytes(4080),
    b"\xff\xfe{\0}\0",
    b"\x80\x04\x95" + bytes(30),
    bytes(5000),
    b"[" * 60_000,
)


@dataclass(frozen=True)
class Damage:
    """What was done to a home: the path below it, and what happened to it."""

    place: str
    kind: str


def damage(home: Path, places: list[Path], rng: random.Random) -> Damage:
    """Damage one of the places of a home and return what was done; every kind of file has ways of its own."""
    path = rng.choice(places)
    ways = folder_ways(path, rng) if path.is_dir() else file_ways(path, rng) + 3 * content_ways(path, rng)
    kind, way = rng.choice(ways)
    way()
    return Damage(str(path.relative_to(home)), kind)


Ways = list[tuple[str, Callable[[], Any]]]


def _replace(path: Path, make: Callable[[], Any]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make()


def folder_ways(path: Path, rng: random.Random) -> Ways:
    """Return what may happen to a folder."""
    return [
        ("deleted", lambda: shutil.rmtree(path)),
        ("a file", lambda: _replace(path, lambda: path.write_text("x"))),
        ("a link to itself", lambda: _replace(path, lambda: path.symlink_to(path))),
        ("a link to nothing", lambda: _replace(path, lambda: path.symlink_to("/nowhere/at/all"))),
        ("emptied", lambda: _replace(path, path.mkdir)),
        ("a folder of folders", lambda: [(each.unlink(), each.mkdir()) for each in list(path.iterdir()) if each.is_file()]),
    ]


def file_ways(path: Path, rng: random.Random) -> Ways:
    """Return what may happen to any file."""
    content = path.read_bytes()
    return [
        ("cut", lambda: path.write_bytes(content[: rng.randrange(len(content) + 1)])),
        ("zeros inside", lambda: path.write_bytes(_zeroed(content, rng))),
        ("flipped bits", lambda: path.write_bytes(flipped(content, rng))),
        ("other content", lambda: path.write_bytes(rng.choice(OTHER_CONTENTS))),
        ("deleted", path.unlink),
        ("a folder", lambda: _replace(path, path.mkdir)),
        ("a link to itself", lambda: _replace(path, lambda: path.symlink_to(path))),
        ("a pipe", lambda: _replace(path, lambda: os.mkfifo(path))),
        ("a link to a device", lambda: _replace(path, lambda: path.symlink_to("/dev/null"))),
        ("twice", lambda: path.write_bytes(content * 2)),
        ("garbage at the end", lambda: path.write_bytes(content + rng.randbytes(50))),
    ]


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    length = min(rng.choice([1, 100, 10_000]), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one to twenty of its bits flipped."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def content_ways(path: Path, rng: random.Random) -> Ways:
    """Return what may happen inside a file of a known kind."""
    if path.suffix in (".json", ".yaml"):
        read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        tree = read(path.read_text())
        return [(f"a {path.suffix} value", lambda: path.write_text(_written(write, changed_tree(tree, rng), tree)))] * 4
    if path.suffix == ".jsonl":
        return [("a record's value", lambda: _change_a_line(path, rng))] * 4
    if path.suffix == ".db":
        return [("a changed database", lambda: _change_database(path, rng))] * 4
    if path.suffix == ".pt":
        return [("a changed checkpoint", lambda: _change_checkpoint(path, rng))] * 3
    return []


def _written(write: Callable[[Any], str], tree: Any, before: Any) -> str:
    try:
        text = write(tree)
        text.encode()
    except (UnicodeError, yaml.YAMLError):
        text = write(before)[:-1]
    return text


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """Return a copy of nested plain data with one value, key or entry changed, at a random depth."""
    tree = copy.deepcopy(tree)
    inner: Any = tree
    while True:
        if not isinstance(inner, dict | list) or not inner:
            return tree
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.75:
            inner = inner[key]
            continue
        what = rng.random()
        if what < 0.2:
            del inner[key]
        elif what < 0.3 and isinstance(inner, dict):
            inner[f"{key}_zz"] = inner.pop(key)
        elif what < 0.4 and isinstance(inner, list):
            inner.append(rng.choice(STRANGE))
        else:
            inner[key] = rng.choice(STRANGE)
        return tree


def _change_a_line(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(
        [
            _written(json.dumps, changed_tree(json.loads(lines[at]), rng), {}),
            lines[at][: len(lines[at]) // 2],
            rng.choice(lines),
            "null",
            "[" * 50_000,
        ]
    )
    path.write_text("\n".join(lines) + "\n")


def _change_database(path: Path, rng: random.Random) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = [name for name in tables if database.execute(f"SELECT count(*) FROM {name}").fetchone()[0]]
        table = rng.choice(filled or tables)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = rng.choice(columns)
        database.execute("PRAGMA foreign_keys = OFF")
        statement = rng.choice(
            [
                f"DROP TABLE {table}",
                f"DELETE FROM {table}",
                f"ALTER TABLE {table} RENAME COLUMN {column} TO zz_{column}",
                f"ALTER TABLE {table} RENAME TO zz_{table}",
                f"UPDATE {table} SET {column} = 'zz'",
                f"UPDATE {table} SET {column} = -5",
                f"UPDATE {table} SET {column} = NULL",
                f"UPDATE {table} SET {column} = x'ff00'",
            ]
        )
        with contextlib.suppress(sqlite3.Error):
            database.execute(statement)


def _change_checkpoint(path: Path, rng: random.Random) -> None:
    state = torch.load(path, weights_only=True)
    key = rng.choice(list(state))
    if rng.random() < 0.3:
        del state[key]
    elif isinstance(state[key], dict) and state[key] and rng.random() < 0.5:
        state[key].pop(rng.choice(list(state[key])))
    else:
        state[key] = rng.choice([None, -1, 10**12, 2.5, "x", [], {}, torch.zeros(2), {"weights": {}}, {"a": None}])
    torch.save(state, path)


def swap(first: Path, second: Path) -> None:
    """Exchange two files or folders."""
    aside = first.with_name(f"{first.name}.aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
