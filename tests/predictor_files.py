"""Small predictor files on disk, and the one line that refuses a bad one."""

import json
import os
import struct
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _cache_manager

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import (
    JSON_NAME,
    TENSORS_NAME,
    PredictorFile,
    load_predictor,
    packed,
    save_predictor,
)

LAYERS, D, F, R, H = 3, 32, 64, 2, 4
PRINT, FOREIGN = "0123456789abcdef", "f" * 16
COMMITS = ["a" * 40, "b" * 40, "c" * 40]
BOTH = (JSON_NAME, TENSORS_NAME)
BASE = BaseModel("tiny", "llama", LAYERS, D, F, PRINT)
NEW = {"predictor": "token-wise", "compensator": "low-rank"}
Sizes = int | list[int]  # one for all layers, or one per layer


def per_layer(sizes: Sizes) -> list[int]:
    return sizes if isinstance(sizes, list) else [sizes] * LAYERS


def shapes(
    predictor: str = "pooled",
    compensator: str = "mlp",
    rank: Sizes = R,
    hidden: Sizes = H,
    width: Sizes = F,
    bits: int = 0,
) -> dict[str, tuple[int, ...]]:
    """The tensors that the format asks for, by their names."""
    found: dict[str, tuple[int, ...]] = {"importance": (LAYERS,)}
    for i, (r, h, f) in enumerate(zip(*map(per_layer, (rank, hidden, width)))):
        parts: dict[str, dict[str, tuple[int, ...]]] = {
            "pooled": {"query": (D,), "w1": (D, r), "w2": (r, f)},
            "token-wise": {"w1": (D, r), "w2": (2 * r, f), "bias": (f,)},
            "mlp": {"w1": (D, h), "w2": (h, D)},
            "low-rank": {"center": (D,), "v": (D, h), "u": (f, h + 1)},
        }
        if bits:
            for part in (parts["pooled"], parts["token-wise"]):
                groups = (part["w2"][0], f // (64 if f % 64 == 0 else 32))
                part |= {"w2.scales": groups, "w2.biases": groups}
                part["w2"] = (part["w2"][0], f * bits // 32)
        for part, kind in (("predictor", predictor), ("compensator", compensator)):
            for name, shape in parts[kind].items():
                found[f"layers.{i}.{part}.{name}"] = shape
    return found


def weights(
    dtype: mx.Dtype = mx.float32, bits: int = 0, **kind: Any
) -> dict[str, mx.array]:
    """Tensors of these shapes."""
    rng = np.random.default_rng(0)
    tensors = {
        name: mx.array(rng.normal(size=shape)).astype(dtype)
        for name, shape in shapes(**kind).items()
    }
    if bits:
        for name in [k for k in tensors if k.endswith("predictor.w2")]:
            tensors.update(packed(name, tensors.pop(name), bits))
    return {**tensors, "importance": mx.array([0.5, 0.25, 3.0])}


def information(
    predictor: str = "pooled",
    compensator: str = "mlp",
    rank: Sizes = R,
    hidden: Sizes = H,
    width: Sizes = F,
    bits: int = 0,
) -> dict[str, Any]:
    """The JSON that describes them, for ``BASE``."""
    base = {"layers": LAYERS, "hidden_size": D, "ffn_size": width, "fingerprint": PRINT}
    return {
        "base_model": {**base, "name": "tiny", "model_type": "llama"},
        "predictor": {
            "kind": predictor,
            "rank": rank,
            **({"quantization": {"bits": bits}} if bits else {}),
        },
        "compensator": {
            "kind": compensator,
            "rank": hidden,
            **({"activation": "silu"} if compensator == "mlp" else {}),
        },
        "calibration": {"tokens": 1000},
    }


def save(path: Path, changed: dict[str, Optional[mx.array]] = {}, **kind: Any) -> Path:
    """A predictor file of some kind, some tensors changed or, if None, missing."""
    tensors = {**weights(**kind), **changed}
    info = information(**{k: v for k, v in kind.items() if k != "dtype"})
    save_predictor(path, info, {k: w for k, w in tensors.items() if w is not None})
    return path


def held(file: PredictorFile) -> dict[str, mx.array]:
    """The arrays that a loaded file keeps, by their names on disk."""
    renamed = {"scales": "w2.scales", "biases": "w2.biases"}
    parts = {"predictor": file.layers, "compensator": file.compensator}
    parts["compensator"] = getattr(file.compensator, "layers", None)
    return {
        f"layers.{i}.{part}.{renamed.get(name, name)}": w
        for part, layers in parts.items()
        for i, layer in enumerate(layers or [])
        for name, w in vars(layer).items()
        if isinstance(w, mx.array)
    }


def unpacked(tensors: dict[str, mx.array], name: str, bits: int) -> np.ndarray:
    """By hand: the lowest bits of a word are its first neuron; scale and bias per group."""
    words = np.array(tensors[name])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    levels = (words[:, :, None] >> shifts) & (2**bits - 1)
    levels = levels.reshape(len(words), -1).astype(np.float64)
    scales, biases = (
        float64(tensors[f"{name}.{part}"]) for part in ("scales", "biases")
    )
    size = levels.shape[1] // scales.shape[1]
    return levels * scales.repeat(size, axis=1) + biases.repeat(size, axis=1)


def float64(w: mx.array) -> np.ndarray:
    return np.array(w.astype(mx.float32)).astype(np.float64)


def tiny_model(seed: int = 0, layers: int = LAYERS, **more: Any) -> nn.Module:
    """A Llama of these sizes, whose norms are not all ones, as no trained model's are."""
    sizes = dict(num_hidden_layers=layers, intermediate_size=F)
    return models.tiny("llama", seed, **sizes, **more)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a predictor file in place."""
    info = json.loads((folder / JSON_NAME).read_text())
    changed = change(info)
    text = json.dumps(info if changed is None else changed)
    (folder / JSON_NAME).write_text(text)


def overwrite(path: Path) -> None:
    """Make every float32 of a safetensors file 7; the file stays the same one."""
    with open(path, "r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        start = 8 + header
        size = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        file.write(np.full(size // 4, 7, np.float32).tobytes())


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and text == text.strip() and "\n" not in text
    return text


def refusal(folder: Path) -> str:
    """Why the predictor file in a folder is refused."""
    with pytest.raises(PredictorError) as e:
        load_predictor(folder)
    return one_line(e.value)


def put(folder: Path, mark: str = PRINT, time: int = 0) -> Path:
    """A predictor file for the model with this fingerprint, of this age."""
    edit(save(folder), lambda info: info["base_model"].update(fingerprint=mark))
    os.utime(folder / JSON_NAME, (time, time))
    return folder


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder the Hugging Face cache, and have no network."""
    for module in (constants, _cache_manager):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def cached(
    cache: Path,
    repo: str,
    commit: str = COMMITS[0],
    names: tuple[str, ...] = BOTH,
    kind: str = "models",
) -> Path:
    """A revision of a repository as the hub's client leaves it, and main is this one."""
    root = cache / f"{kind}--{repo.replace('/', '--')}"
    snapshot = put(root / "snapshots" / commit)
    for name in set(BOTH) - set(names):
        (snapshot / name).unlink()
    (snapshot / "README.md").write_text("A side file.")
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot
