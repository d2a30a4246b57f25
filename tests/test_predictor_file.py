"""The predictor file: what was saved comes back, whole or not at all."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import predictor_files as files
import pytest
from predictor_files import BASE, NEW, UNEVEN, F, Kind, held, information, save, weights

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.neurons.compensators import MLPCompensator
from mlx_fastforward.predictors import file as module
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME, load_predictor

KINDS: list[Kind] = [
    {"predictor": "token-wise"},
    {"compensator": "low-rank"},
    {**NEW, **UNEVEN},
    {**UNEVEN, "bits": 4},
    {**NEW, "bits": 8},
    {"compensator": None},
    {"predictor": None},
]
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
QUERY = "layers.0.predictor.query"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_round_trip(tmp_path: Path, kind: Kind, dtype: mx.Dtype) -> None:
    """Tensors of other kinds beside them are left alone: the JSON says what there is."""
    saved, shapes = weights(dtype, **kind), files.shapes(**kind)
    beside: dict[str, Any] = {**weights(**NEW), **weights(), **saved}
    file = load_predictor(save(tmp_path, beside, dtype, **kind))
    assert file.importances == saved.pop("importance").tolist() == [0.5, 0.25, 3.0]
    assert file.base == replace(BASE, ffn_size=kind.get("width", F))
    assert file.source == str(tmp_path) and file.details["format"] == 1
    assert file.details["calibration"] == {"tokens": 1000}
    bits = None if kind.get("predictor", "") is None else [kind.get("bits", 0)] * 3
    assert (file.layers and [p.bits for p in file.layers]) == bits
    compensator = kind.get("compensator", "mlp")
    assert (file.compensator and file.compensator.name) == compensator
    if isinstance(file.compensator, MLPCompensator):
        assert file.compensator.activation == "silu"
    assert held(file).keys() == saved.keys() == shapes.keys() - {"importance"}
    for name, w in held(file).items():
        assert w.dtype == (dtype if saved[name].dtype != mx.uint32 else mx.uint32)
        assert w.shape == shapes[name] and mx.array_equal(w, saved[name])


@pytest.mark.parametrize("kind", [{}, NEW, {"bits": 8}], ids=str)
def test_weights_are_read_when_used(tmp_path: Path, kind: Kind) -> None:
    """Bytes that change after loading are seen; arrays are all that there is to read."""
    save(tmp_path, **kind)
    evaluated, lazy = load_predictor(tmp_path), load_predictor(tmp_path)
    arrays = evaluated.arrays()
    mx.eval(arrays)
    files.overwrite(tmp_path / TENSORS_NAME)
    assert {id(w) for w in arrays} == {id(w) for w in held(evaluated).values()}
    for name, w in held(evaluated).items():
        assert mx.array_equal(w, weights(**kind)[name])
    floats = [w for w in held(lazy).values() if w.dtype == mx.float32]
    assert all(mx.all(w == 7).item() for w in floats)


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    """Files were made before there were kinds; names are only shown to people."""
    save(tmp_path, {"importance": None})
    files.edit(tmp_path, "predictor", kind=..., quantization=None)
    files.edit(tmp_path, "compensator", kind=..., activation=...)
    files.edit(tmp_path, "base_model", name=3, model_type=None, ffn_size=[F] * 3)
    file = load_predictor(tmp_path)
    assert held(file).keys() == weights().keys() - {"importance"}
    assert file.importances is None
    assert isinstance(file.compensator, MLPCompensator)
    assert file.compensator.activation == "relu"
    assert file.base == replace(BASE, name="another model", model_type="")


def test_weights_of_another_dtype(tmp_path: Path) -> None:
    """Packed ones stay as they are, and so does the file that was cast."""
    kind: Kind = {"compensator": "low-rank", "bits": 4}
    file = load_predictor(save(tmp_path, **kind))
    for name, w in held(file.astype(mx.float16)).items():
        given = weights(**kind)[name]
        wanted = given if name.endswith("w2") else given.astype(mx.float16)
        assert w.dtype == wanted.dtype and mx.array_equal(w, wanted)
    assert {w.dtype for w in file.arrays()} == {mx.float32, mx.uint32}
    save(tmp_path, {"layers.1.compensator.u": mx.full((F, 5), 1e6)}, **kind)
    with pytest.raises(PredictorError, match="does not fit mlx.core.float16"):
        load_predictor(tmp_path).astype(mx.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["pooled", "token-wise"])
def test_packed_scores(tmp_path: Path, kind: str, bits: int, dtype: mx.Dtype) -> None:
    """Those of the unpacked weights, whose group of neurons is the largest that fits."""
    save(tmp_path, {}, dtype, **{**UNEVEN, "predictor": kind, "bits": bits})
    x = mx.random.normal((5, 4, files.D), key=mx.random.key(0)).astype(dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}[dtype]
    for w, group in zip(load_predictor(tmp_path).layers or [], (64, 32, 32)):
        plain = mx.dequantize(w.w2, w.scales, w.biases, group, bits)
        wanted = replace(w, w2=plain, scales=None, biases=None, bits=0)(x)
        found, wanted = w(x).astype(mx.float32), wanted.astype(mx.float32)
        assert mx.abs(found - wanted).max() < tolerance * mx.abs(wanted).max()


def test_saving_over_a_file_replaces_it(tmp_path: Path) -> None:
    first = load_predictor(save(tmp_path))
    tensors = {k: v + 1 for k, v in weights().items()}
    module.save_predictor(tmp_path, information(), tensors)
    assert mx.array_equal(held(first)[QUERY], weights()[QUERY])
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME]
    # over itself: its tensors are still only mapped while they are written
    mapped: Any = mx.load(str(tmp_path / TENSORS_NAME))
    module.save_predictor(tmp_path, information(), mapped)
    for name, w in held(load_predictor(tmp_path)).items():
        assert mx.array_equal(w, tensors[name])


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_save_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, after: int
) -> None:
    """The process dies at a renaming: never the old description of new weights."""
    folder = save(tmp_path / "file") if there else tmp_path / "file"
    real, calls = os.replace, iter(range(9))

    def replace(*args: Any) -> None:
        if next(calls) >= after:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(folder)
    assert "no predictor" in files.refusal(folder)
    left = [p.name for p in folder.iterdir()] if folder.exists() else None
    assert left == ([TENSORS_NAME] if there or after else None)


@pytest.mark.parametrize("there", [None, "empty", "mine.txt", JSON_NAME])
@pytest.mark.parametrize("error", [TypeError, OSError])
def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: Any, error: Any
) -> None:
    """No JSON, or a full disk; no folder, an empty one, another's, or a file."""
    folder = tmp_path / "above" / "folder"
    if there:
        save(folder)
    for name in {None: (), JSON_NAME: ()}.get(there, files.BOTH):
        (folder / name).unlink()
    if there == "mine.txt":
        (folder / there).write_text("mine")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}

    def full(path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")  # mlx's own

    if error is OSError:
        monkeypatch.setattr(mx, "save_safetensors", full)
    info = {"a": {1}} if error is TypeError else {}
    with pytest.raises(error):
        module.save_predictor(folder, info, {k: v + 1 for k, v in weights().items()})
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before
