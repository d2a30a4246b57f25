"""eval --save: curves and verified sparsities for a predictor file, or for the untrained probe."""

from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import Progress

from ..errors import PredictorError
from .first_use import tuned
from .models import public_name
from .verified_table import show_verified

SEQUENCES = 10  # for the curves


def save_verified(
    net: Any,
    tokenizer: Any,
    predictor: Any,
    model: Optional[str],
    documents: int,
    no_tune: bool,
    combined: list[tuple[Any, Any]],
) -> None:
    """Measure, show and keep. What has no file of its own gets one without weights.

    Args:
        combined: Settings and readers of what is measured beside sparsity alone.
    """
    from dataclasses import asdict, replace

    from ..bench.eval.arms import Arm, label
    from ..bench.eval.verify import prompt_length, verify
    from ..build import engine_for
    from ..predictors.base import BaseModel
    from ..predictors.file import (
        JSON_NAME,
        PredictorFile,
        save_predictor,
        update_predictor,
    )
    from ..predictors.search import default_folder

    console = Console(stderr=True, highlight=False)
    base = BaseModel.of(net, public_name(model))
    folder = Path(predictor.source) if predictor else default_folder(base)
    if predictor and not (folder / JSON_NAME).is_file():
        raise PredictorError(
            f"{predictor.source} is no folder of this machine; copy it to one and name that."
        )
    if predictor is None and (folder / JSON_NAME).is_file():
        _check_untrained(folder, base)
    engine = engine_for(net, None, predictor)
    device = engine.device if no_tune else tuned(net, engine, console)
    if device.dense:  # then sparse would be measured as dense
        device = engine.device
    prompt_length(net, engine.on(device))  # refused before the measuring
    with Progress(console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase)
            bar.update(tasks[phase], completed=done, total=total)

        curves = _curves(net, tokenizer, predictor, tick)
        made = predictor or PredictorFile(base)
        made = made if curves is None else replace(made, curves=curves)
        arms = [
            Arm(label(engine_for(net, c, made), reader=r), c, device, r)
            for c, r in combined
        ]
        verifying = lambda *n: tick("verify", *n)
        parts = (net, tokenizer, made, documents, device, verifying)
        found = verify(*parts, combined=arms)
    sections: dict[str, Any] = {"verified": found}
    if curves is not None:
        sections["curves"] = asdict(curves)
    if predictor is None:
        save_predictor(folder, {"base_model": asdict(base), **sections}, {})
    else:
        update_predictor(folder, **sections)
    show_verified(found)
    print(f"kept in {folder}")


def _check_untrained(folder: Path, base: Any) -> None:
    """What would be written over must be no more than a table, and this model's."""
    from ..predictors.file import load_predictor

    there = load_predictor(folder)
    there.check(base)
    if there.layers is not None or there.compensator is not None:
        raise PredictorError(
            f"{folder} holds trained weights, which nothing may replace; --predictor {folder} "
            "measures them, or move them away."
        )


def _curves(net: Any, tokenizer: Any, predictor: Any, tick: Any) -> Any:
    """Of bundled text and chats; None where the model's context is too short for any."""
    from ..train.curves import Meter
    from ..train.data import Sequences, open_corpus, usual_length

    length = usual_length(net)
    held = Sequences(open_corpus(None), tokenizer, length, 0, held_out=True)
    meter, costs, done = Meter(net, predictor), [], 0
    total = SEQUENCES * len(meter.trials)

    def progress() -> None:
        nonlocal done
        done += 1
        tick("curves", done, total)

    for i in range(SEQUENCES):
        ids = held[i]
        if ids.size >= meter.shortest:
            costs.append(meter.costs(ids, progress))
    return meter.curves(costs) if costs else None
