"""Whole runs on tiny models: what they make of which settings, stopped anywhere and gone on."""

import functools
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest

from mlx_fastforward import PredictorError, attach, load_predictor
from mlx_fastforward.attachment import reading
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.train import curves, descent, estimate, quality, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train import state as state_module
from mlx_fastforward.train.capture import capture
from mlx_fastforward.train.data import BUNDLED, Corpus, Sequences
from mlx_fastforward.train.run import WORK, Run, Tick
from mlx_fastforward.train.state import Settings, State

BLOCK, D, F, LAYERS = models.BLOCK, models.HIDDEN, models.FFN, models.LAYERS
LENGTH = 72
FILES = ["fastforward.json", "fastforward.safetensors", "report.json", "report.png"]
SMALL = Settings(tokens=400, length=LENGTH, steps=8, block_size=BLOCK)
SEQUENTIAL = replace(SMALL, sequential=True)
MLP = replace(SMALL, compensator="mlp")
FIRST = "layers.0.predictor.w1"
SEEDS = itertools.count(77)
Parts = tuple[Sequences, Sequences]
Patch = pytest.MonkeyPatch


class Stop(BaseException):
    """What ends a process."""


@pytest.fixture(autouse=True)
def short(monkeypatch: Patch) -> None:
    """Few and short sequences to judge on, and no picture: matplotlib takes longest."""
    monkeypatch.setattr(quality, "SHORTEST", 40)
    monkeypatch.setattr(quality, "TOKENS", 8)
    monkeypatch.setattr(curves, "TOKENS", 8)
    few_held_out(2, monkeypatch)
    monkeypatch.setattr(run_module, "IMPORTANCE_SAMPLES", 1)
    monkeypatch.setattr(report, "picture", lambda path, found: path.write_bytes(b""))


def few_held_out(n: int, monkeypatch: Patch) -> None:
    for module in (state_module, run_module, estimate):
        monkeypatch.setattr(module, "HELD_OUT", n)


def parts_of(path: Path) -> Parts:
    corpus, tokenizer = Corpus([path]), models.demo_tokenizer()
    return (
        Sequences(corpus, tokenizer, LENGTH),
        Sequences(corpus, tokenizer, LENGTH, held_out=True),
    )


def lines_of(path: Path, lengths: list[int]) -> Parts:
    """Texts of so many words, in order."""
    entries = ({"text": "word " * n} for n in lengths)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    parts = parts_of(path)
    for part in parts:
        part.lines.sort(key=lambda place: place.start)
    return parts


@functools.cache
def bundled() -> Parts:
    return parts_of(BUNDLED)


def fresh(name: str = "llama", dtype: mx.Dtype = mx.float32, **more: Any) -> nn.Module:
    model = models.tiny(name, vocab=4096, **more)
    model.set_dtype(dtype)
    return model


def prepared(
    out: Path,
    settings: Settings = SMALL,
    tick: Tick = lambda *args: None,
    model: Optional[nn.Module] = None,
    parts: Optional[Parts] = None,
) -> Run:
    """A run, as a process of its own would begin or resume it."""
    mx.random.seed(next(SEEDS))
    return Run(model or fresh(), "tiny", parts or bundled(), out, settings, tick)


def stop(out: Path, settings: Settings, phase: str, count: int = 1) -> None:
    """Begin a run that ends at the ``count``-th tick of a phase."""
    seen: list[str] = []

    def tick(name: str, done: float, total: float, details: str) -> None:
        seen.append(name)
        if seen.count(phase) == count:
            raise Stop

    with pytest.raises(Stop):
        prepared(out, settings, tick)()


def tensors_of(out: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(out / FILES[1]))
    assert isinstance(tensors, dict)
    return tensors


def assert_same(out: Path, wanted: dict[str, mx.array]) -> None:
    """Bit by bit, and nothing is left behind."""
    got = tensors_of(out)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert mx.array_equal(got[name], tensor), name
    assert sorted(p.name for p in out.iterdir()) == FILES


def curve_of(out: Path) -> list[list[float]]:
    """(step, loss, recall) of the dense stage, from the report."""
    descents = json.loads((out / "report.json").read_text())["descents"]
    return list(descents["dense"])


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


def test_time_is_counted_over_all_sittings(tmp_path: Path) -> None:
    """Once."""
    start, asked = time.perf_counter(), {"a": 1}
    State.resumed(tmp_path, asked).save("capture dense")
    again = State.resumed(tmp_path, asked)
    once = again.seconds["capture dense"]
    time.sleep(0.05)
    again.save("capture dense")
    again.save("predictors")
    assert again.seconds["capture dense"] > once + 0.05 and once > 0
    assert set(again.seconds) == {"capture dense", "predictors"}
    assert sum(again.seconds.values()) < time.perf_counter() - start


def test_minutes_cut_everything_short(tmp_path: Path) -> None:
    """Next to none of them: two sequences of each kind, twenty steps; plenty change nothing."""
    settings = replace(SMALL, tokens=10**6, steps=10**6, minutes=1e-7)
    found = prepared(tmp_path / "a", settings)()
    assert found["calibration"]["tokens"] <= 3 * LENGTH
    assert curve_of(tmp_path / "a")[-1][0] == 20
    load_predictor(tmp_path / "a").check(BaseModel.of(fresh()))
    free = prepared(tmp_path / "b")()
    limited = prepared(tmp_path / "c", replace(SMALL, minutes=1e6))()
    assert curve_of(tmp_path / "b") == curve_of(tmp_path / "c")
    assert limited["calibration"]["tokens"] == free["calibration"]["tokens"]


