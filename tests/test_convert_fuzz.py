"""Damaged checkpoints: each is refused in one line, or makes a predictor that loads and is finite.

Seeds are fixed: a failure names its round, and the same round damages the same bytes again.
"""

import random
import shutil
import struct
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import (
    BASE,
    State,
    convert,
    npz,
    one_safetensors,
    packed_npz,
    torch_file,
    trained,
)

from mlx_fastforward.errors import FastForwardError

ROUNDS = 100


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


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A piece comes in, goes, or takes another's place; or the end is missing."""
    at, size = somewhere(data, rng), rng.choice([1, 8, 100])
    pieces = [b"", b"\xff" * 8, b"\0" * 8, struct.pack("<q", 2**40), b"\x7f" * 4]
    pieces += [rng.randbytes(size), data[:size], data[at : at + size]]
    piece = rng.choice(pieces)
    return data[:at] + piece + data[at + rng.choice([0, len(piece), size, len(data)]) :]


ODD_NAMES = ["", ".", "layers", "layers.0", "layers.-1.predictor.w1", "x" * 5000]
ODD_NAMES += ["predictor.w1", "layers.99.predictor.w1", "layers.0.predictor.w1.bias"]
ODD_NAMES += ["layers.².predictor.w1", "importance", "layers.0.importance"]
ODD_NAMES += ["layers.000.predictor.query", "a\nb.layers.0.predictor.w1"]
OTHER_DTYPES = ["int32", "bool", "uint8", "float16", "float64"]
ODD_VALUES = [torch.nan, torch.inf, 1e38, -1.0, 0.0]


def tensors_changed(state: State, rng: random.Random) -> State:
    changed = dict(state)
    name, other = rng.choice(list(state)), rng.choice(list(state))
    value = changed[name]
    match rng.randrange(6):
        case 0:
            del changed[name]
        case 1:
            changed[rng.choice(ODD_NAMES)] = value
        case 2:
            cut = value[..., : rng.randrange(value.shape[-1])]
            changed[name] = rng.choice([value[None], value.flatten(), cut])
        case 3:
            changed[name], changed[other] = changed[other], value
        case 4:
            changed[name] = value.to(getattr(torch, rng.choice(OTHER_DTYPES)))
        case _:
            changed[name] = value.clone()
            changed[name].view(-1)[0] = rng.choice(ODD_VALUES)
    return changed


def attempt(path: Path, out: Path, bits: int) -> bool:
    """Whether there is a predictor file now."""
    try:
        file = convert(path, out, bits=bits or None)
    except FastForwardError as e:
        assert str(e).isprintable(), f"not one printable line: {e}"
        assert not out.exists(), "something half written"
        return False
    file.check(BASE)
    for w in file.arrays():
        assert mx.all(mx.isfinite(w.astype(mx.float32))).item(), "not finite"
    assert np.isfinite(file.importances or 0).all()
    return True


WAYS = [one_safetensors, torch_file, npz, packed_npz]
DAMAGES = [flipped, spliced, tensors_changed]
CASES = [(way, damage) for way in WAYS for damage in DAMAGES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way, damage", CASES)
def test_damaged_files(
    way: Callable[[State, Path], Path], damage: Callable[..., Any], tmp_path: Path
) -> None:
    rng, out = random.Random(f"{way.__name__} {damage.__name__}"), tmp_path / "out"
    state, problems, made = trained(), [], 0
    path = way(state, tmp_path)
    whole = path.read_bytes()
    assert attempt(path, out, 0)  # it is the damage that matters
    for i in range(ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        if damage is tensors_changed:
            way(damage(state, rng), tmp_path)
        else:
            path.write_bytes(damage(whole, rng))
        try:
            made += attempt(path, out, bits=8 * (i % 2))
        except Exception as e:
            problems.append(f"round {i}: {type(e).__name__}: {str(e)[:200]!r}")
    assert not problems, f"{len(problems)} of {ROUNDS}: " + "; ".join(problems[:5])
    assert made < ROUNDS
