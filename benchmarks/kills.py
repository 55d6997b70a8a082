"""What is lost when commands are killed: seeded random moments of `train`, `sweep`, `evaluate`, `export` and `reproduce`.

    python -m benchmarks.kills --records FILE [--kills N] [--seed S] [--commands NAME ...] [--minutes M]

A round is one command in one home, killed at random moments of its time (SIGKILL, SIGTERM or SIGINT for the driver; SIGKILL for a Ray
worker or the local node), started again after each, and at last left alone. Then its home is held against that of a command that nobody
disturbed. Each round is one JSON line of FILE; the same command goes on where a killed one was. Everything that is counted must be zero:

    lost         finished work that is not there any more, or is another
    repeated     a finished training that was trained again
    duplicated   blocks, MLflow runs, epochs or versions that stand twice
    stuck        a process that does not end, a command that fails in the end, runs and trials that stay open
    leaked       processes that outlive their command
    different    results, weights or epochs that differ from the undisturbed ones
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from benchmarks.kept_state import duplicates, epochs_in_mlflow, finished, times_of, unfinished
from orchestration import cli

COUNTED = ("lost", "repeated", "duplicated", "stuck", "leaked", "different")
SETTINGS = {
    "data.image_size": 8,
    "data.limit_train": 320,
    "data.validation_size": 32,
    "data.limit_test": 40,
    "training.batch_size": 32,
    "training.attack.steps": 2,
    "training.validation.steps": 2,
    "training.precision": "fp32",
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
SWEEP = {
    "description": "a grid, so that a start after a kill proposes the same points",
    "recipe": "ctrw_digits",
    "settings": SETTINGS | {"training.epochs": 3},
    "space": {"defence.lower_bound": {"type": "choice", "choices": [200, 600, 1000, 1800]}},
    "sampler": "grid",
    "stopping": None,
}
EVERYTHING = (
    "orchestration.training.single_run",
    "orchestration.sweeping.sweep",
    "orchestration.reproducing.execution",
    "orchestration.exporting.registration",
    "analysis.reporting.report",
)
"""What commands import when they run."""
AT_REST_S = 120
"""How long processes of a killed command may take to notice: after `kill -9` Ray's two agents look for their node for about 70 seconds."""


@dataclass(frozen=True)
class Subject:
    """A command that is killed.

    Attributes:
        name: as records call it. words: its arguments; `{model}` stands for a trained run, `{home}` and `{folder}` for places.
        needs_model: whether its home holds a trained run. on_ray: whether it has workers and a node.
        share: of all rounds.
    """

    name: str
    words: tuple[str, ...]
    needs_model: bool
    on_ray: bool
    share: int


SUBJECTS = (
    Subject("train", ("train", "ctrw_digits", *FLAGS, "--training.epochs", "8"), False, False, 4),
    Subject("evaluate", ("evaluate", "{model}", "--samples", "20", "--workers", "1"), True, False, 3),
    Subject("evaluate on Ray", ("evaluate", "{model}", "--samples", "20", "--workers", "2"), True, True, 1),
    Subject("export", ("export", "{model}", "--to", "{home}/out", "--register", "model@best"), True, False, 3),
    Subject("sweep", ("sweep", "{folder}/killed.yaml", "--no-evaluation"), False, True, 2),
    Subject("reproduce", ("reproduce", "ctrw.table4", "--rows", "in"), False, True, 1),
)


