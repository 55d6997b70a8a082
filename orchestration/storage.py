"""A home in an object store (`s3://bucket/team`, `gs://`, `abfs://`, whatever fsspec opens), and the copy of it on this machine.

Everything is read from and written to the copy, a folder like any home; what is whole is then uploaded. An object is there whole or not at
all, and of a folder those files that make it count (`result.json`, `config.json`) come last: what is visible is complete. Nodes need share
nothing but the store. A file of the copy that is as it was fetched or uploaded bears a mark in its time: it is never uploaded over what
another machine has written since. Databases are copied when a trial begins and ends, by their own means of backup. Credentials are those
of the environment or the machine: fsspec's business alone.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import io
import logging
import os
import re
import secrets
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from models.errors import EnvironmentProblem, UserError, first_line
from models.file_content import absolute
from models.files import whole_file
from orchestration import console
from orchestration.store_lock import HELD, Held

_logger = logging.getLogger(__name__)
COPY_VARIABLE, TRACKING_VARIABLE = "RAYNDOM_CACHE", "MLFLOW_TRACKING_URI"
_URL_VARIABLE, _ROOT_VARIABLE = "RAYNDOM_STORAGE_URL", "RAYNDOM_STORAGE_ROOT"
STORAGE_VARIABLES = (_URL_VARIABLE, _ROOT_VARIABLE)
"""By which processes that a driver starts know its storage; they hold no secret."""

SMALL_BYTES = 1 << 20
"""Files that every command fetches; larger ones, weights, are fetched when they are used."""
_LAST = ("config.json", "result.json", "outcome.json", "summary.json")
_DATABASE = ".db"
_STAYS_HERE = ("tune", "train")
"""Folders of a home and of its sweeps for Tune's and Ray Train's own files, which nobody reads after a start."""
_AT_A_TIME = 64
_BUFFER_BYTES = 1 << 22
_MILLISECOND = 1_000_000  # in nanoseconds


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HOMES = "A home is a folder or a URL as s3://bucket/team"


def is_url(home: str | Path | None) -> bool:
    """Return whether a home is named by a URL instead of a folder."""
    return isinstance(home, str) and "://" in home


def _is_hidden(part: str) -> bool:
    return part.startswith(".")


@dataclass(frozen=True)
class Storage:
    """A home's object store and its copy here.

    Attributes:
        url: of the home. root: folder of the copy, the same path on every node.
    """

    url: str
    root: Path

    @classmethod
    def locate(cls, url: str) -> Storage:
        """Return the storage of a URL; its copy lies in the folder that RAYNDOM_CACHE names, else in `~/.cache/rayndom`.

        Raises:
            UserError: it is no URL, or holds a password.
        """
        try:
            parts = urlsplit(url)
            digest = hashlib.blake2b(url.rstrip("/").encode(), digest_size=6).hexdigest()
        except ValueError as error:  # UnicodeEncodeError is one
            raise UserError(f"the home {console.without_passwords(url)!r:.300} is no URL: {error}. {_HOMES}") from None
        if not _SCHEME.match(url) or not (parts.netloc or parts.path.strip("/")):
            raise UserError(f"the home {console.without_passwords(url)!r:.300} names no place. {_HOMES}")
        if parts.scheme in ("file", "local") and (parts.netloc or not parts.path.startswith("/")):
            raise UserError(f"the home {url!r:.300} has no path from the root of the file system, as file:///shared/team. {_HOMES}")
        if parts.password or (parts.username and parts.scheme in ("s3", "gs", "gcs")):
            raise UserError(
                f"the home {parts.scheme}://... holds a password; credentials come from the environment, e.g. AWS_ACCESS_KEY_ID"
            )
        place = absolute(os.environ.get(COPY_VARIABLE) or "~/.cache/rayndom")
        return cls(url.rstrip("/"), place / f"{parts.scheme}-{digest}")

    @property
    def shown(self) -> str:
        """The URL as messages have it: not all of a long one, and no password."""
        return console.without_passwords(self.url)[:300]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        # Stores have no folders that must be there before a file is; a disk, which stands in for one in tests, does.
        options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
        try:
            return fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise UserError(
                f"the home {self.shown}: {error}; `make setup EXTRAS=storage` installs what opens s3://, gs:// and abfs://"
            ) from None
        except Exception as error:  # each store's package asks for something else, and says in its own way that it is not there
            raise UserError(f"the home {self.shown} cannot be opened: {first_line(error)}. {_HOMES}") from None

    def __reduce__(self) -> Any:
        """Return what another process makes the same storage of: connections stay here."""
        return Storage, (self.url, self.root)

    def filesystem(self) -> tuple[Any, str]:
        """Return the store as a filesystem of pyarrow, which Ray takes, and the home's path in it."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        files, base = self._opened
        return PyFileSystem(FSSpecHandler(files)), base

    def _remote(self, path: Path) -> str:
        inside = path.relative_to(self.root).as_posix()
        return self._opened[1] if inside == "." else f"{self._opened[1]}/{inside}"

    def check(self, *, writable: bool) -> None:
        """Make sure that the store answers, and takes what is written to it.

        Raises:
            UserError: no installed package opens it. EnvironmentProblem: it cannot be reached, or refuses.
        """
        files, base = self._opened
        try:
            if writable:
                probe = f"{base}/.probe-{secrets.token_hex(8)}"
                files.pipe_file(probe, b"rayndom")
                files.rm_file(probe)
            else:
                files.invalidate_cache()
                files.ls(base, detail=False)
        except FileNotFoundError:
            if writable:
                raise EnvironmentProblem(f"cannot write to the home {self.shown}: there is no such bucket") from None
        except Exception as error:  # each service's library has errors of its own
            raise EnvironmentProblem(
                f"cannot use the home {self.shown}: {first_line(error)}. Is the address right, and are its credentials set?"
            ) from None

    def pull(self, path: Path, *, largest: int | None = None, databases: bool = True) -> None:
        """Fetch what lies at or below `path` in the store and is not here, or newer than here.

        Args:
            largest: leave larger files out, but for databases; None: none. databases: also those.
        """
        small: dict[str, tuple[Path, int]] = {}
        large: dict[str, tuple[Path, int]] = {}
        for remote, info in self._listed(path).items():
            here = self._here(remote)
            if here.suffix == _DATABASE:
                if not databases:
                    continue
            elif largest is not None and info["size"] > largest:
                continue
            mark = self._mark(here, info)
            if here.is_file():
                found = here.stat().st_mtime_ns
                if found == mark or (not self._is_marked(here, found) and _stamp(info) <= found / 1e9):
                    continue
            (small if info["size"] <= SMALL_BYTES else large)[remote] = (here, mark)
        files, names = self._opened[0], list(small)
        for start in range(0, len(names), _AT_A_TIME):  # together, because each takes mostly a way there and back
            for remote, content in files.cat(names[start : start + _AT_A_TIME]).items():
                self._put_here(io.BytesIO(content), *small[remote])
        for remote, (here, mark) in large.items():
            with files.open(remote, "rb") as source:
                self._put_here(source, here, mark)

    def _put_here(self, source: BinaryIO, here: Path, mark: int) -> None:
        if here.suffix == _DATABASE:  # of a process that was killed amid a write: of another database than this one
            for rest in ("-journal", "-wal", "-shm"):
                here.with_name(here.name + rest).unlink(missing_ok=True)
        with whole_file(here) as file:
            shutil.copyfileobj(source, file, _BUFFER_BYTES)
        os.utime(here, ns=(mark, mark))

    def push(self, path: Path) -> None:
        """Upload what lies at or below `path` here and is not in the store, or was changed here; what makes a folder count comes last."""
        files, known = self._opened[0], self._listed(path)
        found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        for here in sorted(filter(self._is_kept, found), key=lambda each: (_rank(each), -each.stat().st_size)):
            remote, before = self._remote(here), here.stat()
            if remote in known and self._is_marked(here, before.st_mtime_ns):
                continue
            files.put_file(str(here), remote)
            mark, now = self._mark(here, files.info(remote)), here.stat()
            if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                os.utime(here, ns=(mark, mark))

    def _mark(self, here: Path, info: Mapping[str, Any]) -> int:
        """Return the time, in nanoseconds, of a file that is as the store has it: the store's second, its version, the file's own number.

        Several services tell whole seconds, so the version tells apart what was written within one. The number is of the file's name, so
        that a copy of the file elsewhere in the home is not taken for one that is in the store.
        """
        return (int(_stamp(info)) * 1000 + _version(info)) * _MILLISECOND + self._number(here)

    def _is_marked(self, here: Path, time_ns: int) -> bool:
        return time_ns % _MILLISECOND == self._number(here)

    def _number(self, here: Path) -> int:
        name = here.relative_to(self.root).as_posix()
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) % _MILLISECOND

    def push_databases(self) -> None:
        """Upload a consistent copy of every database that has changed since this process uploaded it."""
        for here in sorted((*self.root.glob(f"*{_DATABASE}"), *self.root.glob(f"sweeps/*/*{_DATABASE}"))):
            found = here.stat()
            version = (found.st_size, found.st_mtime_ns)  # the clock of the store may be another than this machine's
            if self._sent.get(here) == version:
                continue
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / here.name
                with contextlib.closing(sqlite3.connect(here, timeout=60)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
                self._opened[0].put_file(str(copy), self._remote(here))
            self._sent[here] = version

    @cached_property
    def _sent(self) -> dict[Path, tuple[int, int]]:
        return {}

    def stored_bytes(self, path: Path) -> int:
        """Return how large is what lies at or below `path` in the store."""
        return sum(info["size"] for info in self._listed(path).values())

    def remove(self, path: Path) -> None:
        """Remove what lies at or below `path` in the store."""
        files = self._opened[0]
        for remote in self._listed(path):
            files.rm_file(remote)

    def _listed(self, path: Path) -> Mapping[str, Mapping[str, Any]]:
        self._opened[0].invalidate_cache()
        found = self._opened[0].find(self._remote(path), detail=True)
        inside = {name: name.removeprefix(self._opened[1]).lstrip("/") for name in found}
        return {
            name: info
            for name, info in found.items()
            if info.get("type", "file") == "file"
            and not name.endswith(HELD)
            and inside[name]  # a file stands where the home should
            and not any(map(_is_hidden, inside[name].split("/")))
        }

    def _here(self, remote: str) -> Path:
        return self.root / remote.removeprefix(self._opened[1]).lstrip("/")

    def _is_kept(self, here: Path) -> bool:
        inside = here.relative_to(self.root).parts
        hidden = any(map(_is_hidden, inside))
        of_ray = inside[0] in _STAYS_HERE or (inside[0] == "sweeps" and len(inside) > 3 and inside[2] in _STAYS_HERE)
        own = here.suffix in (_DATABASE, ".lock") or here.name == "lock" or here.name.endswith(("-journal", "-wal", "-shm"))
        return not hidden and not of_ray and not own

    def held(self, lock: Path) -> Held:
        """Return the lock of the store that belongs to a lock file here."""
        return Held(self._opened[0], self._remote(lock) + HELD, f"{socket.gethostname()} {self.root}")

    def write(self, path: Path, content: bytes) -> None:
        """Write an object where `path` would be."""
        self._opened[0].pipe_file(self._remote(path), content)

    def remove_object(self, path: Path) -> None:
        """Remove the object where `path` would be."""
        self._opened[0].rm_file(self._remote(path))

    def read(self, path: Path) -> bytes:
        """Return the object where `path` would be."""
        self._opened[0].invalidate_cache()
        return self._opened[0].cat_file(self._remote(path))


_driven: dict[Path, Storage] = {}
"""Storages that commands of this process opened."""
_machine_locks: list[Held] = []
_written: dict[Path, int] = {}
"""Root -> the open file whose lock says that a process here writes to the copy."""


def open_storage(url: str, *, to_write: bool) -> Storage:
    """Open the store of a home, fetch what is small, and make it known to this process and to those that it starts.

    The databases of a copy that a living process here writes to are left as they are. One machine at a time writes to a home whose MLflow
    store is a file: its copy is uploaded whole.

    Raises:
        UserError: it cannot be opened. EnvironmentProblem: it cannot be reached, or another machine writes to it.
    """
    storage = Storage.locate(url)
    storage.check(writable=to_write)
    storage.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(storage.root / ".writers", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        alone = storage.root not in _written
        if alone:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alone = False
        if to_write and alone and not os.environ.get(TRACKING_VARIABLE):
            _hold_for_this_machine(storage)
        storage.pull(storage.root, largest=SMALL_BYTES, databases=alone)
        if to_write and storage.root not in _written:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _written[storage.root] = os.dup(descriptor)
    finally:
        os.close(descriptor)
    _driven[storage.root] = storage
    os.environ[_URL_VARIABLE], os.environ[_ROOT_VARIABLE] = storage.url, str(storage.root)
    return storage


def _hold_for_this_machine(storage: Storage) -> None:
    held = storage.held(storage.root / "mlflow.db")
    own = f"process {os.getpid()} on {socket.gethostname()}"
    holder = held.take(own, 0, lambda other: _logger.warning("waiting for %s, which writes to %s or was killed", other, storage.url))
    if holder is not None:
        raise EnvironmentProblem(
            f"the home {storage.url} is written to by {holder}, and its MLflow store is a file: one machine at a time. End that process "
            f"first, name another home, or an MLflow server with {TRACKING_VARIABLE}."
        )
    _machine_locks.append(held)


def storage_of(path: Path) -> Storage | None:
    """Return the storage whose copy a path lies in, None if it is a folder like any other."""
    known = list(_driven.values())
    if not known and _URL_VARIABLE in os.environ:
        known = [_from_variables(os.environ[_URL_VARIABLE], os.environ[_ROOT_VARIABLE])]
    return next((each for each in known if path.is_relative_to(each.root)), None)


def lock_of(lock: Path) -> Held | None:
    """Return the lock of a store that belongs to a lock file, None if there is none: locks are held by commands, not by their workers."""
    storage = _driven.get(next((root for root in _written if lock.is_relative_to(root)), Path()))
    return None if storage is None else storage.held(lock)


_known: dict[tuple[str, str], Storage] = {}


def _from_variables(url: str, root: str) -> Storage:
    return _known.setdefault((url, root), Storage(url, Path(root)))


def fetch(path: Path, *, largest: int | None = None, databases: bool = False) -> None:
    """Fetch what lies at or below a path from the home's store; nothing where the home is a folder. `largest`, `databases`: as `pull`."""
    storage = storage_of(path)
    if storage is not None:
        storage.pull(path, largest=largest, databases=databases)


def keep(path: Path) -> None:
    """Upload what lies at or below a path to the home's store; nothing where the home is a folder."""
    storage = storage_of(path)
    if storage is not None:
        storage.push(path)


def forget(path: Path) -> None:
    """Remove what lies at or below a path from the home's store; nothing where the home is a folder."""
    storage = storage_of(path)
    if storage is not None:
        storage.remove(path)


@contextlib.contextmanager
def uploaded_at_the_end() -> Iterator[None]:
    """Upload what the homes that are opened inside to be written hold at the end, however it ends."""
    try:
        yield
    finally:
        keep_databases()
        for root in _written:
            _driven[root].push(root)
        while _machine_locks:
            _machine_locks.pop().release()


def keep_databases() -> None:
    """Upload the databases of the homes that commands of this process write to."""
    for root in _written:
        _driven[root].push_databases()


def _rank(path: Path) -> int:
    return _LAST.index(path.name) + 1 if path.name in _LAST else 0


def _stamp(info: Mapping[str, Any]) -> float:
    """Return when an object was written, in seconds since 1970: each service has a name of its own for it."""
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        when = info.get(name)
        if isinstance(when, datetime.datetime):
            return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
        if isinstance(when, str):
            return datetime.datetime.fromisoformat(when).timestamp()
        if isinstance(when, int | float):
            return float(when)
    raise EnvironmentProblem("this store does not say when its objects were written; it cannot hold a home")


def _version(info: Mapping[str, Any]) -> int:
    """Return which of the versions of one second an object is, 0 to 999: by its tag, or the milliseconds of a store that has no tags."""
    tag = next((info[name] for name in ("generation", "ETag", "etag") if info.get(name)), None)
    if tag is None:
        return int(_stamp(info) * 1000) % 1000
    return int.from_bytes(hashlib.blake2b(str(tag).strip('"').encode(), digest_size=6).digest()) % 1000
