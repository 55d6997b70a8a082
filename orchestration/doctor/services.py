"""Checks of Ray, the MLflow store and the Optuna studies. Nothing is started, written or migrated."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version
from sqlalchemy.engine import make_url

from models.file_content import expanded
from orchestration.doctor.check import CONNECT_TIMEOUT_S, Check, connection_error
from orchestration.doctor.machine import filesystem_kind, is_network
from orchestration.environment import installed_version
from orchestration.home import Home

RAY_PORTS = {"ray": 10001, "http": 8265, "https": 443, "": 6379}
"""Ports where an address without one is answered: Ray Client, the dashboard's job server, the head itself."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
DATABASE_DRIVERS = {
    "postgresql": make_url("postgresql://").get_driver_name(),  # SQLAlchemy 2.1: psycopg; before: psycopg2
    "mysql": "pymysql",
    "mssql": "pymssql",
}
BUSY_S = 2.0
UNSET = "unset MLFLOW_TRACKING_URI to use the SQLite file of the home folder"


def check_services(home: Home) -> list[Check]:
    """Return the findings on Ray, MLflow and Optuna."""
    address = os.environ.get("RAY_ADDRESS", "")
    return [
        check_ray_address(address),
        check_ray_token(address),
        check_mlflow_store(home.tracking_uri),
        check_studies(home.root / "sweeps"),
    ]


def check_ray_address(address: str) -> Check:
    """Look whether the cluster that RAY_ADDRESS names answers."""
    name = "Ray cluster"
    version = installed_version("ray") or "not installed"
    if address in ("", "local"):
        return Check(name, "ok", f"Ray {version}; RAY_ADDRESS names no cluster: Ray starts on this machine")
    if address == "auto":
        return Check(name, "ok", f"Ray {version}; RAY_ADDRESS=auto: the cluster this machine belongs to")
    scheme, host, port = split_address(address)
    if not host or port is None:
        return Check(name, "fail", f"RAY_ADDRESS={address} is no address", "write host:port, or unset RAY_ADDRESS")
    problem = connection_error(host, port)
    if problem:
        mend = "start the cluster (`ray up ray_cluster.yaml`), open the tunnel (`ray dashboard`), or unset RAY_ADDRESS"
        return Check(name, "fail", f"nothing answers at {host}:{port} ({problem})", mend)
    found = f"Ray {version}; {host}:{port} answers"
    if scheme == "ray":
        mend = "a long run is safer as a job: `ray job submit` (docs/cluster.md)"
        return Check(name, "warn", f"{found}, as Ray Client: a run ends when this connection does", mend)
    return Check(name, "ok", found)


