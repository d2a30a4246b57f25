"""Selectors against their definitions in float64, padding included."""

from typing import Any, Callable, Optional

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import gemma2
from reference import float32, float64

from mlx_fastforward.model.proof import ffn_of
from mlx_fastforward.neurons import selectors
from mlx_fastforward.neurons.predictor import PredictorWeights, parts
from mlx_fastforward.neurons.selectors import FirstBlock, Oracle, Probe, Trained
from mlx_fastforward.tokens.plan import plan_call

D, F, N, HEAD, DENSE = 32, 64, 8, 8, 21
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)
MASKED = pytest.mark.parametrize("masked", [False, True])


class Layer:
    """A GELU-gated FFN, its weights in float64, and calls of it."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.gate, self.up = 0.3 * self.normal(F, D), 0.3 * self.normal(F, D)
        # Columns of unlike norms: a score that forgets them ranks otherwise.
        self.down = self.normal(D, F) * np.exp(self.normal(F))
        mlp = gemma2.MLP(D, F)
        for name in ("gate", "up", "down"):
            mlp[f"{name}_proj"].weight = float32(getattr(self, name))
        ffn = ffn_of(mlp)
        assert ffn is not None
        self.ffn = ffn

    def normal(self, *shape: int) -> np.ndarray:
        """Numbers that float32 holds exactly."""
        return self.rng.normal(size=shape).astype(np.float32).astype(np.float64)

    def z(self, x: np.ndarray) -> np.ndarray:
        return reference.activations(x, self.gate, self.up, reference.gelu_tanh)

    def score(self, x: np.ndarray) -> np.ndarray:
        return reference.weighted(self.z(x), self.down)

    def call(
        self,
        batch: int = 2,
        blocks: int = 3,
        head: int = HEAD,
        masked: bool = False,
        dtype: mx.Dtype = mx.float32,
        memory: Optional[dict] = None,
    ) -> selectors.SelectorInputs:
        """Dense tokens are noisy block tokens, so that likeness has something to find.

        Padding is anywhere, but one token of each block is real and sampled.
        """
        x = self.normal(batch * blocks, N, D)
        like = self.rng.integers(0, blocks * N, (batch, DENSE))
        dense = np.stack([row[i] for row, i in zip(x.reshape(batch, -1, D), like)])
        dense += 0.7 * self.normal(batch, DENSE, D)
        low = [float32(a).astype(dtype) for a in (x, dense)]
        z, valid = float32(self.z(float64(low[1]))), None
        if masked:
            masks = [self.rng.random(a.shape[:2]) < 0.6 for a in (x, dense)]
            for mask in masks:
                mask[:, [0, 5]] = True
            valid = (float32(masks[0]), float32(masks[1]))
        memory = {} if memory is None else memory
        return selectors.SelectorInputs(low[0], low[1], z, head, valid, memory)


def real(inputs: selectors.SelectorInputs, dense: bool = False) -> list[np.ndarray]:
    """The tokens of every block, or of every row's dense part, without padding."""
    x: Any = float64(
        inputs.dense if dense and inputs.dense is not None else inputs.blocks
    )
    if inputs.valid is None:
        return list(x)
    return [a[np.array(v) > 0] for a, v in zip(x, inputs.valid[dense])]


def assert_scores(found: mx.array, wanted: list, tolerance: float = 1e-4) -> None:
    """Close for every block, relative to the block's largest score."""
    assert found.shape == (len(wanted), F)
    difference = np.abs(float64(found) - np.stack(wanted))
    assert np.all(difference <= tolerance * np.max(wanted, axis=-1, keepdims=True))


@given(st.data())
def test_top_neurons(data: st.DataObject) -> None:
    """The true top K, ascending; ties may fall either way."""
    f = data.draw(st.integers(1, 24))
    keep = data.draw(st.integers(1, f))
    row = st.lists(st.integers(-6, 6), min_size=f, max_size=f)
    scores = np.array(data.draw(st.lists(row, min_size=1, max_size=3)), np.float64)
    found = np.array(selectors.top_neurons(float32(scores), keep))
    assert found.shape == (len(scores), keep)
    for neurons, values in zip(found, scores):
        assert np.all(np.diff(neurons.astype(int)) > 0)
        best = values[reference.top_k(values, keep)]
        assert sorted(values[neurons]) == sorted(best)


