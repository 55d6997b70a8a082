"""What an MLflow user finds: models that load and stay random, tied to their metrics and data, ranked, registered, served."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException

from models import build_model, torch_loading
from models.randomness import resample, seeded
from models.torch_loading import STUB_FILE, write_stub
from models.weights import load_pretrained, save_pretrained
from orchestration.cli import main
from orchestration.tracking.model_format import in_mlflow_format
from orchestration.tracking.system_metrics import system_metrics
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.finished_runs import finish
from tests.orchestration.metric_names import explained, unexplained
from tests.orchestration.services import free_port
from tests.orchestration.sweep_process import ROOT
from tests.orchestration.tiny_home import TINY, trained_home

T1 = "test/robust_accuracy/T1"
SUITE = """\
description: two attacks
num_samples: 20
scoring: {num_selection_draws: 2, num_evaluation_draws: 3, num_known_draws: 2, num_retries: 2, enumerate_up_to: 4}
attacks:
  - {name: fgsm, attack: fgsm, protocols: [T1, T2], num_draws: 2}
  - {name: pgd_2, attack: pgd, parameters: {steps: 2}, protocols: [T0, T1, T2], num_draws: 2}
"""
X = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)


def evaluate(home, recipe, samples):
    suite = str(home.root.parent / "short.yaml")
    return main(["evaluate", recipe, "--suite", suite, "--samples", str(samples), "--home", str(home.root)])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, migrated_store):
    """A home with two evaluated runs of `rayndom train`: a randomized and a deterministic one."""
    folder = tmp_path_factory.mktemp("mlflow_models")
    with trained_home(folder, migrated_store, ("ctrw_digits", "at_digits")) as home:
        (folder / "short.yaml").write_text(SUITE)
        for recipe in ("ctrw_digits", "at_digits"):
            assert evaluate(home, recipe, 20) == 0
        yield home


@pytest.fixture
def store(evaluated, monkeypatch):
    """MLflow as its users point it at the home's store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", evaluated.tracking_uri)
    mlflow.set_tracking_uri(evaluated.tracking_uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def run_of(client, recipe):
    """The run of a recipe in the store."""
    (run,) = client.search_runs(client_experiments(client), f"params.`defence.name` = '{recipe}'")
    return client.get_run(run.info.run_id)


def client_experiments(client):
    return [client.get_experiment_by_name("rayndom").experiment_id]


def test_the_best_model_under_t1_is_one_search_and_loads_as_it_was_trained(evaluated, store):
    found = store.search_logged_models(client_experiments(store), order_by=[{"field_name": f"metrics.{T1}", "ascending": False}])
    values = {run.info.run_id: run.data.metrics[T1] for run in store.search_runs(client_experiments(store))}
    assert len(found) == 2
    assert [values[model.source_run_id] for model in found] == sorted(values.values(), reverse=True)
    for model in found:
        own = {metric.key: metric for metric in model.metrics}
        assert own[T1].value == values[model.source_run_id]
        assert own[T1].dataset_name == "digits test"
        digest = own[T1].dataset_digest
        alone = store.search_logged_models(
            client_experiments(store), f"metrics.`{T1}` >= 0", datasets=[{"dataset_name": "digits test", "dataset_digest": digest}]
        )
        assert model.model_id in {each.model_id for each in alone}
        loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
        fetched = resolve_target(f"models:/{model.model_id}", evaluated)
        assert fetched.experiment is not None and fetched.experiment.name == model.name
        trained = load_pretrained(resolve_target(model.name, evaluated).folder, resample_on_forward=False)
        with torch.no_grad(), seeded(trained, 7):
            expected = trained(torch.from_numpy(X)).numpy()
        np.testing.assert_allclose(loaded.predict(X, params={"seed": 7}), expected, atol=1e-6)


def test_a_run_says_what_it_put_out_and_took_in_and_where_it_came_from(evaluated, store):
    for recipe, name in (("ctrw", "ctrw_digits"), ("at", "at_digits")):
        run = run_of(store, recipe)
        (output,) = run.outputs.model_outputs
        assert store.get_logged_model(output.model_id).name == name
        inputs = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
        assert json.loads(inputs["training"].profile) == {"num_train": 64, "num_validation": 32, "num_test": 40, "num_classes": 10}
        assert json.loads(inputs["test"].profile)["num_test"] == 20
        assert mlflow.data.get_source(inputs["training"]).load
        tags = run.data.tags
        assert tags["mlflow.user"]
        assert tags["mlflow.source.name"]
        assert re.fullmatch(r"[0-9a-f]{40}", tags["mlflow.source.git.commit"])
        assert tags["environment.code.commit"] == tags["mlflow.source.git.commit"]
        assert tags["environment.code.dirty"] in ("True", "False")
        assert tags["environment.hardware.gpus"] == "none" or "GiB" in tags["environment.hardware.gpus"]
        assert tags["mlflow.runName"].startswith(f"{name} ") and "epochs=1" in tags["mlflow.runName"]
        kept = {item.path for item in store.list_artifacts(run.info.run_id, "evaluation/short")}
        assert "evaluation/short/report.html" in kept
    assert store.get_experiment(client_experiments(store)[0]).tags["mlflow.experimentKind"] == "custom_model_development"


def test_models_of_both_kinds_share_their_columns(store):
    random, deterministic = (run_of(store, recipe).data.metrics for recipe in ("ctrw", "at"))
    worst = [f"test/robust_accuracy/{protocol}" for protocol in ("T0", "T1", "T2")]
    attacks = {name.split("/")[1] for name in deterministic if re.fullmatch(r"test/[^/]+/T1", name)} - {"robust_accuracy"}
    assert attacks
    for attack in attacks:
        assert len({deterministic[f"test/{attack}/{protocol}"] for protocol in ("T0", "T1", "T2")}) == 1
    for name in worst:
        assert name in random and name in deterministic
    assert len({deterministic[name] for name in worst}) == 1
    t2 = [value for name, value in random.items() if name.startswith("test/") and name.endswith("/T2") and "robust_accuracy" not in name]
    assert random["test/robust_accuracy/T2"] == min(t2)


def test_every_metric_is_explained_and_the_page_names_no_other(evaluated, store):
    logged = {name for run in store.search_runs(client_experiments(store)) for name in run.data.metrics}
    assert unexplained(logged) == []
    for name, pattern in explained().items():
        # What every training of these two kinds logs stands under its own name on the page, and is logged.
        if "<" not in name and name.startswith(("validation/", "time/", "test/", "train/learning_rate")):
            assert any(pattern.fullmatch(each) for each in logged), name


@pytest.mark.slow
def test_nothing_is_logged_twice(evaluated, store):
    before = {run.info.run_id: dict(run.data.metrics) for run in store.search_runs(client_experiments(store))}
    models = len(store.search_logged_models(client_experiments(store)))
    for recipe in ("ctrw_digits", "at_digits"):
        assert main(["train", recipe, *TINY, "--home", str(evaluated.root)]) == 0
        assert evaluate(evaluated, recipe, 20) == 0
    assert len(store.search_logged_models(client_experiments(store))) == models
    for run_id, metrics in before.items():
        for name in metrics:
            if not name.startswith("system/"):
                assert len(store.get_metric_history(run_id, name)) == 1, name
        assert len(store.get_run(run_id).inputs.dataset_inputs) == 2


def test_a_randomized_model_stays_random_in_every_flavour(evaluated, store):
    uri = f"models:/{run_of(store, 'ctrw').outputs.model_outputs[0].model_id}"
    loaded, again = mlflow.pyfunc.load_model(uri), mlflow.pyfunc.load_model(uri)
    assert not np.array_equal(loaded.predict(X), loaded.predict(X))
    assert not np.array_equal(loaded.predict(X), again.predict(X)), "two servers do not draw alike"
    fixed = [loaded.predict(X, params={"seed": 3, "draws": 4}) for _ in range(2)]
    assert np.array_equal(*fixed)
    trained = load_pretrained(resolve_target("ctrw_digits", evaluated).folder, resample_on_forward=False)
    with torch.no_grad(), seeded(trained, 3):
        logits = [trained(torch.from_numpy(X))]
        for _ in range(3):
            resample(trained)
            logits.append(trained(torch.from_numpy(X)))
    mean = torch.stack([each.softmax(1) for each in logits]).mean(0)
    np.testing.assert_allclose(fixed[0], mean.log().numpy(), atol=1e-5)
    assert not np.array_equal(loaded.predict(X), loaded.predict(X)), "a seed of one call leaves the next ones random"
    module = mlflow.pytorch.load_model(uri)
    assert isinstance(module, torch.nn.Module) and not module.training
    assert not torch.equal(module(torch.from_numpy(X)), module(torch.from_numpy(X)))
    plain = mlflow.pyfunc.load_model(f"models:/{run_of(store, 'at').outputs.model_outputs[0].model_id}")
    assert np.array_equal(plain.predict(X), plain.predict(X, params={"draws": 3}))


def test_what_a_model_cannot_be_asked_is_refused(store):
    loaded = mlflow.pyfunc.load_model(f"models:/{run_of(store, 'ctrw').outputs.model_outputs[0].model_id}")
    for params, word in (({"draws": 0}, "draws"), ({"seed": -2}, "seed")):
        with pytest.raises(Exception, match=word):
            loaded.predict(X, params=params)
    with pytest.raises(Exception, match=r"\[0,1\]"):
        loaded.predict(255 * X)
    with pytest.raises(MlflowException):
        loaded.predict(X[:, :, :4])


def test_a_logged_model_names_its_environment_and_no_place_of_this_machine(evaluated, store):
    uri = f"models:/{run_of(store, 'ctrw').outputs.model_outputs[0].model_id}"
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} >= {"torch", "safetensors", "numpy", "mlflow"}
    assert all(re.fullmatch(r"[\w.\-]+==[\w.]+", pin) for pin in pins)
    text = (folder / "MLmodel").read_text()
    assert str(ROOT) not in text and "/tmp" not in text
    described = yaml.safe_load(text)
    assert described["signature"]["params"] and described["saved_input_example_info"]["type"] == "ndarray"
    example = json.loads((folder / "input_example.json").read_text())
    assert mlflow.pyfunc.load_model(str(folder)).predict(np.array(example, dtype=np.float32)).shape == (1, 10)


