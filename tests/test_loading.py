"""load(): mlx_lm.load, attached, with the predictor that fits; and nothing left to read."""

import json
import os
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from predictor_files import overwrite

import mlx_fastforward as ff
from mlx_fastforward import loading
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.neurons.selectors import Probe, Trained
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME, load_predictor

IDS = models.token_ids(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save_folder(models.tiny("llama"), tmp_path / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "predictors"


def side(path: Path, time: int = 0, seed: int = 0) -> Path:
    """A predictor, of this age, for the model of this seed: 0 is the one in the folder."""
    models.save_random_predictor(models.tiny("llama", seed), path)
    os.utime(path / JSON_NAME, (time, time))
    return path


def loaded(folder: Path, **more: Any) -> nn.Module:
    return ff.load(str(folder), block_size=8, **more)[0]


def taken(folder: Path, **more: Any) -> Optional[str]:
    """Where the predictor in use came from; what selects neurons agrees."""
    engine = engine_of(loaded(folder, **more))
    assert engine is not None
    assert isinstance(engine.selector, Trained if engine.predictor else Probe)
    return engine.predictor


def test_load_is_mlx_lms_load_and_attach(folder: Path) -> None:
    """With half of the neurons dropped; sparsity 0 is mlx-lm to the bit."""
    model, tokenizer, config = ff.load(str(folder), return_config=True)
    assert engine_of(model).config == ff.PrefillConfig(sparsity=0.5, block_size=None)
    assert config["model_type"] == "llama"
    assert tokenizer.encode("Keawe") == models.demo_tokenizer().encode("Keawe")
    plain, _ = mlx_lm.load(str(folder))
    for sparsity in (0.0, 0.25):
        config = ff.PrefillConfig(sparsity, models.BLOCK, selector="oracle")
        model = loaded(folder, sparsity=sparsity, selector="oracle")
        assert engine_of(model).config == config
        ff.attach(plain, config)
        models.assert_close(models.prefill(model, IDS), models.prefill(plain, IDS), 0)


def test_lora_weights(folder: Path, tmp_path: Path) -> None:
    """adapter_path means LoRA, as in mlx_lm; the sparse path uses it."""
    lora = {"rank": 2, "scale": 5.0, "dropout": 0.0}
    trained = models.tiny("llama")
    linear_to_lora_layers(trained, models.LAYERS, lora)
    weights = {
        k: 0.3 * mx.random.normal(w.shape, key=mx.random.key(len(k)))
        for k, w in tree_flatten(trained.parameters())
        if "lora" in k
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"num_layers": models.LAYERS, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    dense, _ = models.prefill(plain, IDS)
    for sparsity, agrees in ((0.0, True), (0.5, False)):
        model = loaded(folder, sparsity=sparsity, adapter_path=str(tmp_path))
        found, _ = models.prefill(model, IDS)
        assert models.distance(found[:8], dense[:8]) < 1e-4
        assert (models.distance(found, dense) < 0.02) == agrees


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"blocks": 8}, "unknown setting 'blocks'; known ones: sparsity, block_size"),
        ({"predictor": 3}, "predictor must be a folder, a repository, .* got int 3"),
        ({"predictor": "/no/side"}, "no predictor file in /no/side"),
    ],
)
def test_wrong_arguments_come_before_the_model(wrong: Any, message: str) -> None:
    with pytest.raises((ff.ConfigError, ff.PredictorError), match=message):
        ff.load("/no/such/folder", **wrong)


def test_which_predictor_is_taken(folder: Path, home: Path, tmp_path: Path) -> None:
    """The one named, else the one beside the model, else the user's newest for it."""
    assert taken(folder) is None
    side(home / "old", time=1)
    mine = side(home / "mine", time=2)
    side(home / "foreign", time=3, seed=1)
    packed = models.tiny("llama")
    nn.quantize(packed, 32, 4)
    bits = {"quantization": {"group_size": 32, "bits": 4}}
    for place in (folder, models.save_folder(packed, tmp_path / "4bit", **bits)):
        assert taken(place) == str(mine)
    found, named, without = (
        models.prefill(loaded(folder, predictor=p), IDS)
        for p in (None, load_predictor(mine), "none")
    )
    models.assert_close(found, named, 0)
    assert models.distance(found[0], without[0]) > 0.01
    assert taken(side(folder, time=1)) == str(folder)
    for predictor in (mine, str(mine), load_predictor(mine)):
        assert taken(folder, predictor=predictor) == str(mine)
    assert taken(folder, predictor="none") is None
    (folder / JSON_NAME).write_bytes(b"")
    with pytest.raises(ff.PredictorError, match=f"{folder / JSON_NAME} cannot be read"):
        loaded(folder)


def test_one_of_another_model_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], loading.mlx_lm_load

    def load(*args: Any, **more: Any) -> tuple:
        opened.append(real(*args, **more))
        return opened[-1]

    monkeypatch.setattr(loading, "mlx_lm_load", load)
    foreign = side(tmp_path / "foreign", seed=1)
    with pytest.raises(ff.PredictorError, match="the weights of this model do not"):
        loaded(folder, predictor=foreign)
    overwrite(folder / "model.safetensors")
    assert mx.all(opened[0][0].layers[2].mlp.up_proj.weight == 7).item()
    side(folder, seed=1)
    with pytest.raises(ff.PredictorError, match="the weights of this model do not"):
        loaded(folder)


@pytest.mark.parametrize("place", ["found", "named", "loaded"])
@pytest.mark.parametrize("lazy", [False, True])
def test_weights_are_read_unless_lazy(
    folder: Path, home: Path, place: str, lazy: bool
) -> None:
    """Those of the predictor too: else they are what the files hold by now."""
    mine = side(home / "mine")
    named = {"found": None, "named": mine, "loaded": load_predictor(mine)}[place]
    model = loaded(folder, predictor=named, lazy=lazy)
    overwrite(folder / "model.safetensors")
    overwrite(mine / TENSORS_NAME)
    read = [model.layers[2].mlp.up_proj.weight]
    for p in engine_of(model).selector.layers:
        read += [p.query, p.w1, p.w2]
    fresh = [bool(mx.all(w == 7).item()) for w in read]
    assert fresh == [lazy] * (1 + 3 * models.LAYERS)
