"""Speculative prefill: the model reads only the tokens of a prompt that a scorer says matter.

Off unless asked for. Keys and values of the others are missing afterwards: the cache is marked as
approximate (model/positions.py), and heal.py makes it whole again.
"""

import contextlib
import time
from dataclasses import replace
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import wired_limit

from .attachment import engine_of, reading, watched
from .errors import brief
from .generation import Response, stream_generate
from .model.positions import (
    CompactKVCache,
    cut_back,
    is_whole,
    make_compact,
    pieces,
    ropes_of,
    rotated_at,
    runs_of,
)
from .scorers import LayersScorer, Scorer
from .tokens.plan import CHUNK
from .tokens.speculative import LOW_KEEP, KeepConfig, kept_places
from .tokens.words import with_words


def read_places(
    model: nn.Module,
    ids: Sequence[int],
    places: np.ndarray,
    cache: list[Any],
    chunk: int = CHUNK,
    progress: Any = None,
    scorer: Optional[LayersScorer] = None,
) -> float:
    """Feed the tokens of ``ids`` at increasing ``places`` to the model, where they are in the text.

    Runs without gaps are read as mlx-lm reads them. The cache becomes a compact one, in place.

    Args:
        ids: The text so far; what of it is in the cache lies before ``places``.
        scorer: Has the first layers' work on these tokens.

    Returns:
        float: Share of these tokens' FFN FLOPs that was skipped.
    """
    make_compact(cache)
    ropes, tokens = ropes_of(model), np.asarray(ids)
    done = 0
    with reading(model, places.size + 1) as state:  # one more goes alone
        for part, runs in pieces(places, chunk, ropes is None):
            with contextlib.ExitStack() as stack:
                if len(runs) > 1:
                    assert ropes is not None
                    stack.enter_context(watched(ropes, rotated_at(part)))
                if scorer is not None:
                    stack.enter_context(scorer.ready(part, cache))
                for c in cache:
                    c.expect(runs)
                model(mx.array(tokens[part])[None], cache=cache)
            mx.eval([c.state for c in cache])
            done += part.size
            if progress is not None:
                progress(done, places.size)
    return state.flops.sparsity


class Speculative:
    """Reads prompts of one conversation by a scorer's word; ``notes`` says what else happened.

    ``exact`` first tokens of the cache are as a dense model would have them. ``healed``: the cache
    was made whole after an answer.
    """

    def __init__(self, model: nn.Module, scorer: Scorer, config: KeepConfig):
        self.model = model
        self.scorer = scorer
        self.config = config
        self.notes: list[str] = []
        self.forget()

    def forget(self) -> None:
        """Another cache takes the place of the one that was read."""
        self.exact, self.healed = 0, False

    def settings(self) -> dict[str, Any]:
        """For the banner and --json."""
        return {
            "prefill_draft": self.scorer.name,
            "keep": self.config.keep,
            "prefill_threshold": self.config.threshold,
        }

    def describe(self) -> str:
        """One line of what is done."""
        c = self.config
        return (
            f"approximate: of prompts from {c.threshold:,} tokens on {c.keep:.0%} are read, "
            f"as {self.scorer.name} says"
        )

    @property
    def warning(self) -> Optional[str]:
        """Of a setting that is known to lose much."""
        if self.config.keep >= LOW_KEEP:
            return None
        return (
            f"--keep {self.config.keep:g} drops much of what answers need: at .2, ports of this "
            "method found one planted fact of five; .5 found all."
        )

    def choose(
        self, ids: Sequence[int], cached: int, protect: int = 0
    ) -> Optional[np.ndarray]:
        """Places of the new tokens that are read; None: all of them, and ``notes`` may say why."""
        new = len(ids) - cached
        if new < self.config.threshold or self.config.keep == 1:
            return None
        try:
            scores = self.scorer.score(ids, cached, self.config)
        except Exception as e:  # whatever a draft may throw: the answer matters more
            self.notes.append(
                f"the draft {self.scorer.name} failed ({brief(e)}); the whole prompt is read."
            )
            return None
        scores = with_words(scores, ids, cached, self.config, max(cached, protect))
        places = kept_places(scores, cached, self.config, protect)
        return places if places.size < new else None

    def stream_generate(
        self,
        tokenizer: Any,
        ids: Sequence[int],
        cached: int,
        cache: list[Any],
        max_tokens: int = 256,
        protect: int = 0,
        **kwargs: Any,
    ) -> Iterator[Response]:
        """Stream the answer to ``ids``, of which the cache has the first ``cached``.

        A long new part is read in part only. ``protect`` first tokens, the system prompt, are always
        kept. ``kwargs`` are those of generation.stream_generate.
        """
        start = time.perf_counter()
        dense = self._reads_densely()
        self.exact = cached if dense and is_whole(cache) else min(self.exact, cached)
        with wired_limit(self.model):
            places, sparsity = self.choose(ids, cached, protect), 0.0
            if places is not None:
                progress = kwargs.pop("prompt_progress_callback", None)
                chunk = kwargs.get("prefill_step_size", CHUNK)
                read = self._read(ids, places, cached, cache, chunk, progress)
                places, sparsity = (None, 0.0) if read is None else (places, read)
        new = ids[cached:] if places is None else ids[-1:]
        before = time.perf_counter() - start
        responses = stream_generate(
            self.model, tokenizer, new, max_tokens, prompt_cache=cache, **kwargs
        )
        with contextlib.closing(responses):
            for r in responses:
                if places is not None:
                    count, ttft = len(ids) - cached, before + r.ttft
                    r = replace(
                        r,
                        ttft=ttft,
                        cached_tokens=cached,
                        prompt_tokens=count,
                        prompt_tps=count / ttft,
                        prefill_tps=count / ttft,
                        ffn_sparsity=sparsity,
                        read_tokens=int(places.size),
                    )
                yield r

    def _read(
        self,
        ids: Sequence[int],
        places: np.ndarray,
        cached: int,
        cache: list[Any],
        chunk: int,
        progress: Any,
    ) -> Optional[float]:
        """read_places() of all but the last place; None where it failed, and nothing was read."""
        layers = self.scorer if isinstance(self.scorer, LayersScorer) else None
        before = list(cache)
        try:
            make_compact(cache)
            args = self.model, ids, places[:-1], cache, chunk, progress, layers
            sparsity = read_places(*args)
        except Exception as e:
            self.notes.append(
                f"the prompt could not be read in part ({brief(e)}); it is read whole."
            )
            cut_back([c for c in cache if isinstance(c, CompactKVCache)], cached)
            cache[:] = before
            return None
        self.healed = False
        if self.exact == cached and self._reads_densely():
            self.exact = runs_of([*range(cached), *places])[0][1]
        return sparsity

    def take_notes(self) -> list[str]:
        """What happened since the last time."""
        taken, self.notes = self.notes, []
        return taken

    def _reads_densely(self) -> bool:
        engine = engine_of(self.model)
        return engine is None or not engine.sparse
