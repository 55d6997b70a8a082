"""Messages: about names that do not exist, and what is passed on of what libraries say."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DatabaseError

from models.errors import first_line, unknown_name


def test_a_short_list_is_shown_whole_and_the_nearest_first():
    assert str(unknown_name("defence", "ctwr", ["rna", "ctrw"])) == "unknown defence 'ctwr'. Did you mean 'ctrw'? Known: ctrw, rna."


def test_of_a_long_list_the_nearest_names_are_shown_alone():
    names = [f"recipe_{number}" for number in range(100)]
    message = str(unknown_name("recipe", "recipe_17x", names))
    assert "'recipe_17'" in message
    assert "There are 100" in message
    far = str(unknown_name("recipe", "zzz", names))
    assert "There are 100" in far and "recipe_99" not in far, "a page of names helps nobody"
    assert "recipe_9" in str(unknown_name("recipe", "zzz", names[:20])), "of a short list all are shown"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such column\n[SQL: SELECT everything]"), "no such column"),
        (DatabaseError("statement", None, OSError("disk is full\nand more")), "disk is full"),
        (KeyError(), "KeyError"),
        ("  one\ntwo", "one"),
        ("", "no reason given"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_what_a_library_says_is_one_line(error, line):
    assert first_line(error) == line
