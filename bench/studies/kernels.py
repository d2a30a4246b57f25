"""Ways to run an FFN over half of its neurons, one block of tokens, timed beside the dense FFN.

python -m mlx_fastforward.bench.studies.kernels --bits 4

"take" is what the package does: any neurons. The others need whole groups of 64 neighbouring neurons:
gather_mm and gather_qmm multiply with a stack of groups without copying them, block_masked_mm skips
tiles where the backend does, and a packed down projection can be taken in groups without unpacking it.
Every way is checked against the masked dense FFN. Weights that are dequantised first, once for all tokens,
leave a float GEMM: a quantised one over many rows unpacks the same tile many times.
"""

from typing import Annotated, Any, Callable

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.models.activations import swiglu
from rich.console import Console
from rich.table import Table

from ...config import STRATEGIES
from ...model.ffn import GatedFFN
from ...model.linear import dequantized
from ...model.proof import ffn_of
from ...timing import difference, interleaved
from ..environment import describe

GROUP = 64
FFN = Callable[[mx.array], mx.array]


class MLP(nn.Module):
    def __init__(self, d: int, f: int):
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def ffn(mlp: MLP) -> GatedFFN:
    found = ffn_of(mlp)
    assert found is not None
    return found


def taken(mlp: MLP, groups: mx.array, strategy: str, unpack: int = 0) -> FFN:
    """What the package does, with one of its strategies."""
    own, neurons = ffn(mlp).under(strategy, unpack), of_groups(groups)[None]
    return lambda x: own.sparse(x[None], neurons)[0]


def of_groups(groups: mx.array) -> mx.array:
    """Neurons of groups, (K,)."""
    return (groups[:, None] * GROUP + mx.arange(GROUP, dtype=mx.uint32)).reshape(-1)


def stacked(linear: Any) -> list[Any]:
    """Weight, scales and biases of a projection to neurons, (groups, 64, ...) each."""
    parts = [linear.weight, linear.get("scales"), linear.get("biases")]
    return [p.reshape(-1, GROUP, p.shape[-1]) for p in parts if p is not None]


def gathered(mlp: MLP, groups: mx.array) -> FFN:
    """Gate and up by gather_mm or gather_qmm; down by taken groups."""
    down = grouped_down(mlp.down_proj, groups)

    def project(linear: Any, x: mx.array) -> mx.array:
        if type(linear) is nn.Linear:
            (w,) = stacked(linear)
            y = mx.gather_mm(x[None], w.swapaxes(-1, -2), rhs_indices=groups)
        else:
            stack = stacked(linear)
            size: Any = {"group_size": linear.group_size, "bits": linear.bits}
            y = mx.gather_qmm(
                x[None], stack[0], stack[1], stack[2], rhs_indices=groups, **size
            )
        return y.swapaxes(0, 1).reshape(len(x), -1)

    return lambda x: down(swiglu(project(mlp.gate_proj, x), project(mlp.up_proj, x)))


def grouped(mlp: MLP, groups: mx.array) -> FFN:
    """Rows of gate and up taken; down by taken groups, packed as they are."""
    own, down = ffn(mlp), grouped_down(mlp.down_proj, groups)
    neurons = of_groups(groups)
    return lambda x: down(own.kept_activations(x, neurons))


