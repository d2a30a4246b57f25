"""Predictors are found where they were named, beside the model, in their own folder, on the hub."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from predictor_files import BASE, BOTH, FOREIGN, cached, edit, one_line, own_cache, put

from mlx_fastforward import hub
from mlx_fastforward.errors import FastForwardError, PredictorError
from mlx_fastforward.hub import looks_like_a_repository
from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME

Patch = pytest.MonkeyPatch
COMMITS = ["a" * 40, "b" * 40, "c" * 40]
DAMAGED_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null", b'"text"']
DAMAGED_JSON += [b"{}", b'{"base_model": 3}', b'{"base_model": {}}']


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder; its name is all that the search looks at."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The predictors' folder, empty and not there yet."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "predictors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


def source(model: str | Path, revision: Any = None, base: BaseModel = BASE) -> Any:
    found = search.predictor_for(str(model), base, revision)
    return None if found is None else found.source


def refusal(model: Path) -> str:
    with pytest.raises(PredictorError) as e:
        source(model)
    return one_line(e.value)


def test_the_newest_one_for_the_model_is_taken(home: Path, model: Path) -> None:
    """Neither another model's nor what is none; nothing at all is fine, too."""
    for root in (home.parent, home):
        assert search.own_folders() == [] and source(model) is None
        root.mkdir()
    home.rmdir()
    home.write_text("notes")
    assert search.own_folders() == [] and source(model) is None
    home.unlink()
    put(home / "foreign", FOREIGN, time=9)
    assert source(model) is None
    for name, time in (("a", 2), ("b", 3), ("c", 1)):
        put(home / name, time=time)
    (put(home / "without", time=9) / JSON_NAME).unlink()
    (home / "file").write_text("notes")
    put(home / "deeper" / "one", time=9)
    assert search.own_folders() == [home / n for n in ("a", "b", "c", "foreign")]
    assert source(model) == str(home / "b")
    foreign = replace(BASE, fingerprint=FOREIGN)
    assert source(model, None, foreign) == str(home / "foreign")


def test_one_that_is_no_better_than_none(home: Path, model: Path) -> None:
    """Used where it is named, not by itself."""
    older, newer = put(home / "older", time=1), put(home / "newer", time=2)
    rows = [{"sparsity": 0.5, "kl": 0.01, "facts": 0.7, "facts_dense": 0.8}]
    for without, chosen in ((0.02, newer), (0.005, older)):
        table = {"rows": rows, "without": {**rows[0], "kl": without}}
        edit(newer, verified=table)
        os.utime(newer / JSON_NAME, (2, 2))
        assert source(model) == str(chosen)
    assert search.named_predictor(str(newer)) is not None


def test_damaged_ones_of_the_user(home: Path, model: Path) -> None:
    """Passed over where nobody knows whose they are, else refused: no silent loss."""
    mine, damaged = put(home / "mine", time=1), put(home / "damaged")
    for content in DAMAGED_JSON:
        (damaged / JSON_NAME).write_bytes(content)
        os.utime(damaged / JSON_NAME, (2, 2))
        assert not search.fits(search.details(damaged), BASE)
        assert search.fits(search.details(mine), BASE)
        assert source(model) == str(mine)
    (put(damaged, time=2) / TENSORS_NAME).write_bytes(b"")
    assert str(damaged) in refusal(model)


@pytest.mark.parametrize("root", [None, "", "~/elsewhere"])
def test_the_folder_lies_in_the_users_home(monkeypatch: Patch, root: Any) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("MLX_FASTFORWARD_HOME", raising=False)
    if root is not None:
        monkeypatch.setenv("MLX_FASTFORWARD_HOME", root)
    place = "elsewhere" if root else ".cache/mlx_fastforward"
    assert search.home() == Path("/home/me") / place / "predictors"


def test_what_is_put_in_the_default_folder_is_found(home: Path, model: Path) -> None:
    names = ["a/b", "b", "a", "c/b", "a/b-4bit", "demo model", "Grüße/模型", ".."]
    folders = [search.default_folder(replace(BASE, name=name)) for name in names]
    assert len(set(folders)) == len(names)
    for i, folder in enumerate(folders):
        assert folder.parent == home and " " not in folder.name
        assert source(model) == (str(folders[i - 1]) if i else None)
        put(folder, time=i)


