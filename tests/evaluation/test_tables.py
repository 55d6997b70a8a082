"""Rendering of frames."""

import csv
import io

import numpy as np
import pytest

from analysis.reporting.tables import format_estimate, format_percent, to_csv, to_latex, to_markdown
from analysis.statistics import Estimate, accuracy_interval

FRAME = [
    {"attack": "pgd_20 | a", "accuracy": 0.5234, "note": None},
    {"attack": "50 % & more", "accuracy": 1.0},
]


def test_percent_with_interval_and_mark():
    assert format_percent(0.523, 0.511, 0.534) == "52.3 % [51.1, 53.4]"
    assert format_percent(0.523, 0.511, 0.534, marked=True) == "52.3 % [51.1, 53.4] (!)"
    assert format_percent(1) == "100.0 %"


def test_markdown_aligns_escapes_and_shows_missing_values():
    lines = to_markdown(FRAME, titles={"accuracy": "robust"}).splitlines()
    assert len(lines) == 4
    assert len(set(map(len, lines))) == 1
    assert "robust" in lines[0]
    assert lines[1].count(":") == 1  # only the numeric column is aligned to the right
    assert r"pgd_20 \| a" in lines[2]
    assert "–" in lines[3]


def test_csv_reads_back():
    rows = list(csv.DictReader(io.StringIO(to_csv(FRAME))))
    assert rows[0] == {"attack": "pgd_20 | a", "accuracy": "0.5234", "note": ""}
    assert to_csv(FRAME, ["accuracy"]).splitlines() == ["accuracy", "0.5234", "1.0"]


def test_latex_uses_booktabs_and_escapes():
    text = to_latex(FRAME, caption="Accuracy_1", label="tab:a")
    assert r"\toprule" in text
    assert r"50 \% \& more" in text
    assert r"\caption{Accuracy\_1}" in text
    assert r"\begin{tabular}{lrl}" in text
    estimate = Estimate(0.5, 0.4, 0.6, 0.05, 10, 1, True, "Wilson")
    assert r"50.0 \% [40.0, 60.0]" in to_latex([{"accuracy": estimate}])


def test_an_estimate_of_too_few_draws_or_images_says_so_wherever_it_stands():
    for correct, lacking in ((np.eye(400)[:, :2], "too few draws"), (np.arange(20) < 10, "too few images")):
        estimate = accuracy_interval(correct, None if correct.ndim == 2 else 1)
        assert estimate.lacking == lacking
        for text in (to_markdown([{"accuracy": estimate}]), to_latex([{"accuracy": estimate}]), format_estimate(estimate)):
            assert lacking in text
    assert format_estimate(estimate.with_mark(True)).endswith("] (!) too few images")


def test_unknown_column():
    with pytest.raises(ValueError, match="no column 'accurcy'"):
        to_markdown(FRAME, ["accurcy"])
