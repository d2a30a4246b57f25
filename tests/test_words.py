"""Which tokens the words of a question point at: against a plain reference, and what is read for them."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from models import demo_tokenizer, tiny

from mlx_fastforward.scorers import WordsScorer
from mlx_fastforward.speculative import Speculative
from mlx_fastforward.tokens.readout import ASKING
from mlx_fastforward.tokens.speculative import KeepConfig
from mlx_fastforward.tokens.words import with_words, word_scores


def by_hand(
    ids: list[int], start: int, stop: int, asked: list[int], width: int
) -> np.ndarray:
    """Every token and pair of the question where it stands, then the mean of the neighbours."""
    body, found = ids[start:stop], [0.0] * len(ids)
    for size in (1, 2):
        runs = [tuple(body[i : i + size]) for i in range(len(body) - size + 1)]
        times = Counter(runs)
        wanted = {tuple(asked[i : i + size]) for i in range(len(asked) - size + 1)}
        for at, run in enumerate(runs):
            if run in wanted:
                weight = math.log(len(body) / times[run]) ** 2 / times[run] / size
                for i in range(size):
                    found[start + at + i] += weight
    left = width // 2
    near = (found[max(0, i - left) : max(0, i - left + width)] for i in range(len(ids)))
    return np.array([sum(part) / width for part in near])


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=160),
    st.integers(1, 20),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_scores_are_those_of_the_definition(
    ids: list[int], chunk: int, start: int, begin: int
) -> None:
    """Of the question at the end, and half as much of one at the beginning."""
    stop, width = max(0, len(ids) - ASKING), 3 * chunk - 1
    wanted: Any = 0
    asked = ids[begin : begin + ASKING]
    for part, where, weight in (
        (ids[stop:], (0, stop), 1),
        (asked, (begin + ASKING, stop), 0.5),
    ):
        found = by_hand(ids, *where, part, width)[start:]
        wanted += weight * found / (found.sum() or 1)
    got = word_scores(ids, start, KeepConfig(chunk=chunk), begin)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cached, asked", [(0, -8), (300, -8), (0, 45), (300, 345)])
def test_what_the_question_names_is_read(cached: int, asked: int) -> None:
    """Without any model, behind a cache as well, wherever the question stands."""
    ids = np.random.default_rng(0).integers(0, 9, 2000)
    ids[1000:1003] = 50, 51, 52
    ids[asked : asked + 5] = 1, 2, 50, 51, 4
    config = KeepConfig(keep=0.3, threshold=100)
    spec = Speculative(tiny("llama"), WordsScorer(), config)
    protect = 40 if cached == 0 else 320  # a system prompt
    places = spec.choose(ids.tolist(), cached, protect)
    assert places is not None and places.size < 0.3 * (2000 - cached) + 1
    assert {*range(970, 1030)} <= {*places.tolist()}


def test_words_and_a_draft_count_alike() -> None:
    """Neither drowns the other, and a question without a match leaves a draft's scores alone."""
    config = KeepConfig()
    ids = [*range(500), *range(1000, 1000 + ASKING)]
    own = np.linspace(1, 7, len(ids) - 100)
    np.testing.assert_allclose(with_words(own, ids, 100, config, 0), own / own.sum())
    ids[-1] = 200
    mixed = with_words(1e6 * own, ids, 100, config, 0)
    assert mixed.sum() == pytest.approx(2, rel=1e-4) and mixed.argmax() == 147


def test_a_conversation_is_read_by_its_words() -> None:
    tokenizer, model = demo_tokenizer(), tiny("llama", vocab=4096)
    ids = tokenizer.encode(
        "All was well. " * 30 + "Greta has 4711. " + "So it was. " * 60
    )
    ids += tokenizer.encode("What has Greta?")
    spec = Speculative(model, WordsScorer(), KeepConfig(keep=0.4, threshold=100))
    first, *_ = spec.stream_generate(tokenizer, ids, 0, make_prompt_cache(model), 2)
    assert first.read_tokens == pytest.approx(0.4 * len(ids), abs=33)
    read = tokenizer.decode([ids[i] for i in spec.choose(ids, 0)])  # type: ignore
    assert "Greta has 4711" in read and not spec.notes
