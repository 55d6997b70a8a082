"""Messages about names that do not exist."""

from __future__ import annotations

from models.errors import unknown_name


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
