"""mlx_fastforward train: what it says, what it refuses, and processes that are killed."""

import importlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import mlx.core as mx
import models
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward.cli import app
from mlx_fastforward.predictors.file import BaseModel
from mlx_fastforward.predictors.search import predictor_for
from mlx_fastforward.train import estimate, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train import state as state_module
from mlx_fastforward.train.run import WORK, Run

FILES = [
    "fastforward.json",
    "fastforward.safetensors",
    "report.json",
    "report.png",
]
QUICK = ["--tokens", 4096, "--length", 256, "--steps", 2, "--compensator", "none"]
Flags = list[object]
train_module: Any = importlib.import_module("mlx_fastforward.cli.train")


def command(*args: object) -> Result:
    """One command in this process; its output is no terminal."""
    return CliRunner().invoke(app, ["train", *map(str, args)])


def good(*args: object) -> Result:
    done = command(*args)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "\x1b" not in done.output
    return done


def bad(code: int, *args: object) -> str:
    """The last line on stderr of a command that must fail without a traceback.

    Before it there is nothing, or what the run would have taken.
    """
    done = command(*args)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    return last_line(done.stderr)


def last_line(stderr: str) -> str:
    assert stderr.strip(), "it said nothing"
    *before, line = stderr.splitlines()
    assert [b[:6] for b in before if b] in ([], ["Up to "]), stderr
    assert line.startswith("mlx_fastforward: ") and line.isprintable(), stderr
    return line.removeprefix("mlx_fastforward: ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny model"
    return models.save_folder(models.tiny("llama", vocab=4096), folder)


@pytest.fixture
def flags(tiny: Path, tmp_path: Path) -> Flags:
    return [*QUICK, "--model", tiny, "--out", tmp_path / "out"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder is read, no picture drawn, and little judged: these take longest."""

    def load_model(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return models.tiny("llama", vocab=4096), models.demo_tokenizer()

    monkeypatch.setattr(train_module, "load_model", load_model)
    monkeypatch.setattr(report, "picture", lambda path, found: path.write_bytes(b""))
    monkeypatch.setattr(run_module, "IMPORTANCE_SAMPLES", 1)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def tensors_of(folder: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(folder / FILES[1]))
    assert isinstance(tensors, dict)
    return tensors


def assert_same(folder: Path, wanted: dict[str, mx.array]) -> None:
    got = tensors_of(folder)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mx.array_equal(got[name], tensor), name


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def interrupted(method: str, monkeypatch: pytest.MonkeyPatch, *args: object) -> str:
    """What a command says that Ctrl-C stops in a method of the run."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, method, interrupt)
        return bad(130, *args)


# What it says


def test_a_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the default folder, where chat looks."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    for module in (run_module, state_module):
        monkeypatch.setattr(module, "HELD_OUT", 2)
    done = good("--tokens", 4096, "--length", 600, "--steps", 4, "--model", tiny)
    out = tmp_path / "home" / "predictors" / "tiny-model"
    assert left(out) == FILES
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    model: Any = models.tiny("llama", vocab=4096)
    found = predictor_for(str(tiny), BaseModel.of(model))
    assert found is not None and found.source == str(out)
    assert found.base.name == "tiny model"
    told = done.stdout.splitlines()
    assert re.fullmatch(r"4,\d{3} tokens, 0\.\d minutes\. On held-out text:", told[0])
    assert re.fullmatch(r"recall of the best half .*: [567]\d\.\d%", told[1])
    assert re.fullmatch(r"error removed by the compensator, .*: -?\d+%", told[2])
    arms = ["oracle", "predictor", "predictor and compensator"]
    for arm, line in zip(arms, told[3:6]):
        values = r"KL \d\.\d{4}, top-1 agreement \d+\.\d%"
        assert re.fullmatch(rf"at 50 %, {arm}: {values}", line)
    assert told[6:] == [f"predictor: {out} (with report.json and report.png)"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("Up to 4,096 tokens; 0.00 GB of disk in ")


def begun(monkeypatch: pytest.MonkeyPatch, *args: object) -> Run:
    """The run of a command that is stopped when it begins."""
    runs: list[Run] = []

    def begin(self: Run) -> None:
        runs.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "__call__", begin)
    bad(130, *args)
    return runs[0]


def test_the_demo_model_is_the_default(
    loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path))
    run = begun(monkeypatch)
    assert run.base.name == "demo model" and run.settings.data == "bundled"
    assert run.out == tmp_path / "predictors" / "demo-model"


def test_flags_reach_the_run(
    loaded: None, tmp_path: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("The ship sailed on. " * 400)
    more = ["--data", tmp_path / "a.txt", "--predictor", "pooled", "--rank", 5]
    more += ["--compensator", "mlp", "--compensator-rank", 3, "--score", "weighted"]
    more += ["--sequential", "--seed", 7, "--minutes", 60]
    run = begun(monkeypatch, *flags, *more)
    parts = (run.sequences, run.held)
    assert {p.file for part in parts for p in part.passages} == {tmp_path / "a.txt"}
    assert [(part.length, part.seed) for part in parts] == [(256, 7)] * 2
    assert run.out == tmp_path / "out"
    assert asdict(run.settings) == {
        "tokens": 4096,
        "length": 256,
        "minutes": 60.0,
        "steps": 2,
        "block_size": 128,
        "predictor": "pooled",
        "score": "weighted",
        "rank": 5,
        "compensator": "mlp",
        "compensator_rank": 3,
        "sequential": True,
        "seed": 7,
        "data": str(tmp_path / "a.txt"),
    }


# What it refuses


@pytest.mark.parametrize(
    "flag, known",
    [
        ("--predictor", "token-wise, pooled"),
        ("--score", "relative, weighted, plain"),
        ("--compensator", "low-rank, mlp, none"),
    ],
)
def test_unknown_kinds(flag: str, known: str, flags: Flags, tmp_path: Path) -> None:
    wanted = f"{flag} must be one of {known}; got best."
    assert bad(2, *flags, flag, "best") == wanted
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--tokens", 4095),
        ("--length", 255),
        ("--steps", 0),
        ("--minutes", -1),
        ("--rank", -1),
        ("--seed", -1),
        ("--tokens", "many"),
    ],
)
def test_numbers_out_of_range(flag: str, value: object, flags: Flags) -> None:
    done = command(*flags, flag, value)
    assert done.exit_code == 2 and flag in done.stderr and done.stdout == ""


