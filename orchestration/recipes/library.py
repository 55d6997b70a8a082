"""The files that recipes are composed of: settings and methods, shipped and the user's own.

`settings/<setting>.yaml` says on what is trained (data, network, schedule), `methods/<method>.yaml` how (defence, objective, what some
settings need differently). Shipped ones lie beside this file. The user's own lie in a folder with the same two sub-folders: the one that
`--recipes` or the environment variable RAYNDOM_RECIPES names, else `./recipes` where it exists; plug-ins have such
folders, too. Names are listed without reading files.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from models.errors import UserError, nearest, unknown_name
from models.file_content import absolute
from models.plugins import files_of_plugins
from models.yaml_text import read_yaml
from orchestration.recipes.trees import Tree, merge

SHIPPED = Path(__file__).parent
VARIABLE = "RAYNDOM_RECIPES"
OWN_FOLDER = "recipes"
SETTINGS, METHODS = "settings", "methods"

_NAME = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")
_LONGEST_NAME = 100
_METHOD_KEYS = ("settings", "uses", "where", "variants")
_VARIANT_KEYS = ("description", "settings", "without_exceptions")


@dataclass(frozen=True)
class Variant:
    """A named change of a method.

    Attributes:
        tree: sections of the experiment. description: instead of the method's, or empty. settings: for which it is listed.
        without_exceptions: whether it starts from the method and the setting alone, without what the setting needs differently.
    """

    tree: Tree
    description: str = ""
    settings: tuple[str, ...] = ()
    without_exceptions: bool = False


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        tree: sections of the experiment, on any setting. settings: for which it is listed; it can be combined with any.
        uses: setting -> setting whose values the method takes in its place.
        exceptions: setting -> what it needs differently, with a `description` of its own where that is no longer true.
        variants: by name.
    """

    name: str
    description: str
    tree: Tree
    settings: tuple[str, ...] = ()
    uses: Mapping[str, str] = field(default_factory=dict)
    exceptions: Mapping[str, Tree] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A setting: sections of the experiment, those of the settings it extends merged in."""

    name: str
    description: str
    tree: Tree


@contextmanager
def using_folder(folder: str | None) -> Iterator[None]:
    """Take settings and methods from `folder` too, inside; None changes nothing. Processes that are started inside do as well."""
    before = os.environ.get(VARIABLE)
    if folder is not None:
        os.environ[VARIABLE] = str(absolute(folder))
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop(VARIABLE)
            os.environ.update({} if before is None else {VARIABLE: before})


def own_folder() -> Path | None:
    """Return the user's folder of settings and methods, or None.

    Raises:
        UserError: RAYNDOM_RECIPES or `--recipes` names something else.
    """
    named = os.environ.get(VARIABLE)
    folder = absolute(named or OWN_FOLDER)
    if any((folder / kind).is_dir() for kind in (SETTINGS, METHODS)):
        return None if folder == SHIPPED else folder
    if named:
        raise UserError(f"{VARIABLE} (or --recipes) names {folder}, which has neither a folder `{SETTINGS}` nor a folder `{METHODS}`")
    return None


def setting_files() -> dict[str, Path]:
    """Return the file of each setting by name."""
    return _files(SETTINGS)


def method_files() -> dict[str, Path]:
    """Return the file of each method by name."""
    return _files(METHODS)


def read_setting(name: str) -> Setting:
    """Return a setting.

    Raises:
        UserError: it does not exist, or its file or one that it extends cannot be read.
    """
    tree, description = _inherited(SETTINGS, name, ())
    return Setting(name, description or name, tree)


def read_method(name: str) -> Method:
    """Return a method.

    Raises:
        UserError: it does not exist, or its file is not that of a method.
    """
    tree, description = _inherited(METHODS, name, ())
    source = method_files()[name].name
    own = {key: tree.pop(key) for key in _METHOD_KEYS if key in tree}
    settings = _names(own.get("settings", []), f"{source}: settings")
    uses = _mapping(own.get("uses", {}), f"{source}: uses")
    for key, value in uses.items():
        _known_settings([key, value], f"{source}: uses")
    _known_settings(settings, f"{source}: settings")
    variants = {
        key: _variant(value, f"{source}: variants.{key}") for key, value in _mapping(own.get("variants", {}), f"{source}: variants").items()
    }
    return Method(name, description or name, tree, settings, uses, _exceptions(own.get("where", {}), source), variants)


def readable_methods() -> list[Method]:
    """Return all methods whose files can be read: one that is broken hides no other."""
    return [method for name in method_files() if isinstance(method := _try(read_method, name), Method)]


def readable_settings() -> list[Setting]:
    """Return all settings whose files can be read."""
    return [setting for name in setting_files() if isinstance(setting := _try(read_setting, name), Setting)]


def problems() -> list[str]:
    """Return what is wrong with the user's own files, one sentence each."""
    found = [problem for kind in (SETTINGS, METHODS) for problem in _refused(kind).values()]
    tried = [*(_try(read_setting, name) for name in setting_files()), *(_try(read_method, name) for name in method_files())]
    return list(dict.fromkeys([*found, *(str(each) for each in tried if isinstance(each, UserError))]))


