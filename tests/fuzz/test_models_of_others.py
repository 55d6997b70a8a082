"""Models that Rayndom did not train: code, files of weights and programs that are not what they should be, in `evaluate` and as initial
weights. One message that names the model or the file; no code is executed that is not the user's own."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from analysis.fingerprints import weights_hash
from models import build_model
from models.errors import UserError
from models.external.state_files import read_state, without_prefixes
from models.initial_weights import begin_with
from orchestration.home import Home
from orchestration.trained_models.initial_weights import initial_weights
from tests.fuzz.command_line import PATIENCE_S, SEED, Hang, complaint, no_longer_than, rayndom
from trainers.config import TrainingConfig

FEW, MANY = 25, 600
FIRST_S = 90
CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(64, 10)

    def forward(self, x):
        return self.f(x.flatten(1))


class Outputs:
    pass


class Tuple(Net):
    def forward(self, x): return (super().forward(x), 1)
class Dictionary(Net):
    def forward(self, x): return {"logits": super().forward(x)}
class Text(Net):
    def forward(self, x): return "x"
class Nothing(Net):
    def forward(self, x): return None
class Raises(Net):
    def forward(self, x): raise IndexError("deep inside")
class Labels(Net):
    def forward(self, x): return super().forward(x).argmax(1)
class Half(Net):
    def forward(self, x): return super().forward(x).half()
class Complex(Net):
    def forward(self, x): return super().forward(x).to(torch.complex64)
class Numpy(Net):
    def forward(self, x): return super().forward(x).detach().numpy()
class List(Net):
    def forward(self, x): return super().forward(x).tolist()
class Exits(Net):
    def forward(self, x): raise SystemExit(2)
class Infinite(Net):
    def forward(self, x): return super().forward(x) / 0
class OneClass(Net):
    def forward(self, x): return super().forward(x)[:, :1]
class NoClass(Net):
    def forward(self, x): return super().forward(x)[:, :0]
class Three(Net):
    def forward(self, x): return super().forward(x)[:, :3]
class Thirty(Net):
    def forward(self, x): return super().forward(x).repeat(1, 3)
class OneRow(Net):
    def forward(self, x): return super().forward(x)[:1]
class Flat(Net):
    def forward(self, x): return self.f(x.flatten())
class Picture(Net):
    def forward(self, x): return x
class Inference(Net):
    @torch.inference_mode()
    def forward(self, x): return super().forward(x)
class Lazy(nn.Module):
    def __init__(self): super().__init__(); self.f = nn.LazyLinear(10)
    def forward(self, x): return self.f(x.flatten(1))
class Meta(nn.Module):
    def __init__(self): super().__init__(); self.f = nn.Linear(64, 10, device="meta")
    def forward(self, x): return self.f(x.flatten(1))
class Nan(Net):
    def __init__(self): super().__init__(); self.f.weight.data.fill_(float("nan"))
class NoParameter(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :10]
class Double(Net):
    def __init__(self): super().__init__(); self.double()
class Cuda(Net):
    def forward(self, x): return super().forward(x.to("cuda"))
class Extra(Net):
    def get_extra_state(self): return {"a": 1}
    def set_extra_state(self, state): pass
class Whole(Net):
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.tensor([1]), requires_grad=False)


def number(): return 5
def nothing(): return None
def argument(x): return x
def raises(): raise KeyError("finished_epochs")
def exits(): raise SystemExit(3)
def deep(): return deep()
def drawn(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
value = 7
'''  # fmt: skip
SOURCES = (
    "def build(:\n", "import nowhere_at_all\n", "raise SystemExit\n", "\0", "1/0\n", "def build():\n  return 3\n",
    "\xff\xfe", "", "raise MemoryError\n", "def f(): f()\nf()\n", "build = None\n", "import sys\nbuild = sys\n",
    "def build():\n  import torch\n  return torch.nn.Linear\n",
    "from nowhere import *\n", "build = 'x'\n", "class build:\n  pass\n", "async def build():\n  return 1\n", "def build():\n  yield 1\n",
)  # fmt: skip
ODD = (
    "os:system", "sys:exit", "torch.nn:Linear", "torch:nn.Identity", "builtins:exit", "math:pi", "nowhere.mod:f", "a.b:", ".m:f", "m:build",
    "json:loads", "timm:", "timm:nowhere", "timm:../x", "timm:resnet18@x", "timm:hf_hub:a/b", "timm:" + "x" * 300, "m.py:build:x",
    "m.py:Net.forward", "http://x/m.py:build", "s3://b/m.py:build", "models:x", "hf://a/b:c", "m.py:", "m.py:a.b", "m.py:__import__",
    "m.py:torch", "m.py:nn.Identity", "m.py:build()", "m.py:bu\nild", "/dev/zero:build", "/dev/null.py:b", "~nobody_of_this_name/m.py:f",
)  # fmt: skip
NAMES = ("", "x", "timm:resnet18", "timm:", "hf://a", "hf://a/b@", "models:/x", "models:/x@y", "04e9dcd8e27c21aa", "at_digits", "m.py:Net",
         "/", ".", "..", "~nobody_of_this_name/y", "a\nb", "x" * 3000, "s3://b/x", "file:///x", '"null"', "5", "[a]", "{a: b}", "runs:/x",
         "http://x/y.pt")  # fmt: skip


class Evil:
    """What a pickle may hold: something that is executed on reading."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def weights_in(folder: Path, network: torch.nn.Module, rng: random.Random) -> list[Path]:
    """Make files of weights and programs: sound ones, others that are none, and damaged ones."""
    state = network.state_dict()
    folder.mkdir()
    save_file(state, str(folder / "sound.safetensors"))
    save_file({}, str(folder / "empty.safetensors"))
    contents = {
        "sound": state,
        "nested": {"state_dict": state, "epoch": 3},
        "deep": {"model": {"net": state}},
        "module": {f"module.{name}": value for name, value in state.items()},
        "list": [1, 2],
        "nothing": {},
        "tensor": state["f.weight"],
        "numbers": {"f.weight": 5, "f.bias": "x"},
        "keys": {1: state},
        "null": {"state_dict": None},
        "shapes": {**state, "f.weight": state["f.weight"][:3]},
        "lacks": {"f.weight": state["f.weight"]},
        "more": {**state, "g": state["f.bias"]},
        "nan": {name: value * float("nan") for name, value in state.items()},
        "complex": {name: value.to(torch.complex64) for name, value in state.items()},
        "whole": {name: value.long() for name, value in state.items()},
        "sparse": {name: value.to_sparse() for name, value in state.items()},
        "evil": Evil(folder / "executed"),
        "evil_too": {"state_dict": state, "x": Evil(folder / "executed")},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.trace(network.eval(), torch.rand(2, 1, 8, 8)).save(str(folder / "program.pt"))
    torch.export.save(torch.export.export(network.eval(), (torch.rand(2, 1, 8, 8),)), str(folder / "fixed.pt2"))
    raw = {
        "zero.pt": b"", "text.pt": b"hello", "bytes.pt": bytes(range(256)), "zero.safetensors": b"", "text.safetensors": b"hello world",
        "long.safetensors": (10**12).to_bytes(8, "little") + b"{}", "null.safetensors": (4).to_bytes(8, "little") + b"null",
        "zero.pt2": b"", "bytes.pt2": bytes(range(256)), "zipped.pt": b"\x1f\x8b" + bytes(50),
        "x.h5": b"\x89HDF\r\n\x1a\n", "x.onnx": b"\x08",
    }  # fmt: skip
    for name, content in raw.items():
        (folder / name).write_bytes(content)
    (folder / "folder.pt").mkdir()
    (folder / "loop.pt").symlink_to("loop.pt")
    os.mkfifo(folder / "pipe.pt")
    for number in range(20):
        source = folder / rng.choice(["sound.safetensors", "sound.pt", "program.pt", "fixed.pt2", "nested.pt", "old.pt"])
        (folder / f"damaged{number}{source.suffix}").write_bytes(damaged(source.read_bytes(), rng))
    return sorted(folder.iterdir())


def damaged(content: bytes, rng: random.Random) -> bytes:
    changed, way = bytearray(content), rng.choice(["cut", "bit", "zeros", "more", "many"])
    place = rng.randrange(len(changed))
    if way == "cut":
        del changed[place:]
    elif way == "bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        changed[place : place + 200] = bytes(len(changed[place : place + 200]))
    elif way == "more":
        changed[place:place] = rng.randbytes(20)
    else:
        for _ in range(30):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with code, where nothing is trained."""
    (tmp_path / "m.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)
    return tmp_path


def code_in(place: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_of_others", place / "m.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def cases(place: Path, rng: random.Random) -> list[tuple[list[str], list[str]]]:
    """Return commands with what a message must name one of."""
    code = code_in(place)
    callables = [name for name, value in vars(code).items() if getattr(value, "__module__", "") == "code_of_others"]
    files = weights_in(place / "weights", code.Net(), rng)
    found = []
    for reference in [*(f"m.py:{name}" for name in [*callables, "value", "nowhere"]), *ODD]:
        found.append((evaluate(reference), [reference.partition(":")[0], reference[:60]]))
    for index, source in enumerate(SOURCES):
        (place / f"source{index}.py").write_bytes(source.encode("latin1"))
        found.append((evaluate(f"source{index}.py:build"), [f"source{index}.py"]))
    for file in files:
        for name in rng.sample(callables, 4):
            found.append(([*evaluate(f"m.py:{name}"), "--weights", str(file)], [file.name, f"m.py:{name}"]))
        found.append((evaluate(str(file)), [file.name, "--weights"]))
    return found


def evaluate(reference: str) -> list[str]:
    return ["evaluate", reference, "--data", "digits", "--image-size", "8", "--samples", "4", "--workers", "1", "--dry-run"]


def try_models(place: Path, seed: int, number: int) -> None:
    rng = random.Random(seed)
    problems = []
    known = cases(place, rng)
    for words, names in rng.sample(known, min(number, len(known))):
        outcome = rayndom([*words, "--home", str(place / "home")], FIRST_S)
        problem = complaint(outcome, names, refused=None, allowed=(0, 2, 3))
        if problem:
            problems.append(f"{problem}: {' '.join(words)[:200]!r}: {outcome.error[:300]!r}")
    assert not problems, f"{len(problems)} with seed {seed}:\n" + "\n".join(problems)
    assert not (place / "weights" / "executed").exists()


def test_models_of_others(place):
    try_models(place, SEED + 90, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(3))
def test_many_models_of_others(place, piece):
    try_models(place, SEED + 91 + piece, MANY)


def test_weights_to_begin_with(place):
    """What `training.initial_weights` may name, as `train` and its dry run look at it before anything is made."""
    rng, home, problems = random.Random(SEED + 95), Home.locate(place / "home"), []
    files = weights_in(place / "weights", code_in(place).Net(), rng)
    network = build_model("natural", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8))
    before = weights_hash(network)
    for name in [*map(str, files), *NAMES]:
        fresh = rng.choice([(), ("classifier",), ("x.y",), ("",)])
        problem = ""
        try:
            with no_longer_than(PATIENCE_S):
                given = initial_weights(TrainingConfig(initial_weights=name or None, reinitialize=fresh if name else ()), home)
                assert given is not None or not name
                if given is not None:
                    given.begin(network)
            problem = "" if not name or weights_hash(network) != before else "accepted, and nothing was taken"
        except (UserError, ValidationError) as error:
            if not any(part in str(error) for part in (Path(name).name[:40] or "initial_weights", "initial_weights", "reinitialize")):
                problem = f"names nothing: {error}"
        except (Exception, Hang) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            problems.append(f"{name[:100]!r} {fresh}: {problem[:300]}")
    assert not problems, "\n".join(problems)
    assert not (place / "weights" / "executed").exists()


@pytest.mark.parametrize("name", ["empty.safetensors", "null.safetensors", "lacks.pt", "shapes.pt"])
def test_a_network_takes_no_weights_that_are_not_its_own(place, name):
    code = code_in(place)
    weights_in(place / "weights", code.Net(), random.Random(0))
    outcome = rayndom([*evaluate("m.py:Net"), "--weights", f"weights/{name}"], FIRST_S)
    assert complaint(outcome, [name], refused=True) is None, outcome.said
    if name == "lacks.pt":  # a training may begin with a part
        return
    with pytest.raises(UserError, match=r"weights"):
        begin_with(code.Net(), read_state(place / "weights" / name), source=name)


def test_no_state_has_no_prefixes():
    assert without_prefixes({}, {"f.weight": None}) == {}
    assert set(without_prefixes({"module._orig_mod.f": torch.zeros(1)}, {"f": None})) == {"f"}
