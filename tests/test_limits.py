"""The limit against a count of every multiplication, token by token and layer by layer."""

from typing import Any

import mlx.nn as nn
import models
import pytest

from mlx_fastforward import PrefillConfig, attach
from mlx_fastforward.engine import Engine
from mlx_fastforward.tokens.flops import (
    Shape,
    dense_cost,
    ideal_speedup,
    roofline_speedup,
    sparse_cost,
)

D, F, LAYERS = models.HIDDEN, models.FFN, models.LAYERS
HEADS, KV_HEADS, HEAD = 4, 2, 8


def engine(**settings: Any) -> Engine:
    settings.setdefault("block_size", 16)
    return attach(models.tiny("llama"), PrefillConfig(**settings))


@pytest.mark.parametrize("name", models.NAMES)
def test_shapes(name: str) -> None:
    shape = Shape.of(models.tiny(name))
    assert (shape.layers, shape.hidden, shape.ffn) == (LAYERS, D, F)
    assert (shape.heads, shape.kv_heads) == (HEADS, KV_HEADS)
    assert (shape.weight_bytes, shape.float_bytes) == (4.0, 4)


@pytest.mark.parametrize("bits, wanted", [(4, 4 / 8 + 8 / 32), (8, 1 + 8 / 32)])
def test_bytes_of_quantised_weights(bits: int, wanted: float) -> None:
    """Scales and biases of 32 weights take 8 bytes."""
    model = models.tiny("llama")
    nn.quantize(model, 32, bits)
    assert Shape.of(model).weight_bytes == pytest.approx(wanted)


def test_dense_flops_by_hand() -> None:
    """The last layer has keys and values only: nothing else of it is ever asked for."""
    tokens, whole = 100, LAYERS - 1
    cost = dense_cost(Shape.of(models.tiny("llama")), tokens)
    qkvo = 2 * D * HEAD * (HEADS + KV_HEADS)
    keys_and_values = 2 * D * HEAD * KV_HEADS
    pairs = sum(i + 1 for i in range(tokens))
    assert cost.flops == {
        "projections": 2 * tokens * (whole * qkvo + keys_and_values),
        "attention": 2 * 2 * pairs * HEADS * HEAD * whole,
        "ffn": 2 * tokens * 3 * D * F * whole,
    }


@pytest.mark.parametrize("tokens", [520, 2049, 3000, 4096])
@pytest.mark.parametrize("selector", ["probe", "first-block"])
@pytest.mark.parametrize("block", [16, 512])
def test_ffn_flops_are_those_that_the_engine_counts(
    tokens: int, selector: str, block: int
) -> None:
    """Its tally, fed with the calls of mlx-lm: chunks of 2,048, the last token alone."""
    running = engine(selector=selector, block_size=block)
    with running.prompt(tokens) as tally:
        cache: list[Any] = [type("Cache", (), {"offset": 0})()]
        done = 0
        while done < tokens:
            new = min(2048, tokens - 1 - done) or 1
            running.begin(1, new, cache, False)
            done += new
            cache[0].offset = done
    cost = sparse_cost(Shape.of(models.tiny("llama")), tokens, running)
    mine = cost.flops["ffn"] + cost.flops["selection"] + cost.flops["compensation"]
    assert mine == pytest.approx(tally.run)
    assert (
        dense_cost(Shape.of(models.tiny("llama")), tokens).flops["ffn"] == tally.dense
    )


def test_short_prompts_and_sparsity_0_allow_nothing() -> None:
    shape = Shape.of(models.tiny("llama"))
    assert ideal_speedup(shape, 40, engine()) == 1
    assert ideal_speedup(shape, 400, engine(sparsity=0.0)) == 1


def test_more_sparsity_allows_more() -> None:
    shape = Shape.of(models.tiny("llama"))
    found = [
        ideal_speedup(shape, 400, engine(sparsity=s, selector="first-block"))
        for s in (0.25, 0.5, 0.75)
    ]
    assert 1 < found[0] < found[1] < found[2]


def test_roofline() -> None:
    """Endless bandwidth leaves the FLOPs; with little of it copies make it slower than dense."""
    shape = Shape.of(models.tiny("llama"))
    one = engine(selector="first-block")
    ideal = ideal_speedup(shape, 400, one)
    assert roofline_speedup(shape, 400, one, 1e12, 1e30) == pytest.approx(ideal)
    assert roofline_speedup(shape, 400, one, 1e30, 1e9) < 1


def test_gathered_bytes_by_hand() -> None:
    """Read and written: three matrices of the kept neurons per block and layer."""
    one = engine(
        selector="first-block", sparsity=0.5, dense_head=False, strategy="columns"
    )
    cost = sparse_cost(Shape.of(models.tiny("llama")), 16 * 9 + 1, one)
    assert cost.bytes["gather"] == 2 * 4 * (3 * D * (F // 2)) * (LAYERS - 1) * 8
