"""predictors lists what is there, and chat and generate name the one that they took."""

import importlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Optional

import huggingface_hub
import mlx.core as mx
import models
import pytest
import side_files
from typer.testing import CliRunner, Result

import mlx_fastforward
from mlx_fastforward import save_predictor
from mlx_fastforward.cli import app
from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME, packed
from mlx_fastforward.session import Session

MADE_FOR = "    for tiny: 4 layers, hidden 32, FFN 128"
HOLDS = "    pooled predictor rank 4 (float32, 0.0 MB)"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6


@pytest.fixture(scope="module")
def net() -> Any:
    return models.tiny("llama", vocab=4096)


@pytest.fixture
def tiny(net: Any, tmp_path: Path) -> Path:
    """A model folder without a predictor."""
    return models.save_folder(net, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The predictors' folder and, beside it, the hub's cache: both of this test alone."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "own"))
    cache = tmp_path / "hub"
    scan = lambda: huggingface_hub.scan_cache_dir(cache)  # noqa: E731
    monkeypatch.setattr(finding, "scan_cache_dir", scan)
    return tmp_path / "own" / "predictors"


@pytest.fixture
def put(net: Any) -> Callable[..., Path]:
    """Save a predictor that was made at some time, for the model or for a stranger."""

    def save(folder: Path, age: int = 0, foreign: bool = False) -> Path:
        model = models.tiny("llama", seed=3) if foreign else net
        models.save_random_predictor(model, folder)
        os.utime(folder / JSON_NAME, (10**9 - age,) * 2)
        return folder

    return save


def cut(folder: Path) -> str:
    """Damage a predictor's weights; returns how that is told."""
    file = folder / TENSORS_NAME
    file.write_bytes(file.read_bytes()[:-4])
    return f"    damaged: {file} cannot be read: "


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def listed(*args: str) -> list[str]:
    """The lines of predictors, which must succeed and stay silent on stderr."""
    done = run("predictors", *args)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return done.stdout.splitlines()


def bad(*args: str) -> str:
    """The one line on stderr of a command that must fail without a traceback."""
    done = run(*args)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.startswith("mlx_fastforward: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("mlx_fastforward: ").strip()


# What is listed


def test_nothing_found_says_where_it_looked(tiny: Path, store: Path) -> None:
    places = f"none beside the model, in {store} or in the hub's cache."
    made = "mlx_fastforward convert makes one from trained weights."
    assert listed() == [f"No predictors: {places}", made]
    assert listed("--model", str(tiny)) == [f"No predictors for {tiny}: {places}", made]


def test_all_are_listed_without_a_model_and_the_fitting_ones_with_it(
    tiny: Path, store: Path, put: Callable[..., Path]
) -> None:
    mine, other = put(store / "a"), put(store / "b", foreign=True)
    assert listed() == [str(mine), MADE_FOR, HOLDS, str(other), MADE_FOR, HOLDS]
    fitting = [f"{mine} (chat takes it)", MADE_FOR, HOLDS]
    assert listed("--model", str(tiny)) == fitting


def test_only_strangers_are_nothing_for_a_model(
    tiny: Path, store: Path, put: Callable[..., Path]
) -> None:
    put(store / "b", foreign=True)
    assert listed("--model", str(tiny))[0].startswith(f"No predictors for {tiny}: ")


def test_chat_takes_the_newest(
    tiny: Path, store: Path, put: Callable[..., Path]
) -> None:
    for name, age in (("a", 20), ("b", 10), ("c", 30)):
        put(store / name, age)
    marked = [f"{store / 'a'}", f"{store / 'b'} (chat takes it)", f"{store / 'c'}"]
    assert listed("--model", str(tiny))[::3] == marked


@pytest.mark.parametrize("relative", [False, True])
def test_chat_takes_the_one_beside_the_model(
    tiny: Path,
    store: Path,
    put: Callable[..., Path],
    relative: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tiny, age=10)
    newer = put(store / "newer")
    monkeypatch.chdir(tiny.parent)
    model = "tiny" if relative else str(tiny)
    lines = listed("--model", model)
    beside = [f"{model} (chat takes it)", MADE_FOR, HOLDS]
    assert lines == [*beside, str(newer), MADE_FOR, HOLDS]
    assert listed() == lines[3:]


def test_those_of_the_hubs_cache_are_listed_by_their_repository(
    tiny: Path, tmp_path: Path, put: Callable[..., Path]
) -> None:
    for name, foreign in (("mine", False), ("other", True)):
        snapshots = tmp_path / "hub" / f"models--user--{name}" / "snapshots"
        put(snapshots / ("0" * 40), foreign=foreign)
    assert listed() == ["user/mine", MADE_FOR, HOLDS, "user/other", MADE_FOR, HOLDS]
    # chat takes no repository that nobody named
    assert listed("--model", str(tiny)) == ["user/mine", MADE_FOR, HOLDS]


def test_damaged_ones_are_listed_with_the_reason(
    store: Path, put: Callable[..., Path]
) -> None:
    reason = cut(put(store / "a"))
    whole = put(store / "b")
    (put(store / "c") / JSON_NAME).write_text("{")
    lines = listed()
    assert lines[0] == str(store / "a") and lines[1].startswith(reason)
    assert lines[2:6] == [str(whole), MADE_FOR, HOLDS, str(store / "c")]
    unreadable = f"    damaged: {store / 'c' / JSON_NAME} cannot be read: "
    assert len(lines) == 7 and lines[6].startswith(unreadable)


def test_damaged_ones_are_listed_for_a_model_too(
    tiny: Path, store: Path, put: Callable[..., Path]
) -> None:
    """Nobody knows whether they would fit; the one that chat takes is marked as ever."""
    reason = cut(put(store / "a", age=10))
    whole = put(store / "b")
    lines = listed("--model", str(tiny))
    assert lines[0] == str(store / "a") and lines[1].startswith(reason)
    assert lines[2:] == [f"{whole} (chat takes it)", MADE_FOR, HOLDS]


@pytest.mark.parametrize("place", ["beside", "newest"])
def test_a_damaged_one_that_chat_would_take_hides_no_other(
    tiny: Path, store: Path, put: Callable[..., Path], place: str
) -> None:
    whole = put(store / "whole", age=10)
    damaged = put(tiny if place == "beside" else store / "damaged")
    reason = cut(damaged)
    lines = listed("--model", str(tiny))
    at = next(i for i, line in enumerate(lines) if line.startswith(str(damaged)))
    assert lines[at + 1].startswith(reason)
    assert any(line.startswith(str(whole)) for line in lines)


def detailed(folder: Path, change: Callable[[dict, dict], Any]) -> int:
    """Save a predictor with everything that one can have, changed; returns its size in bytes."""
    info, tensors = side_files.information(), side_files.weights(mx.float16)
    change(info, tensors)
    save_predictor(folder, info, tensors)
    return sum(w.nbytes for n, w in tensors.items() if n != "importance")


def quantised(info: dict, tensors: dict) -> None:
    info["predictor"]["quantization"] = {"bits": 8}
    for i in range(side_files.LAYERS):
        name = f"layers.{i}.predictor.w2"
        tensors.update(packed(name, tensors[name], 8))


def of_new_kinds(info: dict, tensors: dict) -> None:
    info.update(side_files.information(**side_files.NEW))
    tensors.clear()
    tensors.update(side_files.weights(mx.float16, **side_files.NEW))


def of_new_kinds_quantised(info: dict, tensors: dict) -> None:
    of_new_kinds(info, tensors)
    quantised(info, tensors)


def without_kinds(info: dict, tensors: dict) -> None:
    """As predictors were made before there were others."""
    for part in ("predictor", "compensator"):
        del info[part]["kind"]


def of_several_ranks(info: dict, tensors: dict) -> None:
    """And large enough for a size in megabytes that is not 0.0."""
    del info["compensator"], tensors["importance"]
    info["predictor"]["rank"] = [1024, 2, 2048]
    for i, rank in enumerate(info["predictor"]["rank"]):
        tensors[f"layers.{i}.predictor.w1"] = mx.zeros((side_files.D, rank))
        tensors[f"layers.{i}.predictor.w2"] = mx.zeros((rank, side_files.F))
        for name in ("compensator.w1", "compensator.w2"):
            del tensors[f"layers.{i}.{name}"]


def of_equal_ranks(info: dict, tensors: dict) -> None:
    """Told like one rank for all."""
    for part in ("predictor", "compensator"):
        info[part]["rank"] = [info[part]["rank"]] * side_files.LAYERS


@pytest.mark.parametrize(
    "change, wanted",
    [
        (
            lambda info, tensors: None,
            "pooled predictor rank 2; mlp compensator rank 4; importances (float16, 0.0 MB)",
        ),
        (
            quantised,
            "pooled predictor rank 2, w2 in 8 bits; mlp compensator rank 4; importances "
            "(float16, 0.0 MB)",
        ),
        (
            without_kinds,
            "pooled predictor rank 2; mlp compensator rank 4; importances (float16, 0.0 MB)",
        ),
        (
            of_new_kinds,
            "token-wise predictor rank 2; low-rank compensator rank 4; importances "
            "(float16, 0.0 MB)",
        ),
        (
            of_new_kinds_quantised,
            "token-wise predictor rank 2, w2 in 8 bits; low-rank compensator rank 4; "
            "importances (float16, 0.0 MB)",
        ),
        (
            of_equal_ranks,
            "pooled predictor rank 2; mlp compensator rank 4; importances (float16, 0.0 MB)",
        ),
        (
            of_several_ranks,
            "pooled predictor ranks 2 to 2048 (float16, float32, 1.2 MB)",
        ),
    ],
)
def test_what_an_adapter_holds_is_told(
    store: Path, change: Callable[[dict, dict], Any], wanted: str
) -> None:
    size = detailed(store / "a", change)
    lines = listed()
    assert lines[1:] == ["    for tiny: 3 layers, hidden 32, FFN 64", f"    {wanted}"]
    assert wanted.endswith(f" {size / 1e6:.1f} MB)")


def test_importances_alone_are_told_without_an_empty_dtype(store: Path) -> None:
    def alone(info: dict, tensors: dict) -> None:
        del info["predictor"], info["compensator"]

    detailed(store / "a", alone)
    (line,) = listed()[2:]
    assert line.startswith("    importances") and "(," not in line


@pytest.mark.parametrize(
    "recall, wanted",
    [
        ([0.5, 0.75, 1], "    recall of the best neurons 75%, as its maker measured"),
        ([], None),
        ("0.5", None),
        ([0.5, "much"], None),
        ({"0": 0.5}, None),
    ],
)
def test_the_recall_is_told_where_the_maker_measured_it(
    store: Path, recall: Any, wanted: Optional[str]
) -> None:
    detailed(store / "a", lambda info, _: info["calibration"].update(recall=recall))
    assert listed()[3:] == ([wanted] if wanted else [])


def test_names_from_a_downloaded_file_do_not_drive_the_terminal(store: Path) -> None:
    name = "evil\x1b]0;title\x07\nsecond"
    detailed(store / "a", lambda info, _: info["base_model"].update(name=name))
    assert len(listed()) == 3
    assert all(line.isprintable() for line in listed())


@pytest.mark.parametrize("name", ["not a model!", "absent", "file"])
def test_models_that_are_not_there_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    model = name if " " in name else str(tmp_path / name)
    wanted = "is a file; expected" if name == "file" else "is neither a local folder"
    assert bad("predictors", "--model", model).startswith(f"{model} {wanted}")


# What chat and generate say of the one that they took


def named_by_generate(tiny: Path, *flags: str) -> Optional[str]:
    base = ["generate", STORY, "--json", "--model", str(tiny), "--max-tokens", "1"]
    done = run(*base, *flags)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return json.loads(done.stdout)["settings"]["predictor"]


def banner(
    tiny: Path, capsys: pytest.CaptureFixture, predictor: Optional[str] = None
) -> list[str]:
    """What somebody at a terminal sees first."""
    module = importlib.import_module("mlx_fastforward.cli.chat")
    model, tokenizer = mlx_fastforward.load(str(tiny), predictor=predictor)
    loop = module.Chat(Session(model, tokenizer), None)
    loop.interactive = True
    capsys.readouterr()
    loop.banner(str(tiny), None)
    return capsys.readouterr().out.splitlines()


def test_the_adapter_that_was_found_or_given_is_named(
    tiny: Path,
    store: Path,
    tmp_path: Path,
    put: Callable[..., Path],
    capsys: pytest.CaptureFixture,
) -> None:
    assert named_by_generate(tiny) is None
    lines = banner(tiny, capsys)
    assert not any(line.startswith("predictor") for line in lines)
    assert lines[2].endswith(", selector probe")
    mine = put(store / "mine")
    given = put(tmp_path / "given")
    for flags, wanted in (([], mine), (["--predictor", str(given)], given)):
        assert named_by_generate(tiny, *flags) == str(wanted)
        lines = banner(tiny, capsys, *flags[1:])
        assert lines[2].endswith(", selector trained")
        assert lines[3] == f"predictor  {wanted}"
    put(tiny)
    assert named_by_generate(tiny) == str(tiny)
    assert banner(tiny, capsys)[3] == f"predictor  {tiny}"
    assert named_by_generate(tiny, "--predictor", "none") is None
    assert not any(b.startswith("predictor") for b in banner(tiny, capsys, "none"))


@pytest.mark.parametrize("place", ["beside", "newest", "given"])
def test_a_damaged_adapter_that_would_be_taken_is_refused(
    tiny: Path, store: Path, tmp_path: Path, put: Callable[..., Path], place: str
) -> None:
    """An answer without it would be another answer."""
    folders = {"beside": tiny, "newest": store / "a", "given": tmp_path / "given"}
    reason = cut(put(folders[place])).partition("damaged: ")[2]
    flags = ["--predictor", str(folders[place])] if place == "given" else []
    assert bad("generate", STORY, "--model", str(tiny), *flags).startswith(reason)
    assert bad("chat", "--model", str(tiny), *flags).startswith(reason)
