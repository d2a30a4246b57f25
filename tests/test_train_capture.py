"""What is captured and kept, what layers attend to, and what a predictor is judged by."""

import math
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from mlx_lm.models import llama as llama_module

from mlx_fastforward import PrefillConfig, attach, detach, load_predictor
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.continuation import continuation, divergence
from mlx_fastforward.neurons.predictor import PredictorWeights
from mlx_fastforward.train import importance, quality
from mlx_fastforward.train.capture import SCORES, block_norms, capture, ffns_of, tapped
from mlx_fastforward.train.store import BLOCKS, SEQUENCES, Batches, Store

BLOCK, D, F, LAYERS = models.BLOCK, models.HIDDEN, models.FFN, models.LAYERS


class Recorder(nn.Module):
    """Stands before an FFN and keeps what goes in."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.seen = mlp, []  # type: nn.Module, list[np.ndarray]

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(np.array(x[0]))
        return self.mlp(x)


def ffn_inputs(model: nn.Module, ids: mx.array) -> np.ndarray:
    """Inputs of all FFNs (layers, tokens, d) of one call."""
    mlps = [layer.mlp for layer in model.layers]
    recorders = [Recorder(mlp) for mlp in mlps]
    for layer, recorder in zip(model.layers, recorders):
        layer.mlp = recorder
    model(ids[None])
    for layer, mlp in zip(model.layers, mlps):
        layer.mlp = mlp
    return np.stack([r.seen[0] for r in recorders])


def tokens(n: int, seed: int = 0) -> mx.array:
    return mx.array(models.token_ids(n, seed))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return models.tiny("llama")


# Block norms


def by_hand(model: nn.Module, layer: int, block: np.ndarray, score: str) -> np.ndarray:
    """How much each neuron fires in one block (N, d) -> (f,)."""
    mlp = model.layers[layer].mlp
    gate, up, down = (
        models.float_weight(mlp[n]) for n in ("gate_proj", "up_proj", "down_proj")
    )
    z = reference.activations(block.astype(np.float64), gate, up)
    if score == "plain":
        return np.linalg.norm(z, axis=0)
    if score == "weighted":
        return reference.weighted(z, down)
    return reference.griffin(z * reference.column_norms(down))


@pytest.mark.parametrize("score", SCORES)
def test_block_norms(score: str, llama: nn.Module) -> None:
    x = np.random.default_rng(0).normal(size=(3, BLOCK, D)).astype(np.float32)
    ffn = ffns_of(llama)[1]
    got = np.array(block_norms(ffn, mx.array(x), score))
    wanted = np.stack([by_hand(llama, 1, block, score) for block in x])
    assert got.shape == (3, F)
    assert models.distance(got, wanted) < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_block_norms_of_tokens_that_fire_nothing(score: str, llama: nn.Module) -> None:
    got = block_norms(ffns_of(llama)[0], mx.zeros((1, BLOCK, D)), score)
    assert mx.array_equal(got, mx.zeros((1, F)))


def test_relative_norms_count_quiet_tokens_like_loud_ones(llama: nn.Module) -> None:
    """Every token has 1 to give."""
    ffn = ffns_of(llama)[0]
    loud, quiet = mx.random.normal((2, 1, D), key=mx.random.key(0))
    one, other, both = (
        np.square(np.array(block_norms(ffn, mx.concatenate(x)[None], "relative")))
        for x in ([30 * loud], [quiet], [30 * loud, quiet])
    )
    assert np.allclose([one.sum(), other.sum()], 1, atol=1e-5)
    assert models.distance(both, one + other) < 1e-5


# Capture


def test_all_layers_but_the_last_are_fitted(llama: nn.Module) -> None:
    mlps = [layer.mlp for layer in llama.model.layers]
    assert [ffn.mlp for ffn in ffns_of(llama)] == mlps[:-1]


@pytest.mark.parametrize("name", models.NAMES)
def test_ffn_inputs_are_captured(name: str) -> None:
    """In blocks; tokens that fill none, and the last layer, are left out."""
    model, ids = models.tiny(name), tokens(3 * BLOCK + 5)
    x, norms = capture(model, ids, BLOCK, "plain")
    assert x.shape == (LAYERS - 1, 3, BLOCK, D) and norms.shape == (LAYERS - 1, 3, F)
    assert x.dtype == norms.dtype == mx.float16
    inputs = ffn_inputs(model, ids)[:-1, : 3 * BLOCK]
    wanted = inputs.reshape(x.shape).astype(np.float16)
    assert np.array_equal(np.array(x), wanted)


def test_norms_are_those_of_the_inputs(llama: nn.Module) -> None:
    ids = tokens(2 * BLOCK)
    _, norms = capture(llama, ids, BLOCK, "relative")
    for layer, inputs in enumerate(ffn_inputs(llama, ids)[:-1]):
        blocks = inputs.reshape(-1, BLOCK, D)
        wanted = np.stack([by_hand(llama, layer, b, "relative") for b in blocks])
        assert models.distance(np.array(norms[layer]), wanted) < 1e-3


def test_an_attached_model_is_captured_as_it_runs() -> None:
    """Below sparse layers; the first layer's input is the dense one."""
    ids = tokens(6 * BLOCK)
    model = models.tiny("llama")
    dense, _ = capture(model, ids, BLOCK, "plain")
    engine = attach(model, models.settings(selector="oracle"))
    with engine.prompt(len(ids)):
        x, norms = capture(model, ids, BLOCK, "plain")
    with engine.prompt(len(ids)):
        inputs = ffn_inputs(model, ids)[:-1]
    assert np.array_equal(np.array(x), inputs.reshape(x.shape).astype(np.float16))
    assert mx.array_equal(x[0], dense[0]) and not mx.array_equal(x[1], dense[1])
    wanted = by_hand(model, 1, inputs[1][:BLOCK], "plain")
    assert models.distance(np.array(norms[1, 0]), wanted) < 1e-3
    assert engine_of(model) is engine


