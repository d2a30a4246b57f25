"""The side file: trained predictors, compensators and importances of one base model.

A folder with ``fastforward.json`` (what it is) and ``fastforward.safetensors`` (the weights).
"""

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

import mlx.core as mx
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .compensators import ACTIVATIONS, Compensator, MLPCompensator, MLPWeights
from .config import FastForwardError
from .selectors import PredictorWeights

FORMAT = 1
JSON_NAME = "fastforward.json"
TENSORS_NAME = "fastforward.safetensors"


class AdapterError(FastForwardError, ValueError):
    """An adapter that is missing, damaged or made for another model."""


@dataclass
class Adapter:
    """A loaded side file.

    Args:
        base: base_model of the JSON: layers, hidden_size, ffn_size, fingerprint, and names.
        predictors: One per layer, or None.
        compensator: Ready to use, or None.
        importances: s_l per layer (eq. 23), or None.
        details: Everything else in the JSON (calibration summary, versions).
    """

    base: dict[str, Any]
    predictors: Optional[list[PredictorWeights]] = None
    compensator: Optional[Compensator] = None
    importances: Optional[list[float]] = None
    details: Optional[dict[str, Any]] = None

    def check(self, norms: Sequence[mx.array], d: int, f: int) -> None:
        """Refuse a model that this adapter was not made for; raises AdapterError."""
        found = {"layers": len(norms), "hidden_size": d, "ffn_size": f}
        for key, value in found.items():
            if self.base[key] != value:
                raise AdapterError(
                    f"the adapter was made for a model with {key} {self.base[key]}, "
                    f"this model has {value}."
                )
        if self.base["fingerprint"] != fingerprint(norms):
            raise AdapterError(
                f"the adapter was made for {self.base.get('name', 'another model')!r}: "
                "the shapes agree, but the weights of this model do not."
            )


