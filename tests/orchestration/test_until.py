"""`rayndom evaluate --until`: a tiny trained model; images and draws are added until the interval is narrow."""

from __future__ import annotations

import json
import shutil

import pytest

from analysis.evaluate import run_block
from analysis.evaluation.records import comparable, read_records
from analysis.statistics import accuracy_interval
from analysis.statistics.stopping import level_of_each_look
from orchestration.evaluating.evaluation_run import Until
from orchestration.evaluating.stored_evaluation import read_kept, result_of
from orchestration.home import Home
from tests.orchestration.tiny_home import copied_home, rayndom_json, trained_home

SUITE = """
num_samples: 10
scoring: {num_selection_draws: 2, num_evaluation_draws: 5, num_known_draws: 2}
studies: {names: [steps], num_samples: 8, steps: 2, num_draws: 2, max_steps: 4}
attacks:
  - {name: fgsm, attack: fgsm, num_draws: 2}
  - {name: pgd_2, attack: pgd, parameters: {steps: 2}, protocols: [T0, T1, T2], num_draws: 2}
  - {name: wider, attack: pgd, parameters: {steps: 2}, epsilon: 0.2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, migrated_store):
    """A home with a trained model."""
    with trained_home(tmp_path_factory.mktemp("until"), migrated_store, ["ctrw_digits"], "--data.limit_test", "100") as located:
        yield located


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of that home, and a suite."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    (tmp_path / "short.yaml").write_text(SUITE)
    return copied_home(trained, tmp_path)


def run(capsys, home, *arguments):
    """As `rayndom_json`: an evaluation of the model with the suite above."""
    return rayndom_json(capsys, home, "evaluate", "ctrw_digits", "--suite", str(home.root.parent / "short.yaml"), *arguments)


def keys_of(home):
    """Return the keys of all records, in the order of the file."""
    (path,) = home.root.glob("evaluations/*/records.jsonl")
    return [json.loads(line)["key"] for line in path.read_text().splitlines()], read_records(path)


def test_images_and_draws_are_added_until_the_interval_is_narrow(place, tmp_path, capsys, monkeypatch):
    code, planned, said = run(capsys, place, "--until", "25", "--dry-run")
    assert code == 0 and not (place.root / "evaluations").exists()
    assert 0 < planned["expected"]["images"] <= 100 and planned["expected"]["seconds"] > 0

    # Killed in the middle (whatever the process was doing, finished blocks are on the disk), and started again.
    blocks = []

    def interrupted(model, x, y, task, *rest):
        if len(blocks) == 12:
            raise KeyboardInterrupt
        blocks.append(task.key)
        return run_block(model, x, y, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("analysis.evaluate.run_block", interrupted)
        code, _, _ = run(capsys, place, "--until", "25")
    assert code == 130
    assert keys_of(place)[0] == blocks
    code, found, said = run(capsys, place, "--until", "25")
    assert code == 0 and found["finished"]
    keys, records = keys_of(place)
    assert len(keys) == len(set(keys)) and keys[: len(blocks)] == blocks, "no block ran twice"
    assert "look 1 of at most" in said and "images" in said

    until = Until.from_json(found["settings"]["until"])
    headline = found["headline"]
    assert headline["num_samples"] in until.looks.images
    assert headline["high"] - headline["low"] <= 0.25 or headline["num_samples"] == 100
    assert 0.95 < until.looks.level_of_each < 1
    assert until.looks.level_of_each <= level_of_each_look((0.25,) * (until.looks.count - 1))
    (folder,) = (place.root / "evaluations").iterdir()
    result = result_of("model", read_kept(folder)["short"], folder)
    naive = accuracy_interval(result.worst.correct_SR, level=until.looks.level_of_each)
    assert (headline["low"], headline["high"]) == (naive.low, naive.high) == (result.headline.low, result.headline.high)
    assert "its interval holds although images were added" in said

    # The records are those of an undisturbed run, and of an evaluation that asked for these numbers at once.
    other = Home.locate(shutil.copytree(place.root, tmp_path / "other", ignore=shutil.ignore_patterns("evaluations")))
    assert run(capsys, other, "--until", "25")[1]["headline"] == headline
    _, undisturbed = keys_of(other)
    assert {key: comparable(record) for key, record in undisturbed.items()} == {key: comparable(record) for key, record in records.items()}
    rows = {(row["attack"], row["protocol"]): row["num_samples"] for row in found["rows"]}
    assert set(rows.values()) == {headline["num_samples"]} and ("pgd_2", "T2") in rows and ("wider", "T1") in rows
    assert sum(record["header"]["kind"] == "study" for record in records.values()) == 1, "studies run once, at the end"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--until", "0"], "above 0"),
        (["--until", "100"], "below 100"),
        (["--until", "nan"], "above 0"),
        (["--until", "one"], "--until"),
        (["--until", "5", "--again", "fgsm"], "use one of them"),
    ],
)
def test_mistakes_are_one_sentence(place, capsys, arguments, said):
    code, found, errors = run(capsys, place, *arguments)
    assert code == 2 and found is None and said in errors


def test_the_data_ends_before_a_narrow_interval(place, capsys):
    code, found, said = run(capsys, place, "--until", "3", "--samples", "20", "--draws", "3")
    assert code == 0
    assert found["headline"]["num_samples"] == 20
    assert "the data ends here" in said and "would need about" in said
