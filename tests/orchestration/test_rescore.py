"""`rayndom evaluate --keep-points`, `rayndom rescore`, `--again`: tiny trained models, as a user sees them."""

from __future__ import annotations

import shutil

import pytest

import orchestration.evaluating.evaluation_run as evaluation_run
from analysis.evaluate import run_block
from analysis.evaluation.records import comparable, read_records
from orchestration.home import Home
from tests.orchestration.tiny_home import copied_home, rayndom_json, trained_home

SUITE = """
scoring: {num_selection_draws: 2, num_evaluation_draws: 6, num_known_draws: 2}
studies: {names: [steps], num_samples: 8, steps: 2, num_draws: 2, max_steps: 4}
attacks:
  - {name: fgsm, attack: fgsm, num_draws: 2}
  - {name: pgd_2, attack: pgd, parameters: {steps: 2}, protocols: [T0, T1, T2], num_draws: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, migrated_store):
    """A home with two trained models."""
    with trained_home(tmp_path_factory.mktemp("rescore"), migrated_store, ("ctrw_digits", "at_digits")) as located:
        yield located


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of that home, and a suite."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    (tmp_path / "short.yaml").write_text(SUITE)
    return copied_home(trained, tmp_path)


def run(capsys, home, command, *arguments):
    """As `rayndom_json`; an evaluation has the suite above and 16 images."""
    suite = ["--suite", str(home.root.parent / "short.yaml"), "--samples", "16"] if command == "evaluate" else []
    return rayndom_json(capsys, home, command, *suite, *arguments)


def records_of(home, recipe_folder="evaluations"):
    (path,) = (home.root / recipe_folder).glob("*/records.jsonl")
    return path


def test_rescoring_gives_what_a_fresh_evaluation_gives_and_attacks_nothing(place, tmp_path, capsys, monkeypatch):
    fresh_home = Home.locate(shutil.copytree(place.root, tmp_path / "fresh"))
    code, planned, _ = run(capsys, place, "evaluate", "ctrw_digits", "--keep-points", "--dry-run")
    assert code == 0 and not (place.root / "evaluations").exists()
    assert planned["num_done"] == 0 and planned["seconds"] > 0
    code, _, _ = run(capsys, place, "evaluate", "ctrw_digits", "--keep-points")
    assert code == 0
    points = list(records_of(place).parent.glob("points/*.safetensors"))
    held = sum(path.stat().st_size for path in points)
    assert planned["points_bytes"] <= held <= planned["points_bytes"] + 40_000 * len(points)

    def never(*_, **__):
        raise AssertionError("an attack ran")

    with monkeypatch.context() as patch:
        patch.setattr("analysis.evaluation.blocks.AttackProblem", never)  # what an attack is called with
        code, rescored, _ = run(capsys, place, "rescore", "ctrw_digits", "--draws", "30")
        assert code == 0
        again = run(capsys, place, "rescore", "ctrw_digits")
        assert again[0] == 0 and again[1]["rows"] == rescored["rows"]
    code, fresh, _ = run(capsys, fresh_home, "evaluate", "ctrw_digits", "--draws", "30")
    assert code == 0
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in each["rows"]] for each in (rescored, fresh)]
    assert rows[0] == rows[1]
    assert rescored["headline"] == fresh["headline"]
    assert rescored["headline"]["num_draws"] == 30
    found, expected = read_records(records_of(place)), read_records(records_of(fresh_home))
    studies = {key for key, record in expected.items() if record["header"]["kind"] == "study"}
    assert len(studies) == 1
    for key in expected.keys() - studies:
        assert comparable(found[key]) == comparable(expected[key])
    # The study stands as it was measured, also after the second time.
    verdicts = {verdict["id"]: verdict["verdict"] for verdict in again[1]["verdicts"]}
    assert verdicts["C7"] != "SKIPPED"
    page = (records_of(place).parent / "report-short" / "report.html").read_text()
    assert "Images by survival" in page and "perturbed" in page


def test_points_on_another_model_are_called_a_transfer_attack(place, capsys):
    assert run(capsys, place, "evaluate", "ctrw_digits", "--keep-points")[0] == 0
    code, found, said = run(capsys, place, "rescore", "ctrw_digits", "--model", "at_digits")
    assert code == 0 and found["attack"] == "transfer" and "transfer attack" in said
    assert [row["attack"] for row in found["rows"]] == ["clean", "fgsm", "pgd_2"]
    assert {row["other"]["num_draws"] for row in found["rows"]} == {1}
    for row in found["rows"]:
        assert row["difference"]["value"] == pytest.approx(row["other"]["value"] - row["own"]["value"])
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    # What `compare` and tables read of the other model is untouched.
    assert len(list(place.root.glob("evaluations/*/result-*.json"))) == 1
    again = run(capsys, place, "rescore", "ctrw_digits", "--model", "at_digits")
    assert again[1] == found
    # A model that was scored on its own points is the same as ever.
    own = run(capsys, place, "rescore", "ctrw_digits", "--model", "ctrw_digits")[1]
    assert all(row["own"]["value"] == row["other"]["value"] for row in own["rows"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rescore", "ctrw_digits"], "--keep-points"),
        (["rescore", "ctrw_digits", "--draws", "0"], "from 1 to"),
        (["rescore", "ctrw_digit"], "ctrw_digits"),
        (["evaluate", "ctrw_digits", "--again", "pgd_3"], "'pgd_2'"),
    ],
)
def test_mistakes_are_one_sentence(place, capsys, arguments, said):
    code, found, errors = run(capsys, place, *arguments)
    assert code == 2 and found is None and said in errors


def test_a_block_that_fails_is_named_and_measured_alone_by_the_same_command(place, capsys, monkeypatch):
    def breaks(model, x, y, task, *rest):
        if task.title.startswith("pgd_2 T2"):
            raise RuntimeError("out of memory")
        return run_block(model, x, y, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("analysis.evaluate.run_block", breaks)
        code, found, errors = run(capsys, place, "evaluate", "ctrw_digits")
    assert code == 1 and not found["finished"]
    assert "pgd_2 T2 block 1/1 could not be measured: RuntimeError: out of memory" in errors
    lines = records_of(place).read_text().splitlines()
    code, found, _ = run(capsys, place, "evaluate", "ctrw_digits")
    assert code == 0 and found["finished"]
    assert records_of(place).read_text().splitlines()[:-1] == lines
    code, _, said = run(capsys, place, "evaluate", "ctrw_digits", "--again", "pgd_2 T2")
    assert code == 0 and "pgd_2 T2 block 1/1, measured again: the same as before, to the last bit" in said
    assert len(records_of(place).read_text().splitlines()) == len(lines) + 2
    assert evaluation_run.POINTS_FOLDER not in {path.name for path in records_of(place).parent.iterdir()}
