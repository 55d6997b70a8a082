"""Networks that Rayndom did not build: named by code or a file, with weights that are read without executing code."""

from __future__ import annotations

import contextlib
import pickle
import random
import string

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.errors import UserError
from models.external.source import ExternalModel, external_model, is_external_reference
from models.external.state_files import PREFIXES, STATE_KEYS, load_state
from models.file_content import existing_file
from models.forward_randomness import as_random_model

CODE = """
import torch
from torch import nn

from beside import WIDTH


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 10))
        self.register_buffer("projection", torch.randn(3), persistent=False)

    def forward(self, x):
        return self.body(x)


class Models:
    small = Net


def build():
    print("built")
    return Net()


def given(width):
    return Net()


def raises():
    raise KeyError("no such thing")


def leaves():
    raise SystemExit(3)


def text():
    return "network"


network = Net()
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of code and weights, in which the test is."""
    (tmp_path / "my_model.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "broken.py").write_text("def build():\n    return (\n")
    (tmp_path / "fails.py").write_text("import math\n\nmath.sqrt(-1)\n")
    monkeypatch.chdir(tmp_path)
    network = external_model("my_model.py:build").load(seed=7)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    return tmp_path


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_callable_gives_the_same_network_wherever_it_is_loaded(folder, monkeypatch, capsys):
    before = torch.get_rng_state()
    named = [external_model(f"my_model.py:{name}", "w.safetensors") for name in ("build", "Net", "Models.small")]
    monkeypatch.chdir("/")
    networks = [pickle.loads(pickle.dumps(model)).load() for model in named]
    assert torch.equal(torch.get_rng_state(), before)
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert same(state_of(network), state_of(networks[0]))
        assert torch.equal(network.projection, networks[0].projection)  # drawn when it is built
    out, err = capsys.readouterr()
    assert out == "" and "built" in err  # results alone go to the output


def test_a_module_is_found_in_the_folder_where_it_was_named(folder, monkeypatch):
    (folder / "package_of_mine").mkdir()
    (folder / "package_of_mine" / "networks.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 2)\n")
    model = external_model("package_of_mine.networks:build")
    monkeypatch.chdir("/")
    assert isinstance(model.load(), nn.Linear)
    assert len(model.source_digest) == 64


def test_weights_are_read_from_every_form_that_is_documented(folder):
    network = external_model("my_model.py:build", "w.safetensors").load()
    wanted = state_of(network)
    torch.manual_seed(0)
    forms = [{key: wanted, "epoch": 3} for key in STATE_KEYS] + [
        {f"{prefix}{name}": v for name, v in wanted.items()} for prefix in PREFIXES
    ]
    forms += [{"state_dict": {f"module.model.{name}": value for name, value in wanted.items()}}]
    forms += [{name: value for name, value in wanted.items() if not name.endswith("num_batches_tracked")}]
    for form in forms:
        torch.save(form, folder / "form.pt")
        other = external_model("my_model.py:build", "form.pt").load(seed=9)
        assert same({n: v for n, v in state_of(other).items()}, wanted)
    inner = nn.Linear(2, 2)
    torch.save(inner.state_dict(), folder / "inner.pt")
    wrapped = as_random_model(nn.Linear(2, 2))
    load_state(wrapped, folder / "inner.pt")
    assert same(state_of(wrapped.network), state_of(inner))
    torch.save(wrapped.state_dict(), folder / "wrapped.pt")
    plain = nn.Linear(2, 2)
    load_state(plain, folder / "wrapped.pt")
    assert same(state_of(plain), state_of(inner))


class Executes:
    """What a hostile file of weights would hold."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


@pytest.mark.parametrize("name", ["hostile.pt", "hostile.bin", "hostile.pth"])
def test_no_code_in_a_file_of_weights_is_executed(folder, name):
    torch.save({"state_dict": Executes()}, folder / name)
    with pytest.raises(UserError, match="would execute code"):
        external_model("my_model.py:build", name).load()
    assert not (folder / "executed").exists()


def test_weights_that_do_not_fit_are_one_error_with_the_nearest_names(folder):
    state = state_of(external_model("my_model.py:build", "w.pth").load())
    cases = {
        "body.1.weigth": {("body.1.weigth" if name == "body.1.weight" else name): value for name, value in state.items()},
        r"near: body\.1\.weigth": {("body.1.weigth" if name == "body.1.weight" else name): value for name, value in state.items()},
        r"body\.3\.weight is \(10, 5\), the network's is \(10, 6\)": state | {"body.3.weight": torch.zeros(10, 5)},
        "not finite": state | {"body.3.bias": torch.full((10,), torch.nan)},
        "not the network's: more": state | {"more": torch.zeros(1)},
        "weights must be at the top": {"weights": state, "epoch": 3},
        "several sets": {"model": state, "state_dict": state},
        "holds a list": [1, 2],
    }
    for words, content in cases.items():
        torch.save(content, folder / "other.pt")
        with pytest.raises(UserError, match=words):
            external_model("my_model.py:build", "other.pt").load()


@pytest.mark.parametrize(
    ("reference", "weights", "words"),
    [
        ("my_modle.py:build", None, "Did you mean 'my_model.py'"),
        ("my_model.py:buidl", None, "Did you mean 'build'"),
        ("my_model.py:Models.smal", None, "'small'"),
        ("my_model.py", None, "my_model.py:build"),
        ("my_model.py:", None, "callable"),
        ("my_model.py:2", None, "no name of a callable"),
        ("my_model.py:build", "w.safetensor", "Did you mean 'w.safetensors'"),
        ("my_model.py:build", "beside.py", "cannot read the weights|would execute"),
        ("my_model.py:build", ".", "it is a folder"),
        ("my_model.py:given", None, "TypeError.*called without arguments"),
        ("my_model.py:raises", None, r"KeyError.*\(line 32\)"),
        ("my_model.py:leaves", None, "SystemExit"),
        ("my_model.py:text", None, "returned a str"),
        ("my_model.py:number", None, "is a int"),
        ("my_model.py:network", None, "is a network"),
        ("broken.py:build", None, "SyntaxError"),
        ("fails.py:build", None, r"ValueError.*\(line 3\)"),
        ("no_such_module:build", None, "no module 'no_such_module'"),
        ("timm:resnet1", "w.pth", "'resnet18'"),
        ("timm:resnet18", None, "needs --weights"),
        ("w.pth", None, "no TorchScript file"),
        ("w.pth", "w.pth", "weights inside"),
        ("no.pt2", None, "there is no file"),
        ("beside.pt2", None, "there is no file.*'beside.py'"),
    ],
)
def test_what_cannot_be_loaded_is_one_error(folder, reference, weights, words):
    with pytest.raises(UserError, match=words) as caught:
        external_model(reference, weights, num_classes=10, image_shape=(1, 8, 8)).load()
    assert "\n" not in str(caught.value)


def test_any_text_is_a_reference_or_not_and_damaged_files_are_errors(folder):
    chance = random.Random(5)
    for _ in range(300):
        text = "".join(chance.choices(string.printable + "::..//é\0", k=chance.randrange(30)))
        for ending in ("", ".py", ":x", ".pt", ".pt2", ".py:build"):
            if is_external_reference(text + ending):
                with pytest.raises(UserError):
                    external_model(text + ending).load()
    for target in ("models:/name@champion", "ctrw_digits", "5a632dea00def935", "exports/x", "hf://owner/name", ".", "a.yaml"):
        assert not is_external_reference(target)
    whole = (folder / "w.pth").read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 30)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (folder / "damaged.pt").write_bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.5 else damaged)
        for reference, weights in (("my_model.py:build", "damaged.pt"), ("damaged.pt", None)):
            with contextlib.suppress(UserError):  # a changed byte of a weight is none that can be seen
                external_model(reference, weights).load()


def test_programs_answer_as_the_network_that_they_were_made_of(folder):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5)).eval()
    x = torch.rand(4, 1, 8, 8)
    torch.jit.trace(network, x).save(folder / "traced.pt")
    torch.jit.freeze(torch.jit.script(network)).save(folder / "frozen.ts")
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), folder / "exported.pt2")
    for name in ("traced.pt", "frozen.ts", "exported.pt2"):
        model = external_model(name)
        program = model.load()
        for mode in (True, False):
            program.train(mode)
            torch.testing.assert_close(program(x[:3]), network(x[:3]))
        assert not any(module.training for module in program.modules())
        assert isinstance(ExternalModel.model_validate_json(model.model_dump_json()), ExternalModel)
        assert "execute" in model.executes


def test_a_network_of_timm_takes_pixels_and_its_own_weights(folder):
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    own = timm.create_model("test_resnet", num_classes=10, in_chans=3).eval()
    torch.save(own.state_dict(), folder / "timm.pt")
    network = external_model("timm:test_resnet", "timm.pt", num_classes=10, image_shape=(3, 32, 32)).load()
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(own.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(network(x), own((x - mean) / std), rtol=1e-4, atol=1e-5)


def test_hidden_files_are_not_what_was_meant(tmp_path):
    for name in (".git", "w2.pt"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"Did you mean 'w2\.pt'\?$"):
        existing_file(tmp_path / "w.pt", "--weights")