def test_beside_the_model_wins_over_the_own_folder(home: Path, model: Path) -> None:
    mine = put(home / "mine", time=2)
    put(model, time=1)
    assert source(model) == str(model)
    for name in BOTH:  # nor is a damaged one left out silently
        (model / name).write_bytes(b"")
        assert str(model / name) in refusal(model)
        put(model)
    (model / TENSORS_NAME).unlink()
    assert "no predictor file in" in refusal(model)
    (put(model) / JSON_NAME).unlink()
    assert search.beside_model(str(model)) is None and source(model) == str(mine)


def test_beside_a_model_in_the_cache(home: Path, cache: Path) -> None:
    """Of the revision that was asked for, main's unless another is."""
    mine = str(put(home / "mine"))
    for names in ((), (TENSORS_NAME,)):
        cached(cache, "user/none", names=names)
        assert source("user/none") == mine
    old, new = (cached(cache, "user/tiny", commit) for commit in COMMITS[:2])
    assert source("user/tiny") == str(new)
    assert source("user/tiny", COMMITS[0]) == str(old)
    for name in ("user/other", "no such model", "a/b/c", "user/"):
        assert source(name) == source("user/tiny", COMMITS[2]) == mine


def test_weights_beside_a_model_in_the_cache(cache: Path, monkeypatch: Patch) -> None:
    """mlx-lm fetches *.json, but only model*.safetensors: they are, of the same revision."""
    whole = cached(cache, "user/whole")
    snapshot = cached(cache, "user/tiny", COMMITS[1], (JSON_NAME,))
    with pytest.raises(PredictorError, match="expected the files"):
        source("user/tiny")  # no network: no silent loss
    asked = []

    def download(repo: str, patterns: list[str], revision: Any = None) -> Path:
        asked.append((repo, revision))
        assert TENSORS_NAME in patterns
        (snapshot / TENSORS_NAME).write_bytes((whole / TENSORS_NAME).read_bytes())
        return snapshot

    monkeypatch.setattr(hub, "download", download)
    assert source("user/tiny") == source("user/tiny") == str(snapshot)
    assert asked == [("user/tiny", COMMITS[1])]


def test_the_one_named(tmp_path: Path, cache: Path, monkeypatch: Patch) -> None:
    """A folder as it is, in the user's home or like a repository's name; or from the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert looks_like_a_repository("user/side")
    cached(cache, "user/side")
    found = search.named_predictor("user/side")
    assert found is not None and found.source == "user/side" and found.base == BASE
    folder = put(tmp_path / "user" / "side", FOREIGN)
    assert not looks_like_a_repository("user/side")
    for name in (folder, str(folder), "~/user/side", "./user/side", "user/side"):
        found = search.named_predictor(name)
        assert found is not None and found.base.fingerprint == FOREIGN
    put(tmp_path / "none")
    assert search.named_predictor("none") is None
    assert search.named_predictor("./none") is not None


def test_a_folder_that_is_not_there(monkeypatch: Patch) -> None:
    """A mistyped path is no repository's name, and nothing is asked of the network."""
    monkeypatch.setattr(hub, "download", None)
    for name in ("none-such", "a/b/none", "./none", "../none", "/none", ".a/b"):
        assert not looks_like_a_repository(name)
        with pytest.raises(FastForwardError, match="no predictor file in") as e:
            search.named_predictor(name)
        assert name.removeprefix("./") in one_line(e.value)


def test_a_model_in_the_cache_is_listed_once(home: Path, cache: Path) -> None:
    snapshot = cached(cache, "user/side")
    for model, place in ((None, "user/side"), ("user/side", str(snapshot))):
        (found,) = search.found_predictors(model)
        assert (found.place, found.folder) == (place, snapshot) and found.predictor


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_the_newest_whole_revision_of_a_repository(cache: Path, newest: int) -> None:
    """What else lies there is none, and hides no other."""
    assert search.cached_repositories() == []
    cache.write_text("notes")
    assert search.cached_repositories() == []
    cache.unlink()
    for name, names in (("model", BOTH[:1]), ("weights", BOTH[1:]), ("neither", ())):
        put(cached(cache, f"user/{name}", names=names) / "sub")
    cached(cache, "user/data").parents[1].rename(cache / "datasets--user--data")
    (cache / "models--user--empty").mkdir()
    (cache / "models--user--file").write_text("notes")
    assert search.cached_repositories() == []
    snapshots = [cached(cache, "user/side", commit) for commit in COMMITS]
    partial = cached(cache, "user/side", "d" * 40, BOTH[:1])
    for folder in (*snapshots, partial):
        time = {snapshots[newest]: 2_000_000, partial: 3_000_000}.get(folder, 1_000_000)
        for file in folder.iterdir():
            os.utime(file, (time, time))
    assert search.cached_repositories() == [("user/side", snapshots[newest])]
