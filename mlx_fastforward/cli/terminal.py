"""Reading lines, the prefill's progress bar, and the table of /compare."""

import contextlib
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .inputs import decoded
from .tables import show

LONG_PROMPT = 512


class Lines:
    """One message after the other; None at the end of the input."""

    def __init__(self, interactive: bool, waiting: dict[str, Any] = {}):
        self.session = prompt_session() if interactive else None
        self.waiting = waiting  # what is done until a line comes

    def read(self) -> Optional[str]:
        if self.session is None:
            return decoded(sys.stdin.buffer.readline()) or None
        while True:
            try:
                return self.session.prompt("› ", **self.waiting)
            except KeyboardInterrupt:
                print("(Ctrl-D or /quit leaves)")
            except EOFError:
                return None


def prompt_session() -> Any:
    """Line editing with history and pastes of many lines: Enter sends, Alt-Enter breaks."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    from ..predictors.search import home

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        prompt_continuation=lambda *_: "  ",
        history=_history(home().parent / "history"),
    )


def _history(file: Path) -> Any:
    """What was typed in earlier chats, for its owner's eyes; of this chat if there is no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


@contextlib.contextmanager
def prefill_progress(
    model: Any, interactive: bool, console: Console
) -> Iterator[tuple[Callable[[int, int], None], Callable[[], None]]]:
    """(callback for mlx-lm, finish): a bar while a long prompt is read, gone at the first token."""
    from ..prefill import by_layers

    bar = Progress(
        TextColumn("reading"),
        BarColumn(20),  # one line, in a window that was made narrower, too
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task, read = bar.add_task("prefill", total=None), 0

    def tick(done: int, total: int) -> None:
        nonlocal read
        read = done
        if interactive and total >= LONG_PROMPT:
            bar.update(task, completed=done, total=total)
            bar.start()

    def within(tokens: int, share: float) -> None:
        bar.update(task, completed=read + tokens * share)

    def stop() -> None:
        if bar.live.is_started:  # else it would print an empty line
            bar.stop()

    with contextlib.ExitStack() as stack:
        stack.callback(stop)
        stack.enter_context(by_layers(model, within, LONG_PROMPT))
        yield tick, stack.close


def show_compared(
    console: Console, sparse: Any, dense: Any, why: Optional[str] = None
) -> None:
    """Both TTFTs side by side, and in words. why: nothing was skipped."""
    table = Table("prefill", "prompt tokens", "TTFT", "tok/s", "FFN skipped")
    for name, r in (("sparse", sparse), ("dense (mlx-lm)", dense)):
        table.add_row(
            name,
            f"{r.prompt_tokens:,}",
            f"{r.ttft:.2f} s",
            f"{r.generation_tps:.1f}",
            f"{r.ffn_sparsity:.0%}",
        )
    show(table, console)
    said = compared(sparse.ttft, dense.ttft)
    if why:
        said = f"Both were {why}. What differs is chance."
    console.print(said)


def compared(sparse: float, dense: float) -> str:
    """Seconds to the first token, in words."""
    if f"{sparse:.2f}" == f"{dense:.2f}":
        return f"Sparse and dense begin to answer equally soon, after {dense:.2f} s."
    word, times = ("sooner", "fast") if sparse < dense else ("later", "slow")
    ratio = max(sparse, dense) / min(sparse, dense)
    return (
        f"Sparse begins to answer {abs(dense - sparse):.2f} s {word} than dense: after "
        f"{sparse:.2f} s, not {dense:.2f} s ({ratio:.2f} times as {times})."
    )
