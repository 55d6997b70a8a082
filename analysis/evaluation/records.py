"""Records of finished blocks: one JSON line each. A file of them is the whole state of an evaluation.

A record has `key`, `header` (whose number this is), `samples` (columns, one entry per sample), `block` (facts of the whole block) and
`measured` (seconds, device: the only part that differs between two runs of the same block).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import UserError
from models.file_content import read_content

Record = dict[str, Any]

MOST_BYTES = 20_000_000_000
"""Of one file of records."""

_logger = logging.getLogger(__name__)


def pack_rows(correct_SR: NDArray[np.bool_]) -> list[str]:
    """Return one string of hexadecimal digits per row of a boolean matrix."""
    return [np.packbits(row).tobytes().hex() for row in np.asarray(correct_SR, dtype=bool)]


def unpack_rows(rows: list[str], num_draws: int) -> NDArray[np.bool_]:
    """Return the boolean matrix (S, R) that `pack_rows` packed."""
    packed = np.frombuffer(bytes.fromhex("".join(rows)), dtype=np.uint8).reshape(len(rows), -1)
    return np.unpackbits(packed, axis=1, count=num_draws).view(bool)


def correct_matrix(record: Record, draw_set: str = "evaluation") -> NDArray[np.bool_]:
    """Return the correctness (S, R) of a record's samples on one of its draw sets."""
    return unpack_rows(record["samples"]["correct"][draw_set], record["block"]["num_draws"][draw_set])


def comparable(record: Record) -> Record:
    """Return the record without what differs between two runs of the same block."""
    return {name: value for name, value in record.items() if name != "measured"}


def check_whole(record: Any) -> None:
    """Raise an error of any kind unless a record has all its parts, columns of one length, and as many bits as it says it has draws."""
    samples, draws = record["samples"], record["block"]["num_draws"]
    if not isinstance(record["key"], str) or not record["key"] or not isinstance(record["header"], dict):
        raise ValueError("no key or no header")
    correct = samples["correct"]
    columns = [column for column in samples.values() if isinstance(column, list)] + [*correct.values()]
    if not columns or len({len(column) for column in columns}) != 1:
        raise ValueError("columns of different lengths")
    for name, rows in correct.items():
        width = 2 * -(-draws[name] // 8)
        if draws[name] < 1 or any(len(row) != width or len(bytes.fromhex(row)) * 2 != width for row in rows):
            raise ValueError("other draws than it says")


def read_records(path: str | Path) -> dict[str, Record]:
    """Return the records of a file by key; a missing file is empty.

    Lines that a killed writer left half-written are skipped with a warning: their blocks are simply run again.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return {}
    lines = read_content(path, MOST_BYTES).split(b"\n")
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            check_whole(record)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            _logger.warning("%s, line %d is not a whole record and is skipped; its block will be run again", path, number)
    return records


def at_places_of(records: Sequence[Record], suite: str) -> list[Record]:
    """Return all records of one plan, given in its order, with their places in it: a record may have been made for another plan.

    Args:
        suite: name of the plan's suite.
    """
    parts = ("kind", "item", "study", "protocol")
    group_of = [json.dumps([record["header"][name] for name in parts], sort_keys=True) for record in records]
    return [
        {**record, "header": {**record["header"], "suite": suite, "position": position, "num_blocks": group_of.count(group)}}
        for position, (record, group) in enumerate(zip(records, group_of, strict=True))
    ]


def append_record(path: str | Path, record: Record) -> None:
    """Append one record as one write, on a line of its own also after a half-written line. Folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            start = b""
            if size:
                file.seek(size - 1)
                start = b"" if file.read(1) == b"\n" else b"\n"
            file.write(start + json.dumps(record, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write the records {path}: {error.strerror}") from None


def check_same_evaluation(records: Iterable[Record]) -> None:
    """Raise a ValueError if records of different checkpoints, seeds, threat models or draws are mixed.

    Studies measure the attacks and may have draws of their own: those of the evaluation whose points are scored again.
    """
    headers = [record["header"] for record in records]
    if not headers:
        raise ValueError("there are no records to collect")
    for name in ("checkpoint", "model", "seed", "threat_model", "scoring", "format_version"):
        compared = [header for header in headers if name != "scoring" or header["kind"] != "study"]
        values = {json.dumps(header.get(name), sort_keys=True) for header in compared}
        if len(values) > 1:
            raise ValueError(f"records of different evaluations cannot be collected: {name} is {' and '.join(sorted(values))}")