def test_nothing_stays_on_the_model() -> None:
    model = models.tiny("llama")
    classes = [type(layer.mlp) for layer in model.layers]

    def stop(layer: int, x: mx.array) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tapped(model, stop):
        model(tokens(4)[None])
    assert [type(layer.mlp) for layer in model.layers] == classes
    before = models.prefill(model, models.token_ids(20))[0]
    capture(model, tokens(20), BLOCK, "plain")
    assert np.array_equal(models.prefill(model, models.token_ids(20))[0], before)


# Store and batches


def numbered(folder: Path, blocks: list[int]) -> Store:
    """Sequences of so many blocks; all of a token says which layer, sequence and block it is of."""
    store = Store(folder)
    for i, n in enumerate(blocks):
        where = np.array([[[l, i, b] for b in range(n)] for l in range(2)], np.float32)
        x = np.zeros((2, n, BLOCK, 4), np.float32)
        x[..., :3] = where[:, :, None]
        x[..., 3] = np.arange(BLOCK)
        norms = 1 + where @ np.array([[1, 0, 5], [3, 1, 0], [1, 2, 1]])
        store.add(i, mx.array(x).astype(mx.float16), mx.array(norms).astype(mx.float16))
    return store


def norms_of(layer: int, sequence: int, block: int) -> np.ndarray:
    where = np.array([layer, sequence, block])
    return 1 + where @ np.array([[1, 0, 5], [3, 1, 0], [1, 2, 1]])


def all_of(store: Store, n: int) -> list[tuple[Store, int]]:
    return [(store, i) for i in range(n)]


def test_what_is_stored_is_loaded(tmp_path: Path, llama: nn.Module) -> None:
    store = Store(tmp_path / "held-out")
    x, norms = capture(llama, tokens(3 * BLOCK), BLOCK, "relative")
    store.add(7, x, norms)
    got = store.load(7)
    assert np.array_equal(got[0], np.array(x)) and np.array_equal(
        got[1], np.array(norms)
    )
    assert got[0].dtype == got[1].dtype == np.float16
    names = sorted(p.name for p in (tmp_path / "held-out").iterdir())
    assert names == ["000007.norms.npy", "000007.x.npy"]


def test_a_sequence_that_was_half_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = numbered(tmp_path, [2, 2, 2])
    real = np.save

    def save(file: Path, values: np.ndarray) -> None:
        if values.ndim == 4:
            raise KeyboardInterrupt
        real(file, values)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(KeyboardInterrupt):
        store.add(3, mx.zeros((2, 2, BLOCK, 4)), mx.zeros((2, 2, 3)))
    assert store.numbers(9) == [0, 1, 2] and store.numbers(2) == [0, 1]


