"""A defence outside the repository: found by its folder or its entry point, trained like the others, and its code is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import plugins
from models.errors import UserError
from models.randomness import num_configurations
from models.registry import DefenceModel, build_model, list_defences
from models.registry_files import scan
from orchestration.cli import main
from orchestration.recipes import list_recipes, load_recipe
from orchestration.training.cluster import _runtime_with_plugins
from tests.orchestration.sweep_process import ROOT
from tests.orchestration.tiny_home import TINY
from trainers.data import DATASETS

EXAMPLE = ROOT / "examples" / "random_resizing"


@pytest.fixture
def clean(monkeypatch):
    """No plug-in before and after, and no folder of one that can be imported."""
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("rayndom_", "plug")):
            del sys.modules[name]
    plugins._found.cache_clear()


def written(folder: Path, **files: str) -> Path:
    """A plug-in's folder with these modules."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_the_example_is_a_defence_like_the_others_and_gone_without_its_flag(clean, home, capsys):
    with plugins.using([str(EXAMPLE)]):
        assert "random_resizing" in list_defences()
        assert "random_resizing_digits" in list_recipes()
        assert load_recipe("random_resizing_digits").experiment.training.objective.name == "adversarial"
        model = build_model("random_resizing", backbone="resnet8", num_classes=4, image_shape=(3, 8, 8), growth=1.5)
        # Sides 8 to 11 in a square of 12: 25 + 16 + 9 + 4 places.
        assert num_configurations(model) == 54
        site = model.backbone.taps["0"]
        assert sum(site.configuration_probability(index) for index in range(54)) == pytest.approx(1)
    assert "random_resizing" not in list_defences()
    with pytest.raises(UserError, match="RAYNDOM_PLUGINS=FOLDER"):
        build_model("a_defence_of_somebody_else")
    assert main(["show", "random_resizing_digits", "--home", str(home.root)]) == 2
    assert "random_resizing" in capsys.readouterr().err


