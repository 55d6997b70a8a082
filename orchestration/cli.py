"""The command line: parse, dispatch, and turn errors into one message and an exit code.

| exit code | what it says |
|---|---|
| 0 | done |
| 1 | something failed that was not foreseen, or what was asked for is not complete |
| 2 | a mistake in what was asked for, or in a file that was read |
| 3 | the environment: a full disk, a place that may not be read or written, a server that is away, a lock that another process holds |
| 130 | interrupted: Ctrl-C or SIGTERM |
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from models.errors import EnvironmentFailure, EnvironmentProblem, UserError, blames_environment, first_line, nearest, unknown_name
from models.plugins import using
from orchestration import console
from orchestration.commands import COMMANDS
from orchestration.interruption import INTERRUPTED, in_good_order
from orchestration.recipes.library import using_folder
from orchestration.storage import uploaded_at_the_end

EPILOG = """examples:
  rayndom demo                                   a sweep, an honest evaluation and an export on real data, in minutes
  rayndom list recipes                           what can be trained
  rayndom show ctrw_digits                       the whole configuration, and where each value comes from
  rayndom train ctrw_digits --training.epochs 5  train a recipe, one field changed
  rayndom sweep ctrw_bounds_digits               search CTRW's bounds A and B
  rayndom evaluate FOLDER --suite quick          how robust is it, under which protocol
  rayndom reproduce ctrw.table4                  a paper's table, small, beside the printed numbers

exit codes: 0 done; 1 not foreseen, or not complete; 2 a mistake in what was asked or read; 3 the environment (disk, server, permissions,
another process that does the same); 130 interrupted

`rayndom COMMAND --help` explains a command."""

ENVIRONMENT = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
    | {errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOLCK, errno.ESTALE}
)
"""Errors of the operating system that are nobody's mistake in what was typed."""

_CHOICE = re.compile(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)$", re.DOTALL)

PLACES = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ENXIO, errno.ENODEV})
"""What the operating system answers where a file, a folder or a link is something else than it should be."""

_MLFLOW = "the MLflow store (mlflow.db of the home folder, or MLFLOW_TRACKING_URI)"
STORES = {
    "mlflow": _MLFLOW,
    "alembic": _MLFLOW,
    "sqlite3": "a database of the home folder (mlflow.db or study.db)",
    "sqlalchemy": "a database of the home folder (mlflow.db or study.db)",
    "optuna": "the study (study.db) of the sweep",
}
"""Package of an error that nobody on the way put into words -> what cannot be used."""

SAMPLES = "--samples"
NUMBER_OF_IMAGES = ("--num-samples", "--images", "--num-images", "--num-examples", "--examples", "--num-test-examples", "--test-examples")
"""What people call the number of images, which has one name on the command line."""

_OUR_VARIABLES = "RAYNDOM_"

