"""Two identical commands at once have one writer; a training started anew is a new MLflow run; a refused one leaves none."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time

import pytest

from models.errors import EnvironmentProblem, UserError
from orchestration.cli import main
from orchestration.home import Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.single_process import only_process, only_writer
from orchestration.tracking.tracker import REPLACED_TAG, REPLACES_TAG, Tracker
from orchestration.training.preparation import PreparedTraining
from orchestration.training.single_run import run_single
from tests.orchestration.earlier_homes.contents import TINY
from tests.orchestration.finished_runs import finish
from tests.orchestration.sweep_process import runs_of
from trainers.fit import TrainingDiverged

FIELDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def tiny(epochs=1, **fields):
    return load_recipe("at_digits", [*FIELDS, "--training.epochs", str(epochs), *fields.get("more", ())]).experiment


def words(home, epochs=1):
    return ["train", "at_digits", *FIELDS, "--training.epochs", str(epochs), "--home", str(home.root)]


def test_a_lock_has_one_holder_at_a_time_however_many_want_it(tmp_path):
    """Threads open the file themselves, so their locks exclude one another as those of processes do."""
    generator, inside, most = random.Random(0), [], []

    def enter(seconds):
        with only_process(tmp_path / "folder" / "lock", "the work", patience_s=None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(seconds)
            inside.pop()

    threads = [threading.Thread(target=enter, args=(generator.uniform(0, 0.02),)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12


def test_a_folder_is_held_without_a_file_in_it(tmp_path):
    folder = tmp_path / "new"
    with only_writer(folder, "the export"):
        with (
            pytest.raises(EnvironmentProblem, match="the export is being run by another process"),
            only_writer(folder, "the export", patience_s=0.2),
        ):
            pass
        assert list(folder.iterdir()) == []
    with only_writer(folder, "the export", patience_s=0):
        pass


def test_an_analysis_that_runs_is_named_and_waited_for(home, capsys):
    finish(home, kind="run")
    analyse = ["analyse", "at_digits", "--what", "cost", "--home", str(home.root)]
    assert main(analyse) == 0
    (file,) = home.root.glob("analyses/*.json")
    held = contextlib.ExitStack()
    held.enter_context(only_process(file.with_suffix(".lock"), "an analysis"))
    assert main(analyse) == 3
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    threading.Timer(0.5, held.close).start()
    assert main([*analyse, "--wait"]) == 0


def test_a_second_training_names_the_first_and_waits_if_asked(home, capsys):
    experiment = tiny()
    folder = RunFolder(home.run(experiment.fingerprint))
    for lock in (folder.commanded("first"), folder.locked()):  # another command; a trial of a sweep
        with lock:
            assert main(words(home)) == 3
        told = capsys.readouterr().err
        assert f"process {os.getpid()} on " in told
        assert "--wait" in told
        assert folder.result() is None
    held = contextlib.ExitStack()
    held.enter_context(folder.commanded("first"))
    threading.Timer(1, held.close).start()
    began = time.monotonic()
    assert main([*words(home), "--wait"]) == 0
    assert time.monotonic() - began >= 1
    assert len(runs_of(home, "run")) == 1


def test_an_evaluation_that_runs_is_named_and_its_records_are_reused_after_waiting(home, capsys):
    assert main(words(home)) == 0
    fingerprint = tiny().fingerprint
    evaluate = ["evaluate", fingerprint, "--samples", "10", "--workers", "1", "--home", str(home.root)]
    assert main(evaluate) == 0
    (records,) = home.root.glob("evaluations/*/records.jsonl")
    before = records.read_bytes()
    with only_process(records.parent / "lock", "an evaluation"):
        assert main(evaluate) == 3
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    held = contextlib.ExitStack()
    held.enter_context(only_process(records.parent / "lock", "an evaluation"))
    threading.Timer(0.5, held.close).start()
    assert main([*evaluate, "--wait"]) == 0
    assert records.read_bytes() == before


def test_a_restart_is_a_new_run_that_names_the_one_it_replaces(home):
    assert main(words(home)) == 0
    (first,) = runs_of(home, "run")
    for count in (2, 3):
        assert main([*words(home), "--restart"]) == 0
        runs = {run.info.run_id: run for run in runs_of(home, "run")}
        assert len(runs) == count
    assert runs[first.info.run_id].data.metrics == first.data.metrics
    assert runs[first.info.run_id].info.status == "FINISHED"
    chain, current = [], next(run for run in runs.values() if REPLACED_TAG not in run.data.tags)
    while REPLACES_TAG in current.data.tags:
        chain.append(current.info.run_id)
        current = runs[current.data.tags[REPLACES_TAG]]
    assert current.info.run_id == first.info.run_id
    assert len(chain) == 2
    assert main(words(home)) == 0, "the same command reuses the newest"
    assert len(runs_of(home, "run")) == 3
    assert Tracker(home, "rayndom").find_run(tiny().fingerprint) == chain[0]


@pytest.mark.parametrize(
    "fields",
    [["--data.name", "cifar10", "--backbone.name", "resnet8"], ["--resources.gpus_per_worker", "1"]],
    ids=["data set", "GPU"],
)
def test_what_is_refused_before_it_trains_leaves_no_run(home, tmp_path, fields, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    with pytest.raises(UserError):
        run_single(load_recipe("at_digits", [*fields]).experiment, Workplace(home, tmp_path / "no data"))
    assert runs_of(home, "run") == []


def test_a_training_that_diverged_is_not_trained_again_unless_it_is_restarted(home, monkeypatch):
    calls = []

    def diverge(*arguments, **settings):
        calls.append(1)
        raise TrainingDiverged("the loss is nan in epoch 1")

    real = PreparedTraining.fit
    monkeypatch.setattr(PreparedTraining, "fit", diverge)
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 1"):
            run_single(tiny(), Workplace(home))
    assert len(calls) == 1
    (run,) = runs_of(home, "run")
    assert run.info.status == "FAILED"
    assert "nan" in run.data.tags["rayndom.error"]
    monkeypatch.setattr(PreparedTraining, "fit", real)
    assert run_single(tiny(), Workplace(home), restart=True)[0].num_epochs == 1
