"""PyTorch's predictors and compensators against ours, through a real conversion.

Random weights, float32 in PyTorch. What must agree: the scores, the neurons chosen by them (up to
ties that rounding decides), and what the compensator adds. Errors are relative to the largest
value of a block.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import models
import numpy as np
import pytest
import reference
import torch
import torch_modules
from mlx_lm.models.cache import make_prompt_cache

from mlx_fastforward.attachment import attach
from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import open_checkpoint
from mlx_fastforward.neurons.selectors import SelectorInputs, Trained, top_neurons
from mlx_fastforward.predictors.file import (
    BaseModel,
    PredictorFile,
    load_predictor,
    save_predictor,
)

FLOAT32, BFLOAT16 = 1e-5, 1e-2
ACTIVATIONS = list(torch_modules.ACTIVATIONS)


@dataclass(frozen=True)
class Size:
    """Ranks r and h per layer, so their number is the number of layers."""

    d: int
    f: int
    r: tuple[int, ...]
    h: tuple[int, ...]
    blocks: int
    tokens: int

    @property
    def layers(self) -> int:
        return len(self.r)


SIZES = {
    "small": Size(32, 128, (4, 4), (8, 8), blocks=3, tokens=16),
    "ranks differ": Size(64, 192, (9, 17, 40), (3, 64, 9), blocks=5, tokens=32),
    "square": Size(48, 96, (48, 96), (48, 48), blocks=1, tokens=8),
    "wide": Size(128, 1024, (64,), (128,), blocks=16, tokens=128),
    "single tokens": Size(40, 104, (8,), (8,), blocks=7, tokens=1),
}


def network(size: Size, activation: str = "relu") -> torch_modules.Network:
    torch.manual_seed(size.f + size.d)
    return torch_modules.Network(
        [
            torch_modules.Layer(
                torch_modules.Predictor(size.d, r, size.f),
                torch_modules.Compensator(size.d, h, activation),
            )
            for r, h in zip(size.r, size.h)
        ]
    )


def converted(
    trained: torch_modules.Network,
    base: BaseModel,
    folder: Path,
    dtype: str = "float32",
    bits: Optional[int] = None,
    activation: str = "relu",
) -> PredictorFile:
    """state_dict -> torch.save -> convert -> load."""
    torch.save(trained.state_dict(), folder / "c.pt")
    checkpoint = open_checkpoint(folder / "c.pt")
    plan = conversion.plan(checkpoint, base, [])
    steps = conversion.tensors(plan, conversion.DTYPES[dtype], bits)
    tensors = {k: v for _, made in steps for k, v in made.items()}
    info = conversion.information(plan, checkpoint, activation, bits)
    save_predictor(folder / "predictor", info, tensors)
    return load_predictor(folder / "predictor")


def adapter_of(size: Size, folder: Path, **more: Any) -> PredictorFile:
    base = BaseModel("random", "llama", size.layers, size.d, size.f, "0" * 16)
    return converted(
        network(size, more.get("activation", "relu")), base, folder, **more
    )


def inputs(size: Size, layer: int) -> torch.Tensor:
    """Blocks (M, N, d) whose mean is not zero, as after a norm with weights."""
    generator = torch.Generator().manual_seed(layer)
    shape = (size.blocks, size.tokens, size.d)
    return torch.randn(shape, generator=generator) + 0.3


def our_scores(predictor: PredictorFile, layer: int, x: torch.Tensor) -> mx.array:
    assert predictor.layers is not None
    blocks = mx.array(x.numpy())
    ffn: Any = None  # the trained selector looks at the blocks alone
    return Trained(predictor.layers)(layer, ffn, SelectorInputs(blocks, blocks, blocks))


def error(got: mx.array, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value, of the worst block."""
    ours, theirs = float64(got), expected.detach().double().numpy()
    assert ours.shape == theirs.shape
    axes = tuple(range(1, ours.ndim))
    return float((np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)).max())


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def chosen(scores: mx.array, keep: int) -> list[set[int]]:
    return [set(row) for row in top_neurons(scores, keep).tolist()]


