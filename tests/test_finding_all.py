"""Which predictors a machine has, and what is wrong with the others."""

import functools
import os
from pathlib import Path
from typing import Optional

import huggingface_hub
import pytest
from side_files import COMMITS, FOREIGN, cached, own_cache, put

from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME
from mlx_fastforward.predictors.search import cached_repositories, found_predictors


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The predictors' folder, empty and not there yet."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "predictors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder; its name is all that finding looks at."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


# All on this machine


def listed(model: Optional[str | Path] = None) -> list[str]:
    """Places of the predictors found; all of them work."""
    found = list(found_predictors(None if model is None else str(model)))
    for f in found:
        assert f.predictor is not None and f.problem == ""
        assert f.predictor.source == str(f.folder)
    return [f.place for f in found]


def test_all_places_are_listed(home: Path, model: Path, cache: Path) -> None:
    own = [put(home / "a", FOREIGN), put(home / "b")]
    put(model)
    cached(cache, "user/side")
    cached(cache, "org/side")
    rest = [*map(str, own), "org/side", "user/side"]
    assert listed() == rest
    assert listed(model) == [str(model), *rest]


def test_nothing_is_listed_where_nothing_is(home: Path, model: Path) -> None:
    assert listed() == [] and listed(model) == []


def test_a_model_in_the_cache_is_listed_once(home: Path, cache: Path) -> None:
    snapshot = cached(cache, "user/tiny")
    assert listed() == ["user/tiny"]
    assert listed("user/tiny") == [str(snapshot)]


def test_damaged_ones_are_listed_with_the_problem(
    home: Path, model: Path, cache: Path
) -> None:
    damaged = {
        str(put(model)): model,
        str(put(home / "a")): home / "a",
        "user/side": cached(cache, "user/side"),
    }
    put(home / "b")
    for folder in damaged.values():
        (folder / TENSORS_NAME).write_bytes(b"")
    found = {f.place: f for f in found_predictors(str(model))}
    assert set(found) == {*damaged, str(home / "b")}
    for place, folder in damaged.items():
        assert found[place].predictor is None and found[place].folder == folder
        assert f"{folder / TENSORS_NAME} cannot be read" in found[place].problem
    assert found[str(home / "b")].predictor is not None


def test_damaged_json_is_listed_with_the_problem(home: Path) -> None:
    (put(home / "a") / JSON_NAME).write_text("{")
    (found,) = found_predictors(None)
    assert found.predictor is None and JSON_NAME in found.problem
    assert "\n" not in found.problem


# The hub's cache


def test_repositories_need_both_files(cache: Path) -> None:
    snapshot = cached(cache, "user/side")
    cached(cache, "user/model", names=(JSON_NAME,))
    cached(cache, "user/weights", names=(TENSORS_NAME,))
    cached(cache, "user/neither", names=())
    assert cached_repositories() == [("user/side", snapshot)]


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_the_newest_revision_of_a_repository(cache: Path, newest: int) -> None:
    for i, commit in enumerate(COMMITS):
        snapshot = cached(cache, "user/side", commit)
        time = 2_000_000 if i == newest else 1_000_000
        for file in snapshot.iterdir():
            os.utime(file, (time, time))
    folder = cache / "models--user--side" / "snapshots" / COMMITS[newest]
    assert cached_repositories() == [("user/side", folder)]


def test_the_newest_revision_that_is_an_adapter(cache: Path) -> None:
    snapshot = cached(cache, "user/side", COMMITS[0])
    for file in snapshot.iterdir():
        os.utime(file, (1_000_000, 1_000_000))
    cached(cache, "user/side", COMMITS[1], (JSON_NAME,))
    assert cached_repositories() == [("user/side", snapshot)]


@pytest.mark.parametrize("kind", ["file", "missing"])
def test_no_cache_is_no_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "other"
    if kind == "file":
        place.write_text("notes")
    scan = functools.partial(huggingface_hub.scan_cache_dir, cache_dir=place)
    monkeypatch.setattr(finding, "scan_cache_dir", scan)
    assert cached_repositories() == []


def test_damaged_repositories_of_the_cache_hide_no_other(cache: Path) -> None:
    snapshot = cached(cache, "user/side")
    (cache / "models--user--empty").mkdir()
    (cache / "models--user--file").write_text("notes")
    assert cached_repositories() == [("user/side", snapshot)]


def test_data_sets_of_the_cache_are_no_adapters(cache: Path) -> None:
    cached(cache, "user/side", kind="datasets")
    assert cached_repositories() == []


def test_files_in_a_folder_of_a_repository_are_no_adapter(cache: Path) -> None:
    snapshot = cached(cache, "user/side", names=())
    put(snapshot / "sub")
    assert cached_repositories() == []
