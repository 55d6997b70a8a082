"""How registries find their files: a new one of a package or a plug-in is found by scanning, a broken one is skipped and told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from models.json_text import first_problem
from models.plugins import modules_that_mention, plugins

Entry = TypeVar("Entry")

_logger = logging.getLogger(__name__)

_broken: dict[str, dict[str, str]] = {}
"""Package -> file -> why its entries are not there."""


def scan(package: str, name: str, kind: type[Entry]) -> dict[str, Entry]:
    """Import every module of `package`, and those of plug-ins that have one, and collect what their tuples called `name` hold, each entry
    under its own `name`.

    A file that cannot be imported or holds something else is skipped with a logged warning, and `broken_files` says why: whoever asks for
    a name that is not there is told. A name that two files claim is neither's; a plug-in cannot take one of ours.

    Args:
        package: dotted name; it is imported when this is called, not before.
        name: of the tuple that a module of the package may define.
        kind: what the entries are.

    Returns:
        Entries in the order of their files' names, those of plug-ins last.
    """
    entries: dict[str, Entry] = {}
    file_of: dict[str, str] = {}
    twice: set[str] = set()
    for module, foreign in [
        *((each, False) for each in modules_of(package)),
        *((each, True) for each in modules_of_plugins(package, name)),
    ]:
        file = module.__name__ if foreign else module.__name__.rpartition(".")[2]
        try:
            found = {entry.name: entry for entry in map(checked_entry(kind), getattr(module, name, ()))}  # type: ignore[attr-defined]
        except (TypeError, AttributeError) as error:
            skip(package, file, f"{name} should be a tuple of {kind.__name__} entries: {error}")
            continue
        for each, entry in found.items():
            if each in entries:
                ours = foreign and "." not in file_of[each]
                twice |= set() if ours else {each}
                skip(package, file, f"{file_of[each]}.py claims the name {each!r} too; {'it keeps it' if ours else 'neither has it'}")
            else:
                entries[each], file_of[each] = entry, file
    return {each: entry for each, entry in entries.items() if each not in twice}


def modules_of_plugins(package: str, name: str) -> Iterator[ModuleType]:
    """Import the modules of plug-ins that mention `name`; one that cannot be imported is skipped as `scan` says of `package`."""
    for file, module in modules_that_mention(name):
        if isinstance(module, Exception):
            skip(package, file, f"it cannot be imported: {type(module).__name__}: {module}")
        else:
            yield module


def checked_entry(kind: type[Entry]) -> Callable[[object], Entry]:
    """Return what lets an entry of a registry through whose fields hold what they should: whoever wrote it may have no type checker.

    Raises:
        TypeError: it is another kind of entry, or a field holds something else; by what is returned.
    """
    fields = _fields_of(kind)  # type: ignore[arg-type]  # mypy does not know that types can be hashed

    def check(entry: object) -> Entry:
        if not isinstance(entry, kind):
            raise TypeError(f"it holds a {type(entry).__name__}")
        for field, allowed in fields.items():
            try:
                allowed.validate_python(getattr(entry, field))
            except ValidationError as error:
                raise TypeError(f"{field} of {str(getattr(entry, 'name', entry))[:60]!r}: {first_problem(error).strip(': ')}") from None
        return entry

    return check


@functools.cache
def _fields_of(kind: type) -> Mapping[str, TypeAdapter[Any]]:
    """Return what the fields of a dataclass may hold; nothing of other classes, and of types that only a type checker knows."""
    if not dataclasses.is_dataclass(kind):
        return {}
    with contextlib.suppress(NameError, PydanticUserError):
        hints = get_type_hints(kind)
        adapters = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        return {name: TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)) for name, hint in adapters.items()}
    return {}


def modules_of(package: str) -> Iterator[ModuleType]:
    """Import the modules of `package` one after the other, sorted by name; one that cannot be imported is skipped as `scan` says."""
    for info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda info: info.name):
        try:
            module = importlib.import_module(f"{package}.{info.name}")
        except (Exception, SystemExit) as error:
            skip(package, info.name, f"it cannot be imported: {type(error).__name__}: {error}")
            continue
        yield module


def skip(package: str, file: str, reason: str) -> None:
    """Note that what a file of a scanned package holds is left out, and say so once.

    Args:
        package: that is scanned. file: name of its module; of a plug-in the whole dotted name.
    """
    known = _broken.setdefault(package, {})
    if known.get(file) != reason:
        known[file] = reason
        _logger.warning("%s is skipped: %s", _shown(package, file), reason)


def _shown(package: str, file: str) -> str:
    return f"the plug-in's module {file}" if _is_foreign(package, file) else f"{package.replace('.', '/')}/{file}.py"


def _is_foreign(package: str, file: str) -> bool:
    return "." in file or any(plugin.module == file for plugin in plugins())


def broken_files(package: str) -> list[str]:
    """Return a sentence for each file of a scanned package, and of plug-ins, that was skipped and is still there."""
    there = {info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    there |= {module for plugin in plugins() for module in plugin.sources}
    skipped = {file: reason for file, reason in _broken.get(package, {}).items() if file in there}
    return [f"{_shown(package, file)} was skipped: {reason}" for file, reason in skipped.items()]