def chosen_by_torch(scores: torch.Tensor, keep: int) -> list[set[int]]:
    return [set(row) for row in torch.topk(scores, keep).indices.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_scores(name: str, tmp_path: Path) -> None:
    size, trained = SIZES[name], network(SIZES[name])
    predictor = adapter_of(size, tmp_path)
    errors = [
        error(our_scores(predictor, i, x), trained.layers[i].predictor(x))
        for i in range(size.layers)
        for x in [inputs(size, i)]
    ]
    print(f"{name}: {max(errors):.1e}")
    assert max(errors) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", SIZES)
def test_chosen_neurons(name: str, share: float, tmp_path: Path) -> None:
    """The same sets; where not, the score of a neuron that differs is the K-th but for rounding."""
    size, trained = SIZES[name], network(SIZES[name])
    predictor = adapter_of(size, tmp_path)
    keep, differing, picked = int(share * size.f), 0, 0
    for i in range(size.layers):
        x = inputs(size, i)
        theirs = trained.layers[i].predictor(x)
        pairs = zip(chosen(our_scores(predictor, i, x), keep), theirs)
        for ours, scores in pairs:
            (reference_set,) = chosen_by_torch(scores[None], keep)
            kth = scores[list(reference_set)].min()
            near = FLOAT32 * scores.abs().max()
            odd = ours ^ reference_set
            assert all(abs(scores[j] - kth) <= near for j in odd)
            differing, picked = differing + len(odd), picked + keep
    print(f"{name}, {share:.0%}: {differing} of {picked} neurons differ")
    assert differing <= 2 + picked // 1000


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_compensator(name: str, activation: str, tmp_path: Path) -> None:
    size, trained = SIZES[name], network(SIZES[name], activation)
    compensator = adapter_of(size, tmp_path, activation=activation).compensator
    assert compensator is not None
    errors = [
        error(
            compensator(i, mx.array(x.numpy())),
            trained.layers[i].compensator(x),
        )
        for i in range(size.layers)
        for x in [inputs(size, i)]
    ]
    print(f"{name}, {activation}: {max(errors):.1e}")
    assert max(errors) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """The same inputs, as a model in bfloat16 has them; PyTorch stays in float32."""
    size, trained = SIZES[name], network(SIZES[name])
    predictor = adapter_of(size, tmp_path, dtype="bfloat16")
    assert predictor.compensator is not None
    for i in range(size.layers):
        x, layer = inputs(size, i).bfloat16().float(), trained.layers[i]
        low = mx.array(x.numpy()).astype(mx.bfloat16)
        scores = error(our_scores(predictor, i, x), layer.predictor(x))
        added = error(predictor.compensator(i, low), layer.compensator(x))
        print(f"{name}: scores {scores:.1e}, compensator {added:.1e}")
        assert max(scores, added) < BFLOAT16


# Share of the neurons chosen without quantisation that are still chosen, K = f / 2.
# Found 0.997 to 0.999 and 0.977 to 0.98.
RECALL = {8: 0.99, 4: 0.95}


@torch.no_grad()
@pytest.mark.parametrize("bits", RECALL)
@pytest.mark.parametrize("name", ["small", "ranks differ", "wide"])
def test_recall_of_quantised_predictors(name: str, bits: int, tmp_path: Path) -> None:
    size, trained = SIZES[name], network(SIZES[name])
    predictor = adapter_of(size, tmp_path, bits=bits)
    recalls = []
    for i in range(size.layers):
        x, keep = inputs(size, i), size.f // 2
        ours = chosen(our_scores(predictor, i, x), keep)
        exact = chosen_by_torch(trained.layers[i].predictor(x), keep)
        recalls += [len(a & b) / keep for a, b in zip(ours, exact)]
    print(f"{name}, {bits} bits: mean {np.mean(recalls):.4f}, min {min(recalls):.4f}")
    assert np.mean(recalls) >= RECALL[bits]


# The engine: a layer's whole sparse FFN


LAYER = 1


def ffn_in_float64(
    mlp: Any, layer: torch_modules.Layer, x: np.ndarray, plan: Any, keep: int
) -> np.ndarray:
    """Head and tail dense; blocks with their K neurons, and what the compensator adds."""
    w = [float64(getattr(mlp, f"{n}_proj").weight) for n in ("gate", "up", "down")]
    y = reference.gated_ffn(x, *w)
    for start in range(plan.start, plan.stop, plan.block_size):
        rows = slice(start, start + plan.block_size)
        block = torch.tensor(x[rows])
        neurons = chosen_by_torch(layer.predictor(block)[None], keep)[0]
        y[rows] = reference.gated_ffn(x[rows], *w, neurons=sorted(neurons))
        y[rows] += layer.compensator(block).numpy()
    return y


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sparse_ffn_with_compensator(activation: str, tmp_path: Path) -> None:
    model = models.tiny("llama")
    layers = models.LAYERS
    size = Size(models.HIDDEN, models.FFN, (8,) * layers, (6,) * layers, 0, 0)
    trained = network(size, activation)
    base = BaseModel.of(model)
    predictor = converted(trained, base, tmp_path, activation=activation)
    engine = attach(model, models.settings(), predictor=predictor)
    x = mx.random.normal((1, 7 * models.BLOCK + 3, size.d), key=mx.random.key(0))
    cache = make_prompt_cache(model)
    engine.call = engine.begin(1, x.shape[1], cache, training=False)
    assert engine.call is not None and engine.keep[LAYER] == size.f // 2
    plan = engine.call.plan
    assert (plan.head, plan.blocks, plan.tail) == (8, 5, 11)
    mlp = model.layers[LAYER].mlp
    got = float64(mlp(x)[0])
    engine.call = None
    layer = trained.double().layers[LAYER]
    exact = ffn_in_float64(mlp, layer, float64(x[0]), plan, size.f // 2)
    assert models.distance(got, exact) < FLOAT32
    dense = float64(mlp(x)[0])  # and none of this is the dense layer
    sparse = slice(plan.start, plan.stop)
    assert models.distance(got[sparse], dense[sparse]) > 0.1
    for rows in (slice(0, plan.start), slice(plan.stop, None)):
        assert models.distance(got[rows], dense[rows]) < FLOAT32