def grouped_down(linear: Any, groups: mx.array) -> FFN:
    """Columns in whole groups: exact for packed weights whose groups have 64 columns."""

    def take(w: mx.array) -> mx.array:
        columns = w.reshape(w.shape[0], -1, w.shape[1] * GROUP // neurons)
        return mx.take(columns, groups, axis=1).reshape(w.shape[0], -1)

    if type(linear) is nn.Linear:
        neurons = linear.weight.shape[1]
        return lambda z: z @ take(linear.weight).T
    neurons = linear.scales.shape[1] * linear.group_size
    size: Any = {"group_size": linear.group_size, "bits": linear.bits}

    def down(z: mx.array) -> mx.array:
        parts: Any = [take(p) for p in (linear.weight, linear.scales, linear.biases)]
        return mx.quantized_matmul(z, *parts, **size)

    return down


def unpacked(mlp: MLP) -> FFN:
    """The dense FFN with its weights dequantised first, once for all tokens: float GEMMs."""
    own = ffn(mlp).under("chunk", unpack=1)
    return lambda x: own.activations_and_output(x[None])[1][0]


def masked(mlp: MLP, groups: mx.array) -> FFN:
    """All weights stay where they are: block_masked_mm skips tiles of 64, if the backend does."""
    f = mlp.gate_proj.weight.shape[0]
    kept = mx.zeros((f // GROUP,), dtype=mx.bool_)
    kept[groups] = True
    gate, up, down = (
        dequantized(m, mx.float32) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )

    def run(x: mx.array) -> mx.array:
        tiles = mx.broadcast_to(kept, (-(-len(x) // GROUP), f // GROUP))
        g, u = (mx.block_masked_mm(x, w.T, GROUP, mask_out=tiles) for w in (gate, up))
        return mx.block_masked_mm(swiglu(g, u), down.T, GROUP, mask_lhs=tiles)

    return run


def main(
    hidden: int = 2048,
    neurons: int = 8192,
    tokens: Annotated[str, typer.Option(help="Block sizes.")] = "128,512",
    bits: Annotated[int, typer.Option(help="Quantised weights; 0: float.")] = 0,
    dtype: str = "float32",
    num_trials: Annotated[int, typer.Option("--num-trials", "-n")] = 5,
) -> None:
    """Time every way on this device."""
    kind = getattr(mx, dtype)
    mlp = MLP(hidden, neurons)
    mlp.set_dtype(kind)
    if bits:
        nn.quantize(mlp, GROUP, bits)
    groups = mx.sort(mx.random.permutation(neurons // GROUP)[: neurons // GROUP // 2])
    groups = groups.astype(mx.uint32)
    mx.eval(mlp.parameters(), groups)
    ways: dict[str, FFN] = {"dense": mlp}
    for strategy in STRATEGIES:
        ways[f"take, {strategy}"] = taken(mlp, groups, strategy)
    if bits:
        ways["dense, dequantised"] = unpacked(mlp)
        for strategy in ("chunk", "columns"):
            ways[f"take, {strategy}, dequantised"] = taken(mlp, groups, strategy, 1)
    ways["take, down in packed groups"] = grouped(mlp, groups)
    ways["gather_qmm" if bits else "gather_mm"] = gathered(mlp, groups)
    if kind == mx.float32:  # a CPU's block_masked_mm knows no other
        ways["block_masked_mm"] = masked(mlp, groups)
    print(", ".join(f"{k} {v}" for k, v in describe().items()), f"{bits} bits, {dtype}")
    table = Table("tokens", "way", "ms", "of dense", "error")
    for n in map(int, tokens.split(",")):
        x = mx.random.normal((n, hidden)).astype(kind)
        times = interleaved({k: lambda way=way: way(x) for k, way in ways.items()}, num_trials)  # type: ignore
        plain = exact(mlp, x, of_groups(groups))
        for name, way in ways.items():
            wanted = mlp(x) if name.startswith("dense") else plain
            error = "" if name == "dense" else f"{difference(way(x), wanted):.0e}"
            share = times[name] / times["dense"]
            table.add_row(
                str(n), name, f"{times[name] * 1e3:.1f}", f"{share:.2f}", error
            )
    Console(width=100).print(table)


def exact(mlp: MLP, x: mx.array, neurons: mx.array) -> mx.array:
    """The dense FFN with all other activations zero."""
    kept = mx.zeros((mlp.gate_proj.weight.shape[0],), dtype=x.dtype)
    kept[neurons] = 1
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)) * kept)


if __name__ == "__main__":
    typer.run(main)
