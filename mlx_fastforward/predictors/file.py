"""The predictor file: trained predictors, compensators and importances of one base model.

A folder with ``fastforward.json`` (what it is) and ``fastforward.safetensors`` (the weights).
"""

import contextlib
import copy
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import numpy as np

from ..errors import PredictorError
from ..files import expanded, sha256, write_text
from ..model.families import prefilled
from ..neurons.compensators import (
    ACTIVATIONS,
    Compensator,
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)
from ..neurons.predictor import QUANTIZATION_BITS, PredictorWeights, group_size
from ..neurons.schedule import Curves
from ..tokens.readout import Readout
from .base import BaseModel
from .checked import (
    FORMAT,
    JSON_NAME,
    TENSORS_NAME,
    Tensors,
    kind_of,
    per_layer,
    read,
    section_of,
    whole,
)
from .tensors import write_tensors

POOLED, TOKENWISE = "pooled", "token-wise"
MLP, LOW_RANK = "mlp", "low-rank"


@dataclass
class PredictorFile:
    """A loaded predictor file.

    Args:
        base: The model that it is for.
        layers: One predictor per layer, or None.
        compensator: Ready to use, or None.
        importances: s_l per layer (eq. 23), or None.
        details: The whole JSON (calibration summary, versions).
        source: Where it was found.
        curves: What each layer's sparsity costs, or None.
        readout: Says which tokens a speculative prefill keeps, or None.
    """

    base: BaseModel
    layers: Optional[list[PredictorWeights]] = None
    compensator: Optional[Compensator] = None
    importances: Optional[list[float]] = None
    details: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    curves: Optional[Curves] = None
    readout: Optional[Readout] = None

    def check(self, model: BaseModel) -> None:
        """Refuse a model that this was not made for; raises PredictorError."""
        for key in ("layers", "hidden_size", "ffn_size"):
            made_for, found = getattr(self.base, key), getattr(model, key)
            if made_for != found:
                raise PredictorError(
                    f"the predictor file was made for a model with {key} {made_for}, "
                    f"this model has {found}."
                )
        if self.base.fingerprint != model.fingerprint:
            raise PredictorError(
                f"the predictor file was made for {self.base.name!r}: "
                "the shapes agree, but the weights of this model do not."
            )

    def part(self, rank: int, size: int) -> "PredictorFile":
        """What one of ``size`` processes needs, for its own neurons."""
        if size == 1:
            return self
        back = self.compensator
        return replace(
            self,
            layers=self.layers and [w.part(rank, size) for w in self.layers],
            compensator=back and back.part(rank, size),
        )

    def astype(self, dtype: mx.Dtype) -> "PredictorFile":
        """The same with all float weights of this dtype; PredictorError where they do not fit."""

        def cast(part: Any) -> Any:
            found = {k: _cast(w, dtype) for k, w in vars(part).items()}
            return type(part)(**found)

        layers = self.layers and [cast(w) for w in self.layers]
        compensator = copy.copy(self.compensator)
        if compensator is not None:
            compensator.layers = [cast(w) for w in compensator.layers]
        readout = self.readout and cast(self.readout)
        return replace(self, layers=layers, compensator=compensator, readout=readout)

    def arrays(self) -> list[mx.array]:
        """All weights, to evaluate them before they are needed."""
        parts: list[Any] = list(self.layers or [])
        parts += getattr(self.compensator, "layers", [])
        parts += [self.readout] if self.readout else []
        return [w for p in parts for w in vars(p).values() if isinstance(w, mx.array)]


def _cast(value: Any, dtype: mx.Dtype) -> Any:
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return value
    value = value.astype(dtype)
    if not mx.all(mx.isfinite(value)).item():
        raise PredictorError(f"a weight does not fit {dtype}.")
    return value


def load_predictor(path: str | Path) -> PredictorFile:
    """Read a predictor file lazily (weights are mapped, not read); raises PredictorError."""
    path = expanded(Path(path))
    info, tensors = read(path)
    base = _base(path, info)
    # before lists as long as the file says are made
    weights = info.get("predictor") or info.get("compensator")
    if weights and base.layers > max(1, len(tensors)):
        raise PredictorError(
            f"{path / TENSORS_NAME} lacks weights for {base.layers} layers."
        )
    file = Tensors(path, tensors)
    predictors = compensator = importances = None
    if info.get("predictor"):
        predictors = _predictors(file, info, base)
    if info.get("compensator"):
        compensator = _compensator(file, info, base)
    if "importance" in tensors:
        weight = file.get("importance", (base.layers,))
        importances = np.array(weight.astype(mx.float32)).tolist()
    curves = _curves(path, info, base) if "curves" in info else None
    readout = _readout(file, info, base) if info.get("readout") else None
    source = str(path)
    return PredictorFile(
        base, predictors, compensator, importances, info, source, curves, readout
    )