def fingerprint(norms: Sequence[mx.array]) -> str:
    """A hash of a model's norm weights, the same for every quantisation of the model.

    Norms stay float when a model is quantised; they are rounded to bf16, so all copies (fp32,
    fp16, bf16) of a model published in bf16 agree.
    """
    digest = hashlib.sha256()
    for i in sorted({0, len(norms) // 2, len(norms) - 1}):
        w = norms[i].astype(mx.bfloat16).astype(mx.float32)
        digest.update(np.array(w).tobytes())
    return digest.hexdigest()[:16]


def load_adapter(path: str | Path) -> Adapter:
    """Read a side file lazily (weights are mapped, not read); raises AdapterError."""
    path = Path(path).expanduser()
    info, tensors = _read(path)
    base = _section(path, info, "base_model")
    whole = functools.partial(_whole, path, info)
    layers = whole("base_model", "layers")
    d, f = whole("base_model", "hidden_size"), whole("base_model", "ffn_size")
    if not isinstance(base.get("fingerprint"), str):
        raise AdapterError(f"{path / JSON_NAME} lacks base_model.fingerprint.")
    take = functools.partial(_per_layer, path, tensors, layers)
    predictors = compensator = importances = None
    if info.get("predictor"):
        r = whole("predictor", "rank")
        parts = [
            take("predictor.query", (d,)),
            take("predictor.w1", (d, r)),
            take("predictor.w2", (r, f)),
        ]
        predictors = [PredictorWeights(*w) for w in zip(*parts)]
    if info.get("compensator"):
        h = whole("compensator", "rank")
        activation = info["compensator"].get("activation", "relu")
        if activation not in list(ACTIVATIONS):
            raise AdapterError(
                f"{path / JSON_NAME}: expected a compensator activation of "
                f"{', '.join(ACTIVATIONS)}; found {activation!r}."
            )
        parts = [take("compensator.w1", (d, h)), take("compensator.w2", (h, d))]
        weights = [MLPWeights(*w) for w in zip(*parts)]
        compensator = MLPCompensator(weights, activation)
    if "importance" in tensors:
        weight = _float(path, tensors, "importance", (layers,))
        importances = np.array(weight.astype(mx.float32)).tolist()
    return Adapter(base, predictors, compensator, importances, info)


def _section(path: Path, info: dict[str, Any], name: str) -> dict[str, Any]:
    section = info.get(name)
    if not isinstance(section, dict):
        raise AdapterError(
            f"{path / JSON_NAME}: expected {name} to be an object, found {section!r}."
        )
    return section


def _whole(path: Path, info: dict[str, Any], section: str, key: str) -> int:
    value = _section(path, info, section).get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(
            f"{path / JSON_NAME}: expected {section}.{key} to be a whole number above 0, "
            f"found {value!r}."
        )
    return value


def _float(
    path: Path, tensors: dict[str, mx.array], key: str, shape: tuple[int, ...]
) -> mx.array:
    """A tensor of this name and shape and a float dtype, or AdapterError."""
    if key not in tensors:
        raise AdapterError(f"{path / TENSORS_NAME} lacks the tensor {key}.")
    tensor = tensors[key]
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"{path / TENSORS_NAME}: {key} should have shape {shape}, "
            f"found {tuple(tensor.shape)}."
        )
    if not mx.issubdtype(tensor.dtype, mx.floating):
        raise AdapterError(
            f"{path / TENSORS_NAME}: {key} should be float, found {tensor.dtype}."
        )
    return tensor


def _per_layer(
    path: Path,
    tensors: dict[str, mx.array],
    layers: int,
    name: str,
    shape: tuple[int, ...],
) -> list[mx.array]:
    keys = (f"layers.{i}.{name}" for i in range(layers))
    return [_float(path, tensors, key, shape) for key in keys]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    for name in (JSON_NAME, TENSORS_NAME):
        if not (path / name).is_file():
            raise AdapterError(
                f"no adapter in {path}: expected the files {JSON_NAME} and {TENSORS_NAME}."
            )
    try:
        info = json.loads((path / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise AdapterError(f"{path / JSON_NAME} cannot be read: {e}") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise AdapterError(
            f"{path / JSON_NAME}: expected format {FORMAT}, found {found!r}."
        )
    try:
        tensors = mx.load(str(path / TENSORS_NAME))
    except (RuntimeError, ValueError, OSError) as e:
        raise AdapterError(f"{path / TENSORS_NAME} cannot be read: {e}") from e
    assert isinstance(tensors, dict)
    return info, tensors


def save_adapter(
    path: str | Path, info: dict[str, Any], tensors: dict[str, mx.array]
) -> None:
    """Write a side file; the JSON, without which nothing loads, appears last."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as tmp:
        mx.save_safetensors(f"{tmp}/{TENSORS_NAME}", tensors)
        text = json.dumps({"format": FORMAT, **info}, indent=2)
        Path(tmp, JSON_NAME).write_text(text + "\n", encoding="utf-8")
        (path / JSON_NAME).unlink(missing_ok=True)  # never old JSON with new weights
        for name in (TENSORS_NAME, JSON_NAME):
            os.replace(f"{tmp}/{name}", path / name)


def find_adapter(model: str, named: Optional[str | Path] = None) -> Optional[Adapter]:
    """The adapter that a user named (folder or repository), else the one beside a local model."""
    if named is None:
        beside = Path(model)
        return load_adapter(beside) if (beside / JSON_NAME).is_file() else None
    local = str(named).startswith((".", "/", "~")) or str(named).count("/") != 1
    if local or Path(named).exists():
        return load_adapter(named)
    try:
        files = [JSON_NAME, TENSORS_NAME]
        folder = snapshot_download(str(named), allow_patterns=files)
    except (HFValidationError, OSError) as e:  # hub and connection errors are OSErrors
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise AdapterError(
            f"adapter {str(named)!r} is not a local folder and could not be downloaded: {reason}"
        ) from e
    return load_adapter(folder)