def test_a_batch_depends_on_its_step_alone(tmp_path: Path) -> None:
    store = numbered(tmp_path, [9, 5, 7])
    batches = Batches(all_of(store, 3), 4)
    wanted = {step: batches(step) for step in (0, 1, 2, 30)}
    again = Batches(all_of(Store(tmp_path), 3), 4)
    for step in (30, 2, 0, 1):
        for one, other in zip(again(step), wanted[step]):
            assert mx.array_equal(one, other)
    assert not mx.array_equal(wanted[0][1], wanted[1][1])
    assert not mx.array_equal(Batches(all_of(store, 3), 5)(0)[1], wanted[0][1])


@pytest.mark.parametrize("blocks", [[9, 5, 7], [1, 3]])
def test_batches_hold_neighbouring_blocks_and_their_norms(
    blocks: list[int], tmp_path: Path
) -> None:
    """Those of merged blocks are roots of sums of squares; short sequences begin again."""
    store = numbered(tmp_path, blocks)
    batches = Batches(all_of(store, len(blocks)), 0)
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
            squares = sum(norms_of(*w) ** 2 for w in wanted)
            assert np.allclose(norms[layer, b], np.sqrt(squares), rtol=1e-6)
    assert set(lengths) == {1, 2, 4}


def test_half_of_the_batches_are_as_they_were_captured(tmp_path: Path) -> None:
    batches = Batches(all_of(numbered(tmp_path, [9, 5]), 2), 1)
    counts = [batches(step)[0].shape[2] // BLOCK for step in range(200)]
    shares = [counts.count(m) / 200 for m in (1, 2, 4)]
    assert np.allclose(shares, [0.5, 0.25, 0.25], atol=0.1)


def test_batches_of_some_layers_and_of_no_merged_blocks(tmp_path: Path) -> None:
    batches = Batches(all_of(numbered(tmp_path, [9, 5]), 2), 1, blocks=8, longest=1)
    for step in range(8):
        x, norms = batches(step, slice(1, 2))
        assert x.shape == (1, 8, BLOCK, 4) and norms.shape == (1, 8, 3)
        assert mx.array_equal(x, batches(step)[0][1:])
        assert (np.array(x)[..., 0] == 1).all()


def test_batches_draw_from_several_sequences(tmp_path: Path) -> None:
    batches = Batches(all_of(numbered(tmp_path, [9] * 8), 8), 1)
    seen: set[tuple[int, ...]] = set()
    for step in range(20):
        found = np.unique(np.array(batches(step)[0])[0, :, :, 1])
        assert 1 <= len(found) <= SEQUENCES
        seen |= {tuple(found)}
    assert len({i for found in seen for i in found}) == 8 and len(seen) > 10


# Importances


def masses_by_hand(
    model: nn.Module, ids: mx.array, block: int, windows: list[Optional[int]]
) -> list[float]:
    """Mean attention mass outside the first block: softmax in float64, head by head."""
    found = []
    for layer, window in zip(model.layers, windows):
        q, k = queries_and_keys(model, layer, ids)
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


def queries_and_keys(
    model: nn.Module, layer: nn.Module, ids: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """(heads, L, e) and (groups, L, e) after RoPE, from the input of a layer's attention."""
    seen: list[mx.array] = []
    norm = layer.input_layernorm

    class Watched(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            seen.append(norm(x))
            return seen[0]

    layer.input_layernorm = Watched()
    model(ids[None])
    layer.input_layernorm = norm
    attention: Any = layer.self_attn
    parts = []
    for project, n in (
        (attention.q_proj, attention.n_heads),
        (attention.k_proj, attention.n_kv_heads),
    ):
        x = project(seen[0]).reshape(1, len(ids), n, -1).swapaxes(1, 2)
        parts.append(np.array(attention.rope(x)[0]).astype(np.float64))
    return parts[0], parts[1]


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
    """Of those that reach beyond the first block."""
    sequences = [tokens(n, seed) for seed, n in enumerate((20, BLOCK, 3, 40))]
    got = importance.importances(llama, iter(sequences), BLOCK)
    single = [importance.importances(llama, [sequences[i]], BLOCK) for i in (0, 3)]
    assert np.allclose(got, np.mean(single, axis=0), atol=1e-6)
    assert importance.importances(llama, [sequences[1]], BLOCK) == [1.0] * LAYERS


@pytest.mark.parametrize("name", models.NAMES)
def test_every_model_has_importances(name: str) -> None:
    model = models.tiny(name)
    before = models.prefill(model, models.token_ids(30))[0]
    got = importance.importances(model, [tokens(30)], BLOCK)
    assert len(got) == LAYERS and all(0 < s <= 1 for s in got)
    assert np.array_equal(models.prefill(model, models.token_ids(30))[0], before)


def test_watching_ends_with_an_interrupt(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importance, "outside", stop)
    before = llama_module.scaled_dot_product_attention
    with pytest.raises(KeyboardInterrupt):
        importance.masses(llama, tokens(20), BLOCK)
    assert llama_module.scaled_dot_product_attention is before


# Recall


def test_recall_is_the_share_of_the_best_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype(np.float32) for s in ((D, 4), (8, F), (F,))]
    captured = []
    for blocks in (3, 1):
        x = rng.normal(size=(2, blocks, BLOCK, D)).astype(np.float16)
        captured.append((x, rng.uniform(size=(2, blocks, F)).astype(np.float16)))
    w1, w2, bias = map(mx.array, weights)
    predictor = PredictorWeights(None, w1, w2, bias=bias)
    shares = []
    for layer in range(2):
        hits = [
            len(
                {*reference.top_k(reference.token_wise(b.astype(float), *weights), 64)}
                & {*np.argsort(-n, kind="stable")[:64].tolist()}
            )
            for x, norms in captured
            for b, n in zip(x[layer], norms[layer].astype(float))
        ]
        shares.append(sum(hits) / 64 / len(hits))
    got = judge.recall([predictor] * 2, captured)
    assert np.allclose(got, shares, atol=1e-6) and 0.3 < min(shares) < 0.7


def test_recall_of_the_truth_is_one() -> None:
    """A bias that knows the norms, and one that knows their opposite."""
    norms = np.random.default_rng(1).permutation(F).astype(np.float16)
    captured = [
        (np.ones((2, 3, BLOCK, D), np.float16), np.tile(norms, (2, 3, 1)).copy())
    ]
    zero = (mx.zeros((D, 4)), mx.zeros((8, F)))
    biases = [mx.array(norms).astype(mx.float32) * sign for sign in (1, -1)]
    predictors = [PredictorWeights(None, *zero, bias=b) for b in biases]
    assert judge.recall(predictors, captured) == [1, 0]


# The distance from the dense model

LONG = 48
SEQUENCES_OF = [("prose", tokens(LONG, 1)), ("facts", tokens(LONG + 9, 2))]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that do for blocks of eight tokens."""
    monkeypatch.setattr(judge, "SHORTEST", LONG - 6)
    monkeypatch.setattr(judge, "TOKENS", 6)


def distances(
    model: nn.Module,
    folder: Path,
    compensator: Optional[str] = "low-rank",
    sparsity: float = 0.5,
    sequences: Any = SEQUENCES_OF,
    late: bool = False,
    ticks: Optional[list[int]] = None,
) -> Any:
    path = models.save_random_predictor(
        model, folder / "a", predictor="token-wise", compensator=compensator
    )
    done: list[int] = [] if ticks is None else ticks
    return judge.drift(
        model,
        load_predictor(path),
        sequences,
        sparsity,
        BLOCK,
        done.append,
        lambda: late,
    )


@pytest.mark.usefixtures("short")
def test_nothing_dropped_is_no_distance(llama: nn.Module, tmp_path: Path) -> None:
    found = distances(llama, tmp_path, sparsity=1e-6)
    assert list(found) == ["oracle", "predictor", "predictor and compensator"]
    for row in found.values():
        kinds = {"facts": 0, "prose": 0}
        assert row == {"kl": 0, "top1": 1, "kl_by_kind": kinds, "prompts": 2}


@pytest.mark.usefixtures("short")
def test_what_is_dropped_shows(llama: nn.Module, tmp_path: Path) -> None:
    """A random predictor is worse than the oracle, and there are no random compensators."""
    found = distances(llama, tmp_path)
    assert 0.001 < found["oracle"]["kl"] < found["predictor"]["kl"]
    assert found["predictor"]["kl"] < found["predictor and compensator"]["kl"]
    for row in found.values():
        mean = sum(row["kl_by_kind"].values()) / 2
        assert row["kl"] == pytest.approx(mean, abs=2e-5) and row["prompts"] == 2


@pytest.mark.usefixtures("short")
def test_without_a_compensator_there_are_two_arms(
    llama: nn.Module, tmp_path: Path
) -> None:
    assert list(distances(llama, tmp_path, None)) == ["oracle", "predictor"]


@pytest.mark.usefixtures("short")
def test_short_sequences_are_left_out(llama: nn.Module, tmp_path: Path) -> None:
    short = ("lines", tokens(LONG - 1))
    found = distances(llama, tmp_path, sequences=[short, *SEQUENCES_OF])
    assert set(found["oracle"]["kl_by_kind"]) == {"facts", "prose"}
    assert distances(llama, tmp_path, sequences=[short]) is None
    assert distances(llama, tmp_path, sequences=[]) is None


@pytest.mark.usefixtures("short")
def test_it_stops_early_when_it_is_late(llama: nn.Module, tmp_path: Path) -> None:
    ticks: list[int] = []
    sequences = SEQUENCES_OF * 2
    found = distances(
        llama, tmp_path, None, sequences=sequences, late=True, ticks=ticks
    )
    assert found["oracle"]["prompts"] == 2 and ticks == [1, 2]
    assert engine_of(llama) is None


@pytest.mark.usefixtures("short")
def test_the_oracles_distance(llama: nn.Module, tmp_path: Path) -> None:
    """From the method by hand: the prompt but its last token sparse, all after it dense."""
    ids = SEQUENCES_OF[0][1]
    prompt = LONG - 6
    found = distances(llama, tmp_path, None, sequences=SEQUENCES_OF[:1])
    stop = BLOCK + (prompt - 1 - BLOCK - (BLOCK - 1)) // BLOCK * BLOCK
    sparse = models.by_hand(llama, "llama", BLOCK, stop, F // 2)
    logits, cache = models.prefill(sparse, ids[: prompt - 1].tolist())
    rows = [
        logprobs(models.prefill(m, ids[prompt - 1 : -1].tolist(), c)[0])
        for m, c in ((llama, dense_cache(llama, ids[: prompt - 1])), (llama, cache))
    ]
    kl = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1).mean()
    assert found["oracle"]["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-5)
    same = (rows[0].argmax(-1) == rows[1].argmax(-1)).mean()
    assert found["oracle"]["top1"] == pytest.approx(same, abs=1e-5)


def dense_cache(model: nn.Module, ids: mx.array) -> list:
    return models.prefill(model, ids.tolist())[1]


def logprobs(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def test_a_dense_continuation_is_the_models_own(llama: nn.Module) -> None:
    ids = tokens(30)
    got = np.array(continuation(llama, ids, 20, None))
    wanted = logprobs(models.prefill(llama, ids.tolist())[0][19:-1])
    assert got.shape == (10, models.VOCAB) and np.abs(got - wanted).max() < 1e-4


def test_a_continuation_is_read_densely_by_an_attached_model(
    llama: nn.Module,
) -> None:
    """After the prompt, however much follows it: this one is too short to be sparse."""
    ids = tokens(60)
    wanted = [continuation(llama, ids, prompt, None) for prompt in (20, 50)]
    engine = attach(llama, PrefillConfig(0.5, BLOCK, selector="oracle"))
    got = [continuation(llama, ids, prompt, engine) for prompt in (20, 50)]
    detach(llama)
    assert mx.array_equal(got[0], wanted[0]) and not mx.array_equal(got[1], wanted[1])


def test_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = (logprobs(rng.normal(size=(5, 7))) for _ in range(2))
    kl, same = divergence(mx.array(p), mx.array(q))
    wanted = [np.dot(np.exp(a), a - b) for a, b in zip(p, q)]
    assert kl == pytest.approx(np.mean(wanted), rel=1e-5)
    assert same == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)))
    assert divergence(mx.array(p), mx.array(p)) == (0, 1)
