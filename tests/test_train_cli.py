"""mlx_fastforward train: what it says, what it refuses, and a run that is stopped."""

import importlib
import json
import re
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward.bench.eval import verify
from mlx_fastforward.cli import app, train_end
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import load_predictor
from mlx_fastforward.predictors.search import predictor_for
from mlx_fastforward.predictors.verified import better_than_none
from mlx_fastforward.train import estimate, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train import state as state_module
from mlx_fastforward.train.run import WORK, Run

FILES = ["fastforward.json", "fastforward.safetensors", "report.json", "report.png"]
QUICK = ["--tokens", 4096, "--length", 256, "--steps", 2, "--compensator", "none"]
Flags = list[object]
Patch = pytest.MonkeyPatch
train_module: Any = importlib.import_module("mlx_fastforward.cli.train")


def good(*args: object) -> Result:
    """One command in this process; its output is no terminal."""
    done = CliRunner().invoke(app, ["train", *map(str, args)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "\x1b" not in done.output
    return done


def bad(code: int, *args: object) -> str:
    """The last line on stderr of a command that must fail without a traceback."""
    done = CliRunner().invoke(app, ["train", *map(str, args)])
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    return last_line(done.stderr)


def last_line(stderr: str) -> str:
    """Before it there is nothing, or what the run would have taken."""
    *before, line = stderr.splitlines()
    assert [b[:6] for b in before if b] in ([], ["Up to "]), stderr
    assert line.startswith("mlx_fastforward: ") and line.isprintable(), stderr
    return line.removeprefix("mlx_fastforward: ")


def model_of(context: int) -> nn.Module:
    """With 512 tokens there is no room for what verifies a predictor, nor for its time."""
    return models.tiny("llama", vocab=4096, max_position_embeddings=context)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny model"
    return models.save_folder(model_of(512), folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def flags(tiny: Path, out: Path, monkeypatch: Patch) -> Flags:
    """No folder is read, no picture drawn, and little judged: these take longest."""

    def load_model(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return model_of(512), models.demo_tokenizer()

    monkeypatch.setattr(train_module, "load_model", load_model)
    monkeypatch.setattr(report, "picture", lambda path, found: path.write_bytes(b""))
    monkeypatch.setattr(run_module, "IMPORTANCE_SAMPLES", 1)
    return [*QUICK, "--model", tiny, "--out", out]


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def interrupted(target: Any, name: str, *args: object) -> str:
    """What a command says that Ctrl-C stops in some function."""

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with Patch.context() as patch:
        patch.setattr(target, name, interrupt)
        return bad(130, *args)


def test_a_run(tiny: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Into the default folder, where chat looks."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    for module in (run_module, state_module):
        monkeypatch.setattr(module, "HELD_OUT", 2)
    monkeypatch.setattr(train_end, "DOCUMENTS", 1)
    monkeypatch.setattr(verify, "SPARSITIES", (0.5,))
    tiny = models.save_folder(model_of(700), tmp_path / "tiny model")
    done = good("--tokens", 4096, "--length", 600, "--steps", 4, "--model", tiny)
    out = tmp_path / "home" / "predictors" / "tiny-model"
    assert left(out) == FILES
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = load_predictor(out)
    assert found.base.name == "tiny model" and found.curves is not None
    table = found.details["verified"]
    assert [r["sparsity"] for r in table["rows"]] == [0.5]
    assert table["without"]["sparsity"] == 0.5 and table["prompt_tokens"] == 552
    assert table["documents"] == 1 and table["questions"] > 0
    better = better_than_none(found.details)
    chosen = predictor_for(str(tiny), BaseModel.of(model_of(700)))
    assert (chosen is not None) == better
    told = done.stdout.splitlines()
    assert re.fullmatch(r"4,\d{3} tokens, \d+\.\d minutes\. On held-out text:", told[0])
    assert re.fullmatch(r"recall of the best half .*: [567]\d\.\d%", told[1])
    assert re.fullmatch(r"error removed by the compensator, .*: -?\d+%", told[2])
    arms = ["oracle", "predictor", "predictor and compensator"]
    for arm, line in zip(arms, told[3:6]):
        values = r"KL \d\.\d{4}, top-1 agreement \d+\.\d%"
        assert re.fullmatch(rf"at 50 %, {arm}: {values}", line)
    assert told[6] == f"predictor: {out} (with report.json and report.png)"
    assert "no predictor" in done.stdout
    assert told[-1].startswith(
        "Next: " if better else "On held-out text it did no better"
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("Up to 4,096 tokens; 0.00 GB of disk in ")


def test_flags_reach_the_run(flags: Flags, tmp_path: Path, monkeypatch: Patch) -> None:
    """Without any the demo model is fitted on bundled text."""
    (tmp_path / "a.txt").write_text("The ship sailed on. " * 400)
    wanted: dict[str, Any] = {"kind": "pooled", "score": "weighted", "rank": 5}
    wanted |= {"compensator": "mlp", "compensator_rank": 3, "seed": 7, "minutes": 60.0}
    wanted |= {"data": str(tmp_path / "a.txt")}
    more = [f"--{key.replace('_', '-')}={value}" for key, value in wanted.items()]
    runs: list[Run] = []

    def begin(self: Run) -> None:
        runs.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "__call__", begin)
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path))
    bad(130, *flags, *more, "--sequential")
    bad(130)
    run, default = runs
    parts = (run.sequences, run.held)
    assert {p.file for part in parts for p in part.passages} == {tmp_path / "a.txt"}
    assert [(part.length, part.seed) for part in parts] == [(256, 7)] * 2
    wanted |= {"tokens": 4096, "length": 256, "steps": 2, "block_size": 128}
    assert asdict(run.settings) == {**wanted, "sequential": True}
    assert default.base.name == "demo model" and default.settings.data == "bundled"
    assert default.out == tmp_path / "predictors" / "demo-model"


KINDS = {
    "--kind": "token-wise, pooled",
    "--score": "relative, weighted, plain",
    "--compensator": "low-rank, mlp, none",
}
LEAST = {"--tokens": 4095, "--length": 255, "--steps": 0, "--minutes": -1, "--rank": -1}


def test_what_cannot_be_asked_for(flags: Flags, tmp_path: Path) -> None:
    for flag, known in KINDS.items():
        told = f"{flag} must be one of {known}; got best."
        assert bad(2, *flags, flag, "best") == told
    for flag, value in LEAST.items():
        done = CliRunner().invoke(app, [*map(str, ["train", *flags, flag, value])])
        assert done.exit_code == 2 and flag in done.stderr and done.stdout == ""
    line = bad(2, *flags, "--length", 600, "--dry-run")
    assert line == "--length: 600 tokens are too many, the model was made for 512."
    missing, file = tmp_path / "no.txt", tmp_path / "file"
    line = bad(1, *flags, "--data", missing)
    assert line.startswith(f"{missing} does not exist; expected ")
    assert "~nobody-here" in bad(1, *flags, "--data", "~nobody-here/a.txt")
    assert "too long" in bad(1, *flags, "--data", "x" * 5000)
    file.write_text("")
    for below in ("", "sub"):
        assert str(file) in bad(1, *flags, "--out", file / below)
    assert "is a file" in bad(1, *flags, "--out", file, "--dry-run")
    assert file.read_text() == "" and left(tmp_path) == ["file"]


def test_a_broken_line_in_the_middle(flags: Flags, tmp_path: Path, out: Path) -> None:
    """The run finds it, and goes on when it is mended; so when the file or the disk is gone."""
    good_line = json.dumps({"text": "The ship sailed on. " * 60})
    file, broken = tmp_path / "a.jsonl", good_line[:-2] + "'}"
    file.write_text("\n".join([good_line, broken] * 20))
    line = bad(1, *flags, "--data", file)
    match = re.match(rf"{re.escape(str(file))}, byte (\d+): expected ", line)
    assert match and int(match[1]) % (2 * len(good_line) + 2) == len(good_line) + 1
    file.write_text("\n".join([good_line] * 40))

    def full(*args: Any) -> None:
        raise RuntimeError("[write] Unable to write 597 bytes to file.")

    with Patch.context() as patch:
        patch.setattr(Run, "capture", lambda run, stage: (file.unlink(), run.held[0]))
        line = bad(1, *flags, "--data", file)
    assert str(file) in line and "cannot be written" not in line
    file.write_text("\n".join([good_line] * 40))
    with Patch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        line = bad(1, *flags, "--data", file)
    assert line.startswith(f"{out} cannot be written: [write] Unable to write")
    good(*flags, "--data", file)
    assert left(out) == FILES


def test_a_predictor_that_is_there_is_replaced_only_when_told(
    flags: Flags, out: Path
) -> None:
    """And not before the new one is finished; going on and starting anew are told apart."""
    models.save_random_predictor(model_of(512), out)
    before = [(out / name).read_bytes() for name in FILES[:2]]
    assert bad(1, *flags) == (
        f"{out} holds a predictor file: --overwrite replaces it, "
        "--out puts the new one elsewhere."
    )
    interrupted(Run, "judge", *flags, "--overwrite")
    assert [(out / name).read_bytes() for name in FILES[:2]] == before
    assert "--overwrite replaces it" in bad(1, *flags, "--restart", "--seed", 5)
    good(*flags)
    assert left(out) == FILES and (out / FILES[1]).read_bytes() != before[1]


@pytest.mark.parametrize("size", [9e6, 30e6])
def test_the_advice_for_a_small_disk_fits_it(
    size: float, flags: Flags, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(estimate, "free_disk", lambda folder: size)
    flags += ["--length", 512]
    line = bad(1, *flags, "--tokens", 10**6)
    wanted = r"1,000,000 tokens take \d\.\d GB of disk, 0\.0 GB are free for "
    match = re.match(wanted + rf"{tmp_path / 'out'}; try --tokens (\d+)\.$", line)
    assert match is not None and left(tmp_path) == []
    monkeypatch.setattr(estimate, "seconds", lambda run, reads: {})
    good(*flags, "--tokens", match[1], "--dry-run")


def test_a_dry_run_writes_nothing_and_forgets_nothing(flags: Flags, out: Path) -> None:
    """Nor does it mind a predictor that is there, or an unfinished run."""
    dry = [*flags, "--compensator", "low-rank", "--minutes", 3, "--dry-run"]
    done = good(*dry)
    first, second, third = done.stderr.splitlines()
    assert first.startswith("Up to 4,096 tokens; ")
    phases = ("capture", "predictors", "compensators", "curves", "judgement")
    phases += ("verifying",)
    told = ", ".join(rf"{phase} \d+\.\d" for phase in phases)
    assert re.fullmatch(rf"About \d+\.\d minutes: {told}\.", second)
    assert third == "--minutes 3 cuts that short."
    assert done.stdout == "" and not out.exists()
    interrupted(Run, "predictors", *flags)
    (out / FILES[0]).write_text("{}")
    before = left(out / WORK)
    good(*dry, "--restart")
    assert left(out) == [WORK, FILES[0]] and left(out / WORK) == before


def test_ctrl_c(flags: Flags, out: Path) -> None:
    for place in (train_module, "load_model"), (estimate, "seconds"):
        assert interrupted(*place, *flags, "--dry-run") == "stopped."
    wanted = f"stopped; the same command goes on from {out / WORK}."
    for method in ("predictors", "compensators", "curves"):
        assert interrupted(Run, method, *flags) == wanted
        assert WORK in left(out) and not set(FILES[:2]) & set(left(out))
    for last in ("write_report", "write", "forget"):
        assert interrupted(run_module, last, *flags) == wanted
    line = interrupted(train_module, "verified", *flags)  # the predictor was written
    assert line.startswith("stopped; the predictor is made, and not verified: ")
    assert f"eval --save --predictor {out} --model " in line
    assert left(out) == FILES


LITTLE = (
    "expected 1,024 at least, better a hundred times as many: name more with --data."
)


def test_little_text(flags: Flags, tmp_path: Path) -> None:
    """Next to none is refused; a little is read a few times, and that is said."""
    (file := tmp_path / "a.txt").write_text("The ship sailed on. " * 200)
    told = bad(1, *flags, "--data", file)
    assert told == f"the data holds about 1,000 tokens; {LITTLE}"
    file.write_text("The ship sailed on. " * 300)
    done = good(*flags, "--data", file, "--tokens", 9000, "--dry-run")
    assert done.stderr.startswith(
        "The data holds about 1,500 tokens: each is read about 4 times, 6,000 in all instead of "
        "9,000."
    )


def test_too_few_minutes(flags: Flags, out: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(estimate, "least_minutes", lambda run, reads: 2.3)
    told = bad(2, *flags, "--minutes", 2)
    assert told == (
        "--minutes 2 is too little for this model on this machine: expected 3 at least."
    )
    assert left(out) == []
    good(*flags, "--minutes", 3)


@pytest.mark.parametrize(
    "row, without, told",
    [
        ((0.004, 0.8), (0.009, 0.8), "Next: mlx_fastforward chat --model m (skips 50%"),
        ((0.012, 0.8), (0.013, 0.8), "It is better than no predictor, but no sparsity"),
        ((0.004, 0.8), (0.003, 0.8), "On held-out text it did no better than no"),
        ((0.004, 0.7), (0.005, 0.8), "On held-out text it did no better than no"),
    ],
)
def test_what_was_reached(
    row: Any, without: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In plain words; and search passes over what is no better than none."""
    keys = {"sparsity": 0.5, "facts_dense": 0.81}
    nothing = {"kl_bounds": None, "facts_difference_bounds": None, "speedup": 1.2}
    own, none = (
        {**keys, **nothing, "kl": kl, "facts": facts} for kl, facts in (row, without)
    )
    found = {"rows": [own], "without": none, "documents": 8}
    found |= {"prompt_tokens": 1900, "questions": 30}
    made = {"tokens": 1, "recall": [0.7], "error_removed": [], "from_dense": None}
    train_end.conclude({"calibration": made}, found, Path("out"), "m", 60)
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)
    assert better_than_none({"verified": found}) != told.startswith("On held-out")


def test_another_run_is_not_gone_on_with(flags: Flags, out: Path) -> None:
    interrupted(Run, "predictors", *flags)
    other, state = [*flags, "--kind", "pooled", "--seed", 4], out / WORK / "state.json"
    assert bad(1, *other) == (
        f"{out / WORK} holds an unfinished run with other settings (kind, seed); "
        "repeat them, or start anew with --restart."
    )
    assert '"token-wise"' in state.read_text()
    assert "--minutes" in bad(2, *other, "--restart", "--minutes", 0.0001)
    assert '"token-wise"' in state.read_text()  # refused, and nothing lost
    interrupted(Run, "capture", *other, "--restart")
    assert not state.exists()


@pytest.mark.usefixtures("as_in_a_terminal")
def test_ctrl_c_stops_a_run_and_the_same_command_goes_on(
    flags: Flags, out: Path, monkeypatch: Patch
) -> None:
    """It ends with the predictor of a run that nobody disturbed."""
    flags = [*QUICK, "--compensator", "low-rank", *flags[len(QUICK) :]]
    good(*flags)
    flags[-1] = again = out.parent / "again"
    work, real, files = again / WORK, np.save, []

    def save(path: Path, values: np.ndarray) -> None:
        real(path, values)
        files.append(path.name)
        if len(files) == 9:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        said = bad(130, *flags)
    assert said == f"stopped; the same command goes on from {work}."
    assert files[-1].startswith(".writing-") and len(list(work.glob("dense/0*"))) > 2
    for name in (".writing-state.json", "dense/.writing-000099.x.npy"):
        (work / name).write_bytes(b"{")  # what a killed one leaves
    good(*flags)
    made, wanted = (mx.load(str(folder / FILES[1])) for folder in (again, out))
    assert isinstance(made, dict) and made.keys() == wanted.keys()
    assert all(mx.array_equal(made[name], wanted[name]).item() for name in made)
    assert left(again) == left(out) == FILES
