"""Some of a text's tokens, each at its own place: a cache that holds them, and RoPE that puts them there.

Keys keep the position they have in the text, whoever is left out between them, and decoding goes on
from the text's end over a cache that is as short as what was read.
"""

from typing import Any, Callable, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from ..errors import UnsupportedModel
from .families import layer_attention, model_type

Run = tuple[int, int]  # first place, and one past the last

# These use the place for more than RoPE, or have none: they read one run of places per call.
BY_RUNS = (
    *("ministral3", "mistral4", "llama4", "llama4_text", "gpt2", "gpt_bigcode"),
    *("iquestloopcoder", "talkie", "plamo3", "muse_glimmer", "muse_spark"),
)


def runs_of(places: Sequence[int] | np.ndarray) -> list[Run]:
    """Increasing places as runs without gaps."""
    places = np.asarray(places)
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [(int(p[0]), int(p[-1]) + 1) for p in np.split(places, cuts) if p.size]


def places_of(runs: Sequence[Run]) -> np.ndarray:
    """The places in runs, one by one."""
    return np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in runs)])


class CompactKVCache:
    """Keys and values of some of a text's tokens; what mlx-lm sees is a cache.

    It is also the mark of an approximate prefix: nobody may save it, or reuse it as if it held the
    whole text.

    Args:
        inner: Holds the arrays; a cache of the whole text so far may become one of some of it.
        window: Tokens that the layer looks back, by their places; None: all.
        start: The place of the first token that ``inner`` holds.
    """

    def __init__(
        self, inner: Optional[Any] = None, window: Optional[int] = None, start: int = 0
    ):
        self.inner: Any = KVCache() if inner is None else inner
        self.window = window
        self.start = start
        self.offset = start + self.inner.offset  # the place of the next token
        self.runs: list[Run] = [(start, self.offset)] if self.inner.offset else []
        self.coming: Optional[list[Run]] = None  # of the next call; None: at the end
        # mlx-lm's attention asks for these
        if isinstance(self.inner, QuantizedKVCache):
            self.bits, self.group_size = self.inner.bits, self.inner.group_size

    def expect(self, runs: list[Run]) -> None:
        """Say where the tokens of the next call stand."""
        self.coming, self.offset = runs, runs[0][0]

    def _next(self, new: int) -> list[Run]:
        return self.coming or [(self.offset, self.offset + new)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        for start, stop in self._next(keys.shape[2]):
            if self.runs and self.runs[-1][1] == start:
                start = self.runs.pop()[0]
            self.runs.append((start, stop))
        self.offset, self.coming = self.runs[-1][1], None
        return self.inner.update_and_fetch(keys, values)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: Optional[int] = None
    ) -> Any:
        window = window_size or self.window
        runs = self._next(N)
        if window is None or runs[-1][1] - self.runs_start(runs) <= window:
            if N > 1 and return_array:
                return self._mask(runs, None)
            return None if N == 1 else "causal"
        return self._mask(runs, window)

    def runs_start(self, runs: list[Run]) -> int:
        """The first place, with these to come."""
        return (self.runs or runs)[0][0]

    def _mask(self, runs: list[Run], window: Optional[int]) -> mx.array:
        queries = places_of(runs)[:, None]
        keys = places_of([*self.runs, *runs])[None]
        seen = keys <= queries
        return mx.array(seen if window is None else seen & (queries < keys + window))

    def keys_and_values(self) -> Any:
        return self.inner.keys_and_values()

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def nbytes(self) -> int:
        return int(self.inner.nbytes)

    def size(self) -> int:
        return int(self.inner.offset)

    def empty(self) -> bool:
        return bool(self.inner.empty())

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = min(self.offset, n)
        self.offset, self.coming = self.offset - n, None
        while self.runs and self.runs[-1][1] > self.offset:
            start, stop = self.runs.pop()
            kept = max(start, self.offset)
            self.inner.trim(stop - kept)
            if start < kept:
                self.runs.append((start, kept))
        return n

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "CompactKVCache":
        if isinstance(self.inner, QuantizedKVCache):
            return self
        if self.window is not None:
            raise NotImplementedError("RotatingKVCache Quantization NYI")
        packed = CompactKVCache(self.inner.to_quantized(group_size, bits))
        packed.runs, packed.offset = list(self.runs), self.offset
        return packed


