"""Side files with token-wise predictors and low-rank compensators."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import pytest
from side_files import (
    LAYERS,
    NEW,
    SHAPES,
    D,
    F,
    H,
    R,
    edit,
    information,
    overwrite,
    refusal,
    shapes_of,
    weights,
)

from mlx_fastforward.neurons.compensators import LowRankCompensator, MLPCompensator
from mlx_fastforward.neurons.predictor import PredictorWeights
from mlx_fastforward.predictors.file import (
    TENSORS_NAME,
    PredictorFile,
    load_predictor,
    packed,
    save_predictor,
)

KINDS = [("token-wise", "mlp"), ("pooled", "low-rank"), ("token-wise", "low-rank")]
SHAPE = shapes_of(**NEW)


def saved(path: Path, **changed: Optional[mx.array]) -> Path:
    """A predictor of the new kinds, some tensors changed or, if None, missing."""
    tensors = {**weights(**NEW), **changed}
    info = information(**NEW)
    save_predictor(path, info, {k: w for k, w in tensors.items() if w is not None})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "predictor")


def held(predictor: PredictorFile) -> dict[str, mx.array]:
    """The arrays that a loaded predictor keeps, by their names in the file."""
    assert predictor.layers is not None and predictor.compensator is not None
    parts = {"predictor": predictor.layers, "compensator": predictor.compensator.layers}
    return {
        f"layers.{i}.{part}.{name}": w
        for part, layers in parts.items()
        for i, layer in enumerate(layers)
        for name, w in vars(layer).items()
        if isinstance(w, mx.array)
    }


# What comes back


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("predictor, compensator", KINDS)
def test_round_trip(
    tmp_path: Path, predictor: str, compensator: str, dtype: mx.Dtype
) -> None:
    tensors = weights(dtype, predictor, compensator)
    save_predictor(tmp_path, information(None, predictor, compensator), tensors)
    found = load_predictor(tmp_path)
    assert found.importances == tensors.pop("importance").tolist()
    arrays = held(found)
    assert arrays.keys() == tensors.keys()
    for name, w in arrays.items():
        assert w.dtype == dtype and mx.array_equal(w, tensors[name])


@pytest.mark.parametrize("predictor, compensator", KINDS)
def test_kinds_are_told_apart(tmp_path: Path, predictor: str, compensator: str) -> None:
    tensors = weights(predictor=predictor, compensator=compensator)
    save_predictor(tmp_path, information(None, predictor, compensator), tensors)
    found = load_predictor(tmp_path)
    assert found.predictors is not None
    queries = {p.query is None for p in found.predictors}
    assert queries == {predictor == "token-wise"}
    kind = LowRankCompensator if compensator == "low-rank" else MLPCompensator
    assert type(found.compensator) is kind


def test_arrays_are_all_weights_and_nothing_else(folder: Path) -> None:
    """Whoever evaluates them has nothing left to read."""
    found = load_predictor(folder)
    mx.eval(found.arrays())
    overwrite(folder / TENSORS_NAME)
    arrays = held(found)
    assert {id(w) for w in arrays.values()} == {id(w) for w in found.arrays()}
    assert len(found.arrays()) == len(SHAPE) * LAYERS
    for name, w in arrays.items():
        assert mx.array_equal(w, weights(**NEW)[name])


def test_weights_are_read_when_used(folder: Path) -> None:
    """Bytes that change after loading are seen, so they had not been read."""
    found = load_predictor(folder)
    overwrite(folder / TENSORS_NAME)
    assert all(mx.all(w == 7).item() for w in held(found).values())


def test_tensors_of_other_kinds_beside_them_are_left_alone(tmp_path: Path) -> None:
    """The JSON says what a predictor is; a query would make a predictor a pooled one."""
    beside = {k: w for k, w in weights().items() if k not in weights(**NEW)}
    assert "layers.0.predictor.query" in beside
    found = held(load_predictor(saved(tmp_path, **beside)))
    assert found.keys() == {k for k in weights(**NEW) if k != "importance"}


def ranked(ranks: list[int]) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """A rank per layer, in both parts."""
    info, tensors = information(**NEW), weights(**NEW)
    for i, r in enumerate(ranks):
        shapes = {
            "predictor.w1": (D, r),
            "predictor.w2": (2 * r, F),
            "compensator.v": (D, r),
            "compensator.u": (F, r + 1),
        }
        for name, shape in shapes.items():
            key = mx.random.key(r)
            tensors[f"layers.{i}.{name}"] = mx.random.normal(shape, key=key)
    for part in NEW:
        info[part]["rank"] = ranks
    return info, tensors


def test_a_rank_per_layer(tmp_path: Path) -> None:
    info, tensors = ranked([3, 1, 5])
    save_predictor(tmp_path, info, tensors)
    for name, w in held(load_predictor(tmp_path)).items():
        assert mx.array_equal(w, tensors[name])


@pytest.mark.parametrize("part, name", [("predictor", "w1"), ("compensator", "v")])
def test_ranks_that_are_not_those_of_the_weights(
    tmp_path: Path, part: str, name: str
) -> None:
    save_predictor(tmp_path, *ranked([3, 1, 5]))
    edit(tmp_path, lambda info: info[part].update(rank=[3, 2, 5]))
    wanted = f"layers.1.{part}.{name} should have shape {(D, 2)}, found {(D, 1)}"
    assert wanted in refusal(tmp_path)


# What is refused


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", SHAPE)
def test_missing_tensors(tmp_path: Path, name: str, layer: int) -> None:
    key = f"layers.{layer}.{name}"
    text = refusal(saved(tmp_path, **{key: None}))
    assert text.endswith(f"lacks the tensor {key}.")


WRONG: dict[str, list[tuple[int, ...]]] = {
    "predictor.w1": [(R, D), (D, 2 * R), (D,)],
    "predictor.w2": [SHAPES["pooled"]["w2"], (F, 2 * R), (2 * R, D)],
    "predictor.bias": [(D,), (1, F), (F, 1), ()],
    "compensator.center": [(F,), (1, D), (D, 1), ()],
    "compensator.v": [(H, D), (D, H + 1), (F, H)],
    "compensator.u": [(F, H), (H + 1, F), (D, H + 1)],
}


def test_every_tensor_is_given_wrong_shapes() -> None:
    assert set(WRONG) == set(SHAPE)


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize(
    "name, shape", [(name, shape) for name in WRONG for shape in WRONG[name]]
)
def test_wrong_shapes(
    tmp_path: Path, name: str, shape: tuple[int, ...], layer: int
) -> None:
    key = f"layers.{layer}.{name}"
    text = refusal(saved(tmp_path, **{key: mx.zeros(shape)}))
    assert text.endswith(f"{key} should have shape {SHAPE[name]}, found {shape}.")


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.complex64], ids=str)
@pytest.mark.parametrize("name", SHAPE)
def test_tensors_that_are_no_floats(tmp_path: Path, name: str, dtype: mx.Dtype) -> None:
    key = f"layers.1.{name}"
    given = mx.ones(SHAPE[name]).astype(dtype)
    assert f"{key} should be float, found {dtype}" in refusal(
        saved(tmp_path, **{key: given})
    )


@pytest.mark.parametrize(
    "part, kind, lacks",
    [
        ("predictor", "pooled", "layers.0.predictor.query"),
        ("compensator", "mlp", "layers.0.compensator.w1"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_new_weights_that_the_json_calls_old(
    folder: Path, part: str, kind: str, lacks: str, told: bool
) -> None:
    """A part without a kind is of the first one that there was."""
    edit(folder, lambda info: info[part].pop("kind") and None)
    if told:
        edit(folder, lambda info: info[part].update(kind=kind))
    assert refusal(folder).endswith(f"lacks the tensor {lacks}.")


@pytest.mark.parametrize(
    "part, lacks",
    [
        ("predictor", "layers.0.predictor.bias"),
        ("compensator", "layers.0.compensator.center"),
    ],
)
def test_old_weights_that_the_json_calls_new(
    tmp_path: Path, part: str, lacks: str
) -> None:
    save_predictor(tmp_path, information(), weights())
    edit(tmp_path, lambda info: info[part].update(kind=NEW[part]))
    assert refusal(tmp_path).endswith(f"lacks the tensor {lacks}.")


@pytest.mark.parametrize("kind", ["token-wise2", "low_rank", "", None, ["low"]])
@pytest.mark.parametrize("part", NEW)
def test_unknown_kinds(folder: Path, part: str, kind: Any) -> None:
    known = {
        "predictor": "'pooled' or 'token-wise'",
        "compensator": "'mlp' or 'low-rank'",
    }
    edit(folder, lambda info: info[part].update(kind=kind))
    wanted = f"expected a {part} of kind {known[part]}, found {kind!r}; "
    assert wanted in refusal(folder)


# Packed token-wise predictors


def save_packed(path: Path, bits: int, **changed: Optional[mx.array]) -> Path:
    info, tensors = information(**NEW), weights(**NEW)
    info["predictor"]["quantization"] = {"bits": bits}
    for name in [k for k in tensors if k.endswith("predictor.w2")]:
        tensors.update(packed(name, tensors.pop(name), bits))
    tensors.update(changed)  # type: ignore[arg-type]
    save_predictor(path, info, {k: w for k, w in tensors.items() if w is not None})
    return path


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_parts_come_back_to_the_bit(tmp_path: Path, bits: int) -> None:
    predictors = load_predictor(save_packed(tmp_path, bits)).predictors
    tensors = mx.load(str(tmp_path / TENSORS_NAME))
    assert predictors is not None
    for i, found in enumerate(predictors):
        name = f"layers.{i}.predictor"
        parts = {k: tensors[f"{name}.w2.{k}"] for k in ("scales", "biases")}
        w1, w2, bias = (tensors[f"{name}.{k}"] for k in ("w1", "w2", "bias"))
        wanted = PredictorWeights(None, w1, w2, **parts, bits=bits, bias=bias)
        assert (found.query, found.bits) == (None, bits)
        for key in ("w1", "w2", "scales", "biases", "bias"):
            assert mx.array_equal(getattr(found, key), getattr(wanted, key))


def test_arrays_hold_scales_and_both_kinds_of_biases(tmp_path: Path) -> None:
    arrays = load_predictor(save_packed(tmp_path, 8)).arrays()
    assert len({id(w) for w in arrays}) == len(arrays) == LAYERS * (len(SHAPE) + 2)
    assert sum(w.dtype == mx.uint32 for w in arrays) == LAYERS


@pytest.mark.parametrize("name", ["w1", "w2", "w2.scales", "w2.biases", "bias"])
def test_missing_parts_of_packed_weights(tmp_path: Path, name: str) -> None:
    key = f"layers.1.predictor.{name}"
    text = refusal(save_packed(tmp_path, 4, **{key: None}))
    assert text.endswith(f"lacks the tensor {key}.")


@pytest.mark.parametrize(
    "name, dtype, columns",
    [
        ("w2", mx.uint32, F * 4 // 32),
        ("w2.scales", mx.float32, 1),
        ("w2.biases", mx.float32, 1),
    ],
)
def test_packed_weights_for_the_mean_alone(
    tmp_path: Path, name: str, dtype: mx.Dtype, columns: int
) -> None:
    """As a pooled predictor's: half of the rows."""
    key, rows = f"layers.2.predictor.{name}", 2 * R
    given = mx.ones((R, columns)).astype(dtype)
    text = refusal(save_packed(tmp_path, 4, **{key: given}))
    assert f"{key} should have shape {(rows, columns)}, found {(R, columns)}" in text
