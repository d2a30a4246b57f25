"""The side file: trained predictors, compensators and importances of one base model.

A folder with ``fastforward.json`` (what it is) and ``fastforward.safetensors`` (the weights).
"""

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
                f"the adapter was made for {self.base.get('name', 'another model')}: "
                "the shapes agree, but the weights of this model do not."
            )


def fingerprint(norms: Sequence[mx.array]) -> str:
    """A hash of a model's norm weights, the same for every quantisation of the model.

    Norms stay float when a model is quantised; rounding to bf16 makes fp16, bf16 and fp32 equal.
    """
    digest = hashlib.sha256()
    for i in sorted({0, len(norms) // 2, len(norms) - 1}):
        w = norms[i].astype(mx.bfloat16).astype(mx.float32)
        digest.update(np.array(w).tobytes())
    return digest.hexdigest()[:16]


def load_adapter(path: str | Path) -> Adapter:
    """Read a side file lazily (weights are mapped, not read); raises AdapterError."""
    path = Path(path)
    info, tensors = _read(path)
    base = info.get("base_model")
    keys = ("layers", "hidden_size", "ffn_size", "fingerprint")
    if not isinstance(base, dict) or any(k not in base for k in keys):
        raise AdapterError(
            f"{path / JSON_NAME} lacks base_model with {', '.join(keys)}."
        )
    layers, d, f = base["layers"], base["hidden_size"], base["ffn_size"]
    shapes = _Shapes(path, tensors, layers)
    predictors = compensator = importances = None
    if info.get("predictor"):
        r = info["predictor"]["rank"]
        q = shapes.take("predictor.query", (d,))
        w1 = shapes.take("predictor.w1", (d, r))
        w2 = shapes.take("predictor.w2", (r, f))
        predictors = [PredictorWeights(*w) for w in zip(q, w1, w2)]
    if info.get("compensator"):
        h = info["compensator"]["rank"]
        c1 = shapes.take("compensator.w1", (d, h))
        c2 = shapes.take("compensator.w2", (h, d))
        weights = [MLPWeights(*w) for w in zip(c1, c2)]
        activation = info["compensator"].get("activation", "relu")
        if activation not in ACTIVATIONS:
            raise AdapterError(
                f"{path / JSON_NAME}: compensator activation {activation!r} is not one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        compensator = MLPCompensator(weights, activation)
    if "importance" in tensors:
        if tensors["importance"].shape != (layers,):
            raise AdapterError(
                f"{path}: importance should have shape ({layers},), "
                f"found {tensors['importance'].shape}."
            )
        importances = np.array(tensors["importance"].astype(mx.float32)).tolist()
    return Adapter(base, predictors, compensator, importances, info)


class _Shapes:
    """Takes one tensor per layer out of the file, checking each shape."""

    def __init__(self, path: Path, tensors: dict[str, mx.array], layers: int):
        self.path, self.tensors, self.layers = path, tensors, layers

    def take(self, name: str, shape: tuple[int, ...]) -> list[mx.array]:
        keys = [f"layers.{i}.{name}" for i in range(self.layers)]
        for key in keys:
            if key not in self.tensors:
                raise AdapterError(
                    f"{self.path / TENSORS_NAME} lacks the tensor {key}."
                )
            found = tuple(self.tensors[key].shape)
            if found != shape:
                raise AdapterError(
                    f"{self.path / TENSORS_NAME}: {key} should have shape {shape}, found {found}."
                )
        return [self.tensors[key] for key in keys]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    for name in (JSON_NAME, TENSORS_NAME):
        if not (path / name).is_file():
            raise AdapterError(
                f"no adapter in {path}: expected the files {JSON_NAME} and {TENSORS_NAME}."
            )
    try:
        info = json.loads((path / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path / JSON_NAME} cannot be read: {e}") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise AdapterError(
            f"{path / JSON_NAME}: expected format {FORMAT}, found {found}."
        )
    try:
        tensors = mx.load(str(path / TENSORS_NAME))
    except (RuntimeError, ValueError, OSError) as e:
        raise AdapterError(f"{path / TENSORS_NAME} cannot be read: {e}") from e
    return info, tensors  # type: ignore[return-value]


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
        for name in (TENSORS_NAME, JSON_NAME):
            os.replace(f"{tmp}/{name}", path / name)


def find_adapter(model: str, named: Optional[str | Path] = None) -> Optional[Adapter]:
    """The adapter that a user named (folder or repository), else the one beside a local model."""
    if named is None:
        beside = Path(model)
        return load_adapter(beside) if (beside / JSON_NAME).is_file() else None
    if Path(named).exists() or str(named).count("/") != 1:
        return load_adapter(named)
    files = [JSON_NAME, TENSORS_NAME]
    return load_adapter(snapshot_download(str(named), allow_patterns=files))
