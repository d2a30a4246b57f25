"""The side file: what was saved comes back, whole or not at all."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from side_files import (
    BASE,
    LAYERS,
    edit,
    information,
    one_line,
    overwrite,
    refusal,
    weights,
)

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.neurons.compensators import MLPCompensator
from mlx_fastforward.predictors import file as adapter_module
from mlx_fastforward.predictors.file import (
    FORMAT,
    JSON_NAME,
    TENSORS_NAME,
    PredictorFile,
    load_predictor,
    save_predictor,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_predictor(tmp_path / "predictor", information(), weights())
    return tmp_path / "predictor"


# What comes back


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_round_trip(tmp_path: Path, dtype: mx.Dtype) -> None:
    saved = weights(dtype)
    save_predictor(tmp_path, information(), saved)
    found = load_predictor(tmp_path)
    assert found.predictors is not None and len(found.predictors) == LAYERS
    assert isinstance(found.compensator, MLPCompensator)
    assert found.compensator.activation == "silu"
    assert len(found.compensator.layers) == LAYERS
    for i in range(LAYERS):
        pairs = {
            "predictor.query": found.predictors[i].query,
            "predictor.w1": found.predictors[i].w1,
            "predictor.w2": found.predictors[i].w2,
            "compensator.w1": found.compensator.layers[i].w1,
            "compensator.w2": found.compensator.layers[i].w2,
        }
        for name, tensor in pairs.items():
            assert tensor.dtype == dtype
            assert mx.array_equal(tensor, saved[f"layers.{i}.{name}"])
    assert found.importances == [0.5, 0.25, 3.0]
    assert found.base == BASE
    assert found.source == str(tmp_path)
    assert found.details["calibration"] == {"tokens": 1000}
    assert found.details["format"] == FORMAT


@pytest.mark.parametrize("part", ["predictor", "compensator", "importance"])
def test_parts_are_optional(tmp_path: Path, part: str) -> None:
    info = information()
    info.pop(part, None)
    kept = {k: v for k, v in weights().items() if f".{part}." not in k and k != part}
    save_predictor(tmp_path, info, kept)
    found = load_predictor(tmp_path)
    assert (found.predictors is None) == (part == "predictor")
    assert (found.compensator is None) == (part == "compensator")
    assert (found.importances is None) == (part == "importance")


def test_relu_is_the_default_activation(folder: Path) -> None:
    edit(folder, lambda info: info["compensator"].pop("activation") and None)
    compensator = load_predictor(folder).compensator
    assert isinstance(compensator, MLPCompensator)
    assert compensator.activation == "relu"


@pytest.mark.parametrize("part", ["predictor", "compensator"])
def test_a_part_without_a_kind_is_of_the_known_one(folder: Path, part: str) -> None:
    edit(folder, lambda info: info[part].pop("kind") and None)
    assert len(load_predictor(folder).arrays()) == 5 * LAYERS


@pytest.mark.parametrize("name", ["", None, 3, ["tiny"]])
def test_a_base_model_without_a_name(folder: Path, name: Any) -> None:
    """It is only shown to people."""
    edit(folder, lambda info: info["base_model"].update(name=name, model_type=name))
    base = load_predictor(folder).base
    assert base == replace(BASE, name="another model", model_type="")


def test_names_may_hold_any_letters(tmp_path: Path) -> None:
    info = information()
    info["base_model"]["name"] = "Grüße/模型"
    save_predictor(tmp_path, info, weights())
    assert load_predictor(tmp_path).base.name == "Grüße/模型"


def test_weights_are_read_when_used(folder: Path) -> None:
    """Bytes that change after loading are seen, so they had not been read."""
    found = load_predictor(folder)
    overwrite(folder / TENSORS_NAME)
    assert found.predictors is not None
    assert mx.all(found.predictors[1].w1 == 7).item()


def test_saving_over_an_adapter_replaces_it(folder: Path) -> None:
    first = load_predictor(folder)
    tensors = {k: v + 1 for k, v in weights().items()}
    save_predictor(folder, information(), tensors)
    second = load_predictor(folder)
    assert first.predictors is not None and second.predictors is not None
    key = "layers.0.predictor.query"
    assert mx.array_equal(second.predictors[0].query, tensors[key])
    assert mx.array_equal(first.predictors[0].query, weights()[key])
    assert sorted(p.name for p in folder.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_an_adapter_can_be_saved_over_itself(folder: Path) -> None:
    """Its tensors are still only mapped while they are written."""
    tensors = mx.load(str(folder / TENSORS_NAME))
    save_predictor(folder, information(), tensors)
    found = load_predictor(folder)
    assert found.predictors is not None
    wanted = weights()["layers.2.predictor.w2"]
    assert mx.array_equal(found.predictors[2].w2, wanted)


def test_arrays_are_all_weights_and_nothing_else(folder: Path) -> None:
    """Whoever evaluates them has nothing left to read."""
    found = load_predictor(folder)
    arrays = found.arrays()
    mx.eval(arrays)
    overwrite(folder / TENSORS_NAME)
    assert found.predictors is not None and found.compensator is not None
    parts = [vars(p) for p in [*found.predictors, *found.compensator.layers]]
    held = [w for part in parts for w in part.values() if isinstance(w, mx.array)]
    assert len(held) == len(arrays) == 5 * LAYERS
    assert {id(w) for w in held} == {id(w) for w in arrays}
    saved = [w for name, w in weights().items() if name != "importance"]
    for w in held:
        assert any(mx.array_equal(w, s) for s in saved)


@pytest.mark.parametrize("part, left", [("predictor", 2), ("compensator", 3)])
def test_arrays_of_one_part(tmp_path: Path, part: str, left: int) -> None:
    info = information()
    del info[part]
    save_predictor(tmp_path, info, weights())
    assert len(load_predictor(tmp_path).arrays()) == left * LAYERS


def test_an_adapter_without_weights_has_no_arrays() -> None:
    assert PredictorFile(BASE, importances=[1.0, 2.0, 3.0]).arrays() == []


def test_not_globbed_as_weights_of_the_model() -> None:
    """mlx-lm loads every model*.safetensors of a folder, strictly."""
    assert not TENSORS_NAME.startswith("model")


# Nothing half-written


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process dies at the renaming number ``after``."""
    real, calls = os.replace, iter(range(100))

    def replace(*args: Any) -> None:
        if next(calls) >= after:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(adapter_module.os, "replace", replace)


