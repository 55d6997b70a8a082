"""Messages about names that do not exist."""

from __future__ import annotations

from models.errors import unknown_name


def test_a_short_list_is_shown_whole_and_the_nearest_first():
    assert str(unknown_name("defence", "ctwr", ["rna", "ctrw"])) == "unknown defence 'ctwr'. Did you mean 'ctrw'? Known: ctrw, rna."


def test_of_a_long_list_the_nearest_names_are_shown_alone():
    names = [f"recipe_{number}" for number in range(100)]
    message = str(unknown_name("recipe", "recipe_17x", names))
    assert "'recipe_17'" in message
    assert message.endswith("There are 100.")
    assert "recipe_99" in str(unknown_name("recipe", "zzz", names)), "without a near name all are shown"
