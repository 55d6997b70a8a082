"""Text for Markdown: names that users chose, shown as they are and never as markup."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"[\\`*\[\]<>|~&$#]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown, HTML inside it or a table would read; an underscore inside a word is none."""
LONGEST_NAME = 80


def escape(text: str) -> str:
    """Return text in one line that Markdown shows as it is."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return _MARKUP.sub(r"\\\g<0>", " ".join(shown.split()))


def name(text: str) -> str:
    """Return `escape` of a name, cut where it is longer than any name."""
    return escape(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}...")
