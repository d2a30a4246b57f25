"""predictors lists what is there, and chat and generate name the one that they took."""

import os
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import models
import predictor_files as files
import pytest
from loopback_hub import run
from mlx_lm.models import gpt2

import mlx_fastforward
from mlx_fastforward.cli import conversation
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME
from mlx_fastforward.session import Session

MADE_FOR = "    for tiny: 4 layers, hidden 32, FFN 128"
HOLDS = "    pooled predictor rank 4 (float32, 0.0 MB)"
HALF = "    pooled predictor rank 2; mlp compensator rank 4; importances"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model folder without a predictor."""
    return models.save_folder(models.tiny("llama", vocab=4096), tmp_path / "tiny")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The predictors' folder and, beside it, the hub's cache: both of this test alone."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "own"))
    files.own_cache(tmp_path / "hub", monkeypatch)
    return tmp_path / "own" / "predictors"


def put(folder: Path, age: int = 0, seed: int = 0) -> Path:
    """A predictor that was made at some time, for the model or for a stranger."""
    models.save_random_predictor(models.tiny("llama", seed, 4096), folder)
    os.utime(folder / JSON_NAME, (10**9 - age,) * 2)
    return folder


def cut(folder: Path) -> str:
    """Damage a predictor's weights; returns how that is told."""
    file = folder / TENSORS_NAME
    file.write_bytes(file.read_bytes()[:-4])
    return f"{file} cannot be read: "


def listed(*args: str) -> list[str]:
    """The lines of predictors, which must succeed and stay silent on stderr.

    Without a model they end with the demo model's, which are checked and left out here.
    """
    done = run("predictors", *args)
    assert (done.code, done.stderr) == (0, ""), done
    lines = done.stdout.splitlines()
    bundled = f"bundled with the demo model: {DEMO}"
    assert lines.count(bundled) == ("--model" not in args)
    if bundled in lines:
        at = lines.index(bundled)
        lines, theirs = lines[:at], lines[at:]
        assert theirs[1].startswith("    for demo model: 8 layers, ")
        assert theirs[2].startswith("    token-wise predictor rank 32; low-rank comp")
    return lines


def test_nothing_found_says_where_it_looked(tiny: Path, store: Path) -> None:
    places = f"none beside the model, in {store} or in the hub's cache."
    made = "mlx_fastforward train fits one; convert takes trained weights."
    assert listed() == [f"No predictors: {places}", made]
    put(store / "b", seed=3)
    assert listed("--model", str(tiny)) == [f"No predictors for {tiny}: {places}", made]


def test_all_are_listed(tiny: Path, store: Path, monkeypatch: Any) -> None:
    """With a model the fitting ones; chat takes the newest, or the one beside the model."""
    for name, age, seed in (("a", 20, 0), ("b", 10, 0), ("c", 30, 0), ("d", 0, 3)):
        put(store / name, age, seed)
    for name, seed in (("mine", 0), ("other", 3)):
        put(tiny.parent / f"hub/models--user--{name}/snapshots/{'0' * 40}", seed=seed)
    own = [str(store / name) for name in "abcd"]
    assert listed()[::3] == [*own, "user/mine", "user/other"]
    assert listed()[1::3] == [MADE_FOR] * 6 and listed()[2::3] == [HOLDS] * 6
    taken = [own[0], f"{own[1]} (chat takes it)", own[2], "user/mine"]
    assert listed("--model", str(tiny))[::3] == taken
    put(tiny, age=40)
    monkeypatch.chdir(tiny.parent)
    for model in (str(tiny), "tiny"):
        beside = [f"{model} (chat takes it)", *own[:3], "user/mine"]
        assert listed("--model", model)[::3] == beside


def test_damaged_ones_are_listed_with_the_reason(tiny: Path, store: Path) -> None:
    """For a model, too: nobody knows whether they would fit; and they hide no other."""
    reason = f"    damaged: {cut(put(store / 'a', age=10))}"
    whole = [str(put(store / "b", age=5)), MADE_FOR, HOLDS]
    lines = listed("--model", str(tiny))
    assert lines[0] == str(store / "a") and lines[1].startswith(reason)
    assert lines[2:] == [f"{whole[0]} (chat takes it)", *whole[1:]]
    (put(store / "c") / JSON_NAME).write_text("{")
    *lines, last = listed()
    assert lines[1].startswith(reason) and lines[2:] == [*whole, str(store / "c")]
    assert last.startswith(f"    damaged: {store / 'c' / JSON_NAME} cannot be read: ")
    reason = f"    damaged: {cut(put(tiny))}"
    lines = listed("--model", str(tiny))
    assert lines[0] == str(tiny) and lines[1].startswith(reason) and whole[0] in lines


