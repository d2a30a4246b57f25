"""Damaged checkpoints: each is refused in one line, or makes a predictor that loads and is finite.

Seeds are fixed: a failure names its round, and the same round damages the same bytes again.
"""

import io
import json
import random
import shutil
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_modules

from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import open_checkpoint
from mlx_fastforward.errors import FastForwardError
from mlx_fastforward.predictors.file import BaseModel, load_predictor, save_predictor

LAYERS, D, F, RANK, H = 2, 8, 32, 3, 5
BASE = BaseModel("tiny", "llama", LAYERS, D, F, "0" * 16)
ROUNDS = 130
State = dict[str, torch.Tensor]


def trained() -> State:
    torch.manual_seed(0)
    predictor, compensator = torch_modules.Predictor, torch_modules.Compensator
    layers = [
        torch_modules.Layer(predictor(D, RANK, F), compensator(D, H))
        for _ in range(LAYERS)
    ]
    return torch_modules.Network(layers, importance=[1.0, 2.0]).state_dict()


def as_safetensors(state: State) -> bytes:
    return safetensors.torch.save({k: v.clone().contiguous() for k, v in state.items()})


def as_torch(state: State) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": state, "step": 3}, stream)
    return stream.getvalue()


def as_npz(state: State) -> bytes:
    stream = io.BytesIO()
    known = {k: v for k, v in state.items() if v.dtype != torch.bfloat16}
    np.savez(stream, **{k: v.numpy() for k, v in known.items()})
    return stream.getvalue()


def as_packed_npz(state: State) -> bytes:
    stream = io.BytesIO()
    known = {k: v for k, v in state.items() if v.dtype != torch.bfloat16}
    np.savez_compressed(stream, **{k: v.numpy() for k, v in known.items()})
    return stream.getvalue()


FORMATS: dict[str, Callable[[State], bytes]] = {
    "c.safetensors": as_safetensors,
    "c.pt": as_torch,
    "c.npz": as_npz,
    "packed.npz": as_packed_npz,
}


# Damage to bytes


