"""Predictor files that are damaged, hostile or none: refused in one line when they are loaded."""

import math
import signal
import struct
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import predictor_files as files
import pytest
from predictor_files import BOTH, NEW, UNEVEN, D, F, Kind, R, edit, refusal, save

from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME

KINDS: list[Kind] = [{}, NEW, {**UNEVEN, "bits": 8}, {**NEW, **UNEVEN, "bits": 4}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "file")


@pytest.mark.parametrize("missing", [BOTH[:1], BOTH[1:], BOTH])
def test_missing_files(folder: Path, missing: tuple[str, ...]) -> None:
    for name in missing:
        (folder / name).unlink()
        wanted = f"no predictor file in {folder}: expected the files {BOTH[0]} and {BOTH[1]}."
        assert refusal(folder) == wanted
        (folder / name).mkdir()
        assert refusal(folder) == wanted
    for name in ("nowhere", JSON_NAME):  # a folder that is not there, or none
        assert "no predictor file in" in refusal(folder / name)


def test_weights_that_end_anywhere(folder: Path) -> None:
    """As a download that broke off leaves them; or with something behind them."""
    path = folder / TENSORS_NAME
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    ends = [0, 5, 8, 100, header - 1, header, header + 1, *range(1, len(content), 997)]
    for keep in [*ends, len(content) - 4, len(content) - 1, len(content) + 4]:
        path.write_bytes((content + b"\0" * 4)[:keep])
        text = refusal(folder)
        assert text.startswith(f"{path} cannot be read: "), keep
        assert ("empty" in text) == (keep == 0)


def test_files_that_are_something_else(folder: Path) -> None:
    headers = b"null", b"[]", b'{"a":1}', b'{"\xff":'
    tensors = [struct.pack("<Q", len(h)) + h for h in headers]
    tensors += [struct.pack("<Q", 1 << 60) + b"{}", b"x" * 999, b"PK" + b"\0" * 99]
    texts = [b"", b"{", b"not json", b'{"format": 1', b"\xff\xfe\x00", b"[" * 100_000]
    texts += [b'{"format": ' + b"1" * 5000 + b"}"]
    for name, contents in ((TENSORS_NAME, tensors), (JSON_NAME, texts)):
        for content in contents:
            (folder / name).write_bytes(content)
            assert refusal(folder).startswith(f"{folder / name} cannot be read: ")
        save(folder)


def test_json_of_another_format(folder: Path) -> None:
    file = folder / JSON_NAME
    for version in (0, 2, "1", None, [1], {"a": 1}, "two\nlines"):
        edit(folder, format=version)
        assert refusal(folder) == f"{file}: expected format 1, found {version!r}."
    edit(folder, format=...)
    assert refusal(folder) == f"{file}: expected format 1, found None."
    for content, kind in (("[]", "list"), ("3", "int"), ("null", "NoneType")):
        file.write_text(content)
        assert refusal(folder) == f"{file}: expected format 1, found {kind!r}."


@pytest.fixture
def cpu_limit() -> Iterator[None]:
    """Some seconds of this process's own time; a refusal takes milliseconds."""

    def stop(*args: Any) -> None:
        raise TimeoutError("still not refused")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


PER_LAYER = [("base_model", "ffn_size"), ("predictor", "rank"), ("compensator", "rank")]
NUMBERS = [("base_model", "layers"), ("base_model", "hidden_size"), *PER_LAYER]
NO_NUMBERS = ["3", "two\nlines", 3.5, None, True, {"n": 3}, 0, -1, math.inf]


@pytest.mark.parametrize("section, key", NUMBERS)
def test_numbers_that_are_none(folder: Path, section: str, key: str) -> None:
    wanted = f"{section}.{key} to be a whole number above 0, found"
    for value in NO_NUMBERS:
        for given in [value, [3, value, 5]][: 1 + ((section, key) in PER_LAYER)]:
            edit(folder, section, **{key: given})
            assert refusal(folder).endswith(f"{wanted} {value!r}.")
    edit(folder, section, **{key: ...})
    assert refusal(folder).endswith(f"{wanted} None.")


@pytest.mark.parametrize("value", [10**15, 10**400], ids=["15", "400"])
@pytest.mark.parametrize("section, key", NUMBERS)
@pytest.mark.usefixtures("cpu_limit")
def test_huge_numbers(folder: Path, section: str, key: str, value: int) -> None:
    assert str(value) in refusal(edit(folder, section, **{key: value}))


@pytest.mark.parametrize("section, key", PER_LAYER)
def test_lists_of_other_lengths(folder: Path, section: str, key: str) -> None:
    for n in (0, 1, 2, 4):
        text = refusal(edit(folder, section, **{key: [2] * n}))
        assert text.endswith(f"expected 3 numbers in {section}.{key}, found {n}.")


