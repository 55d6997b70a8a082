"""YAML's door: what is read as what, what is refused with its line, and that nothing gets through or hangs."""

from __future__ import annotations

import random
import string
import time

import pytest
import yaml

from models import yaml_text
from models.errors import UserError
from models.yaml_text import MOST_DEPTH, YamlSyntaxError, load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("yes", "yes"), ("No", "No"), ("y", "y"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("12", 12), ("-3", -3), ("0", 0), ("1.5", 1.5), ("-.5", -0.5), ("1.0e-4", 1e-4), (".inf", float("inf")),
        ("1e-4", "1e-4"), ("8/255", "8/255"), ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("1_000", "1_000"),
        ("0x1f", "0x1f"), ("0o17", "0o17"), ("0b11", "0b11"), ("2026-01-02", "2026-01-02"), ("2026-13-45", "2026-13-45"),
        ("'010'", "010"), ("'12'", "12"), ('"true"', "true"), ("[1, a, [2]]", [1, "a", [2]]), ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}), ("? a\n: 1", {"a": 1}), ("a:\n- 1\n- b: 2", {"a": [1, {"b": 2}]}),
    ],
)  # fmt: skip
def test_what_is_read_as_what(text, value):
    read = load_yaml(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: 2\na: 3", ["line 3", "'a'", "twice", "line 1"]),
        ("a:\n  x: 1\n  'x': 2", ["line 3", "'x'", "line 2"]),
        ("a: {b: 1, b: 1}", ["line 1", "'b'", "twice"]),
        ("1: a", ["line 1", "number", "quote"]),
        ("1.5: a", ["number"]),
        ("true: a", ["truth value"]),
        ("null: a", ["null"]),
        ("~: a", ["null"]),
        ("a:\n  : b", ["line 2"]),
        ("2026-01-02: a", ["date"]),
        ("{[1]: 2}", ["a key must be a word", "list"]),
        ("{{a: 1}: 2}", ["a key must be a word", "mapping"]),
        ("a: &x b\n*x : 1", ["a key must be a word", "alias"]),
        ("seed: 010", ["line 1", "010", "octal"]),
        ("seed: -07", ["octal"]),
        ("a: !!python/object/apply:os.system [ls]", ["tags"]),
        ("a: !!int 3", ["tags"]),
        ("!!map {a: 1}", ["tags"]),
        ("<<: {a: 1}", ["merge keys", "extends"]),
        ("a: *missing", ["missing"]),
        ("a: &x [*x]", ["repeats itself"]),
        ("a: 1\n---\nb: 2", ["line 2", "second document"]),
        ("[" * 3000, ["nested"]),
        ("a: " + "{b: " * 900 + "1" + "}" * 900, ["nested"]),
        ("\n".join("  " * depth + "a:" for depth in range(900)), ["nested"]),
        ("k" * 5000 + ": 1", ["not valid YAML"]),
        ("? " + "k" * 5000 + "\n: 1", ["no key"]),
        ("a: [1", ["line", "not valid YAML"]),
        ("a: b: c", ["line 1", "not valid YAML"]),
        ("\ta: 1", ["not valid YAML"]),
        ("a: \x00", ["not valid YAML"]),
    ],
)
def test_what_is_refused_names_the_place(text, parts):
    with pytest.raises(UserError) as caught:
        load_yaml(text, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml")
    assert len(message) < 400
    for part in parts:
        assert part in message


def laughs(levels: int, width: int, sections: bool) -> str:
    """Return text that repeats itself `width ** levels` times."""
    lines = ["a0: &a0 x"]
    for level in range(1, levels + 1):
        inner = [f"k{index}: *a{level - 1}" if sections else f"*a{level - 1}" for index in range(width)]
        lines.append(f"a{level}: &a{level} {'{' if sections else '['}{', '.join(inner)}{'}' if sections else ']'}")
    return "\n".join(lines)


@pytest.mark.parametrize("sections", [False, True])
def test_repetition_without_end_is_refused_at_once(sections):
    started = time.monotonic()
    with pytest.raises(UserError, match="values"):
        load_yaml(laughs(12, 10, sections))
    with pytest.raises(UserError, match="nested"):
        load_yaml(laughs(MOST_DEPTH + 5, 1, sections))
    assert time.monotonic() - started < 5
    assert load_yaml(laughs(3, 3, sections))["a3"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"a: \xff\n", ["line 1", "UTF-8"]),
        (b"a: 1\nb: \xe9t\xe9\n", ["line 2", "UTF-8"]),
        ("a: 1".encode("utf-16"), ["UTF-8"]),
        (b"- 1\n", ["mapping", "list"]),
        (b"3\n", ["mapping", "number"]),
        (b"", ["mapping", "empty"]),
        (b"a: " + b"x" * 5_000_000, ["MB"]),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, parts):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert "mine.yaml" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml", tmp_path / ("x" * 5000), tmp_path / "nu\0ll.yaml"):
        with pytest.raises(UserError, match="cannot read"):
            read_yaml(path)
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "marked.yaml") == {"a": 1}


