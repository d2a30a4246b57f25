"""Tuning chooses the fastest correct candidate, dense among them."""

import io
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import models
import pytest
from rich.console import Console

import mlx_fastforward as ff
from mlx_fastforward import calls, timing, tuning
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.build import engine_for
from mlx_fastforward.cli import first_use
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.engine import Engine
from mlx_fastforward.model.families import Heads
from mlx_fastforward.model.ffn import GatedFFN

HEADS, CHUNK = Heads(queries=4, keys=2, size=8), 256


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which nothing takes long."""
    monkeypatch.setattr(calls, "ATTENTION_BLOCKS", ())
    monkeypatch.setattr(calls, "STEPS", ())
    monkeypatch.setattr(tuning, "CHUNK", CHUNK)
    monkeypatch.setattr(tuning, "BLOCKS", (16, 32, 64, 128))
    monkeypatch.setattr(tuning, "LENGTHS", (64, 128))
    monkeypatch.setattr(tuning, "UNPACK", (64, 128))


@pytest.fixture
def costs(small: None, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Seconds of a whole chunk by (block size, strategy) or block size; dense takes 1."""
    found: dict[Any, Any] = {}

    def sparse(self: Engine, call: Any, layer: int, x: mx.array) -> float:
        size, strategy = self.block_size, self.device.strategy
        cost = found.get((size, strategy), found.get(size, 2.0))
        return (cost(x.shape[1]) if callable(cost) else cost) * x.shape[1] / CHUNK

    def dense(self: GatedFFN, x: mx.array) -> Any:
        return None, x.shape[1] / CHUNK

    def interleaved(ways: dict, rounds: int) -> dict:
        return {name: way() for name, way in ways.items()}

    monkeypatch.setattr(GatedFFN, "activations_and_output", dense)
    monkeypatch.setattr(Engine, "forward", sparse)
    monkeypatch.setattr(tuning, "interleaved", interleaved)
    attention = lambda *_: {0: 1.0, found.get("queries", 0): 0.5}
    monkeypatch.setattr(tuning, "attention_seconds", attention)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return models.save_folder(models.tiny("llama", vocab=4096), tmp_path / "tiny")


def made(bits: int = 0, mode: str = "affine", **settings: Any) -> Engine:
    model = models.tiny("llama")
    if bits:
        nn.quantize(model, 32, bits, mode=mode)
    return engine_for(model, models.settings(**{"block_size": None, **settings}))


@pytest.mark.parametrize(
    "seconds, wanted",
    [
        ({16: 0.9, 32: 0.6, (64, "columns"): 0.7, (64, "chunk"): 0.8}, (32, "columns")),
        ({16: 0.9, 32: 0.8, (64, "columns"): 0.7, (64, "chunk"): 0.6}, (64, "chunk")),
        ({16: 0.9, 32: 0.8, 64: 0.7, 128: 0.6}, (64, "chunk")),  # 128: if asked for
        ({16: 0.97, 32: 1.0, "queries": 8}, (16, "chunk", 64, 8, False)),
        ({16: 0.99, 32: 1.0, 64: 1.5}, (128, "chunk", 0, 0, True)),  # within the noise
        # short prompts stay dense where that is faster
        ({16: lambda n: 3 if n < 65 else 0.5}, (16, "chunk", 128)),
        ({16: lambda n: 3 if n < 129 else 0.5}, (16, "chunk", CHUNK)),
    ],
)
def test_the_fastest_is_chosen(seconds: dict, wanted: tuple, costs: dict) -> None:
    """Dense where nothing is faster; block sizes are tried with the better strategy."""
    costs |= seconds
    engine, shares = made(block_size=200), []  # type: ignore[var-annotated]
    before = (engine.config, engine.device, list(engine.keep), list(engine.ffns))
    found = tuning.search(engine, HEADS, 64, shares.append).device
    assert astuple(found)[: len(wanted)] == wanted
    assert (engine.config, engine.device, engine.keep, engine.ffns) == before
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] <= 1
    if 128 in seconds:
        assert tuning.search(engine, HEADS, 128).device.block_size == 128


