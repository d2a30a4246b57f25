"""lm-eval's view of a model: answers and log-probabilities, dense and after a sparse prefill."""

import copy
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from models import BLOCK

from mlx_fastforward import attach, detach
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval.lm import SparseLM

PROMPT = 8 * BLOCK  # head, six blocks, tail


@pytest.fixture
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


def ask(*args: Any) -> Any:
    """A request as lm-eval makes it, as far as a model looks at it."""
    return types.SimpleNamespace(args=args)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def by_hand(
    model: nn.Module, prompt: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """Score of a continuation from one plain forward pass over everything."""
    logits, _ = models.prefill(model, prompt + continuation)
    table = log_softmax(logits)[len(prompt) - 1 : -1]
    picked = table[range(len(continuation)), continuation]
    return picked.sum(), bool((table.argmax(-1) == continuation).all())


def scores(lm: SparseLM, pairs: list[tuple[list[int], list[int]]]) -> Any:
    return lm._loglikelihood_tokens([(("", ""), a, b) for a, b in pairs])


def test_loglikelihoods_of_one_and_more_tokens(model: nn.Module) -> None:
    lm = SparseLM(model, models.demo_tokenizer())
    prompt = models.token_ids(PROMPT, vocab=4096)
    greedy, _ = models.decode(model, prompt, 3)
    other = [(t + 1) % 4096 for t in greedy]
    pairs = [(prompt, c) for c in (greedy[:1], other[:1], greedy, greedy[:2] + other)]
    pairs.append((prompt[:1], greedy[:2]))
    got = scores(lm, pairs)
    for (context, continuation), (score, is_greedy) in zip(pairs, got):
        wanted, wanted_greedy = by_hand(model, context, continuation)
        assert score == pytest.approx(wanted, abs=2e-3)
        assert is_greedy == wanted_greedy
    assert [g for _, g in got[:4]] == [True, False, True, False]
    assert lm.ffn_sparsity == 0


def test_choices_of_one_question_share_its_prefill(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = SparseLM(model, models.demo_tokenizer())
    one, two = (models.token_ids(PROMPT, seed, 4096) for seed in (0, 1))
    choices = [[5], [6, 7, 8], [6], [9, 10]]
    pairs = [(p, c) for c in choices for p in (one, two)]
    alone = [scores(lm, [pair])[0] for pair in pairs]
    read = []
    plain = lm._read
    monkeypatch.setattr(lm, "_read", lambda ids: read.append(ids) or plain(ids))
    assert scores(lm, pairs) == alone
    assert read == [one, two]


def test_texts_are_scored_as_their_tokens(model: nn.Module) -> None:
    """The continuation's tokens are those of the whole text after the context's."""
    tokenizer = models.demo_tokenizer()
    lm = SparseLM(model, tokenizer)
    context, continuation = "The old house stood by the sea. Answer:", " B"
    both = tokenizer.encode(context + continuation)
    prompt = tokenizer.encode(context)
    assert both[: len(prompt)] == prompt
    got = lm.loglikelihood([ask(context, continuation)], disable_tqdm=True)
    wanted, _ = by_hand(model, prompt, both[len(prompt) :])
    assert got[0][0] == pytest.approx(wanted, abs=2e-3)


def sparse_prefill(model: nn.Module, prompt: list[int]) -> list:
    """The cache after all but the last token of a prompt, by the reference's own FFN.

    Head and tail are one block each; the prompt's last token is the eighth of its tail.
    """
    start, stop = BLOCK, len(prompt) - BLOCK
    keep = models.FFN // 2
    sparse = models.by_hand(model, "llama", start, stop, keep)
    return models.prefill(sparse, prompt[:-1])[1]


def test_the_prompt_is_read_sparsely_and_the_rest_densely(model: nn.Module) -> None:
    prompt = models.token_ids(PROMPT, vocab=4096)
    continuation = models.token_ids(5 * BLOCK, 1, 4096)  # long enough to be sparse
    cache = sparse_prefill(model, prompt)
    logits, _ = models.prefill(model, prompt[-1:] + continuation[:-1], cache)
    wanted = log_softmax(logits)[range(len(continuation)), continuation].sum()
    dense, _ = by_hand(model, prompt, continuation)
    attach(model, models.settings(selector="oracle"))
    lm = SparseLM(model, models.demo_tokenizer())
    got = scores(lm, [(prompt, continuation)])[0][0]
    assert got == pytest.approx(wanted, abs=0.02)
    assert abs(got - dense) > 0.2
    assert lm.ffn_sparsity != 0  # an oracle saves nothing, it costs


def test_sparse_decode_scores_token_by_token(model: nn.Module) -> None:
    prompt, continuation = models.token_ids(PROMPT, vocab=4096), [50, 60, 70]
    config = models.settings(selector="oracle", sparse_decode=True)
    attach(model, config)
    got = scores(SparseLM(model, models.demo_tokenizer()), [(prompt, continuation)])
    cache = make_prompt_cache(model)
    engine: Any = engine_of(model)
    with engine.prompt(PROMPT):
        models.prefill(model, prompt[:-1], cache)
        rows = [models.prefill(model, prompt[-1:], cache)[0][0]]
    plain = copy.deepcopy(cache)
    for token in continuation[:-1]:
        rows.append(models.prefill(model, [token], cache)[0][0])
    wanted = log_softmax(np.stack(rows))[range(3), continuation].sum()
    assert got[0][0] == pytest.approx(wanted, abs=1e-4)
    detach(model)
    dense = models.prefill(model, continuation[:-1], plain)[0]
    other = log_softmax(np.concatenate([rows[0][None], dense]))
    assert abs(other[range(3), continuation].sum() - wanted) > 0.01


def test_answers_are_greedy_and_capped(model: nn.Module) -> None:
    tokenizer = models.demo_tokenizer()
    prompt = models.token_ids(PROMPT, vocab=4096)
    greedy, _ = models.decode(model, prompt, 7)
    lm = SparseLM(model, tokenizer)
    options = {"max_gen_toks": 7, "until": [], "do_sample": False}
    assert lm.generate_until([ask(prompt, options)]) == [tokenizer.decode(greedy)]
    attach(model, models.settings(selector="oracle"))
    plain = copy.deepcopy(model)
    detach(plain)
    cache = sparse_prefill(plain, prompt)
    wanted, _ = models.continue_from(plain, prompt[-1], 7, cache)
    assert lm.generate_until([ask(prompt, options)]) == [tokenizer.decode(wanted)]
    assert lm.ffn_sparsity != 0


def test_texts_are_prompts_too(model: nn.Module) -> None:
    tokenizer, text = models.demo_tokenizer(), "Once there was a king who had no"
    lm = SparseLM(model, tokenizer)
    options = {"max_gen_toks": 4, "until": []}
    both = lm.generate_until([ask(text, options), ask(tokenizer.encode(text), options)])
    assert both[0] == both[1] != ""


@pytest.mark.parametrize(
    "pieces, options, wanted",
    [
        (["a b", " c", "\nd", "e"], {"until": ["\n"]}, "a b c"),
        (["one. T", "he", " End of it", "x"], {"until": ["The End", "zz"]}, "one. "),
        (["one two", "three"], {"until": ["three", "two"]}, "one "),
        (["one two", "three"], {"until": "two"}, "one "),
        (["\n", "\n a", "\nb"], {"until": ["\n"]}, ""),
        (["\n", "\n a", "\nb"], {"until": ["\n"], "skip": "\n"}, " a"),
        (["\n\n", "\n"], {"until": ["\n"], "skip": "\n"}, ""),
        ([" a\n", "b "], {}, " a\nb "),
    ],
)
def test_stop_strings(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[str],
    options: dict[str, Any],
    wanted: str,
) -> None:
    def said(*args: Any) -> Any:
        for text in pieces:
            yield types.SimpleNamespace(text=text, ffn_sparsity=0.25)

    monkeypatch.setattr(lm_module, "stream_generate", said)
    lm = SparseLM(model, models.demo_tokenizer())
    assert lm.generate_until([ask([1, 2], options)]) == [wanted]
    assert lm.ffn_sparsity == 0.25


def test_generation_stops_at_a_stop_string(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def endless(*args: Any) -> Any:
        while True:
            said.append("a")
            yield types.SimpleNamespace(text="a", ffn_sparsity=0.0)

    monkeypatch.setattr(lm_module, "stream_generate", endless)
    lm = SparseLM(model, models.demo_tokenizer())
    assert lm.generate_until([ask([1], {"until": ["aaa"]})]) == [""]
    assert len(said) == 3


@pytest.mark.parametrize("length, step", [(6, 5), (40, 5), (40, 64)])
def test_rolling_predicts_every_token_once_with_the_most_context(
    model: nn.Module, length: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_module, "STEP", step)
    tokenizer, text = models.demo_tokenizer(), "The king went to the sea, and " * 4
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert 24 < len(ids) <= 40  # one call could be sparse
    lm = SparseLM(model, tokenizer)
    lm.max_length = length
    attach(model, models.settings())
    got = lm.loglikelihood_rolling([ask(text)])[0]
    detach(model)
    whole = [tokenizer.bos_token_id] + ids
    wanted, done = 0.0, 0
    while done < len(ids):  # windows of lm-eval's documentation
        stop = min(done + length, len(ids))
        first = max(0, stop - length)
        logits, _ = models.prefill(model, whole[first:stop])
        rows = log_softmax(logits)[done - first :]
        wanted += rows[range(stop - done), ids[done:stop]].sum()
        done = stop
    assert got == pytest.approx(wanted, abs=2e-3)


def test_what_a_model_cannot_hold_is_cut_from_the_left(model: nn.Module) -> None:
    lm = SparseLM(model, models.demo_tokenizer())
    prompt = models.token_ids(PROMPT, vocab=4096)
    lm.max_length = 30
    options = {"max_gen_toks": 10, "until": []}
    cut = lm.generate_until([ask(prompt, options)])
    score = scores(lm, [(prompt, [5, 6])])
    lm.max_length = None
    assert cut == lm.generate_until([ask(prompt[-20:], options)])
    assert score == scores(lm, [(prompt[-28:], [5, 6])])
    assert score != scores(lm, [(prompt, [5, 6])])


def test_the_context_length_is_the_models() -> None:
    model = models.tiny("llama", max_position_embeddings=77)
    assert SparseLM(model, models.demo_tokenizer()).max_length == 77
