"""Where predictors are found: named by the user, beside the model, in their own folder, on the hub."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional

from .. import hub
from ..errors import PredictorError
from ..files import expanded
from .base import BaseModel
from .file import JSON_NAME, TENSORS_NAME, PredictorFile, load_predictor
from .verified import better_than_none

NONE = "none"


def home() -> Path:
    """The folder of the user's own predictors; MLX_FASTFORWARD_HOME moves it."""
    root = os.environ.get("MLX_FASTFORWARD_HOME") or "~/.cache/mlx_fastforward"
    return expanded(Path(root)) / "predictors"


def default_folder(base: BaseModel) -> Path:
    """Where a predictor for this model goes unless the user says otherwise."""
    name = base.name.replace("/", "--").replace(" ", "-")
    return home() / (name if name.strip(".") else "model")


def folder_for(base: BaseModel, predictor: Optional[PredictorFile]) -> Path:
    """Where what is found out about a model is kept: its predictor file, else one without weights.

    Raises PredictorError: The file is another model's, or no folder of this machine; or nobody named
    one, and trained weights lie where it would go.
    """
    if predictor is not None:
        predictor.check(base)
        if not (Path(predictor.source) / JSON_NAME).is_file():
            raise PredictorError(
                f"{predictor.source} is no folder of this machine; copy it to one and name that."
            )
        return Path(predictor.source)
    folder = default_folder(base)
    if (folder / JSON_NAME).is_file():
        there = load_predictor(folder)
        there.check(base)
        if there.layers is not None or there.compensator is not None:
            raise PredictorError(
                f"{folder} holds trained weights, which nothing may replace; name them with "
                f"--predictor {folder}, or move them away."
            )
    return folder


def named_predictor(name: str | Path) -> Optional[PredictorFile]:
    """The predictor that a user named, a folder or a repository; "none" is none at all."""
    text = str(name)
    if text == NONE:
        return None
    if isinstance(name, Path) or not hub.looks_like_a_repository(text):
        return load_predictor(text)
    predictor = load_predictor(hub.download(text, [JSON_NAME, TENSORS_NAME]))
    predictor.source = text
    return predictor


def predictor_for(
    model: str,
    base: BaseModel,
    revision: Optional[str] = None,
    fetch: bool = True,
) -> Optional[PredictorFile]:
    """The predictor to use when nobody named one: beside the model, else the user's newest for it.

    One of the user's that did no better than none at all is passed over. Raises PredictorError where the chosen one is damaged.
    """
    if (beside := beside_model(model, revision, fetch)) is not None:
        return load_predictor(beside)
    own = ((folder, details(folder)) for folder in own_folders())
    fitting = [p for p, d in own if fits(d, base) and better_than_none(d)]
    newest = max(fitting, key=lambda p: (p / JSON_NAME).stat().st_mtime, default=None)
    return load_predictor(newest) if newest is not None else None


def beside_model(
    model: str, revision: Optional[str] = None, fetch: bool = True
) -> Optional[Path]:
    """The model's own folder, local or of the hub, if a predictor lies in it.

    mlx-lm downloads the JSON with a model but not the predictor's weights: they are fetched here.
    """
    if Path(model).exists():
        return Path(model) if (Path(model) / JSON_NAME).is_file() else None
    folder = hub.cached_folder(model, [JSON_NAME], revision)
    if folder is None or not (folder / JSON_NAME).is_file():
        return None
    if not (folder / TENSORS_NAME).is_file():
        if not fetch:
            return None
        hub.download(model, [JSON_NAME, TENSORS_NAME], revision=folder.name)
    return folder


def own_folders() -> list[Path]:
    """Folders in home() that look like predictors."""
    try:
        return sorted(p.parent for p in home().glob(f"*/{JSON_NAME}"))
    except OSError:
        return []


def details(folder: Path) -> dict[str, Any]:
    """A predictor file's JSON; empty where it is damaged."""
    try:
        found = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def fits(details: dict[str, Any], base: BaseModel) -> bool:
    """Whether a file's JSON says that it is for this model."""
    made_for = details.get("base_model")
    if not isinstance(made_for, dict):
        return False
    return bool(made_for.get("fingerprint") == base.fingerprint)


@dataclass(frozen=True)
class Found:
    """A predictor in some place, or why it is none."""

    place: str
    folder: Path
    predictor: Optional[PredictorFile] = None
    problem: str = ""


def found_predictors(model: Optional[str]) -> Iterator[Found]:
    """All predictors on this machine: beside the model, the user's own, the hub cache's."""
    if model is not None and (beside := beside_model(model)) is not None:
        yield _found(str(beside), beside)
    for folder in own_folders():
        yield _found(str(folder), folder)
    for repo, folder in cached_repositories():
        if repo != model:
            yield _found(repo, folder)


def cached_repositories() -> list[tuple[str, Path]]:
    """Repositories with a predictor file in the Hugging Face cache, newest revision of each."""
    found = []
    for name, folders in hub.cached_models():
        if (newest := next(filter(_is_predictor, folders), None)) is not None:
            found.append((name, newest))
    return found


def _is_predictor(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (JSON_NAME, TENSORS_NAME))


def _found(place: str, folder: Path) -> Found:
    try:
        return Found(place, folder, load_predictor(folder))
    except PredictorError as e:
        return Found(place, folder, problem=str(e))
