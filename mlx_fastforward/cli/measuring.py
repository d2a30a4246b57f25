"""What bench, eval and inspect share: the stock model, lists of numbers, and the files they write."""

import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Optional

from .. import demo
from ..config import ConfigError
from .common import fail, load_model, replacing

DTYPES = ("float32", "float16", "bfloat16")


def numbers(flag: str, text: str, kind: Any, least: int = 1) -> list[Any]:
    """A list of numbers with commas between them."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{flag} must be numbers with commas between them, got {text!r}."
        ) from None
    if kind is int and min(found) < least:
        raise ConfigError(f"{flag} must be at least {least}, got {text!r}.")
    return found


def check_dtype(dtype: Optional[str]) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype must be float32, float16 or bfloat16; got {dtype}.")


def stock_model(
    model: Optional[str],
    dtype: Optional[str],
    adapter: Optional[str],
    trust_remote_code: bool,
) -> tuple[Any, Any, Any]:
    """The model, stock, its tokenizer and its adapter."""
    import mlx.core as mx

    from ..adapter import BaseModel
    from ..attachment import detach
    from ..finding import adapter_for, named_adapter

    net, tokenizer = load_model(
        model,
        sparsity=0.0,
        adapter="none",
        trust_remote_code=trust_remote_code,
    )
    detach(net)
    if dtype:
        net.set_dtype(getattr(mx, dtype))
    place = str(demo.MODEL) if model is None else model
    side = named_adapter(adapter) if adapter else adapter_for(place, BaseModel.of(net))
    return net, tokenizer, side


def public_name(name: Optional[str]) -> str:
    """Figures are shared, paths are not."""
    if name and Path(name).exists():
        return Path(name).resolve().name
    return name or "demo model"


def dtype_name(net: Any) -> str:
    """Of the activations."""
    from ..families import float_dtype

    return str(float_dtype(net)).rpartition(".")[2]


def check_files(json_file: Optional[Path], png: Optional[Path]) -> None:
    """Better before the measuring than after it."""
    if png and png.suffix.lower() != ".png":
        raise ConfigError(f"--png must be a file ending in .png, got {png}.")
    for file in (json_file, png):
        if file is None:
            continue
        if file.is_dir():
            fail(f"{file} cannot be written: it is a folder.")
        if not file.absolute().parent.is_dir():
            fail(f"{file} cannot be written: no such folder.")
        try:
            tempfile.TemporaryFile(dir=file.absolute().parent).close()
        except OSError as e:
            fail(f"{file} cannot be written: {e.strerror or e}.")


def write_json(file: Optional[Path], report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write(file, lambda half: half.write_text(text, encoding="utf-8"))


def write(file: Optional[Path], action: Callable[[Path], Any]) -> None:
    """Let ``action`` write a file, whole or not at all; None writes nothing."""
    if file is None:
        return
    try:
        with replacing(file) as half:
            action(half)
    except OSError as e:
        fail(f"{file} cannot be written: {e.strerror or e}.")
