"""Which model a predictor is for: any copy of it, and no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import pytest
from mlx_lm.models import llama
from side_files import (
    BASE,
    LAYERS,
    D,
    edit,
    information,
    norms,
    one_line,
    overwrite,
    refusal,
    tiny_model,
    weights,
)

from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.errors import PredictorError, UnsupportedModel
from mlx_fastforward.predictors.file import (
    BaseModel,
    PredictorFile,
    fingerprint,
    load_predictor,
    save_predictor,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_predictor(tmp_path / "predictor", information(), weights())
    return tmp_path / "predictor"


# The base model


SIZES = (models.LAYERS, models.HIDDEN, models.FFN)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", models.NAMES)
def test_base_model_of_every_architecture(name: str, bits: int) -> None:
    """Packed weights have other shapes, the model has not."""
    model = models.tiny(name)
    if bits:
        nn.quantize(model, 32, bits)
    base = BaseModel.of(model, "org/model")
    assert (base.layers, base.hidden_size, base.ffn_size) == SIZES
    assert (base.name, base.model_type) == ("org/model", model.model_type)
    assert base.fingerprint == fingerprint(norms(models.tiny(name)))


def test_base_model_of_a_lazily_loaded_model(tmp_path: Path) -> None:
    """Only norms are read: a predictor for another model is refused before the rest is."""
    saved = models.tiny("llama")
    folder = models.save_folder(saved, tmp_path / "model")
    model, _ = mlx_lm.load(str(folder), lazy=True)
    assert BaseModel.of(model) == BaseModel.of(saved)
    overwrite(folder / "model.safetensors")
    assert mx.all(model.layers[0].mlp.up_proj.weight == 7).item()


def test_base_model_of_an_attached_model() -> None:
    model = tiny_model()
    before = BaseModel.of(model)
    attach(model)
    assert BaseModel.of(model) == before


def test_base_model_of_what_is_no_supported_model() -> None:
    with pytest.raises(UnsupportedModel):
        BaseModel.of(nn.Linear(2, 2))


# Other models


def variants(model_of: Callable[[], nn.Module]) -> dict[str, list[mx.array]]:
    """Norms of the copies that people have of one model."""
    copies = {}
    for name in ("float32", "bfloat16", "float16", "4 bits", "8 bits", "mxfp4"):
        model = model_of()
        if name.endswith("bits"):
            nn.quantize(model, 32, int(name[0]))
        elif name == "mxfp4":
            nn.quantize(model, 32, 4, mode="mxfp4")
        else:
            model.set_dtype(getattr(mx, name))
        copies[name] = norms(model)
    return copies


COPIES = ["bfloat16", "float16", "4 bits", "8 bits", "mxfp4"]


@pytest.mark.parametrize("copy", COPIES)
def test_fingerprint_of_a_bfloat16_model(copy: str) -> None:
    """Published in bfloat16 and converted since, as most models are."""

    def published() -> nn.Module:
        model = tiny_model()
        model.set_dtype(mx.bfloat16)
        return model

    prints = {k: fingerprint(v) for k, v in variants(published).items()}
    assert prints[copy] == prints["float32"]


@pytest.mark.parametrize("copy", [c for c in COPIES if c != "float16"])
def test_fingerprint_of_a_float32_model(copy: str) -> None:
    """Published in float32: rounded to bf16 once, whichever copy (fp16 rounds twice)."""
    prints = {k: fingerprint(v) for k, v in variants(tiny_model).items()}
    assert prints[copy] == prints["float32"]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fingerprints_of_other_models_differ(layers: int) -> None:
    model, other = tiny_model(0, layers), tiny_model(1, layers)
    assert fingerprint(norms(model)) == fingerprint(norms(tiny_model(0, layers)))
    assert fingerprint(norms(model)) != fingerprint(norms(other))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fingerprint_looks_at_first_middle_and_last(layer: int) -> None:
    model = tiny_model()
    before = fingerprint(norms(model))
    norm = model.layers[layer].input_layernorm
    norm.weight = mx.where(mx.arange(D) == 5, 1.5 * norm.weight, norm.weight)
    assert fingerprint(norms(model)) != before


def test_a_fitting_model_is_taken(tmp_path: Path) -> None:
    model = tiny_model()
    save_predictor(tmp_path, information(model), weights())
    load_predictor(tmp_path).check(BaseModel.of(model, "another name"))
    engine = attach(
        model, PrefillConfig(block_size=8), predictor=load_predictor(tmp_path)
    )
    assert engine.compensator is not None


def check_refusal(found: PredictorFile, base: BaseModel) -> str:
    with pytest.raises(PredictorError) as e:
        found.check(base)
    return one_line(e.value)


@pytest.mark.parametrize("key", ["layers", "hidden_size", "ffn_size"])
def test_wrong_sizes(folder: Path, key: str) -> None:
    size = getattr(BASE, key)
    text = check_refusal(load_predictor(folder), replace(BASE, **{key: size + 8}))
    assert f"{key} {size}, this model has {size + 8}" in text


def test_a_model_with_other_layers(tmp_path: Path) -> None:
    save_predictor(tmp_path, information(tiny_model()), weights())
    other = BaseModel.of(tiny_model(0, LAYERS + 2))
    text = check_refusal(load_predictor(tmp_path), other)
    assert f"layers {LAYERS}, this model has {LAYERS + 2}" in text


@pytest.mark.parametrize("name", ["tiny", "two\nlines", 3, None])
def test_foreign_fingerprint(tmp_path: Path, name: Any) -> None:
    info = information(tiny_model(0))
    info["base_model"]["name"] = name
    save_predictor(tmp_path, info, weights())
    text = check_refusal(load_predictor(tmp_path), BaseModel.of(tiny_model(1)))
    assert "weights" in text
    if name == "tiny":
        assert name in text


def test_a_fingerprint_of_another_type(folder: Path) -> None:
    for value in (7, None, [], {}):
        edit(folder, lambda info: info["base_model"].update(fingerprint=value))
        assert "fingerprint" in refusal(folder)


def test_a_refused_adapter_leaves_the_model_alone(tmp_path: Path) -> None:
    save_predictor(tmp_path, information(tiny_model(1)), weights())
    foreign, model = load_predictor(tmp_path), tiny_model(0)
    with pytest.raises(PredictorError):
        attach(model, predictor=foreign)
    assert type(model) is llama.Model
    assert all(type(layer.mlp) is llama.MLP for layer in model.layers)


def test_a_refused_adapter_leaves_an_attached_model_attached(tmp_path: Path) -> None:
    """attach() refuses before anything of the model is touched."""
    save_predictor(tmp_path, information(tiny_model(1)), weights())
    foreign, model = load_predictor(tmp_path), tiny_model(0)
    engine = attach(model)
    with pytest.raises(PredictorError):
        attach(model, predictor=foreign)
    assert engine_of(model) is engine
    assert isinstance(model, llama.Model) and type(model) is not llama.Model
