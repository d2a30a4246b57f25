"""mlx_fastforward convert: what it prints, what it writes, and that every mistake is one line."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import models
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_modules
from typer.testing import CliRunner

from mlx_fastforward import hub
from mlx_fastforward.cli import app
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import load_predictor, update_predictor
from mlx_fastforward.predictors.search import predictor_for

RANK, H = 4, 8
D, F, LAYERS = models.HIDDEN, models.FFN, models.LAYERS
FILES = ["fastforward.json", "fastforward.safetensors"]


def good(*args: object) -> str:
    """Standard output of a conversion in this process that must succeed."""
    done = CliRunner().invoke(app, ["convert", *map(str, args)])
    assert (done.exit_code, done.stderr.strip()) == (0, ""), done.output
    assert "\x1b" not in done.stdout
    return done.stdout


def bad(code: int, *args: object) -> str:
    """The one line on stderr of a conversion that must fail without a traceback."""
    done = CliRunner().invoke(app, ["convert", *map(str, args)])
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    line = done.stderr.strip("\n")
    assert line.startswith("mlx_fastforward: ") and line.isprintable(), line
    return line.removeprefix("mlx_fastforward: ")


def trained(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**torch_modules.trained(LAYERS, D, F, RANK, H), **more}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; its weights are not read, except the norms."""
    model = models.tiny("llama")
    model.set_dtype(mx.float16)
    return models.save_folder(model, tmp_path_factory.mktemp("models") / "tiny model")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(trained(), tmp_path / "c.pt")
    return tmp_path / "c.pt"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def flags(tiny: Path, out: Path) -> list[object]:
    return ["--model", tiny, "--out", out]


