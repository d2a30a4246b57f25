"""The side file: what was saved comes back, all else is refused in one line."""

import json
import math
import os
import signal
import struct
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import huggingface_hub.errors
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from mlx_fastforward import adapter as adapter_module
from mlx_fastforward.adapter import (
    FORMAT,
    JSON_NAME,
    TENSORS_NAME,
    Adapter,
    AdapterError,
    find_adapter,
    fingerprint,
    load_adapter,
    save_adapter,
)
from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.compensators import MLPCompensator
from mlx_fastforward.config import FastForwardError, PrefillConfig
from mlx_fastforward.families import family_of, layer_norm_weights

LAYERS, D, F, R, H = 3, 32, 64, 2, 4


def tiny_model(seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """A Llama whose norms are not all ones, as no trained model's are."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=D,
        num_hidden_layers=layers,
        intermediate_size=F,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=32,
    )
    model = llama.Model(args)
    for layer in model.layers:
        layer.input_layernorm.weight = mx.random.uniform(0.1, 2, (D,))
    return model


def norms(model: nn.Module) -> list[mx.array]:
    return layer_norm_weights(model, family_of(model))


def information(model: Optional[nn.Module] = None) -> dict[str, Any]:
    base = {"layers": LAYERS, "hidden_size": D, "ffn_size": F, "name": "tiny"}
    base["fingerprint"] = fingerprint(norms(model)) if model else "0123456789abcdef"
    return {
        "base_model": base,
        "predictor": {"kind": "mlp", "rank": R},
        "compensator": {"kind": "mlp", "rank": H, "activation": "silu"},
        "calibration": {"tokens": 1000},
    }


def weights(dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    shapes = {
        "predictor.query": (D,),
        "predictor.w1": (D, R),
        "predictor.w2": (R, F),
        "compensator.w1": (D, H),
        "compensator.w2": (H, D),
    }
    rng = np.random.default_rng(0)
    tensors = {
        f"layers.{i}.{name}": mx.array(rng.normal(size=shape)).astype(dtype)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }
    return {**tensors, "importance": mx.array([0.5, 0.25, 3.0])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", information(), weights())
    return tmp_path / "adapter"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of an adapter in place."""
    info = json.loads((folder / JSON_NAME).read_text())
    changed = change(info)
    text = json.dumps(info if changed is None else changed)
    (folder / JSON_NAME).write_text(text)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and text == text.strip() and "\n" not in text
    return text


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as e:
        load_adapter(folder)
    return one_line(e.value)


# What comes back


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_round_trip(tmp_path: Path, dtype: mx.Dtype) -> None:
    saved = weights(dtype)
    save_adapter(tmp_path, information(), saved)
    found = load_adapter(tmp_path)
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
    assert found.base == information()["base_model"]
    assert found.details is not None
    assert found.details["calibration"] == {"tokens": 1000}
    assert found.details["format"] == FORMAT


@pytest.mark.parametrize("part", ["predictor", "compensator", "importance"])
def test_parts_are_optional(tmp_path: Path, part: str) -> None:
    info = information()
    info.pop(part, None)
    kept = {k: v for k, v in weights().items() if f".{part}." not in k and k != part}
    save_adapter(tmp_path, info, kept)
    found = load_adapter(tmp_path)
    assert (found.predictors is None) == (part == "predictor")
    assert (found.compensator is None) == (part == "compensator")
    assert (found.importances is None) == (part == "importance")


def test_relu_is_the_default_activation(folder: Path) -> None:
    edit(folder, lambda info: info["compensator"].pop("activation") and None)
    compensator = load_adapter(folder).compensator
    assert isinstance(compensator, MLPCompensator)
    assert compensator.activation == "relu"


def test_names_may_hold_any_letters(tmp_path: Path) -> None:
    info = information()
    info["base_model"]["name"] = "Grüße/模型"
    save_adapter(tmp_path, info, weights())
    assert load_adapter(tmp_path).base["name"] == "Grüße/模型"


def test_weights_are_read_when_used(folder: Path) -> None:
    """Bytes that change after loading are seen, so they had not been read."""
    found = load_adapter(folder)
    with open(folder / TENSORS_NAME, "r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        start = 8 + header
        file.seek(0, os.SEEK_END)
        size = file.tell() - start
        file.seek(start)
        file.write(np.full(size // 4, 7, np.float32).tobytes())
    assert found.predictors is not None
    assert mx.all(found.predictors[1].w1 == 7).item()


def test_saving_over_an_adapter_replaces_it(folder: Path) -> None:
    first = load_adapter(folder)
    tensors = {k: v + 1 for k, v in weights().items()}
    save_adapter(folder, information(), tensors)
    second = load_adapter(folder)
    assert first.predictors is not None and second.predictors is not None
    key = "layers.0.predictor.query"
    assert mx.array_equal(second.predictors[0].query, tensors[key])
    assert mx.array_equal(first.predictors[0].query, weights()[key])
    assert sorted(p.name for p in folder.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_an_adapter_can_be_saved_over_itself(folder: Path) -> None:
    """Its tensors are still only mapped while they are written."""
    tensors = mx.load(str(folder / TENSORS_NAME))
    save_adapter(folder, information(), tensors)
    found = load_adapter(folder)
    assert found.predictors is not None
    wanted = weights()["layers.2.predictor.w2"]
    assert mx.array_equal(found.predictors[2].w2, wanted)


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


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_save_is_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path, information(), weights())
    assert "no adapter" in refusal(tmp_path)
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
        save_adapter(folder, info, tensors)
    try:
        found = load_adapter(folder)
    except AdapterError as e:
        one_line(e)
        return
    assert found.details is not None and found.predictors is not None
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
    def full(path: str, tensors: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    if error is OSError:
        monkeypatch.setattr(adapter_module.mx, "save_safetensors", full)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(error):
        save_adapter(folder, info, {k: v + 1 for k, v in weights().items()})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# Missing and damaged files


@pytest.mark.parametrize(
    "missing", [[JSON_NAME], [TENSORS_NAME], [JSON_NAME, TENSORS_NAME]]
)
def test_missing_files(folder: Path, missing: list[str]) -> None:
    for name in missing:
        (folder / name).unlink()
    text = refusal(folder)
    assert str(folder) in text and JSON_NAME in text and TENSORS_NAME in text


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert "no adapter" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    assert "no adapter" in refusal(tmp_path / "file")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -4, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    """Inside the length, the header or the data: before any weight is used."""
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(folder)
    assert TENSORS_NAME in text and "cannot be read" in text


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 1000,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 6) + b'{"\xff":',
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_weights_that_are_no_safetensors(folder: Path, content: bytes) -> None:
    (folder / TENSORS_NAME).write_bytes(content)
    assert TENSORS_NAME in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b'{"format": 1',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "open", "text", "truncated", "binary", "nested", "digits"],
)
def test_json_that_is_none(folder: Path, content: bytes) -> None:
    (folder / JSON_NAME).write_bytes(content)
    text = refusal(folder)
    assert JSON_NAME in text and "cannot be read" in text


@pytest.mark.parametrize("content", [[], 3, "text", None, [{"format": 1}]])
def test_json_that_is_no_object(folder: Path, content: Any) -> None:
    (folder / JSON_NAME).write_text(json.dumps(content))
    text = refusal(folder)
    assert f"expected format {FORMAT}" in text
    assert type(content).__name__ in text


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, [1], {"a": 1}, "two\nlines"])
def test_other_formats(folder: Path, version: Any) -> None:
    edit(folder, lambda info: {**info, "format": version})
    text = refusal(folder)
    assert f"expected format {FORMAT}" in text
    assert str(version) in text or repr(version) in text