def test_a_wrong_candidate_is_not_used(
    costs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs |= {16: 0.8, 32: 0.7, (64, "columns"): 0.1, (64, "chunk"): 0.9}
    right, off = GatedFFN.sparse, {"columns": 1.1, "chunk": 1.0}

    def sparse(self: GatedFFN, *args: Any) -> mx.array:
        return right(self, *args) * off[self.strategy]

    monkeypatch.setattr(GatedFFN, "sparse", sparse)
    choice = tuning.search(made(), HEADS, 64)
    assert astuple(choice.device)[:2] == (32, "chunk")
    assert "columns: wrong by 1.0e-01, not used" in first_use.summary(choice)
    off["chunk"] = 0.9
    choice = tuning.search(made(), HEADS, 64)
    assert choice.device.dense and first_use.summary(choice).count("not used") == 4


def test_who_is_closer_to_float32_is_not_wrong() -> None:
    """The plain path may itself be off in its own dtype."""
    x = mx.ones((1, 4), mx.bfloat16)

    def plain(x: mx.array) -> mx.array:
        return x * (1.1 if x.dtype == mx.bfloat16 else 1.0)

    assert tuning._off(x, x, plain) == 0 and tuning._off(1.1 * x, x, plain) < 1e-2
    assert tuning._off(1.05 * x, x, plain) > 0.03


@pytest.mark.parametrize("bits, mode", [(0, ""), (4, "affine"), (4, "mxfp4")])
def test_every_candidate_is_correct(bits: int, mode: str, small: None) -> None:
    """By the real clock; mxfp4 computes in bfloat16."""
    choice = tuning.search(made(bits, mode), HEADS, 64)
    sparse = [c for c in choice.candidates if c.strategy != "dense"]
    tried = [(c.block_size, c.strategy) for c in sparse]
    assert tried[:2] == [(64, "chunk"), (64, "columns")]
    assert [size for size, _ in tried if size < 64] == [16, 32]
    assert (len(sparse) < len(choice.candidates)) == bool(bits)
    limit = 3e-2 if mode == "mxfp4" else 1e-3
    assert all(c.correct and c.error < limit for c in choice.candidates)
    assert all(c.seconds > 0 and c.dense_seconds > 0 for c in choice.candidates)


def packed_costs(
    monkeypatch: pytest.MonkeyPatch, unpacked: Any, error: float, half: float = 1.0
) -> None:
    """Dequantising first takes ``unpacked`` of the dense FFN's time, by tokens, and is wrong by ``error``.

    half: Of that, in float16.
    """
    right = tuning.difference

    def dense(self: GatedFFN, x: mx.array) -> Any:
        cost = unpacked(x.shape[1]) if self.unpack else 1.0
        return None, cost * (half if self.half else 1.0) * x.shape[1] / CHUNK

    def difference(ours: Any, plain: Any) -> float:
        return error if isinstance(ours, float) else right(ours, plain)

    monkeypatch.setattr(GatedFFN, "activations_and_output", dense)
    monkeypatch.setattr(tuning, "difference", difference)


@pytest.mark.parametrize(
    "unpacked, error, sparse, wanted",
    [
        # of the dense FFN, of sparse blocks of 64 with and without: (dense, unpack)
        (lambda n: 0.5, 1e-6, (0.3, 0.8), (False, 64)),
        (lambda n: 0.5, 1e-6, (0.8, 0.3), (False, 0)),
        (lambda n: 0.5, 1e-6, (0.7, 0.6), (True, 64)),  # dense, and faster than mlx-lm
        (lambda n: 0.5 if n > 64 else 1.1, 1e-6, (0.6, 0.6), (True, 128)),
        (lambda n: 0.99, 1e-6, (0.3, 0.8), (False, 0)),  # within the noise: not tried
        (lambda n: 0.99, 1e-6, (0.3, 1.1), (True, 0)),
        (lambda n: 0.1, 1e-1, (0.3, 0.8), (False, 0)),  # wrong
        (lambda n: 0.5 if n < CHUNK else 1.5, 1e-6, (1.1, 1.1), (True, 0)),
    ],
)
def test_packed_weights_are_dequantised_first_where_that_is_faster(
    unpacked: Any,
    error: float,
    sparse: tuple[float, float],
    wanted: tuple[bool, int],
    costs: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dense is compared with the faster of the two."""

    def forward(self: Engine, call: Any, layer: int, x: mx.array) -> float:
        cost = sparse[not self.device.unpack] if self.block_size == 64 else 2.0
        return cost * x.shape[1] / CHUNK

    packed_costs(monkeypatch, unpacked, error)
    monkeypatch.setattr(Engine, "forward", forward)
    choice = tuning.search(made(4), HEADS, 64)
    assert (choice.device.dense, choice.device.unpack) == wanted
    said = first_use.summary(choice)
    told = f"dequantised first from {wanted[1]} tokens on" in said
    assert told == bool(wanted[1])
    assert ("dense: wrong by 1.0e-01, not used" in said) == (error > 0.01)


@pytest.mark.parametrize(
    "bits, dtype, half, wanted",
    [
        (0, mx.bfloat16, 0.5, (True, 64)),  # nothing to dequantise: float16 alone
        (4, mx.bfloat16, 0.5, (True, 64)),
        (4, mx.bfloat16, 1.5, (False, 64)),
        (0, mx.bfloat16, 1.5, (False, 0)),
        (4, mx.float32, 0.5, (False, 64)),  # not emulated anywhere
    ],
)
def test_float16_where_that_is_faster_than_bfloat16(
    bits: int,
    dtype: mx.Dtype,
    half: float,
    wanted: tuple[bool, int],
    costs: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Densely and in sparse blocks, which go the way that is the fastest densely."""
    packed_costs(monkeypatch, lambda n: 0.9, 1e-6, half)
    costs |= {64: 0.4, 32: 0.5, 16: 0.6}
    model = models.tiny("llama")
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    engine = engine_for(model, models.settings(block_size=None))
    choice = tuning.search(engine, HEADS, 64)
    device = choice.device
    assert (device.half, device.unpack) == wanted and not device.dense
    assert (
        "FFNs run in float16 from 64 tokens" in first_use.summary(choice)
    ) == wanted[0]
    assert all(f.half == wanted[0] for f in engine.on(device).ffns)
    costs |= {64: 0.9, 32: 0.9, 16: 0.9}
    choice = tuning.search(engine, HEADS, 64)
    if wanted[0]:
        assert choice.device == DeviceSettings(dense=True, unpack=64, half=True)
        assert choice.share == 0.45


def test_fast_is_measured_once_and_only_where_it_is_asked_for(
    home: Path, costs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sparsity 0, which is mlx-lm's own way otherwise."""
    model, console = models.tiny("llama"), Console(file=io.StringIO(), width=300)
    nn.quantize(model, 32, 4)
    packed_costs(monkeypatch, lambda n: 0.5 if n > 64 else 2.0, 1e-6)
    ff.attach(model, ff.PrefillConfig(0.0))
    first_use.tune_first(model, 600, console)
    assert engine_of(model).device == DeviceSettings() and not home.exists()
    for _ in range(2):
        ff.attach(model, ff.PrefillConfig(0.0), device=DeviceSettings(unpack=256))
        first_use.tune_first(model, 255, console)
        assert engine_of(model).device.unpack == 256
        first_use.tune_first(model, 256, console)
        assert engine_of(model).device == DeviceSettings(dense=True, unpack=128)
    told = "first from 128 tokens on; an FFN takes 0.50 of its time in mlx-lm."
    assert console.file.getvalue().count(told) == 1
    model = models.tiny("llama", seed=1, intermediate_size=64)  # not quantised
    ff.attach(model, ff.PrefillConfig(0.0), device=DeviceSettings(unpack=256))
    first_use.tune_first(model, 256, console)
    assert engine_of(model).device.unpack == 0
    assert "--fast: no FFN is quantised or bfloat16 here" in console.file.getvalue()


@pytest.mark.parametrize(
    "seconds, error, wanted",
    [
        ({8: 0.7, 16: 0.6}, 1e-4, 16),
        ({8: 0.99, 16: 2.0}, 1e-4, 0),  # within the noise
        ({}, 1e-4, 0),
        ({8: 0.5}, 1e-2, 0),  # wrong
    ],
)
def test_attention_in_blocks_where_that_is_faster(
    seconds: dict, error: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleaved(ways: dict, rounds: int) -> dict:
        return {rows: {0: 1.0, **seconds}[rows] for rows in ways}

    def off(whole: Any, rows: int) -> Callable[..., mx.array]:
        return lambda *args, **kwargs: (1 + error) * right(whole, rows)(*args, **kwargs)

    right = calls.by_queries
    monkeypatch.setattr(calls, "CHUNK", 64)
    monkeypatch.setattr(calls, "ATTENTION_BLOCKS", tuple(seconds))
    monkeypatch.setattr(calls, "by_queries", off)
    monkeypatch.setattr(calls, "interleaved", interleaved)
    measured = calls.attention_seconds(HEADS, mx.float32)
    assert calls.attention_block(measured) == wanted


@pytest.mark.parametrize(
    "seconds, time, wanted",
    [
        ({512: 0.9, 1024: 0.9}, 1e9, (1024, [512, 1024])),
        ({512: 0.9, 1024: 0.99}, 1e9, (512, [512, 1024])),  # within the noise
        ({512: 1.1, 1024: 0.1}, 1e9, (CHUNK, [512])),
        ({512: 0.9, 1024: 0.9}, 0, (CHUNK, [])),  # no time left
        ({512: 0.9, 2**40: 0.9}, 1e9, (512, [512])),  # too little memory
    ],
)
def test_longer_calls_where_they_are_faster(
    seconds: dict[int, float],
    time: float,
    wanted: tuple[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways compute the same tokens; a layer of a real model is run."""
    ran: list[int] = []

    def interleaved(ways: dict, rounds: int) -> dict:
        one, two = ways[1](), ways[2]()
        assert sum(y.shape[1] for y in two[::2]) == one[0].shape[1]
        ran.append(one[0].shape[1])
        return {1: seconds[ran[-1]], 2: 1.0}

    monkeypatch.setattr(calls, "CHUNK", CHUNK)
    monkeypatch.setattr(calls, "STEPS", tuple(seconds))
    monkeypatch.setattr(calls, "interleaved", interleaved)
    engine = made().on(DeviceSettings(64, attention_block=128))
    found = calls.step_seconds(engine, HEADS, mx.float32, lambda: time)
    assert (calls.longest_gaining(found), list(found)) == wanted == (wanted[0], ran)


def test_alternatives_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run of each does not count; of the others the median does."""
    now, order = 0.0, ""
    seconds = {"a": iter([99.0, 3.0, 1.0, 2.0]), "b": iter([99.0, 7.0, 9.0, 8.0])}
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(timing, "time", clock)

    def run(name: str) -> mx.array:
        nonlocal now, order
        order, now = order + name, now + next(seconds[name])
        return mx.zeros(1)

    def tick() -> None:
        nonlocal order
        order += "."

    ways = {name: lambda name=name: run(name) for name in "ab"}
    assert timing.interleaved(ways, 3, tick) == {"a": 2.0, "b": 8.0}
    assert order == "ab.ab.ab.ab."


# What load and attach do with it


def test_load_attach_and_tune_go_by_what_is_remembered(
    tiny: Path, small: None, costs: dict[Any, Any]
) -> None:
    """Unless the user sets a device or a block size; other settings are other choices."""
    costs |= {16: 0.9, 32: 0.6, (128, "chunk"): 0.7}
    model, _ = ff.load(str(tiny))
    assert engine_of(model).device == DeviceSettings()
    choice = ff.tune(model, 64)
    assert engine_of(model).device == choice.device == DeviceSettings(32, "chunk", 128)
    for again in (ff.load(str(tiny))[0], models.tiny("llama", vocab=4096)):
        if engine_of(again) is None:
            ff.attach(again, ff.PrefillConfig())
        assert engine_of(again).device == choice.device
        assert all(f.strategy == "chunk" for f in engine_of(again).ffns)
    device = DeviceSettings(64, "columns")
    for wanted, more in (
        (DeviceSettings(), {"block_size": 16}),
        (DeviceSettings(), {"sparsity": 0.4}),
        (DeviceSettings(), {"selector": "first-block"}),
        (DeviceSettings(), {"sparsity": 0.0}),
        (device, {"device": device}),
        (DeviceSettings(), {"device": DeviceSettings()}),
    ):
        assert engine_of(ff.load(str(tiny), **more)[0]).device == wanted


@pytest.mark.parametrize("sparsity, said", [(None, "not attached"), (0.0, "nothing")])
def test_what_cannot_be_tuned(sparsity: Any, said: str) -> None:
    model = models.tiny("llama")
    if sparsity is not None:
        ff.attach(model, ff.PrefillConfig(sparsity))
    with pytest.raises(ff.ConfigError, match=said):
        ff.tune(model)


def test_the_best_so_far_counts(
    costs: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of less than a chunk were not tried then, nor was attention."""
    costs |= {16: 0.5, 32: 0.6, (64, "chunk"): 0.7, "queries": 8}
    clock = iter([0.0, 9.0, *[21.0] * 9])
    monkeypatch.setattr(
        tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    choice = tuning.search(made(), HEADS, 64, limit=20)
    assert [(c.block_size, c.strategy) for c in choice.candidates] == [
        (64, "chunk"),
        (64, "columns"),
    ]
    assert choice.device == DeviceSettings(64, "chunk", CHUNK)
