"""lm-eval's view of a model: answers and log-probabilities, dense and after a sparse prefill."""

import copy
import types
from typing import Any, Iterator

import mlx.nn as nn
import models
import numpy as np
import pytest
from models import BLOCK, prefill

from mlx_fastforward import attach, detach
from mlx_fastforward.attachment import reading
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval.lm import SparseLM

PROMPT = models.token_ids(8 * BLOCK, 3, 4096)  # head, six blocks, tail


@pytest.fixture
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


@pytest.fixture
def lm(model: nn.Module) -> SparseLM:
    return SparseLM(model, models.demo_tokenizer())


def answers(lm: SparseLM, prompt: Any, **options: Any) -> str:
    """To a request as lm-eval makes it, as far as a model looks at it."""
    (found,) = lm.generate_until([types.SimpleNamespace(args=(prompt, options))])
    return found


def scores(lm: SparseLM, *pairs: tuple[list[int], list[int]]) -> Any:
    return lm._loglikelihood_tokens([(("", ""), a, b) for a, b in pairs])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def summed(rows: np.ndarray, tokens: list[int]) -> float:
    """Log-probability of tokens under logits, a row for each."""
    return log_softmax(rows)[range(len(tokens)), tokens].sum()


def by_hand(model: nn.Module, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits for each of the tokens, from one plain forward pass over everything."""
    return prefill(model, prompt + tokens)[0][len(prompt) - 1 : -1]


def test_loglikelihoods_of_one_and_more_tokens(model: nn.Module, lm: SparseLM) -> None:
    greedy, _ = models.decode(model, PROMPT, 3)
    other = [(t + 1) % 4096 for t in greedy]
    pairs = [(PROMPT, c) for c in (greedy[:1], other[:1], greedy, greedy[:2] + other)]
    pairs.append((PROMPT[:1], greedy[:2]))
    got = scores(lm, *pairs)
    for (context, tokens), (score, is_greedy) in zip(pairs, got, strict=True):
        rows = by_hand(model, context, tokens)
        assert score == pytest.approx(summed(rows, tokens), abs=2e-3)
        assert is_greedy == (rows.argmax(-1) == tokens).all()
    assert [g for _, g in got[:4]] == [True, False, True, False]
    assert lm.ffn_sparsity == 0


def test_choices_of_one_question_share_its_prefill(
    lm: SparseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = PROMPT, models.token_ids(8 * BLOCK, 1, 4096)
    pairs = [(p, c) for c in ([5], [6, 7, 8], [6], [9, 10]) for p in (one, two)]
    alone = [scores(lm, pair)[0] for pair in pairs]
    read, plain = [], lm._read
    monkeypatch.setattr(lm, "_read", lambda ids: read.append(ids) or plain(ids))
    assert scores(lm, *pairs) == alone
    assert read == [one, two]


def sparse_prefill(model: nn.Module) -> list:
    """The cache after all but the last token of PROMPT, by the reference's own FFN.

    Head and tail are one block each; the prompt's last token is the eighth of its tail.
    """
    stop = len(PROMPT) - BLOCK
    sparse = models.by_hand(model, "llama", BLOCK, stop, models.FFN // 2)
    return prefill(sparse, PROMPT[:-1])[1]


def test_the_prompt_is_read_sparsely_and_the_rest_densely(
    model: nn.Module, lm: SparseLM
) -> None:
    tokens = models.token_ids(5 * BLOCK, 1, 4096)  # long enough to be sparse
    logits, _ = prefill(model, PROMPT[-1:] + tokens[:-1], sparse_prefill(model))
    dense = summed(by_hand(model, PROMPT, tokens), tokens)
    attach(model, models.settings(selector="oracle"))
    got = scores(lm, (PROMPT, tokens))[0][0]
    assert got == pytest.approx(summed(logits, tokens), abs=0.02)
    assert abs(got - dense) > 0.2
    assert lm.ffn_sparsity != 0  # an oracle saves nothing, it costs


def test_sparse_decode_scores_token_by_token(model: nn.Module, lm: SparseLM) -> None:
    tokens = [50, 60, 70]
    attach(model, models.settings(selector="oracle", sparse_decode=True))
    got = scores(lm, (PROMPT, tokens))[0][0]
    with reading(model, len(PROMPT)):
        _, cache = prefill(model, PROMPT[:-1])
        rows = [prefill(model, PROMPT[-1:], cache)[0]]
    plain = copy.deepcopy(cache)
    rows += [prefill(model, [token], cache)[0] for token in tokens[:-1]]
    assert got == pytest.approx(summed(np.concatenate(rows), tokens), abs=1e-4)
    detach(model)
    dense = [rows[0], prefill(model, tokens[:-1], plain)[0]]
    assert abs(summed(np.concatenate(dense), tokens) - got) > 0.01


def test_answers_are_greedy_and_capped(model: nn.Module, lm: SparseLM) -> None:
    tokenizer, text = models.demo_tokenizer(), "Once there was a king who had no"
    greedy, _ = models.decode(model, PROMPT, 7)
    sparse, _ = models.continue_from(model, PROMPT[-1], 7, sparse_prefill(model))
    assert answers(lm, PROMPT, max_gen_toks=7) == tokenizer.decode(greedy)
    said = answers(lm, text, max_gen_toks=4)
    assert said == answers(lm, tokenizer.encode(text), max_gen_toks=4) != ""
    attach(model, models.settings(selector="oracle"))
    assert answers(lm, PROMPT, max_gen_toks=7) == tokenizer.decode(sparse)
    assert lm.ffn_sparsity != 0 and sparse != greedy


def test_stop_strings(lm: SparseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as the model says them, what counts of them, and how many are heard."""
    said: list[str] = []

    def speak(*args: Any) -> Iterator[Any]:
        for text in pieces:
            said.append(text)
            yield types.SimpleNamespace(text=text, ffn_sparsity=0.25)

    monkeypatch.setattr(lm_module, "stream_generate", speak)
    newline: dict[str, Any] = {"until": ["\n"], "skip": "\n"}
    cases: list[tuple[list[str], dict[str, Any], str, int]] = [
        (["a b", " c", "\nd", "e"], {"until": ["\n"]}, "a b c", 3),
        (["one. T", "he", " End of it", "x"], {"until": ["The End", "z"]}, "one. ", 3),
        (["one two", "three"], {"until": ["three", "two"]}, "one ", 1),
        (["one two", "three"], {"until": "two"}, "one ", 1),
        (["one. two!"], {"until": ["!", "."]}, "one", 1),
        (["\n", "\n a", "\nb"], newline, " a", 3),
        (["\n\n", "\n"], newline, "", 2),
        ([" a\n", "b "], {}, " a\nb ", 2),
    ]
    for pieces, options, wanted, heard in cases:
        said.clear()
        assert answers(lm, [1, 2], **options) == wanted
        assert lm.ffn_sparsity == 0.25 and len(said) == heard


@pytest.mark.parametrize("length, step", [(6, 5), (40, 5), (40, 64)])
def test_rolling_predicts_every_token_once_with_the_most_context(
    model: nn.Module,
    lm: SparseLM,
    length: int,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_module, "STEP", step)
    text, lm.max_length = "The king went to the sea, and " * 4, length
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert 24 < len(ids) <= 40  # one call could be sparse
    attach(model, models.settings())
    got = lm.loglikelihood_rolling([types.SimpleNamespace(args=(text,))])[0]
    detach(model)
    whole = [lm.tokenizer.bos_token_id] + ids
    wanted, done = 0.0, 0
    while done < len(ids):  # windows of lm-eval's documentation
        stop = min(done + length, len(ids))
        first = max(0, stop - length)
        rows = prefill(model, whole[first:stop])[0][done - first :]
        wanted += summed(rows, ids[done:stop])
        done = stop
    assert got == pytest.approx(wanted, abs=2e-3)


def test_what_a_model_cannot_hold_is_cut_from_the_left() -> None:
    model = models.tiny("llama", vocab=4096, max_position_embeddings=30)
    lm = SparseLM(model, models.demo_tokenizer())
    cut = answers(lm, PROMPT, max_gen_toks=10), scores(lm, (PROMPT, [5, 6]))
    lm.max_length = None
    assert cut[0] == answers(lm, PROMPT[-20:], max_gen_toks=10)
    assert cut[1] == scores(lm, (PROMPT[-28:], [5, 6])) != scores(lm, (PROMPT, [5, 6]))
