"""Small predictors on disk, and the one line that refuses a bad one."""

import functools
import json
import os
import struct
from pathlib import Path
from typing import Any, Callable, Optional

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.model.families import family_of, layer_norm_weights
from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.file import (
    JSON_NAME,
    TENSORS_NAME,
    BaseModel,
    fingerprint,
    load_predictor,
    save_predictor,
)

LAYERS, D, F, R, H = 3, 32, 64, 2, 4
PRINT, FOREIGN = "0123456789abcdef", "f" * 16
COMMITS = ["a" * 40, "b" * 40, "c" * 40]
BOTH = (JSON_NAME, TENSORS_NAME)
BASE = BaseModel("tiny", "llama", LAYERS, D, F, PRINT)
NEW = {"predictor": "token-wise", "compensator": "low-rank"}

# What each kind keeps per layer.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "pooled": {"query": (D,), "w1": (D, R), "w2": (R, F)},
    "token-wise": {"w1": (D, R), "w2": (2 * R, F), "bias": (F,)},
    "mlp": {"w1": (D, H), "w2": (H, D)},
    "low-rank": {"center": (D,), "v": (D, H), "u": (F, H + 1)},
}


def tiny_model(seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """A Llama whose norms are not all ones, as no trained model's are."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=D,
        num_hidden_layers=layers,
        intermediate_size=F,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=32,
    )
    model = llama.Model(args)
    for layer in model.layers:
        layer.input_layernorm.weight = mx.random.uniform(0.1, 2, (D,))
    return model


def norms(model: nn.Module) -> list[mx.array]:
    return layer_norm_weights(model, family_of(model))


def information(
    model: Optional[nn.Module] = None,
    predictor: str = "pooled",
    compensator: str = "mlp",
) -> dict[str, Any]:
    """The JSON of a predictor for ``model``, or for ``BASE``."""
    mark = fingerprint(norms(model)) if model else PRINT
    base = {"layers": LAYERS, "hidden_size": D, "ffn_size": F, "fingerprint": mark}
    activation = {"activation": "silu"} if compensator == "mlp" else {}
    return {
        "base_model": {**base, "name": "tiny", "model_type": "llama"},
        "predictor": {"kind": predictor, "rank": R},
        "compensator": {"kind": compensator, "rank": H, **activation},
        "calibration": {"tokens": 1000},
    }


def shapes_of(predictor: str, compensator: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer by their names."""
    parts = {"predictor": predictor, "compensator": compensator}
    return {
        f"{part}.{name}": shape
        for part, kind in parts.items()
        for name, shape in SHAPES[kind].items()
    }


def weights(
    dtype: mx.Dtype = mx.float32, predictor: str = "pooled", compensator: str = "mlp"
) -> dict[str, mx.array]:
    """The tensors that ``information`` describes."""
    shapes = shapes_of(predictor, compensator)
    rng = np.random.default_rng(0)
    tensors = {
        f"layers.{i}.{name}": mx.array(rng.normal(size=shape)).astype(dtype)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }
    return {**tensors, "importance": mx.array([0.5, 0.25, 3.0])}


def unpacked(tensors: dict[str, mx.array], name: str, bits: int) -> np.ndarray:
    """By hand: the lowest bits of a word are its first neuron; scale and bias per group."""
    words = np.array(tensors[name])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    levels = (words[:, :, None] >> shifts) & (2**bits - 1)
    levels = levels.reshape(len(words), -1).astype(np.float64)
    scales, biases = (
        np.array(tensors[f"{name}.{part}"].astype(mx.float32)).astype(np.float64)
        for part in ("scales", "biases")
    )
    size = levels.shape[1] // scales.shape[1]
    return levels * scales.repeat(size, axis=1) + biases.repeat(size, axis=1)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a predictor in place."""
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
    """Why the predictor in a folder is refused."""
    with pytest.raises(PredictorError) as e:
        load_predictor(folder)
    return one_line(e.value)


def put(folder: Path, mark: str = PRINT, time: int = 0) -> Path:
    """A predictor for the model with this fingerprint, of this age."""
    info = information()
    info["base_model"]["fingerprint"] = mark
    save_predictor(folder, info, weights())
    os.utime(folder / JSON_NAME, (time, time))
    return folder


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder the Hugging Face cache of finding, and have no network."""
    folder.mkdir()
    for name in ("scan_cache_dir", "snapshot_download"):
        mine = functools.partial(getattr(huggingface_hub, name), cache_dir=folder)
        if name != "scan_cache_dir":
            mine = functools.partial(mine, local_files_only=True)
        monkeypatch.setattr(finding, name, mine)
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
