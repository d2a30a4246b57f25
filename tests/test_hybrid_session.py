"""Conversations over caches that count no tokens and cannot be cut back: linear attention."""

import copy
from typing import Any

import models
import numpy as np
import pytest
from models import logprobs

from mlx_fastforward import attach, detach
from mlx_fastforward.attachment import watched
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.session import Session

LONG = "Keawe was poor, brave, and active; he could read and write. " * 3


def session_of(name: str) -> Session:
    model = zoo.tiny(name, vocab_size=4096)
    attach(model, models.settings(sparsity=0.5, selector="first-block"))
    return Session(model, models.demo_tokenizer())


def ask(session: Session, ids: list[int], n: int = 4) -> list[Any]:
    """An answer to a prompt of these very tokens."""
    session.render = lambda text=None: ids  # type: ignore[method-assign]
    return list(session.answer("", max_tokens=n))


def assert_right(session: Session, ids: list[int], cached: int) -> None:
    """Short turns run dense: the answer is that of a stock model that reads everything."""
    plain = copy.deepcopy(session.model)
    detach(plain)
    got = ask(session, ids)
    assert got[0].cached_tokens == cached and got[0].prompt_tokens == len(ids) - cached
    assert models.distance(logprobs(got), models.decode(plain, ids, 4)[1]) < 1e-3


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2"])
def test_a_conversation_that_goes_on_is_not_read_again(name: str) -> None:
    session, new = session_of(name), models.token_ids(6, vocab=4096)
    ask(session, models.token_ids(10, seed=1, vocab=4096))
    assert len(session.cached) == 14
    assert_right(session, session.cached + new, cached=14)
    assert_right(session, session.cached[:9] + new, cached=9)
    assert_right(session, session.cached[:5] + new, cached=0)


def test_a_cache_goes_back_where_a_forward_pass_was_stopped() -> None:
    """Its states may be a token ahead of the layers that count."""
    session, ids = session_of("qwen3_5"), models.token_ids(8, vocab=4096)

    def stop(i: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        own(*args, **kwargs)
        raise KeyboardInterrupt

    ask(session, ids)
    held = list(session.cached)
    with watched([session.model.layers[0].linear_attn], stop):
        with pytest.raises(KeyboardInterrupt):
            ask(session, held + ids)
    assert session.cached == held[:7]
    assert_right(session, held + ids, cached=7)


def test_a_selector_remembers_with_the_cache_that_counts() -> None:
    """The first block's neurons, in a later call and in a copy of the cache."""
    model = zoo.tiny("qwen3_5")
    engine = attach(model, models.settings(selector="first-block"))
    ids = models.token_ids(72, vocab=zoo.VOCAB)
    _, cache = models.prefill(model, ids[:40])
    kept = copy.deepcopy(cache)
    whole, _ = models.prefill(model, ids[40:], cache)
    copied, _ = models.prefill(model, ids[40:], kept)
    np.testing.assert_array_equal(whole, copied)
    holders = [c for c in cache if "_fastforward" in vars(c)]
    assert len(holders) == 1 and holders[0].offset == 72
    assert engine.share == 1 and all(map(bool, holders[0]._fastforward[:-1]))
