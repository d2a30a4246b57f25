"""mlx_fastforward adapters: which trained weights this machine has."""

import contextlib
from typing import Any, Optional

from ..config import printable
from . import options as o
from .common import describe_base, one_line_errors


def adapters(
    model: o.Model = None, trust_remote_code: o.TrustRemoteCode = False
) -> None:
    """List adapters: those for --model, or all without it.

    Looks beside the model, in your adapters' folder and in the Hugging Face cache. Without
    --adapter, chat takes the one beside the model, else your newest for it.

    Examples:

      mlx_fastforward adapters --model mlx-community/Llama-3.2-3B-Instruct-4bit
    """
    with one_line_errors():
        from ..adapter import AdapterError
        from ..finding import adapter_for, found_adapters, home

        base = describe_base(model, trust_remote_code)[0] if model else None
        found = list(found_adapters(model))
        if base is not None:
            found = [f for f in found if f.problem or _same(f.adapter, base)]
        if not found:
            whom = f" for {model}" if model else ""
            print(
                f"No adapters{whom}: none beside the model, in {home()} or in the hub's cache."
            )
            print("mlx_fastforward convert makes one from trained weights.")
            return
        chosen = None
        if model and base:
            with contextlib.suppress(AdapterError):  # damaged: listed as such
                chosen = adapter_for(model, base)
        for f in found:
            mine = chosen is not None and str(f.folder) == chosen.source
            print(f.place + (" (chat takes it)" if mine else ""))
            for line in summary(f.adapter) if f.adapter else [f"damaged: {f.problem}"]:
                print(f"    {printable(line)}")


def _same(adapter: Any, base: Any) -> bool:
    return bool(adapter.base.fingerprint == base.fingerprint)


def summary(adapter: Any) -> list[str]:
    """What an adapter holds, in a few lines."""
    b = adapter.base
    parts = []
    if adapter.predictors:
        first = adapter.predictors[0]
        bits = f", w2 in {first.bits} bits" if first.bits else ""
        kind = adapter.details["predictor"].get("kind", "pooled")
        parts.append(f"{kind} predictor {_ranks(adapter.details, 'predictor')}{bits}")
    if adapter.compensator:
        kind = adapter.details["compensator"].get("kind", "mlp")
        parts.append(f"{kind} compensator {_ranks(adapter.details, 'compensator')}")
    if adapter.importances:
        parts.append("importances")
    lines = [
        f"for {b.name}: {b.layers} layers, hidden {b.hidden_size:,}, FFN {b.ffn_size:,}",
        f"{'; '.join(parts) or 'nothing'} ({_size(adapter)})",
    ]
    if (recall := _recall(adapter.details)) is not None:
        lines.append(f"recall of the best neurons {recall:.0%}, as its maker measured")
    return lines


def _size(adapter: Any) -> str:
    arrays = adapter.arrays()
    kinds = {str(w.dtype).removeprefix("mlx.core.") for w in arrays} - {"uint32"}
    size = f"{sum(w.nbytes for w in arrays) / 1e6:,.1f} MB"
    return ", ".join([*sorted(kinds), size])


def _ranks(info: dict[str, Any], section: str) -> str:
    rank = info[section]["rank"]
    if isinstance(rank, int) or min(rank) == max(rank):
        return f"rank {rank if isinstance(rank, int) else rank[0]}"
    return f"ranks {min(rank)} to {max(rank)}"


def _recall(info: dict[str, Any]) -> Optional[float]:
    """Mean top-K recall that the adapter's maker measured."""
    calibration = info.get("calibration")
    values = calibration.get("recall") if isinstance(calibration, dict) else None
    if not isinstance(values, list) or not values:
        return None
    if not all(isinstance(v, (int, float)) for v in values):
        return None
    return sum(values) / len(values)
