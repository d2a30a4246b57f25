"""Reading checkpoints: every format gives the same predictor, and no file does harm."""

import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Optional, Union

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_modules

from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import CheckpointError, describe, open_checkpoint
from mlx_fastforward.convert.naming import Rule
from mlx_fastforward.errors import FastForwardError
from mlx_fastforward.predictors.file import BaseModel

LAYERS, D, F, RANK, H = 3, 8, 32, 4, 5
BASE = BaseModel("tiny", "llama", LAYERS, D, F, "0" * 16)
DTYPES = ["float32", "float16", "bfloat16"]
State = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def trained(dtype: str = "float32", seed: int = 0) -> State:
    """A checkpoint as a training script has it."""
    torch.manual_seed(seed)
    predictor, compensator = torch_modules.Predictor, torch_modules.Compensator
    layers = [
        torch_modules.Layer(predictor(D, RANK, F), compensator(D, H))
        for _ in range(LAYERS)
    ]
    network = torch_modules.Network(layers, importance=[1.0, 2.0, 3.0])
    return {k: v.to(getattr(torch, dtype)) for k, v in network.state_dict().items()}


def wanted(state: State) -> dict[str, np.ndarray]:
    """What a predictor should hold of it: names without "weight", matrices (in, out)."""
    return {
        k.removesuffix(".weight"): (v.T if v.ndim == 2 else v).float().numpy()
        for k, v in state.items()
    }