T = TypeVar("T")


def _try(read: Callable[[str], T], name: str) -> T | UserError:
    try:
        return read(name)
    except UserError as error:
        return error


def _files(kind: str) -> dict[str, Path]:
    refused = _refused(kind)
    return dict(_listed(SHIPPED / kind)) | {name: path for name, path in _own(kind).items() if name not in refused}


def _refused(kind: str) -> dict[str, str]:
    """Return name -> why a file of the user's own cannot stand for that name."""
    shipped = _listed(SHIPPED / kind)
    found: dict[str, str] = {}
    for name, path in _own(kind).items():
        if name in shipped:
            found[name] = f"{path}: {name!r} is shipped already in {kind}; choose another name, and `extends: {name}` if it is like it"
        elif not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            found[name] = f"{path}: a name is small letters and digits, joined by single underscores, as `my_images`"
    return found


def _own(kind: str) -> Mapping[str, Path]:
    folder = own_folder()
    return {path.stem: path for path in files_of_plugins(f"recipes/{kind}")} | (_yaml_files(folder / kind) if folder else {})


def _yaml_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.y*ml")) if path.suffix in (".yaml", ".yml")}


_listed = functools.cache(_yaml_files)


def _read(path: Path) -> Tree:
    stat = path.stat() if path.is_file() else None
    return _read_once(path, (stat.st_mtime_ns, stat.st_size) if stat else None)


@functools.lru_cache(maxsize=256)
def _read_once(path: Path, stamp: tuple[int, int] | None) -> Tree:
    return read_yaml(path)


def _inherited(kind: str, name: str, below: tuple[str, ...]) -> tuple[Tree, str]:
    """Return a file's content with that of the files it extends merged under it, and its own description."""
    files, refused = _files(kind), _refused(kind)
    if name in refused:
        raise UserError(refused[name])
    if name not in files:
        where = f"{files[below[-1]].name}: extends: " if below else ""
        raise UserError(f"{where}{unknown_name(kind[:-1], name, files)}")
    if name in below:
        raise UserError(f"{files[name].name} extends itself: {' -> '.join((*below[below.index(name) :], name))}")
    tree, source = dict(_read(files[name])), files[name].name
    description, base = _text(tree.pop("description", ""), f"{source}: description"), tree.pop("extends", None)
    for key in ("where", "variants"):
        if kind == METHODS and key in tree:
            tree[key] = _mapping(tree[key], f"{source}: {key}")
    if base is None:
        return tree, description
    inherited, _ = _inherited(kind, _text(base, f"{source}: extends"), (*below, name))
    inherited.pop("settings", None)
    return merge(inherited, tree), description


def _exceptions(value: Any, source: str) -> dict[str, Tree]:
    exceptions: dict[str, Tree] = {}
    for names, tree in _mapping(value, f"{source}: where").items():
        settings = [name.strip() for name in names.split(",")]
        _known_settings(settings, f"{source}: where")
        for setting in settings:
            exceptions[setting] = merge(exceptions.get(setting, {}), _mapping(tree, f"{source}: where.{setting}"))
    return exceptions


def _variant(value: Any, where: str) -> Variant:
    tree = dict(_mapping(value, where))
    own = {key: tree.pop(key) for key in _VARIANT_KEYS if key in tree}
    without = own.get("without_exceptions", False)
    if not isinstance(without, bool):
        raise UserError(f"{where}.without_exceptions is true or false, not {without!r}")
    settings = _names(own.get("settings", []), f"{where}.settings")
    _known_settings(settings, f"{where}.settings")
    return Variant(tree, _text(own.get("description", ""), f"{where}.description"), settings, without)


def _known_settings(names: tuple[str, ...] | list[str], where: str) -> None:
    known = setting_files()
    for name in names:
        if name not in known:
            close = nearest(str(name), known)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{where}: there is no setting {str(name)[:100]!r}.{hint}")


def _mapping(value: Any, where: str) -> Tree:
    if not isinstance(value, dict):
        raise UserError(f"{where} should be a mapping, it is {value!r:.100}")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} should be a list of names, it is {value!r:.100}")
    return tuple(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} should be text, it is {value!r:.100}")
    return value
