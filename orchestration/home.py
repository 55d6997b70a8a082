"""Where everything goes: one home folder, `./rayndom_home` unless the user says otherwise; and where work is done."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from models.errors import EnvironmentProblem, UserError
from models.file_content import absolute, folder_here
from orchestration import console
from orchestration.storage import TRACKING_VARIABLE, is_url, open_storage

HOME_VARIABLE = "RAYNDOM_HOME"
_NAME = re.compile(r"[^\s./\\~-][^/\\\n\t]{0,199}")


@dataclass(frozen=True)
class Home:
    """Paths below the home folder, all absolute."""

    root: Path

    @classmethod
    def locate(cls, folder: str | Path | None = None) -> Home:
        """Return the home: `folder`, else the environment variable RAYNDOM_HOME, else `./rayndom_home`; of a URL, its copy here.

        Raises:
            EnvironmentProblem: it cannot be created or written, or a store cannot be reached.
        """
        url = home_url(folder)
        if url is not None:
            return cls(open_storage(url, to_write=True).root)
        home = cls.to_read(folder)
        try:
            home.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"cannot create the home folder {home.root}: {error.strerror}. Choose another with --home.") from None
        if not os.access(home.root, os.W_OK):
            raise EnvironmentProblem(f"cannot write to the home folder {home.root}. Choose another with --home.")
        return home

    @classmethod
    def to_read(cls, folder: str | Path | None = None) -> Home:
        """Return the home for a command that only reads: it is not made, and need not be writable.

        Raises:
            EnvironmentProblem: it is there, and no folder that may be read.
        """
        url = home_url(folder)
        if url is not None:
            return cls(open_storage(url, to_write=False).root)
        root = folder_here(folder or os.environ.get(HOME_VARIABLE) or "rayndom_home", "the home")
        if root.exists() and not (root.is_dir() and os.access(root, os.R_OK | os.X_OK)):
            raise EnvironmentProblem(f"cannot read the home folder {root}. Choose another with --home.")
        return cls(root)

    @property
    def shown(self) -> Path:
        """The home as a command line may name it: relative where it lies below the folder that one is in."""
        here = Path.cwd()
        return self.root.relative_to(here) if self.root.is_relative_to(here) and self.root != here else self.root

    def entries(self, pattern: str) -> list[Path]:
        """Return what lies at `pattern` below the home, e.g. `runs/*`, sorted; nothing where it cannot be looked at."""
        try:
            return sorted(path for path in self.root.glob(pattern) if path.exists())
        except OSError as error:
            console.warn(f"skipped: {self.root / pattern}: {error.strerror}")
            return []

    @property
    def tracking_uri(self) -> str:
        """Absolute URI of the MLflow store: MLFLOW_TRACKING_URI if set, else an SQLite file in the home."""
        return os.environ.get(TRACKING_VARIABLE) or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def store_file(self) -> Path | None:
        """The file of the MLflow store, where it is one of SQLite; None: it is another store."""
        scheme, _, path = self.tracking_uri.partition("://")
        if scheme.split("+")[0] != "sqlite" or not path.startswith("/") or not path.strip("/"):
            return None
        return Path(path[1:].split("?")[0]).absolute()

    @property
    def artifacts(self) -> Path:
        """Folder of MLflow artifacts when the store is the SQLite file."""
        return self.root / "mlflow_artifacts"

    def run(self, fingerprint: str) -> Path:
        """Folder of one training run."""
        return self.root / "runs" / fingerprint

    def sweep(self, name: str) -> Path:
        """Folder of one sweep: its study, its evaluations, its winner."""
        return self.root / "sweeps" / name

    def evaluation(self, key: str) -> Path:
        """Folder of one evaluation's records."""
        return self.root / "evaluations" / key

    def profile(self, fingerprint: str) -> Path:
        """Folder of the profile of a training step."""
        return self.root / "profiles" / fingerprint

    def external(self, name: str) -> Path:
        """Folder of a model that Rayndom did not train: what it is, and its evaluations' records."""
        return self.root / "external" / name


def home_url(folder: str | Path | None) -> str | None:
    """Return the URL of a home in an object store, named or in RAYNDOM_HOME; None: the home is a folder."""
    named = str(folder or os.environ.get(HOME_VARIABLE) or "")
    return named if is_url(named) else None


@dataclass(frozen=True)
class Workplace:
    """Where work is done and what it finds there.

    Attributes:
        home: where everything goes.
        data_root: folder of the data sets; None: the environment variable RAYNDOM_DATA, else `./data`.
        address: of a Ray cluster; None: RAY_ADDRESS, else a Ray of this machine's own.
    """

    home: Home
    data_root: Path | None = None
    address: str | None = None

    @classmethod
    def locate(cls, home: str | Path | None = None, data_root: str | Path | None = None, address: str | None = None) -> Workplace:
        """Return the workplace that a command's flags name, with absolute paths.

        Raises:
            EnvironmentProblem: the home folder cannot be created or written.
        """
        return cls(Home.locate(home), absolute(data_root) if data_root else None, address)

    @classmethod
    def to_read(cls, home: str | Path | None = None, data_root: str | Path | None = None) -> Workplace:
        """Return the workplace of a command that only reads, see `Home.to_read`."""
        return cls(Home.to_read(home), absolute(data_root) if data_root else None)


Read = TypeVar("Read")
Item = TypeVar("Item")


def readable(read: Callable[[Item], Read], items: Iterable[Item]) -> Iterator[Read]:
    """Yield what `read` returns for each item: the one way in which commands go through what a home holds.

    An item that cannot be read is skipped with a warning: whoever did not ask for it has nothing to do with it.
    """
    for item in items:
        try:
            found = read(item)
        except (UserError, OSError) as error:
            console.warn(f"skipped: {error}")
            continue
        yield found


def checked_name(name: str) -> str:
    """Return the name of a recipe or a sweep, which folders and files are called by.

    Raises:
        ValueError: it could not be the name of a file, or would be one elsewhere.
    """
    if name and not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r:.100} is no name: at most 200 characters in one line without / or \\, the first no dot, space, dash or tilde"
        )
    return name
