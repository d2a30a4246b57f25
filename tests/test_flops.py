"""FLOPs against sums by hand: two for every multiplication of a product."""

import mlx.core as mx
import models
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_fastforward.attachment import attach, reading
from mlx_fastforward.bench.flops import cost
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.build import engine_for
from mlx_fastforward.model.families import Heads, mixers
from mlx_fastforward.neurons import compensators as c
from mlx_fastforward.neurons import selectors as s
from mlx_fastforward.neurons.predictor import PredictorWeights
from mlx_fastforward.prefill import prefill
from mlx_fastforward.scorers import DraftScorer, LayersScorer
from mlx_fastforward.tokens import flops
from mlx_fastforward.tokens.flops import FlopCount
from mlx_fastforward.tokens.plan import Plan
from mlx_fastforward.tokens.pruning import CentredNorm

D, F = 32, 128


def zeros(*shape: int) -> mx.array:
    return mx.zeros(shape)


def predictor(r: int, pooled: bool) -> PredictorWeights:
    if pooled:
        return PredictorWeights(zeros(D), zeros(D, r), zeros(r, F))
    return PredictorWeights(None, zeros(D, r), zeros(2 * r, F), bias=zeros(F))


POOLED, TOKEN_WISE = (
    s.Trained([predictor(r, pooled) for r in (9, 4)]) for pooled in (True, False)
)


@pytest.mark.parametrize(
    "selector, block, wanted",
    [
        (s.FirstBlock(), 8, 0),
        (s.Oracle(), 8, 2 * (2 * 8 * 32 * 128)),  # gate and up
        # likeness of 2 sampled tokens and 40 dense ones, and the votes of those
        (s.Probe(), 8, 2 * 2 * 40 * 32 + 2 * 40 * 128),
        (s.Probe(), 128, 2 * 32 * 40 * 32 + 2 * 40 * 128),
        (POOLED, 8, 512 + 512 + 256 + 1024),  # logits, pooling, w1, w2
        (TOKEN_WISE, 8, 8 * 256 + 2 * 8 * 128),  # w1 of every token, w2
        (POOLED, 512, 4 * (8192 + 8192 + 256 + 1024)),  # four parts of 128 tokens
        (TOKEN_WISE, 512, 4 * (128 * 256 + 2 * 8 * 128)),
    ],
)
def test_selection_of_a_block(selector: s.Selector, block: int, wanted: int) -> None:
    """In layer 1, with 40 dense tokens."""
    assert selector.flops(1, block, 40, D, F) == wanted


def test_compensation() -> None:
    """In layer 1, of 7 tokens."""
    mlp = c.MLPCompensator([c.MLPWeights(zeros(D, h), zeros(h, D)) for h in (9, 4)])
    assert mlp.flops(1, 7, D, 64) == 2 * (7 * 32 * 4) + 2 * (7 * 4 * 32)
    weights = [c.LowRankWeights(zeros(D), zeros(D, r), zeros(F, r + 1)) for r in (9, 3)]
    # features (the constant one is free), W U phi, U_S phi
    wanted = 2 * 7 * 32 * 3 + 2 * 7 * 4 * 32 + 2 * 7 * 4 * 64
    assert c.LowRankCompensator(weights).flops(1, 7, D, 64) == wanted


