"""What a person sees in a browser: the documented minute of docs/mlflow.md on a real server, and pages in the dark and on a phone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest

from orchestration.cli import main
from tests.orchestration.browser import Browser
from tests.orchestration.services import Service, answers, free_port
from tests.orchestration.sweep_process import ROOT
from tests.orchestration.test_mlflow_models import SUITE, T1, X, evaluate
from tests.orchestration.tiny_home import TINY, trained_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MINUTE = (ROOT / "docs" / "mlflow.md").read_text().partition("## What is logged")[0]
STORE = "sqlite:////absolute/path/to/rayndom_home/mlflow.db"
RECIPES = ("ctrw_digits", "at_digits")


def blocks(language: str) -> list[str]:
    """The code of the documented minute, in order."""
    return [text for of, text in re.findall(r"^```(\w*)\n(.*?)^```$", MINUTE, re.DOTALL | re.MULTILINE) if of == language]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, migrated_store):
    """A home with a randomized and a deterministic model, evaluated; they need not be good."""
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch, trained_home(folder, migrated_store, ()) as home:
        for recipe in RECIPES:  # as if it were typed
            patch.setattr(sys, "argv", ["rayndom", "train", recipe, "--threat_model.epsilon", "8/255"])
            assert main(["train", recipe, *TINY, "--home", str(home.root)]) == 0
        (folder / "short.yaml").write_text(SUITE)
        for recipe in RECIPES:
            assert evaluate(home, recipe, 20) == 0
        yield home


@pytest.fixture(scope="module")
def server(evaluated, tmp_path_factory):
    """The address that `rayndom ui` prints, while it runs."""
    folder, port = tmp_path_factory.mktemp("ui"), free_port()
    command = [sys.executable, "-m", "orchestration.cli", "ui", "--home", str(evaluated.root), "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT)}
    with Service(command, folder / "log", lambda: answers(f"http://127.0.0.1:{port}/health"), environment=environment) as running:
        yield re.search(r"http://\S+", (folder / "log").read_text())[0]
        assert running.process is not None
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def test_the_best_checkpoint_under_t1_is_found_loaded_and_served(evaluated, server, tmp_path):
    store = server.partition("/#")[0]
    search, use = blocks("python")
    (serve,) = blocks("")
    assert STORE in search and STORE in serve and "MODEL_ID" in serve
    told = (
        "import json; print(json.dumps([best.model_id, best.name, best.tags['rayndom.marked'], logits.shape, (averaged == again).mean()]))"
    )
    code = "\n".join([search.replace(STORE, store), "import numpy as np", "images = np.load('images.npy')", use, told])
    np.save(tmp_path / "images.npy", X)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model_id, name, marked, shape, _ = json.loads(done.stdout.splitlines()[-1])
    assert shape == [5, 10] and marked in ("True", "False") and name in RECIPES

    client = mlflow.MlflowClient(store)
    (experiment,) = [each for each in client.search_experiments() if each.name == "rayndom"]
    runs = {run.data.tags["mlflow.runName"].split()[0]: run for run in client.search_runs([experiment.experiment_id])}
    values = {each: run.data.metrics[T1] for each, run in runs.items()}
    assert values[name] == max(values.values())

    with Browser(tmp_path) as browser:
        shown = browser.look("runs", server, *RECIPES, "2 matching runs", "digits test")
        assert "Model registry" in shown and "Judges" not in shown, "the view of model training, not of agents"
        assert all(f"rayndom train {recipe}" in shown for recipe in RECIPES), "the column Source"
        models = f"{store}/#/experiments/{experiment.experiment_id}/models"
        browser.look("models", models, *RECIPES, "Ready")
        page = browser.look("model", f"{models}/{model_id}", T1, "digits test", "Parameters")
        row = page.partition(f"{T1}\n")[2].split("\n")[:3]
        assert f"{values[name]:g}" in [f"{float(word):g}" for word in row if re.fullmatch(r"[\d.e-]+", word)], row
        run = f"{store}/#/experiments/{experiment.experiment_id}/runs/{runs[name].info.run_id}"
        browser.look("run", run, f"rayndom train {name}", "Logged models", "rayndom.evaluation", "Created by")
        browser.look("page", f"{run}/artifacts/evaluation/short/report.html", "report.html", inside="pgd_2")

    port = free_port()
    command = serve.strip().replace(STORE, store).replace("MODEL_ID", model_id) + f" --host 127.0.0.1 --port {port}"
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with Service(
        ["bash", "-c", command], tmp_path / "serve.log", lambda: answers(f"http://127.0.0.1:{port}/ping"), environment=environment
    ):
        for params in ({}, {"draws": 20}):
            body = json.dumps({"inputs": X.tolist(), "params": params}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                assert np.array(json.load(answer)["predictions"]).shape == (5, 10)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_an_evaluation_fits_a_phone_by_day_and_by_night(evaluated, tmp_path, dark):
    page = min(evaluated.root.glob("evaluations/*/report-short/report.html"))
    with Browser(tmp_path) as browser:
        browser.pretend(390, 844, dark=dark)
        browser.look("phone", page.as_uri(), "T1")
        assert browser.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert bool(browser.picture("phone").mean() < 128) is dark