@pytest.mark.slow
def test_a_model_loads_where_rayndom_is_not_installed(tmp_path):
    """From the copy of `models` beside the weights: another Python without this checkout on its path."""
    model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8))
    save_pretrained(model, tmp_path / "model", card="a card\n")
    code = (
        "import sys, importlib.abc\n"
        f"root = {str(ROOT)!r}\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "sys.path = [p for p in sys.path if p not in ('', root)]\n"
        "import mlflow, numpy as np\n"
        "loaded = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "x = np.zeros((2, 1, 8, 8), np.float32)\n"
        "assert not np.array_equal(loaded.predict(x), loaded.predict(x))\n"
        "import models; print(models.__file__)\n"
    )
    with in_mlflow_format(tmp_path / "model") as folder:
        done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(str(folder.resolve())), done.stdout


def test_torch_load_reads_the_stub_and_nothing_else(tmp_path):
    model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8)).eval()
    save_pretrained(model, tmp_path, card="a card\n")
    write_stub(tmp_path)
    loaded = torch.load(tmp_path / STUB_FILE, pickle_module=torch_loading)
    with seeded(model, 1):
        expected = model(torch.from_numpy(X))
    with seeded(loaded.model, 1):
        assert torch.equal(loaded.model(torch.from_numpy(X)), expected)
    (tmp_path / STUB_FILE).write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError):
        torch.load(tmp_path / STUB_FILE, pickle_module=torch_loading)


