"""Checkpoints of small predictors, as training scripts save them, and what is made of them."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_modules

from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import (
    Checkpoint,
    CheckpointError,
    Entry,
    open_checkpoint,
)
from mlx_fastforward.convert.naming import Rule
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import (
    PredictorFile,
    load_predictor,
    save_predictor,
)

LAYERS, D, F, RANK, H = 3, 8, 32, 4, 5
BASE = BaseModel("tiny", "llama", LAYERS, D, F, "0" * 16)
State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def trained(dtype: str = "float32", seed: int = 0) -> State:
    """A checkpoint as a training script has it."""
    state = torch_modules.trained(LAYERS, D, F, RANK, H, seed)
    return {k: v.to(getattr(torch, dtype)) for k, v in state.items()}


def wanted(state: State) -> Arrays:
    """What a predictor file should hold of it: no "weight" in names, matrices (in, out)."""
    return {
        k.removesuffix(".weight"): (v.T if v.ndim == 2 else v).float().numpy()
        for k, v in state.items()
    }


def one_safetensors(state: State, folder: Path) -> Path:
    contiguous = {k: v.clone().contiguous() for k, v in state.items()}
    safetensors.torch.save_file(contiguous, folder / "model.safetensors")
    return folder / "model.safetensors"


def torch_file(state: Any, folder: Path, name: str = "model.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def npz(state: State, folder: Path) -> Path:
    np.savez(folder / "model.npz", **{k: v.numpy() for k, v in state.items()})
    return folder / "model.npz"


def packed_npz(state: State, folder: Path) -> Path:
    """Compressed, in Fortran's order and the other byte order; its suffix in capitals."""
    arrays = {
        k: np.asfortranarray(v.numpy().astype(v.numpy().dtype.newbyteorder(">")))
        for k, v in state.items()
    }
    np.savez_compressed(folder / "model.npz", **arrays)
    return (folder / "model.npz").rename(folder / "MODEL.NPZ")


def opened(source: Path | Arrays) -> Checkpoint:
    """A file or folder; or arrays, as a checkpoint without a file."""
    if isinstance(source, Path):
        return open_checkpoint(source)
    entries = {
        name: Entry(a.shape, a.dtype.name, lambda a=a: mx.array(a), "c")
        for name, a in source.items()
    }
    return Checkpoint("c", "memory", entries)


def converted(
    source: Path | Arrays,
    rules: Optional[list[Rule]] = None,
    dtype: str = "float32",
    base: BaseModel = BASE,
) -> Arrays:
    """The tensors that are made of it, as float32."""
    plan = conversion.plan(opened(source), base, rules or [])
    steps = conversion.tensors(plan, conversion.DTYPES[dtype])
    made = {k: v for _, parts in steps for k, v in parts.items()}
    assert all(str(v.dtype).endswith(dtype) for k, v in made.items() if "." in k)
    return {k: np.array(v.astype(mx.float32)) for k, v in made.items()}


def same(got: Arrays, expected: Arrays) -> None:
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert np.array_equal(got[name], value), name


def refused(source: Path | Arrays, *args: Any, **more: Any) -> str:
    """The one line that it is refused with, be it on opening or on reading."""
    with pytest.raises(CheckpointError) as e:
        converted(source, *args, **more)
    assert str(e.value).isprintable(), str(e.value)
    return str(e.value)


def convert(
    path: Path,
    out: Path,
    base: BaseModel = BASE,
    dtype: str = "float32",
    bits: Optional[int] = None,
    activation: str = "relu",
) -> PredictorFile:
    """As the command does it, and loaded again."""
    checkpoint = open_checkpoint(path)
    plan = conversion.plan(checkpoint, base, [])
    steps = conversion.tensors(plan, conversion.DTYPES[dtype], bits)
    tensors = {k: v for _, made in steps for k, v in made.items()}
    info = conversion.information(plan, checkpoint, activation, bits)
    save_predictor(out, info, tensors)
    return load_predictor(out)
