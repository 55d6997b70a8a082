"""`from rayndom import ...`: the records of the command line, and what is returned shows itself; the notebooks run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pandas
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import rayndom
from models.errors import UserError
from orchestration.cli import main
from orchestration.tracking.tracker import Tracker
from rayndom.notebook import as_flags, as_html, as_overrides
from tests.orchestration.sweep_process import ROOT
from tests.orchestration.tiny_home import TINY

SMALL = {TINY[i].removeprefix("--"): TINY[i + 1] for i in range(0, len(TINY), 2)}
SUITE = (
    "description: one attack\nscoring: {num_selection_draws: 2, num_evaluation_draws: 3, num_known_draws: 2, enumerate_up_to: 4}\n"
    "attacks:\n  - {name: pgd_2, attack: pgd, parameters: {steps: 2}, protocols: [T1], num_draws: 2}\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, migrated_store):
    """A home and the run that was trained there from Python."""
    import shutil

    folder = tmp_path_factory.mktemp("api")
    (folder / "home").mkdir()
    shutil.copy(migrated_store, folder / "home" / "mlflow.db")
    (folder / "short.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder, rayndom.train("ctrw_digits", SMALL, home=folder / "home")


def test_a_training_is_the_commands_and_shows_itself(trained, capsys):
    folder, run = trained
    assert main(["train", "ctrw_digits", *TINY, "--json", "--home", str(folder / "home")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reused"] and (told["fingerprint"], told["mlflow_run"]) == (run.fingerprint, run.mlflow_run)
    assert run.metrics == told["metrics"]
    assert isinstance(run.history, pandas.DataFrame) and list(run.history["epoch"]) == [1]
    assert isinstance(run.figure(), Figure)
    shown = run._repr_html_()
    assert run.fingerprint in shown and "epochs=1" in shown
    x = torch.rand(4, 1, 8, 8)
    model = rayndom.load("ctrw_digits", home=folder / "home")
    assert not torch.equal(model(x), model(x)) and not model.training
    bare = rayndom.load(run, resample_on_forward=False, seed=3)
    assert torch.equal(bare(x), rayndom.load(run.fingerprint, home=folder / "home", resample_on_forward=False, seed=3)(x))


@pytest.mark.slow
def test_an_evaluation_is_kept_like_the_commands(trained):
    folder, run = trained
    found = rayndom.evaluate(run, suite=str(folder / "short.yaml"), num_samples=12, home=folder / "home")
    assert {"attack", "protocol", "accuracy"} <= set(found.frame.columns) and len(found.checks) == 21
    assert (found.page / "report.html").is_file()
    assert all(isinstance(figure, Figure) for figure in found.figures.values())
    assert "pgd_2" in found._repr_html_() and found.conclusion
    metrics = Tracker(rayndom.runs.Home.locate(folder / "home"), "rayndom").client.get_run(run.mlflow_run).data.metrics
    assert math.isclose(metrics["test/robust_accuracy/T1"], found.result.headline.value)


def test_a_module_of_ones_own_is_judged_in_memory(trained):
    folder, _ = trained
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    found = rayndom.evaluate(model, data="digits", suite=str(folder / "short.yaml"), num_samples=10, epsilon="8/255", home=folder / "home")
    assert found.page is None and found.result.finished
    with pytest.raises(UserError, match="data="):
        rayndom.evaluate(model, home=folder / "home")


def test_values_are_read_as_flags_are_and_text_is_never_markup():
    fields = {"a.b": [1, 2], "c": None, "d": True, "e": "8/255", "f": {"g": 1.5}, "h": ["x", "y"]}
    assert as_overrides(fields) == {"a.b": [1, 2], "c": None, "d": True, "e": "8/255", "f": {"g": 1.5}, "h": ["x", "y"]}
    assert as_flags({"a": 1}) == ["--a", "1"]
    with pytest.raises(TypeError, match="a value of a field"):
        as_flags({"a": object()})
    shown = as_html("<b>", {"<i>": "<script>"}, pandas.DataFrame({"x": ["<u>"]}))
    assert "<script>" not in shown and "<b>" not in shown and "<u>" not in shown


def test_mistakes_are_the_commands_and_nothing_heavy_is_imported_before_it_is_asked_for(trained):
    folder, _ = trained
    with pytest.raises(UserError, match="ctrw_digits"):
        rayndom.train("ctrw_digit", home=folder / "home")
    with pytest.raises(UserError, match="'epochs'"):
        rayndom.train("ctrw_digits", {"training.epoch": 1}, home=folder / "home")
    with pytest.raises(AttributeError):
        _ = rayndom.nothing
    assert {"train", "sweep", "evaluate", "reproduce", "load"} <= set(dir(rayndom))
    code = "import sys, rayndom; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"epsilon": "banana"}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": 8}, "8/255"),
        ({"norm": "l7"}, "linf"),
        ({"num_samples": 0}, "at least 1"),
        ({"num_samples": -3}, "at least 1"),
        ({"num_samples": 1.5}, "whole"),
        ({"num_draws": 0}, "at least 1"),
        ({"num_draws": True}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"seed": -1}, "from 0"),
        ({"seed": 2**70}, "from 0"),
        ({"suite": "nothing"}, "unknown suite"),
        ({"data": "nothing"}, "unknown data set"),
    ],
)
def test_numbers_and_names_that_cannot_be_are_one_sentence(asked, said, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UserError, match=said):
        rayndom.evaluate(model, **{"data": "digits", "num_samples": 4, "home": tmp_path} | asked)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_sweep_to_its_end_is_the_commands(trained, capsys):
    """In a process of its own, as a script would: its Ray would stay in this one."""
    folder, _ = trained
    code = (
        "import json, sys, rayndom\n"
        "small = json.loads(sys.argv[1])\n"
        "found = rayndom.sweep('ctrw_digits', small, num_trials=2, evaluate=False, baselines=[], stopping=None, home=sys.argv[2])\n"
        "again = rayndom.sweep('ctrw_digits', small, num_trials=2, evaluate=False, baselines=[], stopping=None, home=sys.argv[2])\n"
        "assert again.winner.fingerprint == found.winner.fingerprint and len(found.study.trials) == 2\n"
        "assert all(plot.is_file() for plot in found.plots) and found.winner.fingerprint in found._repr_html_()\n"
        "print(json.dumps([found.trials['state'].tolist(), found.winner.fingerprint, found.config.name]))\n"
    )
    small = {f"settings.{name}": value for name, value in SMALL.items() if "resources" not in name}
    command = [sys.executable, "-c", code, json.dumps(small), str(folder / "home")]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    states, winner, name = json.loads(done.stdout.splitlines()[-1])
    assert states == ["complete", "complete"]
    assert main(["status", name, "--json", "--home", str(folder / "home")]) == 0
    assert winner in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("item", "trainings"), [("red.parameters", 0), ("rna.fig2a", 1)])
def test_a_table_and_a_figure_are_reproduced_to_their_end(tmp_path, migrated_store, monkeypatch, item, trainings):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = rayndom.reproduce(item, home=tmp_path / "home")
    assert found.outcome.complete and found.problems == ()
    assert len(found.frame) and {"item", "value", "scale"} <= set(found.frame.columns)
    assert all(path.exists() for path in found.files.values()) and item in found._repr_html_()
    assert all(isinstance(figure, Figure) for figure in found.figures.values()) and bool(found.figures) is ("fig" in item)
    assert len(list((tmp_path / "home").glob("runs/*"))) == trainings, "weights are counted without a training"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")))
def test_the_notebooks_run(name, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "text/html" in shown and "image/png" in shown and '"error"' not in shown
