"""How fast a sparse prefill could be: FLOPs and bytes by part, and the speed-up they allow.

Counted as the engine runs: chunks of 2,048 tokens, the plan of each, the last layer's FFN never. A
limit, not a forecast: every product at full speed, norms, softmax and sampling for nothing. Sliding
windows are counted as full attention.
"""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from .down import base_and_lora
from .engine import Engine
from .families import family_of, layer_mlps
from .ffn import GatedFFN
from .plan import CHUNK


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``weight_bytes``: bytes per FFN weight as stored, scales included."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: float
    float_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        """Of a loaded model of a supported architecture."""
        text: Any = getattr(model, "language_model", model)  # multimodal checkpoints
        args = text.args
        family = family_of(model)
        ffn = GatedFFN(layer_mlps(model, family)[0], family)
        d, f = ffn.shape
        heads = args.num_attention_heads
        return cls(
            len(model.layers),
            d,
            f,
            heads,
            getattr(args, "num_key_value_heads", None) or heads,
            getattr(args, "head_dim", None) or d // heads,
            *_bytes(ffn.down),
        )


def _bytes(linear: Any) -> tuple[float, int]:
    """Bytes per weight, and of the floats it computes in."""
    base, _ = base_and_lora(linear)
    floats = base.get("scales", base.weight).dtype.size
    if "scales" not in base:
        return float(floats), floats
    parts = [base.weight, base.scales, base.get("biases")]
    stored = sum(p.nbytes for p in parts if p is not None)
    return stored * base.bits / 32 / base.weight.size, floats


@dataclass
class Cost:
    """FLOPs and bytes moved of one prefill, by part."""

    flops: dict[str, float]
    bytes: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Roofline: each part takes as long as its arithmetic or its bytes, whichever is longer.

        Args:
            flops: Of the device, per second.
            bandwidth: In bytes per second.
        """
        parts = set(self.flops) | set(self.bytes)
        return sum(
            max(self.flops.get(p, 0) / flops, self.bytes.get(p, 0) / bandwidth)
            for p in parts
        )


def dense_cost(shape: Shape, tokens: int) -> Cost:
    """Stock mlx-lm reading a prompt of ``tokens`` tokens."""
    s = shape
    matrices = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads)
    # only keys and values of the last layer are ever computed
    last = 2 * s.hidden * s.head_dim * s.kv_heads
    weights = (s.layers - 1) * matrices + last
    chunks = -(-tokens // CHUNK)
    seen = tokens * (tokens + 1) / 2
    ffn = 3 * s.hidden * s.ffn * (s.layers - 1)
    return Cost(
        {
            "projections": 2.0 * tokens * weights,
            "attention": 4.0 * seen * s.heads * s.head_dim * (s.layers - 1),
            "ffn": 2.0 * tokens * ffn,
        },
        {
            "projections": chunks * weights * s.weight_bytes,
            "ffn": chunks * ffn * s.weight_bytes,
        },
    )


def sparse_cost(shape: Shape, tokens: int, engine: Engine) -> Cost:
    """The same prompt under an engine: its plan, budgets, selector and compensator."""
    cost = dense_cost(shape, tokens)
    ffn = selection = compensation = 0.0
    ffn_bytes = gathered = 0.0
    for new, plan in _plans(tokens, engine):
        for keep in engine.keep[:-1]:
            whole = 3.0 * shape.hidden * shape.ffn
            ffn += 2 * new * whole
            ffn_bytes += whole * shape.weight_bytes
            if plan is None or keep is None:
                continue
            found = engine.block_flops(plan, shape.hidden, shape.ffn, keep)
            ffn, selection = ffn - found[0], selection + found[1]
            compensation += found[2]
            taken = 3.0 * keep * shape.hidden * shape.weight_bytes
            gathered += 2 * plan.blocks * taken  # read and written
            if engine.config.strategy == "chunk":
                # dequantised, and transposed in two passes
                gathered += 5.0 * shape.hidden * shape.ffn * shape.float_bytes
            ffn_bytes += plan.blocks * taken
    cost.flops |= {"ffn": ffn, "selection": selection, "compensation": compensation}
    cost.bytes |= {"ffn": ffn_bytes, "gather": gathered}
    return cost


def _plans(tokens: int, engine: Engine) -> list[tuple[int, Any]]:
    """(new tokens, plan) of every call that generation makes; the last token comes alone."""
    if tokens < engine.shortest:
        return [(tokens, None)]
    found, done = [], 0
    while done < tokens:
        new = min(CHUNK, tokens - 1 - done) or 1
        plan = engine.plan(new, done == 0, tokens - done - new)
        found.append((new, plan if new > 1 else None))
        done += new
    return found


def ideal_speedup(shape: Shape, tokens: int, engine: Engine) -> float:
    """Stock FLOPs over the sparse prefill's: what arithmetic allows."""
    return dense_cost(shape, tokens).total / sparse_cost(shape, tokens, engine).total


def roofline_speedup(
    shape: Shape,
    tokens: int,
    engine: Engine,
    flops: float,
    bandwidth: float,
) -> float:
    """The same on a device of so many FLOP/s and bytes/s, copies of weights included."""
    dense, sparse = dense_cost(shape, tokens), sparse_cost(shape, tokens, engine)
    return dense.seconds(flops, bandwidth) / sparse.seconds(flops, bandwidth)