def _base(path: Path, info: dict[str, Any]) -> BaseModel:
    base = section_of(path, info, "base_model")
    layers, d = (
        whole(path, info, "base_model", key) for key in ("layers", "hidden_size")
    )
    f: int | list[int]
    if isinstance(base.get("ffn_size"), list):
        widths = per_layer(path, info, "base_model", "ffn_size", layers)
        f = widths[0] if len(set(widths)) == 1 else widths
    else:  # no list is made as long as the file says before the tensors were counted
        f = whole(path, info, "base_model", "ffn_size")
    if not isinstance(mark := base.get("fingerprint"), str):
        raise PredictorError(f"{path / JSON_NAME} lacks base_model.fingerprint.")
    name, kind = base.get("name"), base.get("model_type")
    return BaseModel(
        name if isinstance(name, str) and name else "another model",
        kind if isinstance(kind, str) else "",
        layers,
        d,
        f,
        mark,
    )


def _predictors(
    file: "Tensors", info: dict[str, Any], base: BaseModel
) -> list[PredictorWeights]:
    path, d = file.path, base.hidden_size
    kind = kind_of(path, info, "predictor", (POOLED, TOKENWISE))
    ranks = per_layer(path, info, "predictor", "rank", base.layers)
    rows = ranks if kind == POOLED else [2 * r for r in ranks]
    none: list[Any] = [None] * base.layers
    queries = biases = none
    if kind == POOLED:
        queries = file.layers("predictor.query", [(d,)] * base.layers)
    else:
        biases = file.layers("predictor.bias", [(f,) for f in base.widths])
    w1 = file.layers("predictor.w1", [(d, r) for r in ranks])
    bits, w2 = _w2(file, info, list(zip(rows, base.widths)))
    return [
        PredictorWeights(q, first, *second, bits, bias)
        for q, first, second, bias in zip(queries, w1, w2, biases)
    ]


