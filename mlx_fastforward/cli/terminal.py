"""Reading lines, the prefill's progress bar, and the table of /compare."""

import contextlib
import sys
from typing import Any, Callable, Iterator, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .inputs import decoded

LONG_PROMPT = 512


class Lines:
    """One message after the other; None at the end of the input."""

    def __init__(self, interactive: bool):
        self.session = _prompt_session() if interactive else None

    def read(self) -> Optional[str]:
        if self.session is None:
            return decoded(sys.stdin.buffer.readline()) or None
        while True:
            try:
                return self.session.prompt("› ")
            except KeyboardInterrupt:
                print("(Ctrl-D or /quit leaves)")
            except EOFError:
                return None


def _prompt_session() -> Any:
    """Line editing with history and pastes of many lines: Enter sends, Alt-Enter breaks."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True, key_bindings=keys, prompt_continuation=lambda *_: "  "
    )


@contextlib.contextmanager
def prefill_progress(
    interactive: bool, console: Console
) -> Iterator[tuple[Callable[[int, int], None], Callable[[], None]]]:
    """(callback for mlx-lm, finish): a bar while a long prompt is read, gone at the first token."""
    bar = Progress(
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("prefill", total=None)
    live = interactive

    def finish() -> None:
        nonlocal live
        if live and bar.live.is_started:
            bar.stop()
        live = False

    def tick(done: int, total: int) -> None:
        if live and total >= LONG_PROMPT:
            bar.update(task, completed=done, total=total)
            bar.start()

    try:
        yield tick, finish
    finally:
        finish()


def show_compared(console: Console, sparse: Any, dense: Any) -> None:
    """Both TTFTs side by side."""
    table = Table("prefill", "prompt tokens", "TTFT", "tok/s", "FFN skipped")
    for name, r in (("sparse", sparse), ("dense (stock mlx-lm)", dense)):
        table.add_row(
            name,
            f"{r.prompt_tokens:,}",
            f"{r.ttft:.2f} s",
            f"{r.generation_tps:.1f}",
            f"{r.ffn_sparsity:.0%}",
        )
    console.print(table)
    console.print(f"TTFT {dense.ttft / sparse.ttft:.2f}x")
