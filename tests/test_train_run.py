"""Whole runs on tiny models: what they make of which settings, stopped anywhere and gone on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from training import (
    BLOCK,
    FIRST,
    LAYERS,
    LENGTH,
    MLP,
    SEQUENTIAL,
    SMALL,
    D,
    F,
    Patch,
    Stop,
    assert_same,
    bundled,
    curve_of,
    fresh,
    prepared,
    short,
    stop,
    tensors_of,
)

from mlx_fastforward import PredictorError, attach, load_predictor
from mlx_fastforward.attachment import reading
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.train import descent, estimate
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train.capture import capture
from mlx_fastforward.train.run import WORK
from mlx_fastforward.train.state import Settings

Whole = Callable[[Settings], dict[str, mx.array]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The tensors of a run that nothing stopped, made once."""
    known: dict[Settings, dict[str, mx.array]] = {}

    def tensors(settings: Settings) -> dict[str, mx.array]:
        if settings not in known:
            out = tmp_path_factory.mktemp("whole")
            prepared(out, settings)()
            known[settings] = tensors_of(out)
        return known[settings]

    return tensors


@pytest.mark.parametrize(
    "name, kind, compensator, sequential, dtype, bits",
    [
        ("llama", "token-wise", "low-rank", False, mx.float16, 8),
        ("phi3", "pooled", "mlp", True, mx.bfloat16, 0),
        ("gemma3", "token-wise", "none", True, mx.float32, 0),
    ],
)
def test_a_predictor_of_every_kind(
    name: str,
    kind: str,
    compensator: str,
    sequential: bool,
    dtype: mx.Dtype,
    bits: int,
    tmp_path: Path,
) -> None:
    """It loads, has the model's dtype, fits the model, quantised or not, and runs."""
    model, pooled = fresh(name, dtype), kind == "pooled"
    if bits:
        nn.quantize(model, 32, bits)
    asked = replace(SMALL, kind=kind, compensator=compensator, sequential=sequential)
    asked = replace(asked, rank=6, compensator_rank=3)
    made = prepared(tmp_path, asked, model=model)()["calibration"]
    model, file = fresh(name, dtype), load_predictor(tmp_path)
    file.check(BaseModel.of(model))
    found = "none" if file.compensator is None else file.compensator.name
    assert found == compensator and len(made["from_dense"]) == 2 + (found != "none")
    removed = made["error_removed"]
    assert len(removed) == 3 * (found != "none")
    assert all(e > 0 for e in removed) or not bits
    dtypes = {t.dtype for n, t in tensors_of(tmp_path).items() if n != "importance"}
    assert dtypes == {dtype}
    assert file.layers is not None and len(file.layers) == LAYERS
    for weights in file.layers:
        assert (weights.query is not None) == pooled == (weights.bias is None)
        assert weights.w1.shape == (D, 6)
        assert weights.w2.shape == ((6 if pooled else 12), F)
    assert file.importances is not None and len(file.importances) == LAYERS
    assert all(0 < s <= 1 for s in file.importances)
    attach(model, models.settings(selector="trained"), predictor=file)
    ids = mx.array([models.token_ids(60)])
    with reading(model, 60) as prompt:
        sparse = model(ids)
    assert prompt.flops.sparsity > 0.1
    assert not mx.array_equal(sparse, fresh(name, dtype)(ids))


def unequal() -> nn.Module:
    """The second layer wider than the others, and the last one, which is not fitted, wider still."""
    model = models.tiny("llama", vocab=4096, wide=160)
    wider = models.tiny("llama", 1, vocab=4096, wide=192)
    model.layers[-1].mlp = wider.layers[1].mlp
    return model