def converted(
    path: Path, rules: Optional[list[Rule]] = None, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """The tensors of a predictor made of a file, as float32."""
    plan = conversion.plan(open_checkpoint(path), BASE, rules or [])
    steps = conversion.tensors(plan, conversion.DTYPES[dtype])
    made = {k: v for _, parts in steps for k, v in parts.items()}
    assert all(str(v.dtype).endswith(dtype) for k, v in made.items() if "." in k)
    return {k: np.array(v.astype(mx.float32)) for k, v in made.items()}


def same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(sorted(got)) == list(sorted(expected))
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert np.array_equal(got[name], value), name


def refused(path: Path) -> str:
    """The one line that a file is refused with, be it on opening or on reading."""
    with pytest.raises(CheckpointError) as e:
        converted(path)
    assert "\n" not in str(e.value) and str(e.value).isprintable(), str(e.value)
    return str(e.value)


# Ways to save: each takes a state and an empty folder, and gives the path to convert.


def one_safetensors(state: State, folder: Path) -> Path:
    contiguous = {k: v.contiguous() for k, v in state.items()}
    safetensors.torch.save_file(contiguous, folder / "model.safetensors")
    return folder / "model.safetensors"


def folder_of_safetensors(state: State, folder: Path) -> Path:
    return one_safetensors(state, folder).parent


def sharded(state: State, folder: Path, suffix: str = "safetensors") -> Path:
    """Two shards and an index, as Hugging Face writes them; a file beside them is none of it."""
    names, shards = list(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.{suffix}"
        kept = {n: state[n].contiguous() for n in part}
        if suffix == "safetensors":
            safetensors.torch.save_file(kept, folder / file)
        else:
            torch.save(kept, folder / file)
        shards.update(dict.fromkeys(part, file))
    (folder / f"other.{suffix}").write_bytes(b"not a checkpoint")
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def sharded_torch(state: State, folder: Path) -> Path:
    return sharded(state, folder, "bin")


def torch_file(suffix: str) -> Callable[[State, Path], Path]:
    def save(state: State, folder: Path) -> Path:
        torch.save(state, folder / f"model.{suffix}")
        return folder / f"model.{suffix}"

    return save


def nested(state: State, folder: Path) -> Path:
    """A training script's whole state; the optimizer's tensors are not the model's."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    whole = {"model": state, "optimizer": optimizer, "step": 3, "name": "run"}
    torch.save(whole, folder / "step3.pt")
    return folder / "step3.pt"


def parameters(state: State, folder: Path) -> Path:
    """Parameters rather than tensors, and lists for dicts of numbers."""
    layers: list[dict[str, Any]] = [{} for _ in range(LAYERS)]
    for name, value in state.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = torch.nn.Parameter(value)
    torch.save({"layers": layers, "importance": state["importance"]}, folder / "p.pt")
    return folder / "p.pt"


def not_contiguous(state: State, folder: Path) -> Path:
    """Views of larger tensors, saved with their strides."""
    views = {k: torch.stack([v, v], -1)[..., 0] for k, v in state.items()}
    assert not views["layers.0.predictor.w1.weight"].is_contiguous()
    torch.save(views, folder / "views.pt")
    return folder / "views.pt"


def folder_of_torch(state: State, folder: Path) -> Path:
    """Several files, one per layer."""
    for i in range(LAYERS):
        part = {k: v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        torch.save(part, folder / f"layer{i}.pt")
    torch.save({"importance": state["importance"]}, folder / "importance.pt")
    return folder


def npz(state: State, folder: Path) -> Path:
    np.savez(folder / "model.npz", **{k: v.numpy() for k, v in state.items()})
    return folder / "model.npz"


def packed_npz(state: State, folder: Path) -> Path:
    """Compressed, in Fortran's order and the other byte order."""
    arrays = {
        k: np.asfortranarray(v.numpy().astype(v.numpy().dtype.newbyteorder(">")))
        for k, v in state.items()
    }
    np.savez_compressed(folder / "model.npz", **arrays)
    return folder


TORCH_WAYS: list[Callable[[State, Path], Path]] = [
    one_safetensors,
    folder_of_safetensors,
    sharded,
    sharded_torch,
    *map(torch_file, ("pt", "pth", "bin")),
    nested,
    parameters,
    not_contiguous,
    folder_of_torch,
]
NUMPY_WAYS: list[Callable[[State, Path], Path]] = [npz, packed_npz]
CASES = [(way, d) for way in TORCH_WAYS for d in DTYPES]
CASES += [(way, d) for way in NUMPY_WAYS for d in DTYPES[:2]]  # NumPy has no bfloat16


@pytest.mark.parametrize("way, dtype", CASES)
def test_every_format_gives_the_same_weights(
    way: Callable[[State, Path], Path], dtype: str, tmp_path: Path
) -> None:
    state = trained(dtype)
    same(converted(way(state, tmp_path), dtype=dtype), wanted(state))


FLOAT64 = [torch_file("pt"), npz, packed_npz, one_safetensors]


@pytest.mark.parametrize("way", FLOAT64)
def test_float64_is_rounded_to_float32(
    way: Callable[[State, Path], Path], tmp_path: Path
) -> None:
    state = trained("float64")
    key = "layers.0.predictor.query"
    state[key] = state[key] / 3  # more digits than float32 has
    same(converted(way(state, tmp_path)), wanted(state))


@pytest.mark.parametrize("way", [one_safetensors, torch_file("pt"), npz])
def test_shapes_and_dtypes_are_known_before_reading(
    way: Callable[[State, Path], Path], tmp_path: Path
) -> None:
    """And every read makes an array of its own, which is let go of afterwards."""
    path = way(trained("float16"), tmp_path)
    entry = open_checkpoint(path).entries["layers.0.predictor.query"]
    assert (entry.shape, entry.dtype, entry.file) == ((D,), "float16", path.name)
    assert entry.read() is not entry.read()
    assert mx.array_equal(entry.read(), entry.read())


def test_a_line_about_the_checkpoint(tmp_path: Path) -> None:
    opened = open_checkpoint(sharded(trained(), tmp_path))
    n = 5 * LAYERS + 1
    assert describe(opened) == f"{tmp_path.name}: safetensors, {n} tensors in 2 files"
    folder = tmp_path / "one"
    folder.mkdir()
    assert describe(open_checkpoint(npz(trained(), folder))) == (
        f"model.npz: NumPy, {n} tensors"
    )


def test_a_suffix_in_capitals(tmp_path: Path) -> None:
    path = npz(trained(), tmp_path).rename(tmp_path / "MODEL.NPZ")
    same(converted(path), wanted(trained()))
    same(converted(tmp_path), wanted(trained()))


def test_a_folder_with_two_kinds_counts_once(tmp_path: Path) -> None:
    """Repositories hold the same weights as safetensors and as PyTorch's."""
    one_safetensors(trained(), tmp_path)
    torch_file("bin")(trained(seed=1), tmp_path)
    assert open_checkpoint(tmp_path).kind == "safetensors"
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


def test_the_same_name_in_two_files(tmp_path: Path) -> None:
    torch_file("pt")(trained(), tmp_path)
    torch_file("pth")(trained(), tmp_path)
    assert "is in model.pt and again in model.pth" in refused(tmp_path)


def test_the_same_name_twice_in_one_file(tmp_path: Path) -> None:
    state = trained()
    torch.save(
        {"a.b": state["importance"], "a": {"b": torch.ones(1)}}, tmp_path / "t.pt"
    )
    assert "holds the tensor 'a.b' twice" in refused(tmp_path / "t.pt")
    path = npz(state, tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = archive.read("importance.npy")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of zipfile, about what is done here
        archive.writestr("importance.npy", member)
    assert "holds the tensor 'importance' twice" in refused(path)


# What is no checkpoint


NO_CHECKPOINTS = {
    "missing.pt": "does not exist; expected .safetensors",
    "letter.txt": "is a .txt file; expected",
    "nameless": "is a nameless file; expected",
    "model.safetensors.index.json": "is a .json file; expected",
}


@pytest.mark.parametrize("name, message", NO_CHECKPOINTS.items())
def test_other_files(name: str, message: str, tmp_path: Path) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_text("x")
    assert f"{tmp_path / name} {message}" in refused(tmp_path / name)


def test_folders_without_weights(tmp_path: Path) -> None:
    assert "holds no weights; expected .safetensors" in refused(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "holds no weights" in refused(tmp_path)
    assert "holds no weights" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_files_without_tensors(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file({}, path)
    elif suffix == "pt":
        torch.save({"step": 3}, path)
    else:
        np.savez(path)
    assert refused(path) == f"{path} holds no tensors."


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin", "npz"])
@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04", b"{}" * 50])
def test_empty_and_senseless_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(content)
    assert refused(path).startswith(str(path))
    if not content and suffix == "safetensors":
        assert "it is empty (0 bytes)" in refused(path)


@pytest.mark.parametrize("way", [one_safetensors, torch_file("pt"), npz])
def test_files_cut_short(way: Callable[[State, Path], Path], tmp_path: Path) -> None:
    path = way(trained(), tmp_path)
    whole = path.read_bytes()
    for share in (0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert refused(path).startswith(str(path))


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


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    path = npz(trained(), tmp_path)
    assert refused(path / "x.pt").startswith(f"{path / 'x.pt'} does not exist")
    assert "File name too long" in refused(tmp_path / ("x" * 300 + ".pt"))


def test_the_home_of_nobody() -> None:
    with pytest.raises(FastForwardError, match="~no-such-user/x.pt: no such user"):
        open_checkpoint(Path("~no-such-user/x.pt"))


# The index of a sharded checkpoint


SHARDS = ["../secret.safetensors", "sub/x.safetensors", "x\\y.safetensors"]
SHARDS += ["/etc/x.safetensors", "..", "", "x.txt", "x.pt"]


@pytest.mark.parametrize("shard", [*SHARDS, 3, None, True, 1.5])
def test_an_index_names_plain_files_only(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    one_safetensors(trained(), folder)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    line = refused(folder)
    assert f"names {shard!r}; expected the plain name of a file beside it" in line


@pytest.mark.parametrize("shard", [["x.safetensors"], {}])
def test_an_index_with_containers_for_names(shard: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "expected the plain name of a file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["gone.safetensors", "a\0b.safetensors"])
def test_an_index_names_what_is_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    assert f"names {name!r}, which is not there" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_a_map(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert "has no weight_map object" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff\xfe"])
def test_an_index_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    assert "JSON" in refused(tmp_path)


def test_two_indices(tmp_path: Path) -> None:
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    assert "several indices (a.safetensors.index.json, b." in refused(tmp_path)


# PyTorch files that hold more than tensors


class Touch:
    """What an attacker pickles: loading it runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(legacy: bool, tmp_path: Path) -> None:
    proof, path = tmp_path / "ran", tmp_path / "c.pt"
    state = {**trained(), "extra": Touch(proof)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    line = refused(path)
    assert not proof.exists()
    if not legacy:
        assert "posix.system" in line or "nt.system" in line
        assert "could run code and was not loaded" in line
    pickle.loads(pickle.dumps(Touch(proof)))  # the file would have done it
    assert proof.exists()


MORE = {
    "a module": torch.nn.Linear(2, 2),
    "an array": {"a": np.ones(3)},
    "a NumPy number": {"loss": np.float64(1)},
    "a path": {"p": Path("x")},
}


@pytest.mark.parametrize("what", MORE)
def test_torch_files_of_more_than_tensors(what: str, tmp_path: Path) -> None:
    torch.save(MORE[what], tmp_path / "c.pt")
    line = refused(tmp_path / "c.pt")
    assert "holds more than tensors (" in line and "state_dict()" in line


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained(), path, _use_new_zipfile_serialization=False)
    assert "not in PyTorch's zip format (torch.save since 1.6)" in refused(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refused(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_without_warnings(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refused(path)
    assert [str(w.message)[:60] for w in seen] == []


def test_a_zip_that_is_not_of_torch(tmp_path: Path) -> None:
    npz(trained(), tmp_path).rename(tmp_path / "c.pt")
    assert "cannot be read as a PyTorch file" in refused(tmp_path / "c.pt")


def test_a_zip_of_several_disks(tmp_path: Path) -> None:
    path = torch_file("pt")(trained(), tmp_path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 4] = 1  # the number of the disk
    path.write_bytes(data)
    assert refused(path).startswith(str(path))


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    endless: list[Any] = [torch.ones(1)]
    endless.append(endless)
    torch.save({"a": endless}, tmp_path / "c.pt")
    assert "cannot be read as a PyTorch file" in refused(tmp_path / "c.pt")


Kind = Callable[[torch.Tensor], torch.Tensor]
KINDS: dict[str, Kind] = {
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "cpu torch.sparse_coo float32": lambda t: t.to_sparse(),
    "meta torch.strided float32": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("dtype", KINDS)
def test_tensors_of_other_kinds(dtype: str, tmp_path: Path) -> None:
    state = trained()
    key = "layers.1.predictor.w1.weight"
    state[key] = KINDS[dtype](state[key])
    line = refused(torch_file("pt")(state, tmp_path))
    assert f"{key} (layers.1.predictor.w1) is {dtype}; expected one of float64" in line


def test_a_lazily_negated_tensor(tmp_path: Path) -> None:
    state = trained()
    key = "layers.1.predictor.query"
    state[key] = torch._neg_view(state[key])
    got = converted(torch_file("pt")(state, tmp_path))
    state[key] = state[key].resolve_neg()
    same(got, wanted(state))


def test_torch_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file("pt")(trained(), tmp_path)
    other = one_safetensors(trained(), tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(path)
    assert f"{path} is a PyTorch file; reading it needs PyTorch: pip install" in line
    assert "'mlx-fastforward[torch]'" in line
    assert converted(other)  # the other formats do without


# NumPy files


ARRAYS = {
    "object": np.array([{}, None], dtype=object),
    "int32": np.ones((RANK, D), np.int32),
    "void16": np.zeros((RANK, D), "V2"),  # how NumPy saves another library's bfloat16
    "str32": np.full((RANK, D), "x"),
    "void64": np.zeros((RANK, D), [("a", "f4"), ("b", "f4")]),
}


@pytest.mark.parametrize("dtype", ARRAYS)
def test_arrays_of_other_dtypes(dtype: str, tmp_path: Path) -> None:
    """Objects would be unpickled; all are told by their names."""
    state = {k: v.numpy() for k, v in trained().items()}
    key = "layers.2.predictor.w1.weight"
    array = ARRAYS[dtype]
    state[key] = np.resize(array, (RANK, D))
    np.savez(tmp_path / "c.npz", **state)
    line = refused(tmp_path / "c.npz")
    assert f"{key} (layers.2.predictor.w1) is {dtype}; expected one of" in line


def test_code_in_an_npz_does_not_run(tmp_path: Path) -> None:
    proof, path = tmp_path / "ran", tmp_path / "c.npz"
    state: dict[str, Any] = {k: v.numpy() for k, v in trained().items()}
    np.savez(path, **{**state, "importance": np.array([Touch(proof)], dtype=object)})
    refused(path)
    assert not proof.exists()


@pytest.mark.parametrize("shape", [(10**9, 10**9), (D, D), (RANK, -D)])
def test_an_array_that_claims_another_size(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """The header may not make room for what the file does not hold."""
    key = "layers.0.predictor.w1.weight"
    small = (tmp_path / "one.npy").open("wb+")
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(small, header)
    small.write(bytes(4 * RANK * D))
    small.seek(0)
    path = npz({k: v for k, v in trained().items() if k != key}, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{key}.npy", small.read())
    small.close()
    line = refused(path)
    assert "claims more data" in line or "expected shape" in line


# Names that drive a terminal


def crafted(header: Union[dict, bytes], data: bytes, path: Path) -> Path:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ESC = "\x1b]0;title\x07"


@pytest.mark.parametrize("where", ["name", "dtype", "global"])
def test_messages_have_no_control_characters(where: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    if where == "global":
        path = tmp_path / "c.pt"
        torch.save({"a": Touch(tmp_path / "ran")}, path)
        evil(path, b"\x1b]0;title")
    else:
        name, dtype = (ESC, "F32") if where == "name" else ("a", ESC)
        tensor = {"dtype": dtype, "shape": [2], "data_offsets": [4, 12]}
        crafted({name: tensor}, bytes(12), path)
    refused(path)  # checks that its line is printable


def evil(path: Path, module: bytes) -> None:
    """Rename the module of the global that a torch file refers to."""
    with zipfile.ZipFile(path) as archive:
        members = {i: archive.read(i) for i in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"cposix\n", b"c" + module + b"\n"))
