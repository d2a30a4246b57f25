"""What a KV cache tells before a call: whether it is empty, where padding is, what was remembered."""

import types
from typing import Any, Optional, Sequence

import mlx.core as mx

Cache = Optional[Sequence[Any]]
Memory = list[dict[str, mx.array]]  # one per layer, for the selector


def is_empty(cache: Cache) -> bool:
    """Whether nothing is cached; never waits for the device.

    Any layer's word will do: mlx-lm's rotating batch caches keep a count when their last row leaves.
    """
    return not cache or any(layer is None or _is_empty(layer) for layer in cache)


def _is_empty(layer: Any) -> bool:
    for name in ("offset", "_offset", "_idx"):  # batch caches have an array as offset
        if isinstance(place := getattr(layer, name, None), int):
            return place == 0
    return bool(layer.empty())


def valid_tokens(cache: Cache, batch: int, new: int) -> Optional[mx.array]:
    """1 for tokens, 0 for padding (B, L); None where the cache cannot hold padding.

    Batch caches know their padding as arrays, and count positions from the first real token. A
    plain one counts right padding from the end of the whole batch, so an earlier chunk may hide a
    few real tokens too: only from the statistics.
    """
    first: Any = cache[0] if cache else None
    if batch == 1 or not hasattr(first, "left_padding"):
        return None
    chunk = mx.arange(new)[None]
    place = first.offset[:, None] + chunk
    valid = place >= 0
    if (lengths := getattr(first, "_lengths", None)) is not None:
        valid = valid & (place < lengths[:, None])
    if (right := getattr(first, "_right_padding", None)) is not None:
        valid = valid & (chunk < (new - right)[:, None])
    return valid.astype(mx.float32)


def memory_of(cache: Cache, layers: int, fresh: bool) -> Memory:
    """The selector's memory of a prompt, kept on the prompt's first KV cache.

    There it dies with the prompt, is copied with it, and follows it when mlx-lm quantises the cache.
    The rows of batch caches come and go, so nothing is kept there.

    Args:
        fresh: The prompt begins with this call.
    """
    first: Any = cache[0] if cache else None
    if first is None or hasattr(first, "left_padding"):
        return [{} for _ in range(layers)]
    memory: Optional[Memory] = None if fresh else first.__dict__.get("_fastforward")
    if memory is None:
        memory = [{} for _ in range(layers)]
        first._fastforward = memory
        if hasattr(type(first), "to_quantized"):  # a method, so that copies follow
            first.to_quantized = types.MethodType(_to_quantized, first)
    return memory


def _to_quantized(self: Any, *args: Any, **kwargs: Any) -> Any:
    quantised = type(self).to_quantized(self, *args, **kwargs)
    quantised._fastforward = self._fastforward
    return quantised