def random_value(rng: random.Random, depth: int = 0):
    """Return random plain data, among it text that looks like something else."""
    kind = rng.randrange(8 if depth < 5 else 6)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind == 1:
        return rng.randrange(-(10 ** rng.randrange(1, 12)), 10 ** rng.randrange(1, 12))
    if kind == 2:
        return rng.choice([rng.uniform(-1, 1), rng.uniform(-1, 1) * 10.0 ** rng.randrange(-9, 9)])
    if kind == 3:
        return rng.choice("010 yes off 1:30 8/255 1_000 ~ null 2026-01-02 = << 0x1f !a &b *c".split())
    if kind in (4, 5):
        return "".join(rng.choices(string.printable + "äß€", k=rng.randrange(12)))
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    keys = {"".join(rng.choices(string.ascii_letters + string.digits + "_. -", k=rng.randrange(1, 9))) for _ in range(rng.randrange(5))}
    return {key: random_value(rng, depth + 1) for key in keys}


@pytest.mark.parametrize("seed", range(20))
def test_what_a_program_writes_is_read_back(seed):
    """Run folders are written by PyYAML, whose YAML is version 1.1."""
    rng = random.Random(seed)
    for _ in range(50):
        value = random_value(rng)
        assert load_yaml(yaml.safe_dump(value, sort_keys=False)) == value


@pytest.mark.parametrize("parser", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
@pytest.mark.parametrize("seed", range(20))
def test_broken_text_is_data_or_a_user_error(seed, parser, monkeypatch):
    monkeypatch.setattr(yaml_text, "_Parser", parser)
    rng = random.Random(1000 + seed)
    marks = [*"{}[]:,-?&*!|>'\"%@`#~<\n\t \0", "\n  ", ": ", "- ", "<<", "!!", "---", "...", "\ud800", "é", "\x85", "0", "a", "&a ", "*a"]
    for _ in range(100):
        text = yaml.safe_dump(random_value(rng), default_flow_style=rng.random() < 0.5)
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(marks) * rng.choice([1, 1, 1, 50]) + text[place + rng.randrange(3) :]
        message = ""
        try:
            read = load_yaml(text, "mine.yaml")
        except UserError as error:
            read, message = None, str(error)
        assert not message or message.startswith("mine.yaml"), text
        assert read is None or isinstance(read, dict | list | str | int | float | bool)


def test_text_that_is_not_yaml_is_told_apart_from_yaml_that_is_refused():
    with pytest.raises(YamlSyntaxError):
        load_yaml("a: [")
    with pytest.raises(UserError) as caught:
        load_yaml("{a: 1, a: 2}")
    assert not isinstance(caught.value, YamlSyntaxError)
