"""What a function of the theory said, as a cell reads it."""

from __future__ import annotations

import pytest

from analysis.reproduction.readings import Found


def test_a_cell_reads_a_number_or_what_is_drawn():
    sigma = Found({"sum": 2048.0}, {"values": [0.1, 0.2]}, num_samples=None)
    assert sigma.reading("sum", "").value == 2048.0
    drawn = sigma.reading("sigma", "")  # CTRW's Fig. 3a names the attribute whose values it draws
    assert (drawn.value, drawn.series) == (None, {"values": [0.1, 0.2]})
    assert sigma.reading("", "").series == {"values": [0.1, 0.2]}


def test_numbers_without_a_series():
    transfer = Found({"mean": 0.61, "value": 0.5})
    assert transfer.reading("mean", "%").value == pytest.approx(61.0)
    assert transfer.reading("", "").value == 0.5
    assert transfer.reading("maximum", "%") is None
    assert Found({"value": float("nan")}).reading("", "") is None
