"""The MLflow store that is an SQLite file: made whole or not at all, by one process at a time, and mended when it is opened.

MLflow makes its tables one after the other, for seconds. A process that is killed meanwhile, or a second one that comes in between, would
leave a file that MLflow refuses for ever. So the file is made beside its place, under a lock, and gets its name when it is finished. What
an earlier version left half made is made again if nobody wrote a run into it, and migrated otherwise. A home folder that was moved finds
its artifacts where it lies now.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from models.errors import EnvironmentProblem, UserError
from models.file_content import check_ordinary
from models.files import put_in_place
from orchestration import console
from orchestration.home import Home
from orchestration.single_process import only_process

PATIENCE_S = 180
"""How long another process that makes the store is waited for; it needs seconds."""

_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold whole addresses of artifacts."""


def prepare_store(home: Home) -> None:
    """Make the home's SQLite store if there is none, or mend it; a store that is a server is left alone.

    Raises:
        UserError: the file is no ordinary one or no SQLite database, cannot be migrated, or another process holds it for minutes.
        EnvironmentProblem: it is not whole and may not be written.
        OSError: the disk is full or cannot be written.
    """
    # It tells of every table it makes, and the whole stack of errors that are raised and told by us.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    store = home.store_file
    if store is None:
        return
    if os.path.lexists(store):
        check_ordinary(store)  # SQLite would wait a minute for a pipe
    own = store == home.root / "mlflow.db"
    whole = _is_whole(store)
    moved = whole and own and bool(_moved_from(home, store))
    if whole and not moved:
        return
    if not os.access(store if store.exists() else store.parent, os.W_OK) or not os.access(store.parent, os.W_OK):
        if not whole:
            reason = "is of another version, or half made" if store.exists() else "is not there"
            raise EnvironmentProblem(f"the MLflow store {store} {reason}, and may not be written")
        console.warn(f"the home folder was moved to {home.root}, and its MLflow store may not be written: artifacts are not found")
        return
    lock = store.with_name(f"{store.name}.lock")
    with only_process(lock, f"the making of the MLflow store {store}", advice="End that process.", patience_s=PATIENCE_S):
        if not _is_whole(store):  # another process may have made it while this one waited
            _make_or_migrate(home, store)
        if own:
            _follow_move(home, store)


def _is_whole(store: Path) -> bool:
    """Whether a store has the tables of the installed MLflow.

    Raises:
        UserError: it is no SQLite database.
    """
    if not store.is_file() or not store.stat().st_size:
        return False
    return _rows(store, "SELECT version_num FROM alembic_version") == [(_newest_schema(),)]


def _newest_schema() -> str | None:
    import mlflow
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations").replace("%", "%%"))
    return ScriptDirectory.from_config(config).get_current_head()


def _rows(store: Path, query: str) -> list[tuple[object, ...]]:
    """Return what a query finds; nothing where a table is missing."""
    try:
        with contextlib.closing(sqlite3.connect(store, timeout=60)) as database:
            return database.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "no such column" in str(error):
            return []
        raise UserError(f"the MLflow store {store} cannot be read: {error}") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"the MLflow store {store} is damaged: {error}. Restore it, or move it away: a new one is made.") from None


def _why(errors: str) -> str:
    """Return the error at the end of a traceback, without the statement and the address that SQLAlchemy writes below it."""
    lines = [line for line in errors.strip().splitlines() if line and not line.startswith(("[SQL", "[parameters", "(Background", " "))]
    return lines[-1][:300] if lines else "no reason given"


def _make_or_migrate(home: Home, store: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    part = store.with_name(f".{store.name}.part")
    for rest in store.parent.glob(f"{part.name}*"):  # of a process that was killed: whoever holds the lock is the only maker
        rest.unlink()
    empty = not store.is_file() or not store.stat().st_size
    # Each by itself: an early MLflow has runs and no table of models.
    if not empty and any(_rows(store, f"SELECT 1 FROM {table} LIMIT 1") for table in ("runs", "registered_models")):
        part.touch()
        with contextlib.closing(sqlite3.connect(store)) as old, contextlib.closing(sqlite3.connect(part)) as copy:
            old.backup(copy)
        console.say(f"migrating the MLflow store {store} to this version of MLflow")
        upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{part}"]
        finished = subprocess.run(upgrade, capture_output=True, text=True, check=False)
        if finished.returncode:
            reason = _why(finished.stderr)
            raise UserError(f"the MLflow store {store} is of another version and MLflow cannot migrate it: {reason}. It is left as it was.")
    else:
        part.touch()  # SQLite would give it a mode of its own, whatever the umask says
        try:
            MlflowClient(tracking_uri=f"sqlite:///{part}").search_experiments(max_results=1)
        except MlflowException as error:
            raise UserError(f"cannot make the MLflow store {store}: {error.message}") from None
        with contextlib.closing(sqlite3.connect(part)) as database, database:
            # MLflow's own experiment would put its artifacts into the folder that this process was started in.
            location = (home.artifacts / "0").as_uri()
            database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (location,))
    for suffix in ("-journal", "-wal", "-shm"):  # of the file that is replaced: SQLite would play them back into the new one
        store.with_name(store.name + suffix).unlink(missing_ok=True)
    put_in_place(part, store)


def _moved_from(home: Home, store: Path) -> list[str]:
    """Return the addresses of folders of artifacts, made as this home's own, that lay elsewhere."""
    found = set()
    for table, column in _LOCATIONS[:2]:
        for (address,) in _rows(store, f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE '%{home.artifacts.name}%'"):
            match = re.match(rf"(?:file://)?/.*?/{home.artifacts.name}(?=/|$)", str(address))
            if match and unquote(urlsplit(match[0]).path) != str(home.artifacts):
                found.add(match[0])
    # An artifact root that the user chose may have the same last name: then the home has no such folder of its own.
    return sorted(each for each in found if home.artifacts.is_dir() or not Path(unquote(urlsplit(each).path)).is_dir())


def _follow_move(home: Home, store: Path) -> None:
    moved = _moved_from(home, store)
    if not moved:
        return
    with contextlib.closing(sqlite3.connect(store, timeout=60)) as database, database:
        changed = 0
        for address in moved:
            new = home.artifacts.as_uri()
            for table, column in _LOCATIONS:
                with contextlib.suppress(sqlite3.OperationalError):  # an MLflow without this table or column
                    changed += database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (new, len(address) + 1, address, len(address) + 1, f"{address}/"),
                    ).rowcount
    places = ", ".join(str(Path(unquote(urlsplit(each).path)).parent) for each in moved)
    console.say(f"the home folder was moved here from {places}: {changed} addresses in its MLflow store now say {home.root}")


def experiment_in(home: Home, name: str) -> str | None:
    """Return the id of an experiment in a home's SQLite store; None: the store has none of this name, or is none of this kind."""
    store = home.store_file
    if store is None or not store.is_file():
        return None
    found = [str(number) for number, called in _rows(store, "SELECT experiment_id, name FROM experiments") if called == name]
    return found[0] if found else None