@pytest.mark.parametrize(
    "kind, compensator, steps, least",
    [("token-wise", "low-rank", 40, 0.55), ("pooled", "mlp", 8, 0.45)],
)
def test_layers_of_several_widths(
    kind: str, compensator: str, steps: int, least: float, tmp_path: Path
) -> None:
    """Each layer's predictor is for its own neurons, and learns which."""
    asked = replace(SMALL, kind=kind, compensator=compensator, steps=steps)
    run = prepared(tmp_path, asked, model=unequal())
    assert sum(estimate.seconds(run).values()) > 0
    found = run()["calibration"]
    widths = [F, 160, F, 192]
    model, file = unequal(), load_predictor(tmp_path)
    file.check(BaseModel.of(model))
    assert file.layers is not None
    assert [w.w2.shape[1] for w in file.layers] == widths
    assert len(found["recall"]) == 3 and min(found["recall"]) > least
    engine = attach(model, models.settings(selector="trained"), predictor=file)
    assert engine.keep == [F // 2, 80, F // 2, None]
    with reading(model, 60) as prompt:
        mx.eval(model(mx.array([models.token_ids(60)])))
    assert prompt.flops.sparsity > 0.1


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    made = prepared(tmp_path, replace(MLP, seed=3, data="/home/me/a.txt"))()
    info = load_predictor(tmp_path).details
    assert len(info.pop("sha256")) == 64 and made | {"format": 1} == info
    assert info["base_model"]["name"] == "tiny" and info["block_size"] == BLOCK
    assert info["predictor"] == {"kind": "token-wise", "rank": 8}
    wanted = {"kind": "mlp", "rank": 4, "activation": "silu"}
    assert info["compensator"] == wanted and info["settings"]["seed"] == 3
    assert info["settings"]["data"] == "a.txt"  # figures are shared, paths are not
    found = info["calibration"]
    assert 400 <= found["tokens"] < 400 + LENGTH
    assert len(found["recall"]) == len(found["error_removed"]) == LAYERS - 1
    arms = ["oracle", "predictor", "predictor and compensator"]
    assert list(found["from_dense"]) == arms
    told = json.loads((tmp_path / "report.json").read_text())
    assert told.pop("importance") == load_predictor(tmp_path).importances
    curve = told.pop("descents")["dense"]
    assert [step for step, _, _ in curve] == list(range(1, 9)) and told == made


def test_the_phases_and_their_ticks(tmp_path: Path) -> None:
    ticks: dict[str, list[tuple[float, float]]] = {}

    def tick(phase: str, done: float, total: float, details: str) -> None:
        ticks.setdefault(phase, []).append((done, total))

    prepared(tmp_path, SEQUENTIAL, tick)()
    whats = ("capture", "predictors", "compensators")
    stages = [f"{what} {stage}" for stage in ("dense", "sparse") for what in whats]
    last = ["importances", "curves", "judgement"]
    assert list(ticks) == ["capture held-out", *stages, *last]
    for phase, seen in ticks.items():
        done = [d for d, _ in seen]
        assert done == sorted(done) and len({t for _, t in seen}) == 1, phase
        assert done[-1] >= seen[-1][1] or phase == "judgement", phase


def test_training_helps(tmp_path: Path) -> None:
    """On held-out text: recall rises from a half, and part of the error is removed."""
    found = prepared(tmp_path, replace(SMALL, tokens=1600, steps=70))()["calibration"]
    recalls = [recall for _, _, recall in curve_of(tmp_path)]
    assert recalls[-1] > 0.6 and recalls[-1] > recalls[0] + 0.05
    assert np.mean(found["recall"]) > 0.6 and np.mean(found["error_removed"]) > 0.1


def test_a_sparse_stage_is_captured_below_sparse_layers(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """The sequences after the dense ones, as many; only the first layer's inputs are dense."""
    fitted, real = [], run_module.Batches

    def batches(sequences: Any, *args: Any, **more: Any) -> Any:
        fitted.append({store.folder.name for store, _ in sequences})
        return real(sequences, *args, **more)

    monkeypatch.setattr(run_module, "Batches", batches)
    stop(tmp_path, SEQUENTIAL, "importances")
    assert fitted[0] == {"dense"} and fitted[2] == {"dense", "sparse"}
    run = prepared(tmp_path, SEQUENTIAL)
    first = run.state.captured["dense"]
    number = run.store("sparse").numbers(2)[0]
    dense, _ = capture(fresh(), bundled()[0][first + number], BLOCK, "relative")
    x, _ = run.store("sparse").load(number)
    assert x.shape == dense.shape and np.array_equal(x[0], np.array(dense[0]))
    assert not np.array_equal(x[1], np.array(dense[1]))
    for stage in ("dense", "sparse"):
        assert 200 <= run.state.tokens[stage] < 200 + LENGTH


def test_the_seed_makes_the_predictor(tmp_path: Path, whole: Whole) -> None:
    """The same one from the same seed; and an unfinished run keeps the one that is there."""
    prepared(tmp_path)()
    assert_same(tmp_path, whole(SMALL))
    other = replace(SMALL, seed=1)
    stop(tmp_path, other, "judgement")
    assert mx.array_equal(tensors_of(tmp_path)[FIRST], whole(SMALL)[FIRST])
    prepared(tmp_path, other)()
    assert not mx.array_equal(tensors_of(tmp_path)[FIRST], whole(SMALL)[FIRST])


SAVED, UNSAVED = -1.0, descent.INTERVAL  # at every step, and never before the end


@pytest.mark.parametrize(
    "settings, phase, count, interval",
    [
        (SMALL, "capture held-out", 1, UNSAVED),
        (SMALL, "capture dense", 3, UNSAVED),
        (SMALL, "predictors dense", 3, SAVED),
        (SMALL, "judgement", 1, UNSAVED),
        (MLP, "compensators dense", 30, SAVED),
        (SEQUENTIAL, "capture sparse", 2, UNSAVED),
        (SEQUENTIAL, "predictors sparse", 2, SAVED),
        (SEQUENTIAL, "compensators sparse", 2, UNSAVED),
    ],
)
def test_a_run_that_is_stopped_goes_on(
    settings: Settings,
    phase: str,
    count: int,
    interval: float,
    tmp_path: Path,
    whole: Whole,
    monkeypatch: Patch,
) -> None:
    wanted = whole(settings)
    monkeypatch.setattr(descent, "INTERVAL", interval)
    stop(tmp_path, settings, phase, count)
    assert [p.name for p in tmp_path.iterdir()] == [WORK]
    ticked: set[str] = set()
    prepared(tmp_path, settings, lambda p, *_: ticked.add(p))()
    assert_same(tmp_path, wanted)
    assert "capture held-out" not in ticked or phase == "capture held-out"
    assert "capture dense" not in ticked or phase.startswith("capture")


@pytest.mark.parametrize(
    "what, count", [("x", 3), ("norms", 3), ("state", 3), ("predictors-dense", 1)]
)
def test_a_crash_while_something_is_written(
    what: str, count: int, tmp_path: Path, whole: Whole, monkeypatch: Patch
) -> None:
    """Such a file is half written for the ``count``-th time; it does not count."""
    real, files = Path.replace, []

    def replaced(half: Path, path: Path) -> Any:
        files.append(path.name.split(".")[-2])
        if files.count(what) == count:
            half.write_bytes(half.read_bytes()[:100])
            raise Stop
        return real(half, path)

    wanted = whole(SMALL)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "replace", replaced)
        prepared(tmp_path)()
    prepared(tmp_path)()
    assert_same(tmp_path, wanted)


CHANGED: dict[str, Any] = dict(tokens=500, steps=9, kind="pooled", score="plain")
CHANGED |= dict(rank=9, compensator="none", sequential=True, seed=1, minutes=5.0)


def test_other_settings_and_models_do_not_go_on(tmp_path: Path) -> None:
    prepared(tmp_path).state.save("capture dense")
    for name, value in {**CHANGED, "data": "other.txt"}.items():
        with pytest.raises(PredictorError) as e:
            prepared(tmp_path, replace(SMALL, **{name: value}))()
        text = str(e.value)
        assert f"with other settings ({name}); " in text and "--restart" in text
    with pytest.raises(PredictorError, match=r"other settings \(fingerprint\)"):
        prepared(tmp_path, model=fresh(seed=4))()
    assert "capture dense" in prepared(tmp_path).state.seconds


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    for text in ("", "[]", "null", '{"a": 1}', '{"asked": {}, "folder": "/"}', "\xff"):
        (tmp_path / WORK / "state.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(PredictorError) as e:
            prepared(tmp_path)()
        line = str(e.value)
        assert "\n" not in line and str(tmp_path / WORK) in line
