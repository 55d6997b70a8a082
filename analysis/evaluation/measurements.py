"""Records put together: one attack under one protocol over all its blocks.

Shapes: S samples, R draws.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.attacks.registry import attack_entry
from analysis.evaluation.protocols import ProtocolName
from analysis.evaluation.records import Record, correct_matrix
from analysis.statistics import Estimate, accuracy_interval
from models.threat_model import format_pixel_fraction


@dataclass(frozen=True)
class Measurement:
    """All blocks of one attack under one protocol, in the order of the blocks. level: of its interval."""

    records: tuple[Record, ...]
    level: float = 0.95

    @property
    def header(self) -> dict[str, Any]:
        """The header of its first block; everything but the block number is common."""
        return self.records[0]["header"]

    @property
    def kind(self) -> str:
        """`clean`, `attack` or `epsilon_zero`."""
        return self.header["kind"]

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.header["item"]["name"] if self.header["item"] else "clean"

    @property
    def protocol(self) -> ProtocolName:
        """T0, T1, T2 or T4."""
        return self.header["protocol"]

    @property
    def attack(self) -> str | None:
        """Name of the attack in the registry; None for clean images."""
        return self.header["item"]["attack"] if self.header["item"] else None

    @property
    def bounded(self) -> bool:
        """Whether the attack respects the threat model's radius."""
        return self.header["bounded"]

    @property
    def in_threat_model(self) -> bool:
        """Whether the attack belongs to the worst case within the evaluation's threat model: bounded, by no more than its radius."""
        item = self.header["item"]
        return self.bounded and (item is None or item["epsilon"] is None)

    @property
    def one_step(self) -> bool:
        """Whether the attack takes a single gradient step."""
        return self.attack is not None and attack_entry(self.attack).one_step

    @property
    def randomized(self) -> bool:
        """Whether the model has more than one draw."""
        return self.header["num_configurations"] != 1

    @property
    def exact(self) -> bool:
        """Whether the draws are the whole space of draws."""
        return self.records[0]["block"]["exact"]

    @property
    def num_blocks(self) -> int:
        """Blocks that the plan has; more than there are records if the evaluation is unfinished."""
        return self.header["num_blocks"]

    @property
    def finished(self) -> bool:
        """Whether all of its blocks are there."""
        return len(self.records) == self.num_blocks

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Rows of the samples (S,)."""
        return np.array(self.column("ids"), dtype=np.int64)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """Block of each sample (S,)."""
        return np.repeat([record["header"]["block"] for record in self.records], [len(record["samples"]["ids"]) for record in self.records])

    def column(self, name: str) -> list[Any]:
        """Return a column of the samples."""
        return [value for record in self.records for value in record["samples"][name]]

    def matrix(self, draw_set: str = "evaluation") -> NDArray[np.bool_]:
        """Return the correctness (S, R) on a draw set."""
        return np.concatenate([correct_matrix(record, draw_set) for record in self.records])

    def has(self, draw_set: str) -> bool:
        """Return whether the draw set was scored in all blocks."""
        return all(draw_set in record["block"]["num_draws"] for record in self.records)

    def total(self, name: str) -> float:
        """Return the sum of a block fact."""
        return sum(record["block"][name] for record in self.records)

    @cached_property
    def estimate(self) -> Estimate:
        """Expected accuracy with its interval."""
        matrix = self.matrix()
        # Under T0 each block has draws of its own, and often a single one: the estimate says what so few draws leave open.
        batches_S = self.blocks if self.protocol == "T0" and not self.exact else None
        return accuracy_interval(matrix, matrix.shape[1] if self.exact else None, batches_S=batches_S, level=self.level)

    @property
    def caption(self) -> str:
        """How it was measured: radius, draws and samples in words."""
        header = self.header
        parts = []
        if header["item"] is not None:
            if self.bounded:
                radius = format_pixel_fraction(header["radius"])
                parts.append(f"{header['threat_model']['norm']} {radius if isinstance(radius, str) else format(radius, '.4g')}")
            else:
                parts.append("no radius")
            if self.randomized and self.protocol == "T1":
                parts.append(f"E={header['item']['num_draws']}")
        if self.randomized:
            draws = self.estimate.num_draws
            parts.append(f"all {draws} draws" if self.exact and draws > 1 else f"R={draws}")
        else:
            parts.append("deterministic, one pass")
        parts.append(f"n={self.estimate.num_samples}")
        if self.estimate.shortage:
            parts.append(self.estimate.shortage)
        return ", ".join(parts)


def measurements(records: Iterable[Record], level: float = 0.95) -> list[Measurement]:
    """Group records by kind, attack and protocol, in the order in which they first appear. level: of their intervals."""
    groups: dict[tuple[str, str, str], dict[int, Record]] = {}
    for record in records:
        header = record["header"]
        name = header["item"]["name"] if header["item"] else "clean"
        groups.setdefault((header["kind"], name, header["protocol"]), {})[header["block"]] = record
    return [Measurement(tuple(group[block] for block in sorted(group)), level) for group in groups.values()]


def common_rows(first: Measurement, second: Measurement) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the samples that both measured, in the same order."""
    _, in_first, in_second = np.intersect1d(first.ids, second.ids, return_indices=True)
    return in_first, in_second
