"""One request on its way: what was asked of its prompt, and what was done."""

import threading
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Optional, Sequence

from mlx_lm.server import CompletionRequest

from ..engine import EDGE, Engine, Prompt

PRUNED = -1.0  # in the place of a sparsity: all neurons, but some tokens skip FFNs


class ClientGone(ConnectionError):
    """The client went away before its answer was complete."""


@dataclass
class Report:
    """What became of a prompt.

    ttft_s: Seconds from the request to its first token, waiting in line included.
    cached_tokens: Prompt tokens that were not read again.
    ffn_sparsity: Share of the FFN FLOPs of the others that was skipped.
    read_tokens: Prompt tokens that were read, where not all of the others were.
    note: What did not go as asked.
    """

    ttft_s: float = 0.0
    cached_tokens: int = 0
    ffn_sparsity: float = 0.0
    read_tokens: Optional[int] = None
    note: str = ""

    def rounded(self) -> dict[str, Any]:
        """What clients are told; the last two where there is something to tell."""
        more = {"read_tokens": self.read_tokens, "note": self.note}
        return {
            "cached_tokens": self.cached_tokens,
            "ttft_s": round(self.ttft_s, 4),
            "ffn_sparsity": round(self.ffn_sparsity, 4),
            **{k: v for k, v in more.items() if v},
        }


@dataclass
class Asked(CompletionRequest):
    """mlx-lm's request, and how its prompt is to be read.

    sparsity: What the client asked for, None for the server's own.
    fresh: Read all of the prompt, whatever is cached.
    keep: Share of a long prompt that is to be read, None for the server's own.
    in_part: The prompt is long enough for that; set by the generator.
    gone: Whether the client has left; asked while waiting.
    left: Set when it has: nothing more is done for it.
    context: mlx-lm's handle of the answer in a batch, as soon as there is one.
    """

    sparsity: Optional[float] = None
    fresh: bool = False
    keep: Optional[float] = None
    in_part: bool = False
    gone: Callable[[], bool] = lambda: False
    left: threading.Event = field(default_factory=threading.Event)
    context: Any = None
    report: Report = field(default_factory=Report)

    def __reduce__(self) -> Any:
        """To other processes goes what was asked; client and report stay here."""
        theirs = [getattr(self, f.name) for f in fields(CompletionRequest)]
        return Asked, (*theirs, self.sparsity, self.fresh)


@dataclass
class Reading:
    """A prompt while it is read.

    engine: What the sparse part runs under, None where all is dense.
    dense: Tokens from the prompt's start that stay dense: the reused part.
    done: Tokens in the cache.
    total: Tokens of the prompt.
    fresh: Nothing that is cached may be used.
    read_at: The sparsity of what the cache holds, 0 where all of it is dense.
    ids: The prompt's tokens.
    prefix: Of these, system prompt and tools.
    """

    engine: Optional[Engine]
    dense: int
    total: int
    report: Report
    fresh: bool = False
    done: int = 0
    read_at: float = 0.0
    prompt: Optional[Prompt] = None
    ids: Sequence[int] = ()
    prefix: int = 0

    @property
    def sparsity(self) -> float:
        """What the sparse part is read at, or PRUNED."""
        return 0.0 if self.engine is None else self.engine.config.sparsity or PRUNED

    @property
    def sparse(self) -> bool:
        """Whether what follows the dense part is long enough to be read sparsely."""
        if self.engine is None:
            return False
        return self.engine.prompt(self.total - self.dense).left is not None

    def usable(self, cached: int, read_at: float) -> int:
        """How many of these cached tokens to use.

        A few beyond the dense part, which another's prompt happens to share, are read again: blocks
        would begin where they end, and the answer would hang on who asked before.
        """
        few = self.dense < cached < self.dense + EDGE
        return self.dense if few and (self.sparse or read_at) else cached

    def found(self, tokens: int, read_at: float) -> None:
        """So many tokens were cached."""
        self.done, self.read_at = tokens, read_at
        self.report.cached_tokens = tokens
        if self.engine is not None:
            left = self.total - max(self.done, self.dense)
            self.prompt = self.engine.prompt(left)

    def last_token(self) -> None:
        """The prompt's last token begins the answer, densely, among other decode steps."""
        if self.engine is not None and self.prompt is not None:
            self.engine.count(self.prompt.flops, 1, 1, None)

    def dense_left(self) -> int:
        """Tokens that are still to be read densely before the others."""
        return max(0, self.dense - self.done)

    def was_read(self, tokens: int, dense: bool) -> None:
        """So many more tokens were read."""
        self.done += tokens
        if self.engine is None or self.prompt is None:
            return
        count = self.prompt.flops
        if dense:
            self.engine.count(count, 1, tokens, None)
        if count.run != count.dense:
            self.read_at = self.sparsity
        self.report.ffn_sparsity = count.sparsity
