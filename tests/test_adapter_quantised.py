"""Predictors whose predictors are packed in 4 or 8 bits, and predictors with a rank per layer."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
import reference
from side_files import (
    LAYERS,
    SHAPES,
    D,
    H,
    R,
    edit,
    information,
    refusal,
    tiny_model,
    unpacked,
    weights,
)

from mlx_fastforward.attachment import attach
from mlx_fastforward.neurons.predictor import group_size
from mlx_fastforward.neurons.selectors import Trained
from mlx_fastforward.predictors.file import (
    JSON_NAME,
    BaseModel,
    load_predictor,
    packed,
    save_predictor,
)

NEURONS = [128, 96]  # in groups of 64 and of 32
BITS = [4, 8]


def description(f: int, bits: int, kind: str = "pooled") -> dict[str, Any]:
    info = information(predictor=kind)
    info["base_model"]["ffn_size"] = f
    info["predictor"]["quantization"] = {"bits": bits}
    return info


def float_weights(
    f: int, dtype: mx.Dtype = mx.float32, kind: str = "pooled"
) -> dict[str, mx.array]:
    """As ``weights``, for f neurons."""
    rng, tensors = np.random.default_rng(1), weights(dtype, kind)
    shapes = {"w2": (SHAPES[kind]["w2"][0], f)}
    if kind == "token-wise":
        shapes["bias"] = (f,)
    for i in range(LAYERS):
        for name, shape in shapes.items():
            wide = mx.array(rng.normal(1, 2, shape)).astype(dtype)
            tensors[f"layers.{i}.predictor.{name}"] = wide
    return tensors


def packed_weights(
    f: int, bits: int, dtype: mx.Dtype = mx.float32, kind: str = "pooled"
) -> dict[str, mx.array]:
    tensors = float_weights(f, dtype, kind)
    for name in [k for k in tensors if k.endswith("predictor.w2")]:
        tensors.update(packed(name, tensors.pop(name), bits))
    return tensors


def float64(w: mx.array) -> np.ndarray:
    return np.array(w.astype(mx.float32)).astype(np.float64)


def save_packed(path: Path, f: int, bits: int, **changed: mx.array) -> Path:
    tensors = {**packed_weights(f, bits), **changed}
    save_predictor(path, description(f, bits), tensors)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_packed(tmp_path / "predictor", 128, 4)


# What comes back


@pytest.mark.parametrize("f, size", [(64, 64), (32, 32), (96, 32), (8192, 64), (48, 0)])
def test_groups_are_the_largest_that_divide_the_neurons(f: int, size: int) -> None:
    assert group_size(f) == size


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("f", NEURONS)
@pytest.mark.parametrize("kind", ["pooled", "token-wise"])
def test_scores_are_those_of_the_unpacked_weights(
    tmp_path: Path, kind: str, f: int, bits: int, dtype: mx.Dtype
) -> None:
    tensors = packed_weights(f, bits, dtype, kind)
    save_predictor(tmp_path, description(f, bits, kind), tensors)
    predictors = load_predictor(tmp_path).predictors
    assert predictors is not None and len(predictors) == LAYERS
    x = mx.random.normal((5, 4, D), key=mx.random.key(0)).astype(dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}[dtype]
    for i, predictor in enumerate(predictors):
        assert predictor.bits == bits
        scores = float64(predictor(x))
        wanted = [by_hand(tensors, i, bits, kind, block) for block in float64(x)]
        assert scores.shape == (5, f)
        assert models.distance(scores, np.stack(wanted)) < tolerance


def by_hand(
    tensors: dict[str, mx.array], layer: int, bits: int, kind: str, x: np.ndarray
) -> np.ndarray:
    """The scores of one block from packed weights."""
    name = f"layers.{layer}.predictor"
    w1, w2 = float64(tensors[f"{name}.w1"]), unpacked(tensors, f"{name}.w2", bits)
    if kind == "token-wise":
        return reference.token_wise(x, w1, w2, float64(tensors[f"{name}.bias"]))
    return reference.predictor(x, float64(tensors[f"{name}.query"]), w1, w2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("f", NEURONS)
def test_packed_weights_are_near_the_given_ones(f: int, bits: int) -> None:
    """No further than a level is wide, in the group's own range."""
    for name, w in float_weights(f).items():
        if not name.endswith("predictor.w2"):
            continue
        tensors = packed(name, w, bits)
        assert tensors[name].shape == (R, f * bits // 32)
        given = np.array(w).reshape(R, -1, group_size(f))
        level = np.ptp(given, axis=2, keepdims=True) / (2**bits - 1)
        error = given - unpacked(tensors, name, bits).reshape(given.shape)
        assert np.all(np.abs(error) < 1.01 * level)
        assert np.abs(error).max() > 0


def test_packed_parts_come_back_to_the_bit(folder: Path) -> None:
    tensors = packed_weights(128, 4)
    predictors = load_predictor(folder).predictors
    assert predictors is not None
    for i, p in enumerate(predictors):
        name = f"layers.{i}.predictor"
        pairs = [
            (p.query, f"{name}.query"),
            (p.w1, f"{name}.w1"),
            (p.w2, f"{name}.w2"),
            (p.scales, f"{name}.w2.scales"),
            (p.biases, f"{name}.w2.biases"),
        ]
        for found, key in pairs:
            assert found is not None and found.dtype == tensors[key].dtype
            assert mx.array_equal(found, tensors[key])


def test_arrays_hold_scales_and_biases(folder: Path) -> None:
    arrays = load_predictor(folder).arrays()
    assert len(arrays) == LAYERS * (5 + 2)
    assert sum(w.dtype == mx.uint32 for w in arrays) == LAYERS
    assert len({id(w) for w in arrays}) == len(arrays)


def test_unpacked_predictors_know_no_bits(tmp_path: Path) -> None:
    """null is what JSON has for nothing."""
    info = information()
    info["predictor"]["quantization"] = None
    save_predictor(tmp_path, info, weights())
    predictors = load_predictor(tmp_path).predictors
    assert predictors is not None
    assert [(p.bits, p.scales, p.biases) for p in predictors] == [
        (0, None, None)
    ] * LAYERS


@pytest.mark.parametrize("bits", BITS)
def test_a_model_reads_a_prompt_with_packed_predictors(
    tmp_path: Path, bits: int
) -> None:
    """As with the same weights unpacked, and unlike without predictors."""
    model = models.tiny("llama")
    side = models.save_random_predictor(model, tmp_path)
    tensors = mx.load(str(side / "fastforward.safetensors"))
    mx.eval(tensors)
    plain = dict(tensors)
    for name in [k for k in tensors if k.endswith("w2")]:
        parts = packed(name, tensors.pop(name), bits)
        tensors.update(parts)
        plain[name] = mx.array(unpacked(parts, name, bits).astype(np.float32))
    outs = []
    info = load_predictor(side).details
    for quantization, given in (({"bits": bits}, tensors), (None, plain)):
        info["predictor"]["quantization"] = quantization
        save_predictor(side, info, given)
        engine = attach(model, models.settings(), predictor=load_predictor(side))
        assert isinstance(engine.selector, Trained)
        outs.append(models.prefill(model, models.token_ids(80))[0])
    attach(model, models.settings())
    other = models.prefill(model, models.token_ids(80))[0]
    assert models.distance(outs[0], outs[1]) < 1e-4
    assert models.distance(outs[0], other) > 0.01


# What is refused


@pytest.mark.parametrize(
    "bits", [2, 3, 5, 6, 16, 32, 0, -4, 10**15, True, "4", 4.0, None, [4], {"b": 4}]
)
def test_other_numbers_of_bits(folder: Path, bits: Any) -> None:
    edit(folder, lambda info: info["predictor"]["quantization"].update(bits=bits))
    text = refusal(folder)
    assert JSON_NAME in text and str(bits) in text and "bits" in text


@pytest.mark.parametrize("value", [4, "4", True, False, 0, [], [{"bits": 4}], {}])
def test_quantization_that_says_no_bits(folder: Path, value: Any) -> None:
    edit(folder, lambda info: info["predictor"].update(quantization=value))
    assert "quantization" in refusal(folder)


@pytest.mark.parametrize("saved, said", [(4, 8), (8, 4)])
def test_bits_that_are_not_those_of_the_weights(
    tmp_path: Path, saved: int, said: int
) -> None:
    save_packed(tmp_path, 128, saved)
    edit(tmp_path, lambda info: info["predictor"].update(quantization={"bits": said}))
    text = refusal(tmp_path)
    shape, found = (R, 128 * said // 32), (R, 128 * saved // 32)
    assert "layers.0.predictor.w2" in text
    assert f"should have shape {shape}" in text and f"found {found}" in text


def test_neurons_that_make_no_groups(tmp_path: Path) -> None:
    """Packed all the same: 80 neurons fill ten words, but no groups of 32."""
    parts = {
        f"layers.{i}.predictor.w2{part}": w
        for i in range(LAYERS)
        for part, w in {
            "": mx.zeros((R, 10), mx.uint32),
            ".scales": mx.ones((R, 5)),
            ".biases": mx.ones((R, 5)),
        }.items()
    }
    save_predictor(tmp_path, description(80, 4), {**weights(), **parts})
    text = refusal(tmp_path)
    assert "a multiple of 32 neurons" in text and "80 neurons" in text


@pytest.mark.parametrize("part", ["", ".scales", ".biases"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_missing_parts(tmp_path: Path, layer: int, part: str) -> None:
    tensors = packed_weights(96, 8)
    key = f"layers.{layer}.predictor.w2{part}"
    del tensors[key]
    save_predictor(tmp_path, description(96, 8), tensors)
    assert refusal(tmp_path).endswith(f"lacks the tensor {key}.")


@pytest.mark.parametrize(
    "dtype", [mx.int32, mx.uint16, mx.uint64, mx.float32, mx.bool_], ids=str
)
def test_packed_weights_of_another_dtype(tmp_path: Path, dtype: mx.Dtype) -> None:
    key = "layers.1.predictor.w2"
    words = mx.ones((R, 16)).astype(dtype)
    text = refusal(save_packed(tmp_path, 128, 4, **{key: words}))
    assert f"{key} should be mlx.core.uint32, found {dtype}" in text


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("dtype", [mx.uint32, mx.int8, mx.complex64], ids=str)
def test_scales_that_are_no_floats(tmp_path: Path, part: str, dtype: mx.Dtype) -> None:
    key = f"layers.2.predictor.w2.{part}"
    given = mx.ones((R, 2)).astype(dtype)
    text = refusal(save_packed(tmp_path, 128, 4, **{key: given}))
    assert f"{key} should be float, found {dtype}" in text


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("shape", [(R, 4), (R, 1), (R + 1, 2), (2, R, 1), ()])
def test_scales_of_other_groups(
    tmp_path: Path, part: str, shape: tuple[int, ...]
) -> None:
    key = f"layers.0.predictor.w2.{part}"
    text = refusal(save_packed(tmp_path, 128, 4, **{key: mx.ones(shape)}))
    assert f"{key} should have shape {(R, 2)}, found {shape}" in text


def test_packed_weights_that_the_json_does_not_announce(folder: Path) -> None:
    edit(folder, lambda info: info["predictor"].pop("quantization") and None)
    assert "layers.0.predictor.w2 should have shape" in refusal(folder)


def test_float_weights_that_the_json_calls_packed(tmp_path: Path) -> None:
    save_predictor(tmp_path, description(128, 8), float_weights(128))
    assert "layers.0.predictor.w2 should have shape" in refusal(tmp_path)


# A rank per layer


def of_ranks(part: str, ranks: list[int]) -> dict[str, mx.array]:
    """The weights, those of one part with these ranks."""
    tensors = weights()
    for i, r in enumerate(ranks):
        for name, axis in (("w1", 1), ("w2", 0)):
            w = tensors[f"layers.{i}.{part}.{name}"]
            shape = [r if a == axis else n for a, n in enumerate(w.shape)]
            key = mx.random.key(10 * i + axis)
            tensors[f"layers.{i}.{part}.{name}"] = mx.random.normal(shape, key=key)
    return tensors


@pytest.fixture(params=["predictor", "compensator"])
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranked(tmp_path: Path, part: str) -> Path:
    """A predictor with a rank per layer, given as a list, in one part."""
    info = information()
    info[part]["rank"] = [3, 1, 5]
    save_predictor(tmp_path, info, of_ranks(part, [3, 1, 5]))
    return tmp_path


def test_a_rank_per_layer(ranked: Path, part: str) -> None:
    found = load_predictor(ranked)
    assert found.predictors is not None and found.compensator is not None
    mine, other = found.predictors, found.compensator.layers
    if part == "compensator":
        mine, other = other, mine
    assert [w.w1.shape[1] for w in mine] == [3, 1, 5]
    assert [w.w2.shape[0] for w in mine] == [3, 1, 5]
    assert {w.w1.shape[1] for w in other} == {H if part == "predictor" else R}
    saved = of_ranks(part, [3, 1, 5])
    for i, w in enumerate(mine):
        assert mx.array_equal(w.w1, saved[f"layers.{i}.{part}.w1"])
        assert mx.array_equal(w.w2, saved[f"layers.{i}.{part}.w2"])


@pytest.mark.parametrize("bits", BITS)
def test_a_rank_per_layer_of_packed_weights(tmp_path: Path, bits: int) -> None:
    tensors, f = of_ranks("predictor", [3, 1, 5]), 64
    for name in [k for k in tensors if k.endswith("predictor.w2")]:
        tensors.update(packed(name, tensors.pop(name), bits))
    info = description(f, bits)
    info["predictor"]["rank"] = [3, 1, 5]
    save_predictor(tmp_path, info, tensors)
    predictors = load_predictor(tmp_path).predictors
    assert predictors is not None
    for i, p in enumerate(predictors):
        hidden = reference.relu(np.ones((1, D)) @ np.array(p.w1).astype(np.float64))
        wanted = hidden @ unpacked(tensors, f"layers.{i}.predictor.w2", bits)
        scores = np.array(p(mx.ones((1, 1, D))))
        np.testing.assert_allclose(scores, wanted, atol=1e-4)


def padded(w: mx.array, axis: int, size: int) -> mx.array:
    """With zeros behind, which add nothing to scores or outputs."""
    width = [(0, size - n if a == axis else 0) for a, n in enumerate(w.shape)]
    return mx.pad(w, width)


def test_a_rank_per_layer_is_the_largest_one_with_zeros(
    ranked: Path, tmp_path: Path, part: str
) -> None:
    info, tensors = information(), of_ranks(part, [3, 1, 5])
    info[part]["rank"] = 5
    for i in range(LAYERS):
        for name, axis in (("w1", 1), ("w2", 0)):
            key = f"layers.{i}.{part}.{name}"
            tensors[key] = padded(tensors[key], axis, 5)
    save_predictor(tmp_path / "padded", info, tensors)
    model, outs = tiny_model(), []
    for folder in (ranked, tmp_path / "padded"):
        predictor = load_predictor(folder)
        predictor.base = BaseModel.of(model)
        attach(model, models.settings(), predictor=predictor)
        outs.append(models.prefill(model, models.token_ids(40, vocab=32))[0])
    assert models.distance(outs[0], outs[1]) < 1e-4


@pytest.mark.parametrize("ranks", [[], [3], [3, 1], [3, 1, 5, 5]])
def test_ranks_of_another_number_of_layers(
    ranked: Path, part: str, ranks: list[int]
) -> None:
    edit(ranked, lambda info: info[part].update(rank=ranks))
    text = refusal(ranked)
    assert f"expected {LAYERS} numbers in {part}.rank, found {len(ranks)}" in text


@pytest.mark.parametrize(
    "rank", ["1", 1.0, True, None, 0, -1, [1], {"r": 1}, float("inf"), "two\nlines"]
)
def test_ranks_that_are_no_numbers(ranked: Path, part: str, rank: Any) -> None:
    edit(ranked, lambda info: info[part].update(rank=[3, rank, 5]))
    text = refusal(ranked)
    assert f"{part}.rank to be a whole number above 0, found {rank!r}" in text


@pytest.mark.parametrize("rank", [2, 10**15, 10**400])
def test_ranks_that_are_not_those_of_the_weights(
    ranked: Path, part: str, rank: int
) -> None:
    edit(ranked, lambda info: info[part].update(rank=[3, rank, 5]))
    text = refusal(ranked)
    assert f"layers.1.{part}.w1 should have shape {(D, rank)}, found {(D, 1)}" in text
