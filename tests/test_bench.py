"""The measuring code measures what it says, on tiny models."""

import mlx.core as mx
import numpy as np
import pytest
from models import demo_tokenizer, prefill, settings, tiny

from mlx_fastforward import detach
from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.bench.eval import prose
from mlx_fastforward.bench.speed import shapes, ttft
from mlx_fastforward.bench.studies import recall
from mlx_fastforward.continuation import continuation, divergence, follow
from mlx_fastforward.neurons.selectors import Oracle

PROMPT = 60


def prompts(n: int) -> list[mx.array]:
    rng = np.random.default_rng(0)
    return [mx.array(rng.integers(16, 4096, PROMPT + 8)) for _ in range(n)]


def test_kl_and_agreement_are_those_of_the_distributions() -> None:
    model = tiny("llama", vocab=4096)
    (text,) = prompts(1)
    dense = continuation(model, text, PROMPT, None)
    engine = attach(model, settings(sparsity=0.8))
    sparse = continuation(model, text, PROMPT, engine)
    kl, top1 = divergence(dense, sparse)
    p, q = (np.array(x, dtype=np.float64) for x in (dense, sparse))
    assert p.shape == (8, 4096)
    wanted = (np.exp(p) * (p - q)).sum(-1).mean()
    assert kl == pytest.approx(wanted, rel=1e-3) and wanted > 0
    assert top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert 0 < engine.tally.sparsity < 0.8


def test_a_model_compared_with_itself() -> None:
    model = tiny("llama", vocab=4096)
    (text,) = prompts(1)
    dense = [continuation(model, text, PROMPT, None) for _ in range(2)]
    kl, top1 = divergence(*dense)
    assert abs(kl) < 1e-6 and top1 == 1


def test_what_follows_is_the_same_in_one_call_and_token_by_token() -> None:
    model = tiny("llama", vocab=4096)
    (text,) = prompts(1)
    wanted, cache = prefill(model, text.tolist())
    wanted = wanted[PROMPT - 1 : -1].astype(np.float64)
    wanted -= np.logaddexp.reduce(wanted, axis=-1, keepdims=True)
    for step in (False, True):
        _, cache = prefill(model, text[: PROMPT - 3].tolist())
        rest, after = text[PROMPT - 3 : PROMPT], text[PROMPT:]
        got = follow(model, rest, after, cache, step)
        np.testing.assert_allclose(np.array(got), wanted, atol=1e-3)


def test_passages_are_of_one_length_and_from_the_whole_text() -> None:
    text = "<|end of book|>".join("word %d " % i * 300 for i in range(4))
    got = prose.passages(text, demo_tokenizer(), 6, 50)
    assert [t.size for t in got] == [50] * 6
    assert len({tuple(t.tolist()) for t in got}) > 3


def test_ttft_leaves_the_model_stock_and_reports_the_ratio() -> None:
    model = tiny("llama", vocab=4096)
    engine = attach(model, settings())
    detach(model)
    ids, ticks = mx.arange(8, 72), []
    (row,) = ttft.measure(
        model, demo_tokenizer(), ids, [engine], 2, 0, lambda: ticks.append(1)
    )
    assert engine_of(model) is None and len(ticks) == 4
    assert row.speedup == pytest.approx(row.stock_ttft_s / row.ttft_s)
    assert row.ttft_spread_s[0] <= row.ttft_s <= row.ttft_spread_s[1]
    assert 0 < row.ffn_flops_skipped < 0.5 and row.ideal_speedup > 1
    assert row.decode_tps > 0 < row.stock_decode_tps
    assert (row.context, row.selector, row.strategy) == (64, "probe", "chunk")


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_random_models_have_the_real_shapes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled down by 32, so that they fit into a test."""
    module, shape = shapes.SHAPES[name]
    small = shape | {k: shape[k] // 32 for k in ("hidden_size", "intermediate_size")}
    small["head_dim"] = small["hidden_size"] // 8
    monkeypatch.setitem(shapes.SHAPES, name, (module, small))
    model = shapes.random_model(name, 2, mx.float32, 0)
    assert len(model.layers) == 2
    predictor = shapes.random_predictor(model)
    attach(model, settings(selector="trained"), predictor=predictor)
    assert mx.all(mx.isfinite(model(mx.arange(64)[None]))).item()


def test_random_models_are_quantised_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, shape = shapes.SHAPES["llama-3.2-1b"]
    small = shape | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 8}
    monkeypatch.setitem(shapes.SHAPES, "llama-3.2-1b", (module, small))
    model = shapes.random_model("llama-3.2-1b", 2, mx.float32, 4)
    assert model.layers[0].mlp.down_proj.bits == 4


def test_recall_of_an_adapter_is_the_share_of_the_oracles_neurons() -> None:
    scores = mx.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    truth = mx.array([[3.0, 0.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    assert recall.hits(scores, truth, 2).tolist() == [0.5, 1.0]


def test_recall_of_the_truth_itself_is_one() -> None:
    model = tiny("llama", vocab=4096)
    found = recall.per_layer(model, Oracle("weighted"), prompts(1), 8, 64)
    assert found == pytest.approx([1.0] * 3)