def test_no_format(folder: Path) -> None:
    edit(folder, lambda info: {k: v for k, v in info.items() if k != "format"})
    assert f"expected format {FORMAT}" in refusal(folder)


@pytest.mark.parametrize("base", [None, [], "llama", 3, {}])
def test_base_model_that_is_none(folder: Path, base: Any) -> None:
    edit(folder, lambda info: {**info, "base_model": base})
    text = refusal(folder)
    assert "base_model" in text


@pytest.mark.parametrize("key", ["layers", "hidden_size", "ffn_size", "fingerprint"])
def test_base_model_lacks_something(folder: Path, key: str) -> None:
    edit(folder, lambda info: info["base_model"].pop(key) and None)
    assert key in refusal(folder)


# Hostile JSON


@pytest.fixture
def cpu_limit() -> Iterator[None]:
    """Half a second of this process's own time; a refusal takes milliseconds."""

    def stop(*args: Any) -> None:
        raise TimeoutError("still not refused")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


SIZES = ["3", "many", 3.5, None, [3], {"n": 3}, 0, -1, -3, 10**15, 10**400, math.inf]


@pytest.mark.parametrize("value", SIZES, ids=lambda v: str(v)[:20])
def test_hostile_layers(folder: Path, cpu_limit: None, value: Any) -> None:
    edit(folder, lambda info: info["base_model"].update(layers=value))
    refusal(folder)


@pytest.mark.parametrize("value", [0, -1, -(10**15)])
def test_layers_that_ask_for_no_tensors(tmp_path: Path, value: int) -> None:
    """Nothing can be missing then; the model's own number of layers still disagrees."""
    model = tiny_model()
    info = information(model)
    info["base_model"]["layers"] = value
    tensors = {k: v for k, v in weights().items() if k != "importance"}
    save_adapter(tmp_path, info, tensors)
    with pytest.raises(AdapterError) as e:
        load_adapter(tmp_path).check(norms(model), D, F)
    assert str(value) in one_line(e.value)


@pytest.mark.parametrize("value", SIZES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("key", ["hidden_size", "ffn_size"])
def test_hostile_sizes(folder: Path, cpu_limit: None, key: str, value: Any) -> None:
    edit(folder, lambda info: info["base_model"].update({key: value}))
    refusal(folder)


@pytest.mark.parametrize("value", SIZES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("part", ["predictor", "compensator"])
def test_hostile_rank(folder: Path, cpu_limit: None, part: str, value: Any) -> None:
    edit(folder, lambda info: info[part].update(rank=value))
    refusal(folder)


@pytest.mark.parametrize("part", ["predictor", "compensator"])
def test_no_rank(folder: Path, part: str) -> None:
    edit(folder, lambda info: info[part].pop("rank") and None)
    assert "rank" in refusal(folder)


@pytest.mark.parametrize("value", [True, "mlp", 2, [2]])
@pytest.mark.parametrize("part", ["predictor", "compensator"])
def test_parts_that_are_no_objects(folder: Path, part: str, value: Any) -> None:
    edit(folder, lambda info: {**info, part: value})
    assert part in refusal(folder)


@pytest.mark.parametrize("value", ["tanh", "", None, 3, "two\nlines", ["relu"], {}])
def test_unknown_activations(folder: Path, value: Any) -> None:
    edit(folder, lambda info: info["compensator"].update(activation=value))
    text = refusal(folder)
    assert "activation" in text and "relu, silu, gelu" in text


# Tensors that do not fit


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.predictor.query",
        "layers.2.predictor.w1",
        "layers.1.predictor.w2",
        "layers.0.compensator.w1",
        "layers.2.compensator.w2",
    ],
)
def test_missing_tensors(folder: Path, key: str) -> None:
    tensors = weights()
    del tensors[key]
    save_adapter(folder, information(), tensors)
    text = refusal(folder)
    assert key in text and "lacks" in text


@pytest.mark.parametrize(
    "key, expected",
    [
        ("layers.1.predictor.query", (D,)),
        ("layers.2.predictor.w1", (D, R)),
        ("layers.0.predictor.w2", (R, F)),
        ("layers.1.compensator.w1", (D, H)),
        ("layers.2.compensator.w2", (H, D)),
        ("importance", (LAYERS,)),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (F, R), (1, D), ()])
def test_wrong_shapes(
    folder: Path, key: str, expected: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    save_adapter(folder, information(), {**weights(), key: mx.zeros(shape)})
    text = refusal(folder)
    assert key in text
    assert f"should have shape {expected}" in text and f"found {shape}" in text


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_, mx.complex64], ids=str)
@pytest.mark.parametrize(
    "key",
    ["layers.1.predictor.query", "layers.0.predictor.w2", "layers.2.compensator.w1"],
)
def test_tensors_that_are_no_floats(folder: Path, key: str, dtype: mx.Dtype) -> None:
    tensors = weights()
    save_adapter(
        folder,
        information(),
        {**tensors, key: mx.ones_like(tensors[key]).astype(dtype)},
    )
    assert key in refusal(folder)


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
    save_adapter(tmp_path, information(model), weights())
    load_adapter(tmp_path).check(norms(model), D, F)
    engine = attach(model, PrefillConfig(block_size=8), adapter=load_adapter(tmp_path))
    assert engine.compensator is not None


def check_refusal(found: Adapter, model: nn.Module, d: int = D, f: int = F) -> str:
    with pytest.raises(AdapterError) as e:
        found.check(norms(model), d, f)
    return one_line(e.value)


def test_wrong_sizes(tmp_path: Path) -> None:
    model = tiny_model()
    save_adapter(tmp_path, information(model), weights())
    found = load_adapter(tmp_path)
    text = check_refusal(found, tiny_model(0, LAYERS + 2))
    assert "layers" in text and str(LAYERS) in text and str(LAYERS + 2) in text
    text = check_refusal(found, model, d=D + 8)
    assert "hidden_size" in text and str(D) in text and str(D + 8) in text
    text = check_refusal(found, model, f=F + 8)
    assert "ffn_size" in text and str(F) in text and str(F + 8) in text


@pytest.mark.parametrize("name", ["tiny", "two\nlines", 3, None])
def test_foreign_fingerprint(tmp_path: Path, name: Any) -> None:
    info = information(tiny_model(0))
    info["base_model"]["name"] = name
    save_adapter(tmp_path, info, weights())
    text = check_refusal(load_adapter(tmp_path), tiny_model(1))
    assert "weights" in text
    if name == "tiny":
        assert name in text


def test_a_fingerprint_of_another_type(folder: Path) -> None:
    for value in (7, None, [], {}):
        edit(folder, lambda info: info["base_model"].update(fingerprint=value))
        assert "fingerprint" in refusal(folder)


def test_a_refused_adapter_leaves_the_model_alone(tmp_path: Path) -> None:
    save_adapter(tmp_path, information(tiny_model(1)), weights())
    foreign, model = load_adapter(tmp_path), tiny_model(0)
    with pytest.raises(AdapterError):
        attach(model, adapter=foreign)
    assert type(model) is llama.Model
    assert all(type(layer.mlp) is llama.MLP for layer in model.layers)


def test_a_refused_adapter_leaves_an_attached_model_attached(tmp_path: Path) -> None:
    """attach() refuses before anything of the model is touched."""
    save_adapter(tmp_path, information(tiny_model(1)), weights())
    foreign, model = load_adapter(tmp_path), tiny_model(0)
    engine = attach(model)
    with pytest.raises(AdapterError):
        attach(model, adapter=foreign)
    assert engine_of(model) is engine
    assert isinstance(model, llama.Model) and type(model) is not llama.Model


# Finding one


def test_find_the_one_named(folder: Path, tmp_path: Path) -> None:
    found = find_adapter(str(tmp_path / "model"), folder)
    assert found is not None and found.base["name"] == "tiny"


def test_find_the_one_beside_the_model(folder: Path, tmp_path: Path) -> None:
    found = find_adapter(str(folder))
    assert found is not None and found.base["name"] == "tiny"
    assert find_adapter(str(tmp_path)) is None
    assert find_adapter("somebody/some-model") is None


def test_a_damaged_one_beside_the_model_is_refused(folder: Path) -> None:
    """Not silently left out."""
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(AdapterError) as e:
        find_adapter(str(folder))
    one_line(e.value)


def test_find_in_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(adapter_module, "snapshot_download", download)
    found = find_adapter("model", "somebody/adapter")
    assert found is not None and found.base["name"] == "tiny"
    assert asked == [("somebody/adapter", [JSON_NAME, TENSORS_NAME])]


@pytest.mark.parametrize("name", ["nowhere", "a/b/nowhere", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mistyped path is no repository name, and nothing is asked of the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastForwardError) as e:
        find_adapter("model", name)
    assert "nowhere" in one_line(e.value)


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nNo network."),
        ConnectionError("unreachable"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_repository_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(adapter_module, "snapshot_download", download)
    with pytest.raises(AdapterError) as e:
        find_adapter("model", "somebody/adapter")
    assert "somebody/adapter" in one_line(e.value)
