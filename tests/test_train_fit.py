"""Fitting predictors and compensators: against NumPy and PyTorch, and stopped at any step."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
import torch
from mlx.utils import tree_flatten

from mlx_fastforward.files import replace
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
from mlx_fastforward.train.low_rank import Directions, fit_low_rank, solve
from mlx_fastforward.train.mlp import fit_mlp
from mlx_fastforward.train.predictor import KINDS, RATE, labels, loss, weights_of
from mlx_fastforward.train.reconstruction import dropped, error_left, marked

BLOCK, D, F = models.BLOCK, models.HIDDEN, models.FFN
LAYERS, RANK, BLOCKS = 2, 5, 6


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def float64(x: mx.array) -> np.ndarray:
    return np.array(x).astype(np.float64)


# Labels and loss


def labels_by_hand(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.2: the best half is positive; its fifths weigh 32, 16, 8, 4 and 2. norms: (f,)."""
    best = np.argsort(-norms, kind="stable")[: len(norms) // 2]
    positive, weights = np.zeros(len(norms)), np.ones(len(norms))
    positive[best] = 1
    for fifth, weight in zip(np.split(best, 5), (32, 16, 8, 4, 2)):
        weights[fifth] = weight
    return positive, weights


@pytest.mark.parametrize("f", [10, 40, 640])
def test_labels(f: int) -> None:
    norms = np.random.default_rng(f).permutation(3 * 4 * f).reshape(3, 4, f)
    positive, weights = labels(mx.array(norms.astype(np.float32)))
    for row in np.ndindex(3, 4):
        wanted = labels_by_hand(norms[row])
        assert np.array_equal(np.array(positive[row]), wanted[0])
        assert np.array_equal(np.array(weights[row]), wanted[1])


@pytest.mark.parametrize("f", [64, 128, 1111, 14336])
def test_labels_of_neurons_that_no_fifth_divides(f: int) -> None:
    norms = np.random.default_rng(f).permutation(f).astype(np.float32)
    positive, weights = (np.array(a)[0] for a in labels(mx.array(norms)[None]))
    assert positive.sum() == f // 2 and weights[positive == 0].tolist() == [1] * (
        f - f // 2
    )
    order = weights[np.argsort(-norms)][: f // 2]
    assert (np.diff(order) <= 0).all() and set(order) == {32, 16, 8, 4, 2}
    counts = [(order == w).sum() for w in (32, 16, 8, 4, 2)]
    assert max(counts) - min(counts) < 6


def network(kind: str, seed: int = 0, f: int = F, layers: int = LAYERS) -> nn.Module:
    """With weights that all matter, unlike those at the start."""
    net: nn.Module = KINDS[kind](layers, D, RANK, f)
    parts = tree_flatten(net.parameters())
    arrays = randoms(seed, *(w.shape for _, w in parts))
    net.update({name: mx.array(w) for (name, _), w in zip(parts, arrays)})
    return net


def scores_by_hand(net: nn.Module, layer: int, block: np.ndarray) -> np.ndarray:
    """One block's scores, in float64, by the method's equations."""
    w = {name: float64(value[layer]) for name, value in net.items()}
    block = block.astype(np.float64)
    if "query" in w:
        return reference.predictor(block, w["query"], w["w1"], w["w2"])
    return reference.token_wise(block, w["w1"], w["w2"], w["bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_networks_score_by_the_equations(kind: str) -> None:
    net = network(kind)
    (x,) = randoms(1, (LAYERS, BLOCKS, BLOCK, D))
    got = np.array(net(mx.array(x)))
    assert got.shape == (LAYERS, BLOCKS, F)
    for layer, block in np.ndindex(LAYERS, BLOCKS):
        wanted = scores_by_hand(net, layer, x[layer, block])
        assert np.allclose(got[layer, block], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got).max() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_selectors_score_as_the_networks_do(kind: str) -> None:
    net = network(kind)
    x = mx.array(randoms(1, (LAYERS, BLOCKS, BLOCK, D))[0])
    wanted = np.array(net(x))
    for layer in range(LAYERS):
        got = np.array(weights_of(net, layer)(x[layer]))
        assert models.distance(got, wanted[layer]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_pytorchs(kind: str) -> None:
    net = network(kind, f=40)
    x, norms = randoms(1, (LAYERS, BLOCKS, BLOCK, D), (LAYERS, BLOCKS, 40))
    rows = list(np.ndindex(LAYERS, BLOCKS))
    scores = np.stack([scores_by_hand(net, l, x[l, b]) for l, b in rows])
    hands = [labels_by_hand(norms[row]) for row in rows]
    positive, weights = (torch.tensor(np.stack(a)) for a in zip(*hands))
    bce = torch.nn.BCEWithLogitsLoss(weight=weights)
    wanted = float(bce(torch.tensor(scores), positive))
    got = float(loss(net, mx.array(x), mx.array(norms)))
    assert got == pytest.approx(wanted, rel=1e-5)


# Descent


class Stop(BaseException):
    """What ends a process."""


def problem(step: int, f: int = F) -> tuple[mx.array, mx.array]:
    """Neurons that fire with one of four directions, of which each block has one."""
    rng = np.random.default_rng(step)
    directions, owner = randoms(99, (4, D))[0], np.arange(f) % 4
    which = rng.integers(4, size=(LAYERS, 16))
    noise = rng.normal(size=(LAYERS, 16, BLOCK, D))
    x = 2 * directions[which][:, :, None] + noise
    norms = (owner == which[..., None]) + rng.uniform(size=(LAYERS, 16, f))
    return mx.array(x.astype(np.float32)), mx.array(norms.astype(np.float32))


def nothing(*args: Any) -> None:
    pass


def stop_at(step: int) -> Callable[[Descent, str], None]:
    def tick(run: Descent, details: str) -> None:
        if run.step == step:
            raise Stop

    return tick


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(tree_flatten(a.parameters()), tree_flatten(b.parameters()))
    return all(n == m and mx.array_equal(v, w).item() for (n, v), (m, w) in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind: str, tmp_path: Path) -> None:
    mx.random.seed(0)
    net = KINDS[kind](LAYERS, D, 8, F)
    run = Descent(net, loss, 120, RATE, tmp_path / "net.safetensors")
    run(problem, nothing)
    losses = [value for _, value, _ in run.curve]
    assert losses[-1] < 0.75 * losses[0]
    x, norms = problem(1000)
    best, found = (
        np.argsort(-np.array(a), axis=-1)[..., : F // 4] for a in (norms, net(x))
    )
    hits = [
        len({*a} & {*b}) for a, b in zip(best.reshape(-1, 32), found.reshape(-1, 32))
    ]
    assert np.mean(hits) > 0.95 * F // 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [[1], [7], [3, 4, 11], [12]])
def test_a_descent_goes_on_where_it_was_saved(
    kind: str, stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, whatever the new process begins with."""
    steps = 12
    whole = Descent(network(kind), loss, steps, RATE, tmp_path / "a.safetensors")
    whole(problem, nothing)
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    file = tmp_path / "b.safetensors"
    for seed, stop in enumerate(stops):
        net = network(kind, seed)
        with pytest.raises(Stop):
            Descent(net, loss, steps, RATE, file)(problem, stop_at(stop))
    last = Descent(network(kind, 9), loss, 999, 1.0 * RATE, file)
    assert (last.step, last.steps) == (stops[-1], steps)
    last(problem, nothing)
    assert same(whole.net, last.net) and last.step == steps
    assert last.curve == whole.curve and len(last.curve) == steps


def test_unsaved_steps_are_repeated(tmp_path: Path) -> None:
    """A descent is not saved at every step."""
    file = tmp_path / "net.safetensors"
    whole = Descent(network("pooled"), loss, 6, RATE, tmp_path / "a.safetensors")
    whole(problem, nothing)
    with pytest.raises(Stop):
        Descent(network("pooled"), loss, 6, RATE, file)(problem, stop_at(5))
    assert not file.exists()
    again = Descent(network("pooled"), loss, 6, RATE, file)
    again(problem, nothing)
    assert again.curve == whole.curve and same(whole.net, again.net)


def test_a_finished_descent_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    first = Descent(network("pooled"), loss, 3, RATE, file)
    first(problem, nothing)
    again = Descent(network("pooled", 5), loss, 3, RATE, file)
    again(problem, stop_at(3))  # no step, no tick
    assert same(first.net, again.net) and again.curve == first.curve


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    net = network("pooled")
    run = Descent(net, loss, 40, 0.5, tmp_path / "net.safetensors")
    rates = []
    for step in range(40):
        run.once(*problem(step))
        rates.append(float(run.adam.learning_rate))
    turn = [(s - 2) / 38 for s in range(2, 40)]
    falling = [0.5 * 0.5 * (1 + math.cos(math.pi * t)) for t in turn]
    assert np.allclose(rates, [0.25, 0.5, *falling], atol=1e-6)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Adam's first moment is a tenth of the first gradient."""

    def steep(net: nn.Module, x: mx.array) -> mx.array:
        return 1e4 * mx.sum(net.w1) + 1e3 * mx.sum(net.w2)

    run = Descent(network("pooled"), steep, 3, RATE, tmp_path / "net.safetensors")
    run.once(mx.array(0))
    moments = [run.adam.state[name]["m"] for name in ("w1", "w2")]
    norm = math.sqrt(sum(float(mx.sum(mx.square(m))) for m in moments))
    assert norm == pytest.approx(0.1, rel=1e-3)


def test_the_gauge_is_kept_with_the_loss(tmp_path: Path) -> None:
    """Two hundred times at most, and at the last step."""
    run = Descent(network("pooled"), small, 450, 0.0, tmp_path / "net.safetensors")
    run(lambda step: (mx.array(0),), nothing, lambda: run.step / 4)
    assert [step for step, _, _ in run.curve] == list(range(2, 451, 2))
    assert all(gauge == step / 4 for step, _, gauge in run.curve)


def small(net: nn.Module, x: mx.array) -> mx.array:
    return mx.sum(net.query)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    replace(file, lambda half: half.write_text("old"))

    def fails(half: Path) -> None:
        half.write_text("ne")
        raise Stop

    with pytest.raises(Stop):
        replace(file, fails)
    assert file.read_text() == "old"
    replace(file, lambda half: half.write_text("new"))
    assert [p.name for p in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "new"


# What is lost


Pairs = list[tuple[mx.array, mx.array]]


@pytest.fixture(scope="module")
def ffn() -> GatedFFN:
    return ffns_of(models.tiny("llama"))[1]


def matrices(ffn: GatedFFN) -> list[np.ndarray]:
    mlp = ffn.mlp
    names = ("gate_proj", "up_proj", "down_proj")
    return [models.float_weight(mlp[n]) for n in names]


def masked_blocks(n: int, seed: int = 0, share: float = 0.5) -> Pairs:
    """Four sequences of random blocks of which some neurons are kept."""
    found = []
    for i in range(4):
        rng = np.random.default_rng([seed, i])
        x = rng.normal(size=(n, BLOCK, D)).astype(np.float32) + 0.3
        kept = (rng.uniform(size=(n, F)) > share).astype(np.float32)
        found.append((mx.array(x), mx.array(kept)))
    return found


def test_marked() -> None:
    scores = np.random.default_rng(0).permutation(60).reshape(3, 20)
    got = np.array(marked(mx.array(scores.astype(np.float32)), 7))
    for row, mark in zip(scores, got):
        assert np.flatnonzero(mark).tolist() == reference.top_k(row, 7)
        assert set(mark) == {0, 1}


def test_dropped_activations(ffn: GatedFFN) -> None:
    gate, up, _ = matrices(ffn)
    (x, kept), *_ = masked_blocks(3)
    got = np.array(dropped(ffn, x, kept))
    for block, mark, z in zip(float64(x), np.array(kept), got):
        wanted = reference.activations(block, gate, up) * (mark == 0)
        assert models.distance(z, wanted) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_the_down_projection_of_a_quantised_layer(bits: int) -> None:
    model = models.tiny("llama")
    nn.quantize(model, 32, bits)
    ffn = ffns_of(model)[0]
    got = ffn.down_matrix()
    assert got.dtype == mx.float32 and got.shape == (D, F)
    assert models.distance(np.array(got), matrices(ffn)[2]) < 1e-6


def compensators() -> dict[str, Compensator]:
    rank = 3
    shapes = [(D,), (D, rank), (F, rank + 1)]
    low = LowRankWeights(*map(mx.array, randoms(1, *shapes)))
    w1, w2 = map(mx.array, randoms(2, (D, rank), (rank, D)))
    return {
        "low-rank": LowRankCompensator([low, low]),
        "mlp": MLPCompensator([MLPWeights(w1, w2)] * 2, "silu"),
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


@pytest.mark.parametrize("kind", ["low-rank", "mlp"])
def test_the_error_that_is_left(kind: str, ffn: GatedFFN) -> None:
    gate, up, down = matrices(ffn)
    compensator, blocks = compensators()[kind], masked_blocks(2)
    before = after = 0.0
    for x, kept in blocks:
        for block, mark in zip(float64(x), float64(kept)):
            lost = (reference.activations(block, gate, up) * (1 - mark)) @ down.T
            left = lost - given_back(compensator, block, mark, down)
            before, after = before + (lost**2).sum(), after + (left**2).sum()
    got = error_left(ffn, compensator, 1, blocks)
    assert got == pytest.approx(after / before, rel=1e-4) and got > 0.1


def test_all_of_the_error_is_left_by_nothing(ffn: GatedFFN) -> None:
    zero = MLPCompensator([MLPWeights(mx.zeros((D, 2)), mx.zeros((2, D)))])
    assert error_left(ffn, zero, 0, masked_blocks(2)) == 1


# The low-rank compensator


class Toy:
    """An FFN whose activations are what a test says."""

    def __init__(self, f: int, activations: Callable[[mx.array], mx.array]):
        self.shape = (D, f)
        self.activations = activations
        self.down = nn.Linear(f, D, bias=False)
        self.down.weight = mx.array(randoms(5, (D, f))[0])

    def down_matrix(self) -> mx.array:
        return self.down.weight


def linear_toy(directions: int = 3, f: int = 40) -> tuple[Any, Pairs]:
    """Neurons that are linear in a few directions of x where they are dropped, and wild elsewhere.

    The first coordinates of a block's tokens say which neurons it keeps.
    """
    v, u, offset = map(mx.array, randoms(3, (D, directions), (directions, f), (f,)))
    code = mx.array(np.random.default_rng(6).integers(2, size=(4, f)))

    def keeps(x: mx.array) -> mx.array:
        bits = x[:, 0, :4].astype(mx.int32)
        return (mx.sum(bits[..., None] * code, axis=1) % 2).astype(mx.float32)

    def activations(x: mx.array) -> mx.array:
        wild = 1e3 * mx.sin(7 * x[..., 4:5]) * keeps(x)[:, None]
        return x @ v @ u + offset + wild

    blocks = []
    for i in range(4):
        rng = np.random.default_rng([7, i])
        x = rng.normal(size=(100, BLOCK, D))
        x[:, :, :4] = rng.integers(2, size=(100, 1, 4))
        blocks.append(mx.array(x.astype(np.float32)))
    return Toy(f, activations), [(x, keeps(x)) for x in blocks]


def residuals(ffn: Any, w: LowRankWeights, blocks: Pairs) -> tuple[np.ndarray, Any]:
    """Output that is lost, and that is still lost with guesses, (tokens, d) each."""
    down, lost, left = float64(ffn.down.weight), [], []
    u = float64(w.u)
    for x, kept in blocks:
        z = float64(ffn.activations(x))
        for block, mark, of_block in zip(float64(x), float64(kept), z):
            phi = reference.features(block, float64(w.center), float64(w.v))
            lost.append((of_block * (1 - mark)) @ down.T)
            left.append(((of_block - phi @ u.T) * (1 - mark)) @ down.T)
    return np.concatenate(lost), np.concatenate(left)


def test_neurons_that_are_linear_where_they_are_dropped() -> None:
    """A fit over all tokens would see nothing but what they do where they are kept."""
    ffn, blocks = linear_toy()
    weights = fit_low_rank(ffn, lambda: blocks, 8)
    assert error_left(ffn, LowRankCompensator([weights]), 0, blocks) < 0.005
    lost, left = residuals(ffn, weights, blocks)
    assert (left**2).sum() / (lost**2).sum() < 0.005


def test_too_few_directions_leave_an_error() -> None:
    ffn, blocks = linear_toy(directions=6)
    found = [fit_low_rank(ffn, lambda: blocks, rank) for rank in (1, 3, 12)]
    left = [error_left(ffn, LowRankCompensator([w]), 0, blocks) for w in found]
    assert 1 > left[0] > 1.5 * left[1] > 10 * left[2]


@pytest.mark.parametrize("prior", [0, low_rank.PRIOR_BLOCKS])
def test_what_is_left_has_no_bias(
    prior: int, ffn: GatedFFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mean is nothing, but for what the prior takes."""
    monkeypatch.setattr(low_rank, "PRIOR_BLOCKS", prior)
    blocks = masked_blocks(40)
    lost, left = residuals(ffn, fit_low_rank(ffn, lambda: blocks, 4), blocks)
    before, after = (np.linalg.norm(a.mean(axis=0)) for a in (lost, left))
    assert after < (0.1 if prior else 1e-4) * before


def least_squares(
    ffn: GatedFFN, w: LowRankWeights, blocks: Pairs, prior: float
) -> np.ndarray:
    """Neuron by neuron over the tokens of blocks that drop it, and a few blocks' worth of zeros."""
    gate, up, _ = matrices(ffn)
    x = np.concatenate([float64(x) for x, _ in blocks])
    kept = np.concatenate([np.array(kept) for _, kept in blocks])
    center, v = float64(w.center), float64(w.v)
    phi = np.stack([reference.features(block, center, v) for block in x])
    z = np.stack([reference.activations(block, gate, up) for block in x])
    k = phi.shape[-1]
    shrink = math.sqrt(prior / len(x)) * phi.reshape(-1, k)
    found = []
    for j in range(F):
        rows, values = phi[kept[:, j] == 0], z[kept[:, j] == 0][..., j]
        a = np.concatenate([rows.reshape(-1, k), shrink])
        b = np.concatenate([values.reshape(-1), np.zeros(len(shrink))])
        found.append(np.linalg.lstsq(a, b)[0])
    return np.stack(found)


@pytest.mark.parametrize("rank", [1, 6])
def test_the_fit_is_least_squares(rank: int, ffn: GatedFFN) -> None:
    blocks = masked_blocks(20)
    w = fit_low_rank(ffn, lambda: blocks, rank)
    shapes = [a.shape for a in (w.center, w.v, w.u)]
    assert shapes == [(D,), (D, rank), (F, rank + 1)]
    wanted = least_squares(ffn, w, blocks, low_rank.PRIOR_BLOCKS)
    assert models.distance(np.array(w.u), wanted) < 1e-3


def test_the_directions_are_the_best_of_so_many(ffn: GatedFFN) -> None:
    """No rank-3 map of x leaves less of the lost output: from the singular values of the full fit."""
    _, _, down = matrices(ffn)
    blocks = masked_blocks(20)
    w = fit_low_rank(ffn, lambda: blocks, 3)
    x = np.concatenate([float64(x) for x, _ in blocks]).reshape(-1, D)
    e = np.concatenate([float64(dropped(ffn, *pair)) for pair in blocks])
    e = e.reshape(-1, F) @ down.T
    assert np.allclose(float64(w.center), x.mean(axis=0), atol=1e-5)
    x, e = x - x.mean(axis=0), e - e.mean(axis=0)
    fitted = x @ np.linalg.lstsq(x, e)[0]
    best = (np.linalg.svd(fitted, compute_uv=False)[:3] ** 2).sum()
    h = x @ float64(w.v)
    got = ((h @ np.linalg.lstsq(h, e)[0]) ** 2).sum()
    assert 0.999 * best < got <= 1.00001 * best


def test_neurons_that_are_never_dropped_do_no_harm(ffn: GatedFFN) -> None:
    """Nothing is known of them, and nothing is said."""
    always = mx.where(mx.arange(F) < 9, 1.0, 0.0)
    blocks = [(x, mx.maximum(kept, always)) for x, kept in masked_blocks(10)]
    w = fit_low_rank(ffn, lambda: blocks, 4)
    assert mx.array_equal(w.u[:9], mx.zeros((9, 5)))
    assert np.isfinite(np.array(w.u)).all() and float(mx.min(mx.abs(w.u[9:]))) > 0


def test_neurons_that_one_block_drops_are_drawn_towards_nothing(ffn: GatedFFN) -> None:
    (x, kept), *_ = masked_blocks(10)
    rare = mx.where((mx.arange(F) < 9) & (mx.arange(10) > 0)[:, None], 1.0, kept)
    rare = mx.where((mx.arange(F) < 9) & (mx.arange(10) == 0)[:, None], 0.0, rare)
    w = fit_low_rank(ffn, lambda: [(x, rare)], 4)
    free = least_squares(ffn, w, [(x, rare)], 0)
    sizes = [np.linalg.norm(a[:9], axis=1) for a in (float64(w.u), free)]
    assert (sizes[0] < 0.5 * sizes[1]).all()


@pytest.mark.parametrize("at_once", [1, 7, 128, 10**6])
def test_neurons_are_solved_some_at_a_time(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = randoms(0, (30, 9, 4), (30, 9))
    gram, moment = a.swapaxes(1, 2) @ a, (a.swapaxes(1, 2) @ b[..., None])[..., 0]
    monkeypatch.setattr(low_rank, "SOLVED_AT_ONCE", at_once)
    got = np.array(solve(mx.array(gram.reshape(30, 16)), mx.array(moment)))
    wanted = np.stack([np.linalg.lstsq(*pair)[0] for pair in zip(a, b)])
    assert np.allclose(got, wanted, atol=1e-3)
    monkeypatch.setattr(low_rank, "SOLVED_AT_ONCE", 10)
    again = solve(mx.array(gram.reshape(30, 16)), mx.array(moment))
    assert np.array_equal(got, np.array(again))


def test_sums_do_not_depend_on_how_the_tokens_come() -> None:
    x, e = map(mx.array, randoms(0, (64, D), (64, D)))
    one, many = Directions.zeros(D), Directions.zeros(D)
    one.add(x, e)
    for start in range(0, 64, 16):
        many.add(x[start : start + 16], e[start : start + 16])
    for a, b in zip(vars(one).values(), vars(many).values()):
        assert np.allclose(np.array(a), np.array(b), atol=1e-4)
    assert one.tokens == 64


# The paper's compensator


def mlp_toy(hidden: int = 4, f: int = 12) -> Any:
    """Its last neurons are a small MLP of x; the others are large."""
    (w,) = map(mx.array, randoms(8, (D, hidden)))
    small = mx.arange(f) >= f - hidden

    def activations(x: mx.array) -> mx.array:
        tiled = mx.concatenate([x @ w / math.sqrt(D)] * (f // hidden), axis=-1)
        return nn.silu(tiled) + mx.where(small, 0.0, 9.0)

    return Toy(f, activations)


def batch(step: int) -> tuple[mx.array, mx.array]:
    """x, and norms that call the last four neurons the worst."""
    (x,) = randoms(step, (8, BLOCK, D))
    return mx.array(x), mx.broadcast_to(-mx.arange(12).astype(mx.float32), (8, 12))


def ranked(x: mx.array) -> mx.array:
    """Scores that agree."""
    return mx.broadcast_to(-mx.arange(12).astype(mx.float32), (len(x), 12))


def fitted(file: Path, steps: int = 160, **more: Any) -> Any:
    """(weights, descent) of a fit."""
    runs: list[Descent] = []
    asked = {"tick": lambda run, details: runs.append(run), "scores": ranked, **more}
    made = fit_mlp(
        mlp_toy(),
        batch=batch,
        keep=lambda step: 8,
        settings=(16, steps, 3),
        file=file,
        **asked,
    )
    return made, runs[-1]


def test_an_mlp_learns_what_is_lost(tmp_path: Path) -> None:
    weights, run = fitted(tmp_path / "mlp.safetensors")
    steps, losses, _ = zip(*run.curve)
    assert losses[0] == 1.0 and losses[-1] < 0.1
    assert weights.w1.shape == (D, 16) and weights.w2.shape == (16, D)
    x = batch(999)[0]
    compensator = MLPCompensator([weights], mlp.ACTIVATION)
    left = error_left(mlp_toy(), compensator, 0, [(x, marked(ranked(x), 8))])
    assert left == pytest.approx(losses[-1], abs=0.05)


def test_an_interrupted_fit_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = fitted(tmp_path / "a.safetensors", 12)
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    for stop in (3, 8):
        with pytest.raises(Stop):
            fitted(tmp_path / "b.safetensors", 12, tick=stop_at(stop))
        mx.random.seed(stop)
    got, run = fitted(tmp_path / "b.safetensors", 12)
    assert mx.array_equal(got.w1, wanted.w1) and mx.array_equal(got.w2, wanted.w2)
    assert len(run.curve) == 12


def test_the_second_half_of_the_steps_drops_what_the_predictor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half drops the truly worst neurons."""
    seen: list[list[float]] = []

    def watched(ffn: Any, x: mx.array, kept: mx.array) -> mx.array:
        seen.append(kept[0].tolist())
        return dropped(ffn, x, kept)

    monkeypatch.setattr(mlp, "dropped", watched)
    fitted(tmp_path / "mlp.safetensors", 6, scores=lambda x: -ranked(x))
    truly, predicted = [1.0] * 8 + [0.0] * 4, [0.0] * 4 + [1.0] * 8
    assert seen == [truly] * 3 + [predicted] * 3


def test_every_step_keeps_as_many_neurons_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def watched(ffn: Any, x: mx.array, kept: mx.array) -> mx.array:
        counts.append(int(mx.sum(kept[0])))
        return dropped(ffn, x, kept)

    monkeypatch.setattr(mlp, "dropped", watched)
    file = tmp_path / "mlp.safetensors"
    toy, settings = mlp_toy(), (4, 6, 0)
    fit_mlp(toy, ranked, batch, lambda s: 3 + s % 3, settings, file, nothing)
    assert counts == [3, 4, 5, 3, 4, 5]


def test_the_fits_of_a_seed_are_the_same(tmp_path: Path) -> None:
    made = [fitted(tmp_path / f"{i}.safetensors", 3)[0] for i in range(2)]
    one, other = (dataclasses.asdict(w) for w in made)
    assert all(mx.array_equal(one[k], other[k]).item() for k in one)
