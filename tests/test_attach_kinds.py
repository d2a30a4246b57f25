"""Attached models with every kind of predictor and compensator: the engine under each."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear
from models import BLOCK, FFN, HIDDEN, LAYERS
from side_files import one_line

from mlx_fastforward import ConfigError, attach
from mlx_fastforward.engine import Engine
from mlx_fastforward.neurons.compensators import (
    Compensator,
    Estimate,
    LowRankCompensator,
    MLPCompensator,
)
from mlx_fastforward.predictors.file import BaseModel, PredictorFile, load_predictor
from mlx_fastforward.tokens.plan import Plan

TOKENS = 7 * BLOCK + 3
HEAD, STOP = BLOCK, 6 * BLOCK  # the last block and the three odd tokens are the tail
FAMILIES = ["llama", "llama-bias-sliding", "gemma2", "phi3"]
EXACT = [("pooled", "low-rank"), ("token-wise", None), ("token-wise", "low-rank")]
KINDS = [*EXACT, ("pooled", "mlp"), ("token-wise", "mlp")]
Kinds = tuple[str, Optional[str]]


def adapter_of(model: nn.Module, path: Path, kinds: Kinds) -> PredictorFile:
    side = models.save_random_predictor(
        model, path, predictor=kinds[0], compensator=kinds[1]
    )
    return load_predictor(side)


def base(name: str, bits: Optional[int]) -> nn.Module:
    model = models.tiny(name)
    if bits:
        nn.quantize(model, 32, bits)
    return model


def keep_all(engine: Engine) -> None:
    engine.keep = [FFN] * (LAYERS - 1) + [None]


def assert_keeping_all_is_dense(model: nn.Module, engine: Engine) -> None:
    """To rounding, in logits and caches; half of the neurons are not."""
    ids = models.token_ids(TOKENS)
    engine.enabled = False
    wanted, wanted_cache = models.prefill(model, ids)
    engine.enabled = True
    half, _ = models.prefill(model, ids)
    assert models.distance(half[HEAD:], wanted[HEAD:]) > 0.02
    keep_all(engine)
    logits, cache = models.prefill(model, ids)
    assert models.distance(logits, wanted) < 1e-4
    for a, b in zip(models.cached_arrays(cache), models.cached_arrays(wanted_cache)):
        assert models.distance(a, b) < 1e-4


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("kinds", EXACT, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_neurons_kept_equals_dense(
    name: str, kinds: Kinds, bits: Optional[int], tmp_path: Path
) -> None:
    model = base(name, bits)
    predictor = adapter_of(model, tmp_path, kinds)
    assert_keeping_all_is_dense(
        model, attach(model, models.settings(), predictor=predictor)
    )


@pytest.mark.parametrize("selector", ["probe", "first-block", "oracle"])
def test_all_neurons_kept_equals_dense_under_other_selectors(
    selector: str, tmp_path: Path
) -> None:
    """The low-rank compensator knows the neurons whoever chose them."""
    model = models.tiny("llama")
    predictor = adapter_of(model, tmp_path, ("pooled", "low-rank"))
    settings = models.settings(selector=selector)
    engine = attach(model, settings, predictor=predictor)
    assert isinstance(engine.compensator, LowRankCompensator)
    assert_keeping_all_is_dense(model, engine)


def test_all_neurons_kept_equals_dense_in_decode_steps(tmp_path: Path) -> None:
    model = models.tiny("llama")
    predictor = adapter_of(model, tmp_path, ("token-wise", "low-rank"))
    engine = attach(model, models.settings(sparse_decode=True), predictor=predictor)
    logits = {}
    for way in ("dense", "half", "all"):
        engine.enabled = False
        _, cache = models.prefill(model, models.token_ids(TOKENS))
        engine.enabled = way != "dense"
        if way == "all":
            keep_all(engine)
        logits[way], _ = models.prefill(model, [20], cache)
    assert models.distance(logits["all"], logits["dense"]) < 1e-4
    assert models.distance(logits["half"], logits["dense"]) > 0.02


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_all_neurons_kept_equals_dense_once_lora_is_loaded(
    bits: Optional[int], tmp_path: Path
) -> None:
    """Onto biased down projections whose guesses were in use before."""
    model = base("llama-bias-sliding", bits)
    predictor = adapter_of(model, tmp_path, ("pooled", "low-rank"))
    engine = attach(model, models.settings(), predictor=predictor)
    models.prefill(model, models.token_ids(TOKENS))
    for i, layer in enumerate(model.layers):
        lora = LoRALinear.from_base(layer.mlp.down_proj, scale=3.0)
        shape, key = lora.lora_b.shape, mx.random.key(i)
        lora.lora_b = 0.2 * mx.random.normal(shape, key=key)
        layer.mlp.down_proj = lora
    model.eval()
    assert_keeping_all_is_dense(model, engine)


# One layer, in float64


LAYER = 1


def float64(w: mx.array) -> np.ndarray:
    return np.array(w.astype(mx.float32)).astype(np.float64)


def parts(predictor: PredictorFile, part: str) -> dict[str, np.ndarray]:
    """The weights of one layer's predictor or compensator."""
    layers: Any = predictor.layers
    if part == "compensator":
        assert predictor.compensator is not None
        layers = predictor.compensator.layers
    found = vars(layers[LAYER]).items()
    return {k: float64(w) for k, w in found if isinstance(w, mx.array)}


