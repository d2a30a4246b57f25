"""A checkpoint's tensors by name, whatever file they lie in; nothing is read before it is asked for.

Safetensors (one file, or sharded with an index), PyTorch's zip format (never unpickled beyond
tensors and plain containers), NumPy's npz, or a folder of one of these.
"""

import contextlib
import functools
import itertools
import json
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np
from numpy.lib import format as npy
from safetensors import safe_open

from ..errors import FastForwardError, printable
from ..files import expanded
from ..predictors.tensors import TensorFileError, safe_header

TORCH = (".pt", ".pth", ".bin")
KINDS = {"safetensors": (".safetensors",), "PyTorch": TORCH, "NumPy": (".npz",)}
MOST_TENSORS = 100_000  # lists that hold each other could go on for ever
EXPECTED = ".safetensors, .pt, .pth, .bin, .npz, or a folder of these"


class CheckpointError(FastForwardError, ValueError):
    """A checkpoint that cannot be converted, said in one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Args:
        shape: As stored.
        dtype: By name: "float32", "bfloat16", "int64".
        read: The tensor as an mlx array; float64 comes as float32.
        file: Name of the file it lies in.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], mx.array]
    file: str


@dataclass
class Checkpoint:
    """Tensors by name, the kind of file, and what a fastforward.json beside them says."""

    name: str
    kind: str
    entries: dict[str, Entry] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """List the tensors of a file or folder; raises CheckpointError."""
    path = expanded(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected {EXPECTED}.")
        if not path.is_dir() and not path.is_file():
            raise CheckpointError(f"{path} is no file; expected {EXPECTED}.")
        files, kind = _files(path) if path.is_dir() else ([path], _kind(path))
        checkpoint = Checkpoint(path.resolve().name, kind)
        for file in files:
            for name, entry in _READERS[kind](file).items():
                if name in checkpoint.entries:
                    other = checkpoint.entries[name].file
                    raise CheckpointError(
                        f"tensor {name!r} is in {other} and again in {file.name}; "
                        "expected every tensor once: pass one of the files."
                    )
                checkpoint.entries[name] = entry
        if not checkpoint.entries:
            raise CheckpointError(f"{path} holds no tensors.")
        folder = path if path.is_dir() else path.parent
        checkpoint.info = _side_information(folder / "fastforward.json")
        return checkpoint
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from e


def _kind(path: Path) -> str:
    for kind, suffixes in KINDS.items():
        if path.suffix.lower() in suffixes:
            return kind
    raise CheckpointError(
        f"{path} is a {path.suffix or 'nameless'} file; expected {EXPECTED}."
    )


def _files(folder: Path) -> tuple[list[Path], str]:
    """The weight files of a folder: those of an index if there is one, else all of one kind.

    Of several kinds the first is taken: repositories often hold the same weights twice.
    """
    present = sorted(p for p in folder.iterdir() if p.is_file())
    for kind, suffixes in KINDS.items():
        indices = [
            p
            for p in present
            if p.name.endswith(tuple(s + ".index.json" for s in suffixes))
        ]
        if len(indices) > 1:
            names = ", ".join(p.name for p in indices)
            raise CheckpointError(
                f"{folder} has several indices ({names}); pass one folder per checkpoint."
            )
        if indices:
            return _indexed(indices[0], suffixes), kind
        if files := [p for p in present if p.suffix.lower() in suffixes]:
            return files, kind
    raise CheckpointError(f"{folder} holds no weights; expected {EXPECTED}.")


def _indexed(index: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The shards that an index names; all must lie beside it."""
    shards = _json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no weight_map object; it is no index.")
    for name in shards.values():
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(suffixes):
            raise CheckpointError(
                f"{index} names {name!r}; expected the plain name of a file beside it."
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not there.")
    return [index.parent / name for name in sorted(set(shards.values()))]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return value


def _side_information(path: Path) -> dict[str, Any]:
    return _json_object(path) if path.is_file() else {}


def _safetensors(path: Path) -> dict[str, Entry]:
    try:
        with safe_header(path) as header:
            parts = {name: header.get_slice(name) for name in header.keys()}
            return {
                name: Entry(
                    tuple(part.get_shape()),
                    _dtype(part.get_dtype()),
                    functools.partial(_from_safetensors, path, name),
                    path.name,
                )
                for name, part in parts.items()
            }
    except TensorFileError as e:
        raise CheckpointError(f"{path} is no whole safetensors file: {e}.") from e


def _dtype(code: str) -> str:
    """F32 -> float32, as the other formats say it."""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
    letters = code.rstrip("0123456789")
    return kinds[letters] + code[len(letters) :] if letters in kinds else code.lower()


def _from_safetensors(path: Path, name: str) -> mx.array:
    """One tensor, read anew: a kept one would stay in memory."""
    with _unreadable(path, "a safetensors file"):
        with safe_open(path, "np") as file:
            if file.get_slice(name).get_dtype() != "BF16":
                return _from_numpy(file.get_tensor(name))
        mapped: Any = mx.load(str(path), format="safetensors")
        return mapped[name]  # NumPy has no bfloat16


def _from_numpy(array: np.ndarray) -> mx.array:
    """float64 as float32, which may make infinities of large values: they are refused later."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32) if array.dtype.itemsize == 8 else array
    return mx.array(narrow.astype(narrow.dtype.newbyteorder("="), copy=False))


@contextlib.contextmanager
def _unreadable(path: Path, what: str) -> Iterator[None]:
    """Whatever a damaged file makes a reader raise, in one line."""
    try:
        yield
    except (FastForwardError, OSError):
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory to read it.") from None
    except Exception as e:
        reason = " ".join(str(e).split()).partition(". ")[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as {what}: {reason or type(e).__name__}."
        ) from e


def _pytorch(path: Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch file; reading it needs PyTorch: "
            "pip install 'mlx-fastforward[torch]', or save it as safetensors."
        ) from None
    import pickle

    with _unreadable(path, "a PyTorch file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript files, which are refused
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is not in PyTorch's zip format (torch.save since 1.6), or was cut "
                "short; save it again with a current torch.save."
            )
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as e:
            found = str(e).partition("GLOBAL ")[2].split()
            what = f" ({found[0]})" if found else ""
            raise CheckpointError(
                f"{path} holds more than tensors{what}, which could run code and was not "
                "loaded; save it with torch.save(module.state_dict(), ...)."
            ) from None
        found_tensors = list(itertools.islice(_flat(loaded, torch), MOST_TENSORS))
    return _once(
        path,
        (
            (name, Entry(tuple(t.shape), _torch_dtype(t, torch), read, path.name))
            for name, t in found_tensors
            for read in [functools.partial(_from_torch, path, t)]
        ),
    )


def _once(path: Path, pairs: Iterable[tuple[str, Entry]]) -> dict[str, Entry]:
    """A dict of pairs whose names must differ."""
    entries: dict[str, Entry] = {}
    for name, entry in pairs:
        if name in entries:
            raise CheckpointError(f"{path} holds the tensor {name!r} twice.")
        entries[name] = entry
    return entries


def _flat(value: Any, torch: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors of nested state dicts with dotted names; anything else is left out."""
    if isinstance(value, torch.Tensor):
        yield prefix, value.detach()
    elif isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            yield from _flat(inner, torch, f"{prefix}.{key}" if prefix else str(key))


def _torch_dtype(t: Any, torch: Any) -> str:
    name = str(t.dtype).removeprefix("torch.")
    if t.layout != torch.strided or t.device.type != "cpu":
        return f"{t.device.type} {t.layout} {name}"
    return name


def _from_torch(path: Path, t: Any) -> mx.array:
    import torch

    with _unreadable(path, "a PyTorch file"):
        t = t.resolve_conj().resolve_neg().contiguous()
        if t.dtype == torch.bfloat16:  # NumPy has none: its bits travel as integers
            return mx.array(t.view(torch.int16).numpy()).view(mx.bfloat16)
        return _from_numpy(t.numpy())


def _npz(path: Path) -> dict[str, Entry]:
    with _unreadable(path, "an npz file"), zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if m.endswith(".npy")]
        named = ((m.removesuffix(".npy"), _npy(path, archive, m)) for m in members)
        return _once(path, named)


