"""mlx_fastforward convert: what it prints, what it writes, and that every mistake is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_modules
from typer.testing import CliRunner, Result

from mlx_fastforward.cli import app
from mlx_fastforward.predictors import file as adapter_module
from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.file import BaseModel, load_predictor
from mlx_fastforward.predictors.search import predictor_for

RANK, H = 4, 8
D, F, LAYERS = models.HIDDEN, models.FFN, models.LAYERS
FILES = ["fastforward.json", "fastforward.safetensors"]
State = dict[str, torch.Tensor]


def run(*args: object) -> Result:
    """One command in this process; its output is no terminal."""
    return CliRunner().invoke(app, ["convert", *map(str, args)])


def good(*args: object) -> str:
    """Standard output of a conversion that must succeed."""
    done = run(*args)
    assert (done.exit_code, done.stderr.strip()) == (0, ""), done.output
    return done.stdout


def bad(code: int, *args: object) -> str:
    """The one line on stderr of a conversion that must fail without a traceback."""
    done = run(*args)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    return one_line(done.stderr.lstrip("\n"))


def one_line(stderr: str) -> str:
    assert stderr.startswith("mlx_fastforward: ") and stderr.endswith("\n"), stderr
    line = stderr[len("mlx_fastforward: ") : -1]
    assert line.isprintable(), line
    return line


def trained(**more: torch.Tensor) -> State:
    torch.manual_seed(0)
    predictor, compensator = torch_modules.Predictor, torch_modules.Compensator
    layers = [
        torch_modules.Layer(predictor(D, RANK, F), compensator(D, H))
        for _ in range(LAYERS)
    ]
    network = torch_modules.Network(layers, importance=[1.0, 2.0, 3.0, 4.0])
    return {**network.state_dict(), **more}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; its weights are not read, except the norms."""
    folder = tmp_path_factory.mktemp("models") / "tiny model"
    return models.save_folder(models.tiny("llama"), folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(trained(), tmp_path / "c.pt")
    return tmp_path / "c.pt"


@pytest.fixture
def flags(tiny: Path, tmp_path: Path) -> list[object]:
    return ["--model", tiny, "--out", tmp_path / "out"]


def left(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def dtypes(folder: Path) -> set[str]:
    weights = mx.load(str(folder / FILES[1]))
    assert isinstance(weights, dict)
    return {
        str(v.dtype).removeprefix("mlx.core.") for k, v in weights.items() if "." in k
    }


# What it writes


def test_a_conversion(checkpoint: Path, flags: list, tiny: Path) -> None:
    out = good(checkpoint, *flags)
    folder = flags[-1]
    assert left(folder) == FILES
    model = models.tiny("llama")
    predictor = load_predictor(folder)
    predictor.check(BaseModel.of(model))
    assert predictor.base.name == "tiny model" and predictor.importances == [1, 2, 3, 4]
    assert predictor.layers is not None and predictor.compensator is not None
    for i in range(LAYERS):
        name = f"layers.{i}.predictor.w1.weight"
        assert np.array_equal(
            np.array(predictor.layers[i].w1), trained()[name].T.numpy()
        )
    kinds = {
        part: predictor.details[part]["kind"] for part in ("predictor", "compensator")
    }
    assert kinds == {"predictor": "pooled", "compensator": "mlp"}
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["checkpoint"] == f"c.pt: PyTorch, {5 * LAYERS + 1} tensors"
    assert lines["model"] == "tiny model: llama, 4 layers, hidden 32, FFN 128"
    assert lines["predictor"] == "rank 4, 8 of 8 matrices transposed"
    told = "(the checkpoint does not say: see --activation)"
    assert lines["compensator"] == f"rank 8, 8 of 8 matrices transposed, relu {told}"
    assert lines["importances"] == "one per layer"
    assert lines["predictor"].startswith(f"{folder} (float32, ")
    assert "note" not in lines and "ignored" not in lines


def test_remarks_and_what_was_ignored(flags: list, tmp_path: Path) -> None:
    state = {k: v for k, v in trained().items() if ".predictor." in k}
    for i in range(LAYERS):
        state[f"layers.{i}.predictor.w1.weight"] = torch.ones(D, D)
        state[f"layers.{i}.predictor.w2.weight"] = torch.ones(F, D)
    state |= {f"head\x1b[31m.{i}": torch.ones(1) for i in range(4)}
    torch.save(state, tmp_path / "c.pt")
    out = good(tmp_path / "c.pt", *flags)
    assert "note         predictor.w1 is square: taken as (out, in)" in out
    assert "4 other tensors (head�[31m.0, head�[31m.1, head�[31m.2, ...)" in out
    assert "compensator  none" in out and "importances  none" in out


def test_the_default_folder_is_where_chat_looks(
    checkpoint: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    out = good(checkpoint, "--model", tiny)
    folder = tmp_path / "home" / "predictors" / "tiny-model"
    assert left(folder) == FILES and str(folder) in out
    found = predictor_for(str(tiny), BaseModel.of(models.tiny("llama")))
    assert found is not None and found.source == str(folder)
    assert "--overwrite" in bad(1, checkpoint, "--model", tiny)


def test_no_overwriting_unless_told(checkpoint: Path, flags: list) -> None:
    good(checkpoint, *flags)
    before = (flags[-1] / FILES[0]).read_text()
    assert bad(1, checkpoint, *flags, "--activation", "gelu") == (
        f"{flags[-1]} holds a predictor: --overwrite replaces it, "
        "--out puts the new one elsewhere."
    )
    assert (flags[-1] / FILES[0]).read_text() == before
    good(checkpoint, *flags, "--overwrite", "--activation", "gelu")
    compensator = load_predictor(flags[-1]).compensator
    assert compensator is not None and compensator.activation == "gelu"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype: str, checkpoint: Path, flags: list) -> None:
    assert f"({dtype}, " in good(checkpoint, *flags, "--dtype", dtype)
    assert dtypes(flags[-1]) == {dtype}


def test_the_dtype_is_the_models_own(checkpoint: Path, tmp_path: Path) -> None:
    model = models.tiny("llama")
    model.set_dtype(mx.bfloat16)
    folder = models.save_folder(model, tmp_path / "half")
    good(checkpoint, "--model", folder, "--out", tmp_path / "out")
    assert dtypes(tmp_path / "out") == {"bfloat16"}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_predictors(bits: int, checkpoint: Path, flags: list) -> None:
    assert f"w2 in {bits} bits" in good(checkpoint, *flags, "--quantize", bits)
    predictors = load_predictor(flags[-1]).predictors
    assert predictors is not None
    for i, w in enumerate(predictors):
        assert w.bits == bits and w.w2.shape == (RANK, F * bits // 32)
        back = mx.dequantize(w.w2, w.scales, w.biases, 64, bits)
        exact = trained()[f"layers.{i}.predictor.w2.weight"].T.numpy()
        step = np.ptp(exact, axis=-1).max() / (2**bits - 1)
        assert 0 < np.abs(np.array(back) - exact).max() < 1.01 * step
    assert dtypes(flags[-1]) == {"float32", "uint32"}


def test_quantised_predictors_of_odd_models(tmp_path: Path) -> None:
    """Scales are for 32 or 64 neurons."""
    model = models.tiny("llama", intermediate_size=40)
    folder = models.save_folder(model, tmp_path / "odd")
    state = trained()
    for i in range(LAYERS):
        state[f"layers.{i}.predictor.w2.weight"] = torch.ones(40, RANK)
    torch.save(state, tmp_path / "c.pt")
    flags = ["--model", folder, "--out", tmp_path / "out"]
    line = bad(2, tmp_path / "c.pt", *flags, "--quantize", 8)
    assert line == "--quantize needs a multiple of 32 neurons, the model has 40."
    good(tmp_path / "c.pt", *flags)


def test_quantising_needs_predictors(flags: list, tmp_path: Path) -> None:
    state = {k: v for k, v in trained().items() if ".compensator." in k}
    torch.save(state, tmp_path / "c.pt")
    line = bad(2, tmp_path / "c.pt", *flags, "-q", 4)
    assert line == "--quantize is for predictors, and the checkpoint has none."


@pytest.mark.parametrize("asked", ["relu", "silu", "gelu"])
def test_the_activation(asked: str, checkpoint: Path, flags: list) -> None:
    out = good(checkpoint, *flags, "--activation", asked)
    assert f", {asked}\n" in out and "does not say" not in out
    compensator = load_predictor(flags[-1]).compensator
    assert compensator is not None and compensator.activation == asked


def test_the_activation_in_the_file_beside(checkpoint: Path, flags: list) -> None:
    beside = {"compensator": {"activation": "silu"}, "block_size": 64}
    (checkpoint.parent / FILES[0]).write_text(json.dumps(beside))
    assert ", silu\n" in good(checkpoint, *flags)
    predictor = load_predictor(flags[-1])
    assert (
        predictor.compensator is not None and predictor.compensator.activation == "silu"
    )
    assert predictor.details["block_size"] == 64


def test_an_adapter_is_a_checkpoint(checkpoint: Path, flags: list) -> None:
    """In another dtype, in place: the files are replaced whole."""
    good(checkpoint, *flags, "--activation", "gelu")
    first = load_predictor(flags[-1])
    assert first.predictors is not None
    exact = np.array(first.predictors[1].w2)
    good(flags[-1], *flags, "--overwrite", "--dtype", "float16")
    again = load_predictor(flags[-1])
    assert dtypes(flags[-1]) == {"float16"} and again.predictors is not None
    got = np.array(again.predictors[1].w2.astype(mx.float32))
    assert np.array_equal(got, exact.astype(np.float16).astype(np.float32))
    assert again.compensator is not None and again.compensator.activation == "gelu"


def test_a_map(flags: list, tmp_path: Path) -> None:
    state = {
        k.replace("layers.", "net.").replace("w", "m"): v for k, v in trained().items()
    }
    torch.save(state, tmp_path / "c.pt")
    lines = {r"net\.(\d+)\.(\w+)\.m(\d)\.meight": r"layers.\1.\2.w\3"}
    lines[r"net\.(\d+)\.predictor\.query"] = r"layers.\1.predictor.query"
    (tmp_path / "map.json").write_text(json.dumps(lines))
    with_map = ["--map", tmp_path / "map.json"]
    assert "net.0.predictor.query" in bad(1, tmp_path / "c.pt", *flags)
    good(tmp_path / "c.pt", *flags, *with_map)
    assert load_predictor(flags[-1]).predictors
    (tmp_path / "map.json").write_text('{"(": null}')
    assert "map.json" in bad(1, tmp_path / "c.pt", *flags, *with_map)
    assert "No such file" in bad(1, tmp_path / "c.pt", *flags, "--map", tmp_path / "no")


# Failures while writing


def failing(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["tensors", "json"])
def test_a_failure_leaves_nothing_behind(
    where: str, checkpoint: Path, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "tensors":
        monkeypatch.setattr(adapter_module.mx, "save_safetensors", failing)
    else:
        monkeypatch.setattr(Path, "write_text", failing)
    line = bad(1, checkpoint, *flags)
    assert line == f"{flags[-1]} cannot be written: No space left on device."
    assert not flags[-1].exists()


@pytest.mark.parametrize("where", ["tensors", "json"])
def test_a_failure_leaves_the_old_adapter_whole(
    where: str, checkpoint: Path, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(checkpoint, *flags)
    before = [(flags[-1] / name).read_bytes() for name in FILES]
    if where == "tensors":
        monkeypatch.setattr(adapter_module.mx, "save_safetensors", failing)
    else:
        monkeypatch.setattr(Path, "write_text", failing)
    bad(1, checkpoint, *flags, "--overwrite", "--dtype", "float16")
    assert left(flags[-1]) == FILES
    assert [(flags[-1] / name).read_bytes() for name in FILES] == before


def test_a_failure_between_the_two_files_leaves_no_adapter(
    checkpoint: Path, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old JSON with new weights would load and be wrong."""
    good(checkpoint, *flags)
    real, calls = os.replace, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        return failing() if len(calls) == 2 else real(*args)

    monkeypatch.setattr(adapter_module.os, "replace", second_fails)
    bad(1, checkpoint, *flags, "--overwrite")
    assert left(flags[-1]) == ["fastforward.safetensors"]


def test_ctrl_c_leaves_nothing_behind(
    checkpoint: Path, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_module.mx, "save_safetensors", stopped)
    assert bad(130, checkpoint, *flags) == "stopped."
    assert not flags[-1].exists()


def test_weights_that_cannot_be_converted_leave_nothing_behind(
    flags: list, tmp_path: Path
) -> None:
    key = f"layers.{LAYERS - 1}.compensator.w2.weight"
    torch.save(trained(**{key: torch.full((D, H), torch.nan)}), tmp_path / "c.pt")
    line = bad(1, tmp_path / "c.pt", *flags)
    assert line.startswith(f"{key} holds {D * H} values that are NaN")
    torch.save(trained(**{key: torch.full((D, H), 1e6)}), tmp_path / "c.pt")
    line = bad(1, tmp_path / "c.pt", *flags, "--dtype", "float16")
    assert "does not fit float16" in line
    assert not flags[-1].exists()
    good(tmp_path / "c.pt", *flags)


def test_folders_that_cannot_be_written(checkpoint: Path, tiny: Path) -> None:
    base = [checkpoint, "--model", tiny, "--out"]
    assert "is a file; expected a folder" in bad(1, *base, checkpoint)
    line = bad(1, *base, checkpoint / "sub" / "folder")
    assert (
        line == f"{checkpoint / 'sub' / 'folder'} cannot be written: Not a directory."
    )


def test_the_home_of_nobody(checkpoint: Path, tiny: Path) -> None:
    assert "~no-such-user" in bad(
        1, checkpoint, "--model", tiny, "--out", "~no-such-user/a"
    )
    assert "~no-such-user" in bad(1, "~no-such-user/c.pt")


# --list


ODD = "x\x1b]0;title\x07\r\n\t\u202e.tensor"


def test_list_prints_every_tensor_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    names = {ODD: torch.ones(2, 3), "layers.1.predictor.bias": torch.ones(1).long()}
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in trained(**names).items()},
        tmp_path / "c.safetensors",
    )
    before = left(tmp_path)
    done = run(tmp_path / "c.safetensors", "--list")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert lines[0].split() == ["tensor", "shape", "dtype", "taken", "as"]
    assert len(lines) == 1 + len(trained()) + 2 + 1 and lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    rows = {line.split("  ")[0]: line for line in lines}
    assert rows["x�]0;title� �.tensor"].split()[-4:] == [
        "[2,",
        "3]",
        "float32",
        "(ignored)",
    ]
    assert "int64" in rows["layers.1.predictor.bias"]
    assert rows["layers.1.predictor.bias"].endswith(
        "unknown: name it with --map, or leave it out with null"
    )
    assert rows["layers.3.compensator.w2.weight"].endswith("layers.3.compensator.w2")
    assert rows["importance"].endswith("  importance")
    assert left(tmp_path) == before


def test_list_shows_what_a_map_does(checkpoint: Path, tmp_path: Path) -> None:
    lines = {"importance": None, r"layers\.(\d)\.predictor\.w1\.weight": None}
    (tmp_path / "map.json").write_text(json.dumps(lines))
    out = good(checkpoint, "--list", "--map", tmp_path / "map.json")
    assert out.count("(ignored)") == 1 + LAYERS


def test_list_of_tensors_of_all_layers(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **{"predictor.w1": np.ones((LAYERS, D, RANK))})
    out = good(tmp_path / "c.npz", "--list")
    assert "[4, 32, 4]  float64  layers.*.predictor.w1" in out


CONFUSING = ["ema.layers.0.predictor.query", "predictor.w1", "net.0.predictor.query"]


@pytest.mark.parametrize("name", CONFUSING)
def test_list_of_what_cannot_be_converted(name: str, tmp_path: Path) -> None:
    torch.save(trained(**{name: torch.ones(D)}), tmp_path / "c.pt")
    out = good(tmp_path / "c.pt", "--list")
    assert len(out.splitlines()) == 1 + len(trained()) + 1


# Mistakes


WRONG = [
    (
        ["--dtype", "int8"],
        "--dtype must be one of float32, float16, bfloat16; got int8.",
    ),
    (["--quantize", "3"], "--quantize must be one of 4, 8; got 3."),
    (
        ["--activation", "tanh"],
        "--activation must be one of relu, silu, gelu; got tanh.",
    ),
    (["--model", ""], "--model must be a folder or repository name, got nothing."),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_usage_is_told_with_code_2(
    args: list[str], message: str, checkpoint: Path
) -> None:
    assert bad(2, checkpoint, *args) == message


@pytest.mark.parametrize("args", [[], ["c.pt", "--no-such-flag"], ["c.pt", "-q", "x"]])
def test_what_typer_refuses(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_failures_are_told_with_code_1(
    checkpoint: Path, tiny: Path, tmp_path: Path
) -> None:
    assert "does not exist" in bad(1, tmp_path / "no.pt", "--model", tiny)
    assert "config.json" in bad(1, checkpoint, "--model", tmp_path)
    assert "is a file" in bad(1, checkpoint, "--model", checkpoint)
    (tmp_path / "empty.npz").touch()
    assert "cannot be read as an npz file" in bad(1, tmp_path / "empty.npz")


def test_the_checkpoint_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    """The demo model, which is the default, has other sizes."""
    line = bad(1, checkpoint, "--out", tmp_path / "out")
    assert "of demo model" in line or "expected shape" in line
    assert not (tmp_path / "out").exists()


def test_torch_missing(
    checkpoint: Path, flags: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'mlx-fastforward[torch]'" in bad(1, checkpoint, *flags)


# Repositories


def test_a_repository(
    flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind of file only is fetched, and the repository's name is told."""
    fetched = []

    def download(repo: str, patterns: list[str], what: str) -> Path:
        fetched.append((repo, patterns, what))
        if "*.pt" in patterns:
            torch.save(trained(), tmp_path / "repo" / "c.pt")
        return tmp_path / "repo"

    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(finding, "download", download)
    out = good("somebody/predictors", *flags)
    assert "checkpoint   somebody/predictors: PyTorch, 21 tensors" in out
    assert fetched == [
        ("somebody/predictors", ["*.json", "*.safetensors"], "checkpoint"),
        ("somebody/predictors", ["*.json", "*.pt", "*.pth", "*.bin"], "checkpoint"),
    ]
    assert load_predictor(flags[-1]).details["source"]["name"] == "somebody/predictors"


def test_a_repository_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(finding, "snapshot_download", offline)
    line = bad(1, "somebody/predictors")
    assert "'somebody/predictors' is not a local folder" in line and "no route" in line


@pytest.mark.parametrize("name", ["runs/missing.pt", "runs/missing.safetensors"])
def test_a_mistyped_file_is_no_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("asked the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "snapshot_download", offline)
    line = bad(1, name)
    assert "does not exist" in line and "asked the hub" not in line


# Streams, and real processes


def test_stderr_is_empty_after_a_success(checkpoint: Path, flags: list) -> None:
    done = run(checkpoint, *flags)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout


def test_stderr_is_one_line_after_a_failure(flags: list, tmp_path: Path) -> None:
    bad_importance = torch.tensor([-1.0, 1, 1, 1])
    torch.save(trained(importance=bad_importance), tmp_path / "c.pt")
    done = run(tmp_path / "c.pt", *flags)
    assert done.exit_code == 1
    assert "importances must not be negative" in one_line(done.stderr)


def process(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_fastforward", "convert", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        timeout=60,
    )


def test_process_converts(checkpoint: Path, flags: list) -> None:
    done = process(checkpoint, *flags)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout.startswith("checkpoint   c.pt: PyTorch, 21 tensors\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert load_predictor(flags[-1]).predictors


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_process_prints_one_line_for_torchscript(flags: list, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "c.pt"))
    done = process(tmp_path / "c.pt", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert "TorchScript" in one_line(done.stderr)
