"""`rayndom compare`: two tiny trained and evaluated models, as a user sees them beside one another."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest

from analysis.checks.evidence import Check, Finding, Status
from analysis.fingerprints import weights_hash
from analysis.reporting.comparison import compare
from analysis.statistics import Estimate
from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare
from orchestration.evaluating.run_comparison import find_runs, metric_rows, paired_rows, parameter_rows
from orchestration.evaluating.stored_evaluation import result_of
from orchestration.experiment import flatten
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.tiny_home import TINY, trained_home

EVALUATION = ["--samples", "20", "--draws", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def compared_home(tmp_path_factory, migrated_store):
    """A home with evaluated runs of two recipes, and one more of the second that was not evaluated."""
    with (
        trained_home(tmp_path_factory.mktemp("compare"), migrated_store, ("ctrw_digits", "at_digits")) as located,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("analysis.checks.verdicts._SMALL_MARGIN", 0.0)  # C18 rightly marks what is trained for a few steps
        where = ["--home", str(located.root)]
        for folder in sorted((located.root / "runs").iterdir()):
            assert main(["evaluate", folder.name, *EVALUATION, *where]) == 0
        assert main(["train", "natural_digits", *TINY, *where]) == 0
        yield located


@pytest.fixture
def fingerprints(compared_home):
    """Fingerprint by recipe."""
    return {RunFolder(folder).read_config().name: folder.name for folder in (compared_home.root / "runs").iterdir()}


def run(capsys, home, *arguments):
    """Return (exit code, output, errors)."""
    capsys.readouterr()
    code = main(["compare", *arguments, "--home", str(home.root)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_parameters_that_differ_and_all(compared_home, fingerprints, capsys):
    code, out, _ = run(capsys, compared_home, "ctrw_digits", "at_digits", "--json")
    assert code == 0
    differing = {row["parameter"]: (row.get("ctrw_digits"), row.get("at_digits")) for row in json.loads(out)["parameters"]}
    assert differing["defence.name"] == ("ctrw", "at")
    assert differing["defence.lower_bound"] == (2048.0, None)
    assert "training.epochs" not in differing

    code, out, _ = run(capsys, compared_home, fingerprints["ctrw_digits"], fingerprints["at_digits"], "--all", "--json")
    everything = {row["parameter"] for row in json.loads(out)["parameters"]}
    config = RunFolder(compared_home.run(fingerprints["ctrw_digits"])).read_config()
    assert everything >= set(flatten(config.model_dump(mode="json"))) - {"name", "description"}
    metrics = {row["metric"] for row in json.loads(out)["metrics"]}
    assert "train/loss" in metrics
    assert "test/quick/pgd_20 T2" in metrics


def test_metrics_are_those_that_were_stored(compared_home, fingerprints, capsys):
    _, out, _ = run(capsys, compared_home, "ctrw_digits", "at_digits", "--json")
    metrics = {row["metric"]: row for row in json.loads(out)["metrics"]}
    for recipe in ("ctrw_digits", "at_digits"):
        target = resolve_target(fingerprints[recipe], compared_home)
        stored = target.config["details"]
        assert metrics["validation/robust_accuracy"][recipe] == stored["training"]["metrics"]["validation/robust_accuracy"]
        headline = metrics["test/quick/worst attack per sample T1"][recipe]
        assert {name: headline[name] for name in ("accuracy", "low", "high")} == {
            name: stored["evaluation"]["headline"][name] for name in ("accuracy", "low", "high")
        }
        rows = stored["evaluation"]["rows"]
        known = [row["accuracy"] for row in rows if "T2" in row["protocol"].split(" = ") and row["attack"] != "clean"]
        assert metrics["test/quick/worst attack T2"][recipe]["accuracy"] == min(known)


def test_the_paired_comparison_is_that_of_the_stored_records(compared_home, fingerprints):
    runs = find_runs([fingerprints["ctrw_digits"], "at_digits"], compared_home)
    rows, notes = paired_rows(runs, Workplace(compared_home))
    assert not notes
    settings = EvaluationSettings("quick", None, 20, 4, seed=3)
    jobs = [prepare(run.label, run.target, settings, Workplace(compared_home)) for run in runs]
    assert not any(job.pending for job in jobs)
    (expected,) = compare({job.name: job.result() for job in jobs})
    assert rows == [{"suite": "quick"} | expected.row()]
    assert rows[0]["answer"] in ("first seems better", "second seems better", "not separable", "not comparable")


def test_one_that_was_not_evaluated_is_said_and_the_rest_is_shown(compared_home, capsys):
    code, out, _ = run(capsys, compared_home, "at_digits", "natural_digits")
    assert code == 0
    assert "training.objective.name" in out
    assert "natural_digits: none at all" in out
    assert "rayndom evaluate" in out


def test_evaluations_under_other_conditions_are_not_paired(compared_home, fingerprints):
    runs = find_runs(["ctrw_digits", "natural_digits"], compared_home)
    where = ["--home", str(compared_home.root)]
    assert main(["evaluate", fingerprints["natural_digits"], "--samples", "20", "--draws", "4", "--seed", "4", *where]) == 0
    try:
        runs = find_runs(["ctrw_digits", "natural_digits"], compared_home)
        rows, notes = paired_rows(runs, Workplace(compared_home))
        assert rows == []
        assert "seed" in notes[0]
        shutil.rmtree(runs[1].records_folder)
        runs = find_runs(["ctrw_digits", "natural_digits"], compared_home)  # the model's own folder still knows the result
        rows, notes = paired_rows(runs, Workplace(compared_home))
        assert rows == []
        assert "natural_digits are not all in" in notes[0]
        assert any(isinstance(row["natural_digits"], Estimate) for row in metric_rows(runs, everything=False))
    finally:
        folder = RunFolder(compared_home.run(fingerprints["natural_digits"])).model
        config = json.loads((folder / "config.json").read_text())
        config["details"].pop("evaluation")
        (folder / "config.json").write_text(json.dumps(config))


def test_evaluations_of_one_run_with_equal_headlines_and_other_seeds_are_told_apart(compared_home, fingerprints):
    where = ["--home", str(compared_home.root), "--samples", "20", "--draws", "4", "--epsilon", "1e-7"]
    headlines = []
    for seed in (6, 5, 6, 7):
        assert main(["evaluate", fingerprints["natural_digits"], "--seed", str(seed), *where]) == 0
        run = find_runs(["ctrw_digits", "natural_digits"], compared_home)[1]
        kept = run.evaluations["quick"]
        result = result_of(run.label, kept, run.records_folder)
        assert result.header["seed"] == kept["settings"]["seed"] == seed
        assert (kept["settings"]["num_samples"], kept["settings"]["num_draws"]) == (20, 4)
        assert result.header["threat_model"] == kept["settings"]["threat_model"]
        assert result.headline.value == kept["headline"]["accuracy"]
        assert result.finished
        assert set(kept["records"]) == {record["key"] for record in result.records}
        headlines.append(result.headline.value)
    assert len(set(headlines)) == 1


def test_a_kept_result_is_the_one_that_was_shown(compared_home, fingerprints):
    run = find_runs(["ctrw_digits", "at_digits"], compared_home)[0]
    settings = EvaluationSettings("quick", None, 20, 4, seed=3)
    shown = prepare(run.label, run.target, settings, Workplace(compared_home)).result()
    kept = result_of(run.label, run.evaluations["quick"], run.records_folder)
    assert kept.rows == shown.rows
    assert kept.verdicts == shown.verdicts
    assert kept.header == shown.header
    assert kept.worst.chosen == shown.worst.chosen


def test_results_of_an_earlier_version_are_found_by_their_headline_and_that_is_said(compared_home, fingerprints):
    runs = find_runs([fingerprints["ctrw_digits"], "at_digits"], compared_home)
    expected, _ = paired_rows(runs, Workplace(compared_home))
    for run in runs:
        del run.evaluations["quick"]["settings"], run.evaluations["quick"]["records"]
    rows, notes = paired_rows(runs, Workplace(compared_home))
    assert rows == expected
    assert len(notes) == 2
    assert all("earlier version" in note and "seed 3" in note for note in notes)


@pytest.mark.parametrize("chosen", ["table", "markdown", "latex", "csv"])
def test_formats(chosen, compared_home, capsys):
    code, out, _ = run(capsys, compared_home, "ctrw_digits", "at_digits", "--format", chosen)
    assert code == 0
    assert "defence.name" in out.replace("\\_", "_")
    assert "not separable" in out or "better" in out or "not comparable" in out
    if chosen == "latex":
        assert out.count(r"\toprule") == 3
    if chosen == "csv":
        lines = out.split("# metrics")[1].split("#")[0].splitlines()[1:]
        table = {row["metric"]: row for row in csv.DictReader(io.StringIO("\n".join(lines)))}
        low, value, high = (float(table[f"test/quick/worst attack T1{part}"]["ctrw_digits"]) for part in (" low", "", " high"))
        assert low <= value <= high


def test_a_failed_check_marks_the_numbers_wherever_they_are_shown(compared_home, fingerprints, capsys, monkeypatch):
    invalid = Check("C1", "randomness is alive", "Do not report this.", lambda evidence: Finding(Status.FAIL, "made up"))
    where = ["--home", str(compared_home.root)]
    evaluation = ["evaluate", fingerprints["ctrw_digits"], *EVALUATION, *where]
    try:
        with monkeypatch.context() as patch:
            patch.setattr("analysis.checks.verdicts.CHECKS", (invalid,))
            capsys.readouterr()
            assert main(evaluation) == 0  # from its records: nothing is attacked again
            out = capsys.readouterr().out
        accuracies = re.findall(r"\d+\.\d % \[[^]]*\](?: \(!\))?", out)
        assert len(accuracies) >= 7
        assert all(each.endswith("(!)") for each in accuracies)
        assert "evaluation invalid" in out

        target = resolve_target(fingerprints["ctrw_digits"], compared_home)
        card = (target.folder / "README.md").read_text()
        assert "must not be believed as they are: C1 failed" in card
        assert all(line.count("(!)") for line in card.splitlines() if "pgd_20" in line)
        exported = compared_home.root / "marked"
        assert main(["export", fingerprints["ctrw_digits"], "--to", str(exported), *where]) == 0
        assert (exported / "README.md").read_text() == card
        checkpoint = weights_hash(load_pretrained(target.folder, resample_on_forward=False))
        page = compared_home.evaluation(checkpoint[:16]) / "report-quick" / "report.html"
        assert 'body class="invalid"' in page.read_text()
        tracker = Tracker(compared_home, "rayndom")
        tags = tracker.client.get_run(tracker.find_run(fingerprints["ctrw_digits"])).data.tags
        assert (tags["rayndom.marked"], tags["rayndom.marked.quick"], tags["rayndom.failed_checks"]) == ("True", "True", "C1")

        _, out, err = run(capsys, compared_home, "ctrw_digits", "at_digits", "--format", "markdown")
        rows = [line.split("|") for line in out.splitlines() if "test/quick/" in line and line.startswith("| test")]
        assert rows
        (basis,) = [row for row in rows if "basis" in row[1]]
        assert "invalid: C1 failed" in basis[2] and "first look" in basis[3]
        assert all("(!)" in row[2] and "(!)" not in row[3] for row in rows if row is not basis)
        assert "C1 (randomness is alive) failed" in err
        _, out, _ = run(capsys, compared_home, "ctrw_digits", "at_digits", "--json")
        headline = next(row for row in json.loads(out)["metrics"] if row["metric"] == "test/quick/worst attack per sample T1")
        assert (headline["ctrw_digits"]["marked"], headline["at_digits"]["marked"]) == (True, False)
        _, out, _ = run(capsys, compared_home, "ctrw_digits", "at_digits", "--format", "csv")
        assert "test/quick/worst attack T1 marked,True,False" in out
    finally:
        assert main(evaluation) == 0


def test_equal_names_are_told_apart(compared_home, fingerprints, capsys):
    assert main(["train", "at_digits", *TINY, "--seed", "1", "--home", str(compared_home.root)]) == 0
    folder = next(f for f in (compared_home.root / "runs").iterdir() if f.name not in fingerprints.values())
    try:
        runs = find_runs([fingerprints["at_digits"], folder.name], compared_home)
        assert [run.label for run in runs] == [f"at_digits {fingerprints['at_digits'][:6]}", f"at_digits {folder.name[:6]}"]
        assert [row["parameter"] for row in parameter_rows(runs, everything=False)] == ["seed"]
        code, _, err = run(capsys, compared_home, "at_digits", "ctrw_digits")
        assert code == 2
        assert folder.name in err, "two finished runs of a recipe: which one?"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["at_digits"], ["at least two"]),
        (["at_digits", "at_digits"], ["the same model"]),
        (["at_digits", "ctrw_digit"], ["'ctrw_digit'", "'ctrw_digits'"]),
        (["at_digits", "rna_digits"], ["rna_digits has no finished run", "rayndom train rna_digits"]),
        (["at_digits", "0123456789abcdef"], ["0123456789abcdef"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, parts, compared_home, capsys):
    code, _, err = run(capsys, compared_home, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
