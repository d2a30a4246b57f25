"""What inspect says of a model, against the definitions; its picture; and the command."""

import itertools
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mlx_fastforward import load_predictor, prefill
from mlx_fastforward.attachment import reading, seated, watched
from mlx_fastforward.bench.inspect import inspection
from mlx_fastforward.bench.inspect import picture as drawing
from mlx_fastforward.bench.inspect.inspection import Inspection, Overlap, inspect
from mlx_fastforward.bench.inspect.picture import binned, ordered
from mlx_fastforward.build import engine_for
from mlx_fastforward.cli import app
from mlx_fastforward.engine import Engine
from mlx_fastforward.errors import FastForwardError

F, LAYERS, BLOCK = models.FFN, models.LAYERS, models.BLOCK
TOKENS, START, STOP = 56, 8, 48  # a dense head of 8, 5 blocks of 8, a tail of 8


def tokens(n: int = TOKENS) -> mx.array:
    return mx.array(models.token_ids(n))


def made(model: nn.Module, **settings: Any) -> Engine:
    return engine_for(model, models.settings(**settings))


def look(model: nn.Module, engine: Engine, n: int = TOKENS) -> Inspection:
    return inspect(model, tokens(n), engine, None, lambda: None)


def inputs_of(model: nn.Module, part: str) -> list[np.ndarray]:
    """What this part of every layer sees of the prompt, (tokens, d)."""
    found = []

    def around(i: int, own: Any, x: mx.array, *rest: Any) -> mx.array:
        found.append(models.float64(x[0]))
        return own(x, *rest)

    with watched([getattr(layer, part) for layer in model.layers], around):
        model(tokens()[None, :-1])
    return found


def relative(error: np.ndarray, whole: np.ndarray) -> float:
    return float(np.sqrt((error**2).sum() / (whole**2).sum()))


