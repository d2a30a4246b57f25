"""What a run leaves behind: the predictor file and what it says of itself."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..neurons.compensators import LowRankWeights
from ..neurons.predictor import PredictorWeights
from ..predictors.base import BaseModel
from ..predictors.file import MLP, PredictorFile, save_predictor
from .mlp import ACTIVATION
from .state import Settings, State


def write(folder: Path, predictor: PredictorFile, info: dict[str, Any]) -> None:
    """The predictor file, all of it or nothing."""
    tensors = {"importance": mx.array(predictor.importances or [])}
    parts: dict[str, Any] = {"predictor": predictor.layers or []}
    if predictor.compensator is not None:
        parts["compensator"] = predictor.compensator.layers
    for part, layers in parts.items():
        for i, weights in enumerate(layers):
            for name, value in vars(weights).items():
                if isinstance(value, mx.array):
                    tensors[f"layers.{i}.{part}.{name}"] = value
    save_predictor(folder, info, tensors)


def as_wide(weights: Any, f: int) -> Any:
    """A layer's weights for a layer of f neurons: cut, or with zeros for those that are too many."""
    if isinstance(weights, PredictorWeights):
        bias = None if weights.bias is None else _first(weights.bias, f)
        return replace(weights, w2=_first(weights.w2.T, f).T, bias=bias)
    if isinstance(weights, LowRankWeights):
        return replace(weights, u=_first(weights.u, f))
    return weights


def _first(rows: mx.array, n: int) -> mx.array:
    missing = max(0, n - len(rows))
    return mx.pad(rows[:n], [(0, missing)] + [(0, 0)] * (rows.ndim - 1))


def information(
    base: BaseModel,
    settings: Settings,
    state: State,
    predictor: PredictorFile,
    findings: dict[str, Any],
) -> dict[str, Any]:
    """The file's JSON: for which model, what is in it, how it was made, what it is worth."""
    info: dict[str, Any] = {
        "base_model": asdict(base),
        "predictor": {"kind": settings.kind, "rank": settings.rank},
    }
    if settings.compensator != "none":
        found = {"kind": settings.compensator, "rank": settings.compensator_rank}
        if settings.compensator == MLP:
            found["activation"] = ACTIVATION
        info["compensator"] = found
    if predictor.curves is not None:
        info["curves"] = asdict(predictor.curves)
    info["block_size"] = settings.block_size
    fitted = {k: v for k, v in state.tokens.items() if k != "held-out"}
    info["calibration"] = {
        "tokens": sum(fitted.values()),
        **findings,
        "seconds": {k: round(v, 1) for k, v in state.seconds.items()},
    }
    names = [Path(name).name for name in settings.data.split(", ")]
    info["settings"] = asdict(settings) | {"data": ", ".join(names)}
    return info
