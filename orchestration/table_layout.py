"""How wide the columns of a table are on a narrow screen: words and numbers stay whole, long ones break behind `_`, `/`, `=` or `.`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

_MAY_BREAK = re.compile(r"([_/=]+|\.(?!\d))")
PADDING = 1
NARROWEST = 6


@dataclass(frozen=True)
class Layout:
    """How a table is drawn.

    Attributes:
        titles, rows: texts, with line breaks where a word is longer than its column.
        widths: of the columns, in characters; None: as they come. padding: empty characters beside each cell.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int | None, ...]
    padding: int = PADDING


def layout_of(titles: Sequence[str], rows: Sequence[Sequence[str]], screen: int) -> Layout:
    """Return the layout of a table for a screen of so many characters.

    At first titles alone are broken, then cells as well, and at last the widest columns break words anywhere.
    """
    columns = [[titles[column], *(row[column] for row in rows)] for column in range(len(titles))]
    natural = [_widest(line for text in column for line in text.split("\n")) for column in columns]
    if sum(natural) + _frame(len(titles), PADDING) <= screen:
        return Layout(tuple(titles), tuple(map(tuple, rows)), (None,) * len(titles))
    for of_cells in (str.split, _pieces):
        least = [_widest([*_pieces(title), *of_cells(" ".join(cells))]) for title, *cells in columns]
        for padding in (PADDING, 0):
            room = screen - _frame(len(titles), padding) - sum(least)
            if room >= 0:
                return _broken_to(_shared_out(least, natural, room), titles, rows, padding)
    while room < 0 and max(least) > NARROWEST:
        least[least.index(max(least))] -= 1
        room += 1
    return _broken_to(least, titles, rows, padding=0)


def _broken_to(widths: Sequence[int], titles: Sequence[str], rows: Sequence[Sequence[str]], padding: int) -> Layout:
    broken = [tuple(_broken(text, width) for text, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    return Layout(broken[0], tuple(broken[1:]), tuple(widths), padding)


def _shared_out(least: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """Give room to the columns that need the least more first: as many as can have rows of one line."""
    widths = list(least)
    for column in sorted(range(len(widths)), key=lambda column: natural[column] - least[column]):
        more = min(room, natural[column] - least[column])
        widths[column] += more
        room -= more
    return widths


def _broken(text: str, width: int) -> str:
    """Return a text whose lines are no longer than that, if its pieces are not."""
    lines: list[str] = []
    for line in text.split("\n"):
        lines.append("")
        for word in line.split():
            pieces = [word] if cell_len(word) <= width else _pieces(word)
            for number, piece in enumerate(pieces):
                gap = " " if number == 0 and lines[-1] else ""
                if cell_len(lines[-1] + gap + piece) <= width or not lines[-1]:
                    lines[-1] += gap + piece
                else:
                    lines.append(piece)
    return "\n".join(lines)


def _pieces(text: str) -> list[str]:
    return _MAY_BREAK.sub(r"\1 ", text).split()


def _widest(words: Iterable[str]) -> int:
    return max(map(cell_len, words), default=0)


def _frame(columns: int, padding: int) -> int:
    return (1 + 2 * padding) * columns + 1
