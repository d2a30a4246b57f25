"""Adapters are found where they were named, beside the model, in their own folder, on the hub."""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import huggingface_hub
import huggingface_hub.errors
import pytest
from side_files import BASE, PRINT, information, one_line, weights

from mlx_fastforward import finding
from mlx_fastforward.adapter import JSON_NAME, TENSORS_NAME, AdapterError, save_adapter
from mlx_fastforward.config import FastForwardError
from mlx_fastforward.finding import (
    adapter_for,
    beside_model,
    cached_repositories,
    default_folder,
    fits,
    found_adapters,
    looks_like_a_repository,
    named_adapter,
    own_folders,
)

FOREIGN = "f" * 16
COMMITS = ["a" * 40, "b" * 40, "c" * 40]
DAMAGED_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null", b'"text"']
DAMAGED_JSON += [b"{}", b'{"base_model": 3}', b'{"base_model": {}}']
BOTH = (JSON_NAME, TENSORS_NAME)


def put(folder: Path, mark: str = PRINT, time: int = 0) -> Path:
    """An adapter for the model with this fingerprint, of this age."""
    info = information()
    info["base_model"]["fingerprint"] = mark
    save_adapter(folder, info, weights())
    os.utime(folder / JSON_NAME, (time, time))
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapters' folder, empty and not there yet."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "adapters"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder; its name is all that finding looks at."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache of the test's own, without a network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("scan_cache_dir", "snapshot_download", "hf_hub_download"):
        real = getattr(huggingface_hub, name)
        mine = functools.partial(real, cache_dir=folder)
        if name != "scan_cache_dir":
            mine = functools.partial(mine, local_files_only=True)
        monkeypatch.setattr(finding, name, mine)
    return folder


def cached(
    cache: Path,
    repo: str,
    commit: str = COMMITS[0],
    names: tuple[str, ...] = BOTH,
    kind: str = "models",
) -> Path:
    """A revision of a repository as the hub's client leaves it, and main is this one."""
    root = cache / f"{kind}--{repo.replace('/', '--')}"
    snapshot = put(root / "snapshots" / commit)
    for name in set(BOTH) - set(names):
        (snapshot / name).unlink()
    (snapshot / "README.md").write_text("A side file.")
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot


def source(model: str | Path, **base: Any) -> Optional[str]:
    adapter = adapter_for(str(model), replace(BASE, **base))
    return None if adapter is None else adapter.source


# The user's own folder


@pytest.mark.parametrize("times", [(3, 2, 1), (1, 3, 2), (1, 2, 3)])
def test_the_newest_one_for_the_model_is_taken(
    home: Path, model: Path, times: tuple[int, int, int]
) -> None:
    folders = [put(home / name, time=t) for name, t in zip("abc", times)]
    assert source(model) == str(folders[times.index(3)])


def test_adapters_of_other_models_are_not_taken(home: Path, model: Path) -> None:
    put(home / "foreign", FOREIGN, time=2)
    assert source(model) is None
    mine = put(home / "mine", time=1)
    assert source(model) == str(mine)
    assert source(model, fingerprint=FOREIGN) == str(home / "foreign")


@pytest.mark.parametrize("content", DAMAGED_JSON, ids=lambda c: c.decode("latin1")[:20])
def test_damaged_descriptions_are_not_taken(
    home: Path, model: Path, content: bytes
) -> None:
    mine = put(home / "mine", time=1)
    damaged = put(home / "damaged")
    (damaged / JSON_NAME).write_bytes(content)
    os.utime(damaged / JSON_NAME, (2, 2))
    assert not fits(damaged, BASE) and fits(mine, BASE)
    assert source(model) == str(mine)


def test_what_is_no_adapter_is_not_looked_at(home: Path, model: Path) -> None:
    mine = put(home / "mine")
    (put(home / "without", time=2) / JSON_NAME).unlink()
    (home / "file").write_text("notes")
    put(home / "deeper" / "one", time=2)
    assert own_folders() == [mine]
    assert source(model) == str(mine)


def test_damaged_weights_of_the_one_to_take_are_refused(
    home: Path, model: Path
) -> None:
    """Not silently an older one, or none."""
    put(home / "older", time=1)
    (put(home / "newer", time=2) / TENSORS_NAME).write_bytes(b"")
    with pytest.raises(AdapterError) as e:
        source(model)
    assert str(home / "newer") in one_line(e.value)


