"""Our stream_generate: mlx-lm's tokens, and figures that can be checked by hand."""

import dataclasses
import time
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from models import BLOCK, FFN, HIDDEN, LAYERS

from mlx_fastforward import Response, attach, detach, stream_generate
from mlx_fastforward.generation import encode_prompt
from mlx_fastforward.neurons.compensators import (
    Compensator,
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)
from mlx_fastforward.neurons.predictor import PredictorWeights
from mlx_fastforward.predictors.file import PredictorFile

TOKENS = 12 * BLOCK + 5
SPARSE_LAYERS = LAYERS - 1


@pytest.fixture
def tokenizer() -> Any:
    return models.demo_tokenizer()


def responses(model: nn.Module, prompt: Any, n: int = 6, **more: Any) -> list[Response]:
    return list(stream_generate(model, models.demo_tokenizer(), prompt, n, **more))


def tokens(listed: list[Any]) -> list[int]:
    return [r.token for r in listed]


def logprobs(listed: list[Any]) -> np.ndarray:
    return np.stack([np.array(r.logprobs) for r in listed])


@pytest.mark.parametrize("n", [1, 2, 10, TOKENS])
@pytest.mark.parametrize("attached", [None, 0.0])
def test_plain_and_sparsity_0_give_what_mlx_lm_gives(
    tokenizer: Any, n: int, attached: Optional[float]
) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(n)
    wanted = list(mlx_lm.stream_generate(model, tokenizer, prompt, 6))
    if attached is not None:
        attach(model, models.settings(sparsity=attached))
    got = responses(model, prompt)
    assert len(got) == len(wanted) == 6
    for a, b in zip(got, wanted):
        assert (a.text, a.token, a.finish_reason) == (b.text, b.token, b.finish_reason)
        assert (a.prompt_tokens, a.generation_tokens) == (n, b.generation_tokens)
        np.testing.assert_array_equal(np.array(a.logprobs), np.array(b.logprobs))
        assert (a.ffn_sparsity, a.cached_tokens) == (0.0, 0)


def test_prompts_as_text_list_and_array_are_the_same(tokenizer: Any) -> None:
    model = models.tiny("llama", vocab=4096)
    attach(model, models.settings())
    text = "Keawe could read and write like a schoolmaster. " * 4
    ids = tokenizer.encode(text)
    assert len(ids) > 4 * BLOCK
    for prompt in (text, ids, tuple(ids), mx.array(ids)):
        got = responses(model, prompt)
        assert got[-1].prompt_tokens == len(ids)
        assert tokens(got) == tokens(responses(model, ids))
        assert got[0].ffn_sparsity > 0.1


def test_the_beginning_of_sequence_token_is_added_once(tokenizer: Any) -> None:
    """mlx-lm's rule: not where the text, or a chat template, has it already."""
    bos = tokenizer.bos_token
    plain = encode_prompt(tokenizer, "Keawe").tolist()
    assert plain == tokenizer.encode("Keawe")
    marked = encode_prompt(tokenizer, bos + "Keawe").tolist()
    assert marked == [tokenizer.bos_token_id] + tokenizer.encode(
        "Keawe", add_special_tokens=False
    )


def test_a_bare_hugging_face_tokenizer_is_wrapped(tokenizer: Any) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    attach(model, models.settings())
    bare = tokenizer._tokenizer
    got = tokens(list(stream_generate(model, bare, prompt, 1)))
    assert got == tokens(responses(model, prompt, 1))


def test_responses_are_mlx_lms_with_more() -> None:
    names = [f.name for f in dataclasses.fields(Response)]
    shared = [f.name for f in dataclasses.fields(GenerationResponse)]
    assert names[: len(shared)] == shared
    assert names[len(shared) :] == [
        "ttft",
        "cached_tokens",
        "prefill_tps",
        "ffn_sparsity",
    ]


