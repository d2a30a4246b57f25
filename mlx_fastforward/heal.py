"""After an answer that skipped part of its prompt: read all of it, in small steps, while nobody waits."""

import time
from typing import Any, Optional

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .attachment import switched
from .model.positions import CompactKVCache, is_whole
from .session import Session, common_prefix
from .tokens.plan import CHUNK

SECONDS = 0.2  # a step: who begins to type does not notice
FIRST = 32  # tokens of the first step, before the device's speed is known
ROOM = 0.9  # share of the device's memory that may be in use with a second cache


class Heal:
    """Reads a session's conversation densely beside its approximate cache, then takes that one's place.

    Each ``step`` reads a few tokens. What is read stays read: a new message may come in between, and
    the next steps go on from there, answers included.

    Args:
        tokens: Of every step; None: as many as take SECONDS.
    """

    def __init__(self, session: Session, tokens: Optional[int] = None):
        self.session = session
        self.fixed = tokens
        self.tokens = tokens or FIRST
        self.dropped = False
        self.forget()

    def forget(self) -> None:
        self.cache: list[Any] = []
        self.read: list[int] = []

    @property
    def needed(self) -> bool:
        return bool(self.session.cached) and not is_whole(self.session.cache)

    @property
    def status(self) -> str:
        """One line for the person who waits."""
        if not self.session.cached or self.session.speculative is None:
            return ""
        if not self.needed:
            return "exact again" if self.session.speculative.healed else ""
        if self.dropped:
            return "approximate: not enough memory to read the rest"
        share = len(self.read) / len(self.session.cached)
        return f"approximate: reading the rest, {share:.0%}"

    def step(self) -> bool:
        """Read a little more; False where nothing is left to do."""
        if not self.needed:
            self.forget()
            return False
        target = self.session.cached
        self._begin(target)
        if self._memory_short():
            self.forget()
            self.dropped = True
            return False
        self.dropped = False
        chunk, start = target[len(self.read) :][: self.tokens], time.perf_counter()
        with switched(self.session.model, False):
            self.session.model(mx.array([chunk]), cache=self.cache)
        mx.eval([c.state for c in self.cache])
        self.read += chunk
        self._pace(len(chunk), time.perf_counter() - start)
        if len(self.read) == len(target):
            self._take_place()
        return True

    def _begin(self, target: list[int]) -> None:
        """Keep what is read of these tokens; else start from what is exact already."""
        keep = min(common_prefix(self.read, target), len(target) - 1)
        surplus = len(self.read) - keep
        if self.read and keep:
            if not surplus:
                return
            if all(c.is_trimmable() for c in self.cache):
                for c in self.cache:
                    c.trim(surplus)
                self.read = self.read[:keep]
                return
        self.cache = make_prompt_cache(self.session.model)
        self.read = target[: self._copy_exact()]

    def _copy_exact(self) -> int:
        """Tokens taken over from the approximate cache: those before the first gap, if read densely."""
        speculative = self.session.speculative
        exact = 0 if speculative is None else speculative.exact
        exact = min(exact, len(self.session.cached) - 1)
        parts = [c for c in self.session.cache if isinstance(c, CompactKVCache)]
        plain = all(type(c.inner) is KVCache and c.runs[0][0] == 0 for c in parts)
        if exact <= 0 or not plain or len(parts) < len(self.cache):
            return 0
        for old, new in zip(parts, self.cache):
            keys, values = old.keys_and_values()
            new.update_and_fetch(keys[:, :, :exact], values[:, :, :exact])
        return exact

    def _take_place(self) -> None:
        session = self.session
        session.cache = self.cache
        if session.speculative is not None:
            session.speculative.exact = len(self.read)
            session.speculative.healed = True
        self.forget()
        mx.clear_cache()

    def _pace(self, tokens: int, seconds: float) -> None:
        """As many tokens as take SECONDS, and never suddenly many more."""
        if self.fixed is None:
            fits = int(tokens * SECONDS / max(seconds, 1e-4))
            self.tokens = max(8, min(fits, 2 * self.tokens, CHUNK))

    def _memory_short(self) -> bool:
        """Whether the whole cache would not fit beside the approximate one."""
        info: Any = mx.device_info() if mx.metal.is_available() else {}
        if not (most := info.get("max_recommended_working_set_size")):
            return False
        held = sum(c.nbytes for c in self.session.cache)
        whole = held * len(self.session.cached) / max(1, self.session.cache[0].size())
        left = whole - sum(c.nbytes for c in self.cache if not c.empty())
        return bool(mx.get_active_memory() + left > ROOM * most)
