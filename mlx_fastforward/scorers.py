"""Who says which tokens of a prompt matter: a small draft model, the model's own first layers, or words."""

import contextlib
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .attachment import engine_of, switched, watched, watched_attention
from .errors import ConfigError, UnsupportedModel
from .model.families import model_type
from .model.positions import cut_back, make_compact
from .prefill import prefill
from .session import common_prefix
from .tokens.mapping import Translation, carried
from .tokens.plan import CHUNK
from .tokens.readout import Readout
from .tokens.speculative import KeepConfig, importance, pooled, weights


class Attention:
    """Queries of the last calls, and the keys that they saw, layer by layer."""

    def __init__(self, prompt: int):
        self.prompt = prompt
        self.seen = prompt  # tokens in the cache, after the next call
        self.last = 1  # of each call's queries, these count
        self.queries: dict[int, list[mx.array]] = {}
        self.keys: dict[int, mx.array] = {}
        self.scale: dict[int, float] = {}
        self.places: list[int] = []

    def __call__(
        self, layer: int, own: Any, q: mx.array, k: Any, v: Any, *args: Any, **kw: Any
    ) -> Any:
        cache = kw.get("cache", args[0] if args else None)
        window = getattr(cache, "window", None) or self.seen  # of caches that keep all
        if isinstance(k, mx.array) and self.seen == k.shape[2] <= window:
            self.queries.setdefault(layer, []).append(q[0, :, -self.last :])
            self.keys[layer] = k[0, :, : self.prompt]
            self.scale[layer] = float(kw["scale"] if "scale" in kw else args[1])
        return own(q, k, v, *args, **kw)

    def importance(self, width: int) -> np.ndarray:
        """A score per prompt token."""
        rows = len(self.places)
        found = {i: mx.concatenate(q, axis=1) for i, q in self.queries.items()}
        found = {i: q for i, q in found.items() if q.shape[1] == rows}
        if not found:
            raise UnsupportedModel("no layer looks back at the whole prompt")
        return importance(
            [
                weights(q, self.keys[i], self.scale[i], self.places)
                for i, q in found.items()
            ],
            width,
        )


class Scorer:
    """Who says which tokens of a prompt matter. A new one is a name and ``score``."""

    name: str

    def score(self, ids: Sequence[int], start: int, config: KeepConfig) -> np.ndarray:
        """A score, not negative, for each token of the prompt ``ids`` from ``start`` on."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what is kept of the last prompt."""


class WordsScorer(Scorer):
    """Nobody but the words of the question, which count beside every score (tokens/words.py)."""

    name = "words"

    def score(self, ids: Sequence[int], start: int, config: KeepConfig) -> np.ndarray:
        return np.zeros(len(ids) - start)


class DraftScorer(Scorer):
    """A small model: it reads the prompt, and looks a few tokens ahead.

    Args:
        translation: For a draft of another vocabulary.
    """

    def __init__(
        self, model: nn.Module, name: str, translation: Optional[Translation] = None
    ):
        self.model = model
        self.name = name
        self.translation = translation
        self.cache: list[Any] = []
        self.forget()
        with watched_attention(model, _unchanged) as there:
            if not there:
                raise ConfigError(
                    f"{name} cannot be the draft: the attention of {model_type(model)} cannot be "
                    "watched; take a draft of another architecture."
                )

    def forget(self) -> None:
        self.cached: list[int] = []

    def score(self, ids: Sequence[int], start: int, config: KeepConfig) -> np.ndarray:
        if self.translation is None:
            return self._scores(ids, config)[start:]
        theirs, spans, wanted = self.translation.to_draft(ids)
        return carried(self._scores(theirs, config), spans, wanted)[start:]

    def _scores(self, ids: Sequence[int], config: KeepConfig) -> np.ndarray:
        keep = self._reuse(ids)
        prefill(self.model, mx.array(list(ids[keep:-1])), self.cache)
        attention, token = Attention(len(ids)), int(ids[-1])
        with watched_attention(self.model, attention):
            for i in range(1 + config.look_ahead):
                attention.places.append(len(ids) - 1 + i)
                logits = self.model(mx.array([[token]]), cache=self.cache)
                token = int(mx.argmax(logits[0, -1]))
                attention.seen += 1
        self.cached = list(ids)
        if all(c.is_trimmable() for c in self.cache):
            for c in self.cache:
                c.trim(config.look_ahead)
        else:
            self.cached = []
        return attention.importance(config.pool)

    def _reuse(self, ids: Sequence[int]) -> int:
        """Cut the cache down to what it shares with ``ids``; returns how many tokens stay."""
        keep = min(common_prefix(self.cached, list(ids)), len(ids) - 1)
        surplus = len(self.cached) - keep
        if not keep or (surplus and not all(c.is_trimmable() for c in self.cache)):
            self.cache, keep = make_prompt_cache(self.model), 0
        elif surplus:
            for c in self.cache:
                c.trim(surplus)
        self.cached = []  # until the reading is through
        return keep


