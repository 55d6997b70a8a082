"""A plug-in of which something is broken: commands that do not need it go on, who asks for it is told which file."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import models.plugins
from tests.fuzz.command_line import SEED, complaint, rayndom

FEW, MANY = 12, 150
GROUP = '[project.entry-points."rayndom.plugins"]'
TABLES = (
    "", "x", "[project]", "[project]\nname=5", "[project.entry-points]\nx=1", "[project]\nentry-points=5", "project=5", "project=[1]",
    '[project.entry-points]\n"rayndom.plugins"=5', f"{GROUP}\na=5", f"{GROUP}\na='no such'", f"{GROUP}\na=''", f"{GROUP}\na='..x'",
    f"{GROUP}\na='a.b.c'", f"{GROUP}\na={{b=1}}", f"{GROUP}\na=':'", "\0", "\xff", "[[project]]\nname='x'",
)  # fmt: skip
_RECORD = "from orchestration.catalogue import Defence\nDEFENCES=(Defence(name={name}, summary={summary}, {more}),)\n"
_MODEL = "from models.registry import DefenceModel\nDEFENCE_MODELS=(DefenceModel({fields}),)\n"
CODE = (
    "def broken(:\n", "import nowhere_at_all\n", "raise SystemExit\n", "\0", "import sys; sys.exit(7)\n", "def f(): f()\nf()\n", "1/0\n",
    "raise MemoryError\n", "DEFENCE_MODELS=5\nDEFENCES=5\n", "DEFENCE_MODELS=(5,)\nDEFENCES=(None,)\n",
    "DEFENCE_MODELS='text'\nDEFENCES='text'\n",
    "raise OSError(28,'No space left')\n", "raise UnicodeDecodeError('utf8',b'x',0,1,'r')\n",
    *(_MODEL.format(fields=fields) for fields in ("None, None, None, None", "'at', 'x', int, print", "'base', 'x', 5, 5")),
    *(
        _RECORD.format(name="'base_noise'", summary="'x'", more=more)
        for more in ("", "search_space=5", "search_space={'a': 5}", "paper='x'", "prior=5", "deviations=5")
    ),
    _RECORD.format(name="'ctrw'", summary="'x'", more=""), _RECORD.format(name="5", summary="[]", more=""),
)  # fmt: skip
RECIPES = (
    "", "5", "- a", "a: [", "\0", "description: 5", "defence: nowhere", "settings: [nowhere]", "extends: nowhere", "extends: base_noise",
    "settings: 5", "{}", "description: x\ndefence: base_noise\ntraining: 5\nsettings: [digits]", "? {a: b}\n: c",
)  # fmt: skip
TAKEN = {".toml": TABLES, ".py": CODE, ".yaml": RECIPES}
OTHERS = (["list", "defences"], ["list", "recipes"], ["show", "at_digits"], ["list", "objectives"])
ASKING = (
    ["show", "base_noise_digits"],
    ["train", "base_noise_digits", "--dry-run"],
    ["sweep", "base_noise_digits", "--dry-run", "--num_trials=2"],
    ["simulate", "base_noise_digits", "--gpus=1", "--epoch-seconds=1"],
)
FIRST_S = 60


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """What a plug-in brought into this process goes with its test; dry runs train nothing."""
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget()


def forget() -> None:
    models.plugins._found.cache_clear()
    for name in [name for name in sys.modules if name.startswith("rayndom_base_noise")]:
        del sys.modules[name]


@pytest.fixture
def sound(tmp_path):
    folder = tmp_path / "sound"
    assert rayndom(["new", "defence", "base_noise", "--to", str(folder)], FIRST_S).code == 0
    return folder


def damage(path: Path, rng: random.Random) -> str:
    """Break a file of a plug-in and return how."""
    way = rng.choice(["content"] * 6 + ["gone", "folder", "loop", "bytes"])
    if way == "content":
        content = rng.choice(TAKEN.get(path.suffix, CODE))
        path.write_bytes(content.encode("latin1"))
        return repr(content)
    if way == "bytes":
        path.write_bytes(rng.randbytes(200))
        return way
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "loop":
        path.symlink_to(path.name)
    return way


def try_plugins(sound: Path, folder: Path, seed: int, number: int) -> None:
    rng, problems = random.Random(seed), []
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file() and path.suffix in TAKEN)
    files = [path for path in files if path.parts[0] != "tests"]
    for index in range(number):
        broken = Path(shutil.copytree(sound, folder / f"broken{index}"))
        file = rng.choice(files)
        way = damage(broken / file, rng)
        for words in (rng.choice(OTHERS), rng.choice(ASKING)):
            outcome = rayndom([*words, "--plugin", str(broken), "--home", str(folder / "home")], FIRST_S)
            names = [file.name, str(broken), "base_noise", "plug-in"]
            # A folder whose pyproject.toml says nothing of plug-ins is taken for a package, which it is not.
            problem = complaint(outcome, names, refused=None)
            if problem is None and words in OTHERS and outcome.code and file.suffix != ".toml" and file.name != "__init__.py":
                problem = "a bystander is refused"
            if problem:
                problems.append(f"{problem}: {' '.join(words)} with {file}: {way[:100]}: {outcome.error[:300]!r}")
        shutil.rmtree(broken)
        forget()
    assert not problems, f"{len(problems)} with seed {seed}:\n" + "\n".join(problems)


def test_broken_plugins(sound, tmp_path):
    try_plugins(sound, tmp_path, SEED + 80, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_broken_plugins(sound, tmp_path):
    try_plugins(sound, tmp_path, SEED + 81, MANY)


@pytest.mark.parametrize(
    "named",
    [
        " ",
        "/dev/null",
        "~nobody_of_this_name/y",
        "a\0b",
        "nowhere",
        "./nowhere",
        "1",
        "a.b",
        "__main__",
        "x" * 5000,
        "\udcff",
        "a:b",
        "é x",
    ],
)
def test_names_of_no_plugin(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = complaint(
        rayndom(["list", "defences", "--plugin", named]), ["plug-in", "--plugin", named[:40]], refused=named != "__main__" or None
    )
    assert problem is None
    models.plugins._found.cache_clear()
    if "\0" not in named:
        monkeypatch.setenv("RAYNDOM_PLUGINS", named)
        outcome = rayndom(["list", "recipes"])
        assert complaint(outcome, ["plug-in", "RAYNDOM_PLUGINS", named[:40]], refused=named != "__main__" or None) is None, outcome.said
