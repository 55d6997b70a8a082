"""The floors that shipped recipes are held against: how they are judged, and (slow) that the recipes for digits hold them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import learning


def record(name: str, seed: int = 0, *, coupled: bool = True, **changes) -> dict[str, object]:
    experiment = learning.experiment_of(name, seed, coupled)
    values = {"clean": 98.0, "pgd_20": 60.0, "t1": 60.0, "members": [], "said": [], "seconds": 60} | changes
    return {"recipe": name, "seed": seed, "coupled": coupled, "fingerprint": experiment.fingerprint} | values


def missed(name: str, *records: dict[str, object], seeds: int = 3) -> list[str]:
    (row,) = learning.table([name], {each["fingerprint"]: each for each in records}, range(seeds))
    return row["missed"]


def test_a_recipe_that_does_not_learn_misses_its_floor():
    assert missed("at_digits", record("at_digits")) == []
    assert missed("at_digits", record("at_digits", clean=94.9)) == ["clean"]


def test_every_member_counts():
    assert missed("adp_digits", record("adp_digits", members=[97.0, 89.0, 97.0])) == ["member 1"]


def test_coupling_must_not_cost_robustness():
    alone = [record("red_digits", seed, coupled=False, t1=70.0) for seed in range(3)]
    assert missed("red_digits", *alone, *(record("red_digits", seed, t1=60.0) for seed in range(3))) == ["T1"]
    assert missed("red_digits", *alone, *(record("red_digits", seed, t1=75.0) for seed in range(3))) == []
    assert missed("red_digits", *alone, *(record("red_digits", seed, t1=60.0 + 9 * seed) for seed in range(3))) == [], (
        "69 is within two standard errors of 70"
    )


def test_fashion_mnist_is_held_against_adversarial_training():
    at = record("at_fashion_mnist", clean=85.0)
    assert missed("trs_fashion_mnist", at, record("trs_fashion_mnist", clean=79.0)) == ["clean"]
    assert missed("trs_fashion_mnist", at, record("trs_fashion_mnist", clean=81.0)) == []


def test_finished_trainings_are_not_repeated_and_half_a_line_is(tmp_path, monkeypatch):
    done = record("at_digits")
    (tmp_path / learning.RESULTS).write_text(json.dumps(done) + "\n" + json.dumps(record("natural_digits"))[:40])
    trained = []
    monkeypatch.setattr(learning, "measured", lambda *_: {"clean": 99.0, "pgd_20": 0.0, "t1": 0.0, "members": []})
    monkeypatch.setattr(learning, "load_data", lambda *_: type("Splits", (), {"test": None})())
    monkeypatch.setattr(learning, "build_for", lambda *_: None)
    monkeypatch.setattr(learning, "fit", lambda *_, seed, **__: trained.append(seed) or type("Outcome", (), {"history": []})())
    for name in ("at_digits", "natural_digits"):
        learning.run(name, 0, True, tmp_path)
    assert trained == [0], "the finished one is reused, the half-written one trained"
    assert {each["recipe"] for each in learning.read(tmp_path).values()} == {"at_digits", "natural_digits"}


@pytest.mark.slow
@pytest.mark.timeout(12 * 3600)
def test_every_recipe_for_digits_holds_its_floor(tmp_path):
    # LEARNING_RESULTS names a folder that a later start goes on in; what is there counts, so empty it when training has changed.
    folder = Path(os.environ.get("LEARNING_RESULTS", tmp_path))
    assert learning.main(["--settings", "digits", "--seeds", "3", "--results", str(folder)]) == 0
