"""mlx-lm's prompt cache, where how a prefix was read is part of what it is."""

from typing import Any, Callable, Optional

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache

from ..model.caches import counted
from ..model.positions import is_whole
from .batches import Kept
from .disk import WORTH, DiskCache
from .requests import Reading


class PromptCache(LRUPromptCache):
    """A dense prefix serves everybody, a sparse one only requests at its sparsity.

    ``reading`` is the request in hand: the generation thread takes one at a time. ``partial`` is the
    last prompt with gaps that was to be kept, and is not.

    Args:
        disk: Where prefixes outlive this process.
        identity: The loaded model's on disk, at a sparsity.
    """

    def __init__(
        self,
        max_size: int = 10,
        disk: Optional[DiskCache] = None,
        identity: Callable[[float], str] = str,
    ):
        super().__init__(max_size)
        self.disk, self.identity = disk, identity
        self.reading: Optional[Reading] = None
        self.partial: Optional[tuple[Any, list[int], list[Any]]] = None

    def in_hand(self) -> Reading:
        """What the generation thread is about to read."""
        assert self.reading is not None
        return self.reading

    def emptied(self) -> "PromptCache":
        """One like it, without what memory holds."""
        return PromptCache(self.max_size, self.disk, self.identity)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list]:
        """What is cached of a prompt, never all of it, and the tokens that are left to read."""
        reading, before = self.in_hand(), tokens[:-1]
        if reading.fresh:
            reading.found(0, 0.0)
            return None, tokens
        sparsities = [0.0, reading.sparsity]
        use = lambda at: reading.usable(self.reach((model, at), before), at)
        at = max(sparsities, key=use)
        if self.disk is not None:
            at = self._from_disk(model, before, sparsities, at)
        cache = None
        if n := use(at):  # one token more: mlx-lm leaves the last one out
            cache, _ = super().fetch_nearest_cache((model, at), before[: n + 1])
        if cache is None:
            reading.found(0, 0.0)
            return None, tokens
        # empty layers, as an image model may have, do not count
        if not (done := max(counted(cache), default=0)):
            reading.found(0, 0.0)
            return None, tokens
        reading.found(done, at)
        return list(cache), tokens[done:]

    def _from_disk(
        self, model: Any, tokens: list[int], sparsities: list[float], at: float
    ) -> float:
        """Load what reaches further than memory does; returns where the nearest prefix is now."""
        assert self.disk is not None
        marks = {self.identity(s): s for s in sparsities}
        while True:
            entry, n = self.disk.nearest(marks, tokens)
            if entry is None or n < self.reach((model, at), tokens) + WORTH:
                return at
            if (cache := self.disk.load(entry)) is not None:
                found = marks[entry.identity]
                kept = Kept(cache, found)
                super().insert_cache((model, found), entry.tokens.tolist(), kept)
                return found

    def reach(self, key: Any, tokens: list[int]) -> int:
        """How many of the tokens are cached under a key."""
        found = self._trie.search(key, tokens)
        if found.exact is not None:
            return len(found.exact)
        most = len(found.shorter or ())
        if found.longer is not None:
            longer = self._trie.get(key, found.longer).prompt_cache
            if can_trim_prompt_cache(longer):
                most = max(most, found.common_prefix)
        return most

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        if not is_whole(prompt_cache):  # approximate: nobody else's
            self.partial = (model, list(tokens), prompt_cache)
            return
        if isinstance(prompt_cache, Kept):
            at = prompt_cache.read_at
        else:  # served alone: the request in hand
            at = self.in_hand().read_at
        kept = Kept(prompt_cache, at)
        super().insert_cache((model, at), tokens, kept, cache_type=cache_type)
        if self.disk is not None:
            self.disk.save(self.identity(at), tokens, kept)
