"""mlx_fastforward tune: measure this device again, and show what was found."""

from typing import Annotated

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from . import options as o
from .errors import fail, interruptible, one_line_errors
from .first_use import tuning_bar
from .models import load_model
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
        table = Table("block", "strategy", "weights", "of the dense time", "error")
        for c in choice.candidates:
            error = f"{c.error:.1e}" + ("" if c.correct else ", wrong")
            weights = "dequantised first" if c.unpack else "as they are"
            name, share = str(c.block_size), f"{c.share:.2f}"
            table.add_row(name, c.strategy, weights, share, error)
        show(table)
        say(tuning.summary(choice))
        key = tuned.key(engine, tuned.heads_of(net, engine))
        say(
            f"Kept in {tuned.file()}: chat, generate, bench, and load() go by it for: {key}"
        )
