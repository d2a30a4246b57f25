"""Tables and long lines that suit where they go: a wide terminal, a narrow one, or a pipe."""

import sys
import textwrap
from typing import Any, Optional

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Rows = list[tuple[str, ...]]
WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


def show(table: Table, console: Optional[Console] = None) -> None:
    """A table as it is where it fits, a block of lines per row where it does not, plain in a pipe."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        print_plain(table, console)
    elif _width(table, console) <= console.width:
        console.print(table)
    else:
        _print_stacked(table, console)


def say(text: str, console: Optional[Console] = None, style: str = "") -> None:
    """Lines that a terminal breaks between words, as far in as they begin, and a pipe not at all."""
    console = console or Console(highlight=False)
    console.print(Text(_fitted(text, console), style=style), soft_wrap=True)


def warn(text: str) -> None:
    """A line on standard error, under the program's name; above a bar, which would overwrite a console's."""
    line = f"mlx_fastforward: {text}"
    print(_fitted(line, Console(stderr=True)), file=sys.stderr, flush=True)


def _fitted(text: str, console: Console) -> str:
    if not console.is_terminal:
        return text
    return "\n".join(_filled(line, console.width) for line in text.splitlines())


def labelled(label: str, text: str, console: Console) -> None:
    """A line in a column of its own beside its label."""
    margin = 12
    if console.is_terminal:
        text = textwrap.fill(text, console.width - margin, **WORDS)
        text = text.replace("\n", "\n" + " " * margin)
    line = Text.assemble((label.ljust(margin), "bold"), text)
    console.print(line, soft_wrap=True)


def _filled(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line, width, subsequent_indent=indent, **WORDS)


def print_plain(table: Table, console: Console) -> None:
    """Columns of spaces, as wide as they need be."""
    rows = [_heads(table), *_rows(table)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if table.title:
        console.print(Text(str(table.title)), soft_wrap=True)
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        console.print(Text(line.rstrip()), soft_wrap=True)


def _print_stacked(table: Table, console: Console) -> None:
    heads = _heads(table)
    margin = max(map(len, heads[1:]))
    if table.title:
        console.print(Text(str(table.title), style="bold"))
    first = ""
    for row in _rows(table):
        first = row[0] or first
        console.print(Text(f"{heads[0]} {first}", style="bold"))
        for head, cell in zip(heads[1:], row[1:]):
            if cell:
                line = Text(f"  {head.ljust(margin)}  {cell}")
                console.print(line)


def _width(table: Table, console: Console) -> int:
    """Columns that no cell is cut in."""
    options = console.options.update(max_width=10_000)
    title = len(str(table.title or ""))
    return max(title, Measurement.get(console, options, table).maximum)


def _heads(table: Table) -> tuple[str, ...]:
    return tuple(str(c.header) for c in table.columns)


def _rows(table: Table) -> Rows:
    cells: Any = zip(*(c.cells for c in table.columns))
    return [tuple(map(str, row)) for row in cells]
