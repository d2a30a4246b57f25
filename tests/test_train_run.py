"""Whole runs on tiny models: what they make of which settings, stopped anywhere and gone on."""

import itertools
import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest

from mlx_fastforward import PredictorError, attach, load_predictor
from mlx_fastforward.neurons.compensators import LowRankCompensator, MLPCompensator
from mlx_fastforward.predictors.file import BaseModel
from mlx_fastforward.train import descent, estimate, quality, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train import state as state_module
from mlx_fastforward.train.capture import capture
from mlx_fastforward.train.data import BUNDLED, Corpus, Sequences
from mlx_fastforward.train.run import WORK, Run, Tick
from mlx_fastforward.train.state import Settings, State

BLOCK, D, F, LAYERS = models.BLOCK, models.HIDDEN, models.FFN, models.LAYERS
LENGTH, VOCAB = 72, 4096
FILES = [
    "fastforward.json",
    "fastforward.safetensors",
    "report.json",
    "report.png",
]
SMALL = Settings(tokens=400, length=LENGTH, steps=8, block_size=BLOCK)
SEQUENTIAL = replace(SMALL, sequential=True)
MLP = replace(SMALL, compensator="mlp")
Parts = tuple[Sequences, Sequences]


SEEDS = itertools.count(77)


class Stop(BaseException):
    """What ends a process."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short sequences to judge on, and no picture: matplotlib takes longest."""
    monkeypatch.setattr(judge, "SHORTEST", 40)
    monkeypatch.setattr(judge, "TOKENS", 8)
    few_held_out(2, monkeypatch)
    monkeypatch.setattr(run_module, "IMPORTANCE_SAMPLES", 1)
    monkeypatch.setattr(report, "picture", lambda path, found: path.write_bytes(b""))


def few_held_out(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (state_module, run_module, estimate):
        monkeypatch.setattr(module, "HELD_OUT", n)


def parts_of(*paths: Path, length: int = LENGTH) -> Parts:
    corpus, tokenizer = Corpus(list(paths)), models.demo_tokenizer()
    fitted, held = (
        Sequences(corpus, tokenizer, length, 0, held) for held in (False, True)
    )
    return fitted, held


@pytest.fixture(scope="module")
def parts() -> Parts:
    return parts_of(BUNDLED)


def fresh(name: str = "llama", **more: Any) -> nn.Module:
    return models.tiny(name, vocab=VOCAB, **more)


def nothing(*args: Any) -> None:
    pass


def prepared(
    out: Path,
    parts: Parts,
    settings: Settings = SMALL,
    tick: Tick = nothing,
    model: Optional[nn.Module] = None,
) -> Run:
    """A run, as a process of its own would begin or resume it."""
    mx.random.seed(next(SEEDS))
    return Run(model or fresh(), "tiny", parts, out, settings, tick)


def adapter_of(out: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(out / FILES[1]))
    assert isinstance(tensors, dict)
    return tensors


def assert_same(out: Path, wanted: dict[str, mx.array]) -> None:
    """Bit by bit, and nothing is left behind."""
    got = adapter_of(out)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert mx.array_equal(got[name], tensor), name
    assert sorted(p.name for p in out.iterdir()) == FILES


def curves_of(out: Path) -> dict[str, list[list[float]]]:
    """(step, loss, recall) of each stage, from the report."""
    curves = json.loads((out / "report.json").read_text())["curves"]
    assert isinstance(curves, dict)
    return curves


def stop_at(phase: str, count: int) -> Tick:
    """Ends the process at the ``count``-th tick of a phase."""
    seen: list[str] = []

    def tick(name: str, done: float, total: float, details: str) -> None:
        seen.append(name)
        if seen.count(phase) == count:
            raise Stop

    return tick


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, parts: Parts
) -> Callable[[Settings], dict[str, mx.array]]:
    """The tensors of a run that nothing stopped, made once."""
    known: dict[Settings, dict[str, mx.array]] = {}

    def tensors(settings: Settings) -> dict[str, mx.array]:
        if settings not in known:
            out = tmp_path_factory.mktemp("whole")
            prepared(out, parts, settings)()
            known[settings] = adapter_of(out)
        return known[settings]

    return tensors