def test_times_and_rates() -> None:
    """The clock starts with the first next() and stops at the first token."""
    model = models.tiny("llama")
    attach(model, models.settings())
    tokenizer, prompt = models.demo_tokenizer(), models.token_ids(TOKENS)
    slept = 0.2

    def slow(done: int, total: int) -> None:
        if done == 0:
            time.sleep(slept)

    start = time.perf_counter()
    got = []
    for r in stream_generate(
        model, tokenizer, prompt, 4, prompt_progress_callback=slow
    ):
        if not got:
            first = time.perf_counter() - start
        got.append(r)
    assert slept < got[0].ttft <= first
    assert len({r.ttft for r in got}) == 1
    assert [r.generation_tokens for r in got] == [1, 2, 3, 4]
    assert got[0].prefill_tps == got[0].prompt_tps
    assert TOKENS / got[0].ttft <= got[0].prefill_tps < TOKENS / slept
    assert got[-1].generation_tps > 0 and got[-1].peak_memory > 0


def test_progress_is_reported_as_by_mlx_lm() -> None:
    model = models.tiny("llama")
    attach(model, models.settings())
    seen: list[tuple[int, int]] = []
    responses(
        model,
        models.token_ids(101),
        1,
        prefill_step_size=40,
        prompt_progress_callback=lambda *a: seen.append(a),
    )
    assert seen == [(0, 101), (40, 101), (80, 101), (100, 101), (101, 101)]


def flops(tokens: float, neurons: int = FFN) -> float:
    """Of one FFN: gate, up and down, a multiplication and an addition each."""
    return tokens * neurons * HIDDEN * 3 * 2


# 101 tokens: 100 in one call, cut into 8 + 10 blocks of 8 + 12, and the last one alone.
HEAD, BLOCKS, TAIL = 8, 10, 12
FIRST = SPARSE_LAYERS * flops(TOKENS)


def test_ffn_sparsity_of_the_first_block_selector() -> None:
    """Selection is free: what is skipped is half of the ten blocks."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="first-block"))
    got = responses(model, models.token_ids(TOKENS))
    skipped = SPARSE_LAYERS * flops(BLOCKS * BLOCK, FFN // 2)
    assert got[0].ffn_sparsity == pytest.approx(skipped / FIRST, rel=1e-9)
    assert got[0].ffn_sparsity == pytest.approx(40 / 101, rel=1e-9)
    assert len({r.ffn_sparsity for r in got}) == 1  # decoding is not counted


def test_ffn_sparsity_of_the_oracle_pays_for_the_dense_layer() -> None:
    """Gate and up of all neurons, then half of an FFN: dearer than dense."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="oracle"))
    got = responses(model, models.token_ids(TOKENS))
    blocks = flops(BLOCKS * BLOCK)
    skipped = SPARSE_LAYERS * (blocks / 2 - blocks * 2 / 3)
    assert got[0].ffn_sparsity == pytest.approx(skipped / FIRST, rel=1e-9)
    assert got[0].ffn_sparsity < 0


