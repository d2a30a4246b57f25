"""attach() and detach() on every supported architecture."""

import copy
import inspect
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import does_model_support_input_embeddings
from models import BLOCK, FFN, LAYERS, NAMES, WITH_EMBEDDINGS, prefill, settings, tiny

from mlx_fastforward import (
    ConfigError,
    PrefillConfig,
    UnsupportedModel,
    attach,
    detach,
    tune,
)
from mlx_fastforward.attachment import engine_of, is_enabled, seated, switched
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.engine import Engine

TOKENS = 7 * BLOCK + 3
IDS = models.token_ids(TOKENS)
HEAD, STOP = BLOCK, 6 * BLOCK  # the last block and the three odd tokens are the tail
LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}
SELECTORS = ["probe", "first-block", "oracle"]
WIDE = 192


def pair(name: str = "llama", **more: Any) -> tuple[nn.Module, nn.Module]:
    return tiny(name, **more), tiny(name, **more)


def state(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Class and attributes of every module of a model."""
    return [(k, type(m), dict(m.__dict__)) for k, m in model.named_modules()]


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def train_lora(model: nn.Module) -> None:
    """LoRA as mlx-lm loads it, with B trained: its initial zeros would not show."""
    linear_to_lora_layers(model, LAYERS, LORA)
    key = mx.random.key(5)
    for _, m in model.named_modules():
        if isinstance(m, LoRALinear):
            key, a, b = mx.random.split(key, 3)
            m.lora_a = 0.2 * mx.random.normal(m.lora_a.shape, key=a)
            m.lora_b = 0.2 * mx.random.normal(m.lora_b.shape, key=b)
    model.eval()


def assert_dense(model: nn.Module, plain: nn.Module, n: int = TOKENS) -> None:
    """Logits and caches of both models agree to the last bit."""
    models.assert_close(prefill(model, IDS[:n]), prefill(plain, IDS[:n]), 0)


def assert_sparse(model: nn.Module, plain: nn.Module) -> None:
    """The dense head agrees to rounding; what follows differs, and visibly."""
    logits, wanted = prefill(model, IDS)[0], prefill(plain, IDS)[0]
    assert models.distance(logits[:HEAD], wanted[:HEAD]) < 1e-4
    assert models.distance(logits[HEAD:], wanted[HEAD:]) > 0.02


def assert_whole(model: nn.Module, engine: Engine, plain: nn.Module) -> None:
    """With all neurons kept, the sparse path is the dense model to rounding."""
    engine.keep = [f for _, f in engine.shapes[:-1]] + [None]
    models.assert_close(prefill(model, IDS), prefill(plain, IDS))


@pytest.mark.parametrize("name", NAMES)
def test_what_stays_bit_identical(name: str) -> None:
    """Sparsity 0, short calls, training, and each token after a sparse prefill."""
    model, plain = pair(name)
    attach(model, settings(sparsity=0.0), importances=[1.0, 8.0, 1.0, 5.0])
    assert_dense(model, plain)
    attach(model, settings())
    assert_sparse(model, plain)
    assert_dense(model, plain, 3 * BLOCK - 1)
    model.train()
    assert_dense(model, plain)
    model.eval()
    with switched(model, False), switched(plain, True):  # nothing to a plain model
        assert_dense(model, plain)
    assert is_enabled(model) and not is_enabled(plain)
    _, cache = prefill(model, IDS)
    same = copy.deepcopy(cache)
    for token in models.token_ids(3, seed=1):
        got, wanted = prefill(model, [token], cache), prefill(plain, [token], same)
        np.testing.assert_array_equal(got[0], wanted[0])


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_the_forward_written_by_hand(name: str) -> None:
    model, plain = pair(name)
    engine = attach(model, settings(selector="oracle"))
    assert engine.keep == [FFN // 2] * (LAYERS - 1) + [None]
    hand = models.by_hand(plain, name, HEAD, STOP, FFN // 2)
    models.assert_close(prefill(model, IDS), prefill(hand, IDS))
    assert_sparse(model, plain)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_kept_equals_dense_to_rounding(name: str, selector: str) -> None:
    model, plain = pair(name)
    assert_whole(model, attach(model, settings(selector=selector)), plain)


def test_layers_of_other_widths() -> None:
    """Budgets and neurons are those of each layer's own width."""
    model, plain = pair(wide=WIDE)
    engine = attach(model, settings(selector="oracle"))
    assert engine.keep == [FFN // 2, WIDE // 2, FFN // 2, None]
    hand = models.by_hand(plain, "llama", HEAD, STOP, engine.keep)
    models.assert_close(prefill(model, IDS), prefill(hand, IDS))
    for selector in SELECTORS:
        engine = attach(model, settings(selector=selector))
        assert_sparse(model, plain)
        assert_whole(model, engine, plain)
    given = settings(selector="first-block", schedule="auto")
    engine = attach(model, given, importances=[4, 1, 1, 9])
    assert engine.keep == [None, 48, 32, None]  # (0.5 * 3 - 1) / 2 = 1/4 each


@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_everything(name: str, tmp_path: Path) -> None:
    """However often attached; until then signature and saved weights are the model's."""
    model, plain = pair(name)
    before, own = state(model), weights(model)
    signature = inspect.signature(model.__call__)
    for sparsity in (0.25, 0.75):
        device = DeviceSettings(attention_block=16)
        engine = attach(model, settings(sparsity=sparsity), device=device)
    assert engine_of(model) is engine
    assert engine.keep == [FFN // 4] * (LAYERS - 1) + [None]
    assert_sparse(model, plain)
    assert inspect.signature(model.__call__) == signature
    assert does_model_support_input_embeddings(model) == (name in WITH_EMBEDDINGS)
    model.save_weights(str(tmp_path / "w.safetensors"))
    for _ in range(2):
        detach(model)
        assert state(model) == before
    assert list(weights(model)) == list(own)
    assert all(w is own[k] for k, w in weights(model).items())
    model.load_weights(str(tmp_path / "w.safetensors"), strict=True)
    assert_dense(model, plain)


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_input_embeddings_are_prefilled_sparsely(name: str) -> None:
    """As keyword and by position, with and without token ids beside them; no cache."""
    model, plain = pair(name)
    attach(model, settings())
    ids = mx.array([IDS])

    def embeddings() -> mx.array:  # anew each time: Gemma 3 scales its input in place
        return mx.random.normal((1, TOKENS, models.HIDDEN), key=mx.random.key(4))

    wanted = np.array(plain(ids, input_embeddings=embeddings())[0])
    by_name = np.array(model(ids, input_embeddings=embeddings())[0])
    assert models.distance(by_name[:HEAD], wanted[:HEAD]) < 1e-4
    assert models.distance(by_name[HEAD:], wanted[HEAD:]) > 0.02
    by_place = model(ids[:, :0], None, embeddings())
    alone = model(ids[:, :0], input_embeddings=embeddings())
    for out in (by_place, alone):
        np.testing.assert_array_equal(np.array(out[0]), by_name)


def test_an_engine_can_be_seated_for_a_while_and_on_another_device() -> None:
    """What tuning does: the same engine under other settings, each in turn."""
    model, plain = pair()
    before = state(model)
    engine = attach(model, PrefillConfig(selector="oracle"))
    detach(model)
    tuned = engine.on(DeviceSettings(block_size=BLOCK, strategy="columns"))
    assert (tuned.block_size, engine.block_size) == (BLOCK, 128)
    with seated(model, tuned):
        assert engine_of(model) is tuned
        assert tuned.settings()["strategy"] == tuned.ffns[0].strategy == "columns"
        assert_sparse(model, plain)
    for dense in ({"dense": True}, {"shortest": TOKENS + 1}):
        with seated(model, engine.on(DeviceSettings(BLOCK, **dense))):
            assert_dense(model, plain)
    with pytest.raises(RuntimeError), seated(model, engine):
        raise RuntimeError
    with seated(model, None):
        assert state(model) == before


@pytest.mark.parametrize(
    "wrong, importances, text",
    [
        ({"selector": "trained"}, None, "selector trained needs a predictor"),
        ({"schedule": "layerwise"}, None, "schedule layerwise needs importances"),
        ({}, [1.0, 2.0], "one importance per layer"),
    ],
)
def test_refused_settings_leave_a_model_as_it_was(
    wrong: Any, importances: Any, text: str
) -> None:
    model = tiny("llama")
    for _ in range(2):
        before = state(model)
        with pytest.raises(ConfigError, match=text):
            attach(model, settings(**wrong), importances=importances)
        assert state(model) == before
        attach(model, settings())  # and once attached


def test_a_subclass_of_a_supported_model_is_supported() -> None:
    model = tiny("llama")
    model.__class__ = type("Mine", (type(model),), {})
    attach(model, settings())
    assert_sparse(model, tiny("llama"))


@pytest.mark.parametrize(
    "args, said",
    [
        (({"sparsity": 0.5},), "config must be a PrefillConfig, e.g. "),
        ((0.5,), r"PrefillConfig\(sparsity=0.5\); got float 0.5"),
        ((None, "side"), "predictor must be a PredictorFile, as load_predictor"),
    ],
)
def test_arguments_of_another_kind(args: Any, said: str) -> None:
    config, predictor = (*args, None)[:2]
    with pytest.raises(ConfigError, match=said):
        attach(tiny("llama"), config, predictor=predictor)
    for call in (attach, detach, tune):
        with pytest.raises(ConfigError, match="model must be a model as mlx_lm.load"):
            call(None)


def test_a_model_of_routed_experts_is_refused_by_name() -> None:
    sizes = {**models.SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = mixtral.Model(mixtral.ModelArgs("mixtral", vocab_size=96, **sizes))
    before = state(model)
    with pytest.raises(UnsupportedModel) as e:
        attach(model, settings())
    message = str(e.value)
    assert "model type 'mixtral' is not supported" in message and "\n" not in message
    assert "all of its FFNs are routed experts" in message
    assert state(model) == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_deep_copies_are_independent(name: str) -> None:
    model, plain = pair(name)
    engine = attach(model, settings())
    wanted = prefill(model, IDS)
    twin = copy.deepcopy(model)
    other = engine_of(twin)
    assert other is not None and other is not engine
    for mine, theirs, ffn in zip(model.layers, twin.layers, other.ffns):
        assert ffn.mlp is theirs.mlp is not mine.mlp
    models.assert_close(prefill(twin, IDS), wanted, 0)
    detach(model)
    assert_dense(model, plain)
    assert_sparse(twin, plain)
    detach(twin)
    assert_dense(twin, plain)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name, bits", [("llama", 8), ("llama", 0), ("gemma2", 0), ("phi3", 0)]
)
def test_lora_and_quantisation_before_and_after_attach(
    name: str, bits: int, when: str
) -> None:
    model, plain = pair(name)
    bare, _ = prefill(plain, IDS)

    def change(m: nn.Module) -> None:
        nn.quantize(m, 32, bits) if bits else train_lora(m)

    change(plain)
    if when == "before":
        change(model)
    engine = attach(model, settings())
    if when == "after":
        change(model)
    assert_sparse(model, plain)
    assert_whole(model, engine, plain)
    least = 1e-3 if bits else 0.02  # the change is not idle
    assert models.distance(bare, prefill(plain, IDS)[0]) > least
    detach(model)
    assert_dense(model, plain)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layers", [2, LAYERS])
def test_dora_layers_stay_dense_with_one_warning(layers: int, when: str) -> None:
    """Of the last two of four, or of all: one of them is dense anyway."""
    model, plain = pair()

    def add_dora(m: nn.Module) -> None:
        keys = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        linear_to_lora_layers(m, layers, {**LORA, "keys": keys}, use_dora=True)
        m.eval()

    add_dora(plain)
    with pytest.warns(UserWarning) as caught:
        if when == "before":
            add_dora(model)
        engine = attach(model, settings())
        if when == "after":
            add_dora(model)
        for _ in range(2):
            (assert_sparse if layers == 2 else assert_dense)(model, plain)
    assert [str(w.message) for w in caught] == [
        f"{layers - 1} of 4 layers stay dense: "
        "neurons cannot be taken out of a DoRALinear."
    ]
    assert engine.keep == [FFN // 2] * (LAYERS - layers) + [None] * layers
