"""Places to which a cache that cannot be trimmed can be cut back.

States of linear attention, and windows that have moved on, are copied there: they are small. Keys and
values of the other layers only need the place.
"""

import copy
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache

from .model.caches import parts

MOST = 4  # places
BYTES = 1 << 30  # of their copies; the last place is kept whatever it takes


def trimmable(cache: list[Any], tokens: float) -> bool:
    """Whether a cache can be trimmed, and still can when it holds so many tokens."""
    return not any(_passes(part, tokens) for part in parts(cache))


def can_trim(cache: list[Any], keep: int) -> bool:
    """Whether trimming to ``keep`` tokens leaves all that the next one looks back at."""
    held = all(_first_held(part) <= _looks_back(part, keep) for part in parts(cache))
    return held and can_trim_prompt_cache(cache)


def _first_held(part: Any) -> int:
    """The first place that a part still has; others are trimmed by mlx-lm's rules."""
    return int(getattr(part, "start_position", getattr(part, "start", 0)) or 0)


def _looks_back(part: Any, keep: int) -> int:
    """How far a token at ``keep`` looks back: its chunk's beginning, or a window."""
    if (chunk := getattr(part, "chunk_size", None)) is not None:
        return keep // int(chunk) * int(chunk)
    window = getattr(part, "window", None)
    return keep if window is None else max(0, keep - int(window))


def _passes(part: Any, tokens: float) -> bool:
    window = getattr(part, "max_size", getattr(part, "chunk_size", None))
    return not part.is_trimmable() or window is not None and window <= tokens


class Checkpoints:
    """Of one cache; the tokens up to each place must be those that the cache holds."""

    def __init__(self) -> None:
        self.places: dict[int, list[Any]] = {}  # in order

    def add(self, place: int, cache: list[Any]) -> None:
        """The cache holds ``place`` tokens. The oldest places go, but for the very first.

        That is the system prompt's end, which most conversations return to.
        """
        self.drop_from(place)
        self.places[place] = [_copied(layer) for layer in cache]
        while len(self.places) > MOST or len(self.places) > 1 and self.nbytes > BYTES:
            old = list(self.places)
            del self.places[old[1 if len(old) > 2 else 0]]

    def drop_from(self, place: int) -> None:
        """Forget this place and later ones."""
        self.places = {n: kept for n, kept in self.places.items() if n < place}

    def back(self, cache: list[Any], most: int) -> int:
        """Cut the cache back to the last place of at most ``most`` tokens; 0 where there is none."""
        self.drop_from(most + 1)
        if not self.places:
            return 0
        place, kept = list(self.places.items())[-1]
        cache[:] = [_as_it_was(layer, k, place) for layer, k in zip(cache, kept)]
        return place

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(k) for kept in self.places.values() for k in kept)


def _copied(part: Any) -> Any:
    """What brings a cache back to where it is; None where trimming does.

    A copy shares its arrays with the cache until that writes to them.
    """
    if (inner := getattr(part, "caches", None)) is not None:
        return [_copied(p) for p in inner]
    return copy.deepcopy(part) if _passes(part, float("inf")) else None


def _as_it_was(part: Any, copied: Any, place: int) -> Any:
    if isinstance(copied, list):
        pairs = zip(part.caches, copied)
        part.caches = tuple(_as_it_was(p, c, place) for p, c in pairs)
    elif copied is None:
        part.trim(part.offset - place)
    else:
        return copy.deepcopy(copied)  # the place may be returned to again
    return part


def _nbytes(copied: Any) -> int:
    if isinstance(copied, list):
        return sum(map(_nbytes, copied))
    return 0 if copied is None else copied.nbytes
