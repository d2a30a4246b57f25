"""Prompt caches in files, in mlx-lm's format: its commands read ours, and ours read its."""

import hashlib
from pathlib import Path
from typing import Any, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache

from .errors import FileProblem, brief
from .files import expanded, replace
from .model.positions import is_whole

Metadata = dict[str, str]


def fingerprint(model: nn.Module, others: Sequence[mx.array] = ()) -> str:
    """A hash of what a model's caches depend on: its config, and its parameters and other arrays.

    Of these names, shapes, types and some values; LoRA counts.
    """
    digest, samples = hashlib.sha256(), []
    digest.update(repr(getattr(model, "args", None)).encode())
    unnamed = [("", w) for w in others]
    parameters: Any = tree_flatten(model.parameters())
    for name, w in [*parameters, *unnamed]:
        digest.update(f"{name} {w.shape} {w.dtype}\n".encode())
        step = max(1, w.size // 64)
        samples.append(w.reshape(-1)[::step][:64].astype(mx.float32))
    digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()[:32]


def read_cache(path: Path) -> tuple[list[Any], Metadata]:
    """A saved prompt cache and what was noted with it; raises FileProblem."""
    path = expanded(path)
    expected = "expected a file that mlx_lm.cache_prompt wrote"
    if not path.is_file():
        raise FileProblem(f"{path} does not exist; {expected}.")
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
    except Exception as e:  # whatever a damaged file leads to
        raise FileProblem(
            f"{path} is no prompt cache ({brief(e, 80)}); {expected}."
        ) from None
    return cache, metadata if isinstance(metadata, dict) else {}


def write_cache(path: Path, cache: list[Any], metadata: Metadata) -> None:
    """Whole or not at all; ``path`` ends in .safetensors. Raises FileProblem."""
    if not is_whole(cache):
        raise FileProblem(f"{path}: a prompt that was read in part cannot be saved.")
    replace(path, lambda half: save_prompt_cache(str(half), cache, metadata))


def check_cache(
    cache: list[Any], layers: int, bits: Optional[int] = None, group_size: int = 64
) -> None:
    """For a model of so many layers, and quantised as before; raises FileProblem."""
    if len(cache) != layers:
        raise FileProblem(
            f"the prompt cache is for another model: it has {len(cache)} layers, this one {layers}."
        )
    first = cache[0]
    if not isinstance(first, QuantizedKVCache):
        return
    if bits not in (None, first.bits) or group_size != first.group_size:
        raise FileProblem(
            f"the prompt cache was quantised with --kv-bits {first.bits} --kv-group-size "
            f"{first.group_size}; give the same."
        )
