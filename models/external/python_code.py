"""A network from a callable of a Python file or an importable module. Its code is executed: whoever names it means it."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from models.errors import UserError, unknown_name
from models.file_content import existing_file


def built_by(source: str, attribute: str, folder: str) -> nn.Module:
    """Return what a callable without arguments builds.

    Args:
        source: absolute path of a Python file, which is executed anew, or the dotted name of a module. attribute: dotted name of the
            callable in it. folder: where the module is looked for, before every other place.

    Raises:
        UserError: no such file, module or callable; its code raises; it needs arguments; or it returns no `torch.nn.Module`.
    """
    shown = f"{Path(source).name if is_file(source) else source}:{attribute}"
    with contextlib.redirect_stdout(sys.stderr):  # what a user's code prints must not stand among results
        module = _executed(Path(source)) if is_file(source) else _imported(source, folder)
        found = _attribute_of(module, attribute, shown)
        if isinstance(found, nn.Module):
            raise UserError(f"{shown} is a network, not a callable that returns one: write `def build(): return ...` and name that")
        if not callable(found):
            raise UserError(f"{shown} is a {type(found).__name__}, not a callable that returns a torch.nn.Module")
        try:
            model = found()
        except (Exception, SystemExit) as error:
            raise UserError(f"{shown} raised {_what_happened(error, source)}; it is called without arguments") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{shown} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def is_file(source: str) -> bool:
    """Return whether a source is a Python file, not the name of a module."""
    return source.endswith(".py")


def callables_of(path: Path) -> list[str]:
    """Return the names of functions and classes at the top of a Python file, which is not executed; none where it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def module_file(name: str, folder: str) -> Path:
    """Return the file of an importable module, which is not executed; the packages that it is in are.

    Raises:
        UserError: there is none.
    """
    with _found_first(folder):
        try:
            spec = importlib.util.find_spec(name)
        except (Exception, SystemExit) as error:  # the package around it is executed
            raise UserError(f"no module {name!r} can be imported: {type(error).__name__}: {error}") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"no module {name!r} can be imported here; a file is named with its ending, as {name.rpartition('.')[2]}.py:NAME")
    return Path(spec.origin)


def _executed(path: Path) -> ModuleType:
    """Execute a Python file as a module of a name that depends on what it holds, so that the same file is the same code elsewhere."""
    path = existing_file(path, "model")
    name = f"{path.stem}_{hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `inspect`, dataclasses and pickle look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what lies beside the file, last: it must not stand for a library
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be executed: {_what_happened(error, str(path))}") from None
    return module


def _imported(name: str, folder: str) -> ModuleType:
    file = module_file(name, folder)
    with _found_first(folder):
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(f"module {name} cannot be imported: {_what_happened(error, str(file))}") from None


@contextlib.contextmanager
def _found_first(folder: str) -> Any:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(folder)


def _attribute_of(module: ModuleType, attribute: str, shown: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise unknown_name(f"callable of {shown.rpartition(':')[0]}", part, known)
        found = getattr(found, part)
    return found


def _what_happened(error: BaseException, source: str) -> str:
    """Return an error of a user's code in words, with the line of that code."""
    text = " ".join(str(error).split())[:300]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    if isinstance(error, SyntaxError) and error.filename == source:
        lines = [error.lineno]
    return f"{type(error).__name__}{f': {text}' if text else ''}{f' (line {lines[-1]})' if lines else ''}"