def chosen(predictor: PredictorFile, kind: str, x: np.ndarray, keep: int) -> list[int]:
    w = parts(predictor, "predictor")
    if kind == "token-wise":
        scores = reference.token_wise(x, w["w1"], w["w2"], w["bias"])
    else:
        scores = reference.predictor(x, w["query"], w["w1"], w["w2"])
    return reference.top_k(scores, keep)


def block_by_hand(
    predictor: PredictorFile, kinds: Kinds, ffn: list[np.ndarray], x: np.ndarray
) -> np.ndarray:
    """A sparse block with half of the neurons, and what is added for the others."""
    kept = chosen(predictor, kinds[0], x, FFN // 2)
    gate, up, down = ffn
    if kinds[1] is None:
        return reference.gated_ffn(x, gate, up, down, kept)
    w = parts(predictor, "compensator")
    if kinds[1] == "mlp":
        added = reference.compensator(x, w["w1"], w["w2"], reference.relu)
        return reference.gated_ffn(x, gate, up, down, kept) + added
    phi = reference.features(x, w["center"], w["v"])
    z = reference.activations(x, gate, up)
    return reference.with_guesses(z, phi, w["u"], kept) @ down.T


def layer_output(model: nn.Module, engine: Engine, x: mx.array) -> mx.array:
    """The layer's FFN in a prefill of these tokens."""
    engine.call = engine.begin(1, TOKENS, make_prompt_cache(model), training=False)
    assert engine.call is not None
    assert engine.call.plan == Plan(HEAD, 5, BLOCK, TOKENS - STOP)
    return model.layers[LAYER].mlp(x)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_sparse_ffn(kinds: Kinds, bits: Optional[int], tmp_path: Path) -> None:
    model = base("llama", bits)
    predictor = adapter_of(model, tmp_path, kinds)
    engine = attach(model, models.settings(), predictor=predictor)
    x = mx.random.normal((1, TOKENS, HIDDEN), key=mx.random.key(0))
    found = float64(layer_output(model, engine, x)[0])
    mlp = model.layers[LAYER].mlp
    names = ("gate_proj", "up_proj", "down_proj")
    ffn = [models.float_weight(getattr(mlp, name)) for name in names]
    rows = float64(x[0])
    wanted = reference.gated_ffn(rows, *ffn)
    for i in range(HEAD, STOP, BLOCK):
        block = rows[i : i + BLOCK]
        wanted[i : i + BLOCK] = block_by_hand(predictor, kinds, ffn, block)
    assert models.distance(found, wanted) < 1e-5


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_a_bfloat16_model_under_a_float32_adapter(kinds: Kinds, tmp_path: Path) -> None:
    """Outputs keep the model's dtype, and are those of a float32 copy to rounding."""
    x = mx.random.normal((1, TOKENS, HIDDEN), key=mx.random.key(0))
    x, outs = x.astype(mx.bfloat16), []
    for dtype in (mx.bfloat16, mx.float32):
        model = models.tiny("llama")
        model.set_dtype(mx.bfloat16)  # so that both have the same weights
        model.set_dtype(dtype)
        predictor = adapter_of(model, tmp_path, kinds)
        engine = attach(model, models.settings(), predictor=predictor)
        y = layer_output(model, engine, x.astype(dtype))
        assert y.dtype == dtype
        outs.append(float64(y[0]))
    assert models.distance(*outs) < 0.03


# Which compensator the settings ask for


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, PredictorFile]:
    """By the kind of their compensators."""
    kinds: dict[str, Optional[str]] = {k: k for k in ("mlp", "low-rank")}
    kinds["none"] = None
    model = models.tiny("llama")
    return {
        name: adapter_of(model, tmp_path / name, ("pooled", kind))
        for name, kind in kinds.items()
    }


