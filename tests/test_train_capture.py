"""What is captured and kept, what layers attend to, and what a predictor is judged by."""

import math
from pathlib import Path
from typing import Any, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference

from mlx_fastforward import attach, load_predictor
from mlx_fastforward.attachment import engine_of, reading
from mlx_fastforward.neurons.predictor import PredictorWeights
from mlx_fastforward.train import importance, quality
from mlx_fastforward.train.capture import SCORES, block_norms, capture, ffns_of
from mlx_fastforward.train.store import BLOCKS, SEQUENCES, Batches, Store

BLOCK, D, F, LAYERS = models.BLOCK, models.HIDDEN, models.FFN, models.LAYERS


def inputs_of(model: nn.Module, ids: mx.array, name: str) -> list[mx.array]:
    """What goes into the modules of this name, layer by layer, in one call."""
    own, seen = [layer[name] for layer in model.layers], []  # type: Any, list[mx.array]

    def recorder(module: nn.Module) -> Any:
        def call(x: mx.array, *args: Any, **kwargs: Any) -> Any:
            seen.append(x)
            return module(x, *args, **kwargs)

        return call

    for layer, module in zip(model.layers, own):
        layer[name] = recorder(module)
    model(ids[None])
    for layer, module in zip(model.layers, own):
        layer[name] = module
    return seen


def ffn_inputs(model: nn.Module, ids: mx.array) -> np.ndarray:
    """(layers, tokens, d) of the layers that are fitted."""
    return np.stack([np.array(x[0]) for x in inputs_of(model, ids, "mlp")[:-1]])


def tokens(n: int, seed: int = 0) -> mx.array:
    return mx.array(models.token_ids(n, seed))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return models.tiny("llama")


def by_hand(model: nn.Module, layer: int, block: np.ndarray, score: str) -> np.ndarray:
    """How much each neuron fires in one block (N, d) -> (f,)."""
    mlp = model.layers[layer].mlp
    gate, up, down = (
        reference.weight(mlp[n]) for n in ("gate_proj", "up_proj", "down_proj")
    )
    z = reference.activations(block.astype(np.float64), gate, up)
    if score == "plain":
        return np.linalg.norm(z, axis=0)
    if score == "weighted":
        return reference.weighted(z, down)
    return reference.griffin(z * reference.column_norms(down))


@pytest.mark.parametrize("score", SCORES)
def test_block_norms(score: str, llama: nn.Module) -> None:
    """With loud and quiet tokens; and of tokens that fire nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, BLOCK, D)) * 10 ** rng.uniform(-1, 1, size=(3, BLOCK, 1))
    ffn = ffns_of(llama)[1]
    got = np.array(block_norms(ffn, mx.array(x.astype(np.float32)), score))
    wanted = np.stack([by_hand(llama, 1, block, score) for block in x])
    assert got.shape == (3, F)
    assert models.distance(got, wanted) < 1e-5
    nothing = block_norms(ffn, mx.zeros((1, BLOCK, D)), score)
    assert mx.array_equal(nothing, mx.zeros((1, F)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_ffn_inputs_and_norms_are_captured(name: str) -> None:
    """In blocks; tokens that fill none, and the last layer, are left out."""
    model, ids = models.tiny(name), tokens(3 * BLOCK + 5)
    x, norms = capture(model, ids, BLOCK, "relative")
    assert x.shape == (LAYERS - 1, 3, BLOCK, D) and norms.shape == (LAYERS - 1, 3, F)
    assert x.dtype == norms.dtype == mx.float16
    blocks = ffn_inputs(model, ids)[:, : 3 * BLOCK].reshape(x.shape)
    assert np.array_equal(np.array(x), blocks.astype(np.float16))
    for layer, ffn in enumerate(ffns_of(model)):
        wanted = block_norms(ffn, mx.array(blocks[layer]), "relative")
        assert models.distance(np.array(norms[layer]), np.array(wanted)) < 1e-3


def test_an_attached_model_is_captured_as_it_runs() -> None:
    """Below sparse layers; the first layer's input is the dense one."""
    ids = tokens(6 * BLOCK)
    model = models.tiny("llama")
    dense, _ = capture(model, ids, BLOCK, "plain")
    engine = attach(model, models.settings(selector="oracle"))
    with reading(model, len(ids)):
        x, norms = capture(model, ids, BLOCK, "plain")
    with reading(model, len(ids)):
        inputs = ffn_inputs(model, ids)
    assert np.array_equal(np.array(x), inputs.reshape(x.shape).astype(np.float16))
    assert mx.array_equal(x[0], dense[0]) and not mx.array_equal(x[1], dense[1])
    wanted = by_hand(model, 1, inputs[1][:BLOCK], "plain")
    assert models.distance(np.array(norms[1, 0]), wanted) < 1e-3
    assert engine_of(model) is engine


