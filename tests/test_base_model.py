"""Which model a predictor file is for: any copy of it, and no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import pytest
from mlx_lm.models import llama
from predictor_files import BASE, F, edit, one_line, save, tiny_model

from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.errors import PredictorError, UnsupportedModel
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import load_predictor


def mark(model: nn.Module) -> str:
    return BaseModel.of(model).fingerprint


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_base_model(name: str, bits: int) -> None:
    """Packed weights have other shapes, the model has not."""
    model = models.tiny(name)
    if bits:
        nn.quantize(model, 32, bits)
    base = BaseModel.of(model, "org/model")
    wanted = ("org/model", model.model_type, models.LAYERS, models.HIDDEN, models.FFN)
    assert base == BaseModel(*wanted, mark(models.tiny(name)))
    assert base.widths == [models.FFN] * models.LAYERS
    assert base.sizes() == "4 layers, hidden 32, FFN 128"
    attach(model)
    assert BaseModel.of(model, "org/model") == base


def test_layers_of_several_widths(tmp_path: Path) -> None:
    base = BaseModel.of(tiny_model(wide=1024))
    assert base.ffn_size == base.widths == [F, 1024, F]
    assert base.sizes() == "3 layers, hidden 32, FFN 64 to 1,024"
    assert base.widest == 1024
    save(tmp_path, width=[F, 1024, F])
    edit(tmp_path, "base_model", fingerprint=base.fingerprint)
    load_predictor(tmp_path).check(base)
    text = check_refusal(tmp_path, replace(base, ffn_size=F))
    assert "ffn_size [64, 1024, 64], this model has 64" in text


@pytest.mark.parametrize("published", ["float32", "bfloat16"])
def test_all_copies_of_a_model_have_its_fingerprint(published: str) -> None:
    """One published in float32 is rounded to bf16 once, but by way of fp16 twice."""
    copies: list[dict[str, Any]] = [
        {"bits": 4},
        {"bits": 8},
        {"bits": 4, "mode": "mxfp4"},
    ]
    dtypes = ["float32", "bfloat16", "float16"][: 3 if published == "bfloat16" else 2]
    found = set()
    for copy in [*copies, *dtypes]:
        model = tiny_model()
        model.set_dtype(getattr(mx, published))
        if isinstance(copy, str):
            model.set_dtype(getattr(mx, copy))
        else:
            nn.quantize(model, 32, **copy)
        found.add(mark(model))
    assert len(found) == 1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fingerprints_of_other_models_differ(layers: int) -> None:
    """Each of first, middle and last layer tells."""
    before = mark(tiny_model(0, layers))
    assert mark(tiny_model(0, layers)) == before != mark(tiny_model(1, layers))
    for i in range(layers):
        model = tiny_model(0, layers)
        norm = model.layers[i].input_layernorm
        norm.weight = mx.where(mx.arange(32) == 5, 1.5 * norm.weight, norm.weight)
        assert mark(model) != before


def check_refusal(folder: Path, base: BaseModel) -> str:
    with pytest.raises(PredictorError) as e:
        load_predictor(folder).check(base)
    return one_line(e.value)


def test_a_fitting_model_is_taken_and_others_are_not(tmp_path: Path) -> None:
    model = tiny_model()
    edit(save(tmp_path), "base_model", fingerprint=mark(model))
    load_predictor(tmp_path).check(BaseModel.of(model, "another name"))
    assert attach(model, predictor=load_predictor(tmp_path)).compensator is not None
    for key in ("layers", "hidden_size", "ffn_size"):
        size = getattr(BASE, key)
        other = replace(BaseModel.of(model), **{key: size + 8})
        text = check_refusal(tmp_path, other)
        assert f"{key} {size}, this model has {size + 8}" in text
    stranger = tiny_model(1)
    text = check_refusal(tmp_path, BaseModel.of(stranger))
    assert "'tiny': the shapes agree, but the weights of this model do not" in text
    with pytest.raises(PredictorError):
        attach(stranger, predictor=load_predictor(tmp_path))
    assert type(stranger) is llama.Model  # nothing of it is touched before
    engine = attach(stranger)
    with pytest.raises(PredictorError):
        attach(stranger, predictor=load_predictor(tmp_path))
    assert engine_of(stranger) is engine
    with pytest.raises(UnsupportedModel):
        BaseModel.of(nn.Linear(2, 2))
