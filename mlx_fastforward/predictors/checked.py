"""What a predictor file says, checked as it is asked for: its JSON and its tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Optional

import mlx.core as mx

from ..errors import PredictorError
from ..files import sha256
from .tensors import TensorFileError, open_tensors

FORMAT = 1
JSON_NAME = "fastforward.json"
TENSORS_NAME = "fastforward.safetensors"


def kind_of(
    path: Path, info: dict[str, Any], section: str, known: tuple[str, str]
) -> str:
    """Which of the known kinds; the first one unless it says otherwise."""
    kind = section_of(path, info, section).get("kind", known[0])
    if kind not in list(known):
        raise PredictorError(
            f"{path / JSON_NAME}: expected a {section} of kind {' or '.join(map(repr, known))}, "
            f"found {kind!r}; a newer mlx-fastforward may know it."
        )
    return kind


def per_layer(
    path: Path, info: dict[str, Any], section: str, key: str, layers: int
) -> list[int]:
    """One number per layer; most files have one for all."""
    value = section_of(path, info, section).get(key)
    if not isinstance(value, list):
        return [whole(path, info, section, key)] * layers
    if len(value) != layers:
        raise PredictorError(
            f"{path / JSON_NAME}: expected {layers} numbers in {section}.{key}, found {len(value)}."
        )
    return [whole(path, {section: {key: v}}, section, key) for v in value]


def section_of(path: Path, info: dict[str, Any], name: str) -> dict[str, Any]:
    section = info.get(name)
    if not isinstance(section, dict):
        raise PredictorError(
            f"{path / JSON_NAME}: expected {name} to be an object, found {section!r}."
        )
    return section


def whole(path: Path, info: dict[str, Any], section: str, key: str) -> int:
    value = section_of(path, info, section).get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PredictorError(
            f"{path / JSON_NAME}: expected {section}.{key} to be a whole number above 0, "
            f"found {value!r}."
        )
    return value


@dataclass(frozen=True)
class Tensors:
    """The tensors of a predictor file, each checked as it is asked for."""

    path: Path
    tensors: dict[str, mx.array]

    def get(
        self, key: str, shape: tuple[int, ...], dtype: Optional[mx.Dtype] = None
    ) -> mx.array:
        """A tensor of this name and shape, float or of the dtype given, or PredictorError."""
        file = self.path / TENSORS_NAME
        if key not in self.tensors:
            raise PredictorError(f"{file} lacks the tensor {key}.")
        tensor = self.tensors[key]
        if tuple(tensor.shape) != shape:
            raise PredictorError(
                f"{file}: {key} should have shape {shape}, found {tuple(tensor.shape)}."
            )
        if not mx.issubdtype(tensor.dtype, dtype or mx.floating):
            raise PredictorError(
                f"{file}: {key} should be {dtype or 'float'}, found {tensor.dtype}."
            )
        return tensor

    def layers(
        self,
        name: str,
        shapes: Iterable[tuple[int, ...]],
        dtype: Optional[mx.Dtype] = None,
    ) -> list[mx.array]:
        """This part of every layer."""
        return [self.get(f"layers.{i}.{name}", s, dtype) for i, s in enumerate(shapes)]


def read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    for name in (JSON_NAME, TENSORS_NAME):
        if not (path / name).is_file():
            raise PredictorError(
                f"no predictor file in {path}: expected the files {JSON_NAME} and {TENSORS_NAME}."
            )
    try:
        info = json.loads((path / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise PredictorError(f"{path / JSON_NAME} cannot be read: {e}") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise PredictorError(
            f"{path / JSON_NAME}: expected format {FORMAT}, found {found!r}."
        )
    try:
        tensors = open_tensors(path / TENSORS_NAME)
        found = sha256(path / TENSORS_NAME) if "sha256" in info else None
    except (TensorFileError, OSError) as e:
        raise PredictorError(f"{path / TENSORS_NAME} cannot be read: {e}") from e
    if found != info.get("sha256"):
        raise PredictorError(
            f"{path / TENSORS_NAME} is damaged: its checksum is not the one in {JSON_NAME}; "
            "copy or make it again."
        )
    return info, tensors
