"""A checkpoint's tensors -> a predictor: everything is checked before anything is written."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Iterable, Optional

import mlx.core as mx

from ..neurons.compensators import ACTIVATIONS
from ..predictors.base import BaseModel
from ..predictors.file import MLP, POOLED, packed
from .files import Checkpoint, CheckpointError, Entry
from .naming import IMPORTANCE, PARTS, Match, Rule, Unknown, place

FLOATS = ("float64", "float32", "float16", "bfloat16")
MOST_LAYERS = 10_000
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Source:
    """Where one tensor of the predictor comes from.

    Args:
        index: Which slice along the first axis, for tensors that hold all layers.
        transpose: Stored (out, in).
    """

    name: str
    entry: Entry
    match: Match
    index: Optional[int] = None
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this layer's part, as stored."""
        return self.entry.shape if self.index is None else self.entry.shape[1:]

    def read(self) -> mx.array:
        w = self.entry.read()
        if self.index is not None:
            w = w[self.index]
        return w.T if self.transpose else w


@dataclass
class Layout:
    """What a checkpoint holds, by name alone.

    Args:
        sources: Part -> layer -> where from. Importances: layer -1 where one tensor holds all.
        ignored: Names of tensors that belong to no predictor, such as the base model's.
        matched: Name -> canonical name, for --list.
        problems: Name -> why it cannot be what its name says.
    """

    sources: dict[str, dict[int, Source]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    matched: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """A conversion that can be carried out: sources in order, ranks per layer, remarks."""

    base: BaseModel
    sources: dict[str, Source]
    ranks: dict[str, list[int]]
    importance: list[Source]
    ignored: list[str]
    remarks: list[str]


def lay_out(checkpoint: Checkpoint, rules: list[Rule]) -> Layout:
    """Match every tensor by its name."""
    layout = Layout()
    for name, entry in checkpoint.entries.items():
        try:
            found = place(name, rules)
        except Unknown:
            layout.unknown.append(name)
            continue
        if found is None:
            layout.ignored.append(name)
            continue
        stacked = found.layer is None and found.part != IMPORTANCE
        layout.matched[name] = _canonical(found.part, "*" if stacked else found.layer)
        if stacked and len(entry.shape) < 2:
            layout.problems[name] = (
                f"{name!r} has shape {entry.shape}; its name has no layer, so the first axis "
                "should be the layers."
            )
            continue
        for layer, source in _spread(name, entry, found):
            taken = layout.sources.setdefault(found.part, {})
            if layer in taken:
                twice = (
                    f"{_canonical(found.part, layer)} comes twice: from "
                    f"{taken[layer].name!r} and from {name!r}."
                )
                layout.problems.setdefault(name, twice)
            taken[layer] = source
    return layout


def _spread(name: str, entry: Entry, found: Match) -> Iterable[tuple[int, Source]]:
    """The layers that a tensor serves."""
    if found.layer is not None:
        return [(found.layer, Source(name, entry, found))]
    if found.part == IMPORTANCE:
        return [(-1, Source(name, entry, found))]
    layers = range(min(entry.shape[0], MOST_LAYERS))
    return [(i, Source(name, entry, found, i)) for i in layers]


def _canonical(part: str, layer: Any) -> str:
    return part if layer is None or layer == -1 else f"layers.{layer}.{part}"


def plan(checkpoint: Checkpoint, base: BaseModel, rules: list[Rule]) -> Plan:
    """Check names, layers, shapes and dtypes against the base model; raises CheckpointError."""
    layout = lay_out(checkpoint, rules)
    for problem in layout.problems.values():
        raise CheckpointError(problem)
    if layout.unknown:
        raise CheckpointError(
            f"no known name: {_some(layout.unknown)}; predictors and compensators are query, w1 "
            "and w2 without biases. Name others with --map, or leave them out with null."
        )
    kinds = [k for k in ("predictor", "compensator") if _has(layout, k)]
    if not kinds:
        raise CheckpointError(
            f"no predictor or compensator among {len(checkpoint.entries)} tensors "
            f"({_some(list(checkpoint.entries))}); --list shows all, --map names them."
        )
    wanted = [p for p in PARTS if p.partition(".")[0] in kinds]
    for part in wanted:
        _check_layers(part, layout.sources.get(part, {}), base)
    result = Plan(base, {}, {}, [], layout.ignored, [])
    for kind in kinds:
        ranks = result.ranks[kind] = []
        for i in range(base.layers):
            parts = {p: layout.sources[p][i] for p in wanted if p.startswith(kind)}
            rank, oriented = _orient(kind, i, parts, base, result.remarks)
            ranks.append(rank)
            result.sources.update({f"layers.{i}.{p}": s for p, s in oriented.items()})
    result.remarks = list(dict.fromkeys(result.remarks))
    result.importance = _importances(layout.sources.get(IMPORTANCE, {}), base)
    for name, source in [
        *result.sources.items(),
        *((IMPORTANCE, s) for s in result.importance),
    ]:
        if source.entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{source.name} ({name}) is {source.entry.dtype}; expected one of "
                f"{', '.join(FLOATS)}."
            )
    return result


