"""Tuning on the way: a line and a bar before the first prompt that may gain, nothing after that."""

import contextlib
import sys
from typing import Any, Callable, Iterator, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .. import ranks
from .tables import say

# Weights of an FFN: below this the timings are noise, and there is nothing to win.
SMALLEST = 4_000_000
LIMIT = 20.0  # seconds that nobody asked for
SLOWEST = 1.0  # of one dense chunk: Ctrl-C waits for it


def tune_first(model: Any, tokens: int, console: Optional[Console] = None) -> None:
    """Tune an attached model before a prompt of so many tokens, if it may gain by that."""
    from .. import tuning
    from ..attachment import engine_of

    console = console or Console(stderr=True)
    engine = engine_of(model)
    if engine is None or tokens < least(engine):
        return
    if engine.sparse and engine.config.block_size is not None:
        return
    device = tuned(model, engine, console)
    if device != engine.device:
        tuning.use(model, engine, device)


def least(engine: Any) -> int:
    """Prompts of fewer tokens have nothing to gain by tuning."""
    if engine.sparse:
        return int(engine.shortest)
    return engine.device.unpack or sys.maxsize  # with --fast


def worth_tuning(engine: Any) -> bool:
    """Whether anything runs sparsely, and takes long enough to be measured."""
    d, f = max(engine.shapes)
    return any(engine.keep) and 3 * d * f >= SMALLEST


def tuned(model: Any, engine: Any, console: Console) -> Any:
    """This device's settings for an engine of the model, measured now or remembered.

    Ctrl-C skips the measuring alone.
    """
    try:
        return _tuned(model, engine, console)
    except KeyboardInterrupt:
        _tell(
            console,
            (
                f"Tuning skipped: blocks of {engine.block_size} tokens. --no-tune never asks, "
                "mlx_fastforward tune measures another time."
                if engine.sparse
                else "Tuning skipped: --fast is taken as it is."
            ),
        )
        return engine.device


def _tuned(model: Any, engine: Any, console: Console) -> Any:
    from .. import tuned as memory
    from .. import tuning

    fast = not any(engine.keep) and engine.device.unpack
    if not (any(engine.keep) or fast) or ranks.several():  # whose clock would count?
        return engine.device
    heads = memory.heads_of(model, engine)
    key = memory.key(engine, heads)
    if (device := memory.remembered(key)) is not None:
        return device
    if fast:
        choice = tuning.fastest_dense(engine)
        memory.remember(key, choice.device)
        _tell(console, _fast_summary(choice))
        return choice.device
    if not worth_tuning(engine):
        return engine.device
    if (seconds := tuning.chunk_seconds(engine)) > SLOWEST:
        device = engine.device
        _tell(
            console,
            f"Not tuned: one FFN takes about {seconds:.0f} s per {tuning.CHUNK:,} tokens here, too "
            f"long to try on the way. Blocks of {engine.block_size} tokens; mlx_fastforward tune "
            "measures, however long it takes.",
        )
    else:
        choice = measured(engine, heads, console)
        device = choice.device
        _tell(console, summary(choice))
    memory.remember(key, device)
    return device


def _fast_summary(choice: Any) -> str:
    if choice.device.unpack:
        return (
            f"--fast: {multiplied(choice.device)}; an FFN takes {choice.share:.2f} of its time in "
            "mlx-lm."
        )
    if not choice.candidates:
        return "--fast: no FFN is quantised or bfloat16 here, there is nothing to try."
    return "--fast: mlx-lm's own products are the fastest on this device."


def multiplied(device: Any) -> str:
    """How calls of ``unpack`` tokens multiply."""
    how = (
        "FFNs run in float16" if device.half else "Packed weights are dequantised first"
    )
    return f"{how} from {device.unpack:,} tokens on"


def summary(choice: Any) -> str:
    """One line for the user, and one per candidate that is wrong."""
    wrong = [c for c in choice.candidates if not c.correct]
    lines = [
        f"block {c.block_size}, {c.strategy}: wrong by {c.error:.1e}, not used"
        for c in wrong
    ]
    device = choice.device
    first = f" {multiplied(device)}." if device.unpack else ""
    if device.dense:
        line = "Tuned: dense prefill is fastest on this device."
        if first:
            line += f"{first} An FFN takes {choice.share:.2f} of its time in mlx-lm."
        return "\n".join([line, *lines])
    line = (
        f"Tuned: blocks of {device.block_size} tokens, {device.strategy}; an FFN takes "
        f"{choice.share:.2f} of its dense time. Prompts from "
        f"{device.shortest} tokens on.{first}"
    )
    if device.attention_block:
        line += f" Attention in blocks of {device.attention_block} queries."
    if choice.steps.keys() & {device.step}:
        line += f" {device.step:,} tokens per call."
    return "\n".join([line, *lines])


def measured(engine: Any, heads: Any, console: Console) -> Any:
    """Tune, with a bar, for a limited time."""
    from .. import tuning

    with tuning_bar(console, f"up to {LIMIT:.0f} s; Ctrl-C skips it") as tick:
        return tuning.search(engine, heads, tick=tick, limit=LIMIT)


@contextlib.contextmanager
def tuning_bar(console: Console, note: str = "") -> Iterator[Callable[[float], None]]:
    """A callback for the share that is done."""
    text = "tuning for this device, once" + (f" ({note})" if note else "")
    columns = (TextColumn(text), BarColumn(20), TaskProgressColumn())
    bar = Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    )
    with bar:
        task = bar.add_task("tuning", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _tell(console: Console, text: str) -> None:
    say(text, console, style="dim")
