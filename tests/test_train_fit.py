"""Fitting predictors and compensators: against NumPy and PyTorch, and stopped at any step."""

import math
from pathlib import Path
from typing import Any, Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
import torch
from mlx.utils import tree_flatten
from reference import float64

from mlx_fastforward.errors import PredictorError
from mlx_fastforward.model.ffn import GatedFFN
from mlx_fastforward.neurons.compensators import (
    Compensator,
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)
from mlx_fastforward.train import descent, low_rank, mlp
from mlx_fastforward.train.capture import ffns_of
from mlx_fastforward.train.descent import Descent
from mlx_fastforward.train.low_rank import fit_low_rank
from mlx_fastforward.train.mlp import fit_mlp
from mlx_fastforward.train.predictor import KINDS, RATE, labels, loss, weights_of
from mlx_fastforward.train.reconstruction import dropped, error_left, marked

BLOCK, D, F = models.BLOCK, models.HIDDEN, models.FFN
LAYERS, RANK, BLOCKS = 2, 5, 6


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def labels_by_hand(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.2: the best half is positive; its fifths weigh 32, 16, 8, 4 and 2. norms: (f,)."""
    best = np.argsort(-norms, kind="stable")[: len(norms) // 2]
    positive, weights = np.zeros(len(norms)), np.ones(len(norms))
    positive[best] = 1
    for fifth, weight in zip(np.split(best, 5), (32, 16, 8, 4, 2)):
        weights[fifth] = weight
    return positive, weights


@pytest.mark.parametrize("f", [10, 640, 64, 1111, 14336])
def test_labels(f: int) -> None:
    """Also of numbers of neurons that no fifth divides."""
    norms = np.random.default_rng(f).permutation(2 * f).reshape(2, f)
    found = [a[0] for a in labels(mx.array(norms[None].astype(np.float32)), [f])]
    for row, positive, weights in zip(norms, *map(np.array, found)):
        if f % 10 == 0:
            wanted = labels_by_hand(row)
            assert np.array_equal(positive, wanted[0])
            assert np.array_equal(weights, wanted[1])
        assert positive.sum() == f // 2 and (weights[positive == 0] == 1).all()
        order = weights[np.argsort(-row)][: f // 2]
        assert (np.diff(order) <= 0).all() and set(order) == {32, 16, 8, 4, 2}
        counts = [(order == w).sum() for w in (32, 16, 8, 4, 2)]
        assert max(counts) - min(counts) < 6


def network(kind: str, seed: int = 0, widths: Sequence[int] = [F] * LAYERS) -> Any:
    """With weights that all matter, unlike those at the start."""
    net = KINDS[kind](D, RANK, widths)
    parts = tree_flatten(net.parameters())
    arrays = randoms(seed, *(w.shape for _, w in parts))
    net.update({name: mx.array(w) for (name, _), w in zip(parts, arrays)})
    return net


def scores_by_hand(net: nn.Module, layer: int, block: np.ndarray) -> np.ndarray:
    """One block's scores, in float64, by the method's equations."""
    w = {name: float64(value[layer]) for name, value in net.parameters().items()}
    block = block.astype(np.float64)
    if "query" in w:
        return reference.predictor(block, w["query"], w["w1"], w["w2"])
    return reference.token_wise(block, w["w1"], w["w2"], w["bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_networks_score_by_the_equations_and_selectors_as_they_do(kind: str) -> None:
    net = network(kind)
    (x,) = randoms(1, (LAYERS, BLOCKS, BLOCK, D))
    got = np.array(net(mx.array(x)))
    assert got.shape == (LAYERS, BLOCKS, F) and np.abs(got).max() > 3
    for layer in range(LAYERS):
        wanted = np.stack([scores_by_hand(net, layer, block) for block in x[layer]])
        assert np.allclose(got[layer], wanted, rtol=1e-4, atol=1e-4)
        selected = np.array(weights_of(net, layer)(mx.array(x[layer])))
        assert models.distance(selected, got[layer]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [40, 20])
def test_loss_is_pytorchs(kind: str, first: int) -> None:
    """Over the neurons that each layer has; what stands in the padding does not matter."""
    widths = [first, *[40] * (LAYERS - 1)]
    net = network(kind, widths=widths)
    x, norms = randoms(1, (LAYERS, BLOCKS, BLOCK, D), (LAYERS, BLOCKS, 40))
    parts: list[list[np.ndarray]] = [[], [], []]
    for l, b in np.ndindex(LAYERS, BLOCKS):
        scores = scores_by_hand(net, l, x[l, b])[: widths[l]]
        for part, values in zip(
            parts, (scores, *labels_by_hand(norms[l, b, : widths[l]]))
        ):
            part.append(values)
    scores, positive, weights = (torch.tensor(np.concatenate(part)) for part in parts)
    wanted = float(torch.nn.BCEWithLogitsLoss(weight=weights)(scores, positive))
    got = float(loss(net, mx.array(x), mx.array(norms)))
    assert got == pytest.approx(wanted, rel=1e-5)


class Stop(BaseException):
    """What ends a process."""


def problem(step: int) -> tuple[mx.array, ...]:
    """Blocks of one step, and how much their neurons fire."""
    x, norms = randoms(step, (LAYERS, 4, BLOCK, D), (LAYERS, 4, F))
    return mx.array(x), mx.array(norms)


def stop_at(step: int) -> Callable[[Descent, str], None]:
    def tick(run: Descent, details: str) -> None:
        if run.step == step:
            raise Stop

    return tick


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(tree_flatten(a.parameters()), tree_flatten(b.parameters()))
    return all(n == m and mx.array_equal(v, w).item() for (n, v), (m, w) in pairs)


def begun(kind: str, file: Path, seed: int = 0, steps: int = 12) -> Descent:
    """As a process of its own begins or resumes it."""
    return Descent(network(kind, seed), loss, steps, RATE, file)


@pytest.mark.parametrize(
    "kind, stops, interval",
    [
        ("pooled", [3, 4, 11], -1.0),
        ("token-wise", [1, 12], -1.0),
        ("pooled", [5], descent.INTERVAL),
    ],
)
def test_a_descent_goes_on_where_it_was_saved(
    kind: str,
    stops: list[int],
    interval: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit by bit, whatever the new process begins with; a finished one makes no step."""
    file, saved = tmp_path / "b.safetensors", interval < 0
    whole = begun(kind, tmp_path / "a.safetensors")
    whole(problem, stop_at(-1))
    monkeypatch.setattr(descent, "INTERVAL", interval)
    for seed, stop in enumerate(stops):
        with pytest.raises(Stop):
            begun(kind, file, seed * saved)(problem, stop_at(stop))
        assert file.exists() == saved  # unsaved steps are repeated
    for first in (stops[-1] * saved, 12):
        last = begun(kind, file, 9 * (first > 0), steps=999 if first else 12)
        assert (last.step, last.steps) == (first, 12)
        last(problem, stop_at(first))
        assert same(whole.net, last.net) and last.step == 12
        assert last.curve == whole.curve and len(last.curve) == 12
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(PredictorError, match="is damaged; start anew with --restart"):
        begun(kind, file)


def test_rates_rise_and_fall_and_gradients_are_clipped(tmp_path: Path) -> None:
    """Adam's first moment is a tenth of the first gradient."""

    def steep(net: nn.Module, x: mx.array) -> mx.array:
        return 1e4 * mx.sum(net.w1) + 1e3 * mx.sum(net.w2)

    run = Descent(network("pooled"), steep, 40, 0.5, tmp_path / "net.safetensors")
    rates = []
    for _ in range(40):
        run.once(mx.array(0))
        rates.append(float(run.adam.learning_rate))
        if run.step == 1:
            moments = [run.adam.state[name]["m"] for name in ("w1", "w2")]
            norm = math.sqrt(sum(float(mx.sum(mx.square(m))) for m in moments))
            assert norm == pytest.approx(0.1, rel=1e-3)
    turn = [(s - 2) / 38 for s in range(2, 40)]
    falling = [0.5 * 0.5 * (1 + math.cos(math.pi * t)) for t in turn]
    assert np.allclose(rates, [0.25, 0.5, *falling], atol=1e-6)


def test_the_gauge_is_kept_with_the_loss(tmp_path: Path) -> None:
    """Two hundred times at most, and at the last step."""

    def small(net: nn.Module, x: mx.array) -> mx.array:
        return mx.sum(net.query)

    run = Descent(network("pooled"), small, 450, 0.0, tmp_path / "net.safetensors")
    run(lambda step: (mx.array(0),), stop_at(-1), lambda: run.step / 4)
    assert [step for step, _, _ in run.curve] == list(range(2, 451, 2))
    assert all(gauge == step / 4 for step, _, gauge in run.curve)


Pairs = list[tuple[mx.array, mx.array]]


@pytest.fixture(scope="module")
def ffn() -> GatedFFN:
    return ffns_of(models.tiny("llama"))[1]


def matrices(ffn: GatedFFN) -> list[np.ndarray]:
    names = ("gate_proj", "up_proj", "down_proj")
    return [reference.weight(ffn.mlp[n]) for n in names]


def masked_blocks(n: int) -> Pairs:
    """Four sequences of random blocks of which some neurons are kept: nine always, nine rarely."""
    found = []
    for i in range(4):
        rng = np.random.default_rng([0, i])
        x = rng.normal(size=(n, BLOCK, D)).astype(np.float32) + 0.3
        kept = (rng.uniform(size=(n, F)) > 0.5).astype(np.float32)
        kept[:, :18] = 1
        kept[0, 9:18] = i > 0
        found.append((mx.array(x), mx.array(kept)))
    return found


def lost_by_hand(ffn: GatedFFN, pair: tuple[mx.array, mx.array]) -> list[np.ndarray]:
    """Activations of the dropped neurons, block by block."""
    gate, up, _ = matrices(ffn)
    rows = zip(*map(float64, pair))
    return [reference.activations(x, gate, up) * (kept == 0) for x, kept in rows]


def test_marked_and_dropped(ffn: GatedFFN) -> None:
    scores = np.random.default_rng(0).permutation(60).reshape(3, 20)
    got = np.array(marked(mx.array(scores.astype(np.float32)), 7))
    for row, mark in zip(scores, got):
        assert np.flatnonzero(mark).tolist() == reference.top_k(row, 7)
        assert set(mark) == {0, 1}
    pair = masked_blocks(3)[0]
    wanted = np.stack(lost_by_hand(ffn, pair))
    assert models.distance(np.array(dropped(ffn, *pair)), wanted) < 1e-5


def compensators() -> dict[str, Compensator]:
    rank = 3
    shapes = [(D,), (D, rank), (F, rank + 1)]
    low = LowRankWeights(*map(mx.array, randoms(1, *shapes)))
    w1, w2 = map(mx.array, randoms(2, (D, rank), (rank, D)))
    return {
        "low-rank": LowRankCompensator([low, low]),
        "mlp": MLPCompensator([MLPWeights(w1, w2)] * 2, "silu"),
        "nothing": MLPCompensator([MLPWeights(w1, 0 * w2)] * 2),
    }


def given_back(
    compensator: Any, block: np.ndarray, kept: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """What a compensator adds for the dropped neurons of one block, by hand."""
    w = {k: float64(v) for k, v in vars(compensator.layers[1]).items()}
    if "u" not in w:
        return reference.compensator(block, w["w1"], w["w2"], reference.silu)
    phi = reference.features(block, w["center"], w["v"])
    return (phi @ w["u"].T * (1 - kept)) @ down.T


@pytest.mark.parametrize("kind", compensators())
def test_the_error_that_is_left(kind: str, ffn: GatedFFN) -> None:
    down = matrices(ffn)[2]
    compensator, blocks = compensators()[kind], masked_blocks(2)
    before = after = 0.0
    for pair in blocks:
        for x, kept, z in zip(*map(float64, pair), lost_by_hand(ffn, pair)):
            left = z @ down.T - given_back(compensator, x, kept, down)
            before, after = before + ((z @ down.T) ** 2).sum(), after + (left**2).sum()
    got = error_left(ffn, compensator, 1, blocks)
    assert got == pytest.approx(after / before, rel=1e-4) and got > 0.1
    assert (got == 1) == (kind == "nothing")


def least_squares(ffn: GatedFFN, w: LowRankWeights, blocks: Pairs) -> np.ndarray:
    """Neuron by neuron over the tokens of blocks that drop it, and four blocks' worth of zeros."""
    gate, up, _ = matrices(ffn)
    x = np.concatenate([float64(x) for x, _ in blocks])
    kept = np.concatenate([np.array(kept) for _, kept in blocks])
    center, v = float64(w.center), float64(w.v)
    phi = np.stack([reference.features(block, center, v) for block in x])
    z = np.stack([reference.activations(block, gate, up) for block in x])
    k = phi.shape[-1]
    shrink = math.sqrt(4 / len(x)) * phi.reshape(-1, k)
    found = []
    for j in range(F):
        rows, values = phi[kept[:, j] == 0], z[kept[:, j] == 0][..., j]
        a = np.concatenate([rows.reshape(-1, k), shrink])
        b = np.concatenate([values.reshape(-1), np.zeros(len(shrink))])
        found.append(np.linalg.lstsq(a, b)[0])
    return np.stack(found)


@pytest.mark.parametrize("rank, at_once", [(1, 7), (6, 1024)])
def test_the_fit_is_least_squares(
    rank: int, at_once: int, ffn: GatedFFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neurons are dropped; of neurons that never are nothing is said."""
    monkeypatch.setattr(low_rank, "SOLVED_AT_ONCE", at_once)
    blocks = masked_blocks(20)
    w = fit_low_rank(ffn, lambda: blocks, rank)
    shapes = [a.shape for a in (w.center, w.v, w.u)]
    assert shapes == [(D,), (D, rank), (F, rank + 1)]
    wanted = least_squares(ffn, w, blocks)
    assert models.distance(np.array(w.u), wanted) < 1e-3
    assert models.distance(np.array(w.u[9:18]), wanted[9:18]) < 1e-3
    assert mx.array_equal(w.u[:9], mx.zeros((9, rank + 1)))
    assert float(mx.min(mx.abs(w.u[9:]))) > 0


def test_the_directions_are_the_best_of_so_many(ffn: GatedFFN) -> None:
    """No rank-3 map of x leaves less of the lost output: from the singular values of the full fit."""
    blocks = masked_blocks(20)
    w = fit_low_rank(ffn, lambda: blocks, 3)
    x = np.concatenate([float64(x) for x, _ in blocks]).reshape(-1, D)
    e = np.concatenate([z for pair in blocks for z in lost_by_hand(ffn, pair)])
    e = e @ matrices(ffn)[2].T
    assert np.allclose(float64(w.center), x.mean(axis=0), atol=1e-5)
    x, e = x - x.mean(axis=0), e - e.mean(axis=0)
    fitted = x @ np.linalg.lstsq(x, e)[0]
    best = (np.linalg.svd(fitted, compute_uv=False)[:3] ** 2).sum()
    h = x @ float64(w.v)
    got = ((h @ np.linalg.lstsq(h, e)[0]) ** 2).sum()
    assert 0.999 * best < got <= 1.00001 * best


class Toy:
    """An FFN whose last four neurons are a small MLP of x; the other eight are large."""

    shape = (D, 12)

    def __init__(self) -> None:
        self.w, self.down = map(mx.array, randoms(8, (D, 4), (D, 12)))

    def activations(self, x: mx.array) -> mx.array:
        tiled = mx.concatenate([x @ self.w / math.sqrt(D)] * 3, axis=-1)
        return nn.silu(tiled) + mx.where(mx.arange(12) >= 8, 0.0, 9.0)

    def down_matrix(self) -> mx.array:
        return self.down


def ranked(x: mx.array) -> mx.array:
    """Scores that call the last four neurons the worst."""
    return mx.broadcast_to(-mx.arange(12).astype(mx.float32), (len(x), 12))


def batch(step: int) -> tuple[mx.array, mx.array]:
    """x, and norms that agree."""
    (x,) = randoms(step, (8, BLOCK, D))
    return mx.array(x), ranked(x)


def fitted(file: Path, steps: int = 160, **more: Any) -> Any:
    """(weights, descent) of a fit."""
    runs: list[Descent] = []
    asked = {"tick": lambda run, details: runs.append(run), "scores": ranked, **more}
    asked = {"keep": lambda step: 8, **asked}
    toy: Any = Toy()
    made = fit_mlp(toy, batch=batch, settings=(16, steps, 3), file=file, **asked)
    return made, runs[-1]


def test_an_mlp_learns_what_is_lost(tmp_path: Path) -> None:
    weights, run = fitted(tmp_path / "mlp.safetensors")
    steps, losses, _ = zip(*run.curve)
    assert losses[0] == 1.0 and losses[-1] < 0.1
    assert weights.w1.shape == (D, 16) and weights.w2.shape == (16, D)
    x, toy = batch(999)[0], Toy()  # type: Any, Any
    compensator = MLPCompensator([weights], mlp.ACTIVATION)
    left = error_left(toy, compensator, 0, [(x, marked(ranked(x), 8))])
    assert left == pytest.approx(losses[-1], abs=0.05)


def test_the_second_half_of_the_steps_drops_what_the_predictor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half drops the truly worst neurons; each step as many as it is told."""
    seen: list[list[float]] = []

    def watched(ffn: Any, x: mx.array, kept: mx.array) -> mx.array:
        seen.append(kept[0].tolist())
        return dropped(ffn, x, kept)

    monkeypatch.setattr(mlp, "dropped", watched)
    keep = [8, 3, 4, 8, 3, 4]
    more = {"keep": lambda step: keep[step], "scores": lambda x: -ranked(x)}
    fitted(tmp_path / "mlp.safetensors", 6, **more)
    truly = [[1.0] * k + [0.0] * (12 - k) for k in keep]
    assert seen == [*truly[:3], *(row[::-1] for row in truly[3:])]