class _Enough(Exception):
    """The layers that score have run."""


class LayersScorer(Scorer):
    """The model's own first layers, which read every token; their work is used for what is kept.

    The last queries of the prompt look, and the layers above go on from the hidden states of the
    tokens that are kept (GemFilter, arXiv 2409.17422). A fitted readout scores better.

    Args:
        layers: How many read every token; default: half of them, or as many as the readout wants.
        readout: Default: an attached model's own, unless ``layers`` are given.
    """

    name = "self"

    def __init__(
        self,
        model: nn.Module,
        layers: Optional[int] = None,
        readout: Optional[Readout] = None,
    ):
        total, engine = len(model.layers), engine_of(model)
        self.model = model
        if readout is None and layers is None and engine is not None:
            readout = engine.readout
        self.readout = readout
        if readout is not None:
            layers = readout.layer
        self.layers = max(1, total // 2) if layers is None else layers
        if not 0 < self.layers < total:
            raise ConfigError(
                f"between 1 and {total - 1} of the model's layers can score, got {self.layers}."
            )
        make_compact(make_prompt_cache(model))
        self.forget()

    def forget(self) -> None:
        self.cached: list[int] = []
        self.hidden: Optional[mx.array] = None  # of the tokens from ``start`` on
        self.start = 0
        self.cache = make_prompt_cache(self.model)
        make_compact(
            self.cache
        )  # windows keep all keys: which of them count is not yet known

    def score(self, ids: Sequence[int], start: int, config: KeepConfig) -> np.ndarray:
        """``hidden`` are those of the tokens from ``start`` on."""
        keep = min(common_prefix(self.cached, list(ids)), start)
        cut_back(self.cache[: self.layers], keep)
        self.cached = []
        attention, hidden = Attention(len(ids)), []
        chunks = list(range(keep, len(ids), CHUNK))
        for i in chunks:
            chunk = mx.array([list(ids[i : i + CHUNK])])
            with contextlib.ExitStack() as stack:
                if i == chunks[-1] and self.readout is None:
                    attention.last = min(config.look_ahead, chunk.shape[1])
                    attention.places = list(range(len(ids) - attention.last, len(ids)))
                    seen = watched_attention(self.model, attention)
                    if not stack.enter_context(seen):
                        raise UnsupportedModel("attention cannot be watched")
                hidden.append(self._first(chunk))
        self.cached, self.start = list(ids), start
        self.hidden = mx.concatenate(hidden, axis=1)[:, start - keep :]
        if self.readout is not None:
            return np.array(pooled(self.readout(self.hidden[0]), config.pool))
        return attention.importance(config.pool)[start:]

    def _first(self, chunk: mx.array) -> mx.array:
        """What the first layers make of a chunk, (1, L, d)."""
        found: list[mx.array] = []

        def stop(i: int, own: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            found.append(x)
            raise _Enough

        layer = self.model.layers[self.layers]
        with switched(self.model, False), watched([layer], stop):
            with contextlib.suppress(_Enough):
                self.model(chunk, cache=self.cache)
        mx.eval(found, [c.state for c in self.cache[: self.layers]])
        return found[0]

    @contextlib.contextmanager
    def ready(self, places: np.ndarray, cache: list[Any]) -> Iterator[None]:
        """A call of the model that takes the first layers' work on tokens at ``places`` as done."""
        assert self.hidden is not None
        x, rows = self.hidden[:, mx.array(places - self.start)], mx.array(places)

        def done(i: int, own: Any, given: mx.array, *a: Any, **kw: Any) -> mx.array:
            cache[i].update_and_fetch(
                *(part[:, :, rows] for part in self.cache[i].keys_and_values())
            )
            return x if i == self.layers - 1 else given

        with watched(list(self.model.layers[: self.layers]), done):
            yield


def _unchanged(layer: int, own: Any, *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs)