class Command:
    """One start of a command, with every process that it was seen to have.

    It is forked from this process, which has imported everything: what a kill hits is work, not the reading of libraries. Its own code,
    its signals and its end are those of the command line.
    """

    def __init__(self, words: list[str], home: Path, log: Path) -> None:
        self.seen: dict[int, psutil.Process] = {}
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be([*words, "--home", str(home)], home.parent, log)
        self.process = psutil.Process(self.pid)

    @staticmethod
    def _be(words: list[str], folder: Path, log: Path) -> NoReturn:
        """Become the command."""
        os.setsid()
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["rayndom", *words]
        code = 1
        try:
            code = cli.main(words)
        except SystemExit as end:  # as Ray answers SIGTERM
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            atexit._run_exitfuncs()  # what ends Ray
            os._exit(code)

    def ended(self) -> bool:
        """Whether it has ended; `code` says how: negative for a signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def end(self) -> None:
        """End it, whatever it does."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)

    def watch(self, seconds: float) -> bool:
        """Return whether it ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            self._note()
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
        return self.ended()

    def kill(self, whom: str, number: int) -> bool:
        """Send a signal to the driver, or SIGKILL to a worker or the node; return whether there was one."""
        self._note()
        if whom == "driver":
            os.kill(self.pid, number)
            return True
        named = [each for each in self.seen.values() if self._is(each, whom)]
        if not named:
            return False
        with contextlib.suppress(psutil.Error):
            named[-1].kill()
        return True

    def left_over(self) -> list[str]:
        """Return its processes that are there although it has ended, and end them."""
        alive = psutil.wait_procs(list(self.seen.values()), timeout=AT_REST_S)[1]
        left = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
                    process.kill()
        return left

    @staticmethod
    def _is(process: psutil.Process, whom: str) -> bool:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            return (
                bool(words)
                and process.is_running()
                and (words[0].startswith("ray::") if whom == "worker" else words[0].endswith("/raylet"))
            )
        return False

    def _note(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in self.process.children(recursive=True):
                self.seen.setdefault(child.pid, child)


@dataclass
class Reference:
    """A command that nobody disturbed: how long it takes and what it leaves."""

    seconds: float
    content: dict[str, str]
    epochs: dict[str, list[int]]


class Bench:
    """Homes to begin with, and what undisturbed commands make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "killed.yaml").write_text(json.dumps(SWEEP))
        self.base = folder / "base"
        self._run(["train", "ctrw_digits", *FLAGS, "--training.epochs", "2"], self.base)
        (self.model,) = times_of(self.base)
        self.store = folder / "store"
        making = "import sys; from orchestration.home import Home; from orchestration.tracking.local_store import prepare_store; "
        making += "prepare_store(Home.locate(sys.argv[1]))"
        # Not in this process: what MLflow has opened here would be in every fork.
        subprocess.run([sys.executable, "-c", making, str(self.store)], check=True)
        self._known: dict[str, Reference] = {}

    def begin(self, subject: Subject, home: Path, *, new: bool) -> None:
        """Lay out the home of a round; `new`: without even a store."""
        if subject.needs_model:
            shutil.copytree(self.base, home)
        else:
            home.mkdir()
            if not new:
                shutil.copy(self.store / "mlflow.db", home)

    def words(self, subject: Subject, home: Path) -> list[str]:
        """Return a subject's arguments in a home."""
        return [word.format(model=self.model, home=home, folder=self.folder) for word in subject.words]

    def reference(self, subject: Subject) -> Reference:
        """Return what the undisturbed command leaves, run once."""
        if subject.name not in self._known:
            home = self.folder / f"whole {subject.name}".replace(" ", "_")
            self.begin(subject, home, new=False)
            seconds = self._run(self.words(subject, home), home)
            self._known[subject.name] = Reference(seconds, finished(home), epochs_in_mlflow(home))
        return self._known[subject.name]

    def _run(self, words: list[str], home: Path) -> float:
        began = time.monotonic()
        command = Command(words, home, self.folder / "log.txt")
        if not command.watch(1800) or command.code:
            raise RuntimeError(f"{words[0]} fails without any kill:\n{(self.folder / 'log.txt').read_text()[-2000:]}")
        return time.monotonic() - began

    def round(self, subject: Subject, generator: random.Random, kills: int) -> dict[str, Any]:
        """Kill a command `kills` times, let it end, and return what is wrong."""
        whole = self.reference(subject)
        home = Path(tempfile.mkdtemp(prefix="round-", dir=self.folder)) / "home"
        log = home.parent / "log.txt"
        self.begin(subject, home, new=generator.random() < 0.5)
        wrong: dict[str, list[str]] = {name: [] for name in COUNTED}
        done: list[str] = []
        before, times = finished(home), times_of(home)
        limit = 120 + 10 * whole.seconds
        for _ in range(kills):
            command = Command(self.words(subject, home), home, log)
            moment = generator.uniform(0, whole.seconds)
            whom = generator.choice(["driver", "driver", "worker", "node"]) if subject.on_ray else "driver"
            number = generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if not command.watch(moment):
                hit = command.kill(whom, number)
                if not hit:
                    whom = "driver"
                    command.kill(whom, number)
                done.append(f"{whom} {number.name if whom == 'driver' else 'SIGKILL'} after {moment:.1f} s")
                if not command.watch(limit):
                    wrong["stuck"].append(f"does not end after {done[-1]}")
                    command.end()
            wrong["leaked"] += command.left_over()
            wrong["lost"] += [f"{name} after {done[-1:]}" for name, value in before.items() if finished(home).get(name) != value]
            wrong["repeated"] += [name for name, at in times.items() if times_of(home).get(name) != at]
            before, times = finished(home), times_of(home)
        command = Command(self.words(subject, home), home, log)
        if not command.watch(limit):
            wrong["stuck"].append("the last start does not end")
            command.end()
        wrong["leaked"] += command.left_over()
        if command.code:
            wrong["stuck"].append(f"the last start ends with {command.code}: {log.read_text()[-600:]}")
        else:
            content = finished(home)
            wrong["lost"] += [f"{name} at the end" for name, value in before.items() if content.get(name) != value]
            wrong["repeated"] += [name for name, at in times.items() if times_of(home).get(name) != at]
            wrong["duplicated"] += duplicates(home)
            wrong["stuck"] += unfinished(home)
            wrong["different"] += [name for name in whole.content.keys() | content.keys() if whole.content.get(name) != content.get(name)]
            epochs = epochs_in_mlflow(home)
            wrong["different"] += [
                f"epochs {name}: {epochs.get(name)}" for name, steps in whole.epochs.items() if epochs.get(name) != steps
            ]
        if not any(wrong.values()):
            shutil.rmtree(home.parent)
        return {"command": subject.name, "kills": done, "wrong": wrong, "home": str(home) if any(wrong.values()) else None}