@pytest.mark.parametrize("compensated", [False, True])
def test_a_call(compensated: bool) -> None:
    """Two rows of 56 tokens: 8 + 5 blocks of 8, their first tokens probes, + 8; layer 1 is dense."""
    count, plan = FlopCount(), Plan(head=8, blocks=5, block_size=8, tail=8)
    mlp = c.MLPCompensator([c.MLPWeights(zeros(D, 4), zeros(4, D))] * 4)
    shapes, keep = [(D, F), (D, F), (D, 192), (D, F)], [64, None, 96, 64]
    parts = (s.Probe(), mlp if compensated else None)
    flops.count_call(count, (2, 56), plan, shapes, keep, *parts)
    assert count.dense == 2 * 6 * 56 * 32 * (128 + 128 + 192) == 9_633_792
    # 21 tokens over all neurons, 35 over half of them
    ffn = 6 * 32 * (21 * 128 + 35 * 64) + 6 * 32 * 56 * 128
    ffn += 6 * 32 * (21 * 192 + 35 * 96)
    # per block: likeness of 2 tokens and 21, votes of 21
    selection = 5 * (2 * 2 * 21 * 32 + 2 * 21 * 128) + 5 * (2688 + 2 * 21 * 192)
    compensation = 2 * 5 * 7 * (4 * 32 * 4) if compensated else 0
    assert count.run == 2 * (ffn + selection + compensation)
    assert count.sparsity == pytest.approx((9_633_792 - count.run) / 9_633_792)


def test_a_call_with_tokens_that_skip_layer_1() -> None:
    """Two rows of 56 tokens of which 40 stay: 8 + 3 blocks of 8, one probe each, + 8."""
    count, plan = FlopCount(), Plan(head=8, blocks=5, block_size=8, tail=8)
    layers = [False, True, True, True]
    skipping = flops.Skipping(Plan(8, 3, 8, 8), layers, CentredNorm())
    parts = ([(D, F)] * 4, [None, None, 64, 64], s.Probe(), None)
    flops.count_call(count, (2, 56), plan, *parts, skipping)
    assert count.dense == 2 * 3 * 6 * 56 * 32 * 128
    norms, dense = 2 * 40 * 32, 6 * 32 * 128 * 40
    sparse = 6 * 32 * (19 * 128 + 21 * 64) + 3 * (2 * 2 * 19 * 32 + 2 * 19 * 128)
    assert count.run == 2 * (6 * 32 * 128 * 56 + norms + dense + norms + sparse)


def test_dense_calls() -> None:
    count = FlopCount()
    assert count.sparsity == 0
    for plan, keep in ((None, [64] * 4), (Plan(8, 5, 8, 8), [None] * 4)):
        shapes = [(D, F)] * 4
        flops.count_call(count, (1, 56), plan, shapes, keep, s.Probe(), None)
    assert count.dense == count.run == 2 * 3 * 6 * 56 * 32 * 128


def test_a_prompt() -> None:
    """A chunk of 56 like that above, all layers but the last sparse, and the last token."""
    model, ids = models.tiny("llama"), mx.array(models.token_ids(57))
    attach(model, models.settings(selector="probe"))
    cache = make_prompt_cache(model)
    with reading(model, 57) as prompt:
        prefill(model, ids[:-1], cache)
        prefill(model, ids[-1:], cache)
    ffn = 6 * 32 * (21 * 128 + 35 * 64) + 6 * 32 * 1 * 128
    selection = 5 * (2 * 2 * 21 * 32 + 2 * 21 * 128)
    assert prompt.flops == FlopCount(3 * 6 * 57 * 32 * 128, 3 * (ffn + selection))


@pytest.mark.parametrize(
    "name, products", [("nemotron", 2), ("phi3", 3), ("starcoder2", 2)]
)
def test_without_a_gate_there_are_two_products(name: str, products: int) -> None:
    """Nor is a gate missing where it shares a matrix with up."""
    model = zoo.tiny(name)
    attach(model, models.settings(selector="first-block"))
    with reading(model, 56) as prompt:
        models.prefill(model, models.token_ids(56))
    ffn = 2 * products * 32  # a head, the first block and a tail; four blocks at half
    dense = 3 * ffn * 56 * 128
    assert prompt.flops.dense == dense
    assert 0 < dense - prompt.flops.run <= 3 * ffn * 40 * 64