WEIGHTS = np.array([[1, 0, 5], [3, 1, 0], [1, 2, 1]])


def numbered(folder: Path, blocks: list[int]) -> list[tuple[Store, int]]:
    """Sequences of so many blocks; all of a token says which layer, sequence and block it is of."""
    store = Store(folder)
    for i, n in enumerate(blocks):
        where = np.array([[[l, i, b] for b in range(n)] for l in range(2)], np.float32)
        x = np.zeros((2, n, BLOCK, 4), np.float32)
        x[..., :3] = where[:, :, None]
        x[..., 3] = np.arange(BLOCK)
        norms = mx.array(1 + where @ WEIGHTS).astype(mx.float16)
        store.add(i, mx.array(x).astype(mx.float16), norms)
    return [(store, i) for i in range(len(blocks))]


def test_what_is_stored_is_loaded_unless_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = numbered(tmp_path, [2, 2, 2])[0][0], np.save
    shapes = ((2, 2, 8, 4), (2, 2, 3))
    x, norms = (mx.random.normal(s).astype(mx.float16) for s in shapes)
    store.add(7, x, norms)
    for got, wanted in zip(store.load(7), (x, norms)):
        assert np.array_equal(got, np.array(wanted)) and got.dtype == np.float16

    def save(file: Path, values: np.ndarray) -> None:
        if values.ndim == 4:
            raise KeyboardInterrupt
        real(file, values)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(KeyboardInterrupt):
        store.add(3, x, norms)
    assert store.numbers(9) == [0, 1, 2, 7] and store.numbers(2) == [0, 1]


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    sequences = numbered(tmp_path, [9, 5, 7])
    wanted = [Batches(sequences, 4)(step)[1] for step in range(3)]
    again = Batches([(Store(tmp_path), i) for i in range(3)], 4)
    for step in (2, 0, 1):
        assert mx.array_equal(again(step)[1], wanted[step])
    assert not mx.array_equal(wanted[0], wanted[1])
    assert not mx.array_equal(Batches(sequences, 5)(0)[1], wanted[0])


@pytest.mark.parametrize("blocks", [[9, 5, 7], [1, 3]])
def test_batches_hold_neighbouring_blocks_and_their_norms(
    blocks: list[int], tmp_path: Path
) -> None:
    """Those of merged blocks are roots of sums of squares; short sequences begin again."""
    batches = Batches(numbered(tmp_path, blocks), 0)
    lengths = []
    for step in range(12):
        x, norms = (np.array(a) for a in batches(step))
        merge = x.shape[2] // BLOCK
        lengths.append(merge)
        assert len(x) == 2 and x.shape[1] * merge == BLOCKS
        parts = x.reshape(2, -1, merge, BLOCK, 4)
        assert (parts[..., 3] == np.arange(BLOCK)).all()
        where = parts[:, :, :, 0, :3].astype(int)
        for layer, b in np.ndindex(where.shape[:2]):
            _, i, first = where[layer, b, 0]
            wanted = [[layer, i, (first + k) % blocks[i]] for k in range(merge)]
            assert where[layer, b].tolist() == wanted
            squares = ((1 + np.array(wanted) @ WEIGHTS) ** 2).sum(axis=0)
            assert np.allclose(norms[layer, b], np.sqrt(squares), rtol=1e-6)
    assert set(lengths) == {1, 2, 4}