def test_a_plugin_is_trained_and_changed_code_is_said_and_trained_anew_only_if_asked(clean, home, tmp_path, capsys):
    assert main(["new", "defence", "plugged_noise", "--to", str(tmp_path / "mine"), "--home", str(home.root)]) == 0
    network = tmp_path / "mine" / "rayndom_plugged_noise" / "network.py"
    capsys.readouterr()
    words = ["train", "plugged_noise_digits", *TINY, "--plugin", str(tmp_path / "mine"), "--home", str(home.root)]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    first = json.loads(said.out)
    assert not first["reused"]
    assert f"rayndom evaluate {first['mlflow_run']} --suite quick --plugin {tmp_path / 'mine'}" in said.err, "what is copied works"
    assert main([*words, "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["reused"] and "changed since" not in again.err
    network.write_text(network.read_text().replace("Take a new draw.", "Take another draw."))
    assert main([*words, "--json"]) == 0
    changed = capsys.readouterr()
    found = json.loads(changed.out)
    assert found["reused"] and found["fingerprint"] == first["fingerprint"]
    assert "rayndom_plugged_noise.network changed since" in changed.err and "--retrain" in changed.err
    assert main([*words, "--json", "--retrain"]) == 0
    retrained = json.loads(capsys.readouterr().out)
    assert not retrained["reused"] and retrained["mlflow_run"] != first["mlflow_run"]
    assert main([*words, "--json", "--retrain"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"], "the code is the one it was trained with"
    assert main(["new", "defence", "plugged_noise", "--to", str(tmp_path / "mine"), "--home", str(home.root)]) == 2


def test_an_entry_point_makes_an_installed_package_a_plugin(clean, tmp_path, monkeypatch):
    written(tmp_path / "plug_installed", __init__="", parts="DATA_SETS = ()\n")
    info = tmp_path / "plug_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rayndom.plugins]\nanything = plug_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._found.cache_clear()
    (found,) = plugins.plugins()
    assert (found.module, found.is_installed) == ("plug_installed", True)
    assert list(found.sources) == ["plug_installed", "plug_installed.parts"]
    assert _runtime_with_plugins({}) == {}, "workers have what is installed"


@pytest.mark.parametrize(
    ("files", "named", "place"),
    [
        (["plug_sent/__init__.py"], "plug_sent", "plug_sent"),
        (["plug_sent.py"], "plug_sent", "plug_sent.py"),
        (["plug_sent/__init__.py", "plug_sent/inner/__init__.py"], "plug_sent.inner", "plug_sent"),
        (["plug_sent/__init__.py", "plug_sent/inner.py"], "plug_sent.inner", "plug_sent"),
    ],
)
def test_the_workers_of_another_machine_are_sent_a_folder_or_a_file(clean, tmp_path, monkeypatch, files, named, place):
    for each in files:
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text("")
    if "." in named:
        monkeypatch.syspath_prepend(str(tmp_path))
    with plugins.using([named if "." in named else str(tmp_path / place)]):
        here = _runtime_with_plugins({})["runtime_env"]
        there = _runtime_with_plugins({"env_vars": {"A": "b"}}, elsewhere=True)["runtime_env"]
    assert here == {"worker_process_setup_hook": "models.plugins.prepare_worker"}
    assert there["py_modules"] == [str(tmp_path / place)]
    assert there["env_vars"] == {"A": "b", plugins.VARIABLE: named}


def test_only_modules_that_mention_a_tuple_are_imported(clean, tmp_path):
    folder = written(tmp_path / "plug_lazy", __init__="", network="DEFENCE_MODELS = ()\n", search="raise RuntimeError('not asked for')\n")
    with plugins.using([str(folder)]):
        scan("models.defences", "DEFENCE_MODELS", DefenceModel)
        assert "plug_lazy.network" in sys.modules and "plug_lazy.search" not in sys.modules


BROKEN = {
    "cannot be imported": "import nothing_of_this_name  # DEFENCE_MODELS\n",
    "should be a tuple of DefenceModel": "DEFENCE_MODELS = (1,)\n",
    "it keeps it": "from models.defences.ctrw import DEFENCE_MODELS as ours\nDEFENCE_MODELS = ours\n",
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_broken_plugin_hides_nothing_and_says_why(clean, tmp_path, caplog, why):
    ours = list_defences()
    folder = written(tmp_path / f"plug_{list(BROKEN).index(why)}", __init__="", network=BROKEN[why])
    with plugins.using([str(folder)]):
        assert list_defences() == ours
        with pytest.raises(UserError, match=why):
            build_model("no_such_defence")
    assert why in caplog.text


@pytest.mark.parametrize("named", ["./nowhere", "no_such_module_at_all", "json/", "a-b"])
def test_what_is_no_plugin_is_one_error_before_anything_begins(clean, home, tmp_path, monkeypatch, capsys, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "a-b").mkdir()
    assert main(["list", "defences", "--plugin", named, "--home", str(home.root)]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and len(error.strip().splitlines()) == 1, error
    assert plugins.VARIABLE not in os.environ


def test_a_plugin_brings_data_sets_and_suites(clean, tmp_path):
    text = (
        "import torch\nfrom trainers.data.array_files import RawImages\nfrom trainers.data.sets import DatasetInfo\n"
        "def read(root):\n    x = (torch.arange(640).view(40, 1, 4, 4) % 251).to(torch.uint8)\n    y = torch.arange(40) % 2\n"
        "    return RawImages(x, y, x[:10], y[:10], ('a', 'b'))\n"
        "DATA_SETS = (DatasetInfo('stripes', 'made', 2, (1, 4, 4), (0.5,), (0.25,), read=read),)\n"
    )
    folder = written(tmp_path / "plug_data", __init__="", sets=text)
    (folder / "suites").mkdir()
    (folder / "suites" / "mine.yaml").write_text((ROOT / "analysis/evaluation/suites/quick.yaml").read_text())
    from analysis.evaluation.suites import list_suites, load_suite
    from trainers.data import DataConfig, load_data

    with plugins.using([str(folder)]):
        assert "stripes" in DATASETS
        splits = load_data(DataConfig(name="stripes", validation_size=8), tmp_path)
        assert (len(splits.train), len(splits.test), splits.class_names) == (32, 10, ("a", "b"))
        assert "mine" in list_suites() and load_suite("mine").name == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("made", ["example", "new"])
def test_the_conformance_suite_passes_as_the_author_of_a_plugin_runs_it(tmp_path, made):
    folder = EXAMPLE
    if made == "new":
        folder = tmp_path / "mine"
        assert main(["new", "defence", "fresh_noise", "--to", str(folder), "--home", str(tmp_path / "home")]) == 0
    environment = os.environ | {plugins.VARIABLE: str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].rpartition("\n")[2].split()[-1]) >= 20


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_trials_of_a_sweep_know_a_plugin_that_is_a_folder(tmp_path, migrated_store):
    settings = "".join(f"  {TINY[i].removeprefix('--')}: {TINY[i + 1]}\n" for i in range(0, len(TINY), 2) if "resources" not in TINY[i])
    sweep = f"recipe: random_resizing_digits\nnum_trials: 2\nsettings:\n{settings}space:\n"
    sweep += "  defence.growth: {type: float, low: 1.3, high: 1.6}\n"
    (tmp_path / "small.yaml").write_text(sweep)
    command = [
        sys.executable,
        "-m",
        "orchestration.cli",
        "sweep",
        str(tmp_path / "small.yaml"),
        "--no-evaluation",
        "--plugin",
        str(EXAMPLE),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [*command, "--home", str(tmp_path / "home")], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    export = json.loads((tmp_path / "home" / "exports" / "small" / "config.json").read_text())
    assert export["model"]["defence"] == "random_resizing"
