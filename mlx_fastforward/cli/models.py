"""The models that commands work on: loaded and attached, stock, or only described."""

from pathlib import Path
from typing import Any, Optional

from .. import demo
from ..errors import ConfigError, LoadProblem

LORA_NAME = "adapter_config.json"


def checked_name(name: Optional[str]) -> str:
    """A --model that may name one; None or "demo" is the demo model."""
    if name == "":
        raise ConfigError("--model must be a folder or repository name, got nothing.")
    name = str(demo.MODEL) if name in (None, demo.NAME) else name
    path = Path(name)
    if path.is_file():
        raise LoadProblem(f"{name} is a file; expected a model folder or repository.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LoadProblem(f"{name} holds no config.json; expected a model folder.")
    return name


def load_model(name: Optional[str], **kwargs: Any) -> tuple[Any, Any]:
    """ff.load with its many errors told in one line. ``name`` None is the demo model."""
    from ..hub import problems
    from ..loading import load

    name = checked_name(name)
    if kwargs.get("adapter_path") is not None:
        _check_lora(Path(kwargs["adapter_path"]))
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    with problems(name, LoadProblem):
        return load(name, tokenizer_config=trust, **kwargs)


def _check_lora(folder: Path) -> None:
    """A folder that mlx-lm takes LoRA weights from; raises LoadProblem."""
    from ..predictors.file import JSON_NAME

    expected = "expected the folder that mlx_lm.lora wrote: adapter_config.json and adapters.safetensors"
    if not folder.exists():
        raise LoadProblem(f"--adapter-path: {folder} does not exist; {expected}.")
    if (folder / JSON_NAME).is_file() and not (folder / LORA_NAME).is_file():
        raise LoadProblem(
            f"--adapter-path: {folder} holds a predictor, no LoRA weights; use --predictor for it."
        )
    if not (folder / LORA_NAME).is_file():
        raise LoadProblem(
            f"--adapter-path: {folder} holds no LoRA weights; {expected}."
        )


def stock_model(
    model: Optional[str],
    dtype: Optional[str] = None,
    predictor: Optional[str] = None,
    trust_remote_code: bool = False,
    stages: bool = False,
) -> tuple[Any, Any, Any]:
    """The model, stock, its tokenizer and its predictor file."""
    from ..hub import problems
    from ..loading import load_stock

    name = checked_name(model)
    with problems(name, LoadProblem):
        return load_stock(name, dtype, predictor, trust_remote_code, stages)


def describe_base(name: Optional[str], trust_remote_code: bool) -> tuple[Any, str]:
    """The base model of a predictor, and its float dtype by name; its weights are not read."""
    from mlx_lm.utils import _download, load_model

    from ..hub import problems
    from ..predictors.base import BaseModel

    shown = public_name(name)
    name = checked_name(name)
    with problems(name, LoadProblem):
        folder = _download(name)
        model, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        return BaseModel.of(model, shown), dtype_name(model)


def public_name(name: Optional[str]) -> str:
    """Figures are shared, paths are not."""
    if name and Path(name).exists():
        return Path(name).resolve().name
    return name or "demo model"


def dtype_name(net: Any) -> str:
    """Of the activations."""
    from ..model.families import float_dtype

    return str(float_dtype(net)).rpartition(".")[2]
