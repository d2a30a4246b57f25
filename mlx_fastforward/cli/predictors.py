"""mlx_fastforward predictors: which trained weights this machine has."""

import contextlib
from typing import Any, Optional

from ..errors import printable
from . import options as o
from .errors import one_line_errors
from .models import describe_base
from .tables import say


def predictors(
    model: o.Model = None, trust_remote_code: o.TrustRemoteCode = False
) -> None:
    """List predictors: those for --model, or all without it.

    Looks beside the model, in your predictors' folder and in the Hugging Face cache. Without
    --predictor, chat takes the one beside the model, else your newest for it.

    Examples:

      mlx_fastforward predictors --model mlx-community/Llama-3.2-3B-Instruct-4bit
    """
    with one_line_errors():
        from .. import demo
        from ..errors import PredictorError
        from ..predictors.file import load_predictor
        from ..predictors.search import found_predictors, home, predictor_for

        base = describe_base(model, trust_remote_code)[0] if model else None
        found = list(found_predictors(model))
        if base is not None:
            found = [f for f in found if f.problem or _same(f.predictor, base)]
        if not found:
            whom = f" for {model}" if model else ""
            say(
                f"No predictors{whom}: none beside the model, in {home()} or in the hub's cache."
            )
            say("mlx_fastforward train fits one; convert takes trained weights.")
        chosen = None
        if model and base:
            with contextlib.suppress(PredictorError):  # damaged: listed as such
                chosen = predictor_for(model, base)
        for f in found:
            mine = chosen is not None and str(f.folder) == chosen.source
            say(f.place + (" (chat takes it)" if mine else ""))
            if f.predictor is None:
                say(f"    {printable(f'damaged: {f.problem}')}")
            else:
                _show(f.predictor)
        if model is None:
            say(f"bundled with the demo model: {demo.MODEL}")
            _show(load_predictor(demo.MODEL))


def _show(predictor: Any) -> None:
    for line in summary(predictor):
        say(f"    {printable(line)}")


def _same(predictor: Any, base: Any) -> bool:
    return bool(predictor.base.fingerprint == base.fingerprint)


def summary(predictor: Any) -> list[str]:
    """What a predictor holds, in a few lines."""
    from ..predictors.verified import rows

    b = predictor.base
    parts = []
    if predictor.layers:
        first = predictor.layers[0]
        bits = f", w2 in {first.bits} bits" if first.bits else ""
        kind = predictor.details["predictor"].get("kind", "pooled")
        parts.append(f"{kind} predictor {_ranks(predictor.details, 'predictor')}{bits}")
    if predictor.compensator:
        kind = predictor.details["compensator"].get("kind", "mlp")
        parts.append(f"{kind} compensator {_ranks(predictor.details, 'compensator')}")
    if predictor.importances:
        parts.append("importances")
    if predictor.curves:
        parts.append("curves")
    if predictor.readout:
        parts.append(f"readout of {predictor.readout.layer} layers")
    lines = [
        f"for {b.name}: {b.sizes()}",
        f"{'; '.join(parts) or 'nothing'} ({_size(predictor)})",
    ]
    if (recall := _recall(predictor.details)) is not None:
        lines.append(f"recall of the best neurons {recall:.0%}, as its maker measured")
    if rows(predictor.details):
        lines.append(_verified(predictor.details))
    return lines


def _verified(details: dict[str, Any]) -> str:
    from ..predictors.verified import better_than_none, chosen

    if not better_than_none(details):
        return "no better than none on held-out text: used only where it is named"
    sparsity, _ = chosen(details)
    return f"verified: --sparsity auto takes {sparsity:.0%}"


def _size(predictor: Any) -> str:
    arrays = predictor.arrays()
    kinds = {str(w.dtype).removeprefix("mlx.core.") for w in arrays} - {"uint32"}
    size = f"{sum(w.nbytes for w in arrays) / 1e6:,.1f} MB"
    return ", ".join([*sorted(kinds), size])


def _ranks(info: dict[str, Any], section: str) -> str:
    rank = info[section]["rank"]
    if isinstance(rank, int) or min(rank) == max(rank):
        return f"rank {rank if isinstance(rank, int) else rank[0]}"
    return f"ranks {min(rank)} to {max(rank)}"


def _recall(info: dict[str, Any]) -> Optional[float]:
    """Mean top-K recall that the predictor's maker measured."""
    calibration = info.get("calibration")
    values = calibration.get("recall") if isinstance(calibration, dict) else None
    if not isinstance(values, list) or not values:
        return None
    if not all(isinstance(v, (int, float)) for v in values):
        return None
    return sum(values) / len(values)