def _npy(path: Path, archive: zipfile.ZipFile, member: str) -> Entry:
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        header = (
            npy.read_array_header_1_0
            if version == (1, 0)
            else npy.read_array_header_2_0
        )
        shape, _, dtype = header(stream)
    size = archive.getinfo(member).file_size
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > size:
        raise CheckpointError(f"{path}: {member} claims more data than it holds.")
    read = functools.partial(_from_npz, path, member)
    return Entry(tuple(shape), dtype.name, read, path.name)


def _from_npz(path: Path, member: str) -> mx.array:
    with _unreadable(path, "an npz file"), zipfile.ZipFile(path) as archive:
        with archive.open(member) as stream:
            array = npy.read_array(stream, allow_pickle=False)
    return _from_numpy(array)


_READERS: dict[str, Callable[[Path], dict[str, Entry]]] = {
    "safetensors": _safetensors,
    "PyTorch": _pytorch,
    "NumPy": _npz,
}


def describe(checkpoint: Checkpoint) -> str:
    """One line about where the tensors come from."""
    files = sorted({e.file for e in checkpoint.entries.values()})
    where = f" in {len(files)} files" if len(files) > 1 else ""
    return f"{checkpoint.name}: {checkpoint.kind}, {len(checkpoint.entries)} tensors{where}"