def _has(layout: Layout, kind: str) -> bool:
    return any(part.startswith(kind) for part in layout.sources)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n[:60]) for n in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_layers(part: str, found: dict[int, Source], base: BaseModel) -> None:
    missing = [i for i in range(base.layers) if i not in found]
    extra = sorted(set(found) - set(range(base.layers)))
    if not missing and not extra:
        return
    what = [f"layer {_numbers(missing)} missing"] if missing else []
    what += [f"layer {_numbers(extra)} not in the model"] if extra else []
    raise CheckpointError(
        f"{part}: expected layers 0 to {base.layers - 1} of {base.name}, found {len(found)}; "
        f"{', '.join(what)}."
    )


def _numbers(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return shown + (" and others" if len(layers) > 6 else "")


def _orient(
    kind: str, layer: int, parts: dict[str, Source], base: BaseModel, remarks: list[str]
) -> tuple[int, dict[str, Source]]:
    """Find each matrix's orientation by its shape. -> rank, parts.

    w1 is (d, rank); w2 is (rank, f) of a predictor and (rank, d) of a compensator.
    """
    d = base.hidden_size
    out = base.widths[layer] if kind == "predictor" else d
    oriented = {}
    if kind == "predictor":
        query = parts["predictor.query"]
        if sorted(query.shape, reverse=True) != [d, *[1] * (len(query.shape) - 1)]:
            raise _misshapen(query, "predictor.query", layer, f"({d},)")
        oriented["predictor.query"] = query
    w1, w2 = parts[f"{kind}.w1"], parts[f"{kind}.w2"]
    if len(w1.shape) != 2 or d not in w1.shape:
        raise _misshapen(w1, f"{kind}.w1", layer, f"({d}, rank) or (rank, {d})")
    rank = w1.shape[0] if w1.shape[1] == d else w1.shape[1]
    for part, source, shape in (
        (f"{kind}.w1", w1, (d, rank)),
        (f"{kind}.w2", w2, (rank, out)),
    ):
        if rank == 0 or source.shape not in (shape, shape[::-1]):
            raise _misshapen(source, part, layer, f"{shape} or {shape[::-1]}")
        transpose = source.match.transpose
        if shape[0] == shape[1]:
            if transpose is None:
                transpose = source.match.linear
                how = "(out, in), as a Linear's" if transpose else "(in, out)"
                remarks.append(
                    f"{part} is square: taken as {how}; --map says otherwise"
                )
        elif transpose is None:
            transpose = source.shape != shape
        elif transpose != (source.shape != shape):
            raise _misshapen(
                source, part, layer, f"{shape[::-1] if transpose else shape} by the map"
            )
        oriented[part] = replace(source, transpose=bool(transpose))
    return rank, oriented


def _misshapen(source: Source, part: str, layer: int, expected: str) -> CheckpointError:
    return CheckpointError(
        f"layers.{layer}.{part} ({source.name!r}): expected shape {expected}, "
        f"found {source.shape}."
    )


def _importances(found: dict[int, Source], base: BaseModel) -> list[Source]:
    """One tensor for all layers, or one number a layer; [] without any."""
    if not found:
        return []
    if -1 in found:
        if len(found) > 1:
            raise CheckpointError(
                "importances come twice: for all layers and for single ones."
            )
        if found[-1].shape != (base.layers,):
            raise CheckpointError(
                f"{found[-1].name}: expected one importance per layer, shape ({base.layers},), "
                f"found {found[-1].shape}."
            )
        return [found[-1]]
    _check_layers(IMPORTANCE, found, base)
    for i, source in found.items():
        if any(n != 1 for n in source.shape):
            raise CheckpointError(
                f"{source.name}: expected the importance of layer {i} as one number, "
                f"found shape {source.shape}."
            )
    return [found[i] for i in range(base.layers)]


def tensors(
    plan: Plan, dtype: mx.Dtype, bits: Optional[int] = None
) -> Iterable[tuple[str, dict[str, mx.array]]]:
    """Read, cast and check tensor after tensor: (canonical name, what to save for it)."""
    for name, source in plan.sources.items():
        w = source.read().astype(dtype)
        if name.endswith("query"):
            w = w.reshape(-1)
        w = mx.contiguous(w)
        _check_finite(name, source, w, dtype)
        if bits and name.endswith("predictor.w2"):
            quantised = packed(name, w, bits)
            for part in list(quantised.values())[1:]:
                _check_finite(f"{name} in {bits} bits", source, part, dtype)
            yield name, quantised
        else:
            yield name, {name: w}
    if plan.importance:
        parts = [s.read().astype(mx.float32).reshape(-1) for s in plan.importance]
        values = mx.concatenate(parts)
        _check_finite(IMPORTANCE, plan.importance[0], values, mx.float32)
        if mx.any(values < 0).item() or not mx.any(values > 0).item():
            raise CheckpointError(
                "importances must not be negative, nor all zero (eq. 23 is a share of attention)."
            )
        yield IMPORTANCE, {IMPORTANCE: values}


def _check_finite(name: str, source: Source, w: mx.array, dtype: mx.Dtype) -> None:
    if mx.all(mx.isfinite(w)).item():
        return
    raw, shown = source.read(), source.name
    if name not in shown:
        shown = f"{name} ({shown!r})"
    if mx.all(mx.isfinite(raw)).item():
        raise CheckpointError(
            f"{shown} does not fit {str(dtype).removeprefix('mlx.core.')}: its largest "
            f"value is {mx.max(mx.abs(raw)).item():.3g}; use another --dtype."
        )
    bad = mx.sum(mx.logical_not(mx.isfinite(raw))).item()
    raise CheckpointError(
        f"{shown} holds {bad:,} values that are NaN or infinite, or beyond float32."
    )


def activation(checkpoint: Checkpoint, asked: Optional[str]) -> tuple[str, bool]:
    """The compensator's activation, and whether anybody told it: weights do not."""
    beside = checkpoint.info.get("compensator")
    said = beside.get("activation") if isinstance(beside, dict) else None
    known = asked or (said if said in list(ACTIVATIONS) else None)
    return known or "relu", known is not None


def information(
    plan: Plan, checkpoint: Checkpoint, activation: str, bits: Optional[int]
) -> dict[str, Any]:
    """What the predictor's JSON says of itself."""
    info: dict[str, Any] = {"base_model": asdict(plan.base)}
    for kind, name in (("predictor", POOLED), ("compensator", MLP)):
        if ranks := plan.ranks.get(kind):
            same = len(set(ranks)) == 1
            info[kind] = {"kind": name, "rank": ranks[0] if same else ranks}
    if bits and "predictor" in info:
        info["predictor"]["quantization"] = {"bits": bits}
    if "compensator" in info:
        info["compensator"]["activation"] = activation
    for key in ("block_size", "calibration"):
        if key in checkpoint.info:
            info[key] = checkpoint.info[key]
    info["source"] = {"name": checkpoint.name, "kind": checkpoint.kind}
    return info
