"""The measuring code measures what it says, on tiny models."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import demo_tokenizer, settings, tiny
from rich.console import Console

from mlx_fastforward import detach, load_adapter
from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.bench import fit_predictor, quality, ttft

PROMPT = 60


def prompts(n: int) -> list[mx.array]:
    rng = np.random.default_rng(0)
    return [mx.array(rng.integers(16, 4096, PROMPT + 8)) for _ in range(n)]


def test_kl_and_agreement_are_those_of_the_distributions() -> None:
    model = tiny("llama", vocab=4096)
    texts = prompts(2)
    dense = [quality.continuation(model, t, PROMPT, None) for t in texts]
    engine = attach(model, settings(sparsity=0.8))
    sparse = [quality.continuation(model, t, PROMPT, engine) for t in texts]
    kl, top1, exact, skipped = quality.measure(
        model, demo_tokenizer(), texts, [], dense, PROMPT, engine
    )
    p, q = (
        np.stack([np.array(x, dtype=np.float64) for x in xs]) for xs in (dense, sparse)
    )
    assert p.shape == (2, 8, 4096)
    wanted = (np.exp(p) * (p - q)).sum(-1).mean(-1)
    np.testing.assert_allclose(np.array(kl), wanted, rtol=1e-3)
    assert wanted.min() > 0
    assert top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert exact is None and 0 < skipped < 0.8


def test_a_model_compared_with_itself() -> None:
    model = tiny("llama", vocab=4096)
    texts = prompts(1)
    dense = [quality.continuation(model, t, PROMPT, None) for t in texts]
    kl, top1, _, skipped = quality.measure(
        model, demo_tokenizer(), texts, [], dense, PROMPT, None
    )
    assert abs(kl.item()) < 1e-6 and top1 == 1 and skipped == 0


def test_passages_are_of_one_length_and_from_the_whole_text() -> None:
    text = "<|end of book|>".join("word %d " % i * 300 for i in range(4))
    got = quality.passages(text, demo_tokenizer(), 6, 50)
    assert [t.size for t in got] == [50] * 6
    assert len({tuple(t.tolist()) for t in got}) > 3


def test_questions_are_asked_one_by_one_after_the_shared_text() -> None:
    """Every answer must be what the model says to its own prompt, whatever was asked before."""
    model, tokenizer = tiny("llama", vocab=4096), demo_tokenizer(ends=True)
    text = "The secret code of Felix is 4821. " * 3 + "\n\n"
    questions = ["Who is Felix?", "Who is Mabel?", "Who is Felix?"]

    def task(answers: list[str]) -> dict:
        content = text + questions[0]
        pairs = [list(p) for p in zip(questions, answers)]
        return {"messages": [{"content": content}], "questions": pairs}

    wanted = []
    for q in questions:
        message = [{"role": "user", "content": text + q}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        cache = quality.make_prompt_cache(model)
        wanted.append(quality._greedy(model, tokenizer, mx.array(ids), cache))
    assert wanted[0] == wanted[2] != wanted[1]
    assert quality.ask(model, tokenizer, task(wanted), None) == [True] * 3
    assert quality.ask(model, tokenizer, task(["no"] * 3), None) == [False] * 3


def test_ttft_leaves_the_model_stock_and_reports_the_ratio() -> None:
    model = tiny("llama", vocab=4096)
    engine = attach(model, settings())
    detach(model)
    (row,) = ttft.measure(model, demo_tokenizer(), 64, [engine], 2, lambda: None)
    assert engine_of(model) is None
    assert row.speedup == pytest.approx(row.stock_ttft_s / row.ttft_s)
    assert row.spread_s[0] <= row.ttft_s <= row.spread_s[1]
    assert 0 < row.ffn_sparsity < 0.5


def test_label_weights_are_those_of_the_paper() -> None:
    norms = mx.random.permutation(mx.arange(20.0))[None]
    label, weight = fit_predictor.weights_by_rank(norms)
    order = np.argsort(-np.array(norms[0]))
    assert np.array(label[0])[order].tolist() == [1] * 10 + [0] * 10
    fifths = [32, 32, 16, 16, 8, 8, 4, 4, 2, 2]
    assert np.array(weight[0])[order].tolist() == fifths + [1] * 10


def test_a_predictor_learns_which_neurons_fire() -> None:
    """Two kinds of block with disjoint neurons: the fit must tell them apart."""
    mx.random.seed(0)
    kind = mx.arange(64) % 2
    direction = mx.random.normal((2, 32))
    x = direction[kind][None, :, None] + 0.1 * mx.random.normal((1, 64, 8, 32))
    half = (mx.arange(40) < 20).astype(mx.float32)
    norms = mx.stack([half, 1 - half])[kind][None] + 0.01 * mx.random.uniform(
        shape=(1, 64, 40)
    )
    net = fit_predictor.train(x, norms, 800, 16, 16, Console(quiet=True))
    assert fit_predictor.recall(net, x, norms)[0] > 0.95


def test_the_fitted_adapter_loads(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was a fine day in the town. " * 60)
    fit_predictor.main(
        text=tmp_path / "text.txt",
        out=tmp_path / "adapter",
        sequences=2,
        tokens=128,
        block_size=16,
        steps=4,
        batch=4,
    )
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.predictors is not None and len(adapter.predictors) == 8
    info = json.loads((tmp_path / "adapter" / "fastforward.json").read_text())
    assert info["calibration"]["tokens"] == 256