def test_what_a_file_holds_is_told(store: Path) -> None:
    new = "token-wise predictor rank 2, w2 in 8 bits; low-rank compensator rank 4"
    ranks = "pooled predictor ranks 2 to 2048; mlp compensator rank 4"
    for kind, wanted in (
        ({}, f"{HALF} (float16, 0.0 MB)"),
        ({"rank": [2] * 3, "hidden": [4] * 3}, f"{HALF} (float16, 0.0 MB)"),
        ({**files.NEW, "bits": 8}, f"    {new}; importances (float16, 0.0 MB)"),
        ({"rank": [1024, 2, 2048]}, f"    {ranks}; importances (float16, 0.6 MB)"),
    ):
        folder = files.save(store / "a", dtype=mx.float16, **kind)
        assert listed()[1:] == ["    for tiny: 3 layers, hidden 32, FFN 64", wanted]
    files.save(folder, dtype=mx.float16)  # as made before there were kinds
    for part in ("predictor", "compensator"):
        files.edit(folder, part, kind=...)
    assert listed()[2] == f"{HALF} (float16, 0.0 MB)"
    files.edit(folder, predictor=..., compensator=...)
    assert listed()[2] == "    importances (0.0 MB)"
    files.edit(folder, "base_model", name="evil\x1b]0;title\x07\nsecond")
    assert len(listed()) == 3  # names do not drive the terminal
    assert all(line.isprintable() for line in listed())


def test_the_recall_is_told_where_the_maker_measured_it(store: Path) -> None:
    wanted = "    recall of the best neurons 75%, as its maker measured"
    files.save(store / "a")
    for recall in ([0.5, 0.75, 1], [], "0.5", [0.5, "much"], {"0": 0.5}):
        files.edit(store / "a", "calibration", recall=recall)
        assert listed()[3:] == ([wanted] if recall == [0.5, 0.75, 1] else [])


def test_the_one_taken_is_named(tiny: Path, store: Path, capsys: Any) -> None:
    def check(wanted: Optional[Path], *flags: str) -> None:
        """generate's JSON, and what somebody at a terminal sees first."""
        base = ["generate", STORY, "--json", "--model", str(tiny), "--max-tokens", "1"]
        found = run(*base, *flags).said()["settings"]["predictor"]
        assert found == (str(wanted) if wanted else None)
        named = (*flags, None, None)[1]
        model, tokenizer = mlx_fastforward.load(str(tiny), predictor=named)
        loop = conversation.Chat(Session(model, tokenizer), str(tiny), False, {})
        loop.interactive = True
        conversation.banner(loop)
        lines = capsys.readouterr().out.splitlines()
        named = [line for line in lines if line.startswith("predictor ")]
        assert named == ([f"predictor {wanted}"] if wanted else [])
        assert lines[2].endswith(", selector " + ("trained" if wanted else "probe"))

    check(None)
    check(put(store / "mine"))
    given = put(tiny.parent / "given")
    check(given, "--predictor", str(given))
    check(put(tiny))
    check(None, "--predictor", "none")
    reason = cut(tiny)  # an answer without it would be another answer
    for command in (["generate", STORY], ["chat"]):
        assert run(*command, "--model", str(tiny)).refusal().startswith(reason)


def test_models_in_the_cache(tiny: Path, store: Path) -> None:
    """The demo model, then what the hub's cache holds: usable or why not, and with which predictor."""
    hub = tiny.parent / "hub"

    def cached(name: str) -> Path:
        return hub / f"models--user--{name}/snapshots/{'0' * 40}"

    def shown() -> dict[str, list[str]]:
        done = run("models")
        assert (done.code, done.stderr) == (0, ""), done
        found: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            head = not line.startswith(" ")
            found.setdefault(line if head else list(found)[-1], []).append(line.strip())
        return found

    alone = shown()
    assert list(alone)[0] == f"demo (bundled, without --model): {DEMO}"
    assert len(alone) == 2 and "No others in the Hugging Face cache" in list(alone)[1]
    net = models.tiny("llama", vocab=4096)
    models.save_folder(net, cached("good"))
    models.save_folder(net, cached("half"))
    (cached("half") / "model.safetensors").unlink()
    args = gpt2.ModelArgs("gpt2", 8, 8, 1, 1, 8, 1e-5, 4096)
    models.save_folder(gpt2.Model(args), cached("other"))
    put(cached("predictor"))
    found = shown()
    assert list(found)[1:] == ["user/good", "user/half", "user/other"]
    _, kind, how, memory = found["user/good"]
    assert kind == "supported: llama, 4 layers, hidden 32, FFN 128"
    assert how.startswith("no predictor: selector probe; sparsity 50%")
    size = (cached("good") / "model.safetensors").stat().st_size
    kv = 2 * 2 * 4 * 2 * 8 * 8192  # keys and values, bytes, layers, heads, their size
    wanted = f"memory: about {(size + kv) / 1e9:.2f} GB, weights {size / 1e9:.2f} and"
    assert memory.startswith(wanted) and memory.endswith("for 8,192 tokens")
    assert "the download was not finished" in found["user/half"][1]
    assert found["user/other"][1].startswith("not usable: model type 'gpt2' is not")
    mine = put(store / "mine")
    assert shown()["user/good"][2].startswith(f"predictor {mine}; sparsity 50%")
