"""What doctor says of a machine and a model, and that --help imports nothing heavy."""

import importlib
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import pytest
from commands import bad, good
from mlx_lm.models import mamba

from mlx_fastforward import tuned
from mlx_fastforward.cli import first_use
from mlx_fastforward.config import DeviceSettings


def lines(*args: Any) -> dict[str, str]:
    """What is said, by label."""
    found = [line.partition("  ") for line in good("doctor", *args).splitlines()]
    return {label.strip(): said.strip() for label, _, said in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.tiny("gemma3_text", vocab=4096)
    return models.save_folder(net, tmp_path_factory.mktemp("doctor") / "tiny")


def test_one_screen_about_a_model(folder: Path) -> None:
    """Windows of 24 tokens in two of four layers hold no more; 2 heads of 8, float32, K and V."""
    said = lines("--model", folder, "--tokens", 1000)
    assert len(said) <= 20 and "mlx-lm" in said["versions"]
    assert said["model"].startswith("tiny: gemma3_text, 4 layers, hidden 32, FFN 128")
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    kept = 2 * (1000 + models.WINDOW) * 2 * 2 * 8 * 4
    assert f"weights {weights / 1e6:.0f} MB" in said["memory"]
    assert f"tokens {kept / 1e6:.0f} MB" in said["memory"] and "fits" in said["memory"]
    assert said["predictor"].startswith("none found; selector probe needs none")
    assert said["prefill"].startswith("50% of FFN neurons dropped (not verified")
    assert said["prefill"].endswith("decoding, layers 0, 3")


def test_what_is_off_and_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = ["--model", folder]
    assert lines(*same, "--sparsity", 0)["prefill"] == "stock mlx-lm: sparsity 0"
    assert lines(*same, "--sparsity", 0)["tuned"].endswith("nothing runs sparsely")
    assert lines(*same)["tuned"] == "not needed: the FFNs are too small to gain by it"
    with monkeypatch.context() as patch:
        patch.setattr(first_use, "SMALLEST", 0)
        assert lines(*same)["tuned"].startswith("not yet")
    kept = DeviceSettings(256, "columns", 1024, 512)
    monkeypatch.setattr(
        tuned, "remembered", lambda key: kept
    )  # of `tune`, however small
    said = lines(*same)
    assert said["tuned"] == "blocks of 256 tokens, columns, attention by 512 queries"
    assert "prompts below 1,024 tokens" in said["prefill"]
    monkeypatch.setattr(tuned, "remembered", lambda key: DeviceSettings(dense=True))
    assert lines(*same)["prefill"].startswith("stock mlx-lm: dense is the fastest")
    said = lines("--model", "somebody/never-downloaded")
    assert said["model"].endswith("not on this machine; chat downloads it")
    args = mamba.ModelArgs("mamba", 4096, 8, 16, 4, 4, 1, True, True, 4)
    other = models.save_folder(mamba.Model(args), tmp_path / "mamba")
    assert "no FFN was found in its layers" in lines("--model", other)["model"]
    assert bad(2, "doctor", *same, "--sparsity", "much").startswith("--sparsity must")


def test_a_model_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"max_recommended_working_set_size": 10**8}
    monkeypatch.setattr(mx, "device_info", lambda: limit)
    said = lines("--model", folder, "--tokens", 800_000)
    assert "TOO LARGE" in said["memory"] and said["memory"].endswith(": 0.1 GB")


def test_the_wired_limit_needs_metal_and_macos_15(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = importlib.import_module("mlx_fastforward.cli.doctor")
    limit = {"max_recommended_working_set_size": 27 * 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: limit)
    metal = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(mx, "metal", metal)
    for release, said in (("15.1", "27.0 GB"), ("14.6", "off: needs macOS 15")):
        monkeypatch.setattr(platform, "mac_ver", lambda release=release: (release,))
        assert command._wired().startswith(said)


def test_help_imports_nothing_heavy() -> None:
    """Importing mlx-lm alone takes seconds."""
    code = (
        "import sys; from mlx_fastforward.cli import app\n"
        "try: app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'matplotlib', 'transformers', 'torch'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
