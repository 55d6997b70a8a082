"""Reproductions: what is planned, what a mistake looks like, what is stored, what is shared between tables, what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from analysis.reproduction.outcome import CellOutcome, ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import get_item, list_items
from analysis.reproduction.scale import BUDGETS, SCALES
from orchestration.cli import main
from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_jobs, test_images
from orchestration.home import Workplace
from orchestration.reproducing import execution
from orchestration.reproducing.cost import training_cost
from orchestration.reproducing.ledger import Ledger, outcome_folder, read_outcome
from orchestration.reproducing.plan import choose_keys, evaluations, find_items, model_folder, plan_item, readings
from orchestration.reproducing.summary import catalogue, describe
from orchestration.tracking.tracker import FINGERPRINT_TAG, PARENT_TAG
from orchestration.trained_models.targets import Target

test_images.__test__ = False
ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *arguments):
    code = main(["reproduce", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny(monkeypatch):
    """Trainings of seconds and evaluations of a few images at scale smoke."""
    from orchestration.reproducing import plan, scaling

    def smaller(experiment, run, scale):
        experiment = real(experiment, run, scale)
        data = experiment.data.changed(image_size=8, limit_train=64, validation_size=32, limit_test=20)
        training = experiment.training
        training = training.changed(
            epochs=1,
            precision="fp32",
            attack=training.attack.changed(steps=1),
            validation=training.validation.changed(num_examples=16, steps=1),
        )
        return experiment.changed(data=data, training=training)

    real = scaling.scaled
    monkeypatch.setattr(plan, "scaled", smaller)
    monkeypatch.setattr(plan, "_EXPERIMENTS", {})
    smoke = BUDGETS["smoke"]
    scoring = {**smoke.scoring, "num_evaluation_draws": 2, "num_selection_draws": 1}
    monkeypatch.setitem(BUDGETS, "smoke", replace(smoke, num_samples=10, max_steps=2, num_draws=1, scoring=scoring))


def plan_tables(name, rows=None, columns=None, scale="smoke"):
    return plan_item(get_item(name), scale, rows, columns)


# Plans


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_of_every_item_is_planned(scale, home):
    for name in list_items():
        planned = plan_tables(name, scale=scale)
        evaluated = {each.training.key for each in evaluations(planned, home)}
        read = {each.training.fingerprint for each in readings(planned)}
        for cell in planned.cells():
            training = planned.training(cell.row, cell.column)
            assert training.run == cell.run
            if cell.column.unit == "%" and type(cell.column.measure).__name__ in ("Clean", "Accuracy", "WorstCase"):
                assert training.key in evaluated, f"{name} {cell.row.key} {cell.column.key}"
            if type(cell.column.measure).__name__ == "Theory":
                assert training.fingerprint in read


def test_the_catalogue_counts_trainings_once_per_experiment():
    rows = {row["item"]: row for row in catalogue()}
    assert set(rows) == set(list_items())
    assert (rows["ctrw.table1"]["smoke"], rows["ctrw.table1"]["paper"]) == (4, 8)
    assert rows["rna.fig4"]["paper"] == 0


def test_a_network_that_another_row_needs_is_trained_but_not_shown(home):
    planned = plan_tables("rna.fig1d", {"bn"}, {"in"})
    assert set(planned.trainings) == {"bn", "in"}
    (evaluation,) = evaluations(planned, home)
    assert (evaluation.place, evaluation.name) == (("in", "paper_rna", True), "paper_rna transfer")
    (attack,) = evaluation.suite.attacks
    assert attack.parameters["surrogate"] == str(model_folder(home, planned.trainings["bn"]))
    assert [(cell.row.key, cell.column.key) for cell in planned.cells()] == [("bn", "in")]


def test_examples_of_several_networks_are_told_apart(home):
    planned = plan_tables("rna.fig1d")
    by_answer = {each.training.key: [attack.name for attack in each.suite.attacks] for each in evaluations(planned, home)}
    assert {key: len(set(names)) for key, names in by_answer.items()} == dict.fromkeys(("bn", "bgn", "in", "gn", "ln"), 5)


def test_fewer_columns_keep_the_blocks_of_the_whole_table(home):
    whole = {each.name: each.suite for each in evaluations(plan_tables("ctrw.table1", {"resnet18/ctrw"}), home)}
    (part,) = evaluations(plan_tables("ctrw.table1", {"resnet18/ctrw"}, {"pgd20"}), home)
    assert part.suite.scoring == whole["paper_ctrw"].scoring
    assert part.suite.attacks == tuple(attack for attack in whole["paper_ctrw"].attacks if attack.name == "pgd_20")
    (clean,) = evaluations(plan_tables("ctrw.table1", {"resnet18/ctrw"}, {"natural"}), home)
    assert clean.suite.attacks == ()


def test_cells_of_one_function_are_one_reading():
    planned = plan_tables("rna.fig5c", {"in_bn"})
    assert sum(1 for _ in planned.cells()) == 63
    assert len(readings(planned)) == 10, "21 differences are 10 in a network of 9 layers; mean, minimum and maximum are one"


def test_items_are_found_by_name_pattern_and_paper():
    assert [item.name for item in find_items(["ctrw.fig3*", "ctrw.fig3a"])] == ["ctrw.fig3a", "ctrw.fig3b", "ctrw.fig3c", "ctrw.fig3d"]
    assert len(find_items(["all"])) == len(list_items())
    assert all(item.name.startswith("red.") for item in find_items(["red"]))
    assert choose_keys("row", [get_item("ctrw.table1")], ["wrn34/*", "resnet18/ctrw"]) == {
        "wrn34/baseline", "wrn34/without", "wrn34/fixed", "wrn34/ctrw", "resnet18/ctrw",
    }  # fmt: skip


def test_the_estimate_follows_the_count_of_passes():
    (ctrw,) = plan_tables("ctrw.fig3c", scale="paper").unique
    cost = training_cost(ctrw.experiment)
    assert cost.passes == 23 * 45_000 * 200, "PGD-10 and its training step are 23 forward passes"
    assert cost.gpu_hours == pytest.approx(cost.passes * 2 * 555.42e6 / 2e14 / 3600, rel=1e-3)
    assert cost.core_hours == 0


def test_shared_trainings_are_counted_once(home):
    alone = describe([plan_tables("ctrw.table4")], home)["items"][0]
    second = describe([plan_tables("ctrw.table1"), plan_tables("ctrw.table7")], home)["items"][1]
    assert alone["trainings"] == 4
    assert (second["trainings"], second["already_trained"]) == (4, 0)
    assert second["forward_passes"] < describe([plan_tables("ctrw.table7")], home)["items"][0]["forward_passes"]


# The command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["ctrw.tabel4"], ["'ctrw.table4'"]),
        (["ctrw.table4", "--scale", "smok"], ["'smoke'"]),
        (["ctrw.table4", "--rows", "ni"], ["row of ctrw.table4", "'in'"]),
        (["ctrw.table4", "--columns", "pgd2"], ["column of ctrw.table4", "'pgd20'"]),
        (["ctrw.table3", "--rows", "rna"], ["quoted"]),
        (["common.table1", "--scale", "small", "--rows", "gal"], ["row of common.table1", "Known: at, awp"]),
        (["common.table2", "--seed", "-1"], ["seed", "0"]),
        (["ctrw.table4", "--scale", "short", "--gpus-per-worker", "0", "--data-root", "nowhere"], ["cifar-10-batches-py", "nowhere"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, parts, capsys, home):
    code, _, err = run(capsys, *arguments, "--home", str(home.root))
    assert code == 2
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
    assert not (home.root / "runs").exists()


def test_without_an_item_everything_is_listed(capsys):
    code, out, _ = run(capsys, "--json")
    assert code == 0
    assert [row["item"] for row in json.loads(out)] == list_items()


@pytest.mark.parametrize("scale", SCALES)
def test_a_dry_run_trains_nothing(scale, capsys, home):
    code, out, _ = run(capsys, "rat.table4", "dcs.fig4b", "ctrw.fig1", "--scale", scale, "--dry-run", "--json", "--home", str(home.root))
    assert code == 0
    report = json.loads(out)
    assert [row["item"] for row in report["items"]] == ["rat.table4", "dcs.fig4b", "ctrw.fig1"]
    assert report["trainings"]["rat.table4"].keys() == {f"{row}|{group}" for row in ("awp", "ours", "surrogate") for group in
                                                        ("CIFAR-10", "CIFAR-100", "SVHN")}  # fmt: skip
    assert report["items"][2]["nothing_to_run"]
    assert not (home.root / "runs").exists()
    assert not (home.root / "reproductions").exists()


# Execution


def reproduce(planned, home):
    return execution.reproduce_item(planned, Workplace(home))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_table_is_filled_and_what_it_shares_is_not_computed_again(home, ray_cluster, tiny, monkeypatch):
    first = plan_tables("ctrw.table4", {"in"}, {"natural", "pgd20"})
    outcome, problems, run_id = reproduce(first, home)
    assert not problems
    cell = outcome.cell("in", "pgd20")
    assert (cell.paper.protocol, cell.honest.protocol) == ("T0", "T1")
    assert cell.paper.low <= cell.paper.value <= cell.paper.high <= 100
    assert (cell.honest.num_samples, cell.honest.num_draws) == (10, 2)
    assert outcome.cell("in", "natural").honest is None, "clean accuracy is the same under every protocol"
    assert not cell.paper.series, "no claimed gain rests on this row, so its images are not kept"
    assert outcome.cell("out", "pgd20").reason == "not asked for"
    training = outcome.runs["in"]
    assert training.state == "finished"
    assert training.checks["paper_ctrw"][0].key == "C1"
    assert training.environment["hardware"]["cores"]
    assert training.configuration["defence.name"] == "ctrw"
    assert read_outcome(home, "ctrw.table4", "smoke") == outcome

    client = MlflowClient(tracking_uri=home.tracking_uri)
    assert client.get_run(run_id).data.metrics["paper/in/pgd20"] == cell.paper.value
    assert client.get_run(training.mlflow_run).data.tags[PARENT_TAG] == run_id

    def never(*arguments, **settings):
        raise AssertionError("it is computed already")

    monkeypatch.setattr(execution, "run_jobs", never)
    second, problems, _ = reproduce(plan_tables("ctrw.fig3c", None, {"steps_0"}), home)
    assert not problems
    assert second.cell("ctrw", "steps_0").paper == outcome.cell("in", "natural").paper
    children = [run.data.tags[PARENT_TAG] for run in client.search_runs(["1"]) if FINGERPRINT_TAG in run.data.tags]
    assert len(children) == len(set(children)) == 2, "each item shows its training once"


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_theory_is_read_once_and_other_rows_are_kept(home, ray_cluster, tiny, monkeypatch):
    outcome, problems, _ = reproduce(plan_tables("ctrw.table6", {"cifar10/with"}, {"positive", "ratio"}), home)
    assert not problems
    positive, ratio = (outcome.cell("cifar10/with", key).paper for key in ("positive", "ratio"))
    assert positive.value == 10_000 * ratio.value
    monkeypatch.setattr("orchestration.reproducing.reading_jobs.take_reading", None)  # a file holds it
    again, problems, _ = reproduce(plan_tables("ctrw.table6", {"cifar10/with"}, {"minimum"}), home)
    assert not problems
    assert -1 <= again.cell("cifar10/with", "minimum").paper.value <= 1
    assert again.cell("cifar10/with", "ratio").paper == ratio, "what was found before stays"


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_training_that_diverges_is_said_in_its_cells_and_the_others_go_on(home, ray_cluster, tiny, monkeypatch, capsys):
    from orchestration.reproducing import plan as planning

    def broken(run, *rest):
        experiment = real(run, *rest)
        if experiment.defence.parameters.variant != "out":
            return experiment
        optimizer = experiment.training.optimizer.model_copy(update={"learning_rate": 1e30})
        return experiment.model_copy(update={"training": experiment.training.model_copy(update={"optimizer": optimizer})})

    real = planning._experiment
    monkeypatch.setattr(planning, "_experiment", broken)
    code, _, err = run(capsys, "ctrw.table4", "--rows", "in,out", "--columns", "natural", "--home", str(home.root))
    assert code == 1
    assert "learning_rate" in err
    outcome = read_outcome(home, "ctrw.table4", "smoke")
    assert outcome.cell("in", "natural").paper is not None
    failed = outcome.cell("out", "natural")
    assert failed.paper is None
    assert "failed: the loss is" in failed.reason
    assert not outcome.complete
    assert (outcome_folder(home, "ctrw.table4", "smoke") / "outcome.json").is_file()


def test_an_illustration_is_stored_without_training(home):
    outcome, problems, run_id = reproduce(plan_tables("rna.fig4"), home)
    assert (outcome.cells, problems, run_id) == ((), [], None)
    assert read_outcome(home, "rna.fig4", "smoke") == outcome


def test_what_was_found_before_is_kept_unless_its_training_is_another(home):
    training = plan_tables("ctrw.table4").trainings["out"]
    cell = CellOutcome("out", "natural", Reading(50.0), run="out")
    for fingerprint, kept in ((training.fingerprint, Reading(50.0)), ("0" * 16, None)):
        before = ItemOutcome("ctrw.table4", "smoke", (cell,), {"out": RunOutcome(fingerprint, training.run.recipe)})
        path = outcome_folder(home, "ctrw.table4", "smoke") / "outcome.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before.to_json())
        assert Ledger(plan_tables("ctrw.table4", {"in"}), home).outcome().cell("out", "natural").paper == kept
        asked = Ledger(plan_tables("ctrw.table4"), home).outcome().cell("out", "natural")
        assert (asked.paper, asked.reason) == (None, "not run"), "its network is not there"


def test_outcomes_of_several_seeds_stand_beside_one_another(capsys, home):
    where = ["--home", str(home.root)]
    for seed in (0, 4):
        planned = plan_item(get_item("ctrw.table4"), "smoke", {"in"}, seed=seed)
        Ledger(planned, home).write()
        found = read_outcome(home, "ctrw.table4", planned.edition)
        assert {run.configuration["seed"] for run in found.runs.values()} == {seed}
    code, out, _ = run(capsys, "ctrw.table4", "--seed", "4", "--render", "--json", *where)
    assert code == 0
    assert Path(json.loads(out)["reports"]["ctrw"]).name == "ctrw-smoke-seed-4.html"
    assert "scale smoke seed 5" in run(capsys, "ctrw.table4", "--seed", "5", "--render", *where)[2]


def test_a_dry_run_says_which_folder_of_pictures_is_not_there_and_counts_the_work(capsys, home, tmp_path):
    arguments = ["common.table1", "--scale", "small", "--rows", "at", "--dry-run", "--json", "--home", str(home.root)]
    for there in (False, True):
        if there:
            for part in ("train", "test"):
                (tmp_path / "cifar10-jpeg" / part).mkdir(parents=True)
        code, out, _ = run(capsys, *arguments, "--data-root", str(tmp_path))
        report = json.loads(out)
        assert code == 0
        assert report["missing_datasets"] == ([] if there else ["image_folder cifar10-jpeg"])
        # 12 epochs of 15,000 images with a backward pass each, and more.
        assert report["items"][0]["forward_passes"] > 12 * 15_000 * 3


def test_what_has_been_found_is_rendered_without_running(capsys, home):
    where = ["--home", str(home.root)]
    code, _, err = run(capsys, "ctrw.table4", "--render", *where)
    assert code == 2
    assert "has been reproduced" in err
    Ledger(plan_tables("ctrw.table4", {"in"}), home).write()
    code, out, _ = run(capsys, "ctrw.table4", "--render", "--json", *where)
    assert code == 0
    assert "not run" in Path(json.loads(out)["reports"]["ctrw"]).read_text()
    assert "not run" in (outcome_folder(home, "ctrw.table4", "smoke") / "table.md").read_text()
    assert not (home.root / "runs").exists()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_block_of_two_jobs_is_run_once_and_one_that_breaks_leaves_the_others(home, ray_cluster, tiny, monkeypatch):
    planned = plan_tables("ctrw.table4", {"in"}, {"natural"})
    reproduce(planned, home)
    training = planned.trainings["in"]
    suite = evaluations(plan_tables("ctrw.table4", {"in"}), home)[0].suite
    good = next(attack for attack in suite.attacks if attack.name == "pgd_20")
    bad = good.model_copy(update={"name": "bad"})
    target = Target(model_folder(home, training), training.experiment)
    jobs = [
        prepare(name, target, EvaluationSettings(suite.model_copy(update={"attacks": attacks})), Workplace(home))
        for name, attacks in (("one", (good,)), ("two", (good,)), ("broken", (bad,)))
    ]
    import analysis.evaluate as module

    real, count = module.run_block, []

    def counted(model, x, y, task, *points):
        count.append(task.key)
        if task.item is not None and task.item.name == "bad":
            raise RuntimeError("no such attack")
        return real(model, x, y, task, *points)

    monkeypatch.setattr(module, "run_block", counted)
    done, failed = [], []
    run_jobs(
        jobs, workers=1, on_done=lambda job: done.append(job.name), on_failure=lambda job, error: failed.append((job.name, str(error)))
    )
    assert sorted(done) == ["one", "two"]
    assert failed == [("broken", "no such attack")]
    assert len(count) == len(set(count))


# Long


def smoke(home, *arguments, timeout=1500):
    command = [sys.executable, "-m", "orchestration.cli", "reproduce", *arguments, "--home", str(home.root), "--json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    "arguments",
    [
        ["ctrw.table4", "ctrw.fig3a"],
        ["rna.table4", "rna.fig2b"],
        ["dcs.table8", "dcs.fig4a"],
        ["red.table3", "red.fig1"],
        ["rat.table4", "rat.fig2"],
        ["common.table2", "--rows", "natural,ctrw,red"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_smoke_of_a_table_and_a_figure(home, arguments):
    finished = smoke(home, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name, result in json.loads(finished.stdout)["items"].items():
        assert not result["failed"]
        outcome = read_outcome(home, name, "smoke")
        if "--rows" not in arguments:
            assert outcome.complete, [cell for cell in outcome.cells if cell.paper is None]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_minus_nine_and_the_same_command_ends_as_without_it(tmp_path, migrated_store, monkeypatch):
    import shutil

    from orchestration.home import Home

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed, whole = (Home.locate(tmp_path / name) for name in ("killed", "whole"))
    for each in (killed, whole):
        shutil.copy(migrated_store, each.root / "mlflow.db")
    arguments = ["ctrw.table4", "--rows", "in,out"]
    command = [sys.executable, "-m", "orchestration.cli", "reproduce", *arguments, "--home", str(killed.root)]
    for moment in ("epoch 2/3", "accuracy"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if moment in process.stdout.readline():
                break
        else:
            pytest.fail(f"{moment} was not reached")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert smoke(killed, *arguments).returncode == 0
    assert smoke(whole, *arguments).returncode == 0
    numbers = [[(cell.row, cell.column, cell.paper, cell.honest) for cell in read_outcome(each, "ctrw.table4", "smoke").cells]
               for each in (killed, whole)]  # fmt: skip
    assert numbers[0] == numbers[1]
    client = MlflowClient(tracking_uri=killed.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("rayndom").experiment_id])
    assert len([run for run in runs if "rayndom.reproduction" in run.data.tags]) == 1
    fingerprints = [run.data.tags[FINGERPRINT_TAG] for run in runs if FINGERPRINT_TAG in run.data.tags]
    assert len(fingerprints) == len(set(fingerprints)) == 2
    assert all(run.info.status == "FINISHED" for run in runs)


def test_the_images_of_a_reading_are_the_shares_of_draws_on_which_they_are_right():
    import numpy

    from orchestration.reproducing.ledger import per_image

    correct = numpy.array([[True, False, True], [False, False, False]])
    assert per_image(numpy.array([7, 3]), correct) == {"ids": [7, 3], "correct": [0.6667, 0.0]}


def test_a_check_about_one_attack_marks_the_numbers_of_that_attack_alone():
    from types import SimpleNamespace

    from analysis.checks.evidence import Status, Verdict
    from orchestration.reproducing.ledger import failed_checks

    about_one = Verdict("C4", "skipped", Status.FAIL, "", attacks=("autoattack_of_torchattacks",))
    about_all = Verdict("C12", "gradient", Status.FAIL, "")
    assert failed_checks(SimpleNamespace(failed=(about_one,)), ("pgd_20",)) == ()
    assert failed_checks(SimpleNamespace(failed=(about_one,)), ("pgd_20", "autoattack_of_torchattacks")) == ("C4",)
    assert failed_checks(SimpleNamespace(failed=(about_one, about_all)), ()) == ("C12",)