def is_whole(cache: Sequence[Any]) -> bool:
    """Whether a prompt cache holds every token of its text, as mlx-lm's own do."""
    return not any(isinstance(c, CompactKVCache) for c in cache)


def cut_back(cache: Sequence[Any], place: int) -> None:
    """Forget all from a place on, whatever stands where before it."""
    for c in cache:
        c.trim(c.offset - place)


def check_compact(cache: Sequence[Any]) -> None:
    """Raises UnsupportedModel where a prompt cache cannot leave tokens out."""
    for c in cache:
        fits = isinstance(c, (KVCache, QuantizedKVCache, CompactKVCache))
        if not fits and not (isinstance(c, RotatingKVCache) and c.keep == 0):
            raise UnsupportedModel(
                f"speculative prefill needs a KV cache in every layer, found {type(c).__name__}: "
                "this model, or a cache of limited size, must read every token."
            )


def make_compact(cache: list[Any]) -> None:
    """Let a prompt cache leave tokens out from here on, in place; raises UnsupportedModel."""
    check_compact(cache)
    cache[:] = [c if isinstance(c, CompactKVCache) else _compact(c) for c in cache]


def _compact(cache: Any) -> CompactKVCache:
    if not isinstance(cache, RotatingKVCache):
        return CompactKVCache(cache)
    inner = KVCache()
    if cache.keys is None:
        return CompactKVCache(inner, cache.max_size)
    held = [cache._temporal_order(x) for x in (cache.keys, cache.values)]
    inner.update_and_fetch(*(x[..., -cache.offset :, :] for x in held))
    return CompactKVCache(inner, cache.max_size, cache.offset - inner.offset)


def ropes_of(model: nn.Module) -> Optional[list[nn.Module]]:
    """The modules that rotate queries and keys; None where places are not theirs alone.

    Raises:
        UnsupportedModel: RoPE whose angles depend on how a prompt is cut into calls.
    """
    if model_type(model) in BY_RUNS:
        return None
    found: dict[int, nn.Module] = {}
    for attention in layer_attention(model):
        for name, module in attention.named_modules():
            if "rope" in name or "rotary" in name:
                found[id(module)] = module
    if any(type(m).__name__ == "DynamicNTKScalingRoPE" for m in found.values()):
        raise UnsupportedModel(
            "speculative prefill does not go with dynamic RoPE scaling: its angles depend on the "
            "length of what is read."
        )
    return list(found.values()) or None


def rotated_at(places: np.ndarray) -> Callable[..., mx.array]:
    """RoPE of tokens at places of their own, for watched().

    RoPE takes one position per row of a batch: the tokens become the batch. x: (1, heads, L, d).
    """
    offsets = mx.array(places.astype(np.int32))

    def around(_: int, own: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != offsets.size:
            raise UnsupportedModel(f"RoPE of {x.shape} is not of one row of tokens.")
        kwargs["offset"] = offsets
        return own(x.transpose(2, 1, 0, 3), *args[1:], **kwargs).transpose(2, 1, 0, 3)

    return around


def pieces(
    places: np.ndarray, most: int, by_runs: bool
) -> Iterator[tuple[np.ndarray, list[Run]]]:
    """Places cut into calls of at most ``most`` tokens, each with its runs."""
    parts = [places_of([r]) for r in runs_of(places)] if by_runs else [places]
    for part in parts:
        for i in range(0, part.size, most):
            yield part[i : i + most], runs_of(part[i : i + most])
