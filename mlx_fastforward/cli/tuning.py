"""Tuning on the way: a line and a bar on first use, nothing after that."""

from typing import Any, Optional

from rich.console import Console
from rich.progress import Progress

# Weights of an FFN: below this the timings are noise, and there is nothing to win.
SMALLEST = 4_000_000


def tune_first(model: Any, block_size: Optional[int], no_tune: bool) -> None:
    """Tune what load() attached, unless the user knows better."""
    from ..attachment import engine_of

    engine = engine_of(model)
    if engine is not None and block_size is None and not no_tune:
        tune_once(model, engine, Console(stderr=True))


def tune_once(model: Any, engine: Any, console: Console) -> None:
    """Give an engine this device's block size and strategy, measured now or remembered."""
    from .. import tune
    from ..limits import Shape

    d, f = engine.ffns[0].shape
    if not any(engine.keep) or 3 * d * f < SMALLEST:
        return
    shape = Shape.of(model)
    key = tune.key(engine, shape)
    choice = tune.remembered(key)
    if choice is None:
        choice = measured(engine, shape, console)
        tune.remember(key, choice)
        console.print(tune.summary(choice), style="dim", highlight=False)
    tune.apply(engine, choice)


def measured(
    engine: Any, shape: Any, console: Console, largest: Optional[int] = None
) -> Any:
    """Tune, with a bar."""
    from .. import tune

    bar = Progress(console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task("tuning for this device", total=1.0)
        return tune.tune(
            engine,
            shape,
            largest or tune.LARGEST,
            tick=lambda share: bar.update(task, completed=share),
        )
