"""load(): mlx_lm.load, and the model comes back attached."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_fastforward as ff
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.neurons.selectors import Probe, Trained

PROMPT = models.token_ids(100, vocab=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.tiny("llama", vocab=4096)
    return models.save_folder(model, tmp_path_factory.mktemp("models") / "tiny")


def test_load_is_mlx_lms_load_and_attach(folder: Path) -> None:
    model, tokenizer = ff.load(str(folder), 0.5, block_size=8, selector="oracle")
    same, _ = mlx_lm.load(str(folder))
    engine = ff.attach(same, models.settings(selector="oracle"))
    assert engine_of(model).config == engine.config
    assert tokenizer.encode("Keawe") == models.demo_tokenizer().encode("Keawe")
    np.testing.assert_array_equal(
        models.prefill(model, PROMPT)[0], models.prefill(same, PROMPT)[0]
    )


def test_the_defaults_drop_half_in_blocks_of_128(folder: Path) -> None:
    model, _ = ff.load(str(folder))
    engine = engine_of(model)
    assert engine.config == ff.PrefillConfig()
    assert (engine.config.sparsity, engine.config.block_size) == (0.5, 128)
    assert isinstance(engine.selector, Probe)


def test_sparsity_0_is_mlx_lm_to_the_bit(folder: Path) -> None:
    model, _ = ff.load(str(folder), sparsity=0.0, block_size=8)
    plain, _ = mlx_lm.load(str(folder))
    np.testing.assert_array_equal(
        models.prefill(model, PROMPT)[0], models.prefill(plain, PROMPT)[0]
    )


def test_the_config_on_request(folder: Path) -> None:
    model, _, config = ff.load(str(folder), return_config=True)
    assert config["model_type"] == "llama" and engine_of(model) is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"blocks": 8}, "unknown setting 'blocks'; known ones: sparsity, block_size"),
    ],
)
def test_impossible_settings_come_before_the_model(settings: Any, message: str) -> None:
    with pytest.raises(ff.ConfigError, match=message):
        ff.load("/no/such/folder", **settings)


def test_adapters_come_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(ff.PredictorError, match="no predictor in"):
        ff.load("/no/such/folder", predictor=tmp_path)


def test_adapter_by_path_loaded_and_beside_the_model(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "tiny")
    side = models.save_random_predictor(model, tmp_path / "side")
    outs = []
    for predictor in (str(side), side, ff.load_predictor(side)):
        net, _ = ff.load(str(folder), block_size=8, predictor=predictor)
        assert isinstance(engine_of(net).selector, Trained)
        outs.append(models.prefill(net, PROMPT)[0])
    models.save_random_predictor(model, folder)
    net, _ = ff.load(str(folder), block_size=8)
    assert isinstance(engine_of(net).selector, Trained)
    outs.append(models.prefill(net, PROMPT)[0])
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_lora_weights(folder: Path, tmp_path: Path) -> None:
    """adapter_path means LoRA, as in mlx_lm; the sparse path uses it."""
    lora = {"rank": 2, "scale": 5.0, "dropout": 0.0}
    trained = models.tiny("llama", vocab=4096)
    linear_to_lora_layers(trained, models.LAYERS, lora)
    weights = {
        k: 0.3 * mx.random.normal(w.shape, key=mx.random.key(len(k)))
        for k, w in tree_flatten(trained.parameters())
        if "lora" in k
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"num_layers": models.LAYERS, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model, _ = ff.load(str(folder), block_size=8, adapter_path=str(tmp_path))
    plain, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    assert isinstance(model.layers[0].mlp.down_proj, LoRALinear)
    sparse, _ = models.prefill(model, PROMPT)
    dense, _ = models.prefill(plain, PROMPT)
    assert models.distance(sparse[8:], dense[8:]) > 0.02
    engine_of(model).keep = [models.FFN] * (models.LAYERS - 1) + [None]
    whole, _ = models.prefill(model, PROMPT)
    assert models.distance(whole, dense) < 1e-4
