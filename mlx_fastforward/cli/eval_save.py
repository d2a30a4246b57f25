"""eval --save: curves and verified sparsities for a predictor file, or for the untrained probe."""

from functools import partial
from typing import Any, Optional

from rich.console import Console

from .first_use import tuned
from .models import public_name
from .progress import phases
from .verified_table import show_verified


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
    from ..predictors.file import PredictorFile, ensure_predictor, update_predictor
    from ..predictors.search import folder_for
    from ..train.curves import measured_curves

    console = Console(stderr=True, highlight=False)
    base = BaseModel.of(net, public_name(model))
    folder = folder_for(base, predictor)
    engine = engine_for(net, None, predictor)
    device = engine.device if no_tune else tuned(net, engine, console)
    if device.dense:  # then sparse would be measured as dense
        device = engine.device
    prompt_length(net, engine.on(device))  # refused before the measuring
    with phases(console) as tick:
        curves = measured_curves(net, tokenizer, predictor, partial(tick, "curves"))
        made = predictor or PredictorFile(base)
        made = made if curves is None else replace(made, curves=curves)
        arms = [
            Arm(label(engine_for(net, c, made), reader=r), c, device, r)
            for c, r in combined
        ]
        verifying = partial(tick, "verify")
        parts = (net, tokenizer, made, documents, device, verifying)
        found = verify(*parts, combined=arms)
    sections: dict[str, Any] = {"verified": found}
    if curves is not None:
        sections["curves"] = asdict(curves)
    ensure_predictor(folder, base)
    update_predictor(folder, **sections)
    show_verified(found)
    print(f"kept in {folder}")
