"""What inspect says of a model, against the definitions; its picture; and the command."""

import json
from pathlib import Path
from typing import Any, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mlx_fastforward import attach
from mlx_fastforward import continuation as continuation_module
from mlx_fastforward import detach, load_predictor
from mlx_fastforward.bench.inspect import inspection
from mlx_fastforward.bench.inspect.inspection import Inspection, Overlap, inspect
from mlx_fastforward.bench.inspect.picture import binned, ordered, picture
from mlx_fastforward.cli import app
from mlx_fastforward.engine import Engine
from mlx_fastforward.errors import FastForwardError
from mlx_fastforward.predictors.file import PredictorFile

F, LAYERS, BLOCK = models.FFN, models.LAYERS, models.BLOCK
TOKENS, START, STOP = 56, 8, 48  # a dense head of 8, 5 blocks of 8, a tail of 8


def tokens(n: int = TOKENS) -> mx.array:
    return mx.array(models.token_ids(n))


def engine_for(
    model: nn.Module, predictor: Optional[PredictorFile] = None, **settings: Any
) -> Engine:
    """As attach() makes it; the model stays stock."""
    engine = attach(model, models.settings(**settings), predictor=predictor)
    detach(model)
    return engine


def look(model: nn.Module, engine: Engine, n: int = TOKENS) -> Inspection:
    return inspect(model, tokens(n), engine, None, lambda: None)


class Kept(nn.Module):
    """Stands before a module and keeps what goes in."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.x = inner, np.zeros(0)

    def __call__(self, x: mx.array) -> mx.array:
        self.x = np.array(x[0], np.float64)
        return self.inner(x)


def inputs_of(model: nn.Module, part: str) -> list[np.ndarray]:
    """What this part of every layer sees of the prompt, (tokens, d)."""
    own = [getattr(layer, part) for layer in model.layers]
    for layer, inner in zip(model.layers, own):
        setattr(layer, part, Kept(inner))
    model(tokens()[None, :-1])
    found = [getattr(layer, part).x for layer in model.layers]
    for layer, inner in zip(model.layers, own):
        setattr(layer, part, inner)
    return found


def ffn_inputs(model: nn.Module) -> list[np.ndarray]:
    """In the order of the layers that a prefill runs sparsely."""
    return inputs_of(model, "mlp")[:-1]


def streams(model: nn.Module) -> list[np.ndarray]:
    """The residual stream after every layer but the last: what the next one's norm sees."""
    return inputs_of(model, "input_layernorm")[1:]


def in_blocks(x: np.ndarray) -> np.ndarray:
    return x[START:STOP].reshape(-1, BLOCK, x.shape[-1])


def relative(error: np.ndarray, whole: np.ndarray) -> float:
    return float(np.sqrt((error**2).sum() / (whole**2).sum()))


# Overlap


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    blocks, f = draw(st.integers(2, 6)), draw(st.integers(2, 12))
    keep = draw(st.integers(1, f))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = np.zeros((blocks, f), bool)
    for row in kept:
        row[rng.choice(f, keep, replace=False)] = True
    return kept


@given(masks())
def test_overlap_is_that_of_the_sets(kept: np.ndarray) -> None:
    sets = [set(np.flatnonzero(row).tolist()) for row in kept]
    n, f = kept.shape
    pairs = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for j in range(n)
        for i in range(j)
    }
    near = [v for (i, j), v in pairs.items() if j == i + 1]
    once = [j for j in range(f) if sum(j in s for s in sets) == 1]
    got = Overlap.of(kept)
    assert got.in_all == pytest.approx(len(set.intersection(*sets)) / f)
    assert got.in_one == pytest.approx(len(once) / f)
    assert got.neighbours == pytest.approx(sum(near) / len(near), rel=1e-5)
    assert got.pairs == pytest.approx(sum(pairs.values()) / len(pairs), rel=1e-5)


def test_a_single_block_has_no_neighbours() -> None:
    got = Overlap.of(np.array([[True, False, True, True]]))
    assert got == Overlap(0.75, 0.75, None, None)


