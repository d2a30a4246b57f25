"""Attached models with every kind of predictor and compensator: the engine under each."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from models import BLOCK, HIDDEN
from reference import float64

from mlx_fastforward import ConfigError, PredictorFile, attach, load_predictor
from mlx_fastforward.engine import Engine
from mlx_fastforward.model.ffn import Estimate
from mlx_fastforward.neurons.compensators import Compensator, LowRankCompensator
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.tokens.plan import Plan

TOKENS = 7 * BLOCK + 3
HEAD, STOP = BLOCK, 6 * BLOCK  # the last block and the three odd tokens are the tail
LAYER = 1
KINDS = [("pooled", "low-rank"), ("token-wise", "low-rank")]
KINDS += [("token-wise", None), ("pooled", "mlp")]
Kinds = tuple[str, Optional[str]]


def attach_kinds(model: nn.Module, path: Path, kinds: Kinds) -> Engine:
    side = models.save_random_predictor(model, path, 4, *kinds)
    return attach(model, models.settings(), predictor=load_predictor(side))


def weights(layer: Any) -> dict[str, np.ndarray]:
    return {k: float64(w) for k, w in vars(layer).items() if isinstance(w, mx.array)}


def block_by_hand(
    engine: Any, kinds: Kinds, ffn: list[np.ndarray], x: np.ndarray
) -> np.ndarray:
    """A sparse block with half of the neurons, and what is added for the others."""
    gate, up, down = ffn
    w = weights(engine.selector.layers[LAYER])
    if kinds[0] == "token-wise":
        scores = reference.token_wise(x, w["w1"], w["w2"], w["bias"])
    else:
        scores = reference.predictor(x, w["query"], w["w1"], w["w2"])
    kept = reference.top_k(scores, len(gate) // 2)
    if kinds[1] is None:
        return reference.gated_ffn(x, gate, up, down, kept)
    w = weights(engine.compensator.layers[LAYER])
    if kinds[1] == "mlp":
        added = reference.compensator(x, w["w1"], w["w2"], reference.relu)
        return reference.gated_ffn(x, gate, up, down, kept) + added
    phi = reference.features(x, w["center"], w["v"])
    z = reference.activations(x, gate, up)
    return reference.with_guesses(z, phi, w["u"], kept) @ down.T


X = mx.random.normal((1, TOKENS, HIDDEN), key=mx.random.key(0))


def layer_output(engine: Engine, x: mx.array = X) -> mx.array:
    """A layer's FFN in a prefill of these tokens."""
    call = engine.begin(None, 1, TOKENS, None)
    assert call is not None
    assert call.split.plan == Plan(HEAD, 5, BLOCK, TOKENS - STOP)
    return engine.forward(call, LAYER, x)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_sparse_ffn(kinds: Kinds, bits: int, tmp_path: Path) -> None:
    """Of the layer that is wider than the others."""
    model = models.tiny("llama", wide=192)
    if bits:
        nn.quantize(model, 32, bits)
    engine = attach_kinds(model, tmp_path, kinds)
    found = float64(layer_output(engine)[0])
    names = ("gate_proj", "up_proj", "down_proj")
    ffn = [reference.weight(model.layers[LAYER].mlp[name]) for name in names]
    rows = float64(X[0])
    wanted = reference.gated_ffn(rows, *ffn)
    for i in range(HEAD, STOP, BLOCK):
        block = rows[i : i + BLOCK]
        wanted[i : i + BLOCK] = block_by_hand(engine, kinds, ffn, block)
    assert models.distance(found, wanted) < 1e-5


# Compensators of one's own


class Constant(Compensator):
    """Adds the number of the layer, in float32 whatever the model computes in."""

    name = "own"

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        return mx.full(x.shape, layer, mx.float32)


def attach_own(
    model: nn.Module, compensator: Optional[Compensator], asked: str
) -> Engine:
    predictor = PredictorFile(BaseModel.of(model), compensator=compensator)
    config = models.settings(compensator=asked, selector="first-block")
    return attach(model, config, predictor=predictor)


def test_what_an_own_compensator_returns_is_added() -> None:
    """To the tokens that ran sparsely, and to no others."""
    outs = {}
    for asked in ("auto", "none"):
        engine = attach_own(models.tiny("llama"), Constant(), asked)
        outs[asked] = float64(layer_output(engine)[0])
    added = outs["auto"] - outs["none"]
    assert np.allclose(added[HEAD:STOP], LAYER, atol=1e-5)
    assert not added[:HEAD].any() and not added[STOP:].any()


@pytest.mark.parametrize("kinds", [*KINDS, None], ids=str)
def test_a_bfloat16_model_under_float32_weights(
    kinds: Optional[Kinds], tmp_path: Path
) -> None:
    """Outputs keep the model's dtype, and are those of a float32 copy to rounding."""
    outs = []
    for dtype in (mx.bfloat16, mx.float32):
        model = models.tiny("llama")
        model.set_dtype(mx.bfloat16)  # so that both have the same weights
        model.set_dtype(dtype)
        if kinds is None:
            engine = attach_own(model, Constant(), "auto")
        else:
            engine = attach_kinds(model, tmp_path, kinds)
        y = layer_output(engine, X.astype(mx.bfloat16).astype(dtype))
        assert y.dtype == dtype
        outs.append(float64(y[0]))
    assert models.distance(*outs) < 0.03


@pytest.mark.parametrize("asked", ["auto", "none", "mlp", "low-rank"])
@pytest.mark.parametrize("held", ["mlp", "low-rank", "own", "none", "no file"])
def test_the_compensator_asked_for_must_be_the_predictor_files(
    held: str, asked: str, tmp_path: Path
) -> None:
    """Subclasses are of their kind; auto takes what there is."""

    class MyLowRank(LowRankCompensator):
        pass

    model, predictor = models.tiny("llama"), None
    if held == "mlp":
        side = models.save_random_predictor(model, tmp_path, compensator=held)
        predictor = load_predictor(side)
    elif held != "no file":
        own = {"low-rank": MyLowRank([]), "own": Constant()}.get(held)
        predictor = PredictorFile(BaseModel.of(model), compensator=own)
    config = models.settings(compensator=asked)
    if asked in ("auto", "none", held):
        mine = predictor.compensator if predictor and asked != "none" else None
        assert attach(model, config, predictor=predictor).compensator is mine
        return
    with pytest.raises(ConfigError) as e:
        attach(model, config, predictor=predictor)
    here = "there is none" if held == "no file" else f"this one has {held}"
    assert str(e.value) == (
        f"compensator {asked} needs a predictor file that has one, {here}; "
        "use compensator none or auto."
    )