def test_large_half_precision_activations() -> None:
    """Squares of float16 activations overflow; their norms must not."""
    layer = Layer()
    z = mx.array(1000 * layer.normal(2, N, F)).astype(mx.float16)
    wanted = [reference.weighted(b, layer.down) for b in float64(z)]
    assert_scores(selectors.neuron_scores(z, layer.ffn), wanted)


@MASKED
def test_oracle(masked: bool) -> None:
    layer = Layer()
    inputs = layer.call(masked=masked)
    wanted = [layer.score(b) for b in real(inputs)]
    assert_scores(Oracle().score(0, layer.ffn, inputs), wanted)


@MASKED
@DTYPES
@pytest.mark.parametrize("batch, blocks", [(1, 1), (2, 3)])
def test_probe(masked: bool, dtype: mx.Dtype, batch: int, blocks: int) -> None:
    """Likeness depends on directions only, however large the normed inputs are."""
    layer = Layer()
    inputs: Any = layer.call(batch, blocks, masked=masked, dtype=dtype)
    dense, wanted = real(inputs, dense=True), []
    for i, block in enumerate(float64(inputs.blocks)):
        valid = np.ones(N) if inputs.valid is None else np.array(inputs.valid[0][i])
        x = dense[i // blocks]
        wanted.append(reference.probe(block, valid, x, layer.z(x), layer.down))
    inputs.blocks, inputs.dense = 60 * inputs.blocks, 60 * inputs.dense
    limit = 1e-4 if dtype == mx.float32 else 0.05
    assert_scores(Probe().score(0, layer.ffn, inputs), wanted, limit)


@DTYPES
def test_probe_of_what_says_nothing(dtype: mx.Dtype) -> None:
    """Zeros, dense tokens that are all padding, real tokens that are not sampled."""
    layer = Layer()
    inputs: Any = layer.call(masked=True, dtype=dtype)
    inputs.valid[1][0] = 0
    inputs.valid[0][0] = mx.array([0, 0, 0, 0, 0, 0, 1, 1])
    inputs.dense[1, 3] = inputs.blocks[1, 2] = 0
    scores = float64(Probe().score(0, layer.ffn, inputs))
    assert np.all(np.isfinite(scores)) and np.all(scores.max(axis=-1) > 0)


@pytest.mark.parametrize("head", [HEAD, 0])
@MASKED
def test_first_block(head: int, masked: bool) -> None:
    """The row's head, or its first sparse block where no dense head begins the prompt."""
    layer = Layer()
    inputs: Any = layer.call(masked=masked, head=head)
    found = FirstBlock().score(0, layer.ffn, inputs)
    if head:
        inputs.dense = inputs.dense[:, :head]
        if masked:
            inputs.valid = [mask[:, :head] for mask in inputs.valid]
    first = real(inputs, dense=True) if head else real(inputs)[::3]
    a, b = map(layer.score, first)
    assert_scores(found, [a] * 3 + [b] * 3)


def test_first_block_remembers_a_prompt() -> None:
    """In its memory, until a new prompt begins there or rows of a batch go."""
    layer, memory = Layer(), {}  # type: ignore[var-annotated]

    def scores(**call: Any) -> tuple[mx.array, list, list]:
        inputs = layer.call(**call)
        found = FirstBlock().score(0, layer.ffn, inputs)
        return found, real(inputs), [row[:HEAD] for row in real(inputs, dense=True)]

    first, _, _ = scores(memory=memory)
    later, _, _ = scores(blocks=1, head=0, memory=memory)
    assert mx.array_equal(later, first[::3])
    other, x, _ = scores(head=0, memory={})
    assert_scores(other[::3], [layer.score(x[i]) for i in (0, 3)])
    again, _, heads = scores(memory=memory)
    assert_scores(again[::3], list(map(layer.score, heads)))
    fewer, x, _ = scores(batch=1, head=0, memory=memory)
    assert_scores(fewer, [layer.score(x[0])] * 3)


# Trained predictors


def pooled(layer: Layer, r: int = 4) -> tuple[PredictorWeights, list[np.ndarray]]:
    w = [layer.normal(D), layer.normal(D, r), layer.normal(r, F)]
    query, w1, w2 = map(float32, w)
    return PredictorWeights(query, w1, w2), w


def token_wise(layer: Layer, r: int = 4) -> tuple[PredictorWeights, list[np.ndarray]]:
    w = [layer.normal(D, r), layer.normal(2 * r, F), layer.normal(F)]
    w1, w2, bias = map(float32, w)
    return PredictorWeights(None, w1, w2, bias=bias), w


KINDS = pytest.mark.parametrize(
    "make, equations",
    [(pooled, reference.predictor), (token_wise, reference.token_wise)],
)


@KINDS
@DTYPES
@MASKED
def test_trained(
    make: Callable, equations: Callable, masked: bool, dtype: mx.Dtype
) -> None:
    """Each layer's own weights, in the predictor's own precision; eight tokens or one."""
    layer = Layer()
    made = [make(layer) for _ in range(2)]
    selector = Trained([weights for weights, _ in made])
    inputs = layer.call(masked=masked, dtype=dtype)
    for _ in range(2):
        for i, (_, w) in enumerate(made):
            wanted = [equations(b, *w) for b in real(inputs)]
            assert np.max(np.abs(wanted)) > 1  # the ReLU lets something through
            found = selector.score(i, layer.ffn, inputs)
            assert found.dtype == mx.float32
            assert_scores(found, wanted)
        inputs.blocks, inputs.valid = inputs.blocks[:, :1], None  # sparse decode


@DTYPES
def test_token_wise_weights_of_any_precision(dtype: mx.Dtype) -> None:
    """Squares of large hidden units overflow float16; their root mean square must not."""
    layer = Layer()
    w1, w2, bias = (float32(w).astype(dtype) for w in token_wise(layer)[1])
    inputs = layer.call(dtype=dtype)
    inputs.blocks = 60 * inputs.blocks
    selector = Trained([PredictorWeights(None, w1, w2, bias=bias)])
    x, low = float64(inputs.blocks), [float64(w) for w in (w1, w2, bias)]
    assert max(reference.relu(b @ low[0]).max() for b in x) > 256  # squared > 65504
    wanted = [reference.token_wise(b, *low) for b in x]
    limit = 1e-4 if dtype == mx.float32 else 0.02
    assert_scores(selector.score(0, layer.ffn, inputs), wanted, limit)


@KINDS
@pytest.mark.parametrize("padded", [0, 128, 192, 384])
def test_large_blocks_take_the_best_part(
    make: Callable, equations: Callable, padded: int
) -> None:
    """Parts of 128 tokens, of which one of nothing but padding has no say.

    A whole block of nothing but padding is called real by the engine.
    """
    layer = Layer()
    (weights, w), x, valid = make(layer), 3 * layer.normal(2, 384, D), np.ones((2, 384))
    valid[1, 384 - padded :] = 0
    masks = (selectors.at_least_one(float32(valid)), mx.ones((2, 0)))
    inputs = selectors.SelectorInputs(float32(x), valid=masks if padded else None)
    wanted = [
        np.max([equations(row[i : i + 128], *w) for i in range(0, len(row), 128)], 0)
        for row in (x[0], x[1, : 384 - padded % 384])
    ]
    found = Trained([weights]).score(0, layer.ffn, inputs)
    assert np.allclose(float64(found), wanted, rtol=1e-4, atol=1e-3)


@given(block=st.integers(8, 4096), tokens=st.integers(8, 4096))
def test_parts_and_units(block: int, tokens: int) -> None:
    """Parts are equal, about 128 tokens in the blocks of a plan; probes divide a block."""
    assert block % parts(block) == 0
    for selector in (Trained([]), Probe(), FirstBlock(), Oracle()):
        new, edge, unit = tokens + 8 * block, min(block, 128), selector.unit(block)
        plan = plan_call(new, block, cached=0, edge=edge, unit=unit)
        assert plan is not None and plan.block_size % unit == 0
        if selector.probe_every:
            assert plan.block_size % selector.probe_every == 0
        elif block >= 128 and isinstance(selector, Trained):
            assert 64 <= plan.block_size / parts(plan.block_size) <= 256