@pytest.mark.parametrize("tokens", [100, 520, 2049, 4097, 5000])
@pytest.mark.parametrize("block", [16, 512])
def test_the_plans_of_a_prompt_are_those_of_its_calls(tokens: int, block: int) -> None:
    """Chunks of 2,048, the last token alone."""
    engine = attach(models.tiny("llama"), models.settings(block_size=block))
    prompt, expected, done = engine.prompt(tokens), FlopCount(), 0
    for new, plan in engine.plans(tokens):
        assert new == (min(2048, tokens - 1 - done) or 1)
        cache = [type("Cache", (), {"offset": done})()]
        call = engine.begin(prompt, 1, new, cache)
        assert plan == (None if call is None else call.split.plan)
        engine.count(expected, 1, new, plan)
        done += new
    assert done == tokens
    sparse = tokens >= engine.shortest
    assert (expected.run < expected.dense) == sparse
    assert prompt.flops == (expected if sparse else FlopCount())


def test_all_that_is_not_ffn() -> None:
    """The last layer has keys and values only: nothing else of it is ever asked for."""
    heads = Heads(queries=4, keys=2, size=8)
    assert all(Heads.of(models.tiny(n), D) == heads for n in ("llama", "gemma3"))
    projections = 3 * 100 * 2 * 32 * (32 + 16 + 16 + 32) + 100 * 2 * 32 * (16 + 16)
    attention = 3 * (100 * 101 // 2) * 2 * (2 * 32)
    rest = projections + attention
    layers = mixers(models.tiny("llama"))
    assert flops.other_than_ffn(layers, heads, 100) == rest
    count = FlopCount(dense=7_372_800, run=4_000_000)
    found = flops.ideal_speedup(layers, heads, 100, count)
    assert found == (rest + 7_372_800) / (rest + 4_000_000)


def test_linear_attention_does_not_look_back() -> None:
    """Qwen 3.5: every other layer here keeps a state, and its projections are counted as they are."""
    state, attention = mixers(zoo.tiny("qwen3_5"))[:2]
    assert not state.attends and attention.attends
    assert state.weights == 32 * (2 * 16 + 32 + 32 + 4 + 4) + 32 * 32
    assert attention.weights == 32 * (2 * 32 + 16 + 16) + 32 * 32  # q has a gate


def other(tokens: int, whole: int, last: int = 1) -> int:
    """Projections and attention of so many whole layers, keys and values of the last."""
    weights = whole * 32 * (32 + 16 + 16 + 32) + last * 32 * (16 + 16)
    return 2 * tokens * weights + whole * tokens * (tokens + 1) // 2 * 2 * (2 * 32)


FFN = 6 * 32 * 128  # of a token
STOCK = other(100, 3) + 3 * 100 * FFN


def test_a_prompt_of_which_a_part_is_read() -> None:
    """57 of 100 tokens; a draft of two layers reads them all, and 8 more."""
    model = models.tiny("llama")
    draft = DraftScorer(models.tiny("llama", num_hidden_layers=2), "small")
    ours, theirs = other(57, 3) + 3 * 57 * FFN, other(108, 1) + 108 * FFN
    engine = engine_for(model, models.settings(sparsity=0.0))
    found = cost(model, engine, 100, draft, 57)
    assert found.speedup == pytest.approx(STOCK / (ours + theirs))
    assert found.ffn.sparsity == pytest.approx(0.43)
    assert cost(model, engine, 100) == cost(model, engine, 100, draft)
    assert cost(model, engine, 100).speedup == 1


def test_first_layers_that_score_read_everything_densely() -> None:
    """Two of four; the third reads 57 tokens sparsely, the fourth has keys and values only."""
    model = models.tiny("llama")
    engine = engine_for(model, models.settings(selector="probe"))
    found = cost(model, engine, 100, LayersScorer(model, 2), 57)
    sparse = 6 * 32 * (21 * 128 + 35 * 64) + FFN
    sparse += 5 * (2 * 2 * 21 * 32 + 2 * 21 * 128)
    ffn = 2 * 100 * FFN + sparse
    assert (found.ffn.dense, found.ffn.run) == (3 * 100 * FFN, ffn)
    run = ffn + other(100, 2, last=0) + other(57, 1)
    assert found.speedup == pytest.approx(STOCK / run)
