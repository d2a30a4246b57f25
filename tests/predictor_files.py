"""Small predictor files on disk, and the one line that refuses a bad one."""

import json
import os
import struct
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _cache_manager

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.predictors import file as module
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME, PredictorFile

LAYERS, D, F, R, H = 3, 32, 64, 2, 4
PRINT, FOREIGN = "0123456789abcdef", "f" * 16
BOTH = (JSON_NAME, TENSORS_NAME)
BASE = BaseModel("tiny", "llama", LAYERS, D, F, PRINT)
Kind = dict[str, Any]  # what differs from PLAIN; numbers may be lists, one per layer
PLAIN: Kind = {"rank": R, "hidden": H, "width": F, "bits": 0}
PLAIN |= {"predictor": "pooled", "compensator": "mlp"}
NEW: Kind = {"predictor": "token-wise", "compensator": "low-rank"}
UNEVEN: Kind = {"rank": [3, 1, 5], "hidden": [1, 4, 2], "width": [64, 32, 96]}


def shapes(**kind: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that the format asks for, by their names."""
    k = PLAIN | kind
    sizes = [k[n] if isinstance(k[n], list) else [k[n]] * LAYERS for n in UNEVEN]
    found: dict[str, tuple[int, ...]] = {"importance": (LAYERS,)}
    for i, (r, h, f) in enumerate(zip(*sizes)):
        parts: dict[Optional[str], dict[str, tuple[int, ...]]] = {
            "pooled": {"query": (D,), "w1": (D, r), "w2": (r, f)},
            "token-wise": {"w1": (D, r), "w2": (2 * r, f), "bias": (f,)},
            "mlp": {"w1": (D, h), "w2": (h, D)},
            "low-rank": {"center": (D,), "v": (D, h), "u": (f, h + 1)},
            None: {},
        }
        if k["bits"]:
            part, rows = parts[k["predictor"]], parts[k["predictor"]]["w2"][0]
            groups = (rows, f // (64 if f % 64 == 0 else 32))
            part |= {"w2.scales": groups, "w2.biases": groups}
            part["w2"] = (rows, f * k["bits"] // 32)
        for name in ("predictor", "compensator"):
            for tensor, shape in parts[k[name]].items():
                found[f"layers.{i}.{name}.{tensor}"] = shape
    return found


def weights(dtype: Any = mx.float32, bits: int = 0, **kind: Any) -> dict[str, Any]:
    """Tensors of these shapes."""
    rng, sizes = np.random.default_rng(0), shapes(**kind)
    tensors = {k: mx.array(rng.normal(size=s)).astype(dtype) for k, s in sizes.items()}
    for name in [k for k in tensors if bits and k.endswith("predictor.w2")]:
        tensors.update(module.packed(name, tensors.pop(name), bits))
    return {**tensors, "importance": mx.array([0.5, 0.25, 3.0])}


def information(**kind: Any) -> dict[str, Any]:
    """The JSON that describes them, for ``BASE``."""
    k = PLAIN | kind
    base = {"layers": LAYERS, "hidden_size": D, "ffn_size": k["width"]}
    base |= {"fingerprint": PRINT, "name": "tiny", "model_type": "llama"}
    info = {"base_model": base, "calibration": {"tokens": 1000}}
    for part, rank in (("predictor", "rank"), ("compensator", "hidden")):
        if k[part]:
            info[part] = {"kind": k[part], "rank": k[rank]}
    if k["bits"]:
        info["predictor"]["quantization"] = {"bits": k["bits"]}
    if k["compensator"] == "mlp":
        info["compensator"]["activation"] = "silu"
    return info


def save(path: Path, changed: Any = {}, dtype: Any = mx.float32, **kind: Any) -> Path:
    """A predictor file of some kind, some tensors changed or, if None, missing."""
    tensors = {**weights(dtype, **kind), **changed}
    found = {k: w for k, w in tensors.items() if w is not None}
    module.save_predictor(path, information(**kind), found)
    return path


def held(file: PredictorFile) -> dict[str, mx.array]:
    """The arrays that a loaded file keeps, by their names on disk."""
    renamed = {"scales": "w2.scales", "biases": "w2.biases"}
    behind = getattr(file.compensator, "layers", [])
    parts = {"predictor": file.layers or [], "compensator": behind}
    return {
        f"layers.{i}.{part}.{renamed.get(name, name)}": w
        for part, layers in parts.items()
        for i, layer in enumerate(layers)
        for name, w in vars(layer).items()
        if isinstance(w, mx.array)
    }


def tiny_model(seed: int = 0, layers: int = LAYERS, **more: Any) -> nn.Module:
    """A Llama of these sizes, whose norms are not all ones, as no trained model's are."""
    sizes = dict(num_hidden_layers=layers, intermediate_size=F)
    return models.tiny("llama", seed, **sizes, **more)


def edit(folder: Path, section: str = "", **values: Any) -> Path:
    """Change the JSON of a predictor file in place; what becomes ... is left out."""
    info = json.loads((folder / JSON_NAME).read_text())
    part = info[section] if section else info
    part.update(values)
    for key in [k for k, v in part.items() if v is ...]:
        del part[key]
    (folder / JSON_NAME).write_text(json.dumps(info))
    return folder


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
        module.load_predictor(folder)
    return one_line(e.value)


def put(folder: Path, mark: str = PRINT, time: int = 0) -> Path:
    """A predictor file for the model with this fingerprint, of this age."""
    edit(save(folder), "base_model", fingerprint=mark)
    os.utime(folder / JSON_NAME, (time, time))
    return folder


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder the Hugging Face cache, and have no network."""
    for hub in (constants, _cache_manager):
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def cached(cache: Path, repo: str, commit: str = "a" * 40, names: Any = BOTH) -> Path:
    """A revision of a repository as the hub's client leaves it, and main is this one."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = put(root / "snapshots" / commit)
    for name in set(BOTH) - set(names):
        (snapshot / name).unlink()
    (snapshot / "README.md").write_text("A README.")
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot
