"""Side files that are damaged, hostile or none: refused in one line when they are loaded."""

import json
import math
import os
import signal
import struct
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import pytest
from side_files import (
    LAYERS,
    D,
    F,
    H,
    R,
    edit,
    information,
    one_line,
    refusal,
    tiny_model,
    weights,
)

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.predictors.file import (
    FORMAT,
    JSON_NAME,
    TENSORS_NAME,
    BaseModel,
    load_predictor,
    save_predictor,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_predictor(tmp_path / "predictor", information(), weights())
    return tmp_path / "predictor"


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
    assert "no predictor" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    assert "no predictor" in refusal(tmp_path / "file")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -4, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    """Inside the length, the header or the data: before any weight is used."""
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(folder)
    assert TENSORS_NAME in text and "cannot be read" in text
    assert ("empty" in text) == (keep == 0)


def test_weights_that_end_anywhere(folder: Path) -> None:
    """As a download that broke off leaves them."""
    path = folder / TENSORS_NAME
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    assert header < len(content) - 4
    for keep in [header - 1, header, header + 1, *range(1, len(content), 997)]:
        path.write_bytes(content[:keep])
        assert "cannot be read" in refusal(folder)
    path.write_bytes(content)
    load_predictor(folder)


def test_weights_with_something_behind_them(folder: Path) -> None:
    with open(folder / TENSORS_NAME, "ab") as file:
        file.write(b"\0" * 4)
    assert "cannot be read" in refusal(folder)


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / TENSORS_NAME).unlink()
    (folder / TENSORS_NAME).mkdir()
    assert "no predictor" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_files_that_may_not_be_read(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    text = refusal(folder)
    assert name in text and "cannot be read" in text


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


SIZES = ["3", "many", 3.5, None, [3], {"n": 3}, 0, -1, -3, math.inf]
HUGE = [10**15, 10**400]


@pytest.mark.parametrize("value", [*SIZES, *HUGE], ids=lambda v: str(v)[:20])
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
    save_predictor(tmp_path, info, tensors)
    with pytest.raises(PredictorError) as e:
        load_predictor(tmp_path).check(BaseModel.of(model))
    assert str(value) in one_line(e.value)


@pytest.mark.parametrize("value", [*SIZES, *HUGE], ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("key", ["hidden_size", "ffn_size"])
def test_hostile_sizes(folder: Path, cpu_limit: None, key: str, value: Any) -> None:
    edit(folder, lambda info: info["base_model"].update({key: value}))
    refusal(folder)


@pytest.mark.parametrize("value", [*SIZES, *HUGE], ids=lambda v: str(v)[:20])
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


@pytest.mark.parametrize(
    "kind", ["mlp2", "lowrank", "token_wise", "", None, 3, ["mlp"], {}, "two\nlines"]
)
@pytest.mark.parametrize("part", ["predictor", "compensator"])
def test_unknown_kinds(folder: Path, part: str, kind: Any) -> None:
    """From a newer version, maybe: its weights would mean something else."""
    edit(folder, lambda info: info[part].update(kind=kind))
    text = refusal(folder)
    assert part in text and repr(kind) in text and "newer mlx-fastforward" in text


def test_a_kind_of_the_other_part(folder: Path) -> None:
    edit(folder, lambda info: info["predictor"].update(kind="mlp"))
    assert "a predictor of kind 'pooled' or 'token-wise', found 'mlp'" in refusal(
        folder
    )
    edit(folder, lambda info: info["predictor"].update(kind="pooled"))
    edit(folder, lambda info: info["compensator"].update(kind="pooled"))
    assert "a compensator of kind 'mlp' or 'low-rank', found 'pooled'" in refusal(
        folder
    )


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
    save_predictor(folder, information(), tensors)
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
    save_predictor(folder, information(), {**weights(), key: mx.zeros(shape)})
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
    save_predictor(
        folder,
        information(),
        {**tensors, key: mx.ones_like(tensors[key]).astype(dtype)},
    )
    assert key in refusal(folder)
