"""Safetensors files that nobody vouches for: checked first, then mapped by mlx."""

from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open


class TensorFileError(Exception):
    """Why a file is no readable safetensors file, in one line."""


def open_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazily; raises TensorFileError.

    The safetensors library checks the header against the file's length first: mlx trusts it, and
    would find out in the middle of a prompt.
    """
    try:
        if not path.is_file():
            raise TensorFileError("it is not a file")
        if path.stat().st_size == 0:
            raise TensorFileError("it is empty (0 bytes)")
        with safe_open(path, "np"):
            pass
        tensors = mx.load(str(path), format="safetensors")
    except (SafetensorError, RuntimeError, ValueError, OSError) as e:
        raise TensorFileError(" ".join(str(e).split())) from e
    assert isinstance(tensors, dict)
    return tensors