def split_address(address: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a Ray address such as `10.0.0.1:6379` or `ray://head`; the port is None if it is no number."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or RAY_PORTS.get(parts.scheme)
    except ValueError:
        port = None
    return parts.scheme, parts.hostname or "", port


def check_ray_token(address: str) -> Check:
    """Look whether Ray will ask for a token and whether there is one. The token itself is never shown."""
    name = "Ray token"
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    remote = address not in ("", "local")
    if mode == "disabled":
        if not remote:
            return Check(name, "ok", "RAY_AUTH_MODE=disabled, for Ray on this machine")
        mend = "set RAY_AUTH_MODE=token here and on the cluster (docs/cluster.md)"
        return Check(name, "warn", "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports can run code there", mend)
    if mode not in ("", "token", "k8s"):
        return Check(name, "fail", f"RAY_AUTH_MODE={mode} is no mode", "set it to token or disabled, or unset it")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = expanded(path or "~/.ray/auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Check(name, "ok", "from RAY_AUTH_TOKEN")
    try:
        present = bool(file.read_text().strip())
    except FileNotFoundError:
        present = False
    except OSError as error:
        return Check(name, "fail", f"the token file cannot be read: {error.strerror}", "make it readable for you alone")
    if present:
        return Check(name, "ok", f"from {'RAY_AUTH_TOKEN_PATH' if path else '~/.ray/auth_token'}")
    if path:
        mend = "write the cluster's token there, or unset RAY_AUTH_TOKEN_PATH"
        return Check(name, "fail", "RAY_AUTH_TOKEN_PATH names a file that is empty or missing", mend)
    if remote:
        mend = "copy the head's ~/.ray/auth_token here, or `ray get-auth-token --generate` before `ray up`"
        return Check(name, "fail" if mode else "warn", "none here, and a cluster usually asks for one", mend)
    return Check(name, "ok", "none yet: Ray on this machine makes its own in ~/.ray/auth_token")


def check_mlflow_store(uri: str) -> Check:
    """Look whether the MLflow store of a tracking URI can be used. Passwords in the URI are not shown."""
    name = "MLflow store"
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind == "sqlite":
        return _check_mlflow_sqlite(name, uri)
    if kind in ("http", "https"):
        return _check_mlflow_server(name, uri)
    if kind in DATABASE_PORTS:
        driver = parts.scheme.partition("+")[2] or DATABASE_DRIVERS[kind]
        if importlib.util.find_spec(driver) is None:
            return Check(name, "fail", f"{kind} needs the package {driver}", "`make setup EXTRAS=server`")
        try:
            host, port = parts.hostname or "localhost", parts.port or DATABASE_PORTS[kind]
        except ValueError as error:
            return Check(name, "fail", f"MLFLOW_TRACKING_URI: {error}", UNSET)
        problem = connection_error(host, port)
        if problem:
            return Check(name, "fail", f"{kind} does not answer at {host}:{port} ({problem})", f"start it, or {UNSET}")
        return Check(name, "ok", f"{kind} answers at {host}:{port}")
    if kind in ("", "file"):
        return Check(name, "fail", "MLFLOW_TRACKING_URI names a folder, which MLflow 3 no longer takes", UNSET)
    return Check(name, "warn", f"a store of kind {kind!r}, which is not checked")


def _check_mlflow_sqlite(name: str, uri: str) -> Check:
    file = Path(uri.partition(":///")[2].partition("?")[0])
    if not file.is_absolute():
        mend = "write sqlite:////absolute/path: Ray's workers start in other folders"
        return Check(name, "fail", f"{file} depends on the working folder", mend)
    if not file.exists():
        return Check(name, "ok", f"{file} (made by the first run)")
    if file.stat().st_size == 0:
        return Check(name, "ok", f"{file} (empty; the first run fills it)")
    if is_network(filesystem_kind(file)):
        # Its writer is another machine, and a lock taken from here could be in its way.
        return Check(name, "ok", f"{file} (on a network disk: left to the machine that writes it)")
    try:
        rows = read_sqlite(file, "SELECT version_num FROM alembic_version")
    except sqlite3.Error as error:
        return _sqlite_trouble(name, file, error, "move it away and start again; runs and models in the home are kept")
    revision, revisions = (rows[0][0] if rows else None), mlflow_revisions()
    if not revisions or revision == newest_revision(revisions):
        return Check(name, "ok", f"{file}")
    if revision in revisions:
        mend = f"back it up, then `mlflow db upgrade {uri}`"
        return Check(name, "fail", f"{file} was made by an older MLflow (schema {revision})", mend)
    mend = "run `make setup` in a newer checkout, or choose another home"
    return Check(name, "fail", f"{file} was made by a newer MLflow (schema {revision})", mend)


def _check_mlflow_server(name: str, uri: str) -> Check:
    parts = urlsplit(uri)
    shown = f"{parts.scheme}://{parts.hostname}" + (f":{parts.netloc.rpartition(':')[2]}" if ":" in parts.netloc else "")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health", query="")
    try:
        with urllib.request.urlopen(bare.geturl(), timeout=CONNECT_TIMEOUT_S) as answer:
            healthy = answer.status == 200
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            mend = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return Check(name, "warn", f"{shown} answers and wants a login ({error.code})", mend)
        return Check(name, "fail", f"{shown} answers {error.code} to /health: no MLflow server", f"correct it, or {UNSET}")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Check(name, "fail", f"{shown} does not answer ({reason})", f"start it, or {UNSET}")
    if not healthy:
        return Check(name, "fail", f"{shown} says that it is not healthy", "look at the server's log")
    return Check(name, "ok", f"{shown} is healthy")


def check_studies(sweeps: Path) -> Check:
    """Look whether the Optuna study of each sweep can be read and written."""
    name = "Optuna studies"
    version = installed_version("optuna") or "not installed"
    files = sorted(path for path in sweeps.glob("*/study.db") if path.is_file())
    if files and is_network(filesystem_kind(sweeps)):
        return Check(name, "ok", f"{len(files)} on a network disk: left to the machine that writes them")
    open_trials = 0
    for file in files:
        try:
            written_by = read_sqlite(file, "SELECT library_version FROM version_info")
            open_trials += read_sqlite(file, "SELECT COUNT(*) FROM trials WHERE state = 'RUNNING'")[0][0]
        except sqlite3.Error as error:
            return _sqlite_trouble(name, file, error, f"move {file.parent} away to start that sweep again")
        if written_by and is_newer_major(written_by[0][0], version):
            found = f"{file} was written by Optuna {written_by[0][0]}; here is {version}"
            return Check(name, "fail", found, "run `make setup` in a newer checkout, or choose another home")
    if not files:
        return Check(name, "ok", f"none yet; Optuna {version} keeps each in an SQLite file of the home folder")
    waiting = f"; {open_trials} trials run, or were interrupted and go on with their sweep" if open_trials else ""
    return Check(name, "ok", f"{len(files)} can be read and written{waiting}")


def _sqlite_trouble(name: str, file: Path, error: sqlite3.Error, mend: str) -> Check:
    code = getattr(error, "sqlite_errorcode", None)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Check(name, "warn", f"{file} is busy: another program writes to it", "try again when it is done")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return Check(name, "fail", f"{file} cannot be written ({error})", "make it yours, or choose another home")
    return Check(name, "fail", f"{file} is damaged or something else ({error})", mend)


def read_sqlite(file: Path, query: str) -> list[tuple]:
    """Return the rows of a query on an existing SQLite file, having made sure that it can be written to.

    Raises:
        sqlite3.Error: it cannot be opened, read or locked for writing, or it lacks the table.
    """
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S)) as database:
        database.execute("BEGIN IMMEDIATE")
        try:
            return database.execute(query).fetchall()
        finally:
            database.rollback()


def mlflow_revisions() -> dict[str, str | None]:
    """Return each schema revision that the installed MLflow knows with the one before it, read from its migration files."""
    spec = importlib.util.find_spec("mlflow")
    folders: Iterable[str] = (spec.submodule_search_locations or ()) if spec else ()
    revisions: dict[str, str | None] = {}
    for folder in folders:
        for file in Path(folder, "store", "db_migrations", "versions").glob("*.py"):
            named = dict(re.findall(r"^(revision|down_revision)\s*(?::[^=]+)?=\s*[\"'](\w+)[\"']", file.read_text(), re.M))
            if "revision" in named:
                revisions[named["revision"]] = named.get("down_revision")
    return revisions


def newest_revision(revisions: dict[str, str | None]) -> str | None:
    """Return the revision that no other one comes after."""
    last = set(revisions) - set(revisions.values())
    return last.pop() if len(last) == 1 else None


def is_newer_major(written_by: str, installed: str) -> bool:
    """Return whether the first version's major number is greater."""
    try:
        return Version(written_by).major > Version(installed).major
    except InvalidVersion:
        return False
