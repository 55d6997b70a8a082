"""Makes `home_of_a0107eb.tar.xz`: a home folder as commit a0107eb left it, small enough for a test.

Run once, with the Python of a checkout of that commit and from its root:

    OMP_NUM_THREADS=1 .venv/bin/python PATH/OF/make_home.py ARCHIVE

The home holds a finished run (`at_digits`), one that was interrupted after its first epoch (`rna_digits`), a finished sweep of two trials,
and evaluations of the finished run and of the sweep's winner. Ray's and Tune's own files, the resumable states of finished runs and
pictures are left out; the home's own path stands as PLACE.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path

from contents import PLACE, TINY

import orchestration.training.training_run as training_run
from orchestration.cli import main

SWEEP = """recipe: at_digits
settings:
  training.epochs: 1
{settings}
space: {{training.optimizer.weight_decay: {{type: choice, choices: [1e-4, 5e-4]}}}}
sampler: grid
stopping: null
suite: quick
num_test_examples: 10
"""


def make(archive: Path) -> None:
    """Fill a home and pack it."""
    flags = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        (home / "tiny.yaml").write_text(SWEEP.format(settings="\n".join(f"  {name}: {value}" for name, value in TINY.items())))
        run(["train", "at_digits", "--home", str(home), "--training.epochs", "1", *flags])
        run(["evaluate", "at_digits", "--home", str(home), "--suite", "quick", "--samples", "10", "--workers", "1"])
        run(["sweep", str(home / "tiny.yaml"), "--home", str(home)])
        finish = training_run._FolderReporter.epoch_finished

        def interrupt(self: object, report: object, save: object) -> None:
            finish(self, report, save)
            raise KeyboardInterrupt

        training_run._FolderReporter.epoch_finished = interrupt
        run(["train", "rna_digits", "--home", str(home), "--training.epochs", "2", *flags], expected=130)
        shrink(home)
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            packed.add(home, "home")


def run(arguments: list[str], expected: int = 0) -> None:
    """Run a command."""
    code = main(arguments)
    if code != expected:
        sys.exit(f"rayndom {' '.join(arguments)} ended with {code}")


def shrink(home: Path) -> None:
    """Leave out what no command reads, and what tells of the machine."""
    for folder in [home / "tune", home / "train", *home.glob("sweeps/*/tune"), *home.glob("sweeps/*/plots")]:
        shutil.rmtree(folder, ignore_errors=True)
    for path in [path for path in home.rglob("*") if path.is_file()]:
        finished = path.name == "training.pt" and (path.parent / "result.json").is_file()
        if finished or path.suffix in (".png", ".pdf", ".html", ".parquet"):
            path.unlink()
        elif path.name == "lock":
            path.write_text("")
        elif path.suffix == ".json":
            path.write_text(path.read_text().replace(str(home), PLACE))
    store = sqlite3.connect(home / "mlflow.db")
    store.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (f"{PLACE}/mlruns",))
    store.execute("UPDATE experiments SET artifact_location = replace(artifact_location, ?, ?)", (str(home), PLACE))
    store.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?)", (str(home), PLACE))
    store.commit()
    store.execute("VACUUM")
    store.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
