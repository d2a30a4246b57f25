"""What a run may take, is told to take, and makes of too little."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training import (
    BLOCK,
    LENGTH,
    SEQUENTIAL,
    SMALL,
    D,
    F,
    Patch,
    bundled,
    curve_of,
    few_held_out,
    fresh,
    lines_of,
    prepared,
    short,
    stop,
)

from mlx_fastforward import PredictorError, load_predictor
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.train import descent, estimate, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train.run import Run
from mlx_fastforward.train.state import Settings, State


def test_time_is_counted_over_all_sittings(tmp_path: Path) -> None:
    """Once."""
    start, asked = time.perf_counter(), {"a": 1}
    State.resumed(tmp_path, asked).save("capture dense")
    again = State.resumed(tmp_path, asked)
    once = again.seconds["capture dense"]
    time.sleep(0.05)
    again.save("capture dense")
    again.save("predictors")
    assert again.seconds["capture dense"] > once + 0.05 and once > 0
    assert set(again.seconds) == {"capture dense", "predictors"}
    assert sum(again.seconds.values()) < time.perf_counter() - start


def test_minutes_cut_everything_short(tmp_path: Path) -> None:
    """Next to none of them: two sequences of each kind, twenty steps; plenty change nothing."""
    settings = replace(SMALL, tokens=10**6, steps=10**6, minutes=1e-7)
    found = prepared(tmp_path / "a", settings)()
    assert found["calibration"]["tokens"] <= 3 * LENGTH
    assert curve_of(tmp_path / "a")[-1][0] == 20
    load_predictor(tmp_path / "a").check(BaseModel.of(fresh()))
    free = prepared(tmp_path / "b")()
    limited = prepared(tmp_path / "c", replace(SMALL, minutes=1e6))()
    assert curve_of(tmp_path / "b") == curve_of(tmp_path / "c")
    assert limited["calibration"]["tokens"] == free["calibration"]["tokens"]


def test_steps_of_a_limited_run_are_those_it_began_with(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """However fast the machine is when it goes on."""
    monkeypatch.setattr(descent, "INTERVAL", -1.0)
    settings = replace(SMALL, minutes=10.0, steps=500)
    speed = [run_module.PREDICTORS * 600 / 30]
    monkeypatch.setattr(Run, "step_seconds", lambda self: speed[0])
    stop(tmp_path, settings, "predictors dense", 5)
    speed[0] *= 10
    prepared(tmp_path, settings)()
    assert curve_of(tmp_path)[-1][0] == 30


@pytest.mark.parametrize(
    "lengths, settings",
    [
        ([2 if i % 20 == 0 else 60 for i in range(60)], SMALL),
        ([60] * 2 + [3] * 90, replace(SEQUENTIAL, tokens=300)),
        ([60] * 2 + [3] * 90, replace(SEQUENTIAL, tokens=300, compensator="mlp")),
    ],
    ids=["no held-out block", "no sparse block", "and an mlp"],
)
def test_little_text_will_do(
    lengths: list[int], settings: Settings, tmp_path: Path
) -> None:
    """Judged on what was fitted on where there is no other; no number is out of bounds."""
    parts = lines_of(tmp_path / "a.jsonl", lengths)
    found = prepared(tmp_path / "out", settings, parts=parts)()["calibration"]
    assert all(0 < r <= 1 for r in found["recall"])
    assert all(e < 1 for e in found["error_removed"])
    assert load_predictor(tmp_path / "out").layers


def test_texts_that_fill_no_block_will_not(tmp_path: Path) -> None:
    told = {2: "no sequence fills a block of 8 tokens; ", 0: "the data holds no text "}
    for words, message in told.items():
        parts = lines_of(tmp_path / "a.jsonl", [words] * 40)
        with pytest.raises(PredictorError, match=f"^{message}"):
            prepared(tmp_path / f"out{words}", parts=parts)()


@pytest.mark.parametrize("tokens", [2200, 500])
def test_the_disk_that_is_announced_is_what_it_takes(
    tokens: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    few_held_out(3, monkeypatch)
    for part in bundled():
        monkeypatch.setattr(part, "kinds", ("prose",))
    settings, base = replace(SMALL, tokens=tokens), BaseModel.of(fresh())
    stop(tmp_path, settings, "predictors dense")
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*.npy"))
    assert estimate.disk(base, settings) == pytest.approx(stored, rel=0.06)
    here = estimate.free_disk(tmp_path)
    assert estimate.free_disk(tmp_path / "a" / "b") == pytest.approx(here, rel=0.01)


def test_tokens_memory_and_ranks_follow_the_model() -> None:
    base, settings = BaseModel.of(fresh()), SMALL.with_ranks(D)
    assert estimate.default_tokens(base) == estimate.MOST_TOKENS
    large = replace(base, layers=80, hidden_size=8192, ffn_size=28672)
    per_token = 79 * 2 * (8192 + 28672 / 128)
    tokens = estimate.default_tokens(large)
    assert 0.99 * estimate.DISK < tokens * per_token <= estimate.DISK
    wide = replace(base, hidden_size=4 * D, ffn_size=4 * F)
    sizes = [estimate.memory(b, settings) for b in (base, wide)]
    assert 0 < sizes[0] < sizes[1] < 1e9
    for hidden, *wanted in ((16, 8, 4), (32, 8, 4), (256, 32, 32), (8192, 256, 64)):
        found = Settings().with_ranks(hidden)
        assert [found.rank, found.compensator_rank] == wanted
        asked = Settings(rank=7, compensator_rank=10**6).with_ranks(hidden)
        assert (asked.rank, asked.compensator_rank) == (7, hidden)


def test_time_is_told_and_nothing_written(tmp_path: Path) -> None:
    """Nor trained; and the first texts may fill no block."""
    parts = lines_of(tmp_path / "a.jsonl", [3, 0, *[60] * 40])
    assert [len(parts[0][i]) >= BLOCK for i in range(2)] == [False, True]
    run = prepared(tmp_path / "out", parts=parts)
    before = np.array(run.net.w1)
    found = estimate.seconds(run)
    whole = ["capture", "predictors", "compensators", "curves", "judgement"]
    assert list(found) == [*whole, "verifying"] and found.pop("verifying") == 0
    assert all(0 < s < np.inf for s in found.values())
    assert not (tmp_path / "out").exists()
    assert np.array_equal(np.array(run.net.w1), before)


def test_the_report_is_json_and_a_picture(tmp_path: Path, monkeypatch: Patch) -> None:
    """Of two stages, one without a curve, no compensator, any name."""
    monkeypatch.undo()
    found = {
        "base_model": {"name": "US$ model^$", "ffn_size": 64},
        "calibration": {"tokens": 12, "recall": [0.7, 0.8], "error_removed": []},
        "descents": {"dense": [[1, 3.5, 0.5], [2, 3.25, 0.55]], "sparse": []},
        "importance": [0.5, 0.75, 1.0],
    }
    kl = [[0.1, 0.3], [0.001, 0.002]]
    sizes = []
    for curves in ({}, {"curves": {"levels": [0.3, 0.6], "kl": kl, "source": {}}}):
        report.write_report(tmp_path, found | curves)
        assert json.loads((tmp_path / "report.json").read_text()) == found | curves
        png = (tmp_path / "report.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append(len(png))
    assert 10_000 < sizes[0] < sizes[1]
