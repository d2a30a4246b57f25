"""What a prompt cache tells before a call: is it empty, where padding is, what was remembered."""

import types
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx

Cache = Optional[Sequence[Any]]
Memory = list[dict[str, mx.array]]  # one per layer, for the selector


PLACES = ("offset", "_offset", "_idx")  # batch caches have an array as offset


def parts(cache: Cache) -> Iterator[Any]:
    """The caches of all layers, also where a layer has several."""
    for layer in cache or []:
        inner = getattr(layer, "caches", None)
        yield from [layer] if inner is None else parts(inner)


def _place(part: Any) -> Optional[int]:
    """Tokens that a cache has seen, where it counts them; never waits for the device."""
    places = (getattr(part, name, None) for name in PLACES)
    return next((p for p in places if isinstance(p, int)), None)


def counted(cache: Cache) -> list[int]:
    """Tokens that each cache has seen; states of linear attention do not count theirs."""
    return [n for part in parts(cache) if (n := _place(part)) is not None]


def cached_tokens(cache: Cache) -> int:
    """Tokens that a prompt cache holds."""
    return next(iter(counted(cache)), 0)


def is_empty(cache: Cache) -> bool:
    """Whether nothing is cached; never waits for the device.

    Any counting cache's word will do: mlx-lm's rotating batch caches keep a count when their last row
    leaves.
    """
    every = [part for part in parts(cache) if part is not None]
    if counts := counted(every):
        return 0 in counts
    return not every or any(part.empty() for part in every)


def valid_tokens(cache: Cache, batch: int, new: int) -> Optional[mx.array]:
    """1 for tokens, 0 for padding (B, L); None where the cache cannot hold padding.

    Batch caches know their padding as arrays, and count positions from the first real token. A
    plain one counts right padding from the end of the whole batch, so an earlier chunk may hide a
    few real tokens too: only from the statistics. States of linear attention are told about the
    padding of the tokens to come.
    """
    if batch == 1:
        return None
    padded = [p for p in parts(cache) if getattr(p, "left_padding", None) is not None]
    counting = [p for p in padded if hasattr(p, "offset")]
    chunk = mx.arange(new)[None]
    if not padded:
        return None
    if not counting:
        mask = padded[0].make_mask(new)
        return mx.broadcast_to(mask, (batch, new)).astype(mx.float32)
    first = counting[0]
    place = first.offset[:, None] + chunk
    valid = place >= 0
    if (lengths := getattr(first, "_lengths", None)) is not None:
        valid = valid & (place < lengths[:, None])
    if (right := getattr(first, "_right_padding", None)) is not None:
        valid = valid & (chunk < (new - right)[:, None])
    return valid.astype(mx.float32)


def memory_of(cache: Cache, layers: int, fresh: bool, new: int) -> Memory:
    """The selector's memory of a prompt, kept on the first of its caches that counts tokens.

    There it dies with the prompt, is copied with it, and follows it when mlx-lm quantises the cache.
    The rows of batch caches come and go, so nothing is kept there.

    Args:
        fresh: The prompt begins with this call.
        new: Tokens of this call. What is remembered was seen in one call; where the cache was cut back
            into it or before, another text may follow.
    """
    plain = (p for p in parts(cache) if isinstance(getattr(p, "offset", None), int))
    first: Any = next(plain, None)
    if first is None:
        return [{} for _ in range(layers)]
    end, memory = first.__dict__.get("_fastforward", (0, []))
    if fresh or not any(memory) or first.offset < end:
        memory = [{} for _ in range(layers)]
        first._fastforward = first.offset + new, memory
        if hasattr(type(first), "to_quantized"):  # a method, so that copies follow
            first.to_quantized = types.MethodType(_to_quantized, first)
    return memory


def _to_quantized(self: Any, *args: Any, **kwargs: Any) -> Any:
    quantised = type(self).to_quantized(self, *args, **kwargs)
    quantised._fastforward = self._fastforward
    return quantised
