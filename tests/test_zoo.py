"""Every model file of the installed mlx-lm: attached, is it still itself, and right where sparse?

The reference is the stock model with the dropped neurons' activations set to zero on their way into
the down projections: it shares nothing with the gathers, nor with how activations are found.
"""

import copy
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from mlx.utils import tree_flatten
from mlx_lm.generate import _merge_caches
from mlx_lm.models.cache import make_prompt_cache
from models import BLOCK, settings, token_ids
from reference import float64

from mlx_fastforward import UnsupportedModel, attach, detach
from mlx_fastforward.attachment import watched
from mlx_fastforward.bench.inspect.inspection import inspect
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.bench.studies.models import REFUSED, row, verdict
from mlx_fastforward.engine import Engine
from mlx_fastforward.model.caches import cached_tokens, is_empty, valid_tokens
from mlx_fastforward.model.families import prefilled
from mlx_fastforward.model.proof import reach
from mlx_fastforward.tokens.plan import Plan
from mlx_fastforward.train.importance import importances

FIRST, SECOND = 40, 32  # tokens of two calls
PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
BUILT = [n for n in [*zoo.names(), *zoo.KINDS] if n not in zoo.UNBUILT]


Run = list[tuple[np.ndarray, list[np.ndarray]]]  # logits and cached arrays of each call


def call(model: nn.Module, ids: mx.array, cache: list[Any]) -> tuple:
    logits = model(ids, cache=cache)
    state = [c.state for c in cache]
    mx.eval(logits, state)
    arrays = [np.array(a) for _, a in tree_flatten(state) if isinstance(a, mx.array)]
    return np.array(logits), arrays


def run(model: nn.Module, ids: mx.array, calls: int = 2) -> Run:
    """A prompt in two calls, or the first of them."""
    cache = make_prompt_cache(model)
    parts = (ids[:, :FIRST], ids[:, FIRST:])[:calls]
    found = [call(model, part, cache) for part in parts]
    assert cached_tokens(cache) == sum(part.shape[1] for part in parts)
    assert not is_empty(cache)
    return found


def apart(a: Run, b: Run) -> float:
    """Largest difference of logits and caches, relative to the largest entry of each."""
    pairs = []
    for (x, xs), (y, ys) in zip(a, b):
        pairs += [(x, y), *zip(xs, ys, strict=True)]
    assert all(x.shape == y.shape and np.isfinite(x).all() for x, y in pairs)
    scales = [np.abs(y).max(initial=1e-9) for _, y in pairs]
    return max(np.abs(x - y).max(initial=0) / s for (x, y), s in zip(pairs, scales))


def by_hand(model: nn.Module, engine: Engine, ids: mx.array) -> Run:
    """The stock model, with each block's neurons chosen by the activations themselves."""
    plans: list[Plan] = []
    for new, cached in ((FIRST, 0), (SECOND, FIRST)):
        plan = engine.plan(new, cached, None)
        assert plan is not None and plan.blocks > 1
        plans.append(plan)

    def masked(i: int, own: Any, z: mx.array) -> mx.array:
        """z: (1, tokens, f) or (tokens, f), as it comes to a down projection."""
        values = np.array(z)
        rows, keep = values.reshape(-1, values.shape[-1]), engine.keep[i]
        plan = next(p for p in plans if p.tokens == len(rows))
        down = float64(engine.ffns[i].down.weight)
        for start in range(plan.start, plan.stop, plan.block_size):
            block = rows[start : start + plan.block_size]
            if keep is not None:
                scores = reference.weighted(block.astype(np.float64), down)
                block[:, np.argsort(scores)[:-keep]] = 0
        return own(mx.array(values))

    with watched([ffn.down for ffn in engine.ffns], masked):
        return run(model, ids)


def check_batch(
    model: nn.Module, engine: Engine, ids: mx.array, row: np.ndarray
) -> None:
    """Two rows, the second padded by a block: the first is what it is alone."""
    padded = mx.concatenate([ids, ids])[:, :FIRST]
    try:
        caches = _merge_caches([make_prompt_cache(model) for _ in range(2)])
    except ValueError:  # mlx-lm cannot batch these caches
        return
    for c in caches:
        c.prepare(lengths=[FIRST, FIRST - BLOCK], right_padding=[0, BLOCK])
    valid = valid_tokens(caches, 2, FIRST)
    assert valid is not None and valid[0].min() == 1 and is_empty(caches)
    assert valid[1].tolist() == [1.0] * (FIRST - BLOCK) + [0.0] * BLOCK
    logits = np.array(model(padded, cache=caches))
    assert reference.distance(mx.array(logits[0]), row[0].astype(np.float64)) < 1e-3
    assert np.isfinite(logits[:, : FIRST - BLOCK]).all() and not is_empty(caches)


