"""mlx_fastforward tune: measure this device again, and show what was found."""

from dataclasses import asdict
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from . import options as o
from .errors import fail, interruptible, one_line_errors
from .first_use import summary, tuning_bar
from .models import load_model
from .outputs import check_files, write_json
from .tables import say, show


def tune(
    model: o.Model = None,
    sparsity: o.Sparsity = 0.5,
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    compensator: o.Compensator = "auto",
    largest: Annotated[
        int,
        o.opt(
            "Largest block to try, 128 to 2048: larger ones are faster and lose more."
        ),
    ] = 1024,
    trust_remote_code: o.TrustRemoteCode = False,
    json_file: o.JsonFile = None,
) -> None:
    """Find the fastest block size and gather strategy for a model on this device.

    chat and generate do this by themselves before the first long prompt, for 20 seconds at most; this
    takes its time, and shows the figures. From then on chat, generate and the library go by them.
    """
    with one_line_errors(), interruptible():
        from .. import tuned, tuning
        from ..attachment import engine_of

        if not 128 <= largest <= 2048:
            raise ConfigError(f"--largest must be 128 to 2048, got {largest}.")
        check_files(json_file, None)
        net, _ = load_model(
            model,
            sparsity=sparsity,
            selector=selector,
            predictor=predictor,
            compensator=compensator,
            trust_remote_code=trust_remote_code,
        )
        engine = engine_of(net)
        assert engine is not None
        if not any(engine.keep):
            fail("nothing to tune: every layer stays dense.", 2 if not sparsity else 1)
        with tuning_bar(Console(stderr=True)) as tick:
            choice = tuning.tune(net, largest, tick)
        show(table(choice))
        say(summary(choice))
        key = tuned.key(engine, tuned.heads_of(net, engine))
        write_json(json_file, {"for": key, **asdict(choice)})
        say(
            f"Kept in {tuned.file()}: chat, generate, bench, and load() go by it for: {key}"
        )


def table(choice: Any) -> Table:
    """Every candidate with its time, and its baseline's: mlx-lm's own, or calls of half as many tokens."""
    heads = ("tokens", "way", "weights", "ms", "baseline ms", "of that", "error")
    found = Table(*heads)
    for c in choice.candidates:
        error = f"{c.error:.1e}" + ("" if c.correct else ", wrong")
        weights = "as they are"
        if c.unpack:
            weights = "float16" if c.half else "dequantised first"
        times = _times(c.seconds, c.dense_seconds)
        found.add_row(str(c.block_size), c.strategy, weights, *times, error)
    for rows, seconds in choice.attention.items():
        if rows:
            times = _times(seconds, choice.attention[0])
            found.add_row(str(rows), "attention", "", *times, "")
    for step, seconds in choice.steps.items():
        found.add_row(str(step), "tokens per call", "", *_times(*seconds), "")
    return found


def _times(seconds: float, own: float) -> tuple[str, str, str]:
    return f"{seconds * 1e3:.1f}", f"{own * 1e3:.1f}", f"{seconds / own:.2f}"