def test_steps_of_a_limited_run_are_those_it_began_with(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """However fast the machine is when it goes on."""
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    settings = replace(SMALL, minutes=10.0, steps=500)
    speed = [run_module.PREDICTORS * 600 / 30]
    monkeypatch.setattr(Run, "step_seconds", lambda self: speed[0])
    stop(tmp_path, settings, "predictors dense", 5)
    speed[0] *= 10
    prepared(tmp_path, settings)()
    assert curve_of(tmp_path)[-1][0] == 30


@pytest.mark.parametrize(
    "lengths, settings",
    [
        ([2 if i % 20 == 0 else 60 for i in range(60)], SMALL),
        ([60] * 2 + [3] * 90, replace(SEQUENTIAL, tokens=300)),
        ([60] * 2 + [3] * 90, replace(SEQUENTIAL, tokens=300, compensator="mlp")),
    ],
    ids=["no held-out block", "no sparse block", "and an mlp"],
)
def test_little_text_will_do(
    lengths: list[int], settings: Settings, tmp_path: Path
) -> None:
    """Judged on what was fitted on where there is no other; no number is out of bounds."""
    parts = lines_of(tmp_path / "a.jsonl", lengths)
    found = prepared(tmp_path / "out", settings, parts=parts)()["calibration"]
    assert all(0 < r <= 1 for r in found["recall"])
    assert all(e < 1 for e in found["error_removed"])
    assert load_predictor(tmp_path / "out").layers


def test_texts_that_fill_no_block_will_not(tmp_path: Path) -> None:
    told = {2: "no sequence fills a block of 8 tokens; ", 0: "the data holds no text "}
    for words, message in told.items():
        parts = lines_of(tmp_path / "a.jsonl", [words] * 40)
        with pytest.raises(PredictorError, match=f"^{message}"):
            prepared(tmp_path / f"out{words}", parts=parts)()


@pytest.mark.parametrize("tokens", [2200, 500])
def test_the_disk_that_is_announced_is_what_it_takes(
    tokens: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    few_held_out(3, monkeypatch)
    for part in bundled():
        monkeypatch.setattr(part, "kinds", ("prose",))
    settings, base = replace(SMALL, tokens=tokens), BaseModel.of(fresh())
    stop(tmp_path, settings, "predictors dense")
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*.npy"))
    assert estimate.disk(base, settings) == pytest.approx(stored, rel=0.06)
    here = estimate.free_disk(tmp_path)
    assert estimate.free_disk(tmp_path / "a" / "b") == pytest.approx(here, rel=0.01)


def test_tokens_memory_and_ranks_follow_the_model() -> None:
    base, settings = BaseModel.of(fresh()), SMALL.with_ranks(D)
    assert estimate.default_tokens(base) == estimate.MOST_TOKENS
    large = replace(base, layers=80, hidden_size=8192, ffn_size=28672)
    per_token = 79 * 2 * (8192 + 28672 / 128)
    tokens = estimate.default_tokens(large)
    assert 0.99 * estimate.DISK < tokens * per_token <= estimate.DISK
    wide = replace(base, hidden_size=4 * D, ffn_size=4 * F)
    sizes = [estimate.memory(b, settings) for b in (base, wide)]
    assert 0 < sizes[0] < sizes[1] < 1e9
    for hidden, *wanted in ((16, 8, 4), (32, 8, 4), (256, 32, 32), (8192, 256, 64)):
        found = Settings().with_ranks(hidden)
        assert [found.rank, found.compensator_rank] == wanted
        asked = Settings(rank=7, compensator_rank=10**6).with_ranks(hidden)
        assert (asked.rank, asked.compensator_rank) == (7, hidden)


def test_time_is_told_and_nothing_written(tmp_path: Path) -> None:
    """Nor trained; and the first texts may fill no block."""
    parts = lines_of(tmp_path / "a.jsonl", [3, 0, *[60] * 40])
    assert [len(parts[0][i]) >= BLOCK for i in range(2)] == [False, True]
    run = prepared(tmp_path / "out", parts=parts)
    before = np.array(run.net.w1)
    found = estimate.seconds(run)
    whole = ["capture", "predictors", "compensators", "curves", "judgement"]
    assert list(found) == [*whole, "verifying"] and found.pop("verifying") == 0
    assert all(0 < s < np.inf for s in found.values())
    assert not (tmp_path / "out").exists()
    assert np.array_equal(np.array(run.net.w1), before)


def test_the_report_is_json_and_a_picture(tmp_path: Path, monkeypatch: Patch) -> None:
    """Of two stages, one without a curve, no compensator, any name."""
    monkeypatch.undo()
    found = {
        "base_model": {"name": "US$ model^$", "ffn_size": 64},
        "calibration": {"tokens": 12, "recall": [0.7, 0.8], "error_removed": []},
        "descents": {"dense": [[1, 3.5, 0.5], [2, 3.25, 0.55]], "sparse": []},
        "importance": [0.5, 0.75, 1.0],
    }
    kl = [[0.1, 0.3], [0.001, 0.002]]
    sizes = []
    for curves in ({}, {"curves": {"levels": [0.3, 0.6], "kl": kl, "source": {}}}):
        report.write_report(tmp_path, found | curves)
        assert json.loads((tmp_path / "report.json").read_text()) == found | curves
        png = (tmp_path / "report.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append(len(png))
    assert 10_000 < sizes[0] < sizes[1]