def main(arguments: list[str]) -> int:
    """Kill, print the table, and return whether anything is not zero."""
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, help="file of JSON lines to continue")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=3, help="kills in one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", default=[], help="only these")
    parser.add_argument("--minutes", type=float, default=240.0, help="begin no round after so long")
    chosen = parser.parse_args(arguments)
    known: list[dict[str, Any]] = []
    if chosen.records is not None and chosen.records.exists():
        known = [json.loads(line) for line in chosen.records.read_text().splitlines() if line.endswith("}")]
    subjects = [each for each in SUBJECTS if not chosen.commands or each.name in chosen.commands]
    most = max(each.share for each in subjects)
    plan = [each for turn in range(most) for each in subjects if turn < each.share]
    began, index = time.monotonic(), len(known)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in EVERYTHING:
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp(prefix="rayndom-kills-"))
    bench = Bench(folder)
    while sum(len(line["kills"]) for line in known) < chosen.kills and time.monotonic() - began < 60 * chosen.minutes:
        generator = random.Random(f"{chosen.seed} {index}")
        line = bench.round(plan[index % len(plan)], generator, chosen.each)
        index += 1
        known.append(line)
        sys.stdout.write(f"{line['command']}: {', '.join(line['kills'])}: {_sentence(line)}\n")
        sys.stdout.flush()
        if chosen.records is not None:
            with chosen.records.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if not any(line["home"] for line in known):
        shutil.rmtree(folder)
    _print_table(known)
    return int(any(any(line["wrong"].values()) for line in known))


def _sentence(line: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in line["wrong"].items() if found) or "nothing wrong"


def _print_table(lines: list[dict[str, Any]]) -> None:
    head = ["command", "rounds", "kills", *COUNTED]
    rows = []
    for name in [*dict.fromkeys(line["command"] for line in lines), "all"]:
        of = [line for line in lines if name in ("all", line["command"])]
        counts = [sum(len(line["wrong"][kind]) for line in of) for kind in COUNTED]
        rows.append([name, len(of), sum(len(line["kills"]) for line in of), *counts])
    for row in [head, *rows]:
        sys.stdout.write("  ".join(f"{cell!s:>16}" for cell in row) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