def test_data_that_is_not_there(flags: Flags, tmp_path: Path) -> None:
    missing = tmp_path / "no.txt"
    line = bad(1, *flags, "--data", missing)
    assert line.startswith(f"{missing} does not exist; expected ")
    (tmp_path / "empty").mkdir()
    line = bad(1, *flags, "--data", tmp_path / "empty")
    assert line.startswith(f"no text in {tmp_path / 'empty'}; ")
    assert "~nobody-here" in bad(1, *flags, "--data", "~nobody-here/a.txt")
    assert not (tmp_path / "out").exists()


def test_data_whose_name_is_too_long(flags: Flags) -> None:
    assert "too long" in bad(1, *flags, "--data", "x" * 5000)


def test_a_broken_line_in_the_middle(
    loaded: None, flags: Flags, tmp_path: Path
) -> None:
    """The run finds it, and goes on when it is mended."""
    good_line = json.dumps({"text": "The ship sailed on. " * 60})
    file, broken = tmp_path / "a.jsonl", good_line[:-2] + "'}"
    file.write_text("\n".join([good_line, broken] * 20))
    line = bad(1, *flags, "--data", file)
    match = re.match(rf"{re.escape(str(file))}, byte (\d+): expected ", line)
    assert match and int(match[1]) % (2 * len(good_line) + 2) == len(good_line) + 1
    file.write_text("\n".join([good_line] * 40))
    good(*flags, "--data", file)
    assert left(tmp_path / "out") == FILES