def test_the_registered_champion_is_the_best_that_was_measured_alike(home, tmp_path):
    """Models with a T1 each, in a shuffled order; one is marked, one measured elsewhere: neither wears the crown."""
    facts = [(0.30, False, "digits"), (0.50, False, "digits"), (0.99, True, "digits"), (0.90, False, "cifar10")]
    tracker = Tracker(home, "rayndom")
    champions = []
    for seed, (accuracy, marked, data) in enumerate(facts, start=1):
        experiment = finish(home, "at_digits", "--seed", str(seed), kind="run", weights_seed=seed)
        config = home.run(experiment.fingerprint) / "model" / "config.json"
        content = json.loads(config.read_text())
        content["details"]["evaluation"] = {
            "suite": "quick", "finished": True, "marked": marked, "basis": "first look", "rows": [], "verdicts": [], "markdown": "",
            "headline": {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.01, "num_samples": 100, "num_draws": 10},
            "settings": {"data": {"name": data}, "threat_model": {"norm": "linf", "epsilon": 0.1}}, "remarks": [],
        }  # fmt: skip
        config.write_text(json.dumps(content))
        to = tmp_path / str(seed)
        assert main(["export", experiment.fingerprint, "--to", str(to), "--register", "m", "--home", str(home.root)]) == 0
        champions.append(int(tracker.client.get_model_version_by_alias("m", "champion").version))
    assert champions == [1, 2, 2, 2]
    version = tracker.client.get_model_version("m", "3")
    assert (version.tags["rayndom.T1"], version.tags["rayndom.marked"]) == ("0.99", "True")
    mlflow.set_tracking_uri(home.tracking_uri)
    try:
        assert mlflow.pyfunc.load_model("models:/m@champion").predict(X).shape == (5, 10)
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_an_evaluation_after_the_registration_reaches_the_version(evaluated, store, tmp_path):
    where = ["--home", str(evaluated.root)]
    assert main(["export", "at_digits", "--to", str(tmp_path / "out"), "--register", "late", *where]) == 0
    before = store.get_model_version("late", "1").tags["rayndom.num_samples"]
    assert evaluate(evaluated, "at_digits", 30) == 0
    after = store.get_model_version("late", "1")
    assert (before, after.tags["rayndom.num_samples"]) == ("20", "30")
    assert math.isclose(float(after.tags["rayndom.T1"]), run_of(store, "at").data.metrics[T1])


