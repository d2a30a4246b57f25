from typing import Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import gemma2

from mlx_fastforward.model.families import FAMILIES
from mlx_fastforward.model.ffn import GatedFFN
from mlx_fastforward.neurons.predictor import PredictorWeights, parts
from mlx_fastforward.neurons.selectors import (
    FirstBlock,
    Oracle,
    Probe,
    Selector,
    SelectorInputs,
    Trained,
    at_least_one,
    neuron_scores,
    top_neurons,
)
from mlx_fastforward.tokens.plan import plan_call

D, F, N, HEAD, DENSE = 32, 64, 8, 8, 21
SCORES = ["weighted", "griffin"]


class Layer:
    """A GELU-gated FFN, its weights in float64, and calls of it."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        mlp = gemma2.MLP(D, F)
        self.gate, self.up = self.normal(F, D, scale=0.3), self.normal(F, D, scale=0.3)
        # Columns of unlike norms: a score that forgets them ranks otherwise.
        self.down = self.normal(D, F) * np.exp(self.normal(F))
        for name in ("gate", "up", "down"):
            mlp[f"{name}_proj"].weight = to_mx(getattr(self, name))
        self.ffn = GatedFFN(mlp, FAMILIES["gemma2"])

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Numbers that float32 holds exactly."""
        values = scale * self.rng.normal(size=shape)
        return values.astype(np.float32).astype(np.float64)

    def z(self, x: np.ndarray) -> np.ndarray:
        return reference.activations(x, self.gate, self.up, reference.gelu_tanh)

    def seen(
        self,
        batch: int = 2,
        blocks: int = 3,
        head: int = HEAD,
        valid: Optional[tuple[np.ndarray, np.ndarray]] = None,
        dtype: mx.Dtype = mx.float32,
        scale: float = 1.0,
        memory: Optional[dict] = None,
    ) -> tuple[SelectorInputs, np.ndarray, np.ndarray]:
        """A call, its block tokens (M, N, d) and dense tokens (batch, T, d) in float64.

        Dense tokens are noisy block tokens, so that likeness has something to find.
        """
        x = scale * self.normal(batch * blocks, N, D)
        rows = x.reshape(batch, -1, D)
        like = self.rng.integers(0, blocks * N, (batch, DENSE))
        dense = np.stack([row[i] for row, i in zip(rows, like)])
        dense = dense + scale * self.normal(batch, DENSE, D, scale=0.7)
        low = [to_mx(a).astype(dtype) for a in (x, dense)]
        x, dense = (to_numpy(a) for a in low)
        z = to_mx(self.z(dense))
        masks = None if valid is None else (to_mx(valid[0]), to_mx(valid[1]))
        return SelectorInputs(low[0], low[1], z, head, masks, memory or {}), x, dense

    def masks(self, batch: int = 2, blocks: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Padding anywhere, but one token of each block is real and sampled."""
        masks = []
        for shape in [(batch * blocks, N), (batch, DENSE)]:
            mask = (self.rng.random(shape) < 0.6).astype(np.float64)
            mask[:, 5] = 1
            masks.append(mask)
        return masks[0], masks[1]

    def score(
        self, z: np.ndarray, score: str, valid: Optional[np.ndarray] = None
    ) -> np.ndarray:
        if score == "griffin":
            return reference.griffin(z, valid)
        return reference.weighted(z, self.down, valid)


def to_mx(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_scores(found: mx.array, wanted: list, tolerance: float = 1e-4) -> None:
    """Close for every block, relative to the block's largest score."""
    wanted = np.stack(wanted)
    assert found.shape == wanted.shape
    difference = np.abs(to_numpy(found) - wanted)
    assert np.all(difference <= tolerance * wanted.max(axis=-1, keepdims=True))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_neuron_scores(score: str, masked: bool) -> None:
    layer = Layer()
    z = layer.normal(5, N, F)
    valid = layer.masks()[0][:5] if masked else None
    found = neuron_scores(
        to_mx(z), layer.ffn, score, None if valid is None else to_mx(valid)
    )
    masks = [None] * 5 if valid is None else list(valid)
    assert_scores(found, [layer.score(b, score, v) for b, v in zip(z, masks)])


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_large_half_precision_activations(score: str) -> None:
    """Squares of float16 activations overflow; their norms must not."""
    layer = Layer()
    z = mx.array(1000 * layer.normal(2, N, F)).astype(mx.float16)
    found = neuron_scores(z, layer.ffn, score)
    assert_scores(found, [layer.score(b, score) for b in to_numpy(z)])


def test_the_two_scores_rank_differently() -> None:
    """Otherwise the tests of this file could not tell them apart."""
    layer = Layer()
    z = layer.normal(N, F)
    a, b = (reference.top_k(layer.score(z, s), F // 4) for s in SCORES)
    assert len(set(a) & set(b)) < F // 8


@given(st.data())
def test_top_neurons(data: st.DataObject) -> None:
    """The true top K, ascending; ties may fall either way."""
    f = data.draw(st.integers(1, 24))
    keep = data.draw(st.integers(1, f))
    number = st.integers(-6, 6)
    row = st.lists(number, min_size=f, max_size=f)
    scores = np.array(data.draw(st.lists(row, min_size=1, max_size=3)), np.float64)
    found = np.array(top_neurons(to_mx(scores), keep))
    assert found.shape == (len(scores), keep)
    for neurons, values in zip(found, scores):
        assert np.all(np.diff(neurons.astype(int)) > 0)
        best = values[reference.top_k(values, keep)]
        assert sorted(values[neurons]) == sorted(best)


def test_top_neurons_without_ties() -> None:
    layer = Layer()
    scores = layer.normal(4, F)
    for keep in (1, 2, F // 2, F - 1, F):
        wanted = [reference.top_k(row, keep) for row in scores]
        assert top_neurons(to_mx(scores), keep).tolist() == wanted


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch, blocks", [(1, 1), (1, 4), (2, 3)])
def test_probe(score: str, masked: bool, batch: int, blocks: int) -> None:
    layer = Layer()
    masks = layer.masks(batch, blocks) if masked else None
    seen, x, dense = layer.seen(batch, blocks, valid=masks)
    wanted = []
    for i, block in enumerate(x):
        row = i // blocks
        valid = (None, None) if masks is None else (masks[0][i], masks[1][row])
        z = layer.z(dense[row])
        wanted.append(reference.probe(block, dense[row], z, layer.down, score, *valid))
    assert_scores(Probe(score, 4)(0, layer.ffn, seen), wanted)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_probe_in_half_precision(dtype: mx.Dtype, scale: float) -> None:
    """Likeness depends on directions only, however large the normed inputs are."""
    layer = Layer()
    seen, x, dense = layer.seen(1, 3, dtype=dtype)
    z = layer.z(dense[0])
    wanted = [reference.probe(b, dense[0], z, layer.down, "weighted") for b in x]
    seen.blocks, seen.x = scale * seen.blocks, scale * seen.x
    assert seen.x.dtype == dtype
    assert_scores(Probe("weighted", 4)(0, layer.ffn, seen), wanted, 0.05)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_probe_survives_a_token_of_zeros(dtype: mx.Dtype) -> None:
    layer = Layer()
    seen, _, _ = layer.seen(1, 3, dtype=dtype)
    seen.x[0, 3] = 0
    seen.blocks[1, 2] = 0
    scores = Probe("weighted", 4)(0, layer.ffn, seen)
    assert mx.all(mx.isfinite(scores)).item()


def test_probe_ignores_what_padding_holds() -> None:
    layer = Layer()
    masks = layer.masks()
    seen, _, _ = layer.seen(valid=masks)
    before = Probe("weighted", 4)(0, layer.ffn, seen)
    seen.blocks = mx.where(seen.valid[0][..., None] > 0, seen.blocks, 99)
    seen.x = mx.where(seen.valid[1][..., None] > 0, seen.x, -99)
    seen.z = mx.where(seen.valid[1][..., None] > 0, seen.z, 1e4)
    after = Probe("weighted", 4)(0, layer.ffn, seen)
    assert mx.allclose(before, after, rtol=1e-4)


def test_probe_of_a_row_without_real_dense_tokens() -> None:
    """All padding: nothing sensible to say, and nothing that is no number."""
    layer = Layer()
    masks = layer.masks()
    masks[1][0] = 0
    seen, _, _ = layer.seen(valid=masks)
    scores = Probe("weighted", 4)(0, layer.ffn, seen)
    assert mx.all(mx.isfinite(scores)).item()


def test_probe_of_a_block_with_few_real_tokens() -> None:
    """Left padding may leave a block only tokens that the probe does not sample."""
    layer = Layer()
    masks = layer.masks()
    masks[0][0] = [0, 0, 0, 0, 0, 0, 1, 1]
    seen, _, _ = layer.seen(valid=masks)
    scores = np.array(Probe("weighted", 4)(0, layer.ffn, seen))
    assert np.all(scores.max(axis=-1) > 0)


def test_probe_asks_for_its_probes() -> None:
    layer = Layer()
    assert Probe("weighted", 4).probe_every == 4
    others: list[Selector] = [FirstBlock("griffin"), Oracle("griffin")]
    for other in [*others, trained(layer, 1)[0], token_wise(layer, 1)[0]]:
        assert other.probe_every == 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_oracle(score: str, masked: bool) -> None:
    layer = Layer()
    masks = layer.masks() if masked else None
    seen, x, _ = layer.seen(valid=masks)
    valid = [None] * len(x) if masks is None else masks[0]
    wanted = [layer.score(layer.z(b), score, v) for b, v in zip(x, valid)]
    assert_scores(Oracle(score)(0, layer.ffn, seen), wanted)


@pytest.mark.parametrize("score", SCORES)
def test_first_block_is_the_head(score: str) -> None:
    """Every block of a row gets the neurons of the row's head."""
    layer = Layer()
    seen, _, dense = layer.seen(batch=2, blocks=3)
    heads = [layer.score(layer.z(row[:HEAD]), score) for row in dense]
    found = FirstBlock(score)(0, layer.ffn, seen)
    assert_scores(found, [heads[0]] * 3 + [heads[1]] * 3)


@pytest.mark.parametrize("score", SCORES)
def test_first_block_without_a_head(score: str) -> None:
    """With no dense head, or on a cache filled by something else."""
    layer = Layer()
    seen, x, _ = layer.seen(batch=2, blocks=3, head=0)
    firsts = [layer.score(layer.z(x[i]), score) for i in (0, 3)]
    found = FirstBlock(score)(0, layer.ffn, seen)
    assert_scores(found, [firsts[0]] * 3 + [firsts[1]] * 3)


def test_first_block_remembers_across_calls() -> None:
    layer, selector = Layer(), FirstBlock("weighted")
    memory = {"kept for": mx.array(0)}
    seen, _, _ = layer.seen(memory=memory)
    first = selector(0, layer.ffn, seen)
    later, _, _ = layer.seen(blocks=1, head=0, memory=memory)
    assert mx.array_equal(selector(0, layer.ffn, later), first[::3])
    again, _, dense = layer.seen(memory=memory)
    heads = [layer.score(layer.z(row[:HEAD]), "weighted") for row in dense]
    anew = selector(0, layer.ffn, again)
    assert_scores(anew, [heads[0]] * 3 + [heads[1]] * 3)
    assert not mx.allclose(anew, first, rtol=0.01)


def test_first_block_keeps_prompts_apart() -> None:
    layer, selector = Layer(), FirstBlock("weighted")
    a, _, _ = layer.seen(memory={"kept for": mx.array(0)})
    b, x, _ = layer.seen(head=0, memory={"kept for": mx.array(1)})
    selector(0, layer.ffn, a)
    firsts = [layer.score(layer.z(x[i]), "weighted") for i in (0, 3)]
    found = selector(0, layer.ffn, b)
    assert_scores(found, [firsts[0]] * 3 + [firsts[1]] * 3)


def test_first_block_of_a_batch_that_lost_a_row() -> None:
    """Batch caches drop finished rows; the memory must not outlive them."""
    layer, selector = Layer(), FirstBlock("weighted")
    memory = {"kept for": mx.array(0)}
    selector(0, layer.ffn, layer.seen(batch=2, memory=memory)[0])
    later, _, _ = layer.seen(batch=1, blocks=3, head=0, memory=memory)
    assert selector(0, layer.ffn, later).shape == (3, F)


@pytest.mark.parametrize("head", [HEAD, 0])
def test_first_block_does_not_count_padding(head: int) -> None:
    layer = Layer()
    masks = layer.masks(batch=2, blocks=3)
    masks[1][:, 0] = 1  # some real token in every head
    seen, x, dense = layer.seen(valid=masks, head=head)
    if head:
        z, valid = layer.z(dense[:, :head]), masks[1][:, :head]
    else:
        z, valid = layer.z(x[::3]), masks[0][::3]
    wanted = [layer.score(a, "weighted", v) for a, v in zip(z, valid)]
    found = FirstBlock("weighted")(0, layer.ffn, seen)
    assert_scores(found, [wanted[0]] * 3 + [wanted[1]] * 3)


def trained(layer: Layer, layers: int, r: int = 4) -> tuple[Trained, list]:
    weights = [
        (layer.normal(D), layer.normal(D, r), layer.normal(r, F)) for _ in range(layers)
    ]
    arrays = [PredictorWeights(*map(to_mx, w)) for w in weights]
    return Trained(arrays), weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", [0, 2])
def test_trained(masked: bool, index: int) -> None:
    layer = Layer()
    selector, weights = trained(layer, 3)
    masks = layer.masks() if masked else None
    seen, x, _ = layer.seen(valid=masks)
    valid = [None] * len(x) if masks is None else masks[0]
    wanted = [reference.predictor(b, *weights[index], v) for b, v in zip(x, valid)]
    found = selector(index, layer.ffn, seen)
    assert np.abs(np.stack(wanted)).max() > 1  # the ReLU lets something through
    assert_scores(found, wanted)
    keep = F // 4
    best = [reference.top_k(row, keep) for row in wanted]
    assert top_neurons(found, keep).tolist() == best


def test_trained_on_single_tokens() -> None:
    """Sparse decode: the softmax over one token is that token."""
    layer = Layer()
    selector, weights = trained(layer, 1)
    seen, x, _ = layer.seen(batch=3, blocks=1)
    seen.blocks = seen.blocks[:, :1]
    wanted = [reference.relu(b[0] @ weights[0][1]) @ weights[0][2] for b in x]
    assert_scores(selector(0, layer.ffn, seen), wanted)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_trained_under_a_half_precision_model(dtype: mx.Dtype) -> None:
    """The predictor runs in its own precision."""
    layer = Layer()
    selector, weights = trained(layer, 1)
    seen, x, _ = layer.seen(dtype=dtype)
    assert seen.blocks.dtype == dtype
    found = selector(0, layer.ffn, seen)
    assert found.dtype == mx.float32
    assert_scores(found, [reference.predictor(b, *weights[0]) for b in x])


def token_wise(layer: Layer, layers: int, r: int = 4) -> tuple[Trained, list]:
    weights = [
        (layer.normal(D, r), layer.normal(2 * r, F), layer.normal(F))
        for _ in range(layers)
    ]
    arrays = [
        PredictorWeights(None, to_mx(w1), to_mx(w2), bias=to_mx(bias))
        for w1, w2, bias in weights
    ]
    return Trained(arrays), weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("batch, blocks", [(1, 1), (1, 4), (2, 3)])
def test_token_wise(masked: bool, index: int, batch: int, blocks: int) -> None:
    layer = Layer()
    selector, weights = token_wise(layer, 3)
    masks = layer.masks(batch, blocks) if masked else None
    seen, x, _ = layer.seen(batch, blocks, valid=masks)
    valid = [None] * len(x) if masks is None else masks[0]
    wanted = [reference.token_wise(b, *weights[index], v) for b, v in zip(x, valid)]
    found = selector(index, layer.ffn, seen)
    assert_scores(found, wanted)
    keep = F // 4
    best = [reference.top_k(row, keep) for row in wanted]
    assert top_neurons(found, keep).tolist() == best


def test_token_wise_on_single_tokens() -> None:
    """Sparse decode: mean and root mean square of one token are the token's."""
    layer = Layer()
    selector, weights = token_wise(layer, 1)
    seen, x, _ = layer.seen(batch=3, blocks=1)
    seen.blocks = seen.blocks[:, :1]
    w1, w2, bias = weights[0]
    hidden = [reference.relu(b[0] @ w1) for b in x]
    wanted = [np.concatenate([h, h]) @ w2 + bias for h in hidden]
    assert_scores(selector(0, layer.ffn, seen), wanted, 1e-3)


def test_token_wise_features_of_tokens_that_fire_apart() -> None:
    """Three of four tokens are silent: mean 1/4 of the one, root mean square 1/2."""
    w1, w2 = mx.eye(2), mx.eye(4)
    weights = PredictorWeights(None, w1, w2, bias=mx.zeros(4))
    x = mx.array([[[4.0, -1.0], [-4.0, 2.0], [-4.0, 2.0], [-4.0, -9.0]]])
    wanted = [1.0, 1.0, 2.0, 2**0.5]
    assert np.allclose(np.array(weights(x)[0]), wanted, rtol=1e-5)


def test_token_wise_without_a_token_that_fires_is_the_bias() -> None:
    layer = Layer()
    selector, weights = token_wise(layer, 1)
    seen, _, _ = layer.seen()
    seen.blocks = mx.zeros_like(seen.blocks)
    found = selector(0, layer.ffn, seen)
    assert_scores(found, [weights[0][2]] * len(seen.blocks), 0.01)


@pytest.mark.parametrize("kind", [trained, token_wise])
def test_predictors_ignore_what_padding_holds(kind: Callable) -> None:
    layer = Layer()
    selector, _ = kind(layer, 1)
    seen, _, _ = layer.seen(valid=layer.masks())
    before = selector(0, layer.ffn, seen)
    seen.blocks = mx.where(seen.valid[0][..., None] > 0, seen.blocks, 99)
    assert mx.allclose(before, selector(0, layer.ffn, seen), rtol=1e-4)
    seen.valid = None
    assert not mx.allclose(before, selector(0, layer.ffn, seen), rtol=0.1)


@pytest.mark.parametrize("kind", [trained, token_wise])
def test_predictors_of_a_block_of_nothing_but_padding(kind: Callable) -> None:
    """The engine calls all of it real then: scores are numbers, the other blocks' their own."""
    layer = Layer()
    selector, _ = kind(layer, 1)
    masks = layer.masks()
    masks[0][2] = 0
    seen, _, _ = layer.seen(valid=masks)
    seen.valid = (at_least_one(seen.valid[0]), seen.valid[1])
    found = selector(0, layer.ffn, seen)
    masked = seen.valid
    seen.valid = None
    whole = selector(0, layer.ffn, seen)
    assert mx.allclose(found[2], whole[2], rtol=1e-4, atol=1e-4)
    seen.valid = (masked[0][:2], masked[1])
    seen.blocks = seen.blocks[:2]
    assert mx.allclose(found[:2], selector(0, layer.ffn, seen), rtol=1e-4, atol=1e-4)


@given(block=st.integers(8, 4096))
def test_parts_of_large_blocks(block: int) -> None:
    """Equal; those of a plan's blocks have about 128 tokens."""
    assert block % parts(block) == 0
    unit = Trained([]).unit(block)
    plan = plan_call(16 * block, block, cache_empty=True, after=0, edge=8, unit=unit)
    assert plan is not None and plan.block_size % unit == 0
    if block >= 128:
        assert 64 <= plan.block_size / parts(plan.block_size) <= 256


@pytest.mark.parametrize("kind", [trained, token_wise])
@pytest.mark.parametrize("padded", [False, True])
def test_large_blocks_take_the_best_part(kind: Callable, padded: bool) -> None:
    """Predicted in parts of 128 tokens; a part of nothing but padding has no say."""
    layer = Layer()
    selector, _ = kind(layer, 1)
    x = 3 * mx.random.normal((2, 384, D), key=mx.random.key(5))
    one = selector.layers[0]
    each = [
        mx.stack([one(x[b : b + 1, i : i + 128])[0] for i in (0, 128, 256)])
        for b in (0, 1)
    ]
    valid = mx.ones((2, 384))
    if padded:
        valid[1, 256:] = 0
        each[1] = each[1][:2]
    seen = SelectorInputs(
        x, x[:, :0], x[:, :0], valid=(valid, valid[:, :0]) if padded else None
    )
    found = selector(0, layer.ffn, seen)
    assert mx.allclose(found, mx.stack([e.max(axis=0) for e in each]), atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_token_wise_under_a_half_precision_model(dtype: mx.Dtype) -> None:
    """The predictor runs in its own precision."""
    layer = Layer()
    selector, weights = token_wise(layer, 1)
    seen, x, _ = layer.seen(dtype=dtype)
    assert seen.blocks.dtype == dtype
    found = selector(0, layer.ffn, seen)
    assert found.dtype == mx.float32
    assert_scores(found, [reference.token_wise(b, *weights[0]) for b in x])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_token_wise_weights_in_half_precision(dtype: mx.Dtype) -> None:
    """Squares of large hidden units overflow float16; their root mean square must not."""
    layer = Layer()
    _, weights = token_wise(layer, 1)
    w1, w2, bias = [to_mx(w).astype(dtype) for w in weights[0]]
    predictor = PredictorWeights(None, w1, w2, bias=bias)
    seen, x, _ = layer.seen(dtype=dtype, scale=60.0)
    found = Trained([predictor])(0, layer.ffn, seen)
    low = [to_numpy(w) for w in (w1, w2, bias)]
    wanted = [reference.token_wise(b, *low) for b in x]
    assert max(reference.relu(b @ low[0]).max() for b in x) > 256  # squared > 65504
    assert_scores(found, wanted, 0.02)


@pytest.mark.parametrize(
    "block, dense, d, f", [(8, 40, 32, 64), (128, 400, 2048, 8192)]
)
def test_flops(block: int, dense: int, d: int, f: int) -> None:
    """Matmuls by hand: 2 FLOPs per multiply-add."""
    r = 4
    weights = PredictorWeights(mx.zeros((d,)), mx.zeros((d, r)), mx.zeros((r, f)))
    cost = {
        "trained": Trained([weights]).flops(block, dense, d, f),
        "probe": Probe("weighted", 8).flops(block, dense, d, f),
        "first": FirstBlock("weighted").flops(block, dense, d, f),
        "oracle": Oracle("weighted").flops(block, dense, d, f),
    }
    logits, pooling = 2 * block * d, 2 * block * d
    assert cost["trained"] == logits + pooling + 2 * d * r + 2 * r * f
    assert cost["probe"] == 2 * (block // 4) * dense * d + 2 * dense * f
    assert cost["oracle"] == 2 * (2 * block * d * f)
    assert cost["first"] == 0
    assert 0 < cost["trained"] < cost["oracle"]
    assert 0 < cost["probe"] < cost["oracle"]
    assert (
        cost["oracle"] > 6 * block * d * f / 2
    )  # more than half a layer: saves nothing


def test_flops_of_token_wise_predictors() -> None:
    """Every token through w1, twice as many features through w2; of the mean layer."""
    layer, block = Layer(), 8
    layers = [token_wise(layer, 1, r)[0].layers[0] for r in (2, 7)]
    by_hand = [2 * block * D * r + 2 * (2 * r) * F for r in (2, 7)]
    assert Trained(layers).flops(block, 40, D, F) == sum(by_hand) / 2
    for predictor, wanted in zip(layers, by_hand):
        assert Trained([predictor]).flops(block, 40, D, F) == wanted


def test_flops_of_large_blocks() -> None:
    """Four parts of 128 tokens."""
    selector, _ = token_wise(Layer(), 1)
    assert selector.flops(512, 40, D, F) == 4 * selector.flops(128, 40, D, F)


def test_flops_of_pooled_predictors_of_several_ranks() -> None:
    layer = Layer()
    layers = [trained(layer, 1, r)[0].layers[0] for r in (2, 7)]
    by_hand = [2 * (2 * 8 * D) + 2 * r * (D + F) for r in (2, 7)]
    assert Trained(layers).flops(8, 40, D, F) == sum(by_hand) / 2


def test_flops_grow_with_the_block() -> None:
    layer = Layer()
    selectors: list[Selector] = [trained(layer, 1)[0], Probe("griffin", 8)]
    selectors.append(token_wise(layer, 1)[0])
    for selector in [*selectors, Oracle("griffin")]:
        small, large = (selector.flops(n, 40, D, F) for n in (8, 80))
        assert isinstance(large, float) and small < large


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_a_quantised_layer(score: str) -> None:
    """Norms and activations are those of the quantised weights."""
    layer = Layer()
    mlp = layer.ffn.mlp
    nn.quantize(mlp, 32, 2)
    for name in ("gate", "up", "down"):
        q = mlp[f"{name}_proj"]
        w = mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=2)
        setattr(layer, name, to_numpy(w))
    seen, x, _ = layer.seen()
    wanted = [layer.score(layer.z(b), score) for b in x]
    assert_scores(Oracle(score)(0, layer.ffn, seen), wanted)