def half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the weights."""

    def full(path: str, tensors: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_module.mx, "save_safetensors", full)


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_save_is_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        save_predictor(tmp_path, information(), weights())
    assert "no predictor" in refusal(tmp_path)
    assert not (tmp_path / JSON_NAME).exists()


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_save_over_an_adapter_mixes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Old, new or refused, but never the old description of new weights."""
    info, tensors = information(), {k: v + 1 for k, v in weights().items()}
    info["calibration"] = {"tokens": 2}
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        save_predictor(folder, info, tensors)
    try:
        found = load_predictor(folder)
    except PredictorError as e:
        one_line(e)
        return
    assert found.predictors is not None
    new_details = found.details["calibration"] == {"tokens": 2}
    key = "layers.0.predictor.query"
    new_weights = mx.array_equal(found.predictors[0].query, tensors[key]).item()
    assert new_details == new_weights


@pytest.mark.parametrize("info, error", [({"a": {1}}, TypeError), ({}, OSError)])
def test_a_failed_save_leaves_the_old_adapter(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    info: dict[str, Any],
    error: type[Exception],
) -> None:
    if error is OSError:
        half_written(monkeypatch)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(error):
        save_predictor(folder, info, {k: v + 1 for k, v in weights().items()})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failed_save_leaves_no_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_written(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_predictor(tmp_path / "new", information(), weights())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [[], ["notes.txt"], [".hidden", "model.safetensors"]])
def test_a_failed_save_keeps_a_folder_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    half_written(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_predictor(tmp_path, information(), weights())
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: "mine" for name in names
    }


@pytest.mark.parametrize("after, left", [(0, None), (1, [TENSORS_NAME])])
def test_an_interrupted_save_leaves_nothing_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, left: Any
) -> None:
    folder = tmp_path / "new"
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        save_predictor(folder, information(), weights())
    found = [p.name for p in folder.iterdir()] if folder.exists() else None
    assert found == left


def test_a_save_makes_the_folders_above(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    save_predictor(folder, information(), weights())
    assert sorted(p.name for p in folder.iterdir()) == [JSON_NAME, TENSORS_NAME]
    assert load_predictor(folder).base == BASE


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError):
        save_predictor(file, information(), weights())
    assert file.read_text() == "mine"
