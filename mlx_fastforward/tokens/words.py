"""Which tokens of a prompt matter, by words alone: where what the question names stood before.

No model is asked. A rare word of the prompt's end, or a pair of its words, says where to read; what
all of the prompt is full of says nothing.
"""

from typing import Sequence

import mlx.core as mx
import numpy as np

from .readout import ASKING
from .speculative import KeepConfig, pooled

CHUNKS = 3  # the answer stands near the words of its question, not on them


def word_scores(ids: Sequence[int], config: KeepConfig) -> np.ndarray:
    """A score per token of the prompt, 0 where nothing of the question is near.

    Tokens and pairs of neighbours among the last ones count where they stand earlier, by the squared
    logarithm of how rare they are, shared among their places.
    """
    prompt = np.asarray(ids)
    body, asked = prompt[:-ASKING], prompt[-ASKING:].tolist()
    found = np.zeros(prompt.size)
    for gram in {(a,) for a in asked} | set(zip(asked, asked[1:])):
        places = _places(body, gram)
        if places.size:
            weight = np.log(body.size / places.size) ** 2 / places.size
            for i in range(len(gram)):
                found[places + i] += weight / len(gram)
    return np.array(pooled(mx.array(found), CHUNKS * config.chunk - 1))


def with_words(
    scores: np.ndarray, ids: Sequence[int], start: int, config: KeepConfig
) -> np.ndarray:
    """Scores of the tokens from ``start`` on and those of words, each as shares of their sum."""
    return _shares(scores) + _shares(word_scores(ids, config)[start:])


def _places(body: np.ndarray, gram: tuple[int, ...]) -> np.ndarray:
    """Where a run of tokens begins."""
    last = body.size - len(gram) + 1
    same = [body[i : max(0, last) + i] == token for i, token in enumerate(gram)]
    return np.flatnonzero(np.all(same, axis=0))


def _shares(scores: np.ndarray) -> np.ndarray:
    return scores / max(float(scores.sum()), 1e-12)
