"""Reading checkpoints: every format gives the same predictor, and no file does harm."""

import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import (
    LAYERS,
    RANK,
    D,
    State,
    converted,
    npz,
    one_safetensors,
    packed_npz,
    refused,
    same,
    torch_file,
    trained,
    wanted,
)

from mlx_fastforward.convert.files import describe, open_checkpoint
from mlx_fastforward.errors import FastForwardError

Way = Callable[[State, Path], Path]
INDEX = "model.safetensors.index.json"


# Ways to save: each takes a state and an empty folder, and gives the path to convert.


def sharded(state: State, folder: Path, suffix: str = "safetensors") -> Path:
    """Two shards and an index, as Hugging Face writes them; a file beside them is none of it."""
    names, shards = list(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.{suffix}"
        kept = {n: state[n].contiguous() for n in part}
        save = torch.save if suffix == "bin" else safetensors.torch.save_file
        save(kept, folder / file)
        shards.update(dict.fromkeys(part, file))
    (folder / f"other.{suffix}").write_bytes(b"not a checkpoint")
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def nested(state: State, folder: Path) -> Path:
    """A training script's whole state; the optimizer's tensors are not the model's."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2)}}
    layers: list[dict[str, Any]] = [{} for _ in range(LAYERS)]
    for name, value in state.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = torch.nn.Parameter(value)
    model = {"layers": layers, "importance": state["importance"]}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    whole = {"model": model, "optimizer": optimizer, "step": 3, "name": "run"}
    return torch_file(whole, folder, "step3.pth")


def views(state: State, folder: Path) -> Path:
    """Of larger tensors, saved with their strides; and a tensor that is negated when read."""
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in state.items()}
    assert not strided["layers.0.predictor.w1.weight"].is_contiguous()
    key = "layers.1.predictor.query"
    strided[key] = torch._neg_view(-state[key])
    return torch_file(strided, folder)


def folder_of_torch(state: State, folder: Path) -> Path:
    """Several files, one per layer."""
    for i in range(LAYERS):
        part = {k: v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        torch_file(part, folder, f"layer{i}.pt")
    torch_file({"importance": state["importance"]}, folder, "importance.pt")
    return folder


WAYS: list[Way] = [one_safetensors, torch_file, npz, packed_npz, sharded]
WAYS += [lambda *to: sharded(*to, "bin"), nested, views, folder_of_torch]
CASES = [(way, "float32") for way in WAYS]
CASES += [(way, d) for way in WAYS[:4] for d in ("float16", "float64")]
CASES += [(way, "bfloat16") for way in (one_safetensors, torch_file, sharded, views)]


@pytest.mark.parametrize("way, dtype", CASES)
def test_every_format_gives_the_same_weights(
    way: Way, dtype: str, tmp_path: Path
) -> None:
    """float64 comes as the nearest float32."""
    state = trained(dtype)
    key = "layers.0.predictor.query"
    state[key] = state[key] / 3  # more digits than float32 has
    asked = "float32" if dtype == "float64" else dtype
    same(converted(way(state, tmp_path), dtype=asked), wanted(state))


KIND = {"safetensors": "safetensors", "pt": "PyTorch", "npz": "NumPy"}


def test_what_is_known_before_reading(tmp_path: Path) -> None:
    """Every read makes an array of its own, which is let go of afterwards."""
    n = 5 * LAYERS + 1
    for way in (one_safetensors, torch_file, npz):
        path = way(trained("float16"), tmp_path)
        opened = open_checkpoint(path)
        entry = opened.entries["layers.0.predictor.query"]
        assert (entry.shape, entry.dtype, entry.file) == ((D,), "float16", path.name)
        assert entry.read() is not entry.read()
        told = f"{path.name}: {KIND[path.suffix[1:]]}, {n} tensors"
        assert describe(opened) == told
    opened = open_checkpoint(sharded(trained(), tmp_path))  # of several kinds the first
    assert describe(opened) == f"{tmp_path.name}: safetensors, {n} tensors in 2 files"
    same(converted(tmp_path), wanted(trained()))


def test_what_lies_beside_a_file_is_read(tmp_path: Path) -> None:
    beside = tmp_path / "fastforward.json"
    beside.write_text('{"block_size": 64}')
    path = one_safetensors(trained(), tmp_path)
    for where in (path, tmp_path):
        assert open_checkpoint(where).info == {"block_size": 64}
    for text in ("[]", "{", "\xff"):
        beside.write_text(text, encoding="latin-1")
        assert "JSON" in refused(path)


def test_the_same_name_twice(tmp_path: Path) -> None:
    torch_file(trained(), tmp_path)
    torch_file(trained(), tmp_path, "model.pth")
    assert "is in model.pt and again in model.pth" in refused(tmp_path)
    doubled = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    path = torch_file(doubled, tmp_path, "t.pt")
    assert "holds the tensor 'a.b' twice" in refused(path)
    path = npz(trained(), tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = archive.read("importance.npy")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of zipfile, about what is done here
        archive.writestr("importance.npy", member)
    assert "holds the tensor 'importance' twice" in refused(path)


def test_paths_of_something_else(tmp_path: Path) -> None:
    path = npz(trained(), tmp_path)
    assert refused(path / "x.pt").startswith(
        f"{path / 'x.pt'} does not exist; expected"
    )
    assert "File name too long" in refused(tmp_path / ("x" * 300 + ".pt"))
    with pytest.raises(FastForwardError, match="~no-such-user/x.pt: no such user"):
        open_checkpoint(Path("~no-such-user/x.pt"))
    for name in ("letter.txt", "nameless", INDEX):
        (tmp_path / name).write_text("x")
        kind = Path(name).suffix or "nameless"
        assert f"{name} is a {kind} file; expected" in refused(tmp_path / name)
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    assert "holds no weights; expected .safetensors" in refused(folder)
    (folder / "model.safetensors").mkdir()
    assert "holds no weights" in refused(folder)


@pytest.mark.parametrize("way", [one_safetensors, torch_file, npz])
def test_empty_and_senseless_files_and_files_cut_short(
    way: Way, tmp_path: Path
) -> None:
    path = way({}, tmp_path)
    assert refused(path) == f"{path} holds no tensors."
    path = way(trained(), tmp_path)
    whole = path.read_bytes()
    cuts = [whole[: int(share * len(whole))] for share in (0.3, 0.9, 0.999)]
    for content in (b"", b"\0", b"PK\x03\x04", b"{}" * 50, *cuts):
        path.write_bytes(content)
        assert refused(path).startswith(str(path))
        if not content and path.suffix == ".safetensors":
            assert "it is empty (0 bytes)" in refused(path)


def test_files_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's answer is put in its mouth."""

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = npz(trained(), tmp_path)
    monkeypatch.setattr(zipfile, "ZipFile", denied)
    assert refused(path) == f"{path} cannot be read: Permission denied."
    monkeypatch.undo()
    monkeypatch.setattr(Path, "iterdir", denied)
    assert refused(tmp_path) == f"{tmp_path} cannot be read: Permission denied."


SHARDS: list[Any] = ["../secret.safetensors", "sub/x.safetensors", "x\\y.safetensors"]
SHARDS += ["/etc/x.safetensors", "..", "", "x.txt", "x.pt", 3, None, ["x"], {}]


def test_an_index_names_plain_files_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    one_safetensors(trained(), folder).rename(tmp_path / "secret.safetensors")
    for shard in SHARDS:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
        told = f"names {shard!r}; expected the plain name of a file beside it"
        assert told in refused(folder)
    for shard in ("gone.safetensors", "a\0b.safetensors"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
        assert f"names {shard!r}, which is not there" in refused(folder)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": [1]}'):
        (tmp_path / INDEX).write_text(text)
        assert "has no weight_map object" in refused(tmp_path)
    for text in ("", "[]", "[" * 100_000, "\xff\xfe"):
        (tmp_path / INDEX).write_text(text, encoding="latin-1")
        assert "JSON" in refused(tmp_path)
    (tmp_path / "a.safetensors.index.json").write_text("{}")
    assert f"several indices (a.safetensors.index.json, {INDEX})" in refused(tmp_path)


class Touch:
    """What an attacker pickles: loading it runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["pt", "before torch 1.6", "npz"])
def test_code_in_a_pickle_does_not_run(kind: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "ran", tmp_path / "c.pt"
    evil, new = Touch(proof), kind == "pt"
    if kind == "npz":
        path = path.with_suffix(".npz")
        arrays: dict[str, Any] = {k: v.numpy() for k, v in trained().items()}
        np.savez(path, **{**arrays, "importance": np.array([evil] * LAYERS)})
    else:
        state = {**trained(), "extra": evil}
        torch.save(state, path, _use_new_zipfile_serialization=new)
    line = refused(path)
    assert not proof.exists()
    told = {
        "pt": r"\((posix|nt)\.system\), which could run code and was not loaded",
        "before torch 1.6": r"not in PyTorch's zip format \(torch.save since 1.6\)",
        "npz": "is object; expected one of float64",
    }
    assert re.search(told[kind], line)
    pickle.loads(pickle.dumps(evil))  # the file would have done it
    assert proof.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_without_warnings(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "TorchScript" in refused(path)
    assert [str(w.message)[:60] for w in seen] == []


def test_odd_torch_files(tmp_path: Path) -> None:
    """Of more than tensors; zips of something else; lists that hold themselves."""
    for more in (torch.nn.Linear(2, 2), {"a": np.ones(3)}, {"p": Path("x")}):
        line = refused(torch_file(more, tmp_path))
        assert "holds more than tensors (" in line and "state_dict()" in line
    endless: list[Any] = [torch.ones(1)]
    endless.append(endless)
    for path in (npz(trained(), tmp_path), torch_file(endless, tmp_path)):
        line = refused(path.rename(tmp_path / "c.pt"))
        assert "cannot be read as a PyTorch file" in line
    path = torch_file(trained(), tmp_path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 4] = 1  # the number of the disk
    path.write_bytes(data)
    assert refused(path).startswith(str(path))


def test_torch_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(trained(), tmp_path)
    other = one_safetensors(trained(), tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(path)
    assert f"{path} is a PyTorch file; reading it needs PyTorch: pip install" in line
    assert "'mlx-fastforward[torch]'" in line
    assert converted(other)  # the other formats do without


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda t: t.long(),
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "cpu torch.sparse_coo float32": lambda t: t.to_sparse(),
    "meta torch.strided float32": lambda t: t.to("meta"),
    "int32": lambda t: t.int().numpy(),
    "str32": lambda t: np.full(t.shape, "x"),
    "void16": lambda t: np.zeros(t.shape, "V2"),  # so NumPy saves others' bfloat16
    "void64": lambda t: np.zeros(t.shape, [("a", "f4"), ("b", "f4")]),
}


@pytest.mark.parametrize("dtype", KINDS)
def test_tensors_of_other_kinds(dtype: str, tmp_path: Path) -> None:
    state, key = trained(), "layers.1.predictor.w1.weight"
    odd = KINDS[dtype](state[key])
    path = tmp_path / "c.npz"
    if isinstance(odd, np.ndarray):
        np.savez(path, **{**{k: v.numpy() for k, v in state.items()}, key: odd})
    else:
        path = torch_file({**state, key: odd}, tmp_path)
    told = f"{key} (layers.1.predictor.w1) is {dtype}; expected one of float64"
    assert told in refused(path)


def test_an_array_that_claims_another_size(tmp_path: Path) -> None:
    """The header may not make room for what the file does not hold."""
    key = "layers.0.predictor.w1.weight"
    for shape in ((10**9, 10**9), (D, D), (RANK, -D)):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        path = npz({k: v for k, v in trained().items() if k != key}, tmp_path)
        with zipfile.ZipFile(path, "a") as archive:
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(4 * RANK * D))
        line = refused(path)
        assert "claims more data" in line or "expected shape" in line
