"""Tuning chooses the fastest correct candidate, dense among them, and remembers it."""

import io
import json
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import models
import pytest
from rich.console import Console

from mlx_fastforward import PrefillConfig, attach, detach, tune
from mlx_fastforward.cli import first_use
from mlx_fastforward.engine import Engine
from mlx_fastforward.model.ffn import GatedFFN
from mlx_fastforward.tokens.flops import Shape
from mlx_fastforward.tune import Choice

SHAPE = Shape.of(models.tiny("llama"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "ATTENTION_BLOCKS", ())  # 2,048 queries take a while
    return tmp_path


@pytest.fixture
def engine() -> Engine:
    return attach(models.tiny("llama"), PrefillConfig(selector="probe"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Seconds that a run takes by (block size, strategy), and "dense"."""
    costs: dict[Any, float] = {"dense": 1.0}
    now = [0.0]
    dense, sparse = GatedFFN.activations_and_output, Engine.forward

    def run_dense(self: GatedFFN, x: mx.array) -> Any:
        now[0] += costs["dense"] * x.shape[1] / tune.CHUNK
        return dense(self, x)

    def run_sparse(self: Engine, layer: int, x: mx.array) -> mx.array:
        before = now[0]
        y = sparse(self, layer, x)
        size, strategy = self.config.block_size, self.config.strategy
        cost = costs.get((size, strategy), costs.get(size, 2.0))
        now[0] = before + cost * x.shape[1] / tune.CHUNK
        return y

    monkeypatch.setattr(GatedFFN, "activations_and_output", run_dense)
    monkeypatch.setattr(Engine, "forward", run_sparse)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: now[0])
    return costs


def test_the_fastest_is_chosen(engine: Engine, clock: dict[Any, float]) -> None:
    clock |= {128: 0.9, 256: 0.6, 512: 0.8}
    clock |= {(1024, "columns"): 0.7, (1024, "chunk"): 0.8}
    choice = tune.tune(engine, SHAPE)
    assert (choice.block_size, choice.strategy) == (256, "columns")
    assert choice.dense_seconds == pytest.approx(1.0)


def test_dense_is_chosen_where_nothing_is_faster(
    engine: Engine, clock: dict[Any, float]
) -> None:
    clock |= {128: 0.99, 256: 1.0, 512: 1.5}
    assert tune.tune(engine, SHAPE).block_size == 0


def test_a_wrong_candidate_is_not_used(
    engine: Engine, clock: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock |= {128: 0.8, 256: 0.7, 512: 0.8}
    clock |= {(1024, "columns"): 0.1, (1024, "chunk"): 0.9}
    right = GatedFFN.sparse

    def sparse(self: GatedFFN, x: mx.array, *rest: Any) -> mx.array:
        y = right(self, x, *rest)
        return y * 1.1 if self.strategy == "columns" else y

    monkeypatch.setattr(GatedFFN, "sparse", sparse)
    choice = tune.tune(engine, SHAPE)
    assert (choice.block_size, choice.strategy) == (256, "chunk")
    assert "columns: wrong by 1.0e-01, not used" in tune.summary(choice)


def test_larger_blocks_are_tried_only_if_asked_for(
    engine: Engine, clock: dict[Any, float]
) -> None:
    clock |= {128: 0.9, 256: 0.8, 512: 0.7, 1024: 0.6, 2048: 0.5}
    assert tune.tune(engine, SHAPE).block_size == 1024
    assert tune.tune(engine, SHAPE, largest=2048).block_size == 2048


@pytest.mark.parametrize("slow, wanted", [(0, 512), (512, 1024), (1024, 2048)])
def test_short_prompts_stay_dense_where_that_is_faster(
    slow: int,
    wanted: int,
    engine: Engine,
    clock: dict[Any, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock |= {128: 0.5, 256: 0.6, 512: 0.6}
    real = Engine.forward

    def forward(self: Engine, layer: int, x: mx.array) -> mx.array:
        clock[128] = 3.0 if x.shape[1] <= slow else 0.5
        return real(self, layer, x)

    monkeypatch.setattr(Engine, "forward", forward)
    assert tune.tune(engine, SHAPE).shortest == wanted


@pytest.mark.parametrize(
    "cost, wanted", [({8: 0.7, 16: 0.6}, 16), ({8: 0.99, 16: 2.0}, 0), ({}, 0)]
)
def test_attention_in_blocks_where_that_is_faster(
    cost: dict[int, float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, real = [0.0], tune.by_queries

    def by_queries(whole: Any, rows: int) -> Any:
        def timed(*args: Any, **kwargs: Any) -> mx.array:
            y = real(whole, rows)(*args, **kwargs)
            now[0] += cost[rows] - 1.0 * CHUNK / rows
            return y

        return timed

    def whole(*args: Any, **kwargs: Any) -> mx.array:
        now[0] += 1.0
        return fused(*args, **kwargs)

    fused = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(tune, "CHUNK", CHUNK := 64)
    monkeypatch.setattr(tune, "ATTENTION_BLOCKS", tuple(cost))
    monkeypatch.setattr(tune, "by_queries", by_queries)
    monkeypatch.setattr(tune.mx.fast, "scaled_dot_product_attention", whole)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: now[0])
    assert tune.attention_block(SHAPE, mx.float32) == wanted


def test_wrong_attention_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_queries(whole: Any, rows: int) -> Any:
        return lambda *args, **kwargs: whole(*args, **kwargs) * 1.01

    monkeypatch.setattr(tune, "CHUNK", 64)
    monkeypatch.setattr(tune, "ATTENTION_BLOCKS", (16,))
    monkeypatch.setattr(tune, "by_queries", by_queries)
    clock = iter(float(2**-i) for i in range(99))  # later is faster
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    assert tune.attention_block(SHAPE, mx.float32) == 0


def test_the_engine_is_left_alone(engine: Engine) -> None:
    config, ffns, keep = engine.config, list(engine.ffns), list(engine.keep)
    tune.tune(engine, SHAPE)
    assert (engine.config, engine.ffns, engine.keep) == (config, ffns, keep)
    assert engine.call is None


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("bits", [0, 4])
def test_every_candidate_is_correct(name: str, bits: int) -> None:
    model = models.tiny(name)
    if bits:
        tune.mx.eval(model.parameters())
        models.nn.quantize(model, 32, bits)
    choice = tune.tune(attach(model, PrefillConfig(selector="probe")), Shape.of(model))
    assert len(choice.candidates) == 5
    assert all(c["correct"] and c["error"] < 1e-3 for c in choice.candidates)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_quantisations_whose_scales_are_no_floats(mode: str) -> None:
    model = models.tiny("llama")
    models.nn.quantize(model, mode=mode)
    choice = tune.tune(attach(model, PrefillConfig(selector="probe")), Shape.of(model))
    assert all(c["correct"] for c in choice.candidates)


def test_a_choice_is_applied() -> None:
    model = models.tiny("llama")
    engine = attach(model, PrefillConfig(selector="probe"))
    tune.apply(engine, Choice(256, "columns", 1024, 1.0, []))
    assert engine.config.block_size == 256 and engine.shortest == 1024
    assert {ffn.strategy for ffn in engine.ffns} == {"columns"}


def test_a_dense_choice_is_stock() -> None:
    model = models.tiny("llama")
    ids = models.token_ids(600)
    engine = attach(model, PrefillConfig(selector="probe"))
    sparse, _ = models.prefill(model, ids)
    tune.apply(engine, Choice(0, "chunk", 0, 1.0, []))
    found, _ = models.prefill(model, ids)
    detach(model)
    stock, _ = models.prefill(model, ids)
    assert (found == stock).all() and not (sparse == stock).all()


def test_shorter_prompts_than_that_are_stock() -> None:
    """Told their length or not."""
    model = models.tiny("llama")
    engine = attach(model, PrefillConfig(selector="probe"))
    tune.apply(engine, Choice(128, "chunk", 600, 1.0, []))
    for tokens, sparse in ((599, False), (600, True)):
        ids = mx.array([models.token_ids(tokens)])
        detach(model)
        stock = model(ids)
        models_engine = attach(model, engine.config)
        assert bool(mx.any(model(ids) != stock)) == sparse
        with models_engine.prompt(tokens):
            assert bool(mx.any(model(ids) != stock)) == sparse


def test_memory(home: Path, engine: Engine) -> None:
    key, choice = tune.key(engine, SHAPE), Choice(256, "chunk", 512, 1.0, [{"a": 1}])
    assert tune.remembered(key) is None
    tune.remember(key, choice)
    tune.remember("another", choice)
    assert tune.remembered(key) == choice
    assert set(json.loads((home / "tuned.json").read_text())) == {key, "another"}
    assert [p.name for p in home.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"a": 1}}'])
def test_damaged_memory_is_no_memory(text: str, home: Path, engine: Engine) -> None:
    key = tune.key(engine, SHAPE)
    (home / "tuned.json").write_text(text.replace("KEY", key))
    assert tune.remembered(key) is None
    tune.remember(key, Choice(128, "chunk", 0, 1.0, []))
    assert tune.remembered(key) is not None


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "file" / "home"))
    tune.remember("key", Choice(128, "chunk", 0, 1.0, []))
    assert tune.remembered("key") is None


def test_keys_tell_what_matters_apart() -> None:
    def key(bits: int = 0, **more: Any) -> str:
        model = models.tiny("llama")
        if bits:
            models.nn.quantize(model, 32, bits)
        more.setdefault("selector", "probe")
        return tune.key(attach(model, PrefillConfig(**more)), Shape.of(model))

    keys = [key(), key(4), key(8), key(sparsity=0.4), key(selector="first-block")]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert key(block_size=64) == keys[0]


# On the way into a chat


@pytest.fixture
def large(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """One that is worth tuning."""
    monkeypatch.setattr(tuning, "SMALLEST", 0)
    yield engine


def told(engine: Engine) -> str:
    text = io.StringIO()
    tuning.tune_once(models.tiny("llama"), engine, Console(file=text, width=200))
    return text.getvalue()


def test_first_use_says_so_and_the_second_does_not(
    large: Engine, clock: dict[Any, float]
) -> None:
    clock |= {128: 0.5}
    assert "Tuned: blocks of 128 tokens" in told(large)
    assert large.config.block_size == 128
    assert told(large) == ""


def test_small_models_are_not_worth_it(engine: Engine, home: Path) -> None:
    assert told(engine) == "" and list(home.iterdir()) == []


def test_sparsity_0_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SMALLEST", 0)
    assert told(attach(models.tiny("llama"), PrefillConfig(sparsity=0.0))) == ""


@pytest.mark.parametrize("block, no_tune", [(64, False), (None, True)])
def test_users_who_know_better(
    block: Any, no_tune: bool, large: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune_once(*_: Any) -> None:
        raise AssertionError("was tuned")

    monkeypatch.setattr(tuning, "tune_once", tune_once)
    model = models.tiny("llama")
    attach(model, PrefillConfig(selector="probe"))
    tuning.tune_first(model, block, no_tune)
    with pytest.raises(AssertionError, match="was tuned"):
        tuning.tune_first(model, None, False)