@pytest.mark.parametrize("wanted", [True, False])
def test_system_metrics_are_logged_where_they_are_asked_for(home, monkeypatch, wanted):
    monkeypatch.setattr("orchestration.tracking.system_metrics.INTERVAL_S", 0.05)
    tracker = Tracker(home, "rayndom")
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    with system_metrics(tracker, run_id, wanted=wanted):
        deadline = time.monotonic() + (20 if wanted else 0.3)
        while time.monotonic() < deadline and not (found := tracker.client.get_run(run_id).data.metrics):
            time.sleep(0.1)
    assert any(name.startswith("system/cpu") for name in found) is wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow_serves_the_model_and_it_draws_at_each_request(evaluated, store):
    uri, port = f"models:/{run_of(store, 'ctrw').outputs.model_outputs[0].model_id}", free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "-p", str(port), "-h", "127.0.0.1", "--env-manager", "local"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": evaluated.tracking_uri,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(words, env=environment, start_new_session=True)

    def ask(**params):
        body = json.dumps({"inputs": X.tolist(), **({"params": params} if params else {})}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return np.array(json.load(answer)["predictions"])

    try:
        deadline = time.monotonic() + 300
        while True:
            assert time.monotonic() < deadline and process.poll() is None
            try:
                first = ask()
                break
            except OSError:
                time.sleep(1)
        assert first.shape == (5, 10)
        assert not np.array_equal(first, ask())
        assert np.array_equal(ask(draws=3, seed=1), ask(draws=3, seed=1))
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
