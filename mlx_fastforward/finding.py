"""Where adapters are found: named by the user, beside the model, in their own folder, on the hub."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, HFValidationError

from .adapter import (
    JSON_NAME,
    TENSORS_NAME,
    Adapter,
    AdapterError,
    BaseModel,
    load_adapter,
)

NONE = "none"


def home() -> Path:
    """The folder of the user's own adapters; MLX_FASTFORWARD_HOME moves it."""
    root = os.environ.get("MLX_FASTFORWARD_HOME") or "~/.cache/mlx_fastforward"
    return Path(root).expanduser() / "adapters"


def default_folder(base: BaseModel) -> Path:
    """Where an adapter for this model goes unless the user says otherwise."""
    name = base.name.replace("/", "--").replace(" ", "-")
    return home() / (name if name.strip(".") else "model")


def looks_like_a_repository(name: str) -> bool:
    """Whether a name is no path: owner/name, and no such folder."""
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    return not local and not Path(name).exists()


def download(
    repo: str,
    patterns: list[str],
    what: str = "adapter",
    revision: Optional[str] = None,
    repo_type: str = "model",
) -> Path:
    """Files of a hub repository, from the cache where they are there; raises AdapterError."""
    try:
        folder = snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=patterns
        )
        return Path(folder)
    except (HFValidationError, OSError) as e:  # hub and connection errors are OSErrors
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise AdapterError(
            f"{what} {repo!r} is not a local folder and could not be downloaded: {reason}"
        ) from e


def named_adapter(name: str | Path) -> Optional[Adapter]:
    """The adapter that a user named, a folder or a repository; "none" is none at all."""
    text = str(name)
    if text == NONE:
        return None
    if isinstance(name, Path) or not looks_like_a_repository(text):
        return load_adapter(text)
    adapter = load_adapter(download(text, [JSON_NAME, TENSORS_NAME]))
    adapter.source = text
    return adapter


def adapter_for(
    model: str, base: BaseModel, revision: Optional[str] = None
) -> Optional[Adapter]:
    """The adapter to use when nobody named one: beside the model, else the user's newest for it.

    Raises AdapterError where the chosen one is damaged.
    """
    if (beside := beside_model(model, revision)) is not None:
        return load_adapter(beside)
    fitting = [p for p in own_folders() if fits(p, base)]
    newest = max(fitting, key=lambda p: (p / JSON_NAME).stat().st_mtime, default=None)
    return load_adapter(newest) if newest is not None else None


def beside_model(model: str, revision: Optional[str] = None) -> Optional[Path]:
    """The model's own folder, local or of the hub, if an adapter lies in it.

    mlx-lm downloads the JSON with a model but not the adapter's weights: they are fetched here.
    """
    if Path(model).exists():
        return Path(model) if (Path(model) / JSON_NAME).is_file() else None
    try:
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[JSON_NAME],
                local_files_only=True,
            )
        )
    except (HFValidationError, OSError):
        return None
    if not (folder / JSON_NAME).is_file():
        return None
    if not (folder / TENSORS_NAME).is_file():
        download(model, [JSON_NAME, TENSORS_NAME], revision=folder.name)
    return folder


def own_folders() -> list[Path]:
    """Folders in home() that look like adapters."""
    try:
        return sorted(p.parent for p in home().glob(f"*/{JSON_NAME}"))
    except OSError:
        return []


def fits(folder: Path, base: BaseModel) -> bool:
    """Whether the JSON says so; damaged JSON fits nothing."""
    try:
        info = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        return bool(info["base_model"]["fingerprint"] == base.fingerprint)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class Found:
    """An adapter in some place, or why it is none."""

    place: str
    folder: Path
    adapter: Optional[Adapter] = None
    problem: str = ""


def found_adapters(model: Optional[str]) -> Iterator[Found]:
    """All adapters on this machine: beside the model, the user's own, the hub cache's."""
    if model is not None and (beside := beside_model(model)) is not None:
        yield _found(str(beside), beside)
    for folder in own_folders():
        yield _found(str(folder), folder)
    for repo, folder in cached_repositories():
        if repo != model:
            yield _found(repo, folder)


def cached_repositories() -> list[tuple[str, Path]]:
    """Repositories with an adapter in the Hugging Face cache, newest revision of each."""
    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in sorted(repos, key=lambda r: r.repo_id):
        revisions = [r for r in repo.revisions if _is_adapter(r.snapshot_path)]
        if revisions and repo.repo_type == "model":
            newest = max(revisions, key=lambda r: r.last_modified)
            found.append((repo.repo_id, newest.snapshot_path))
    return found


def _is_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (JSON_NAME, TENSORS_NAME))


def _found(place: str, folder: Path) -> Found:
    try:
        return Found(place, folder, load_adapter(folder))
    except AdapterError as e:
        return Found(place, folder, problem=str(e))
