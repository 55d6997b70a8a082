"""Plug-ins: packages of other people whose defences, objectives, backbones, attacks, suites and recipes are found beside our own.

A plug-in is a package (or one module). An installed one names itself by an entry point of the group `rayndom.plugins`; one that is not
installed is named by `--plugin FOLDER` or the environment variable RAYNDOM_PLUGINS (folders or module names, joined by `:`). Each of its
modules may hold the tuples that our own packages are scanned for; beside them lie `recipes/settings`, `recipes/methods` and `suites`.
Nothing of a plug-in is imported before something asks for a name, and then only the modules that mention the tuple that is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import keyword
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from models.errors import UserError
from models.file_content import expanded

GROUP = "rayndom.plugins"
VARIABLE = "RAYNDOM_PLUGINS"
_LONGEST = 4000  # characters of a path


@dataclass(frozen=True)
class Plugin:
    """A plug-in.

    Attributes:
        module: name by which it is imported. file: its `__init__.py`, its only file, or None for a folder without `__init__.py`.
        folder: that holds its modules and files; None: it is one module. is_installed: an entry point names it.
    """

    module: str
    file: Path | None
    folder: Path | None
    is_installed: bool = False

    @property
    def sources(self) -> dict[str, Path]:
        """Its modules by name: itself, and those of its folder."""
        found = {} if self.file is None else {self.module: self.file}
        if self.folder is not None:
            files = (path for path in sorted(self.folder.glob("*.py")) if path.stem.isidentifier() and path.stem != "__init__")
            found |= {f"{self.module}.{path.stem}": path for path in files}
        return {name: path for name, path in found.items() if path.is_file()}


def sent_plugins() -> dict[str, Path]:
    """Return what another machine lacks of the plug-ins: top-level folders and files by the name that they are imported by.

    What is installed must be installed there, too.
    """
    found = {}
    for plugin in plugins():
        place = plugin.folder or plugin.file
        if place is not None and not plugin.is_installed:
            above = plugin.module.count(".")
            found[plugin.module.partition(".")[0]] = place.parents[above - 1] if above else place
    return found


def plugins() -> tuple[Plugin, ...]:
    """Return all plug-ins: installed ones by the names of their entry points, then those that are named.

    Raises:
        UserError: what is named is no plug-in.
    """
    return _found(os.environ.get(VARIABLE, ""))


@functools.lru_cache(maxsize=8)
def _found(named: str) -> tuple[Plugin, ...]:
    import importlib.metadata  # here: a command's help does without

    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    installed = [point.value.partition(":")[0] for point in points]
    others = [module for each in named.split(os.pathsep) if each for module in _modules_at(each)]
    return tuple(_plugin(module, module in installed) for module in dict.fromkeys([*installed, *others]))


Answer = TypeVar("Answer")


def once_for_plugins(function: Callable[[], Answer]) -> Callable[[], Answer]:
    """Remember what a registry found, for the plug-ins there are: with others it looks again."""
    known: dict[tuple[Plugin, ...], Answer] = {}

    @functools.wraps(function)
    def found() -> Answer:
        now = plugins()
        if now not in known:
            known[now] = function()
        return known[now]

    found.cache_clear = known.clear  # type: ignore[attr-defined]  # as `functools.cache` has it
    return found


def named_absolutely(named: Sequence[str]) -> str:
    """Return the value of RAYNDOM_PLUGINS that names these plug-ins wherever a process is started.

    Raises:
        UserError: there is no such folder.
    """
    for each in named:
        if not each.strip() or "\0" in each or len(each) > _LONGEST:
            raise UserError(f"the plug-in {each[:100]!r} is not there; name the folder of a package, or an importable module")
    return os.pathsep.join(str(expanded(each).resolve()) if _is_place(each) else each for each in named)


@contextmanager
def using(named: Sequence[str]) -> Iterator[None]:
    """Take these plug-ins too, inside; none changes nothing. Processes that are started inside do as well.

    Raises:
        UserError: one of them is no plug-in.
    """
    before = os.environ.get(VARIABLE)
    try:
        if named:
            os.environ[VARIABLE] = os.pathsep.join(filter(None, [before, named_absolutely(named)]))
            plugins()  # what cannot be found is said before anything begins
        yield
    finally:
        if named:
            os.environ.pop(VARIABLE, None)
            os.environ.update({} if before is None else {VARIABLE: before})


def _is_place(named: str) -> bool:
    return os.sep in named or named.startswith((".", "~")) or os.path.exists(named)  # where it cannot be a path: no


def _modules_at(named: str) -> list[str]:
    """Return the names of modules that a word of RAYNDOM_PLUGINS stands for, importable from now on."""
    if not _is_place(named):
        return [named]
    place = expanded(named).resolve()
    if not os.path.exists(place):
        raise UserError(f"the plug-in {named} is not there; name the folder of a package, or an importable module")
    project = place / "pyproject.toml"
    if project.is_file():
        declared = _declared(project)
        if declared:
            for root in (place / "src", place):
                _make_importable(root)
            return declared
    name = place.stem if place.is_file() else place.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"the plug-in {place} cannot be imported under its name: {name!r} should be letters, digits and underscores")
    _make_importable(place.parent)
    found = importlib.util.find_spec(name)
    places = [] if found is None else [*(found.submodule_search_locations or ()), *([found.origin] if found.origin else [])]
    if not any(Path(each).resolve() == place for each in places):
        raise UserError(
            f"the plug-in {place} has the name of another module ({places[0] if places else 'none'}); give the folder another name"
        )
    return [name]


def _declared(project: Path) -> list[str]:
    import tomllib

    try:
        content = tomllib.loads(project.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{project} cannot be read: {error}") from None
    points: Any = content
    for table in ("project", "entry-points", GROUP):
        points = points.get(table, {})
        if not isinstance(points, dict):
            raise UserError(f"{project}: {table!r} should be a table, as [project.entry-points.{GROUP!r}]")
    return [str(value).partition(":")[0] for value in points.values()]


def _make_importable(folder: Path) -> None:
    # At the end: what else lies there must not take the place of installed packages.
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _plugin(module: str, is_installed: bool) -> Plugin:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"the plug-in {module} cannot be found: {error}") from None
    if found is None:
        raise UserError(f"there is no module {module}, which {VARIABLE} or an entry point of {GROUP} names as a plug-in")
    folders = list(found.submodule_search_locations or ())
    file = Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    return Plugin(module, file, Path(folders[0]) if folders else None, is_installed)


def modules_that_mention(name: str) -> Iterator[tuple[str, ModuleType | Exception]]:
    """Import the modules of plug-ins whose text mentions `name`; return each by its name, or why it cannot be imported."""
    for plugin in plugins():
        for module, path in plugin.sources.items():
            if name in path.read_text(encoding="utf-8", errors="replace"):
                try:
                    yield module, importlib.import_module(module)
                except (Exception, SystemExit) as error:
                    yield module, error if isinstance(error, Exception) else ImportError(str(error))


def files_of_plugins(folder: str) -> list[Path]:
    """Return the YAML files of all plug-ins in a folder of theirs, e.g. `suites`."""
    places = (plugin.folder / folder for plugin in plugins() if plugin.folder is not None)
    return [path for place in places for path in sorted(place.glob("*.y*ml")) if path.suffix in (".yaml", ".yml")]


def prepare_worker() -> None:
    """Make the plug-ins of this process's environment importable: called by Ray in every worker before it receives anything."""
    plugins()
