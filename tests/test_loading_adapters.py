"""load() with predictors: which one it takes, and that nothing is left to read."""

import json
import os
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from side_files import one_line, overwrite

import mlx_fastforward as ff
from mlx_fastforward import loading
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.errors import PredictorError
from mlx_fastforward.neurons.selectors import Probe, Trained
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME, load_predictor

PROMPT = models.token_ids(60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.tiny("llama")
    return models.save_folder(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """The model's folder, of the test's own."""
    (tmp_path / "tiny").mkdir()
    for file in saved.iterdir():
        (tmp_path / "tiny" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "tiny"


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


# Which one


def test_the_users_newest_one_is_taken(folder: Path, home: Path) -> None:
    assert taken(folder) is None
    side(home / "old", time=1)
    mine = side(home / "mine", time=2)
    side(home / "foreign", time=3, seed=1)
    assert taken(folder) == str(mine)


def test_the_one_taken_is_used(folder: Path, home: Path) -> None:
    mine = side(home / "mine")
    found, _ = models.prefill(loaded(folder), PROMPT)
    named, _ = models.prefill(loaded(folder, predictor=load_predictor(mine)), PROMPT)
    without, _ = models.prefill(loaded(folder, predictor="none"), PROMPT)
    np.testing.assert_array_equal(found, named)
    assert models.distance(found, without) > 0.01


def test_none_takes_none(folder: Path, home: Path) -> None:
    side(home / "mine")
    side(folder)
    assert taken(folder) == str(folder)
    assert taken(folder, predictor="none") is None


def test_the_one_beside_the_model_is_taken_first(folder: Path, home: Path) -> None:
    side(home / "mine", time=2)
    side(folder, time=1)
    assert taken(folder) == str(folder)


def test_the_one_named_is_taken_before_all(
    folder: Path, home: Path, tmp_path: Path
) -> None:
    side(home / "mine")
    side(folder)
    named = side(tmp_path / "named")
    for predictor in (named, str(named), load_predictor(named)):
        assert taken(folder, predictor=predictor) == str(named)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_users_one_fits_a_quantised_copy(
    folder: Path, home: Path, tmp_path: Path, bits: int
) -> None:
    mine = side(home / "mine")
    model = models.tiny("llama")
    nn.quantize(model, 32, bits)
    packed = {"quantization": {"group_size": 32, "bits": bits}}
    copy = models.save_folder(model, tmp_path / "copy", **packed)
    assert taken(copy) == str(mine)


# Refused


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_a_damaged_one_beside_the_model_is_refused(
    folder: Path, home: Path, name: str
) -> None:
    side(home / "mine")
    (side(folder) / name).write_bytes(b"")
    with pytest.raises(PredictorError) as e:
        loaded(folder)
    assert str(folder / name) in one_line(e.value)
    assert taken(folder, predictor="none") is None


@pytest.mark.parametrize("place", ["beside", "named"])
def test_one_of_another_model_is_refused(
    folder: Path, tmp_path: Path, place: str
) -> None:
    foreign = side(folder if place == "beside" else tmp_path / "foreign", seed=1)
    named = {} if place == "beside" else {"predictor": foreign}
    with pytest.raises(PredictorError, match="the weights of this model do not"):
        loaded(folder, **named)


def test_one_of_another_model_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_loaded, real = [], loading.mlx_lm_load

    def load(*args: Any, **more: Any) -> tuple:
        loaded = real(*args, **more)
        models_loaded.append(loaded[0])
        return loaded

    monkeypatch.setattr(loading, "mlx_lm_load", load)
    with pytest.raises(PredictorError):
        loaded(folder, predictor=side(tmp_path / "foreign", seed=1))
    overwrite(folder / "model.safetensors")
    (model,) = models_loaded
    assert mx.all(model.layers[2].mlp.up_proj.weight == 7).item()


def test_the_users_one_of_other_sizes_is_refused(folder: Path, home: Path) -> None:
    """The fingerprint agrees, so somebody meant it for this model."""
    mine = side(home / "mine")
    info = json.loads((mine / JSON_NAME).read_text())
    info["base_model"]["layers"] -= 1
    (mine / JSON_NAME).write_text(json.dumps(info))
    with pytest.raises(PredictorError, match="a model with layers 3, this model has 4"):
        loaded(folder)


# What has been read


def changed(folder: Path, side: Path, **more: Any) -> list[bool]:
    """Whether weights of model and predictor are those put on disk after loading."""
    model = loaded(folder, **more)
    overwrite(folder / "model.safetensors")
    overwrite(side / TENSORS_NAME)
    engine = engine_of(model)
    assert engine is not None and isinstance(engine.selector, Trained)
    read = [model.layers[2].mlp.up_proj.weight]
    for p in engine.selector.layers:
        read += [p.query, p.w1, p.w2]
    return [bool(mx.all(w == 7).item()) for w in read]


@pytest.mark.parametrize("place", ["found", "named", "loaded"])
@pytest.mark.parametrize("lazy", [False, True])
def test_weights_are_read_unless_lazy(
    folder: Path, home: Path, place: str, lazy: bool
) -> None:
    mine = side(home / "mine")
    named = {"found": None, "named": mine, "loaded": load_predictor(mine)}[place]
    fresh = changed(folder, mine, predictor=named, lazy=lazy)
    assert fresh == [lazy] * (1 + 3 * models.LAYERS)
