"""Which tokens of a prompt matter, by words alone: where what the question names stands elsewhere.

No model is asked. A question comes last, after its document, or first. A rare word of either end, or a
pair of its words, says where to read; what all of the prompt is full of says nothing.
"""

from typing import Sequence

import mlx.core as mx
import numpy as np

from .readout import ASKING
from .speculative import KeepConfig, pooled

FIRST = 0.5  # what the beginning counts beside the end, where questions mostly are
CHUNKS = 3  # the answer stands near the words of its question, not on them


def word_scores(
    ids: Sequence[int], start: int, config: KeepConfig, begin: int
) -> np.ndarray:
    """Scores of the prompt's tokens from ``start`` on, 0 where nothing of a question is near.

    Args:
        begin: Where the new message begins.
    """
    prompt, stop = np.asarray(ids), max(0, len(ids) - ASKING)
    last = _matches(prompt, slice(0, stop), prompt[stop:], config)
    after = begin + ASKING
    first = _matches(prompt, slice(after, stop), prompt[begin:after], config)
    return _shares(last[start:]) + FIRST * _shares(first[start:])


def with_words(
    scores: np.ndarray, ids: Sequence[int], start: int, config: KeepConfig, begin: int
) -> np.ndarray:
    """Scores of the tokens from ``start`` on, and those of words, as shares of their sums."""
    return _shares(scores) + _shares(word_scores(ids, start, config, begin))


def _matches(
    prompt: np.ndarray, where: slice, asked: np.ndarray, config: KeepConfig
) -> np.ndarray:
    """A score for each token of the prompt: how rare is what ``asked`` shares with it and its neighbours?

    Tokens and pairs of neighbours count by the squared logarithm of how rare they are, shared among
    their places.
    """
    body, words, found = prompt[where], asked.tolist(), np.zeros(prompt.size)
    for gram in {(a,) for a in words} | set(zip(words, words[1:])):
        places = _places(body, gram)
        if places.size:
            weight = np.log(body.size / places.size) ** 2 / places.size
            for i in range(len(gram)):
                found[where.start + places + i] += weight / len(gram)
    return np.array(pooled(mx.array(found), CHUNKS * config.chunk - 1))


def _places(body: np.ndarray, gram: tuple[int, ...]) -> np.ndarray:
    """Where a run of tokens begins."""
    last = max(0, body.size - len(gram) + 1)
    same = [body[i : last + i] == token for i, token in enumerate(gram)]
    return np.flatnonzero(np.all(same, axis=0))


def _shares(scores: np.ndarray) -> np.ndarray:
    return scores / max(float(scores.sum()), 1e-12)