# Neurons, recall and errors of the FFNs, from the dense model's inputs


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding", "gemma2", "phi3"])
def test_neurons_and_recall(name: str) -> None:
    """GRIFFIN's choice, the head's best neurons, against each block's own."""
    model = models.tiny(name)
    found = look(model, engine_for(model, selector="first-block"))
    assert (found.tokens, found.blocks, found.neurons) == (TOKENS, 5, F)
    for layer, x in enumerate(ffn_inputs(model)):
        by_hand = models.OracleMLP(model.layers[layer].mlp, "gemma" in name, 0, 0, 0)
        (gate, up, down), (gate_bias, up_bias, _) = by_hand.weights, by_hand.biases

        def best(block: np.ndarray) -> list[int]:
            z = reference.activations(block, gate, up, by_hand.act, gate_bias, up_bias)
            return reference.top_k(reference.weighted(z, down), F // 2)

        head = best(x[:START])
        truth = [best(block) for block in in_blocks(x)]
        picked, oracle = found.masks[layer]
        assert [np.flatnonzero(m).tolist() for m in picked] == [head] * 5
        assert [np.flatnonzero(m).tolist() for m in oracle] == truth
        wanted = np.mean([len(set(head) & set(t)) / (F // 2) for t in truth])
        assert found.layers[layer].recall == pytest.approx(wanted)
        assert found.layers[layer].kept == F // 2
        assert found.layers[layer].selector == Overlap.of(picked)
        assert found.layers[layer].oracle == Overlap.of(oracle)


@pytest.mark.parametrize("name", ["llama-bias-sliding", "gemma3", "phi3"])
@pytest.mark.parametrize("selector", ["oracle", "probe"])
def test_errors_of_the_ffns(name: str, selector: str) -> None:
    """Of the neurons dropped; every fourth token, a probe, is exact."""
    model = models.tiny(name)
    found = look(model, engine_for(model, selector=selector, probe_every=4))
    for layer, x in enumerate(ffn_inputs(model)):
        by_hand = models.OracleMLP(model.layers[layer].mlp, "gemma" in name, 0, 0, 0)
        (gate, up, down), biases = by_hand.weights, by_hand.biases
        error, whole = [], []
        for block, kept in zip(in_blocks(x), found.masks[layer][0]):
            neurons = np.flatnonzero(kept).tolist()
            dense, sparse = (
                reference.gated_ffn(block, gate, up, down, n, by_hand.act, *biases)
                for n in (None, neurons)
            )
            if selector == "probe":
                sparse[::4] = dense[::4]
            error.append(sparse - dense)
            whole.append(dense)
        wanted = relative(np.stack(error), np.stack(whole))
        assert found.layers[layer].error == pytest.approx(wanted, rel=1e-3)
        assert wanted > 0.05 and found.layers[layer].error_compensated is None


@pytest.mark.parametrize("kind", ["low-rank", "mlp"])
def test_errors_with_a_compensator(kind: str, tmp_path: Path) -> None:
    model = models.tiny("llama")
    save = models.save_random_predictor(model, tmp_path, compensator=kind)
    predictor = load_predictor(save)
    assert predictor.compensator is not None
    found = look(model, engine_for(model, predictor, selector="oracle"))
    plain = look(model, engine_for(model, selector="oracle"))
    for layer, x in enumerate(ffn_inputs(model)):
        by_hand = models.OracleMLP(model.layers[layer].mlp, False, 0, 0, 0)
        gate, up, down = by_hand.weights
        w = {
            k: np.array(v, np.float64)
            for k, v in vars(predictor.compensator.layers[layer]).items()
        }
        error, whole = [], []
        for block, kept in zip(in_blocks(x), found.masks[layer][0]):
            neurons = np.flatnonzero(kept).tolist()
            z = reference.activations(block, gate, up)
            if kind == "low-rank":
                phi = reference.features(block, w["center"], w["v"])
                y = reference.with_guesses(z, phi, w["u"], neurons) @ down.T
            else:
                y = reference.gated_ffn(block, gate, up, down, neurons)
                y += reference.compensator(block, w["w1"], w["w2"], reference.relu)
            error.append(y - z @ down.T)
            whole.append(z @ down.T)
        wanted = relative(np.stack(error), np.stack(whole))
        got = found.layers[layer]
        assert got.error_compensated == pytest.approx(wanted, rel=1e-3)
        assert got.error == pytest.approx(plain.layers[layer].error, rel=1e-5)


# The residual stream


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_errors_of_the_residual_stream(name: str) -> None:
    """Two models, one of which prefills sparsely by itself."""
    model = models.tiny(name)
    found = look(model, engine_for(model, selector="oracle"))
    sparse = models.by_hand(model, name, START, STOP, F // 2)
    for figures, a, b in zip(found.layers, streams(sparse), streams(model)):
        wanted = relative((a - b)[START:STOP], b[START:STOP])
        assert figures.stream_error == pytest.approx(wanted, rel=1e-3)
        assert wanted > 0.02


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("selector", ["probe", "first-block"])
def test_the_rows_are_the_stock_and_the_attached_model(
    name: str, selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a prefill leaves behind are keys and values; in two chunks."""
    for module in (inspection, continuation_module):
        monkeypatch.setattr(module, "CHUNK", 40)
    model, ids = models.tiny(name), tokens(90)
    both, make = [], inspection.make_prompt_cache

    def kept(model: nn.Module) -> Any:
        both.append(make(model))
        return both[0]

    engine = engine_for(model, selector=selector)
    monkeypatch.setattr(inspection, "make_prompt_cache", kept)
    found = inspect(model, ids, engine, None, lambda: None)
    monkeypatch.undo()
    for module in (inspection, continuation_module):
        monkeypatch.setattr(module, "CHUNK", 40)
    stock = make(model)
    continuation_module.prefill(model, ids[:-1], stock)
    attached, cache = attach(model, engine.config), make(model)
    with attached.prompt(90) as tally:
        continuation_module.prefill(model, ids[:-1], cache)
    for row, wanted in enumerate((stock, cache)):
        for two, one in zip(both[0], wanted):
            got = np.array(two.keys[row, :, : two.offset])
            assert models.distance(got, np.array(one.keys[0, :, : one.offset])) < 1e-4
    last = (np.array(c[-1].keys[0, :, : c[-1].offset]) for c in (cache, stock))
    assert models.distance(*last) > 0.01
    assert found.ffn_sparsity == pytest.approx(tally.sparsity)
    assert found.blocks == 9 and len(found.masks[0][0]) == 9


# The ends of the scale


def test_with_all_neurons_nothing_is_lost() -> None:
    model = models.tiny("llama")
    engine = engine_for(model)
    engine.keep = [F, F, F, None]
    for x in look(model, engine).layers:
        assert x.recall == 1 and x.selector.pairs == 1
        assert x.error < 1e-5 and x.stream_error < 1e-5


def test_dense_layers_lose_nothing_at_all() -> None:
    model = models.tiny("llama")
    engine = engine_for(model)
    engine.keep = [None, None, 64, None]
    found = look(model, engine)
    for x in found.layers[:2]:
        assert (x.error, x.stream_error, x.recall, x.kept) == (0, 0, 1, F)
        assert x.selector == Overlap(1, 0, 1, 1)
    assert found.layers[2].kept == 64 and found.layers[2].stream_error > 0.01


def test_the_oracle_has_a_recall_of_one() -> None:
    model = models.tiny("llama")
    found = look(model, engine_for(model, selector="oracle"))
    assert [x.recall for x in found.layers] == [1] * (LAYERS - 1)


def test_nothing_to_read_sparsely() -> None:
    model = models.tiny("llama")
    engine = engine_for(model, block_size=16)
    with pytest.raises(FastForwardError, match="40 tokens, .* less than 48 are read"):
        look(model, engine, 40)
    engine.keep = [None] * LAYERS
    with pytest.raises(FastForwardError, match="no layer of this model"):
        look(model, engine)


def test_nothing_stays_on_the_model() -> None:
    model = models.tiny("llama")
    modules = [m for layer in model.layers for m in (layer, layer.mlp)]
    before = [type(m) for m in modules]

    def stop() -> None:
        raise KeyboardInterrupt

    engine = engine_for(model)
    with pytest.raises(KeyboardInterrupt):
        inspect(model, tokens(), engine, None, stop)
    assert [type(m) for m in modules] == before
    assert engine.call is None and engine.remaining is None


def test_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "CHUNK", 40)
    model, ticks = models.tiny("llama"), []
    engine = engine_for(model)
    inspect(model, tokens(90), engine, None, lambda: ticks.append(1))
    assert len(ticks) == inspection.steps(engine, 90) == 9


# Importances and budgets


def test_budgets_by_importance() -> None:
    model = models.tiny("llama")
    weights = [0.1, 0.2, 0.3, 7.0]  # the last layer takes no part
    found = inspect(model, tokens(), engine_for(model), weights, lambda: None)
    budgets = reference.layerwise(weights[:-1], 0.5)
    assert [x.by_importance for x in found.layers] == [
        round(b * F / 8) * 8 for b in budgets
    ]
    assert [x.importance for x in found.layers] == weights[:-1]
    assert [x.kept for x in found.layers] == [F // 2] * 3


def test_importances_are_measured_on_the_first_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspection, "CHUNK", 40)
    model = models.tiny("llama")
    got = inspection.measured_importances(model, tokens(), BLOCK)
    assert got == inspection.measured_importances(model, tokens()[:40], BLOCK)
    assert got is not None and len(got) == LAYERS and 0 < min(got) < max(got) < 1
    gemma = models.tiny("gemma2")  # spells its attention out
    assert inspection.measured_importances(gemma, tokens(), BLOCK) is None


# The picture


@given(masks())
def test_neurons_are_ordered_by_the_blocks_that_keep_them(kept: np.ndarray) -> None:
    order = ordered(kept)
    assert sorted(order.tolist()) == list(range(kept.shape[1]))
    times = [sum(kept[i][j] for i in range(len(kept))) for j in order]
    assert times == sorted(times, reverse=True)


def test_many_neurons_share_a_column() -> None:
    kept = np.array([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]], bool)
    assert np.allclose(binned(kept, 3), [[1, 0.5, 0], [0.5, 0.5, 1]])
    assert np.allclose(binned(kept, 2), [[1, 0], [1 / 3, 1]])
    assert np.array_equal(binned(kept, 100), kept)


def test_a_picture_without_what_is_unknown(tmp_path: Path) -> None:
    """No importances, no compensator, a single block; a name with letters of TeX."""
    model = models.tiny("llama")
    found = look(model, engine_for(model, block_size=16), 48)
    assert found.blocks == 1 and found.layers[0].importance is None
    picture(tmp_path / "a.png", found, [0], "probe", "a $\\model_")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# The command


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return models.save_folder(models.tiny("llama", vocab=4096), folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Keawe was poor, brave, and active; he could read. " * 12)
    return path


def command(*args: Any) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def said(result: Result, code: int) -> str:
    """The one line on stderr of a command that must fail."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return str(result.stderr)


def test_the_picture_lands_in_this_folder(tiny: Path, text: Path) -> None:
    done = command("--model", tiny, "--file", text, "--block-size", 8)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert [p.name for p in Path().iterdir()] == ["inspect.png"]
    assert Path("inspect.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert done.stdout.endswith("\npicture: inspect.png\n")
    assert max(map(len, done.stdout.splitlines())) <= 250
    rows = [x for x in done.stdout.splitlines() if x.startswith("│")]
    assert len(rows) == LAYERS - 1 and all(len(r) <= 120 for r in rows)
    assert "probe: " in done.stdout and "oracle: " in done.stdout


def test_json(tiny: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "inspect.json"
    args = ["--model", tiny, "--file", text, "--block-size", 8, "--json", file]
    done = command(*args, "--layers", "2,0", "--schedule", "layerwise")
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    assert {"device", "mlx", "mlx_lm", "blas"} <= set(found["environment"])
    settings = found["settings"]
    assert settings["selector"] == "probe" and settings["compensator"] == "none"
    assert settings["importances"] == "this text's" and settings["neurons"] == F
    assert [x["layer"] for x in found["layers"]] == [0, 1, 2]
    for x in found["layers"]:
        assert 0.5 < x["recall"] < 1 and 0 < x["error"] < 1 and x["stream_error"] > 0
        assert x["kept"] == x["by_importance"] and x["error_compensated"] is None
        for key in ("selector", "oracle"):
            assert set(x[key]) == {"in_all", "in_one", "neighbours", "pairs"}
    assert len({x["importance"] for x in found["layers"]}) == 3


def test_an_adapter_beside_the_model_is_used(text: Path, tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "tiny")
    models.save_random_predictor(model, folder, compensator="low-rank")
    args = ["--model", folder, "--file", text, "--block-size", 8, "--json", "a.json"]
    for more, selector, compensated in (
        ([], "trained", True),
        (["--compensator", "none"], "trained", False),
        (["--predictor", "none"], "probe", False),
    ):
        done = command(*args, *more)
        assert done.exit_code == 0, done.output
        found = json.loads(Path("a.json").read_text())
        assert found["settings"]["selector"] == selector
        with_one = [x["error_compensated"] is not None for x in found["layers"]]
        assert with_one == [compensated] * 3


def test_a_text_longer_than_the_context_is_cut(text: Path, tmp_path: Path) -> None:
    model = models.tiny("qwen3", vocab=4096)
    folder = models.save_folder(model, tmp_path / "qwen3", max_position_embeddings=64)
    done = command("--model", folder, "--file", text, "--block-size", 8)
    assert done.exit_code == 0, done.output
    assert "the model was made for 64: only those are read." in done.stderr
    assert "tokens 64, " in done.stdout


@pytest.mark.parametrize(
    "args, code, line",
    [
        (["--png", "a.jpg"], 2, "--png must be a file ending in .png, got a.jpg."),
        (["--png", "no/a.png"], 1, "no/a.png cannot be written: no such folder"),
        (["--png", "folder.png"], 1, "folder.png cannot be written: it is a folder"),
        (["--json", "no/a.json"], 1, "no/a.json cannot be written: no such folder"),
        (["--layers", "0,3"], 2, "--layers: expected 0 to 2, got 3; the last layer"),
        (["--layers", "-1"], 2, "--layers must be at least 0, got '-1'"),
        (["--layers", "first"], 2, "--layers must be numbers with commas"),
        (["--sparsity", "0"], 2, "--sparsity 0 drops nothing"),
        (["--sparsity", "1"], 2, "sparsity must be at least 0 and below 1"),
        (["--dtype", "int8"], 2, "--dtype must be float32, float16 or bfloat16"),
        (["--selector", "magic"], 2, "selector must be one of "),
        (["--selector", "trained"], 2, "selector trained needs a predictor"),
        (["--compensator", "mlp"], 2, "compensator mlp needs a predictor"),
        (["--block-size", "4"], 2, "block_size must be at least 8"),
        (["--block-size", "128"], 1, "tokens, and prompts of less than 512 are read"),
        (["--file", "none.txt"], 1, "none.txt does not exist"),
    ],
)
def test_refusals(
    args: list[str], code: int, line: str, tiny: Path, text: Path
) -> None:
    Path("folder.png").mkdir()
    usual = ["--model", tiny, "--file", text, "--block-size", 8]
    assert line in said(command(*usual, *args), code)
    assert [p.name for p in Path().iterdir()] == ["folder.png"]


def test_importances_that_cannot_be_measured(text: Path, tmp_path: Path) -> None:
    folder = models.save_folder(models.tiny("gemma2", vocab=4096), tmp_path / "gemma2")
    usual = ["--model", folder, "--file", text, "--block-size", 8]
    done = command(*usual, "--schedule", "layerwise")
    assert "importances of this model cannot be measured" in said(done, 2)
    done = command(*usual)
    assert done.exit_code == 0 and "importances none" in done.stdout, done.output


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_fastforward.bench.inspect import picture

    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspection_picture, "picture", full)
    Path("inspect.png").write_bytes(b"old")
    done = command("--model", tiny, "--file", text, "--block-size", 8)
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "inspect.png cannot be written: No space left on device.\n"
    )
    assert [p.name for p in Path().iterdir()] == ["inspect.png"]
    assert Path("inspect.png").read_bytes() == b"old"
