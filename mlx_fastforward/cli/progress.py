"""Bars on a terminal, and nothing elsewhere."""

import contextlib
from typing import Any, Callable, Iterator

from rich.console import Console
from rich.progress import Progress

Tick = Callable[[str, int, int], None]  # what is running, how much is done, of how much


@contextlib.contextmanager
def phases(console: Console) -> Iterator[Tick]:
    """A bar for each phase that is told of."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase)
            bar.update(tasks[phase], completed=done, total=total)

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
