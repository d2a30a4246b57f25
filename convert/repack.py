"""A predictor file once more, in another dtype or with other bits."""

import json
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx

from ..errors import PredictorError
from ..neurons.predictor import PredictorWeights
from ..predictors.file import (
    JSON_NAME,
    LOW_RANK,
    TENSORS_NAME,
    TOKENWISE,
    PredictorFile,
    load_predictor,
    packed,
)
from ..predictors.tensors import open_tensors

W2 = "predictor.w2"


def is_finished(path: Path) -> bool:
    """Whether a folder holds a predictor file in a form that no checkpoint has.

    The paper's predictors and compensators, in floats, go the way of every checkpoint.
    """
    if not all((path / name).is_file() for name in (JSON_NAME, TENSORS_NAME)):
        return False
    try:
        info = json.loads((path / JSON_NAME).read_text(encoding="utf-8"))
        parts = [info.get(k) or {} for k in ("predictor", "compensator")]
        kinds = {part.get("kind") for part in parts}
        return bool(kinds & {TOKENWISE, LOW_RANK} or "quantization" in parts[0])
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def repacked(
    path: Path, dtype: Optional[mx.Dtype], bits: Optional[int]
) -> tuple[PredictorFile, dict[str, Any], dict[str, mx.array]]:
    """The file, and what to save of it: its JSON and its tensors.

    What was verified was verified with the old weights, and is left out.

    Args:
        dtype: Of the floats; None: as they are.
        bits: Of the predictors' w2; None: as they are.

    Raises:
        PredictorError: It is damaged.
    """
    found = load_predictor(path)
    tensors = open_tensors(path / TENSORS_NAME)
    made: dict[str, mx.array] = {}
    names = [n for n in tensors if not (bits and W2 in n)]
    for name in names:
        w = made[name] = tensors[name]
        if dtype and mx.issubdtype(w.dtype, mx.floating) and name != "importance":
            made[name] = w.astype(dtype)
    for i, layer in enumerate(found.layers or [] if bits else []):
        assert bits is not None
        w2 = plain_w2(layer).astype(dtype or layer.w1.dtype)
        made |= packed(f"layers.{i}.{W2}", w2, bits)
    for name, w in made.items():
        floats = mx.issubdtype(w.dtype, mx.floating)
        if floats and not mx.all(mx.isfinite(w)).item():
            raise PredictorError(f"{name} does not fit; use another --dtype.")
    left = ("format", "sha256", "verified")
    info = {k: v for k, v in found.details.items() if k not in left}
    if bits and "predictor" in info:
        info["predictor"] = {**info["predictor"], "quantization": {"bits": bits}}
    return found, info, made


def plain_w2(layer: PredictorWeights) -> mx.array:
    """w2 as floats (r, f)."""
    if not layer.bits:
        return layer.w2
    assert layer.scales is not None
    neurons = layer.w2.shape[1] * 32 // layer.bits
    size = neurons // layer.scales.shape[1]
    return mx.dequantize(layer.w2, layer.scales, layer.biases, size, layer.bits)