def test_data_that_vanishes(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("The ship sailed on. " * 4000)
    real = Run.capture

    def capture(self: Any, stage: str) -> None:
        if stage == "dense":
            file.unlink()
        real(self, stage)

    monkeypatch.setattr(Run, "capture", capture)
    line = bad(1, *flags, "--data", file)
    assert str(file) in line and "cannot be written" not in line


def test_too_little_text(loaded: None, flags: Flags, tmp_path: Path) -> None:
    text = "The ship sailed on. " * 20
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    line = bad(1, *flags, "--data", tmp_path / "a.jsonl")
    assert line.startswith("no sequence fills a block of 128 tokens; ")


def test_an_adapter_that_is_there_is_replaced_only_when_told(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not before the new one is finished."""
    out = tmp_path / "out"
    models.save_random_predictor(models.tiny("llama", vocab=4096), out)
    before = [(out / name).read_bytes() for name in FILES[:2]]
    assert bad(1, *flags) == (
        f"{out} holds a predictor: --overwrite replaces it, --out puts the new one elsewhere."
    )
    interrupted("judge", monkeypatch, *flags, "--overwrite")
    assert [(out / name).read_bytes() for name in FILES[:2]] == before
    good(*flags, "--overwrite")
    assert left(out) == FILES and (out / FILES[1]).read_bytes() != before[1]


@pytest.mark.parametrize("below", ["", "sub"])
def test_folders_that_cannot_be_written(
    below: str, loaded: None, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = bad(
        1, *QUICK, "--model", tiny, "--out", tmp_path / "file" / below, "--steps", 1
    )
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == ""


def test_a_disk_that_fills_up(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("[write] Unable to write 597 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        line = bad(1, *flags)
    assert str(tmp_path / "out") in line
    good(*flags)


def free(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_disk", lambda folder: size)


def test_a_disk_that_is_too_small(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(9e6, monkeypatch)
    line = bad(1, *flags, "--tokens", 200_000)
    wanted = r"200,000 tokens take 0\.0 GB of disk, 0\.0 GB are free for "
    assert re.match(wanted + re.escape(f"{tmp_path / 'out'}; try --tokens "), line)
    assert left(tmp_path) == []


@pytest.mark.parametrize("size", [9e6, 30e6])
def test_the_advice_for_a_small_disk_fits_it(
    size: float, loaded: None, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(size, monkeypatch)
    flags += ["--length", 1920]
    line = bad(1, *flags, "--tokens", 10**7)
    match = re.search(r"--tokens ([\d,]+)\.$", line)
    assert match is not None
    good(*flags, "--tokens", match[1].replace(",", ""), "--dry-run")


# A dry run


def test_a_dry_run_writes_nothing(loaded: None, flags: Flags, tmp_path: Path) -> None:
    flags += ["--compensator", "low-rank", "--minutes", 3]
    done = good(*flags, "--dry-run")
    first, second, third = done.stderr.splitlines()
    assert first.startswith("Up to 4,096 tokens; ")
    number = r"\d+\.\d"
    phases = ("capture", "predictors", "compensators", "judgement")
    told = ", ".join(f"{phase} {number}" for phase in phases)
    assert re.fullmatch(rf"About {number} minutes: {told}\.", second)
    assert third == "--minutes 3 cuts that short."
    assert done.stdout == "" and left(tmp_path) == []


def test_a_dry_run_minds_no_adapter(loaded: None, flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILES[0]).write_text("{}")
    good(*flags, "--dry-run")
    assert left(tmp_path / "out") == [FILES[0]]


def test_a_dry_run_forgets_nothing(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted("predictors", monkeypatch, *flags)
    before = left(tmp_path / "out" / WORK)
    good(*flags, "--restart", "--dry-run")
    assert left(tmp_path / "out" / WORK) == before


# Stopped and gone on


def test_ctrl_c_in_a_run(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out" / WORK
    wanted = f"stopped; the same command goes on from {work}."
    for method in ("predictors", "compensators", "write"):
        assert interrupted(method, monkeypatch, *flags) == wanted
        assert WORK in left(tmp_path / "out")
        assert not set(FILES[:2]) & set(left(tmp_path / "out"))
    good(*flags)
    assert left(tmp_path / "out") == FILES


@pytest.mark.parametrize("where", ["loading", "dry run", "corpus"])
def test_ctrl_c_elsewhere(
    where: str, loaded: None, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "loading":
        monkeypatch.setattr(train_module, "load_model", interrupt)
    elif where == "corpus":
        monkeypatch.setattr("mlx_fastforward.train.data.open_corpus", interrupt)
    else:
        monkeypatch.setattr(estimate, "seconds", interrupt)
        flags.append("--dry-run")
    assert bad(130, *flags).startswith("stopped")


def test_another_run_is_not_gone_on_with(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted("predictors", monkeypatch, *flags)
    other = [*flags, "--predictor", "pooled", "--seed", 4]
    work = tmp_path / "out" / WORK
    assert bad(1, *other) == (
        f"{work} holds an unfinished run with other settings (predictor, seed); "
        "repeat them, or start anew with --restart."
    )
    before = (work / "state.json").read_text()
    interrupted("compensators", monkeypatch, *other, "--restart")
    after = (work / "state.json").read_text()
    assert '"token-wise"' in before and '"pooled"' in after


@pytest.mark.parametrize("last", ["write_report", "save_predictor", "forget"])
def test_a_crash_at_the_very_end(
    last: str,
    loaded: None,
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before or after the predictor is written: the same command goes on."""
    with monkeypatch.context() as patch:
        if last == "forget":
            patch.setattr(run_module, "forget", interrupt)
        else:
            patch.setattr(run_module, last, interrupt)
        bad(130, *flags)
    good(*flags)
    assert left(tmp_path / "out") == FILES


def test_starting_anew_replaces_no_adapter_unless_told(
    loaded: None, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    models.save_random_predictor(models.tiny("llama", vocab=4096), out)
    interrupted("predictors", monkeypatch, *flags, "--overwrite")
    assert "--overwrite replaces it" in bad(1, *flags, "--restart", "--seed", 5)
    assert (out / WORK / "state.json").exists()


# Real processes

Condition = Callable[[Path], bool]


def number_of(pattern: str, n: int) -> Condition:
    return lambda work: len(list(work.glob(pattern))) >= n


def wait(until: Condition, work: Path, running: Callable[[], bool]) -> None:
    """Until it is true of a run's unfinished work."""
    end = time.monotonic() + 120
    while not until(work) and running() and time.monotonic() < end:
        time.sleep(0.001)


def stopped(args: Flags, work: Path, moment: Condition, sign: int) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal at some moment."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_fastforward", "train", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait(moment, work, lambda: child.poll() is None)
    child.send_signal(sign)
    stdout, stderr = child.communicate(timeout=120)
    assert stdout == ""
    return child.returncode, stderr


def test_a_run_that_is_killed_again_and_again(tmp_path: Path, flags: Flags) -> None:
    """The same command ends with the predictor of a run that nobody disturbed."""
    flags = [*QUICK, "--compensator", "low-rank", *flags[len(QUICK) :]]
    good(*flags)
    again = [*flags[:-1], tmp_path / "again"]
    work = tmp_path / "again" / WORK
    moment = number_of("dense/*.x.npy", random.randrange(1, 12))
    code, stderr = stopped(again, work, moment, signal.SIGKILL)
    assert code == -signal.SIGKILL and "Traceback" not in stderr
    assert (work / "state.json").exists()
    moment = number_of("dense/*.x.npy", 14)
    code, stderr = stopped(again, work, moment, signal.SIGINT)
    assert code == 130
    assert last_line(stderr) == f"stopped; the same command goes on from {work}."
    good(*again)
    assert_same(tmp_path / "again", tensors_of(tmp_path / "out"))
    assert left(tmp_path / "again") == left(tmp_path / "out") == FILES
