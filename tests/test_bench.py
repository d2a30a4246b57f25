"""The measuring code and the bench command on tiny models: figures, table, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import bad, report
from models import (
    demo_tokenizer,
    save_folder,
    save_random_predictor,
    settings,
    tiny,
    token_ids,
)

from mlx_fastforward import tuned, tuning
from mlx_fastforward.attachment import attach, engine_of
from mlx_fastforward.bench.flops import cost
from mlx_fastforward.bench.speed import shapes, ttft
from mlx_fastforward.build import engine_for
from mlx_fastforward.cli import first_use
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.continuation import continuation, divergence
from mlx_fastforward.errors import FastForwardError
from mlx_fastforward.scorers import DraftScorer, LayersScorer
from mlx_fastforward.speculative import Speculative
from mlx_fastforward.tokens.speculative import KeepConfig, kept_places

PROMPT = 60
TEXT = mx.array(token_ids(PROMPT + 8, 0, 4096))


def test_kl_and_agreement_are_those_of_the_distributions() -> None:
    model = tiny("llama", vocab=4096)
    engine = engine_for(model, settings(sparsity=0.8))
    dense, sparse = (continuation(model, TEXT, PROMPT, e) for e in (None, engine))
    assert engine_of(model) is None and dense.shape == (8, 4096)
    kl, top1 = divergence(dense, sparse)
    p, q = (np.array(x, dtype=np.float64) for x in (dense, sparse))
    wanted = (np.exp(p) * (p - q)).sum(-1).mean()
    assert kl == pytest.approx(wanted, rel=1e-3) and wanted > 0
    assert top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert divergence(dense, dense) == (0, 1)


def test_ttft_leaves_the_model_stock_and_reports_the_ratio() -> None:
    model, ids, ticks = tiny("llama", vocab=4096), mx.arange(8, 72), []
    engine, tick = engine_for(model, settings()), lambda: ticks.append(1)
    (row,) = ttft.measure(model, demo_tokenizer(), ids, [ttft.Arm(engine)], 2, 0, tick)
    assert engine_of(model) is None and len(ticks) == 4
    assert row.speedup == pytest.approx(row.stock_ttft_s / row.ttft_s)
    assert row.ttft_spread_s[0] <= row.ttft_s <= row.ttft_spread_s[1]
    assert 0 < row.ffn_flops_skipped < 0.5 and row.ideal_speedup > 1
    reachable = 1 / (1 - row.ffn_share * row.ffn_flops_skipped)
    assert row.reachable_speedup == pytest.approx(reachable) and row.ffn_share > 0
    assert row.decode_tps > 0 < row.stock_decode_tps
    assert (row.context, row.selector, row.strategy) == (64, "probe", "chunk")


BITS = [0, 4, 0, 0, 0, 0, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("name, bits", [*zip(shapes.SHAPES, BITS, strict=True)])
def test_random_models_and_predictors_have_the_real_shapes(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled down, so that they fit into a test."""
    small = dict(hidden_size=128, intermediate_size=448, head_dim=16)
    small |= dict(global_head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16)
    monkeypatch.setitem(shapes.SHAPES, name, shapes.SHAPES[name] | small)
    model = shapes.random_model(name, 4, mx.float32, bits)
    assert len(model.layers) == 4
    assert getattr(model.layers[0].mlp.down_proj, "bits", 0) == bits
    predictor = shapes.random_predictor(model)
    attach(model, settings(selector="trained"), predictor=predictor)
    assert mx.all(mx.isfinite(model(mx.arange(64)[None]))).item()


