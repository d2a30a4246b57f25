"""Bars on a terminal, and nothing elsewhere."""

import contextlib
from typing import Any, Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description:<12}"),
    BarColumn(),
    TextColumn("{task.percentage:>3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("{task.fields[details]}"),
)


@contextlib.contextmanager
def phases(console: Console) -> Iterator[Callable[..., None]]:
    """tick(phase, done, total, details=""): a bar for each phase of long work."""
    bar = Progress(*COLUMNS, console=console, disable=not console.is_terminal)
    tasks: dict[str, Any] = {}
    total_of: dict[str, float] = {}

    def tick(phase: str, done: float, total: float, details: str = "") -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total, details=details)
            total_of[phase] = total
        for earlier in tasks.keys() - {phase}:  # short of its share, perhaps
            bar.update(tasks[earlier], completed=total_of[earlier])
        bar.update(tasks[phase], completed=done, total=total, details=details)

    with bar:
        yield tick


@contextlib.contextmanager
def progress(
    console: Console, what: str, total: int, transient: bool = False
) -> Iterator[Callable[..., None]]:
    """One bar; advance(n) is n steps on, one by default."""
    quiet = not console.is_terminal
    with Progress(console=console, disable=quiet, transient=transient) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n=1: bar.advance(task, n)