# What a run makes


KINDS = {"low-rank": LowRankCompensator, "mlp": MLPCompensator, "none": type(None)}


@pytest.mark.parametrize(
    "predictor, compensator, sequential",
    [
        ("token-wise", "low-rank", False),
        ("pooled", "mlp", True),
        ("token-wise", "none", True),
        ("pooled", "low-rank", True),
    ],
)
def test_an_adapter_of_every_kind(
    predictor: str, compensator: str, sequential: bool, tmp_path: Path, parts: Parts
) -> None:
    """It loads, fits its model, and runs."""
    settings = replace(
        SMALL, predictor=predictor, compensator=compensator, sequential=sequential
    )
    prepared(tmp_path, parts, replace(settings, rank=6, compensator_rank=3))()
    model, predictor = fresh(), load_predictor(tmp_path)
    predictor.check(BaseModel.of(model))
    assert type(predictor.compensator) is KINDS[compensator]
    assert predictor.layers is not None and len(predictor.layers) == LAYERS
    pooled = predictor == "pooled"
    for weights in predictor.layers:
        assert (weights.query is not None) == pooled == (weights.bias is None)
        assert weights.w1.shape == (D, 6)
        assert weights.w2.shape == ((6 if pooled else 12), F)
    assert predictor.importances is not None and len(predictor.importances) == LAYERS
    assert all(0 < s <= 1 for s in predictor.importances)
    engine = attach(model, models.settings(selector="trained"), predictor=predictor)
    dense = models.prefill(fresh(), models.token_ids(60))[0]
    with engine.prompt(60) as tally:
        sparse = models.prefill(model, models.token_ids(60))[0]
    assert tally.sparsity > 0.1 and not np.array_equal(sparse, dense)


def test_what_the_adapter_says_of_itself(tmp_path: Path, parts: Parts) -> None:
    made = prepared(tmp_path, parts, replace(MLP, seed=3))()
    info = load_predictor(tmp_path).details
    assert info["base_model"]["name"] == "tiny"
    assert info["predictor"] == {"kind": "token-wise", "rank": 8}
    wanted = {"kind": "mlp", "rank": 4, "activation": "silu"}
    assert info["compensator"] == wanted and info["block_size"] == BLOCK
    assert info["settings"]["steps"] == 8 and info["settings"]["seed"] == 3
    found = info["calibration"]
    assert 400 <= found["tokens"] < 400 + LENGTH
    assert len(found["recall"]) == len(found["error_removed"]) == LAYERS - 1
    assert set(found["from_dense"]) == {
        "oracle",
        "predictor",
        "predictor and compensator",
    }
    assert made | {"format": 1} == info
    told = json.loads((tmp_path / "report.json").read_text())
    assert told.pop("importance") == load_predictor(tmp_path).importances
    curve = told.pop("curves")["dense"]
    assert [step for step, _, _ in curve] == list(range(1, 9)) and told == made


def test_without_a_compensator_there_is_none_to_judge(
    tmp_path: Path, parts: Parts
) -> None:
    made = prepared(tmp_path, parts, replace(SMALL, compensator="none"))()
    assert "compensator" not in made and made["calibration"]["error_removed"] == []
    assert set(made["calibration"]["from_dense"]) == {"oracle", "predictor"}
    assert not [n for n in adapter_of(tmp_path) if "compensator" in n]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_dtype_is_the_models(dtype: mx.Dtype, tmp_path: Path, parts: Parts) -> None:
    model = fresh()
    model.set_dtype(dtype)
    prepared(tmp_path, parts, model=model)()
    tensors = adapter_of(tmp_path)
    assert {t.dtype for n, t in tensors.items() if n != "importance"} == {dtype}
    model = fresh()
    model.set_dtype(dtype)
    load_predictor(tmp_path).check(BaseModel.of(model))