def test_values_that_are_none_of_the_known_ones(folder: Path) -> None:
    """Kinds from a newer version, maybe: their weights would mean something else."""
    names = ["tanh", "lowrank", "token_wise", "", None, 3, ["mlp"], {}, "two\nlines"]
    for section, key, other, known in (
        ("predictor", "kind", "mlp", "of kind 'pooled' or 'token-wise', found "),
        ("compensator", "kind", "pooled", "of kind 'mlp' or 'low-rank', found "),
        ("compensator", "activation", "mlp", "activation of relu, silu, gelu; found "),
    ):
        for value in [other, *names]:
            text = refusal(edit(save(folder), section, **{key: value}))
            assert f"expected a {section} {known}{value!r}" in text
    for mark in (7, None, [], {}):
        text = refusal(edit(save(folder), "base_model", fingerprint=mark))
        assert text.endswith("lacks base_model.fingerprint.")
    for part in ("base_model", "predictor", "compensator"):
        for value in (True, "mlp", 2, [2]):
            text = refusal(edit(save(folder), **{part: value}))
            assert text.endswith(f"expected {part} to be an object, found {value!r}.")


def test_other_numbers_of_bits(tmp_path: Path) -> None:
    def refused(value: Any) -> str:
        return refusal(edit(tmp_path, "predictor", quantization=value))

    save(tmp_path, bits=4)
    known = "a predictor in 4 or 8 bits and a multiple of 32 neurons; found"
    for bits in (2, 3, 5, 6, 16, 32, 10**15):
        assert refused({"bits": bits}).endswith(f"{known} {bits} bits and 64 neurons.")
    for bits in (*NO_NUMBERS, [4]):
        wanted = f"quantization.bits to be a whole number above 0, found {bits!r}."
        assert refused({"bits": bits}).endswith(wanted)
    for value in (4, "4", True, False, 0, [], [{"bits": 4}], {}):
        assert "quantization" in refused(value)
    edit(tmp_path, "base_model", ffn_size=[F, 80, F])  # ten words, but no groups
    assert refused({"bits": 4}).endswith(f"{known} 4 bits and 80 neurons.")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_that_do_not_fit(tmp_path: Path, kind: Kind) -> None:
    """Each tensor missing, of other shapes and of other dtypes."""
    tensors = files.weights(**kind)
    for i, (key, shape) in enumerate(files.shapes(**kind).items()):
        if key != "importance":
            text = refusal(save(tmp_path, {key: None}, **kind))
            assert text.endswith(f"lacks the tensor {key}.")
        *rows, last = shape
        wrong = {(), (*shape, 1), (1, *shape), (*rows, last + 1), shape[::-1]} - {shape}
        for found in sorted(wrong)[i % 2 :: 2]:
            given = mx.zeros(found, tensors[key].dtype)
            text = refusal(save(tmp_path, {key: given}, **kind))
            assert text.endswith(f"{key} should have shape {shape}, found {found}.")
        packed = tensors[key].dtype == mx.uint32
        wanted = "mlx.core.uint32" if packed else "float"
        other = [mx.uint64, mx.float32] if packed else [mx.uint32, mx.complex64]
        for dtype in (mx.int32, mx.bool_, *other)[i % 2 :: 2]:
            given = mx.ones(shape).astype(dtype)
            text = refusal(save(tmp_path, {key: given}, **kind))
            assert text.endswith(f"{key} should be {wanted}, found {dtype}.")


LACKS, SHAPE = "lacks the tensor layers.0.", "predictor.w2 should have shape"
SAYS = [
    ({}, "predictor.kind", "token-wise", f"{LACKS}predictor.bias."),
    (NEW, "predictor.kind", "pooled", f"{LACKS}predictor.query."),
    ({}, "compensator.kind", "low-rank", f"{LACKS}compensator.center."),
    (NEW, "compensator.kind", "mlp", f"{LACKS}compensator.w1."),
    ({}, "predictor.quantization", {"bits": 4}, f"{SHAPE} {(R, 8)}, found {(R, F)}."),
    ({"bits": 8}, "predictor.quantization", {"bits": 4}, f"{(R, 8)}, found {(R, 16)}."),
    ({"bits": 4}, "predictor.quantization", None, f"{SHAPE} {(R, F)}, found {(R, 8)}."),
    (UNEVEN, "predictor.rank", [3, 2, 5], f"{(D, 2)}, found {(D, 1)}."),
    (UNEVEN, "compensator.rank", [1, 3, 2], f"{(D, 3)}, found {(D, 4)}."),
    (UNEVEN, "base_model.ffn_size", [64, 96, 96], f"{(1, 96)}, found {(1, 32)}."),
]


@pytest.mark.parametrize("kind, key, said, problem", SAYS)
def test_json_of_other_weights(
    tmp_path: Path, kind: Kind, key: str, said: Any, problem: str
) -> None:
    section, _, name = key.partition(".")
    text = refusal(edit(save(tmp_path, **kind), section, **{name: said}))
    assert text.endswith(problem)