def test_part_of_a_prompt_is_read_from_its_beginning_each_time() -> None:
    """By a draft, and by the first layers: nobody remembers the prompt of the run before."""
    model, ids = tiny("llama", vocab=4096), mx.arange(8, 216)
    config = KeepConfig(keep=0.5, threshold=1, chunk=13)  # 169 between the ends
    engine = engine_for(model, settings())
    draft = DraftScorer(tiny("llama", vocab=4096, num_hidden_layers=1), "small")
    fed, call = [], draft._scores
    draft._scores = lambda *a: fed.append(draft.cached) or call(*a)  # type: ignore
    scorers = (draft, LayersScorer(model, 2))
    arms = [ttft.Arm(engine, Speculative(model, s, config)) for s in scorers]
    rows = ttft.measure(model, demo_tokenizer(), ids, arms, 2, 0, lambda: None)
    assert fed == [[], []] and engine_of(model) is None
    assert [(r.keep, r.prefill_draft) for r in rows] == [(0.5, "small"), (0.5, "self")]
    names = [ttft.arm_name(r) for r in rows]
    assert names[0] == "keep 50% by small, probe 50%, block 8, chunk"
    for r, scorer in zip(rows, scorers):
        read = kept_places(np.zeros(208), 0, config).size
        wanted = cost(model, engine, 208, scorer, read)
        assert r.ideal_speedup == wanted.speedup > 1 and r.decode_tps > 0
        assert r.ffn_flops_skipped == wanted.ffn.sparsity > 0.2

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    draft.score = broken  # type: ignore[method-assign]
    with pytest.raises(FastForwardError, match="small failed .out of memory"):
        ttft.measure(model, demo_tokenizer(), ids, arms, 1, 0, lambda: None)