def test_half_of_the_batches_are_as_they_were_captured(tmp_path: Path) -> None:
    """Unless none is to be merged; and they draw from several sequences."""
    batches = Batches(numbered(tmp_path, [9] * 8), 1)
    counts, seen = [], set()
    for step in range(200):
        x = batches(step)[0]
        counts.append(x.shape[2] // BLOCK)
        seen.add(tuple(np.unique(np.array(x)[0, :, :, 1])))
    shares = [counts.count(m) / 200 for m in (1, 2, 4)]
    assert np.allclose(shares, [0.5, 0.25, 0.25], atol=0.1)
    assert {i for found in seen for i in found} == set(range(8)) and len(seen) > 10
    assert max(map(len, seen)) == SEQUENCES
    few = Batches(batches.sequences, 1, blocks=8, longest=1)
    for step in range(8):
        x, norms = few(step, slice(1, 2))
        assert x.shape == (1, 8, BLOCK, 4) and norms.shape == (1, 8, 3)
        assert mx.array_equal(x, few(step)[0][1:])
        assert (np.array(x)[..., 0] == 1).all()


def masses_by_hand(
    model: nn.Module, ids: mx.array, block: int, windows: list[Optional[int]]
) -> list[float]:
    """Mean attention mass outside the first block: softmax in float64, head by head."""
    found = []
    seen = inputs_of(model, ids, "self_attn")
    for layer, x, window in zip(model.layers, seen, windows):
        q, k = queries_and_keys(layer.self_attn, x)
        heads, length, e = q.shape
        total = 0.0
        for h in range(heads):
            keys = k[h * len(k) // heads]
            for i in range(block, length):
                first = max(0, i + 1 - window) if window else 0
                logits = keys[first : i + 1] @ q[h, i] / math.sqrt(e)
                mass = reference.softmax(logits)
                total += mass[max(0, block - first) :].sum()
        found.append(total / heads / (length - block))
    return found


def queries_and_keys(attention: Any, x: mx.array) -> Iterator[np.ndarray]:
    """(heads, L, e) and (groups, L, e) after RoPE."""
    for project, heads in (
        (attention.q_proj, attention.n_heads),
        (attention.k_proj, attention.n_kv_heads),
    ):
        part = project(x).reshape(1, x.shape[1], heads, -1).swapaxes(1, 2)
        yield np.array(attention.rope(part)[0]).astype(np.float64)


@pytest.mark.parametrize("rows", [5, 256])
@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding"])
def test_importances(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, grouped keys, sliding windows; queries all at once or a few at a time."""
    monkeypatch.setattr(importance, "ROWS", rows)
    model, ids = models.tiny(name), tokens(44)
    windows = [models.WINDOW, None] * 2 if "sliding" in name else [None] * 4
    got = importance.importances(model, [ids], BLOCK)
    wanted = masses_by_hand(model, ids, BLOCK, windows)
    assert np.allclose(got, wanted, atol=1e-5)
    assert len(set(got)) == LAYERS and 0.2 < min(got) and max(got) < 1


def test_importances_are_means_over_sequences(llama: nn.Module) -> None:
    """Of those that reach beyond the first block; layers without plain attention count alike."""
    sequences = [tokens(n, seed) for seed, n in enumerate((20, BLOCK, 3, 40))]
    got = importance.importances(llama, iter(sequences), BLOCK)
    single = [importance.importances(llama, [sequences[i]], BLOCK) for i in (0, 3)]
    assert np.allclose(got, np.mean(single, axis=0), atol=1e-6)
    assert importance.importances(llama, [sequences[1]], BLOCK) == [1.0] * LAYERS
    got = importance.importances(models.tiny("gemma2"), [sequences[0]], BLOCK)
    assert got == [1.0] * LAYERS


def test_recall_is_the_share_of_the_best_half() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype(np.float32) for s in ((D, 4), (8, F), (F,))]
    captured = []
    for blocks in (3, 1):
        x = rng.normal(size=(2, blocks, BLOCK, D)).astype(np.float16)
        captured.append((x, rng.uniform(size=(2, blocks, F)).astype(np.float16)))
    w1, w2, bias = map(mx.array, weights)
    got = quality.recall([PredictorWeights(None, w1, w2, bias=bias)] * 2, captured)
    for layer in range(2):
        hits = []
        for x, norms in captured:
            for block, fired in zip(x[layer].astype(float), norms[layer].astype(float)):
                picked = reference.top_k(reference.token_wise(block, *weights), F // 2)
                hits.append(len({*picked} & {*reference.top_k(fired, F // 2)}))
        share = sum(hits) / len(hits) / (F // 2)
        assert got[layer] == pytest.approx(share, abs=1e-6) and 0.3 < share < 0.7


LONG = 48
SEQUENCES_OF = [("prose", tokens(LONG, 1)), ("facts", tokens(LONG + 9, 2))]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that do for blocks of eight tokens."""
    monkeypatch.setattr(quality, "SHORTEST", LONG - 6)
    monkeypatch.setattr(quality, "TOKENS", 6)


def distances(
    model: nn.Module,
    folder: Path,
    compensator: Optional[str] = None,
    sparsity: float = 0.5,
    sequences: Any = SEQUENCES_OF,
    late: bool = False,
) -> Any:
    """What drift() finds, and its ticks."""
    kinds = {"predictor": "token-wise", "compensator": compensator}
    path, ticks = models.save_random_predictor(model, folder / "a", **kinds), []
    asked = (load_predictor(path), sequences, sparsity, BLOCK)
    return quality.drift(model, *asked, ticks.append, lambda: late), ticks


def test_what_is_dropped_shows(llama: nn.Module, tmp_path: Path) -> None:
    """A random predictor is worse than the oracle, and there are no random compensators."""
    found, _ = distances(llama, tmp_path, "low-rank")
    assert list(found) == ["oracle", "predictor", "predictor and compensator"]
    kl = [row["kl"] for row in found.values()]
    assert 0.001 < kl[0] < kl[1] < kl[2]
    for row in found.values():
        mean = sum(row["kl_by_kind"].values()) / 2
        assert row["kl"] == pytest.approx(mean, abs=2e-5) and row["prompts"] == 2
    for row in distances(llama, tmp_path, "low-rank", sparsity=1e-6)[0].values():
        kinds = {"facts": 0, "prose": 0}
        assert row == {"kl": 0, "top1": 1, "kl_by_kind": kinds, "prompts": 2}


def test_which_sequences_are_compared(llama: nn.Module, tmp_path: Path) -> None:
    """None that are too short; two at least, however late it is."""
    short = ("lines", tokens(LONG - 1))
    found, ticks = distances(llama, tmp_path, sequences=[short, *SEQUENCES_OF * 2])
    assert list(found) == ["oracle", "predictor"] and ticks == [1, 2, 3, 4]
    assert set(found["oracle"]["kl_by_kind"]) == {"facts", "prose"}
    found, ticks = distances(llama, tmp_path, sequences=SEQUENCES_OF * 2, late=True)
    assert found["oracle"]["prompts"] == 2 and ticks == [1, 2]
    assert distances(llama, tmp_path, sequences=[short])[0] is None
    assert engine_of(llama) is None


def test_the_oracles_distance(llama: nn.Module, tmp_path: Path) -> None:
    """From the method by hand: the prompt but its last token sparse, all after it dense.

    Nothing is measured, so the first layer is whole, and the others drop as much more.
    """
    ids = SEQUENCES_OF[0][1]
    prompt = LONG - 6
    found, _ = distances(llama, tmp_path, sequences=SEQUENCES_OF[:1])
    stop = BLOCK + (prompt - 1 - BLOCK - (BLOCK - 1)) // BLOCK * BLOCK
    rows, keep = [], [F, F // 4, F // 4]
    for model in (llama, models.by_hand(llama, "llama", BLOCK, stop, keep)):
        _, cache = models.prefill(model, ids[: prompt - 1].tolist())
        rest = ids[prompt - 1 : -1].tolist()
        rows.append(logprobs(models.prefill(llama, rest, cache)[0]))
    kl = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1).mean()
    assert found["oracle"]["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-5)
    same = (rows[0].argmax(-1) == rows[1].argmax(-1)).mean()
    assert found["oracle"]["top1"] == pytest.approx(same, abs=1e-5)


def logprobs(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