@pytest.mark.parametrize("asked", ["mlp", "low-rank"])
@pytest.mark.parametrize("held", ["mlp", "low-rank", "none"])
def test_the_compensator_asked_for_must_be_the_adapters(
    saved: dict[str, PredictorFile], asked: str, held: str
) -> None:
    model, settings = models.tiny("llama"), models.settings(compensator=asked)
    if asked == held:
        assert attach(model, settings, predictor=saved[held]).compensator is not None
        return
    with pytest.raises(ConfigError) as e:
        attach(model, settings, predictor=saved[held])
    assert one_line(e.value) == (
        f"compensator {asked} needs a predictor that has one, this one has {held}; "
        "use compensator none or auto."
    )


@pytest.mark.parametrize("asked", ["mlp", "low-rank"])
def test_a_compensator_without_an_adapter_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError) as e:
        attach(models.tiny("llama"), models.settings(compensator=asked))
    assert one_line(e.value) == (
        f"compensator {asked} needs a predictor that has one, there is none; "
        "use compensator none or auto."
    )


@pytest.mark.parametrize(
    "held, kind",
    [
        ("mlp", MLPCompensator),
        ("low-rank", LowRankCompensator),
        ("none", type(None)),
    ],
)
def test_auto_takes_what_there_is_and_none_nothing(
    saved: dict[str, PredictorFile], held: str, kind: type
) -> None:
    found = {
        asked: attach(
            models.tiny("llama"),
            models.settings(compensator=asked),
            predictor=saved[held],
        ).compensator
        for asked in ("auto", "none")
    }
    assert type(found["auto"]) is kind
    assert found["none"] is None


@pytest.mark.parametrize("held", ["mlp", "low-rank"])
def test_compensators_change_what_is_read(
    saved: dict[str, PredictorFile], held: str
) -> None:
    model, outs = models.tiny("llama"), []
    for asked in (held, "none"):
        attach(model, models.settings(compensator=asked), predictor=saved[held])
        outs.append(models.prefill(model, models.token_ids(TOKENS))[0])
    assert models.distance(outs[0][:HEAD], outs[1][:HEAD]) < 1e-5
    assert models.distance(outs[0][HEAD:], outs[1][HEAD:]) > 0.02


# Compensators of one's own


class Constant:
    """Adds the number of the layer."""

    name = "own"

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        return mx.full(x.shape, layer, x.dtype)

    def flops(self, tokens: int, d: int, keep: int) -> float:
        return 0.0


class FirstNumbers(Constant):
    """Guesses neurons from the first three numbers of a token."""

    u = mx.random.normal((FFN, 3), key=mx.random.key(2))

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        return Estimate(x[..., :3], self.u)


class MyLowRank(LowRankCompensator):
    pass


def attach_own(
    model: nn.Module, compensator: Compensator, asked: str = "auto", **more: Any
) -> Engine:
    predictor = PredictorFile(BaseModel.of(model), compensator=compensator)  # type: ignore
    return attach(
        model, models.settings(compensator=asked, **more), predictor=predictor
    )


def test_what_an_own_compensator_returns_is_added() -> None:
    """To the tokens that ran sparsely, and to no others."""
    x = mx.random.normal((1, TOKENS, HIDDEN), key=mx.random.key(0))
    outs = {}
    for asked in ("auto", "none"):
        model = models.tiny("llama")
        engine = attach_own(model, Constant(), asked, selector="first-block")
        outs[asked] = float64(layer_output(model, engine, x)[0])
    added = outs["auto"] - outs["none"]
    assert np.allclose(added[HEAD:STOP], LAYER, atol=1e-5)
    assert not added[:HEAD].any() and not added[STOP:].any()


def test_all_neurons_kept_equals_dense_under_own_guesses() -> None:
    model = models.tiny("llama")
    assert_keeping_all_is_dense(model, attach_own(model, FirstNumbers()))


def test_own_guesses_change_what_is_read() -> None:
    outs = []
    for asked in ("auto", "none"):
        model = models.tiny("llama")
        attach_own(model, FirstNumbers(), asked)
        outs.append(models.prefill(model, models.token_ids(TOKENS))[0])
    assert models.distance(outs[0][HEAD:], outs[1][HEAD:]) > 0.02


@pytest.mark.parametrize("asked", ["mlp", "low-rank"])
def test_own_compensators_are_of_no_other_kind(asked: str) -> None:
    with pytest.raises(ConfigError, match="this one has own; use compensator none"):
        attach_own(models.tiny("llama"), Constant(), asked)


@pytest.mark.parametrize("asked", ["auto", "low-rank"])
def test_subclasses_are_of_their_kind(asked: str) -> None:
    mine = MyLowRank([])
    assert attach_own(models.tiny("llama"), mine, asked).compensator is mine


def test_subclasses_are_of_no_other_kind() -> None:
    with pytest.raises(ConfigError, match="one, this one has low-rank; use"):
        attach_own(models.tiny("llama"), MyLowRank([]), "mlp")