@pytest.mark.parametrize("name", BUILT)
def test_sparse_as_by_hand_and_dense_as_stock(name: str) -> None:
    model = zoo.tiny(name)
    before, paths = kinds(model), names_of(model)
    assert row(name, model) in PAGE  # out of date: see bench/studies/models.py
    if verdict(model)[0] == REFUSED:
        with pytest.raises(UnsupportedModel, match="model type .* is not supported: "):
            attach(model)
        assert kinds(model) == before
        return
    attach(model, settings(sparsity=0))
    if name in zoo.NOT_RUN:
        return
    ids = mx.array([token_ids(FIRST + SECOND, vocab=zoo.VOCAB)])
    same = run(model, ids, 1)
    detach(model)
    stock = run(model, ids)
    assert apart(same, stock) == 0

    engine = attach(model, settings(selector="oracle"))
    assert names_of(model) == paths  # what is saved and loaded
    assert all(k < f for k, (_, f) in prefilled([*zip(engine.keep, engine.shapes)]))
    found = run(model, ids)
    assert apart(run(copy.deepcopy(model), ids, 1), found) == 0
    if name != "gpt_bigcode":  # wants one position for all rows
        check_batch(model, engine, ids, found[0][0])
    keep_all(engine)
    assert apart(run(model, ids), stock) < 1e-4
    detach(model)
    assert kinds(model) == before

    engine = attach(model, settings(selector="oracle"))
    detach(model)
    assert apart(found, by_hand(model, engine, ids)) < 1e-3 < 1e-2 < apart(found, stock)


LAST = ["llama", "gemma3n", "gemma4_text", "nemotron_h", "nemotron-nas", "afm7"]


@pytest.mark.parametrize("name", LAST)
def test_a_prefill_runs_all_ffns_but_the_last(name: str) -> None:
    """What is left out of budgets and FLOPs is what no cache depends on, and nothing else."""
    for i, spoilt in ((-1, False), (-2, True)):
        model = zoo.tiny(name)
        down = reach(model).ffns[i].down
        down.weight = mx.full(down.weight.shape, mx.nan)
        ids = mx.array([token_ids(FIRST, vocab=zoo.VOCAB)])
        arrays = call(model, ids, make_prompt_cache(model))[1]
        assert any(np.isnan(a).any() for a in arrays) == spoilt


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n", "qwen3_5", "longcat_flash"])
def test_importances_are_one_per_ffn(name: str) -> None:
    """Where layers have none that a prefill runs, or two."""
    model = zoo.tiny(name)
    found = importances(model, [mx.array(token_ids(FIRST, vocab=zoo.VOCAB))], BLOCK)
    engine = attach(model, settings(schedule="auto"), importances=found)
    assert len(found) == len(engine.ffns) and engine.schedule == "layerwise"


ODD = ["gemma4_text, experts", "nemotron_h", "qwen3_5", "deepseek_v41"]


@pytest.mark.parametrize("name", ODD)
def test_inspect_looks_at_every_ffn(name: str) -> None:
    """Layers without one, layers that return more, experts that join rows and tokens."""
    model = zoo.tiny(name)
    engine = attach(model, settings())
    detach(model)
    ids = mx.array(token_ids(60, vocab=zoo.VOCAB))
    found = inspect(model, ids, engine, None, lambda: None)
    assert len(found.layers) == len(prefilled(engine.ffns))
    assert all(0 < x.error < 1 and 0.5 <= x.recall <= 1 for x in found.layers)


def test_ffns_that_stay_dense_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"each by itself: 1 \(MLP\); they stay dense"):
        attach(zoo.tiny("gemma3n"))


def test_the_page_has_every_model_file() -> None:
    labels = re.findall(r"^\| `(.*?)`(?: \((.*)\))? \|", PAGE, re.M)
    named = {", ".join(filter(None, label)) for label in labels}
    assert named == {*BUILT, *zoo.UNBUILT}


@pytest.mark.parametrize("i", range(len(BUILT)))
def test_quantised(i: int) -> None:
    """4 bits and mxfp4 in turns."""
    model, mode = zoo.tiny(BUILT[i]), ["affine", "mxfp4"][i % 2]
    if BUILT[i] in zoo.NOT_RUN or verdict(model)[0] == REFUSED:
        return
    for layer in model.layers:
        nn.quantize(layer, 32, 4, mode=mode, class_predicate=whole_groups)
    ids = mx.array([token_ids(FIRST, vocab=zoo.VOCAB)])
    stock = run(model, ids, 1)
    engine = attach(model, settings())
    found = run(model, ids, 1)
    keep_all(engine)
    assert apart(run(model, ids, 1), stock) < 1e-3 < 1e-2 < apart(found, stock)


def whole_groups(path: str, module: nn.Module) -> bool:
    """Float32 stays what the others compute in: embeddings would say otherwise."""
    return type(module) is nn.Linear and module.weight.shape[-1] % 32 == 0


def keep_all(engine: Engine) -> None:
    """Every neuron, but through the sparse path."""
    engine.keep = [k and f for k, (_, f) in zip(engine.keep, engine.shapes)]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in tree_flatten(model.parameters())]


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]
