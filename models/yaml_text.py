"""YAML as people type it, and the one door through which every YAML file and every typed value comes in.

Read is YAML 1.2's plain core: mappings, lists and scalars. `off`, `on`, `yes`, `no`, dates and times are words; only `true` and `false` are
booleans, only decimal numbers are numbers (`1e-4` and `8/255` stay text, which number fields read). What would be read differently than it
looks is refused with its line: a key twice, a key that is no word, an octal number, tags, merge keys, text that is not UTF-8, nesting and
repetition without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.errors import UserError
from models.file_content import read_content

MOST_BYTES = 4_000_000
MOST_DEPTH = 40
MOST_VALUES = 200_000
"""Values of a whole text, those that aliases repeat counted each time."""
LONGEST_KEY = 200

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*")
_MOST_DIGITS = 400


class YamlSyntaxError(UserError):
    """The text is not YAML at all."""


def load_yaml(text: str, source: str = "") -> Any:
    """Return the content of YAML text: dictionaries, lists, strings, numbers, booleans, None.

    Args:
        source: names the text in errors, e.g. a file.

    Raises:
        YamlSyntaxError: it is not YAML.
        UserError: it is, but something in it is refused (see above); with the line.
    """
    return _Builder(source).build(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, is not UTF-8, is not YAML, holds no mapping, or something in it is refused.
    """
    tree = load_yaml(_read_text(path), path.name)
    if not isinstance(tree, dict):
        kind = "empty" if tree is None else f"a {_KINDS.get(type(tree), 'value')}"
        raise UserError(f"{path.name}: the file should hold a mapping of sections (`name: value` lines), it is {kind}")
    return tree


_KINDS: dict[type, str] = {list: "list", str: "text", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _read_text(path: Path) -> str:
    content = read_content(path, MOST_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path.name} line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}); save the file as UTF-8") from None


@dataclass
class _Mapping:
    """An open mapping; `key` waits for its value."""

    anchor: str | None
    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    key: str | None = None
    values: int = 1


@dataclass
class _Sequence:
    """An open list."""

    anchor: str | None
    content: list[Any] = field(default_factory=list)
    values: int = 1


class _Builder:
    """Builds plain data from the events of a YAML text, without recursion: depth and size are bounded before anything grows."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.open: list[_Mapping | _Sequence] = []
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.root: list[Any] = []
        self.total = 0

    def build(self, text: str) -> Any:
        """Return the content of `text`."""
        for event in self._events(text):
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._start(event)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._end(event)
            elif isinstance(event, yaml.DocumentStartEvent) and self.root:
                self._refuse(event, "a second document (`---`) begins; a file holds one")
        return self.root[0] if self.root else None

    def _events(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=_Parser)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
            raise YamlSyntaxError(f"{self._place(mark.line + 1 if mark else None)}not valid YAML: {problem}") from None
        except UnicodeError:  # bytes of another encoding on the command line
            raise YamlSyntaxError(f"{self._place(None)}not valid YAML: not Unicode text") from None

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        if event.tag is not None:
            self._refuse_tag(event)
        container = self.open[-1] if self.open else None
        if isinstance(container, _Mapping) and container.key is None:
            self._key(container, event)
            return
        value = self._value(event) if event.implicit[0] else event.value
        if event.anchor:
            self.anchors[event.anchor] = (value, 1)
        self._add(event, value, 1)

    def _value(self, event: yaml.ScalarEvent) -> Any:
        """Return what a plain scalar means."""
        text = event.value
        if text in _NULL:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if _LEADING_ZERO.fullmatch(text):
            self._refuse(
                event, f"{_short(text)}: some readers take a number with a leading zero for an octal one; write it without, or quote it"
            )
        if len(text) > _MOST_DIGITS:
            return text
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return _SPECIAL.get(text.lower(), text)

    def _key(self, mapping: _Mapping, event: Any) -> None:
        text = event.value
        if event.anchor:
            self.anchors[event.anchor] = (text, 1)
        if event.implicit[0]:
            if text == "<<":
                self._refuse(event, "merge keys (`<<`) are not read; write the fields out, or use `extends`")
            value = self._value(event)
            if not isinstance(value, str) or _DATE.fullmatch(text):
                kind = "date" if isinstance(value, str) else _KINDS[type(value)]
                self._refuse(event, f"a key must be a word, {_short(text) or '(nothing)'} is a {kind}; quote it if it is meant")
        if not text or len(text) > LONGEST_KEY or not text.isprintable():
            self._refuse(event, f"{_short(text)!r} is no key: empty, longer than {LONGEST_KEY} characters, or not printable")
        line = event.start_mark.line + 1
        if text in mapping.lines:
            self._refuse(event, f"the key {text!r} stands twice, in line {mapping.lines[text]} and here")
        mapping.lines[text] = line
        mapping.key = text

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            self._refuse(event, f"*{_short(event.anchor)} repeats something that is not marked with &{_short(event.anchor)} before")
        finished = self.anchors[event.anchor]
        if finished is None:
            self._refuse(event, f"*{_short(event.anchor)} repeats itself")
        value, values = finished
        container = self.open[-1] if self.open else None
        if isinstance(container, _Mapping) and container.key is None:
            self._refuse(event, "a key must be a word, this is an alias")
        if len(self.open) + _depth(value) > MOST_DEPTH:
            self._refuse(event, f"nested more than {MOST_DEPTH} deep")
        self._add(event, value, values)

    def _start(self, event: Any) -> None:
        if event.tag is not None:
            self._refuse_tag(event)
        container = self.open[-1] if self.open else None
        if isinstance(container, _Mapping) and container.key is None:
            self._refuse(event, f"a key must be a word, this is a {'mapping' if isinstance(event, yaml.MappingStartEvent) else 'list'}")
        if len(self.open) >= MOST_DEPTH:
            self._refuse(event, f"nested more than {MOST_DEPTH} deep")
        if event.anchor:
            self.anchors[event.anchor] = None
        self.open.append(_Mapping(event.anchor) if isinstance(event, yaml.MappingStartEvent) else _Sequence(event.anchor))

    def _end(self, event: Any) -> None:
        container = self.open.pop()
        if container.anchor:
            self.anchors[container.anchor] = (container.content, container.values)
        self._add(event, container.content, container.values, counted=container.values - 1)

    def _add(self, event: Any, value: Any, values: int, counted: int = 0) -> None:
        """Put a finished value where it belongs. `counted` of its `values` are in the total already."""
        self.total += values - counted
        if self.total > MOST_VALUES:
            self._refuse(event, f"more than {MOST_VALUES} values, repeated ones counted")
        if not self.open:
            self.root.append(value)
            return
        container = self.open[-1]
        container.values += values
        if isinstance(container, _Sequence):
            container.content.append(value)
        else:
            assert container.key is not None
            container.content[container.key] = value
            container.key = None

    def _refuse_tag(self, event: Any) -> NoReturn:
        self._refuse(event, f"tags (here {_short(event.tag)}) are not read; quote text that begins with `!`")

    def _refuse(self, event: Any, problem: str) -> NoReturn:
        raise UserError(f"{self._place(event.start_mark.line + 1)}{problem}")

    def _place(self, line: int | None) -> str:
        where = " ".join(part for part in (self.source, f"line {line}" if line and self.source else "") if part)
        return f"{where}: " if where else ""


def _depth(value: Any) -> int:
    """Return how deep a value that was built here is nested; bounded, because building was."""
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["MOST_DEPTH", "MOST_VALUES", "YamlSyntaxError", "load_yaml", "read_yaml"]