def left(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def dtypes(folder: Path) -> set[str]:
    weights: Any = mx.load(str(folder / FILES[1]))
    return {str(v.dtype).rpartition(".")[2] for k, v in weights.items() if "." in k}


def test_a_conversion_into_the_folder_where_chat_looks(
    checkpoint: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's own dtype."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    said = good(checkpoint, "--model", tiny)
    folder = tmp_path / "home" / "predictors" / "tiny-model"
    assert left(folder) == FILES and dtypes(folder) == {"float16"}
    model = models.tiny("llama")
    model.set_dtype(mx.float16)
    found = predictor_for(str(tiny), BaseModel.of(model))
    assert found is not None and found.source == str(folder)
    assert found.base.name == "tiny model" and found.importances == [1, 2, 3, 4]
    for i, weights in enumerate(found.layers or []):
        exact = trained()[f"layers.{i}.predictor.w1.weight"].T.numpy()
        assert np.array_equal(np.array(weights.w1), exact.astype(np.float16))
    kinds = [found.details[part]["kind"] for part in ("predictor", "compensator")]
    assert kinds == ["pooled", "mlp"] and found.details["source"]["name"] == "c.pt"
    *before, written = [line.split(None, 1) for line in said.splitlines()]
    told = "(the checkpoint does not say: see --activation)"
    assert dict(before) == {
        "checkpoint": f"c.pt: PyTorch, {5 * LAYERS + 1} tensors",
        "model": "tiny model: llama, 4 layers, hidden 32, FFN 128",
        "predictor": "rank 4, 8 of 8 matrices transposed",
        "compensator": f"rank 8, 8 of 8 matrices transposed, relu {told}",
        "importances": "one per layer",
    }
    assert written[0] == "written" and written[1].startswith(f"{folder} (float16, ")


def test_remarks_and_what_was_ignored(flags: list, tmp_path: Path) -> None:
    state = {k: v for k, v in trained().items() if ".predictor.query" in k}
    for i in range(LAYERS):
        state[f"layers.{i}.predictor.w1.weight"] = torch.ones(D, D)
        state[f"layers.{i}.predictor.w2.weight"] = torch.ones(F, D)
    state |= {f"head\x1b[31m.{i}": torch.ones(1) for i in range(4)}
    torch.save(state, tmp_path / "c.pt")
    said = good(tmp_path / "c.pt", *flags)
    assert "note         predictor.w1 is square: taken as (out, in)" in said
    assert "4 other tensors (head�[31m.0, head�[31m.1, head�[31m.2, ...)" in said
    assert "compensator  none" in said and "importances  none" in said


def test_a_predictor_is_a_checkpoint(checkpoint: Path, flags: list, out: Path) -> None:
    """In another dtype, in place: the files are replaced when told, and the JSON is read."""
    said = good(checkpoint, *flags, "--activation", "gelu", "--dtype", "float32")
    assert dtypes(out) == {"float32"} and ", gelu\n" in said
    info = json.loads((out / FILES[0]).read_text()) | {"block_size": 64}
    (out / FILES[0]).write_text(json.dumps(info))
    again = [out, *flags, "--dtype", "bfloat16"]
    before = [(out / name).read_bytes() for name in FILES]
    assert bad(1, *again) == (
        f"{out} holds a predictor: --overwrite replaces it, "
        "--out puts the new one elsewhere."
    )
    assert [(out / name).read_bytes() for name in FILES] == before
    said = good(*again, "--overwrite")
    assert ", gelu\n" in said and "(bfloat16, " in said
    file: Any = load_predictor(out)
    assert dtypes(out) == {"bfloat16"}
    exact = trained()["layers.1.predictor.w2.weight"].T.bfloat16().float().numpy()
    assert np.array_equal(np.array(file.layers[1].w2.astype(mx.float32)), exact)
    assert file.compensator.activation == "gelu" and file.details["block_size"] == 64
    good(*again, "--overwrite", "--activation", "silu")
    assert load_predictor(out).details["compensator"]["activation"] == "silu"


def test_quantised_predictors(flags: list, out: Path, tmp_path: Path) -> None:
    """Scales are for 32 or 64 neurons; and only predictors have them."""
    path, state = tmp_path / "c.pt", trained()
    torch.save(state, path)
    for bits in (4, 8):
        said = good(path, *flags, "--quantize", bits, "--overwrite")
        assert f"w2 in {bits} bits" in said and dtypes(out) == {"float16", "uint32"}
        layers = load_predictor(out).layers or []
        assert [w.bits for w in layers] == [bits] * LAYERS
    torch.save({k: v for k, v in state.items() if ".compensator." in k}, path)
    wanted = "--quantize is for predictors, and the checkpoint has none."
    assert bad(2, path, *flags, "-q", 4, "--overwrite") == wanted
    model = models.tiny("llama", intermediate_size=40)
    odd = ["--model", models.save_folder(model, tmp_path / "odd"), "--out", out]
    for i in range(LAYERS):
        state[f"layers.{i}.predictor.w2.weight"] = torch.ones(40, RANK)
    torch.save(state, path)
    wanted = "--quantize needs a multiple of 32 neurons, the model has 40."
    assert bad(2, path, *odd, "--quantize", 8, "--overwrite") == wanted
    good(path, *odd, "--overwrite")


def test_a_map(flags: list, out: Path, tmp_path: Path) -> None:
    state = {k.replace("layers.", "net."): v for k, v in trained().items()}
    torch.save(state, tmp_path / "c.pt")
    with_map = [tmp_path / "c.pt", "--map", tmp_path / "map.json"]
    lines = r'{"net\\.(\\d+)\\.(.*?)(.weight)?": "layers.\\1.\\2", "importance": null}'
    (tmp_path / "map.json").write_text(lines)
    assert "net.0.predictor.query" in bad(1, tmp_path / "c.pt", *flags)
    listed = good(*with_map, "--list")
    assert listed.count("(ignored)") == 1 and "layers.3.compensator.w2" in listed
    good(*with_map, *flags)
    predictor = load_predictor(out)
    assert predictor.layers and predictor.compensator and not predictor.importances


def test_what_cannot_be_written_or_converted_leaves_nothing_behind(
    flags: list, out: Path, tmp_path: Path
) -> None:
    key, path = f"layers.{LAYERS - 1}.compensator.w2.weight", tmp_path / "c.pt"
    torch.save(trained(**{key: torch.full((D, H), torch.nan)}), path)
    assert bad(1, path, *flags).startswith(f"{key} holds {D * H} values that are NaN")
    torch.save(trained(), path)
    assert "is a file; expected a folder" in bad(1, path, *flags, "--out", path)
    line = bad(1, path, *flags, "--out", path / "sub" / "folder")
    assert line == f"{path / 'sub' / 'folder'} cannot be written: Not a directory."
    assert "~no-such-user" in bad(1, path, *flags, "--out", "~no-such-user/a")
    for error, code, told in (
        (OSError(28, "No space left"), 1, f"{out} cannot be written: No space left."),
        (KeyboardInterrupt(), 130, "stopped."),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "save_safetensors", Mock(side_effect=error))
            assert bad(code, path, *flags) == told
    assert not out.exists()


def test_list_prints_every_tensor_and_writes_nothing(tmp_path: Path) -> None:
    odd = "x\x1b]0;title\x07\r\n\t\u202e.tensor"
    state = trained(**{odd: torch.ones(2, 3), "layers.1.predictor.bias": torch.ones(1)})
    state |= {"predictor.w1": torch.ones(LAYERS, D, RANK).double()}  # for each layer
    contiguous = {k: v.contiguous() for k, v in state.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "c.safetensors")
    lines = good(tmp_path / "c.safetensors", "--list").split("\n")
    assert lines[0].split() == ["tensor", "shape", "dtype", "taken", "as"]
    assert len(lines) == 1 + len(state) + 1 and lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    rows = {line.split("  ")[0]: line.split("  ", 1)[-1].split() for line in lines}
    assert rows["x�]0;title� �.tensor"] == ["[2,", "3]", "float32", "(ignored)"]
    unknown = "unknown: name it with --map, or leave it out with null".split()
    assert rows["layers.1.predictor.bias"] == ["[1]", "float32", *unknown]
    taken = ["[32,", "8]", "float32", "layers.3.compensator.w2"]
    assert rows["layers.3.compensator.w2.weight"] == taken
    assert rows["predictor.w1"] == "[4, 32, 4] float64 layers.*.predictor.w1".split()
    assert rows["importance"] == ["[4]", "float32", "importance"]
    assert left(tmp_path) == ["c.safetensors"]


WRONG = {
    "--dtype int8": "--dtype must be one of float32, float16, bfloat16; got int8.",
    "--quantize 3": "--quantize must be one of 4, 8; got 3.",
    "--activation x": "--activation must be one of relu, silu, gelu; got x.",
    "--model=": "--model must be a folder or repository name, got nothing.",
}


def test_mistakes(
    checkpoint: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong usage is told with code 2, failures with 1."""
    for args, message in WRONG.items():
        assert bad(2, checkpoint, *args.split()) == message
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", None)  # a mistyped file is no repository
    for name in ("runs/missing.pt", "runs/missing.safetensors"):
        assert "does not exist" in bad(1, name)
    assert "~no-such-user" in bad(1, "~no-such-user/c.pt")
    assert "config.json" in bad(1, checkpoint, "--model", tmp_path)
    assert "is a file" in bad(1, checkpoint, "--model", checkpoint)
    assert "No such file" in bad(1, checkpoint, "--map", tmp_path / "no")
    line = bad(1, checkpoint, "--out", tmp_path / "out")  # the demo model's other sizes
    assert "of demo model" in line or "expected shape" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pooled", "token-wise"])
def test_a_predictor_once_more(kind: str, tmp_path: Path) -> None:
    """As train wrote it, in fewer bits: the scores agree, the rest stays; also from bits to bits."""
    net = models.tiny("llama", vocab=4096)
    model = models.save_folder(net, tmp_path / "model")
    first = tmp_path / "first"
    models.save_random_predictor(net, first, 32, kind, "low-rank")
    update_predictor(first, verified={"rows": []}, note="kept")
    wanted, x = load_predictor(first), mx.random.normal((2, 8, 32))
    source = first
    for bits, most in ((8, 0.02), (4, 0.2)):
        out = tmp_path / f"in-{bits}"
        flags = ["--model", model, "--quantize", bits, "--out", out]
        assert good(source, *flags).startswith(f"{out}: 0.")
        found, source = load_predictor(out), out
        for a, b in zip(found.layers, wanted.layers, strict=True):
            assert a.bits == bits
            assert models.distance(np.array(a(x)), np.array(b(x))) < most
        for a, b in zip(found.compensator.layers, wanted.compensator.layers):
            assert all(mx.array_equal(vars(a)[k], vars(b)[k]) for k in vars(a))
        assert found.details["note"] == "kept" and "verified" not in found.details
    line = bad(1, first, *flags)
    assert line.startswith(f"{out} holds a predictor: --overwrite replaces it")
    assert bad(2, first, "--list").startswith("--list is for checkpoints; this is a")
    other = models.save_folder(models.tiny("llama", 1, 4096), tmp_path / "other")
    line = bad(1, first, "--model", other, "--out", tmp_path / "x")
    assert "the weights of this model do not" in line and not (tmp_path / "x").exists()