@given(st.integers(2, 6), st.integers(2, 12), st.floats(0, 1), st.integers(0, 2**32))
def test_overlap_is_that_of_the_sets(n: int, f: int, share: float, seed: int) -> None:
    """And the picture's neurons begin with those that most blocks keep."""
    rng, keep = np.random.default_rng(seed), 1 + int(share * (f - 1))
    sets = [set(rng.choice(f, keep, replace=False).tolist()) for _ in range(n)]
    kept = np.array([[j in s for j in range(f)] for s in sets])
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    near = [len(a & b) / len(a | b) for a, b in zip(sets, sets[1:])]
    times = [sum(j in s for s in sets) for j in range(f)]
    wanted = [times.count(n) / f, times.count(1) / f, np.mean(near), np.mean(pairs)]
    assert astuple(Overlap.of(kept)) == pytest.approx(tuple(wanted), rel=1e-5)
    assert Overlap.of(kept[:1]) == Overlap(keep / f, keep / f, None, None)
    order = ordered(kept).tolist()
    assert sorted(order) == list(range(f))
    assert [times[j] for j in order] == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "name, selector, kind",
    [
        ("llama-bias-sliding", "first-block", None),
        ("phi3", "probe", None),
        ("gemma3", "oracle", None),
        ("llama", "oracle", "low-rank"),
        ("llama", "oracle", "mlp"),
    ],
)
def test_neurons_and_errors_of_the_ffns(
    name: str, selector: str, kind: Optional[str], tmp_path: Path
) -> None:
    """From the dense model's inputs; a block's first token is a probe's exact one."""
    model, side = models.tiny(name), None
    if kind:
        save = models.save_random_predictor(model, tmp_path, compensator=kind)
        side = load_predictor(save)
    engine = engine_for(model, models.settings(selector=selector), side)
    found = look(model, engine)
    assert (found.tokens, found.blocks) == (TOKENS, 5)
    for i, (x, figures) in enumerate(zip(inputs_of(model, "mlp"), found.layers)):
        own = models.OracleMLP(model.layers[i].mlp, "gemma" in name, 0, 0, 0)
        (gate, up, down), biases = own.weights, own.biases

        def best(block: np.ndarray) -> list[int]:
            z = reference.activations(block, gate, up, own.act, *biases)
            return reference.top_k(reference.weighted(z, down), F // 2)

        def ffn(block: np.ndarray, kept: Optional[list[int]]) -> np.ndarray:
            return reference.gated_ffn(block, gate, up, down, kept, own.act, *biases)

        def compensated(block: np.ndarray, kept: list[int]) -> np.ndarray:
            w: Any = engine.compensator and vars(engine.compensator.layers[i]).values()
            w1, w2, *rest = map(models.float64, w)
            if kind == "mlp":
                added = reference.compensator(block, w1, w2, reference.relu)
                return ffn(block, kept) + added
            z = reference.activations(block, gate, up)
            phi = reference.features(block, w1, w2)
            return reference.with_guesses(z, phi, rest[0], kept) @ down.T

        blocks, masks = x[START:STOP].reshape(5, BLOCK, -1), found.masks[i]
        picked, oracle = ([np.flatnonzero(m).tolist() for m in both] for both in masks)
        head = [best(x[:START])] * 5
        assert oracle == list(map(best, blocks))
        assert picked == {"oracle": oracle, "first-block": head}.get(selector, picked)
        recall = [len({*a} & {*b}) / (F // 2) for a, b in zip(picked, oracle)]
        assert figures.recall == pytest.approx(np.mean(recall))
        assert (figures.neurons, figures.kept) == (F, F // 2)
        assert (figures.selector, figures.oracle) == tuple(map(Overlap.of, masks))
        whole = np.stack([ffn(block, None) for block in blocks])
        error = np.stack(list(map(ffn, blocks, picked))) - whole
        if selector == "probe":
            error[:, 0] = 0
        wanted: Any = pytest.approx(relative(error, whole), rel=1e-3)
        assert figures.error == wanted and figures.error > 0.05
        wanted = None
        if kind:
            error = np.stack(list(map(compensated, blocks, picked))) - whole
            wanted = pytest.approx(relative(error, whole), rel=1e-3)
        assert figures.error_compensated == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_errors_of_the_residual_stream(name: str) -> None:
    """Two models, one of which prefills sparsely by itself; the next layer's norm sees it."""
    model = models.tiny(name)
    found = look(model, made(model, selector="oracle"))
    sparse = models.by_hand(model, name, START, STOP, F // 2)
    both = [inputs_of(m, "input_layernorm")[1:] for m in (sparse, model)]
    for figures, a, b in zip(found.layers, *both):
        wanted = relative((a - b)[START:STOP], b[START:STOP])
        assert figures.stream_error == pytest.approx(wanted, rel=1e-3) and wanted > 0.02


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 tokens."""
    monkeypatch.setattr(inspection, "CHUNK", 40)
    monkeypatch.setattr(prefill, "CHUNK", 40)


@pytest.mark.parametrize(
    "name, selector", [("qwen3", "probe"), ("gemma3", "first-block")]
)
def test_the_rows_are_the_stock_and_the_attached_model(
    name: str, selector: str, chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a prefill leaves behind are keys and values; in three chunks."""
    model, ids, ticks = models.tiny(name), tokens(90), []
    engine, make = made(model, selector=selector), inspection.make_prompt_cache
    both, stock, sparse = make(model), make(model), make(model)
    monkeypatch.setattr(inspection, "make_prompt_cache", lambda _: both)
    found = inspect(model, ids, engine, None, lambda: ticks.append(1))
    prefill.prefill(model, ids[:-1], stock)
    with seated(model, engine), reading(model, 90) as prompt:
        prefill.prefill(model, ids[:-1], sparse)
    for row, alone in enumerate((stock, sparse)):
        for two, one in zip(both, alone):
            a, b = (np.array(c.keys[:, :, : c.offset]) for c in (two, one))
            assert models.distance(a[row], b[0]) < 1e-4
    assert models.distance(*(np.array(c[-1].keys[0]) for c in (sparse, stock))) > 0.01
    assert found.ffn_sparsity == pytest.approx(prompt.flops.sparsity)
    assert found.blocks == 9 and len(found.masks[0][0]) == 9
    assert len(ticks) == inspection.steps(engine, 90) == 9


def test_the_ends_of_the_scale() -> None:
    """With all neurons nothing is lost but by rounding; dense layers lose nothing at all."""
    model = models.tiny("llama")
    engine = made(model)
    engine.keep = [F, F, F, None]
    for x in look(model, engine).layers:
        assert x.recall == 1 and x.selector.pairs == 1
        assert x.error < 1e-5 and x.stream_error < 1e-5
    engine.keep = [None, None, 64, None]
    found = look(model, engine)
    for x in found.layers[:2]:
        assert (x.error, x.stream_error, x.recall, x.kept) == (0, 0, 1, F)
        assert x.selector == Overlap(1, 0, 1, 1)
    assert found.layers[2].kept == 64 and found.layers[2].stream_error > 0.01


def test_nothing_stays_on_a_model_and_a_dense_one_is_refused() -> None:
    model = models.tiny("llama")
    engine = made(model)
    modules = [m for layer in model.layers for m in (layer, layer.mlp)]
    before = [type(m) for m in modules]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect(model, tokens(), engine, None, stop)
    assert [type(m) for m in modules] == before
    engine.keep = [None] * LAYERS
    with pytest.raises(FastForwardError, match="no layer of this model"):
        look(model, engine)


def test_budgets_by_importance() -> None:
    model = models.tiny("llama")
    weights = [0.1, 0.2, 3.0, 7.0]  # the last layer takes no part
    found = inspect(model, tokens(), made(model), weights, lambda: None)
    budgets = reference.layerwise(weights[:-1], 0.5)
    wanted = [round(b * F / 8) * 8 for b in budgets]
    assert [x.by_importance for x in found.layers] == wanted
    assert [x.importance for x in found.layers] == weights[:-1]
    assert [x.kept for x in found.layers] == [F // 2] * 3


def test_importances_are_measured_on_the_first_chunk(chunks: None) -> None:
    model = models.tiny("llama")
    got = inspection.measured_importances(model, tokens(), BLOCK)
    assert got == inspection.measured_importances(model, tokens()[:40], BLOCK)
    assert got is not None and len(got) == LAYERS and 0 < min(got) < max(got) < 1


def test_many_neurons_share_a_column() -> None:
    kept = np.array([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]], bool)
    assert np.allclose(binned(kept, 3), [[1, 0.5, 0], [0.5, 0.5, 1]])
    assert np.allclose(binned(kept, 2), [[1, 0], [1 / 3, 1]])
    assert np.array_equal(binned(kept, 100), kept)


def test_a_picture_without_what_is_unknown(tmp_path: Path) -> None:
    """No importances, no compensator, a single block; a name with letters of TeX."""
    model = models.tiny("llama")
    found = look(model, made(model, block_size=16), 48)
    assert found.blocks == 1 and found.layers[0].importance is None
    drawing.picture(tmp_path / "a.png", found, [0], "probe", "a $\\model_")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a text beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = "Keawe was poor, brave, and active; he could read. " * 12
    (tmp_path / "text.txt").write_text(words)
    return tmp_path / "here"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(drawing, "picture", lambda path, *_: path.write_bytes(b"drawn"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return models.save_folder(models.tiny("llama", vocab=4096), folder)


def command(model: Path, *args: Any) -> Result:
    usual = ["--model", model, "--file", "../text.txt", "--block-size", 8]
    return CliRunner().invoke(app, ["inspect", *map(str, [*usual, *args])])


def test_the_picture_lands_in_this_folder(
    tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [0.5, 1.0, 3.0, 1.0]
    monkeypatch.setattr(inspection, "measured_importances", lambda *_: weights)
    more = ["--layers", "2,0", "--schedule", "layerwise"]
    done = command(tiny, "--json", "../a.json", *more)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert [p.name for p in here.iterdir()] == ["inspect.png"]
    assert Path("inspect.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert done.stdout.endswith("\npicture: inspect.png\n")
    lines = done.stdout.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("layer  imp"))
    rows = [line.split()[0] for line in lines[head + 1 : head + LAYERS]]
    assert rows == [str(i) for i in range(LAYERS - 1)]
    assert "probe: " in done.stdout and "oracle: " in done.stdout
    text = Path("../a.json").read_text()
    assert str(here.parent) not in text
    found = json.loads(text)
    wanted = {"selector": "probe", "compensator": "none", "importances": "this text's"}
    assert wanted.items() <= found["settings"].items() and found["environment"]
    assert [x["layer"] for x in found["layers"]] == [0, 1, 2]
    assert [x["importance"] for x in found["layers"]] == weights[:3]
    assert [x["kept"] for x in found["layers"]] == [24, 40, F]
    for x in found["layers"][:2]:
        assert 0.3 < x["recall"] < 1 and 0 < x["error"] < 1 and x["stream_error"] > 0
        assert x["kept"] == x["by_importance"] and x["error_compensated"] is None


def test_a_predictor_beside_the_model_is_used(here: Path, undrawn: None) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, here / "tiny")
    models.save_random_predictor(model, folder, compensator="low-rank")
    done = command(folder, "--json", "a.json")
    assert done.exit_code == 0, done.output
    found = json.loads(Path("a.json").read_text())
    assert found["settings"]["selector"] == "trained"
    assert None not in [x["error_compensated"] for x in found["layers"]]


def test_a_text_longer_than_the_context_is_cut(here: Path, undrawn: None) -> None:
    model = models.tiny("qwen3", vocab=4096)
    folder = models.save_folder(model, here / "qwen3", max_position_embeddings=64)
    done = command(folder)
    assert done.exit_code == 0, done.output
    assert "the model was made for 64: only those are read." in done.stderr
    assert "tokens 64, " in done.stdout


def test_importances_that_cannot_be_measured(here: Path, undrawn: None) -> None:
    """Gemma 2 spells its attention out."""
    folder = models.save_folder(models.tiny("gemma2", vocab=4096), here / "gemma2")
    done = command(folder, "--schedule", "layerwise")
    assert "importances of this model cannot be measured" in done.stderr
    assert (done.exit_code, done.stdout) == (2, "")
    done = command(folder)
    assert done.exit_code == 0 and "importances none" in done.stdout, done.output


@pytest.mark.parametrize(
    "args, code, line",
    [
        (["--layers", "0,3"], 2, "--layers: expected 0 to 2, got 3; the last layer"),
        (["--layers", "first"], 2, "--layers must be numbers with commas"),
        (["--sparsity", "0"], 2, "--sparsity 0 drops nothing"),
        (["--selector", "trained"], 2, "selector trained needs a predictor"),
        (["--block-size", "128"], 1, "tokens, and prompts of less than 512 are read"),
    ],
)
def test_refusals(
    args: list[str], code: int, line: str, tiny: Path, here: Path, undrawn: None
) -> None:
    done = command(tiny, *args)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert line in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(
    tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing, "picture", full)
    Path("inspect.png").write_bytes(b"old")
    done = command(tiny)
    message = "inspect.png cannot be written: No space left on device.\n"
    assert done.exit_code == 1 and done.stderr.endswith(message)
    assert [p.read_bytes() for p in here.iterdir()] == [b"old"]
