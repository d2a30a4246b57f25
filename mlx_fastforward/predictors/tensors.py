"""Safetensors files that nobody vouches for: checked first, then mapped by mlx."""

import contextlib
from pathlib import Path
from typing import Any, Iterator, Optional

import mlx.core as mx
from safetensors import SafetensorError, safe_open


class TensorFileError(Exception):
    """Why a file is no readable safetensors file, in one line."""


@contextlib.contextmanager
def safe_header(path: Path) -> Iterator[Any]:
    """A safetensors file whose header fits the file's length; raises TensorFileError."""
    try:
        if not path.is_file():
            raise TensorFileError("it is not a file")
        if path.stat().st_size == 0:
            raise TensorFileError("it is empty (0 bytes)")
        with (
            path.open("rb"),
            safe_open(path, "np") as header,
        ):  # open(): may it be read?
            yield header
    except (SafetensorError, OSError) as e:
        raise TensorFileError(" ".join(str(e).split())) from e


def open_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazily; raises TensorFileError.

    mlx trusts the header, and would find out in the middle of a prompt that it lies.
    """
    with safe_header(path):
        pass
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError, OSError) as e:
        raise TensorFileError(" ".join(str(e).split())) from e
    assert isinstance(tensors, dict)
    return tensors


def write_tensors(
    path: str | Path,
    tensors: dict[str, mx.array],
    metadata: Optional[dict[str, str]] = None,
) -> None:
    """A safetensors file; raises OSError where it cannot be written."""
    try:
        mx.save_safetensors(str(path), tensors, metadata or {})
    except RuntimeError as e:  # mlx's own for a full disk
        raise OSError(str(e)) from e