RESUMABLE = ("train", "sweep", "evaluate", "rescore", "reproduce", "demo", "resume")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        found = _CHOICE.match(message)
        if found:
            where, given, choices = found.groups()
            raise unknown_name(f"value of {where}:", given, [choice.strip(" '") for choice in choices.split(",")])
        raise UserError(f"{message}. `{self.prog} --help` shows the usage.")

    def flags(self) -> list[str]:
        """Return the flags that this parser knows."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="rayndom",
        description="Sweeps, trains and honestly evaluates randomized adversarial defences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        child = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=not command.takes_fields,
            allow_abbrev=False,
        )
        child.add_argument("--home", help="home folder of runs, sweeps and the MLflow store (default: ./rayndom_home)")
        child.add_argument("--recipes", metavar="FOLDER", help="your settings and methods (default: RAYNDOM_RECIPES, else ./recipes)")
        child.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FOLDER",
            help="a package with defences of yours (also RAYNDOM_PLUGINS)",
        )
        child.add_argument("--json", action="store_true", help="print the result as JSON, everything else to the error stream")
        child.add_argument("--quiet", action="store_true", help="print tables, results, warnings and errors alone")
        child.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        if command.takes_fields:
            child.add_argument("-h", "--help", action="store_true", help="show this help, with the fields of the recipe if named")
        command.add_arguments(child)
        child.set_defaults(run=command.run, takes_fields=command.takes_fields, parser=child, root=parser)
    return parser


@contextlib.contextmanager
def _variables_kept() -> Iterator[None]:
    """Leave our environment variables as they were: a flag that stands for one counts for its own command alone."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_OUR_VARIABLES)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(_OUR_VARIABLES)]:
            del os.environ[name]
        os.environ.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if not debug:
        warnings.filterwarnings("ignore")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        # Why a trial failed is one line of ours; Tune would print the stack of every process on the way.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, handlers=[_Warnings()])
    try:
        with in_good_order(), _variables_kept():
            return _run(arguments)
    except UserError as error:
        console.error(str(error))
        return 3 if isinstance(error, EnvironmentProblem) else 2
    except KeyboardInterrupt:
        again = console.without_passwords(shlex.join(["rayndom", *arguments]))
        kept = "everything finished is kept; go on with:" if _resumes(arguments) else "nothing is left half done; again:"
        console.say(f"interrupted; {kept}  {again}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        return _last_resort(error, arguments)


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    names = [command.name for command in COMMANDS]
    if not arguments[0].startswith("-") and arguments[0] not in names:
        raise unknown_name("command", arguments[0], names)
    empty = next((word for word in arguments if word.startswith("--") and word.endswith("=--")), None)
    if empty is not None:  # argparse makes an empty list of it
        raise UserError(f"{empty[:200]}: `--` is no value")
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not parsed.takes_fields:
        flag = rest[0].partition("=")[0]
        known = parsed.parser.flags()
        renamed = [SAMPLES] if flag.replace("_", "-") in NUMBER_OF_IMAGES and SAMPLES in known else []
        close = renamed or (nearest(flag, known) if flag.startswith("-") else [])
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown argument {rest[0][:200]!r}.{hint} `rayndom {parsed.command} --help` shows the usage.")
    console.use_json(parsed.json)
    console.use_quiet(parsed.quiet)
    parsed.fields = rest
    with using(parsed.plugin), using_folder(parsed.recipes), console.results_alone(), uploaded_at_the_end():
        return parsed.run(parsed) or 0


def _last_resort(error: Exception, arguments: Sequence[str]) -> int:
    """Say what was being done when something happened that was not foreseen, and return the exit code."""
    code = _code(error)
    # What was not foreseen happens again; only what the environment lacked may be there the next time.
    hint = "; what is finished is kept, and the same command goes on from there" if code == 3 and _resumes(arguments) else ""
    console.error(f"`rayndom {' '.join(arguments[:2])[:120]}` ended: {_describe(error)}\n(--debug shows where{hint})")
    return code


def _resumes(arguments: Sequence[str]) -> bool:
    """Whether the command leaves something that the next one goes on from."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return command in RESUMABLE and "--dry-run" not in arguments


def _code(error: Exception) -> int:
    if isinstance(error, EnvironmentFailure | MemoryError) or blames_environment(str(error)):
        return 3
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        return 3
    return 2 if _store(error) or (isinstance(error, OSError) and error.errno in PLACES) else 1


def _store(error: BaseException) -> str | None:
    """Return which store an error comes from, None if from none."""
    return STORES.get(type(error).__module__.partition(".")[0])


class _Warnings(logging.Handler):
    """What modules log from WARNING on, as the console says it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.warn(record.getMessage())


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if blames_environment(text):
        return text.splitlines()[0]  # the statement that follows is nobody's business
    store = _store(error)
    if store is not None:  # SQLAlchemy's errors quote whole statements after the first line
        return f"{store} cannot be used: {first_line(error)}"
    if isinstance(error, MemoryError):
        return f"not enough memory {text}".rstrip()
    # A key or an index says nothing without its kind: `KeyError: 'finished_epochs'`.
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"rayndom {version('rayndom')}"
    except PackageNotFoundError:
        return "rayndom (not installed)"


if __name__ == "__main__":
    sys.exit(main())
