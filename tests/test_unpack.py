"""Packed weights dequantised first: the stock model's answer to rounding, and only for long calls."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from commands import bad, good

from mlx_fastforward import DeviceSettings, PrefillConfig, attach
from mlx_fastforward.attachment import switched
from mlx_fastforward.model import linear
from mlx_fastforward.model.proof import ffn_of

IDS = models.token_ids(60)
LEAST = 32
FAST = DeviceSettings(unpack=LEAST)
PACKINGS = [(4, "affine"), (8, "affine"), (4, "mxfp4")]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every product with a dequantised weight."""
    calls: list[int] = []
    right = linear.unpacked

    def noted(m: nn.Module, x: mx.array) -> mx.array:
        calls.append(x.shape[1])
        return right(m, x)

    monkeypatch.setattr(linear, "unpacked", noted)
    return calls


def packed(bits: int, mode: str, name: str = "llama") -> nn.Module:
    model = models.tiny(name)
    nn.quantize(model, 32, bits, mode=mode)
    return model


def limit(mode: str) -> float:
    """mxfp4 computes in bfloat16."""
    return 5e-2 if mode == "mxfp4" else 1e-4


@pytest.mark.parametrize("bits, mode", PACKINGS)
@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding", "phi3", "gemma3_text"])
def test_dense(name: str, bits: int, mode: str, seen: list[int]) -> None:
    """Prompts; short calls, decode steps and what is switched off are mlx-lm's to the last bit."""
    model = packed(bits, mode, name)
    stock, short = models.prefill(model, IDS), models.prefill(model, IDS[: LEAST - 1])
    steps = models.decode(model, IDS[:20], 4)
    attach(model, PrefillConfig(0.0))
    models.assert_close(models.prefill(model, IDS), stock, 0)
    attach(model, PrefillConfig(0.0), device=FAST)
    assert not seen
    models.assert_close(models.prefill(model, IDS), stock, limit(mode))
    projections = 2 if name == "phi3" else 3
    assert seen == [len(IDS)] * projections * models.LAYERS
    seen.clear()
    models.assert_close(models.prefill(model, IDS[: LEAST - 1]), short, 0)
    assert np.array_equal(models.decode(model, IDS[:20], 4)[1], steps[1])
    with switched(model, False):
        models.assert_close(models.prefill(model, IDS), stock, 0)
    model.train()
    models.prefill(model, IDS)
    assert not seen


@pytest.mark.parametrize("strategy", ["chunk", "columns", "stored"])
@pytest.mark.parametrize("bits, mode", PACKINGS)
def test_sparse(bits: int, mode: str, strategy: str, seen: list[int]) -> None:
    """Dense tokens, gathered rows, and layers that stay dense."""
    model = packed(bits, mode)
    config = models.settings(schedule="first-dense", selector="first-block")
    attach(model, config, device=DeviceSettings(strategy=strategy))
    plain = models.prefill(model, IDS)
    attach(model, config, device=DeviceSettings(strategy=strategy, unpack=8))
    found = models.prefill(model, IDS)
    if mode == "affine":  # in bfloat16 other neurons may be chosen
        models.assert_close(found, plain, limit(mode))
    assert seen.count(len(IDS)) == 6  # of the first layer and the last
    assert len(seen) == 12 and models.distance(found[0], plain[0]) < 0.2


@pytest.mark.parametrize("bits", [0, 4])
def test_float16(bits: int) -> None:
    """A bfloat16 FFN: right to the rounding of what comes back and of a CPU's products."""
    mlp = models.tiny("llama-bias-sliding").layers[0].mlp
    mlp.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(mlp, 32, bits)
    own = ffn_of(mlp)
    assert own is not None
    fast, x = own.under("chunk", 8, half=True), mx.random.normal(
        (1, 40, models.HIDDEN), key=mx.random.key(3)
    )
    x, neurons = x.astype(mx.bfloat16), mx.arange(0, models.FFN, 2)[None]
    exact = x.astype(mx.float32)
    for found, wanted in (
        (fast.activations_and_output(x)[1], own.activations_and_output(exact)[1]),
        (fast.sparse(x, neurons), own.sparse(exact, neurons)),
    ):
        assert found.dtype == mx.bfloat16
        off = models.distance(np.array(found.astype(mx.float32)), np.array(wanted))
        assert 0 < off < (2e-2 if bits else 1e-2)  # mlx dequantises in bfloat16
    assert fast.activations_and_output(x)[0].dtype == mx.bfloat16


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_float16_that_overflows(sparsity: float) -> None:
    """A layer goes back to bfloat16, and to the same answer; the others stay."""
    model, device = models.tiny("llama"), DeviceSettings(unpack=8, half=True)
    for layer in (0, 2):
        down = model.layers[layer].mlp.down_proj
        down.weight = down.weight * 2**16
    model.set_dtype(mx.bfloat16)

    def logits() -> np.ndarray:
        return np.array(model(mx.array([IDS])).astype(mx.float32))

    attach(model, models.settings(sparsity=sparsity), device=DeviceSettings())
    plain = logits()
    engine = attach(model, models.settings(sparsity=sparsity), device=device)
    found = logits()
    assert [ffn.half for ffn in engine.ffns] == [False, True, False, True]
    assert np.isfinite(found).all() and models.distance(found, plain) < 0.2
    engine.ffns[1].half = engine.ffns[3].half = False
    assert np.array_equal(logits(), plain)


def test_memory_of_a_layer_at_a_time() -> None:
    """Float copies do not pile up: the next layer's may be made while the last are in use."""
    model = models.tiny(
        "llama", hidden_size=256, intermediate_size=2048, num_hidden_layers=4
    )
    nn.quantize(model, 32, 4)
    mx.eval(model.parameters())
    copies = 3 * 256 * 2048 * 4  # bytes of one layer

    def peak(device: DeviceSettings) -> int:
        attach(model, PrefillConfig(0.0), device=device)
        mx.clear_cache()
        mx.reset_peak_memory()
        models.prefill(model, IDS)
        return int(mx.get_peak_memory())

    peak(FAST)
    more = peak(FAST) - peak(DeviceSettings())
    assert 0 < more < 2.5 * copies


STORY = "Keawe was poor, brave, and active; he could read and write. " * 40


def test_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate and chat, at sparsity 0 alone; --no-tune takes it unmeasured."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "tiny")
    args: list[Any] = ["--model", folder, "-m", 3, "--no-tune"]
    dense = good("generate", STORY, *args, "--sparsity", 0)
    assert good("generate", STORY, *args, "--sparsity", 0, "--fast") == dense
    for command, *text in (("generate", "hello"), ("chat",)):
        said = bad(2, command, *text, *args, "--sparsity", 0.5, "--fast")
        assert said.startswith("--fast goes with --sparsity 0: a sparse")