def _w2(
    file: "Tensors", info: dict[str, Any], shapes: list[tuple[int, int]]
) -> tuple[int, list[tuple[Any, Any, Any]]]:
    """Bits (0: float), and per layer w2 with its scales and biases."""
    quantization, path = info["predictor"].get("quantization"), file.path
    if quantization is None:
        return 0, [(w, None, None) for w in file.layers("predictor.w2", shapes)]
    bits = whole(path, {"quantization": quantization}, "quantization", "bits")
    odd = [f for _, f in shapes if not group_size(f)]
    if bits not in QUANTIZATION_BITS or odd:
        known = " or ".join(map(str, QUANTIZATION_BITS))
        raise PredictorError(
            f"{path / JSON_NAME}: expected a predictor in {known} bits "
            f"and a multiple of 32 neurons; found {bits} bits and "
            f"{(odd or [shapes[0][1]])[0]} neurons."
        )
    groups = [(r, f // group_size(f)) for r, f in shapes]
    packed = [(r, f * bits // 32) for r, f in shapes]
    w2 = file.layers("predictor.w2", packed, mx.uint32)
    scales = file.layers("predictor.w2.scales", groups)
    biases = file.layers("predictor.w2.biases", groups)
    return bits, list(zip(w2, scales, biases))


def _compensator(file: "Tensors", info: dict[str, Any], base: BaseModel) -> Compensator:
    path, d = file.path, base.hidden_size
    kind = kind_of(path, info, "compensator", (MLP, LOW_RANK))
    ranks = per_layer(path, info, "compensator", "rank", base.layers)
    if kind == LOW_RANK:
        parts = [
            file.layers("compensator.center", [(d,)] * base.layers),
            file.layers("compensator.v", [(d, k) for k in ranks]),
            file.layers(
                "compensator.u", [(f, k + 1) for f, k in zip(base.widths, ranks)]
            ),
        ]
        return LowRankCompensator([LowRankWeights(*w) for w in zip(*parts)])
    activation = info["compensator"].get("activation", "relu")
    if activation not in list(ACTIVATIONS):
        raise PredictorError(
            f"{path / JSON_NAME}: expected a compensator activation of "
            f"{', '.join(ACTIVATIONS)}; found {activation!r}."
        )
    w1 = file.layers("compensator.w1", [(d, h) for h in ranks])
    w2 = file.layers("compensator.w2", [(h, d) for h in ranks])
    return MLPCompensator([MLPWeights(*w) for w in zip(w1, w2)], activation)


def _readout(file: Tensors, info: dict[str, Any], base: BaseModel) -> Readout:
    names = "layer", "heads", "rank"
    layer, heads, rank = (whole(file.path, info, "readout", name) for name in names)
    if layer >= base.layers:
        raise PredictorError(
            f"{file.path / JSON_NAME}: expected readout.layer below {base.layers}, found {layer}."
        )
    d, width = base.hidden_size, heads * rank
    shapes = {"query": (d, width), "bias": (width,), "key": (d, width)}
    tensors = {k: file.get(f"readout.{k}", shape) for k, shape in shapes.items()}
    return Readout(layer, heads, **tensors)


def _curves(path: Path, info: dict[str, Any], base: BaseModel) -> Curves:
    section = section_of(path, info, "curves")
    levels: Any = section.get("levels")
    rows: Any = section.get("kl")
    good = _ascending(levels) and isinstance(rows, list)
    good = good and len(rows) == len(prefilled(range(base.layers)))
    if not good or not all(_numbers(row) and len(row) == len(levels) for row in rows):
        raise PredictorError(
            f"{path / JSON_NAME}: expected curves with ascending levels between 0 and 1 and a row "
            f"of as many numbers for each of {base.layers - 1} layers."
        )
    return Curves(levels, rows, section.get("source") or {})


def _numbers(values: Any) -> bool:
    """A list of finite numbers, none below 0."""
    return isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1e30
        for v in values
    )


def _ascending(levels: Any) -> bool:
    if not _numbers(levels) or len(levels) < 2:
        return False
    return all(a < b for a, b in zip([0, *levels], [*levels, 1]))


def packed(name: str, w: mx.array, bits: int) -> dict[str, mx.array]:
    """A predictor's w2 (r, f) quantised along the neurons, under the names of the file."""
    weight, scales, biases = mx.quantize(
        w, group_size=group_size(w.shape[1]), bits=bits
    )
    return {name: weight, f"{name}.scales": scales, f"{name}.biases": biases}


def save_predictor(
    path: str | Path, info: dict[str, Any], tensors: dict[str, mx.array]
) -> None:
    """Write a predictor file; the JSON, without which nothing loads, appears last."""
    path = Path(path)
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as tmp:
            write_tensors(f"{tmp}/{TENSORS_NAME}", tensors)
            mark = sha256(Path(tmp, TENSORS_NAME))
            text = json.dumps({"format": FORMAT, **info, "sha256": mark}, indent=2)
            Path(tmp, JSON_NAME).write_text(text + "\n", encoding="utf-8")
            # never old JSON with new weights
            (path / JSON_NAME).unlink(missing_ok=True)
            for name in (TENSORS_NAME, JSON_NAME):
                os.replace(f"{tmp}/{name}", path / name)
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def ensure_predictor(path: Path, base: BaseModel) -> None:
    """A predictor file without weights where there is none yet."""
    if not (path / JSON_NAME).is_file():
        save_predictor(path, {"base_model": asdict(base)}, {})


def update_predictor(path: str | Path, **sections: Any) -> None:
    """Write sections of a predictor file's JSON anew; its weights stay as they are."""
    path = Path(path)
    info, _ = read(path)
    write_text(path / JSON_NAME, json.dumps(info | sections, indent=2) + "\n")


def add_readout(path: str | Path, readout: Readout, **details: Any) -> None:
    """Put a readout into a predictor file, in the place of one that is there."""
    info, tensors = read(expanded(Path(path)))
    weights = {k: w for k, w in vars(readout).items() if isinstance(w, mx.array)}
    section = {
        "layer": readout.layer,
        "heads": readout.heads,
        "rank": readout.key.shape[1] // readout.heads,
    }
    tensors |= {f"readout.{k}": w.astype(mx.float16) for k, w in weights.items()}
    save_predictor(path, info | {"readout": section | details}, tensors)
