"""Every model file of the installed mlx-lm: attached, is it still itself, and right where sparse?

The reference is the stock model with the dropped neurons' activations set to zero on their way into
the down projections: it shares nothing with the gathers, nor with how activations are found.
"""

import copy
from typing import Any, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from models import BLOCK, settings, token_ids
from reference import float64

from mlx_fastforward import UnsupportedModel, attach, detach
from mlx_fastforward.attachment import watched
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.engine import Engine
from mlx_fastforward.model.caches import is_empty, memory_of, valid_tokens
from mlx_fastforward.model.families import prefilled
from mlx_fastforward.tokens.plan import Plan

FIRST, SECOND = 40, 32  # tokens of two calls
REFUSED = {
    *("bitnet", "dbrx", "ernie4_5_moe", "gpt_oss", "granitemoe", "lille-130m", "mamba"),
    *("mamba2", "mellum", "minimax", "mixtral", "muse_spark", "olmoe", "phimoe"),
    *("phixtral", "qwen3_moe", "qwen3_vl_moe", "rwkv7"),
}
BUILT = [n for n in [*zoo.names(), *zoo.KINDS] if n not in zoo.UNBUILT]
SPARSE = [n for n in BUILT if n not in {*REFUSED, *zoo.NOT_RUN}]


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """Compiling a fused activation on a CPU takes seconds of a C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


Run = tuple[list[np.ndarray], list[list[np.ndarray]]]  # logits and cache arrays per call


def state(cache: list[Any]) -> list[np.ndarray]:
    arrays = [a for _, a in tree_flatten([c.state for c in cache])]
    return [np.array(a) for a in arrays if isinstance(a, mx.array)]


def run(model: nn.Module, ids: mx.array, cache: Any = None) -> Run:
    """Two calls of one prompt."""
    cache = make_prompt_cache(model) if cache is None else cache
    logits, states = [], []
    for part in (ids[:, :FIRST], ids[:, FIRST:]):
        out = model(part, cache=cache)
        mx.eval(out, [c.state for c in cache])
        logits.append(np.array(out))
        states.append(state(cache))
    return logits, states


def apart(a: Run, b: Run) -> float:
    """Largest difference of logits and caches, relative to the largest entry of each."""
    pairs = [*zip(a[0], b[0]), *((x, y) for s, t in zip(a[1], b[1]) for x, y in zip(s, t))]
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float(np.abs(x - y).max() / (np.abs(y).max() + 1e-9)) for x, y in pairs if x.size)


def by_hand(model: nn.Module, engine: Engine, ids: mx.array) -> Run:
    """The stock model, with each block's neurons chosen by the activations themselves."""
    plans: list[Plan] = []
    for new, empty in ((FIRST, True), (SECOND, False)):
        plan = engine.plan(new, empty, None)
        assert plan is not None and plan.blocks > 1
        plans.append(plan)

    def masked(i: int, own: Any, z: mx.array) -> mx.array:
        """z: (1, tokens, f), as it comes to a down projection."""
        plan = next(p for p in plans if p.tokens == z.shape[1])
        values, keep = np.array(z), engine.keep[i]
        down = float64(engine.ffns[i].down.weight)
        for start in range(plan.start, plan.stop, plan.block_size):
            block = values[0, start : start + plan.block_size]
            if keep is not None:
                scores = reference.weighted(block.astype(np.float64), down)
                block[:, np.argsort(scores)[:-keep]] = 0
        return own(mx.array(values))

    with watched([ffn.down for ffn in engine.ffns], masked):
        return run(model, ids)


def batch_cache(model: nn.Module, padding: list[int]) -> list[Any]:
    """Empty caches of a batch as mlx-lm's server makes them."""
    from mlx_lm.generate import _make_cache

    return _make_cache(model, padding, None)


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in tree_flatten(model.parameters())]


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_as_by_hand_and_dense_as_stock(name: str) -> None:
    model = zoo.tiny(name)
    ids = mx.array([token_ids(FIRST + SECOND, vocab=zoo.VOCAB)])
    stock, before, paths = run(model, ids), kinds(model), names_of(model)

    attach(model, settings(sparsity=0))
    assert apart(run(model, ids), stock) == 0
    engine = attach(model, settings(selector="oracle"))
    assert names_of(model) == paths
    assert all(k < f for k, (_, f) in prefilled([*zip(engine.keep, engine.shapes)]))
    found = run(model, ids)
    again = run(copy.deepcopy(model), ids)
    engine.keep = [k and f for k, (_, f) in zip(engine.keep, engine.shapes)]
    assert apart(run(model, ids), stock) < 1e-4
    detach(model)
    assert kinds(model) == before and apart(run(model, ids), stock) == 0

    engine = attach(model, settings(selector="oracle"))
    detach(model)
    wanted = by_hand(model, engine, ids)
    assert apart(found, wanted) < 1e-3 < 1e-2 < apart(found, stock)
    assert apart(again, found) == 0