def test_a_quantised_model_and_its_original_share_an_adapter(
    tmp_path: Path, parts: Parts
) -> None:
    model = fresh()
    nn.quantize(model, 32, 8)
    made = prepared(tmp_path, parts, model=model)()
    predictor = load_predictor(tmp_path)
    predictor.check(BaseModel.of(fresh()))
    assert all(e > 0 for e in made["calibration"]["error_removed"])
    attach(model, models.settings(selector="trained"), predictor=predictor)
    assert np.isfinite(models.prefill(model, models.token_ids(60))[0]).all()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "phi3"])
def test_other_architectures(name: str, tmp_path: Path, parts: Parts) -> None:
    prepared(tmp_path, parts, replace(SMALL, compensator="none"), model=fresh(name))()
    predictor = load_predictor(tmp_path)
    predictor.check(BaseModel.of(fresh(name)))
    assert predictor.layers and predictor.importances


def test_the_phases_and_their_ticks(tmp_path: Path, parts: Parts) -> None:
    ticks: dict[str, list[tuple[float, float]]] = {}

    def tick(phase: str, done: float, total: float, details: str) -> None:
        ticks.setdefault(phase, []).append((done, total))

    prepared(tmp_path, parts, SEQUENTIAL, tick)()
    stages = [
        f"{what} {stage}"
        for stage in ("dense", "sparse")
        for what in ("capture", "predictors", "compensators")
    ]
    assert list(ticks) == ["capture held-out", *stages, "importances", "judgement"]
    for phase, seen in ticks.items():
        done = [d for d, _ in seen]
        assert done == sorted(done) and len({t for _, t in seen}) == 1, phase
        if not phase.startswith("judgement"):
            assert done[-1] >= seen[-1][1], phase


def test_training_helps(tmp_path: Path, parts: Parts) -> None:
    """On held-out text: recall rises from a half, and part of the error is removed."""
    settings = replace(SMALL, tokens=2000, steps=120)
    found = prepared(tmp_path, parts, settings)()
    recalls = [recall for _, _, recall in curves_of(tmp_path)["dense"]]
    assert recalls[-1] > 0.6 and recalls[-1] > recalls[0] + 0.05
    assert np.mean(found["calibration"]["recall"]) > 0.6
    assert np.mean(found["calibration"]["error_removed"]) > 0.1


def test_a_sparse_stage_is_captured_below_sparse_layers(
    tmp_path: Path, parts: Parts
) -> None:
    """The sequences after the dense ones; only the first layer's inputs are dense."""
    with pytest.raises(Stop):
        prepared(tmp_path, parts, SEQUENTIAL, stop_at("capture sparse", 2))()
    run = prepared(tmp_path, parts, SEQUENTIAL)
    first = run.state.captured["dense"]
    assert run.state.captured["sparse"] == 2 and first > 2
    number = run.store("sparse").numbers(2)[0]
    ids = parts[0][first + number]
    dense, _ = capture(fresh(), ids, BLOCK, "relative")
    x, _ = run.store("sparse").load(number)
    assert x.shape == dense.shape and np.array_equal(x[0], np.array(dense[0]))
    assert not np.array_equal(x[1], np.array(dense[1]))


def test_the_dense_stage_of_a_sequential_run_is_half(
    tmp_path: Path, parts: Parts
) -> None:
    with pytest.raises(Stop):
        prepared(tmp_path, parts, SEQUENTIAL, stop_at("importances", 1))()
    tokens = prepared(tmp_path, parts, SEQUENTIAL).state.tokens
    for stage in ("dense", "sparse"):
        assert 200 <= tokens[stage] < 200 + LENGTH


