"""What a reproduction stores comes back as it was."""

from __future__ import annotations

import pytest

from analysis.reproduction.outcome import CellOutcome, CheckOutcome, ItemOutcome, Reading, RunOutcome
from models.errors import UserError

OUTCOME = ItemOutcome(
    "ctrw.table4",
    "smoke",
    (
        CellOutcome("in", "natural", Reading(97.5, 95.0, 99.0, "clean, R=5, n=64", num_samples=64, num_draws=5), run="in"),
        CellOutcome("in", "pgd20", None, None, "in", "training failed"),
        CellOutcome("out", "pgd20", Reading(None, series={"values": [0.1, 0.2]}, failed_checks=("C7",)), None, "out"),
    ),
    {"in": RunOutcome("0123456789abcdef", "ctrw_digits", ("a.b=1",), "in", checks={"quick": (CheckOutcome("C1", "t", "PASS", "s"),)})},
)


def test_json_keeps_everything() -> None:
    assert ItemOutcome.from_json(OUTCOME.to_json()) == OUTCOME


def test_a_cell_without_a_number_makes_it_incomplete() -> None:
    assert not OUTCOME.complete
    assert ItemOutcome("ctrw.table4", "smoke", OUTCOME.cells[:1]).complete


@pytest.mark.parametrize("text", ["{", '{"format_version": 1}', "[]"])
def test_damage_is_one_clear_error(text: str) -> None:
    with pytest.raises(UserError, match="damaged"):
        ItemOutcome.from_json(text, "cells.json")


def test_another_version_is_said() -> None:
    with pytest.raises(UserError, match="another version"):
        ItemOutcome.from_json(OUTCOME.to_json().replace('"format_version": 1', '"format_version": 99'))
