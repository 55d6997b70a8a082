"""Commands on a home of which something is broken: what is asked for is refused by name or goes on, what is not is not in the way."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fuzz.broken_homes import damage, swap
from tests.fuzz.command_line import SEED, Outcome, complaint, rayndom

FEW, PIECE, PIECES = 40, 100, 15
RUNS = ("04e9dcd8e27c21aa", "f3adf480c8de54f4")
"""The two finished runs of the home."""
UNFINISHED = "42e9f6dffdd84fa0"
FIRST_S = 120
"""Patience with commands that import what later ones find imported."""


@dataclass(frozen=True)
class Sound:
    """A whole home, and where what is known of each run lies in it."""

    root: Path
    belonging: dict[str, list[Path]]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.root, folder, symlinks=True))


@pytest.fixture(scope="module")
def sound(earlier_home):
    """A home with runs, evaluations with reports, an analysis, a sweep and an export."""
    home = earlier_home
    for weights in home.rglob("model.safetensors"):
        config = weights.with_name("config.json")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        config.write_text(json.dumps(json.loads(config.read_text()) | {"weights_sha256": digest}))
    belonging = {}
    for run in RUNS:
        before = set(home.rglob("*"))
        for words in (
            ["evaluate", run, "--samples", "10", "--workers", "1", "--keep-points"],
            ["analyse", run, "--samples", "4"],
            ["export", run, "--to", str(home / "exports" / run)],
        ):
            assert rayndom([*words, "--home", str(home)], FIRST_S).code == 0
        made = [path for path in home.rglob("*") if path not in before and "mlflow" not in str(path)]
        belonging[run] = [home / "runs" / run, *(home / "runs" / run).rglob("*"), *made]
    assert rayndom(["status", "--home", str(home)], FIRST_S).code == 0
    assert rayndom(["compare", *RUNS, "--home", str(home)], FIRST_S).code == 0
    pictures = ("figures", "report.html")  # written, never read
    return Sound(
        home, {run: [path.relative_to(home) for path in paths if not {*path.parts} & {*pictures}] for run, paths in belonging.items()}
    )


def commands_on(run: str, other: str, home: Path, rng: random.Random) -> list[str]:
    """Return a command that asks for a run."""
    return rng.choice(
        [
            ["export", run, "--to", str(home.parent / f"out-{run}")],
            ["export", run, "--to", str(home / "exports" / run)],
            ["evaluate", run, "--samples", "10", "--workers", "1"],
            ["evaluate", str(home / "exports" / run), "--samples", "10", "--workers", "1"],
            ["analyse", run, "--samples", "4"],
            ["rescore", run, "--draws", "3"],
            ["compare", run, other],
            ["compare", run, other, "--all", "--json"],
        ]
    )


def try_homes(sound: Sound, folder: Path, seed: int, number: int) -> None:
    """Damage something of one run; ask for it, and for the other one, for which nothing may change."""
    rng = random.Random(seed)
    problems = []
    for index in range(number):
        home = sound.copy(folder / str(index) / "home")
        victim, other = rng.sample(RUNS, 2)
        places = [home / path for path in sound.belonging[victim]]
        done = damage(home, places, rng)
        names = [victim, done.place, Path(done.place).name, *(part for part in Path(done.place).parts[1:])]
        for words, refused in ((commands_on(victim, other, home, rng), None), (bystander(other, home, rng), False)):
            problem = judge(rayndom([*words, "--home", str(home)]), names, refused=refused)
            if problem:
                problems.append(f"{problem}: {' '.join(words[:2])} with {done.place} {done.kind}")
        shutil.rmtree(folder / str(index))
    assert not problems, f"{len(problems)} of {2 * number} with seed {seed}:\n" + "\n".join(problems)


def bystander(run: str, home: Path, rng: random.Random) -> list[str]:
    """Return a command that has nothing to do with what is broken."""
    asked = commands_on(run, UNFINISHED, home, rng)
    while asked[0] == "compare":  # there is no third model to compare with
        asked = commands_on(run, UNFINISHED, home, rng)
    return rng.choice([asked, asked, ["status"], ["status", "tiny"], ["list", "runs"], ["list", "recipes"]])


def judge(outcome: Outcome, names: list[str], *, refused: bool | None) -> str | None:
    """Return what is wrong with how a command took a broken home."""
    if refused is False and outcome.code != 0:
        return f"exit code {outcome.code} of a bystander: {outcome.error[:300]}"
    problem = complaint(outcome, names, refused=refused, allowed=(0, 2, 3))
    if problem is None and outcome.code != 0 and any(word in outcome.error for word in ("SELECT ", "UPDATE ", "sqlalche.me")):
        problem = "a statement of SQL"
    return None if problem is None else f"{problem} ({outcome.error[:300]!r})"


def try_stores(sound: Sound, folder: Path, seed: int, number: int) -> None:
    """Damage a store or a sweep: whoever needs it says which one, and in one line why."""
    rng = random.Random(seed)
    problems = []
    for index in range(number):
        home = sound.copy(folder / str(index) / "home")
        (sweep,) = (path for path in (home / "sweeps").iterdir() if path.is_dir())
        kind = rng.choice(["mlflow", "mlflow", "sweep", "sweep", "state"])
        places = {
            "mlflow": [home / "mlflow.db"],
            "sweep": [sweep, *(path for path in sweep.rglob("*") if path.name in ("study.db", "sweep.json", "lock"))],
            "state": [path for path in (home / "runs" / UNFINISHED).iterdir() if path.name != "lock"],
        }[kind]
        done = damage(home, places, rng)
        asked, rest = ["status", "tiny"], ["compare", *RUNS]
        if kind == "mlflow":
            asked = rng.choice([["status"], ["status", "tiny"], ["evaluate", RUNS[0], "--samples", "10", "--workers", "1"]])
        elif kind == "state":
            asked = ["export", UNFINISHED, "--to", str(home.parent / "out")]
        for words, refused in ((asked, None), (rest, False)):
            problem = judge(rayndom([*words, "--home", str(home)]), [*Path(done.place).parts, sweep.name, "tiny", "sweep"], refused=refused)
            if problem:
                problems.append(f"{problem}: {' '.join(words[:2])} with {done.place} {done.kind}")
        shutil.rmtree(folder / str(index))
    assert not problems, f"{len(problems)} of {2 * number} with seed {seed}:\n" + "\n".join(problems)


def test_broken_homes(sound, tmp_path):
    try_homes(sound, tmp_path, SEED + 20, FEW)


def test_broken_stores(sound, tmp_path):
    try_stores(sound, tmp_path, SEED + 21, FEW // 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(PIECES))
def test_many_broken_homes(sound, tmp_path, piece):
    try_homes(sound, tmp_path, SEED + 1000 + piece, PIECE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(PIECES))
def test_many_broken_stores(sound, tmp_path, piece):
    try_stores(sound, tmp_path, SEED + 2000 + piece, PIECE)


@pytest.mark.parametrize("what", ["model", "model/model.safetensors", "model/config.json", "result.json"])
def test_what_belongs_to_another_run(sound, tmp_path, what):
    home = sound.copy(tmp_path / "home")
    swap(*(home / "runs" / run / what for run in RUNS))
    outcome = rayndom(["export", RUNS[0], "--to", str(tmp_path / "out"), "--home", str(home)])
    assert complaint(outcome, [RUNS[0]], refused=True) is None, outcome.said
