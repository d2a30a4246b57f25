"""mlx-lm's prompt cache, where how a prefix was read is part of what it is."""

from typing import Any, Optional

from mlx_lm.models.cache import LRUPromptCache

from .batches import Kept
from .requests import Reading


class PromptCache(LRUPromptCache):
    """A dense prefix serves everybody, a sparse one only requests at its sparsity.

    ``reading`` is the request in hand: the generation thread takes one at a time.
    """

    def __init__(self, max_size: int = 10):
        super().__init__(max_size)
        self.reading: Optional[Reading] = None

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list]:
        """What is cached of a prompt, never all of it, and the tokens that are left to read."""
        assert self.reading is not None
        before = tokens[:-1]
        sparsities = {0.0, self.reading.sparsity}
        at = max(sparsities, key=lambda at: self.reach((model, at), before))
        cache, _ = super().fetch_nearest_cache((model, at), before)
        if cache is None:
            self.reading.found(0, 0.0)
            return None, tokens
        # empty layers, as an image model may have, do not count
        done = max(getattr(c, "offset", 0) for c in cache)
        self.reading.found(done, at)
        return Kept(cache, at), tokens[done:]

    def reach(self, key: Any, tokens: list[int]) -> int:
        """How many of the tokens are cached under a key."""
        found = self._trie.search(key, tokens)
        if found.exact is not None:
            return len(found.exact)
        return max(len(found.shorter or ()), found.common_prefix if found.longer else 0)

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        if isinstance(prompt_cache, Kept):
            at = prompt_cache.read_at
        else:  # served alone: the request in hand
            assert self.reading is not None
            at = self.reading.read_at
        kept = Kept(prompt_cache, at)
        super().insert_cache((model, at), tokens, kept, cache_type=cache_type)
