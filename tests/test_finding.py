"""Predictors are found where they were named, beside the model, in their own folder, on the hub."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import huggingface_hub.errors
import pytest
from side_files import BASE, BOTH, COMMITS, FOREIGN, cached, one_line, own_cache, put

from mlx_fastforward.errors import FastForwardError, PredictorError
from mlx_fastforward.hub import looks_like_a_repository
from mlx_fastforward.predictors import search
from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME
from mlx_fastforward.predictors.search import (
    beside_model,
    default_folder,
    fits,
    named_predictor,
    own_folders,
    predictor_for,
)

DAMAGED_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null", b'"text"']
DAMAGED_JSON += [b"{}", b'{"base_model": 3}', b'{"base_model": {}}']


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


def source(model: str | Path, **base: Any) -> Optional[str]:
    predictor = predictor_for(str(model), replace(BASE, **base))
    return None if predictor is None else predictor.source


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
    with pytest.raises(PredictorError) as e:
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
    assert finding.home() == place / "predictors"


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
    with pytest.raises(PredictorError) as e:
        source(model)
    assert str(model / name) in one_line(e.value)


def test_one_without_weights_beside_the_model_is_refused(model: Path) -> None:
    (put(model) / TENSORS_NAME).unlink()
    with pytest.raises(PredictorError, match="no predictor in"):
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
    predictor = predictor_for("user/tiny", BASE, COMMITS[0])
    assert predictor is not None and predictor.source == str(old)


def test_the_weights_of_one_beside_a_model_in_the_cache_are_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm fetches *.json, but only model*.safetensors; the revision stays the same."""
    whole = cached(cache, "user/whole")
    snapshot = cached(cache, "user/tiny", COMMITS[1], (JSON_NAME,))
    asked = []

    def download(repo: str, patterns: list[str], revision: str) -> Path:
        asked.append((repo, revision))
        assert TENSORS_NAME in patterns
        (snapshot / TENSORS_NAME).write_bytes((whole / TENSORS_NAME).read_bytes())
        return snapshot

    monkeypatch.setattr(finding, "download", download)
    assert source("user/tiny") == str(snapshot)
    assert asked == [("user/tiny", COMMITS[1])]
    assert source("user/tiny") == str(snapshot)
    assert len(asked) == 1


def test_weights_beside_a_model_that_cannot_be_fetched_are_no_silent_loss(
    cache: Path,
) -> None:
    cached(cache, "user/tiny", names=(JSON_NAME,))
    with pytest.raises(PredictorError, match="expected the files"):
        source("user/tiny")


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
    folder = put(tmp_path / "predictor")
    found = named_predictor(kind(folder))
    assert found is not None and found.base == BASE
    assert found.source == str(folder)


def test_the_one_named_may_lie_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "predictor")
    found = named_predictor("~/predictor")
    assert found is not None and found.base == BASE


def test_none_is_none_at_all(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home / "mine")
    put(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert named_predictor("none") is None
    assert named_predictor("./none") is not None


@pytest.mark.parametrize("name", ["user/predictor", "user/Side-File_4.bits"])
def test_names_of_repositories(name: str) -> None:
    assert looks_like_a_repository(name)


@pytest.mark.parametrize(
    "name",
    ["predictor", "a/b/c", "./b", "../b", "/b", "~/b", ".", "", "none", "/a/b", ".a/b"],
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
    found = named_predictor("user/side")
    assert found is not None and found.source == "user/side"


def test_a_repository_is_downloaded_without_its_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo, sorted(allow_patterns)))
        return str(put(tmp_path / "downloaded"))

    monkeypatch.setattr(finding, "snapshot_download", download)
    found = named_predictor("somebody/predictor")
    assert found is not None and found.base == BASE
    assert found.source == "somebody/predictor"
    assert asked == [("somebody/predictor", list(BOTH))]


def test_a_repository_in_the_cache(cache: Path) -> None:
    cached(cache, "somebody/predictor")
    found = named_predictor("somebody/predictor")
    assert found is not None and found.source == "somebody/predictor"


def test_a_repository_that_is_no_adapter(cache: Path) -> None:
    cached(cache, "somebody/model", names=())
    with pytest.raises(PredictorError, match="no predictor in") as e:
        named_predictor("somebody/model")
    one_line(e.value)


@pytest.mark.parametrize("name", ["nowhere", "a/b/nowhere", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mistyped path is no repository name, and nothing is asked of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "snapshot_download", None)
    with pytest.raises(FastForwardError, match="no predictor in") as e:
        named_predictor(name)
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
    with pytest.raises(PredictorError) as e:
        named_predictor("somebody/predictor")
    text = one_line(e.value)
    assert text.startswith("predictor 'somebody/predictor' is not a local folder")
    assert text.endswith(str(error).partition("\n")[0] or "OSError")