BENCH = ["bench", "-n", 1]
KEYS = [
    "context",
    "sparsity",
    "prune_tokens",
    "selector",
    "block_size",
    "strategy",
    "attention_block",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = tiny("llama", vocab=4096, max_position_embeddings=200)
    return save_folder(net, tmp_path_factory.mktemp("bench") / "tiny")


def arms(found: dict[str, Any]) -> list[tuple]:
    return [tuple(row[k] for k in KEYS) for row in found["rows"]]


def test_every_arm_has_a_row(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttft, "DECODED", 0)
    args = ["--contexts", "64,96", "--block-sizes", "8,16", "--sparsities", "0.5,0.25"]
    args += ["--selectors", "probe,first-block", "--strategies", "chunk,columns"]
    args += ["--attention-blocks", "0,16"]
    rows = arms(report(tmp_path, *BENCH, "--model", folder, *args)[1])
    assert len(rows) == len(set(rows)) == 2**6


def test_the_table_the_picture_and_the_environment(
    tmp_path: Path, folder: Path
) -> None:
    """Without --contexts it is half of what this model allows."""
    png = tmp_path / "bench.png"
    args = ["--model", folder, "--block-sizes", 8, "--png", png]
    args += ["--prune-tokens", 0.25]
    done, found = report(tmp_path, *BENCH, *args)
    wanted = r"^100 +probe 50%, tokens 25%, block 8, chunk +\d"
    assert re.search(wanted, done.stdout, re.M)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert arms(found) == [(100, 0.5, 0.25, "probe", 8, "chunk", 0)]
    assert found["rows"][0]["ffn_flops_skipped"] > 0.1
    assert {"device", "blas", "mlx", "mlx_lm", "dtype"} <= set(found["environment"])
    assert found["environment"]["model"] == "tiny, 4 layers"
    assert str(folder.parent) not in json.dumps(found)


def test_the_predictor_beside_the_model_and_what_tuning_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny("llama", vocab=4096)
    folder = save_folder(net, tmp_path / "tiny")
    save_random_predictor(net, folder)
    args = [*BENCH, "--model", folder, "--contexts", 96]
    device = DeviceSettings(16, "columns", attention_block=32)
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    monkeypatch.setattr(tuned, "remembered", lambda key: device)
    found = report(tmp_path, *args)[1]
    assert arms(found) == [(96, 0.5, 0, "trained", 16, "columns", 32)]
    found = report(tmp_path, *args, "--predictor", "none", "--no-tune")[1]
    assert arms(found) == [(96, 0.5, 0, "probe", 128, "chunk", 0)]
    device = DeviceSettings(dense=True)
    done, found = report(tmp_path, *args)
    assert found["rows"][0]["sparsity"] == 0 and "tuned: dense" in done.stdout


def test_the_dense_arm_that_dequantises_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside stock and sparse; as measured, or unmeasured."""
    net = tiny("llama", vocab=4096)
    nn.quantize(net, 32, 4)
    packing = {"quantization": {"group_size": 32, "bits": 4}}
    folder = save_folder(net, tmp_path / "tiny", **packing)
    args = [*BENCH, "--model", folder, "--contexts", 300, "--fast"]
    done, found = report(tmp_path, *args, "--no-tune")
    assert [(r["sparsity"], r["unpack"]) for r in found["rows"]] == [(0.5, 0), (0, 256)]
    assert re.search(r"^300 +dense, dequantised first +\d", done.stdout, re.M)
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    choice = tuning.Choice(DeviceSettings(dense=True), [])
    monkeypatch.setattr(tuning, "fastest_dense", lambda engine: choice)
    assert report(tmp_path, *args)[1]["rows"][1]["unpack"] == 0


def test_drafts_and_shares_beside_neurons(tmp_path: Path, folder: Path) -> None:
    """A name, self, or beside random weights a shape; stock is not measured twice."""
    png, draft = tmp_path / "bench.png", tiny("llama", vocab=4096, num_hidden_layers=1)
    small = save_folder(draft, tmp_path / "small")
    args = ["--model", folder, "--block-sizes", 8, "--sparsities", "0,0.5"]
    args += ["--prefill-draft", f"{small},self", "--keep", "1,0.5", "--png", png]
    done, found = report(tmp_path, *BENCH, *args)
    rows = [(r["sparsity"], r["keep"], r["prefill_draft"]) for r in found["rows"]]
    half = [(0.5, "small"), (0.5, "self")]
    assert rows == [(0, *h) for h in half] + [(0.5, 1, ""), *[(0.5, *h) for h in half]]
    assert re.search(r"^100 +keep 50% by small +\d", done.stdout, re.M)
    assert found["environment"]["draft small"] == "1 layers"
    assert str(tmp_path) not in json.dumps(found) and png.is_file()


def test_a_random_draft_has_as_many_of_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    small |= dict(num_key_value_heads=2, head_dim=16)
    for name in ("llama-3.2-1b", "smollm2-135m"):
        monkeypatch.setitem(shapes.SHAPES, name, shapes.SHAPES[name] | small)
    args = ["--random", "llama-3.2-1b", "--layers", 4, "--contexts", 64]
    args += ["--prefill-draft", "smollm2-135m", "--sparsities", 0]
    found = report(tmp_path, *BENCH, *args)[1]
    assert found["environment"]["draft smollm2-135m"] == "8 layers"
    assert [r["keep"] for r in found["rows"]] == [0.5]


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--random", "gpt-5"], 2, "--random must be one of llama-3.2-1b, "),
        (["--random", "qwen3-4b", "--q-bits", 7], 2, "--q-bits must be 2, 3, "),
        (["--random", "qwen3-4b", "--model", "a"], 2, "give --model or --random, not"),
        (["--layers", 3], 2, "--layers and --q-bits go with --random."),
        (["--png", "a.jpg"], 2, "--png must be a file ending in .png"),
        (["--dtype", "int8"], 2, "--dtype must be one of float32, float16, bfloat16"),
        (["--contexts", "many"], 2, "--contexts must be numbers with commas"),
        (["--contexts", "96,2017"], 2, "--contexts: 2,017 tokens are too many, the mo"),
        (["--block-sizes", "0"], 2, "--block-sizes must be at least 8, got '0'."),
        (["--contexts", "0"], 2, "--contexts must be at least 1"),
        (["--keep", "0.5"], 2, "--keep needs --prefill-draft: who says what is read?"),
        (
            ["--prefill-draft", "self", "--keep", "0"],
            2,
            "keep must be above 0 and at m",
        ),
        (["--prune-tokens", "1"], 2, "prune_tokens must be at least 0 and below 1"),
        (["--selectors", "magic"], 2, "selector must be one of "),
        (["--strategies", "fast"], 2, "strategy must be one of chunk, columns"),
        (["--json", "no/such/a.json"], 1, "no/such/a.json cannot be written: no such"),
    ],
)
def test_refusals(args: list[Any], code: int, said: str) -> None:
    assert bad(code, "bench", *args).startswith(said)
