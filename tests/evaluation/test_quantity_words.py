"""Words of quantities: symbols keep their letters, and a bound is printed where its equation holds."""

from __future__ import annotations

import pytest
import torch

from analysis.quantities.quantity import Subject, quantities, quantity
from analysis.quantities.report import sentence
from models.registry import build_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n must be at most n_max", "n must be at most n_max."),
        ("p_s: same tap", "p_s: same tap."),
        ("a small rise", "A small rise."),
        ("near 1: alike", "Near 1: alike."),
    ],
)
def test_a_sentence_keeps_symbols(text, expected):
    assert sentence(text) == expected


def test_no_meaning_of_a_quantity_turns_a_symbol_into_another():
    for entry in quantities().values():
        first = entry.meaning.split()[0].rstrip(":,")
        if (len(first) == 1 and first != "a") or "_" in first:
            assert sentence(entry.meaning).startswith(first), entry.name


@pytest.mark.parametrize("num_taps", range(1, 9))
def test_probabilities_of_points_stay_probabilities(num_taps):
    model = build_model("dcs", backbone="resnet8", image_shape=(1, 16, 16), kernel_size=5, num_taps=num_taps, positions=(1, 2, 3, 4, 5))
    found = quantity("dcs_points").compute(Subject(model, lambda: (torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long))))
    for row in found.rows:
        assert row["p_s"] + row["p_g"] + row["p_u"] == pytest.approx(1)
        for name, value in row.items():
            if name.startswith("p_") and isinstance(value, str) and " to " in value:
                low, high = (float(part) for part in value.split(" to "))
                assert -1e-9 <= low <= high <= 1 + 1e-9, (name, value)
