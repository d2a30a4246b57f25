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
from mlx_lm.generate import generate_step
from mlx_lm.models import gpt2, mixtral
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers
from mlx_lm.utils import does_model_support_input_embeddings
from models import BLOCK, FFN, LAYERS, NAMES, WITH_EMBEDDINGS

from mlx_fastforward import ConfigError, UnsupportedModel, attach, detach
from mlx_fastforward.attachment import engine_of, seat

TOKENS = 7 * BLOCK + 3
HEAD, STOP = BLOCK, 6 * BLOCK  # the last block and the three odd tokens are the tail
LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}


def state(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Class and attributes of every module of a model."""
    return [(k, type(m), dict(m.__dict__)) for k, m in model.named_modules()]


def paths(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def train_lora(model: nn.Module, seed: int = 5) -> None:
    """LoRA as mlx-lm loads it, with B trained: its initial zeros would not show."""
    linear_to_lora_layers(model, LAYERS, LORA)
    key = mx.random.key(seed)
    for _, m in model.named_modules():
        if isinstance(m, LoRALinear):
            key, a, b = mx.random.split(key, 3)
            m.lora_a = 0.2 * mx.random.normal(m.lora_a.shape, key=a)
            m.lora_b = 0.2 * mx.random.normal(m.lora_b.shape, key=b)
    model.eval()


def assert_dense(model: nn.Module, plain: nn.Module, n: int = TOKENS) -> None:
    """Logits and caches of both models agree to the last bit."""
    logits, cache = models.prefill(model, models.token_ids(n))
    wanted, wanted_cache = models.prefill(plain, models.token_ids(n))
    np.testing.assert_array_equal(logits, wanted)
    for a, b in zip(models.cached_arrays(cache), models.cached_arrays(wanted_cache)):
        np.testing.assert_array_equal(a, b)


def assert_sparse(model: nn.Module, plain: nn.Module) -> None:
    """The dense head agrees to rounding; what follows differs, and visibly."""
    logits, _ = models.prefill(model, models.token_ids(TOKENS))
    wanted, _ = models.prefill(plain, models.token_ids(TOKENS))
    assert models.distance(logits[:HEAD], wanted[:HEAD]) < 1e-4
    assert models.distance(logits[HEAD:], wanted[HEAD:]) > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_0_is_bit_identical(name: str) -> None:
    model = models.tiny(name)
    attach(model, models.settings(sparsity=0.0))
    assert_dense(model, models.tiny(name))


@pytest.mark.parametrize("selector", ["probe", "first-block", "oracle"])
@pytest.mark.parametrize("name", NAMES)
def test_short_calls_are_bit_identical(name: str, selector: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    attach(model, models.settings(selector=selector))
    assert_dense(model, plain, 3 * BLOCK - 1)
    assert_sparse(model, plain)  # else the line above says nothing


@pytest.mark.parametrize("name", NAMES)
def test_decode_steps_are_bit_identical(name: str) -> None:
    """Over a cache that was prefilled sparsely, each further token is plain mlx-lm."""
    model, plain = models.tiny(name), models.tiny(name)
    attach(model, models.settings())
    _, cache = models.prefill(model, models.token_ids(TOKENS))
    dense_cache = copy.deepcopy(cache)
    for token in models.token_ids(5, seed=1):
        logits, _ = models.prefill(model, [token], cache)
        wanted, _ = models.prefill(plain, [token], dense_cache)
        np.testing.assert_array_equal(logits, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_the_forward_written_by_hand(name: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    engine = attach(model, models.settings(selector="oracle"))
    assert engine.keep == [FFN // 2] * (LAYERS - 1) + [None]
    hand = models.by_hand(plain, name, HEAD, STOP, FFN // 2)
    ids = models.token_ids(TOKENS)
    logits, cache = models.prefill(model, ids)
    wanted, wanted_cache = models.prefill(hand, ids)
    dense, _ = models.prefill(plain, ids)
    assert models.distance(logits, wanted) < 1e-4
    for a, b in zip(models.cached_arrays(cache), models.cached_arrays(wanted_cache)):
        assert models.distance(a, b) < 1e-4
    assert models.distance(dense[HEAD:], wanted[HEAD:]) > 0.02


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tail", [True, False])
def test_oracle_without_dense_head_or_tail(head: bool, tail: bool) -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings(selector="oracle", dense_head=head, dense_tail=tail))
    start, stop = HEAD if head else 0, STOP if tail else STOP + BLOCK
    hand = models.by_hand(plain, "llama", start, stop, FFN // 2)
    ids = models.token_ids(TOKENS)
    logits, _ = models.prefill(model, ids)
    wanted, _ = models.prefill(hand, ids)
    assert models.distance(logits, wanted) < 1e-4


def test_second_call_on_a_full_cache_has_no_dense_head() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings(selector="oracle"))
    first, second = models.token_ids(2 * BLOCK), models.token_ids(TOKENS, seed=1)
    _, cache = models.prefill(model, first)
    logits, _ = models.prefill(model, second, cache)
    _, cache = models.prefill(plain, first)
    hand = models.by_hand(plain, "llama", 0, STOP, FFN // 2)
    wanted, _ = models.prefill(hand, second, cache)
    assert models.distance(logits, wanted) < 1e-4


@pytest.mark.parametrize("selector", ["probe", "first-block", "oracle"])
@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_kept_equals_dense_to_rounding(name: str, selector: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    engine = attach(model, models.settings(selector=selector))
    engine.keep = [FFN] * (LAYERS - 1) + [None]
    logits, cache = models.prefill(model, models.token_ids(TOKENS))
    wanted, wanted_cache = models.prefill(plain, models.token_ids(TOKENS))
    assert models.distance(logits, wanted) < 1e-4
    for a, b in zip(models.cached_arrays(cache), models.cached_arrays(wanted_cache)):
        assert models.distance(a, b) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_only_the_blocks_of_all_layers_but_the_last_are_sparse(name: str) -> None:
    """The FFN of each layer is called by itself, so that attention spreads nothing."""
    model, plain = models.tiny(name), models.tiny(name)
    engine = attach(model, models.settings(selector="first-block"))
    x = mx.random.normal((1, TOKENS, models.HIDDEN), key=mx.random.key(3))
    engine.call = engine.begin(1, TOKENS, make_prompt_cache(model), False)
    for i, (layer, other) in enumerate(zip(model.layers, plain.layers)):
        y, wanted = np.array(layer.mlp(x)[0]), np.array(other.mlp(x)[0])
        if i == LAYERS - 1:
            np.testing.assert_array_equal(y, wanted)
            continue
        assert models.distance(y[:HEAD], wanted[:HEAD]) < 1e-5
        assert models.distance(y[STOP:], wanted[STOP:]) < 1e-5
        changed = np.abs(y[HEAD:STOP] - wanted[HEAD:STOP]).max(axis=-1)
        assert changed.min() > 1e-3  # every token of every block


@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_everything(name: str) -> None:
    model = models.tiny(name)
    before, weights = state(model), paths(model)
    attach(model, models.settings())
    assert state(model) != before
    models.prefill(model, models.token_ids(TOKENS))
    detach(model)
    assert state(model) == before
    after = paths(model)
    assert list(after) == list(weights)
    assert all(after[k] is w for k, w in weights.items())
    assert_dense(model, models.tiny(name))


def test_detach_of_a_plain_model_does_nothing() -> None:
    model = models.tiny("llama")
    before = state(model)
    detach(model)
    assert state(model) == before


def test_attached_twice_takes_the_new_settings_and_detaches_once() -> None:
    model = models.tiny("llama")
    before = state(model)
    attach(model, models.settings(sparsity=0.25))
    engine = attach(model, models.settings(sparsity=0.75))
    assert engine_of(model) is engine
    assert engine.keep == [FFN // 4] * (LAYERS - 1) + [None]
    assert type(model).__mro__[1] is type(models.tiny("llama"))
    detach(model)
    assert state(model) == before


def test_an_engine_can_be_seated_again() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    engine = attach(model, models.settings())
    detach(model)
    seat(model, engine)
    assert engine_of(model) is engine
    assert_sparse(model, plain)


def test_refused_settings_leave_a_plain_model_alone() -> None:
    model = models.tiny("llama")
    before = state(model)
    with pytest.raises(ConfigError, match="selector trained needs a predictor"):
        attach(model, models.settings(selector="trained"))
    with pytest.raises(ConfigError, match="one importance per layer"):
        attach(model, models.settings(), importances=[1.0, 2.0])
    assert state(model) == before


def test_refused_settings_leave_an_attached_model_as_it_was() -> None:
    """attach() promises errors before anything of the model is touched."""
    model = models.tiny("llama")
    engine = attach(model, models.settings())
    with pytest.raises(ConfigError):
        attach(model, models.settings(selector="trained"))
    assert engine_of(model) is engine


@pytest.mark.parametrize("name", NAMES)
def test_training_runs_dense(name: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    attach(model, models.settings())
    model.train()
    plain.train()
    assert_dense(model, plain)
    model.eval()
    plain.eval()
    assert_sparse(model, plain)


def test_gradients_of_an_attached_model_are_those_of_the_plain_one() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings())
    ids = mx.array([models.token_ids(TOKENS)])

    def loss(m: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(m(ids[:, :-1]), ids[:, 1:], reduction="mean")

    grads = []
    for m in (model, plain):
        m.train()
        _, g = nn.value_and_grad(m, loss)(m)
        grads.append(dict(tree_flatten(g)))
    assert list(grads[0]) == list(grads[1])
    for k, g in grads[1].items():
        np.testing.assert_array_equal(np.array(grads[0][k]), np.array(g), err_msg=k)


def test_engine_switched_off_is_bit_identical() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    engine = attach(model, models.settings())
    engine.enabled = False
    assert_dense(model, plain)
    engine.enabled = True
    assert_sparse(model, plain)


def test_a_call_without_a_cache_is_sparse_too() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings())
    ids = mx.array([models.token_ids(TOKENS)])
    with_cache, _ = models.prefill(model, models.token_ids(TOKENS))
    assert models.distance(np.array(model(ids)[0]), with_cache) < 1e-5
    assert models.distance(np.array(plain(ids)[0]), with_cache) > 0.02


def test_an_error_in_the_forward_pass_leaves_no_call_behind() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    engine = attach(model, models.settings())
    with pytest.raises(Exception):
        model(mx.array([models.token_ids(TOKENS)]), cache=[object()] * LAYERS)
    assert engine.call is None
    assert_dense(model, plain, 10)


def gpt2_model() -> nn.Module:
    args = gpt2.ModelArgs(
        model_type="gpt2",
        n_ctx=64,
        n_embd=32,
        n_head=4,
        n_layer=2,
        n_positions=64,
        layer_norm_epsilon=1e-5,
        vocab_size=96,
    )
    return gpt2.Model(args)


def mixtral_model() -> nn.Module:
    sizes = {**models.SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    return mixtral.Model(
        mixtral.ModelArgs(model_type="mixtral", vocab_size=96, **sizes)
    )


@pytest.mark.parametrize("build", [gpt2_model, mixtral_model])
def test_other_architectures_are_refused_by_name(build: Any) -> None:
    model = build()
    before = state(model)
    with pytest.raises(UnsupportedModel) as e:
        attach(model, models.settings())
    message = str(e.value)
    assert f"model type {model.model_type!r} is not supported" in message
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3"):
        assert f"{name} (" in message
    assert "\n" not in message
    assert state(model) == before


def test_a_subclass_of_a_supported_model_is_supported() -> None:
    model = models.tiny("llama")
    base = type(model)
    model.__class__ = type("Mine", (base,), {})
    attach(model, models.settings())
    assert_sparse(model, models.tiny("llama"))


@pytest.mark.parametrize("name", NAMES)
def test_input_embeddings_stay_in_the_signature(name: str) -> None:
    model = models.tiny(name)
    before = inspect.signature(model.__call__)
    attach(model, models.settings())
    assert inspect.signature(model.__call__) == before
    assert does_model_support_input_embeddings(model) == (name in WITH_EMBEDDINGS)


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_input_embeddings_are_prefilled_sparsely(name: str) -> None:
    """As keyword and by position, with and without token ids beside them."""
    model, plain = models.tiny(name), models.tiny(name)
    attach(model, models.settings())
    ids = mx.array([models.token_ids(TOKENS)])

    def embeddings() -> mx.array:  # anew each time: Gemma 3 scales its input in place
        return mx.random.normal((1, TOKENS, models.HIDDEN), key=mx.random.key(4))

    wanted = np.array(plain(ids, input_embeddings=embeddings())[0])
    by_name = np.array(model(ids, input_embeddings=embeddings())[0])
    by_place = np.array(model(ids, None, embeddings())[0])
    alone = np.array(model(ids[:, :0], input_embeddings=embeddings())[0])
    assert models.distance(by_name[:HEAD], wanted[:HEAD]) < 1e-4
    assert models.distance(by_name[HEAD:], wanted[HEAD:]) > 0.02
    np.testing.assert_array_equal(by_place, by_name)
    np.testing.assert_array_equal(alone, by_name)


def test_input_embeddings_in_mlx_lms_generate_step() -> None:
    """The embeddings of the prompt's own tokens generate what the tokens do."""
    model = models.tiny("llama")
    attach(model, models.settings())
    ids = mx.array(models.token_ids(TOKENS))
    embeddings = model.model.embed_tokens(ids)
    empty = mx.array([], mx.int32)
    wanted = [int(t) for t, _ in generate_step(ids, model, max_tokens=6)]
    for prompt in (ids, empty):
        steps = generate_step(prompt, model, max_tokens=6, input_embeddings=embeddings)
        assert [int(t) for t, _ in steps] == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_deep_copies_are_independent(name: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    engine = attach(model, models.settings())
    models.prefill(model, models.token_ids(TOKENS))
    twin = copy.deepcopy(model)
    other = engine_of(twin)
    assert other is not None and other is not engine
    for i, layer in enumerate(twin.layers):
        assert other.ffns[i].mlp is layer.mlp
        assert engine.ffns[i].mlp is model.layers[i].mlp
        assert layer.mlp is not model.layers[i].mlp
    ids = models.token_ids(TOKENS)
    np.testing.assert_array_equal(
        models.prefill(twin, ids)[0], models.prefill(model, ids)[0]
    )
    detach(model)
    assert_dense(model, plain)
    assert_sparse(twin, plain)
    detach(twin)
    assert_dense(twin, plain)


def test_quantised_after_attach() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    engine = attach(model, models.settings())
    for m in (model, plain):
        nn.quantize(m, group_size=32, bits=8)
    assert_sparse(model, plain)
    engine.keep = [FFN] * (LAYERS - 1) + [None]
    logits, _ = models.prefill(model, models.token_ids(TOKENS))
    wanted, _ = models.prefill(plain, models.token_ids(TOKENS))
    assert models.distance(logits, wanted) < 1e-4
    detach(model)
    assert_dense(model, plain)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_before_and_after_attach(name: str, when: str) -> None:
    model, plain = models.tiny(name), models.tiny(name)
    train_lora(plain)
    if when == "before":
        train_lora(model)
    engine = attach(model, models.settings())
    if when == "after":
        train_lora(model)
    assert_sparse(model, plain)
    engine.keep = [FFN] * (LAYERS - 1) + [None]
    logits, _ = models.prefill(model, models.token_ids(TOKENS))
    wanted, _ = models.prefill(plain, models.token_ids(TOKENS))
    bare, _ = models.prefill(models.tiny(name), models.token_ids(TOKENS))
    assert models.distance(logits, wanted) < 1e-4
    assert models.distance(bare, wanted) > 0.02  # the LoRA is not idle
    detach(model)
    assert_dense(model, plain)


def test_lora_taken_off_again() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    attach(model, models.settings())
    wanted, _ = models.prefill(model, models.token_ids(TOKENS))
    train_lora(model)
    changed, _ = models.prefill(model, models.token_ids(TOKENS))
    assert models.distance(changed, wanted) > 0.02
    remove_lora_layers(model)
    logits, _ = models.prefill(model, models.token_ids(TOKENS))
    np.testing.assert_array_equal(logits, wanted)
    assert_sparse(model, plain)


def add_dora(model: nn.Module, layers: int) -> None:
    """DoRA over the FFNs of the last so-many layers."""
    keys = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, layers, {**LORA, "keys": keys}, use_dora=True)
    model.eval()


@pytest.mark.parametrize("when", ["before", "after"])
def test_dora_layers_stay_dense_with_one_warning(when: str) -> None:
    """The last two of four layers: one of them is dense anyway."""
    model, plain = models.tiny("llama"), models.tiny("llama")
    add_dora(plain, 2)
    with pytest.warns(UserWarning) as caught:
        if when == "before":
            add_dora(model, 2)
        engine = attach(model, models.settings())
        if when == "after":
            add_dora(model, 2)
        for _ in range(2):
            assert_sparse(model, plain)
    assert [str(w.message) for w in caught] == [
        "1 of 4 layers stay dense: neurons cannot be taken out of a DoRALinear."
    ]
    assert engine.keep == [FFN // 2, FFN // 2, None, None]


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_but_dora_runs_dense(when: str) -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    add_dora(plain, LAYERS)
    with pytest.warns(UserWarning, match="3 of 4 layers stay dense"):
        if when == "before":
            add_dora(model, LAYERS)
        attach(model, models.settings())
        if when == "after":
            add_dora(model, LAYERS)
        assert_dense(model, plain)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    model = models.tiny(name)
    attach(model, models.settings())
    models.prefill(model, models.token_ids(TOKENS))
    model.save_weights(str(tmp_path / "w.safetensors"))
    saved, wanted = mx.load(str(tmp_path / "w.safetensors")), paths(models.tiny(name))
    assert isinstance(saved, dict)
    assert sorted(saved) == sorted(wanted)
    for k, w in wanted.items():
        np.testing.assert_array_equal(np.array(saved[k]), np.array(w))
    model.load_weights(list(saved.items()), strict=True)


def test_layers_that_keep_everything_stay_dense() -> None:
    """Algorithm 1 gives important layers a budget of 1: nothing to gather there."""
    model = models.tiny("llama")
    engine = attach(model, models.settings(), importances=[8.0, 1.0, 1.0, 5.0])
    assert engine.keep[0] is None and engine.keep[-1] is None
    assert engine.keep[1:3] == [32, 32]  # (0.5 * 3 - 1) / 2 = 1/4 each