def somewhere(data: bytes, rng: random.Random) -> int:
    """Any place, but mostly one of the places where formats keep what they are about."""
    edge = min(1500, len(data))
    near = rng.choice(["start", "end", "anywhere"])
    if near == "start":
        return rng.randrange(edge)
    return rng.randrange(len(data) - edge if near == "end" else 0, len(data))


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[somewhere(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: somewhere(data, rng)]


def inserted(data: bytes, rng: random.Random) -> bytes:
    """Random bytes, or a piece of the file itself."""
    at, size = somewhere(data, rng), rng.choice([1, 8, 100])
    piece = rng.choice([rng.randbytes(size), data[:size], data[at : at + size]])
    return data[:at] + piece + data[at:]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    at = somewhere(data, rng)
    return data[:at] + data[at + rng.choice([1, 8, 100]) :]


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """Lengths and offsets become extreme."""
    at = somewhere(data, rng)
    piece = rng.choice([b"\xff" * 8, b"\0" * 8, struct.pack("<q", 2**40), b"\x7f" * 4])
    return data[:at] + piece + data[at + len(piece) :]


BYTES = [flipped, truncated, inserted, cut_out, overwritten]


# Damage to what a safetensors header says


ODD_NAMES = ["", ".", "layers", "layers.0", "layers.-1.predictor.w1", "x" * 5000]
ODD_NAMES += ["predictor.w1", "layers.99.predictor.w1", "layers.0.predictor.w1.bias"]
ODD_NAMES += ["layers.²." + "predictor.w1", "importance", "layers.0.importance"]
ODD_NAMES += [
    "layers.000.predictor.query",
    "predictors.1.w1",
    "a\nb.layers.0.predictor.w1",
]
ODD_NUMBERS: list[Any] = [0, -1, 1, 7, 2**31, 2**63, 2**64, 1.5, "8", None, [], True]
ODD_DTYPES: list[Any] = ["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", 3]


def header_changed(data: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([n for n in header if n != "__metadata__"])
    tensor = header[name]
    match rng.randrange(8):
        case 0:
            tensor["dtype"] = rng.choice(ODD_DTYPES)
        case 1:
            tensor["shape"][rng.randrange(len(tensor["shape"]))] = rng.choice(
                ODD_NUMBERS
            )
        case 2:
            tensor["data_offsets"][rng.randrange(2)] = rng.choice(ODD_NUMBERS)
        case 3:
            tensor["shape"] = tensor["shape"][::-1]
        case 4:
            header[rng.choice(ODD_NAMES)] = header.pop(name)
        case 5:
            del tensor[rng.choice(list(tensor))]
        case 6:
            other = rng.choice(list(header))
            header[name], header[other] = header[other], header[name]
        case _:
            header["__metadata__"] = rng.choice(
                [{}, {"a": "b"}, {"a": 1}, [], "x", None]
            )
    text = json.dumps(header).encode()
    claimed = len(text) + rng.choice([0] * 6 + [-1, 1, 2**40])
    return struct.pack("<Q", claimed) + text + rest


# Damage to tensors, saved again as a whole file


def tensors_changed(state: State, rng: random.Random) -> State:
    changed = dict(state)
    name = rng.choice(list(state))
    value = changed[name]
    match rng.randrange(9):
        case 0:
            del changed[name]
        case 1:
            changed[rng.choice(ODD_NAMES)] = value
        case 2:
            changed[rng.choice(ODD_NAMES)] = changed.pop(name)
        case 3:
            changed[name] = value[None] if rng.random() < 0.5 else value.flatten()
        case 4:
            changed[name] = value[..., : rng.randrange(value.shape[-1])]
        case 5:
            other = rng.choice(list(state))
            changed[name], changed[other] = changed[other], value
        case 6:
            changed[name] = value.to(rng.choice([torch.int32, torch.bool, torch.uint8]))
        case 7:
            odd = [torch.nan, torch.inf, 1e38, -1.0, 0.0]
            changed[name] = value.clone()
            changed[name].view(-1)[0] = rng.choice(odd)
        case _:
            changed[name] = value.to(rng.choice([torch.float16, torch.float64]))
    return changed


# What must come of it


def attempt(path: Path, out: Path, bits: int) -> bool:
    """Convert as the command does; whether there is a predictor now."""
    try:
        checkpoint = open_checkpoint(path)
        plan = conversion.plan(checkpoint, BASE, [])
        tensors: dict[str, mx.array] = {}
        for _, made in conversion.tensors(plan, mx.float32, bits or None):
            tensors.update(made)
        info = conversion.information(plan, checkpoint, "relu", bits or None)
        save_predictor(out, info, tensors)
    except FastForwardError as e:
        assert str(e).isprintable(), f"not one printable line: {e}"
        assert not out.exists(), "something half written"
        return False
    names = sorted(p.name for p in out.iterdir())
    assert names == ["fastforward.json", "fastforward.safetensors"]
    predictor = load_predictor(out)
    predictor.check(BASE)
    for w in predictor.arrays():
        assert mx.all(mx.isfinite(w.astype(mx.float32))).item(), "not finite"
    assert np.isfinite(predictor.importances or 0).all()
    return True


def damaged(file: str, kind: str) -> Iterator[bytes]:
    """The same ROUNDS damaged files every time."""
    rng = random.Random(f"{file} {kind}")
    save, state = FORMATS[file], trained()
    whole = save(state)
    by_name = {f.__name__: f for f in [*BYTES, header_changed]}
    for _ in range(ROUNDS):
        if kind == "tensors_changed":
            yield save(tensors_changed(state, rng))
        else:
            yield by_name[kind](whole, rng)


KINDS = [*(f.__name__ for f in BYTES), "tensors_changed"]
CASES = [(file, kind) for file in FORMATS for kind in KINDS]
CASES += [("c.safetensors", "header_changed")]


@pytest.mark.parametrize("file", FORMATS)
def test_the_whole_file_converts(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(FORMATS[file](trained()))
    for bits in (0, 8):
        assert attempt(tmp_path / file, tmp_path / f"out{bits}", bits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file, kind", CASES)
def test_damaged_files(file: str, kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / file, tmp_path / "out"
    made = tried = 0
    problems = []
    for i, data in enumerate(damaged(file, kind)):
        path.write_bytes(data)
        try:
            made += attempt(path, out, bits=8 * (i % 2))
        except Exception as e:
            problems.append(f"round {i}: {type(e).__name__}: {str(e)[:200]!r}")
        tried += 1
        shutil.rmtree(out, ignore_errors=True)
    print(f"{file}, {kind}: {tried} tried, {made} made a predictor")
    assert not problems, f"{len(problems)} of {tried}: " + "; ".join(problems[:5])
    assert tried == ROUNDS and made < ROUNDS  # the damage is damage


def test_there_are_enough_of_them() -> None:
    assert ROUNDS * len(CASES) >= 1500
