"""Tuning on the way: a line and a bar on first use, nothing after that."""

from typing import Any, Optional

from rich.console import Console
from rich.progress import Progress

from .. import ranks

# Weights of an FFN: below this the timings are noise, and there is nothing to win.
SMALLEST = 4_000_000


def tune_first(model: Any, block_size: Optional[int], no_tune: bool) -> None:
    """Tune what load() attached, unless the user knows better."""
    from ..attachment import detach, engine_of, seat

    engine = engine_of(model)
    if engine is not None and block_size is None and not no_tune:
        device = tuned(model, engine, Console(stderr=True))
        detach(model)
        seat(model, engine.on(device))


def worth_tuning(engine: Any) -> bool:
    """Whether anything runs sparsely, and takes long enough to be measured."""
    d, f = max(engine.shapes)
    return any(engine.keep) and 3 * d * f >= SMALLEST


def tuned(model: Any, engine: Any, console: Console) -> Any:
    """This device's settings for an engine of the model, measured now or remembered."""
    from .. import tune
    from ..model.families import Heads

    if not worth_tuning(engine) or ranks.several():  # whose clock would count?
        return engine.device
    heads = Heads.of(model, max(engine.shapes)[0])
    key = tune.key(engine, heads)
    device = tune.remembered(key)
    if device is None:
        choice = measured(engine, heads, console)
        device = choice.device
        tune.remember(key, device)
        console.print(tune.summary(choice), style="dim", highlight=False)
    return device


def measured(
    engine: Any, heads: Any, console: Console, largest: Optional[int] = None
) -> Any:
    """Tune, with a bar."""
    from .. import tune

    bar = Progress(console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task("tuning for this device", total=1.0)
        return tune.tune(
            engine,
            heads,
            largest or tune.LARGEST,
            tick=lambda share: bar.update(task, completed=share),
        )