def test_ffn_sparsity_of_the_probe_selector() -> None:
    """One token in four is dense, and every second one votes with all dense tokens."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="probe", probe_every=4))
    got = responses(model, models.token_ids(TOKENS))
    dense = HEAD + BLOCKS * 2 + TAIL
    voters = BLOCK / 4
    likeness = 2 * voters * dense * HIDDEN
    votes = 2 * dense * FFN
    per_block = flops(BLOCK - 2, FFN // 2) - likeness - votes
    skipped = SPARSE_LAYERS * BLOCKS * per_block
    assert got[0].ffn_sparsity == pytest.approx(skipped / FIRST, rel=1e-9)


def sparsity_with(predictor: PredictorWeights, compensator: Compensator) -> float:
    model = models.tiny("llama")
    predictor = PredictorFile({}, [predictor] * LAYERS, compensator)  # type: ignore[arg-type]
    predictor.check = lambda *_: None  # type: ignore[method-assign]
    attach(model, models.settings(), predictor=predictor)
    return responses(model, models.token_ids(TOKENS))[0].ffn_sparsity


def assert_paid(sparsity: float, per_block: float) -> None:
    """Half of the ten blocks is skipped, less what choosing and adding back cost."""
    skipped = SPARSE_LAYERS * BLOCKS * (flops(BLOCK, FFN // 2) - per_block)
    assert sparsity == pytest.approx(skipped / FIRST, rel=1e-9)


def test_ffn_sparsity_of_an_adapter_pays_predictor_and_compensator() -> None:
    rank, inner = 4, 8
    key = mx.random.key(0)
    predictor = PredictorWeights(
        mx.random.normal((HIDDEN,), key=key),
        mx.random.normal((HIDDEN, rank), key=key),
        mx.random.normal((rank, FFN), key=key),
    )
    weights = MLPWeights(mx.zeros((HIDDEN, inner)), mx.zeros((inner, HIDDEN)))
    compensator = MLPCompensator([weights] * LAYERS, "relu")
    predict = 4 * BLOCK * HIDDEN + 2 * rank * (HIDDEN + FFN)
    compensate = BLOCK * 4 * HIDDEN * inner
    assert_paid(sparsity_with(predictor, compensator), predict + compensate)


def test_ffn_sparsity_pays_a_token_wise_predictor_and_a_low_rank_compensator() -> None:
    """Features of every token; the compensator's guesses of the neurons kept, too."""
    rank, k = 2, 3
    key = mx.random.key(0)
    predictor = PredictorWeights(
        None,
        mx.random.normal((HIDDEN, rank), key=key),
        mx.random.normal((2 * rank, FFN), key=key),
        bias=mx.zeros(FFN),
    )
    shapes = [(HIDDEN,), (HIDDEN, k - 1), (FFN, k)]
    weights = LowRankWeights(*(mx.zeros(shape) for shape in shapes))
    compensator = LowRankCompensator([weights] * LAYERS)
    predict = 2 * BLOCK * HIDDEN * rank + 2 * (2 * rank) * FFN
    compensate = 2 * BLOCK * ((k - 1) * HIDDEN + k * HIDDEN + k * FFN // 2)
    assert_paid(sparsity_with(predictor, compensator), predict + compensate)


def test_ffn_sparsity_of_a_layerwise_schedule() -> None:
    """Layer 0 keeps everything and stays dense; the others keep a quarter."""
    model = models.tiny("llama")
    settings = models.settings(selector="first-block")
    engine = attach(model, settings, importances=[8.0, 1.0, 1.0, 5.0])
    assert engine.keep == [None, FFN // 4, FFN // 4, None]
    got = responses(model, models.token_ids(TOKENS))
    skipped = 2 * flops(BLOCKS * BLOCK, FFN * 3 // 4)
    assert got[0].ffn_sparsity == pytest.approx(skipped / FIRST, rel=1e-9)


def test_ffn_sparsity_of_chunks_counts_the_whole_prompt() -> None:
    """40 + 40 + 20 tokens and the last one: one head and one tail are dense."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="first-block"))
    got = responses(model, models.token_ids(TOKENS), prefill_step_size=40)
    sparse = 32 + 40 + 13  # the last chunk leaves 8 - 1 to the tail
    skipped = SPARSE_LAYERS * flops(sparse, FFN // 2)
    assert got[0].ffn_sparsity == pytest.approx(skipped / FIRST, rel=1e-9)


def test_ffn_sparsity_of_one_prompt_does_not_leak_into_the_next() -> None:
    model = models.tiny("llama")
    attach(model, models.settings())
    assert responses(model, models.token_ids(TOKENS))[0].ffn_sparsity > 0.1
    assert responses(model, models.token_ids(10))[0].ffn_sparsity == 0.0
    detach(model)
    assert responses(model, models.token_ids(TOKENS))[0].ffn_sparsity == 0.0


@pytest.mark.parametrize("n", [1, 2, 3 * BLOCK - 1])
def test_short_prompts_are_dense(n: int) -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings())
    got = responses(model, models.token_ids(n))
    wanted = responses(plain, models.token_ids(n))
    np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
    assert got[0].ffn_sparsity == 0.0


def test_cached_tokens_and_new_tokens() -> None:
    model = models.tiny("llama")
    attach(model, models.settings(selector="oracle"))
    cache = make_prompt_cache(model)
    first = responses(model, models.token_ids(TOKENS), 3, prompt_cache=cache)
    assert (first[0].cached_tokens, first[0].prompt_tokens) == (0, TOKENS)
    second = responses(model, models.token_ids(50, seed=1), 3, prompt_cache=cache)
    assert {r.cached_tokens for r in second} == {TOKENS + 3}
    assert {r.prompt_tokens for r in second} == {50}


def test_a_warm_cache_needs_no_dense_head() -> None:
    """49 tokens of 50 in one call: five blocks from the first on, then the tail."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="first-block"))
    cache = make_prompt_cache(model)
    responses(model, models.token_ids(TOKENS), 3, prompt_cache=cache)
    second = responses(model, models.token_ids(50, seed=1), 3, prompt_cache=cache)
    assert second[0].ffn_sparsity == pytest.approx(5 * BLOCK / 2 / 50, rel=1e-9)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_closing_early_leaves_the_engine_clean(after: int) -> None:
    model = models.tiny("llama")
    engine = attach(model, models.settings())
    cache = make_prompt_cache(model)
    stream = stream_generate(
        model,
        models.demo_tokenizer(),
        models.token_ids(TOKENS),
        9,
        prompt_cache=cache,
    )
    for _ in range(after):
        next(stream)
        assert engine.remaining is None
    stream.close()
    assert engine.remaining is None and engine.call is None
    assert cache[0].offset == (TOKENS + after if after else 0)


def test_an_interrupt_while_reading_leaves_the_engine_clean() -> None:
    """And the next prompt is planned as if nothing had happened."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    engine = attach(model, models.settings())
    wanted = responses(model, prompt)

    def interrupt(done: int, total: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        responses(
            model, prompt, prefill_step_size=40, prompt_progress_callback=interrupt
        )
    assert engine.remaining is None and engine.call is None
    got = responses(model, prompt)
    np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
    assert got[0].ffn_sparsity == wanted[0].ffn_sparsity


def test_mlx_lms_refusals_come_through() -> None:
    model = models.tiny("llama")
    engine = attach(model, models.settings())
    with pytest.raises(ValueError, match="must be non-zero"):
        responses(model, models.token_ids(TOKENS), 0)
    with pytest.raises(ValueError, match="must be provided"):
        responses(model, [])
    assert engine.remaining is None


def test_the_prompts_end_is_dense_where_mlx_lm_cannot_know(tokenizer: Any) -> None:
    """One token more of the tail is sparse: mlx-lm's last one is known to follow."""
    model, prompt = models.tiny("llama"), models.token_ids(12 * BLOCK + 8)
    attach(model, models.settings(selector="oracle"))
    hand = models.by_hand(models.tiny("llama"), "llama", BLOCK, 12 * BLOCK, FFN // 2)
    _, cache = models.prefill(hand, prompt[:-1])
    _, wanted = models.continue_from(models.tiny("llama"), prompt[-1], 6, cache)
    got = logprobs(responses(model, prompt))
    assert models.distance(got, wanted) < 1e-4
    theirs = logprobs(list(mlx_lm.stream_generate(model, tokenizer, prompt, 6)))
    assert models.distance(theirs[0], wanted[0]) > 1e-3


def test_input_embeddings() -> None:
    model = models.tiny("llama")
    attach(model, models.settings())
    ids = mx.array(models.token_ids(TOKENS))
    embeddings = model.model.embed_tokens(ids)
    wanted = responses(model, ids)
    for prompt in (ids, mx.array([], mx.int32)):
        got = responses(model, prompt, input_embeddings=embeddings)
        np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
        assert got[0].ffn_sparsity == wanted[0].ffn_sparsity > 0.1


def test_sparse_decode_is_off_by_default_and_differs() -> None:
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    engine = attach(model, models.settings(selector="first-block"))
    assert engine.config.sparse_decode is False
    dense = responses(model, prompt)
    attach(model, models.settings(selector="first-block", sparse_decode=True))
    sparse = responses(model, prompt)
    # The prompt, its last token included, is read in the same way.
    np.testing.assert_array_equal(logprobs(sparse)[0], logprobs(dense)[0])
    assert models.distance(logprobs(sparse)[1], logprobs(dense)[1]) > 3e-3
    assert sparse[0].ffn_sparsity == dense[0].ffn_sparsity


def test_sparse_decode_uses_the_first_blocks_neurons() -> None:
    """Every decode step runs the same neurons as the prompt's blocks did."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    engine = attach(model, models.settings(selector="first-block", sparse_decode=True))
    cache = make_prompt_cache(model)
    chosen: list[list[int]] = []
    ffn, sparse = engine.ffns[1], engine.ffns[1].sparse

    def spy(x: mx.array, neurons: mx.array) -> mx.array:
        chosen.extend(neurons.tolist())
        return sparse(x, neurons)

    ffn.sparse = spy  # type: ignore[method-assign]
    responses(model, prompt, 4, prompt_cache=cache)
    assert len(chosen) == BLOCKS + 4
    assert all(neurons == chosen[0] for neurons in chosen)
    assert len(set(chosen[0])) == FFN // 2