def test_the_seed_makes_the_adapter(
    tmp_path: Path, parts: Parts, uninterrupted: Any
) -> None:
    """The same one from the same seed, wherever it is made."""
    for name, seed in (("a", 0), ("b", 1)):
        prepared(tmp_path / name, parts, replace(SMALL, seed=seed))()
    assert_same(tmp_path / "a", uninterrupted(SMALL))
    name = "layers.0.predictor.w1"
    assert not mx.array_equal(
        adapter_of(tmp_path / "b")[name], uninterrupted(SMALL)[name]
    )


# Stopped and gone on


SECONDS = [-1.0, descent.INTERVAL]  # saved at every step, and never before the end


@pytest.mark.parametrize(
    "settings, phase, count, interval",
    [
        (SMALL, "capture held-out", 1, SECONDS[1]),
        (SMALL, "capture dense", 3, SECONDS[1]),
        (SMALL, "predictors dense", 3, SECONDS[0]),
        (SMALL, "predictors dense", 3, SECONDS[1]),
        (SMALL, "predictors dense", 8, SECONDS[1]),
        (SMALL, "compensators dense", 1, SECONDS[1]),
        (SMALL, "importances", 1, SECONDS[1]),
        (SMALL, "judgement", 1, SECONDS[1]),
        (MLP, "compensators dense", 30, SECONDS[0]),
        (MLP, "compensators dense", 30, SECONDS[1]),
        (SEQUENTIAL, "compensators dense", 3, SECONDS[1]),
        (SEQUENTIAL, "capture sparse", 2, SECONDS[1]),
        (SEQUENTIAL, "predictors sparse", 2, SECONDS[0]),
        (SEQUENTIAL, "predictors sparse", 2, SECONDS[1]),
        (SEQUENTIAL, "compensators sparse", 2, SECONDS[1]),
    ],
)
def test_a_run_that_is_stopped_goes_on(
    settings: Settings,
    phase: str,
    count: int,
    interval: float,
    tmp_path: Path,
    parts: Parts,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = uninterrupted(settings)
    monkeypatch.setattr(descent, "INTERVAL", interval)
    with pytest.raises(Stop):
        prepared(tmp_path, parts, settings, stop_at(phase, count))()
    assert [p.name for p in tmp_path.iterdir()] == [WORK]
    ticked: list[str] = []
    prepared(tmp_path, parts, settings, lambda p, *_: ticked.append(p))()
    assert_same(tmp_path, wanted)
    order = list(dict.fromkeys(ticked))
    assert "capture held-out" not in order or phase.startswith("capture held-out")
    assert "capture dense" not in order or phase.startswith("capture")


def test_a_run_that_is_stopped_again_and_again(
    tmp_path: Path,
    parts: Parts,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After every fourth tick: each time it gets a little further."""
    wanted = uninterrupted(SMALL)
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    stops = 0
    while not (tmp_path / FILES[0]).exists():
        left = iter(range(4))

        def tick(*args: Any) -> None:
            if next(left, None) is None:
                raise Stop

        try:
            prepared(tmp_path, parts, SMALL, tick)()
        except Stop:
            stops += 1
        assert stops < 20
    assert stops > 3
    assert_same(tmp_path, wanted)


@pytest.mark.parametrize("what", ["x", "norms", "state"])
def test_a_crash_while_something_is_written(
    what: str,
    tmp_path: Path,
    parts: Parts,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third of its kind is half written; what is half written does not count."""
    wanted, real, files = uninterrupted(SMALL), os.replace, []

    def replaced(half: Path, path: Path) -> None:
        files.append(path.name.split(".")[-2])
        if files.count(what) == 3:
            half.write_bytes(half.read_bytes()[:100])
            raise Stop
        real(half, path)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", replaced)
        prepared(tmp_path, parts)()
    prepared(tmp_path, parts)()
    assert_same(tmp_path, wanted)


def test_an_unfinished_run_keeps_the_adapter_that_is_there(
    tmp_path: Path, parts: Parts, uninterrupted: Any
) -> None:
    prepared(tmp_path, parts)()
    other = replace(SMALL, seed=5)
    with pytest.raises(Stop):
        prepared(tmp_path, parts, other, stop_at("judgement", 1))()
    for name, tensor in uninterrupted(SMALL).items():
        assert mx.array_equal(adapter_of(tmp_path)[name], tensor), name
    prepared(tmp_path, parts, other)()
    name = "layers.0.predictor.w1"
    assert not mx.array_equal(adapter_of(tmp_path)[name], uninterrupted(SMALL)[name])


@pytest.mark.parametrize(
    "changed",
    [
        dict(tokens=500),
        dict(steps=9),
        dict(predictor="pooled"),
        dict(score="plain"),
        dict(rank=9),
        dict(compensator="none"),
        dict(sequential=True),
        dict(seed=1),
        dict(data="other.txt"),
        dict(minutes=5.0),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_do_not_go_on(
    changed: dict[str, Any], tmp_path: Path, parts: Parts
) -> None:
    run = prepared(tmp_path, parts, SMALL)
    run.state.save("capture dense")
    with pytest.raises(PredictorError) as e:
        prepared(tmp_path, parts, replace(SMALL, **changed))()
    (name,) = changed
    text = str(e.value)
    assert f"with other settings ({name}); " in text and "--restart" in text
    assert "capture dense" in prepared(tmp_path, parts, SMALL).state.seconds


def test_another_model_does_not_go_on(tmp_path: Path, parts: Parts) -> None:
    prepared(tmp_path, parts).state.save("capture dense")
    with pytest.raises(PredictorError, match=r"other settings \(fingerprint\)"):
        prepared(tmp_path, parts, model=fresh(seed=4))()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1}', '{"asked": {}, "folder": "/"}', "\xff"]
)
def test_a_damaged_state_is_told(text: str, tmp_path: Path, parts: Parts) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PredictorError) as e:
        prepared(tmp_path, parts)()
    line = str(e.value)
    assert "\n" not in line and str(tmp_path / WORK) in line


def test_time_is_counted_over_all_sittings(tmp_path: Path) -> None:
    state = State.resumed(tmp_path, {"a": 1})
    state.save("capture dense")
    once = state.seconds["capture dense"]
    again = State.resumed(tmp_path, {"a": 1})
    again.save("capture dense")
    again.save("predictors")
    assert again.seconds["capture dense"] > once > 0
    assert set(again.seconds) == {"capture dense", "predictors"}


# Limits


def test_minutes_cut_everything_short(tmp_path: Path, parts: Parts) -> None:
    """Next to none of them: two sequences of each kind, twenty steps."""
    settings = replace(SMALL, tokens=10**6, steps=10**6, minutes=1e-7)
    found = prepared(tmp_path, parts, settings)()
    assert found["calibration"]["tokens"] <= 3 * LENGTH
    assert curves_of(tmp_path)["dense"][-1][0] == 20
    load_predictor(tmp_path).check(BaseModel.of(fresh()))


def test_plenty_of_minutes_change_nothing(tmp_path: Path, parts: Parts) -> None:
    free = prepared(tmp_path / "a", parts, MLP)()
    limited = prepared(tmp_path / "b", parts, replace(MLP, minutes=1e6))()
    assert curves_of(tmp_path / "a") == curves_of(tmp_path / "b")
    assert limited["calibration"]["tokens"] == free["calibration"]["tokens"]


def test_steps_of_a_limited_run_are_those_it_began_with(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast the machine is when it goes on."""
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    settings = replace(SMALL, minutes=10.0, steps=500)
    speed = [run_module.PREDICTORS * 600 / 30]
    monkeypatch.setattr(Run, "step_seconds", lambda self: speed[0])
    with pytest.raises(Stop):
        prepared(tmp_path, parts, settings, stop_at("predictors dense", 5))()
    speed[0] *= 10
    prepared(tmp_path, parts, settings)()
    assert curves_of(tmp_path)["dense"][-1][0] == 30


def test_steps_are_timed_on_a_network_that_is_thrown_away(
    tmp_path: Path, parts: Parts
) -> None:
    run = prepared(tmp_path, parts)
    before = [np.array(w) for w in (run.net.w1, run.net.w2)]
    assert run.step_seconds() > 0
    assert np.array_equal(np.array(run.net.w1), before[0])
    assert np.array_equal(np.array(run.net.w2), before[1])
    assert list(tmp_path.iterdir()) == []


# Data that is hardly any


def test_texts_that_fill_no_block(tmp_path: Path) -> None:
    parts = parts_of(write_lines(tmp_path / "a.jsonl", [2] * 40))
    with pytest.raises(PredictorError) as e:
        prepared(tmp_path / "out", parts)()
    line = str(e.value)
    assert line.startswith("no sequence fills a block of 8 tokens; ")


def test_texts_of_nothing(tmp_path: Path) -> None:
    parts = parts_of(write_lines(tmp_path / "a.jsonl", [0] * 40))
    with pytest.raises(PredictorError, match="holds no text"):
        prepared(tmp_path / "out", parts)()


def test_one_short_text_will_do(tmp_path: Path) -> None:
    """Fitted and judged on the same, and no number is out of bounds."""
    (tmp_path / "a.txt").write_text("A man went to sea in a ship of his own. " * 9)
    parts = parts_of(tmp_path / "a.txt")
    found = prepared(tmp_path / "out", parts)()["calibration"]
    assert all(0 < r <= 1 for r in found["recall"])
    assert all(e < 1 for e in found["error_removed"])


def write_lines(path: Path, lengths: list[int]) -> Path:
    entries = ({"text": "word " * n} for n in lengths)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_held_out_texts_that_fill_no_block(tmp_path: Path) -> None:
    """It is judged on what it was fitted on, and does not claim to remove everything."""
    lengths = [2 if i % 20 == 0 else 60 for i in range(60)]
    parts = parts_of(write_lines(tmp_path / "a.jsonl", lengths))
    found = prepared(tmp_path / "out", parts)()["calibration"]
    assert all(0 < r <= 1 for r in found["recall"])
    assert all(e < 1 for e in found["error_removed"])


@pytest.mark.parametrize("compensator", ["low-rank", "mlp"])
def test_a_second_half_that_fills_no_block(compensator: str, tmp_path: Path) -> None:
    lengths = [60] * 2 + [3] * 400
    parts = parts_of(write_lines(tmp_path / "a.jsonl", lengths))
    for part in parts:  # they come in any order
        part.lines.sort(key=lambda place: place.start)
    settings = replace(SEQUENTIAL, compensator=compensator, tokens=900)
    prepared(tmp_path / "out", parts, settings)()
    assert load_predictor(tmp_path / "out").predictors


# What it takes


def stored(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.npy"))


@pytest.mark.parametrize("tokens", [2200, 500])
def test_the_disk_that_is_announced_is_what_it_takes(
    tokens: int, tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_held_out(3, monkeypatch)
    for part in parts:
        monkeypatch.setattr(part, "kinds", ("prose",))
    settings = replace(SMALL, tokens=tokens)
    with pytest.raises(Stop):
        prepared(tmp_path, parts, settings, stop_at("predictors dense", 1))()
    base = BaseModel.of(fresh())
    assert estimate.disk(base, settings) == pytest.approx(stored(tmp_path), rel=0.06)


def test_default_tokens_fit_the_disk() -> None:
    base = BaseModel.of(fresh())
    assert estimate.default_tokens(base) == estimate.MOST_TOKENS
    large = replace(base, layers=80, hidden_size=8192, ffn_size=28672)
    tokens = estimate.default_tokens(large)
    per_token = estimate.bytes_per_token(large, 128)
    assert 0.99 * estimate.DISK < tokens * per_token <= estimate.DISK


def test_memory_grows_with_the_model() -> None:
    base, settings = BaseModel.of(fresh()), SMALL.with_ranks(D)
    large = replace(base, hidden_size=4 * D, ffn_size=4 * F)
    sizes = [estimate.memory(b, settings) for b in (base, large)]
    assert 0 < sizes[0] < sizes[1] < 1e9


def test_time_is_told_and_nothing_written(tmp_path: Path, parts: Parts) -> None:
    run = prepared(tmp_path / "out", parts)
    found = estimate.seconds(run)
    assert list(found) == ["capture", "predictors", "compensators", "judgement"]
    assert all(s > 0 for s in found.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [0, 3])
def test_time_is_told_of_texts_that_fill_no_block(words: int, tmp_path: Path) -> None:
    """The first one; others fill many."""
    path = write_lines(tmp_path / "a.jsonl", [words] * 2 + [60] * 40)
    parts = parts_of(path)
    assert len(parts[0][0]) < BLOCK <= len(parts[0][2])
    found = estimate.seconds(prepared(tmp_path / "out", parts))
    assert all(np.isfinite(s) for s in found.values())


def test_free_disk_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    here = estimate.free_disk(tmp_path)
    assert estimate.free_disk(tmp_path / "a" / "b") == pytest.approx(here, rel=0.01)


# Ranks


@pytest.mark.parametrize(
    "hidden, rank, compensator_rank",
    [(32, 8, 4), (256, 32, 32), (2048, 256, 64), (8192, 256, 64), (16, 8, 4)],
)
def test_ranks_follow_the_hidden_size(
    hidden: int, rank: int, compensator_rank: int
) -> None:
    found = Settings().with_ranks(hidden)
    assert (found.rank, found.compensator_rank) == (rank, compensator_rank)
    asked = Settings(rank=7, compensator_rank=3).with_ranks(hidden)
    assert (asked.rank, asked.compensator_rank) == (7, 3)
    assert (
        Settings(compensator_rank=10**6).with_ranks(hidden).compensator_rank == hidden
    )


# The report


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


PNG = b"\x89PNG\r\n\x1a\n"


def some_report(**more: Any) -> dict[str, Any]:
    return {
        "base_model": {"name": "tiny"},
        "calibration": {
            "tokens": 1234,
            "recall": [0.7, 0.8],
            "error_removed": [0.5, 0.4],
        },
        "curves": {"dense": [(1, 3.5, 0.5), (2, 3.25, 0.55)]},
        "importance": [0.5, 0.75, 1.0],
        **more,
    }


def test_the_report_is_json_and_a_picture(pictures: None, tmp_path: Path) -> None:
    report.write_report(tmp_path, some_report())
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["curves"]["dense"] == [[1, 3.5, 0.5], [2, 3.25, 0.55]]
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(PNG) and len(png) > 10_000


@pytest.mark.parametrize("name", ["tiny", "US$ model^$", "a_b_c", ""])
def test_pictures_of_sparse_reports(pictures: None, name: str, tmp_path: Path) -> None:
    """No compensator, two stages, a curve of nothing, any name."""
    found = some_report(base_model={"name": name})
    found["calibration"]["error_removed"] = []
    found["curves"] = {"dense": [(1, 3.5, 0.5)], "sparse": []}
    report.picture(tmp_path / "a.png", found)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


# A full disk


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("phase", ["capture dense", "predictors dense"])
def test_a_disk_that_is_full(
    phase: str,
    tmp_path: Path,
    parts: Parts,
    uninterrupted: Any,
    full_disk: Callable[[int], None],
) -> None:
    """An OSError, and it goes on when there is room."""
    wanted = uninterrupted(SMALL)

    def tick(name: str, done: float, total: float, details: str) -> None:
        if name == phase:
            full_disk(2000)

    with pytest.raises(OSError):
        prepared(tmp_path, parts, SMALL, tick)()
    full_disk(resource.RLIM_INFINITY)
    prepared(tmp_path, parts)()
    assert_same(tmp_path, wanted)
