"""The MLflow store of a home: reached, or one sentence on why not. Everything that speaks to MLflow imports it first."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from urllib.parse import urlsplit

# With MLflow's own seven tries a call to a server that is away takes minutes. It must fail sooner, to be told and tried again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
# MLflow prints a link when a run ends, with the user and password that the address may hold; `Tracker.link` shows it without.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
# Its bars of single files would stand between an error and what it is about.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from alembic.util import CommandError
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from models.errors import EnvironmentProblem, UserError, blames_environment, first_line
from orchestration.home import Home
from orchestration.tracking.local_store import prepare_store


def client_of(home: Home) -> MlflowClient:
    """Return a client of the home's store; one that is a file is made or mended first.

    Raises:
        UserError: a server cannot be reached, or a file is no store.
    """
    _check_address(home)
    _check_reachable(home.tracking_uri)
    logging.getLogger("mlflow.tracking").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each try; what follows says it once
    prepare_store(home)
    with store_errors(home.tracking_uri):
        return MlflowClient(tracking_uri=home.tracking_uri)


def store_exists(home: Home) -> bool:
    """Return whether there is a store to read: a file may not be there yet."""
    return home.store_file is None or home.store_file.is_file()


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what a store answers to the first call into one sentence.

    Raises:
        UserError: it is damaged, or refuses. EnvironmentProblem: the disk, a lock or a mode does not let it work.
    """
    shown = f"the MLflow store {display_uri(uri)}"
    try:
        yield
    except MlflowException as error:
        kind = EnvironmentProblem if blames_environment(error.message) else UserError
        raise kind(f"cannot use {shown}: {first_line(error.message)}") from None
    # A database that is cut, of another kind or of another version: SQLAlchemy's and Alembic's errors quote whole statements.
    except (SQLAlchemyError, CommandError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        if blames_environment(str(cause)):
            raise EnvironmentProblem(f"cannot use {shown}: {first_line(str(cause))}") from None
        raise UserError(f"cannot use {shown}: {first_line(str(cause))}. It is damaged, or not one.") from None
    except ImportError as error:
        raise UserError(f"{shown} needs the package {error.name}: `make setup EXTRAS=server` installs it") from None


def display_uri(uri: str) -> str:
    """Return a URI without user name and password."""
    parts = urlsplit(uri)
    if parts.password or parts.username:
        return uri.replace(parts.netloc, (parts.hostname or "") + (f":{parts.port}" if parts.port else ""))
    return uri


SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def _check_address(home: Home) -> None:
    """Raise a UserError unless the home's store has an address that trials can write to and be found in again."""
    uri, problem = home.tracking_uri, None
    try:
        parts = urlsplit(uri)
        scheme, host, _ = parts.scheme.split("+")[0], parts.hostname, parts.port
    except ValueError as error:
        problem = str(error)
    else:
        if uri.startswith("databricks"):
            return
        if uri != uri.strip() or not uri.isprintable():
            problem = "it begins or ends with a space, or holds what cannot be printed"
        elif scheme not in SCHEMES:
            problem = f"it begins with {scheme}://" if scheme else "it is a folder, in which MLflow keeps no runs any more"
        elif scheme == "sqlite":
            problem = "it names no file" if home.store_file is None else None
        elif (scheme in ("http", "https") and not host) or " " in parts.netloc:
            problem = "it names no host"
    if problem is not None:
        raise UserError(
            f"MLFLOW_TRACKING_URI {_shown_or_hidden(uri)!r} is no address of a store: {problem}. It may be http(s)://HOST:PORT, "
            "postgresql://USER:PASSWORD@HOST/DATABASE, or sqlite:////PATH; unset, the SQLite file of the home folder is used."
        )


def _shown_or_hidden(uri: str) -> str:
    """Return an address that may not be one, without a password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", uri)[:200]


def _check_reachable(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"the MLflow server {display_uri(uri)} cannot be reached: {error}. Start it, or unset MLFLOW_TRACKING_URI to use the "
            "SQLite store of the home folder."
        ) from None