def test_no_folder_is_no_adapter(home: Path, model: Path) -> None:
    assert not home.exists()
    assert own_folders() == [] and source(model) is None


def test_a_file_in_the_place_of_the_folder_is_no_adapter(
    home: Path, model: Path
) -> None:
    home.parent.mkdir()
    home.write_text("notes")
    assert own_folders() == [] and source(model) is None


@pytest.mark.parametrize("root", [None, "", "~/elsewhere"])
def test_the_folder_lies_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Optional[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLX_FASTFORWARD_HOME", raising=False)
    if root is not None:
        monkeypatch.setenv("MLX_FASTFORWARD_HOME", root)
    place = tmp_path / ("elsewhere" if root else ".cache/mlx_fastforward")
    assert finding.home() == place / "adapters"


@pytest.mark.parametrize(
    "name", ["org/model", "demo model", "tiny", "Grüße/模型", ".m"]
)
def test_what_is_put_in_the_default_folder_is_found(
    home: Path, model: Path, name: str
) -> None:
    folder = default_folder(replace(BASE, name=name))
    assert folder.parent == home and " " not in folder.name
    put(folder)
    assert source(model) == str(folder)


def test_models_of_other_names_have_other_default_folders(home: Path) -> None:
    names = ["a/b", "b", "a", "c/b", "a/b-4bit"]
    assert len({default_folder(replace(BASE, name=n)) for n in names}) == len(names)


# Beside the model


def test_beside_the_model_wins_over_the_own_folder(home: Path, model: Path) -> None:
    put(home / "mine", time=2)
    assert beside_model(str(model)) is None
    put(model, time=1)
    assert beside_model(str(model)) == model
    assert source(model) == str(model)


def test_weights_without_a_description_are_not_beside(home: Path, model: Path) -> None:
    mine = put(home / "mine")
    (put(model) / JSON_NAME).unlink()
    assert source(model) == str(mine)


@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_one_beside_the_model_is_refused(
    home: Path, model: Path, name: str
) -> None:
    """Not silently left out, nor replaced by one of the user's own."""
    put(home / "mine")
    (put(model) / name).write_bytes(b"")
    with pytest.raises(AdapterError) as e:
        source(model)
    assert str(model / name) in one_line(e.value)


def test_one_without_weights_beside_the_model_is_refused(model: Path) -> None:
    (put(model) / TENSORS_NAME).unlink()
    with pytest.raises(AdapterError, match="no adapter in"):
        source(model)


def test_beside_a_model_in_the_cache(home: Path, cache: Path) -> None:
    put(home / "mine")
    snapshot = cached(cache, "user/tiny")
    assert beside_model("user/tiny") == snapshot
    assert source("user/tiny") == str(snapshot)


def test_beside_the_revision_that_was_asked_for(cache: Path) -> None:
    old = cached(cache, "user/tiny", COMMITS[0])
    new = cached(cache, "user/tiny", COMMITS[1])
    assert beside_model("user/tiny") == new
    assert beside_model("user/tiny", COMMITS[0]) == old
    assert beside_model("user/tiny", COMMITS[2]) is None
    adapter = adapter_for("user/tiny", BASE, COMMITS[0])
    assert adapter is not None and adapter.source == str(old)


def test_the_weights_of_one_beside_a_model_in_the_cache_are_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm fetches *.json, but only model*.safetensors; the revision stays the same."""
    whole = cached(cache, "user/whole")
    snapshot = cached(cache, "user/tiny", COMMITS[1], (JSON_NAME,))
    asked = []

    def download(repo: str, name: str, revision: Optional[str] = None) -> str:
        asked.append((repo, name, revision))
        (snapshot / name).write_bytes((whole / name).read_bytes())
        return str(snapshot / name)

    monkeypatch.setattr(finding, "hf_hub_download", download)
    assert source("user/tiny") == str(snapshot)
    assert asked == [("user/tiny", TENSORS_NAME, COMMITS[1])]
    assert source("user/tiny") == str(snapshot)
    assert len(asked) == 1


@pytest.mark.parametrize("names", [(), (TENSORS_NAME,)])
def test_nothing_beside_a_model_in_the_cache(
    home: Path, cache: Path, names: tuple[str, ...]
) -> None:
    mine = put(home / "mine")
    cached(cache, "user/tiny", names=names)
    assert beside_model("user/tiny") is None
    assert source("user/tiny") == str(mine)


@pytest.mark.parametrize("name", ["user/other", "no such model", "a/b/c", "user/"])
def test_nothing_beside_a_model_that_is_not_there(
    home: Path, cache: Path, name: str
) -> None:
    cached(cache, "user/tiny")
    assert beside_model(name) is None and source(name) is None


# Named by the user


@pytest.mark.parametrize("kind", [str, Path])
def test_the_one_named(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    folder = put(tmp_path / "adapter")
    found = named_adapter(kind(folder))
    assert found is not None and found.base == BASE
    assert found.source == str(folder)


def test_the_one_named_may_lie_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "adapter")
    found = named_adapter("~/adapter")
    assert found is not None and found.base == BASE


def test_none_is_none_at_all(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home / "mine")
    put(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert named_adapter("none") is None
    assert named_adapter("./none") is not None


@pytest.mark.parametrize("name", ["user/adapter", "user/Side-File_4.bits"])
def test_names_of_repositories(name: str) -> None:
    assert looks_like_a_repository(name)


@pytest.mark.parametrize(
    "name",
    ["adapter", "a/b/c", "./b", "../b", "/b", "~/b", ".", "", "none", "/a/b", ".a/b"],
)
def test_names_of_folders(name: str) -> None:
    assert not looks_like_a_repository(name)


def test_a_folder_that_is_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_a_repository("user/side")
    put(tmp_path / "user" / "side")
    assert not looks_like_a_repository("user/side")
    found = named_adapter("user/side")
    assert found is not None and found.source == "user/side"


def test_a_repository_is_downloaded_without_its_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, sorted(allow_patterns)))
        return str(put(tmp_path / "downloaded"))

    monkeypatch.setattr(finding, "snapshot_download", download)
    found = named_adapter("somebody/adapter")
    assert found is not None and found.base == BASE
    assert found.source == "somebody/adapter"
    assert asked == [("somebody/adapter", list(BOTH))]


def test_a_repository_in_the_cache(cache: Path) -> None:
    cached(cache, "somebody/adapter")
    found = named_adapter("somebody/adapter")
    assert found is not None and found.source == "somebody/adapter"


def test_a_repository_that_is_no_adapter(cache: Path) -> None:
    cached(cache, "somebody/model", names=())
    with pytest.raises(AdapterError, match="no adapter in") as e:
        named_adapter("somebody/model")
    one_line(e.value)


@pytest.mark.parametrize("name", ["nowhere", "a/b/nowhere", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mistyped path is no repository name, and nothing is asked of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "snapshot_download", None)
    with pytest.raises(FastForwardError, match="no adapter in") as e:
        named_adapter(name)
    assert "nowhere" in one_line(e.value)


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nNo network."),
        huggingface_hub.errors.HFValidationError("Repo id must\nbe."),
        ConnectionError("unreachable"),
        OSError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_repository_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(finding, "snapshot_download", download)
    with pytest.raises(AdapterError) as e:
        named_adapter("somebody/adapter")
    text = one_line(e.value)
    assert text.startswith("adapter 'somebody/adapter' is not a local folder")
    assert text.endswith(str(error).partition("\n")[0] or "OSError")


# All on this machine


def listed(model: Optional[str | Path] = None) -> list[str]:
    """Places of the adapters found; all of them work."""
    found = list(found_adapters(None if model is None else str(model)))
    for f in found:
        assert f.adapter is not None and f.problem == ""
        assert f.adapter.source == str(f.folder)
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
    found = {f.place: f for f in found_adapters(str(model))}
    assert set(found) == {*damaged, str(home / "b")}
    for place, folder in damaged.items():
        assert found[place].adapter is None and found[place].folder == folder
        assert f"{folder / TENSORS_NAME} cannot be read" in found[place].problem
    assert found[str(home / "b")].adapter is not None


def test_damaged_json_is_listed_with_the_problem(home: Path) -> None:
    (put(home / "a") / JSON_NAME).write_text("{")
    (found,) = found_adapters(None)
    assert found.adapter is None and JSON_NAME in found.problem
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


def test_files_in_a_folder_of_a_repository_are_no_adapter(cache: Path) -> None:
    snapshot = cached(cache, "user/side", names=())
    put(snapshot / "sub")
    assert cached_repositories() == []


def test_data_sets_of_the_cache_are_no_adapters(cache: Path) -> None:
    cached(cache, "user/side", kind="datasets")
    assert cached_repositories() == []
