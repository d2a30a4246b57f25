"""The one place that talks to the Hugging Face hub, and tells in one line what went wrong."""

import contextlib
from pathlib import Path
from typing import Iterator, Optional

from .errors import FastForwardError, HubError, brief
from .ranks import is_lost_peer

NOT_CACHED = " and it is not in the local cache; connect once, or pass a local folder"


def looks_like_a_repository(name: str) -> bool:
    """Whether a name is no path: owner/name, and no such folder."""
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    return not local and not Path(name).exists()


def download(
    repo: str,
    patterns: list[str],
    what: str = "predictor",
    revision: Optional[str] = None,
    repo_type: str = "model",
) -> Path:
    """Files of a repository, from the cache where they are there; raises HubError."""
    from huggingface_hub import snapshot_download

    with problems(f"{what} {repo}", HubError):
        folder = snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=patterns
        )
        return Path(folder)


def cached_folder(
    repo: str, patterns: list[str], revision: Optional[str] = None
) -> Optional[Path]:
    """A repository's folder in the local cache, or None; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (HFValidationError, OSError):
        return None


def cached_models() -> list[tuple[str, list[Path]]]:
    """Model repositories in the local cache with their revisions' folders, newest first."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [r for r in scan_cache_dir().repos if r.repo_type == "model"]
    except (CacheNotFound, OSError, ValueError):
        return []

    def folders(repo: object) -> list[Path]:
        newest = sorted(repo.revisions, key=lambda r: -r.last_modified)  # type: ignore
        return [r.snapshot_path for r in newest]

    return [(r.repo_id, folders(r)) for r in sorted(repos, key=lambda r: r.repo_id)]


@contextlib.contextmanager
def problems(
    name: str, kind: type[FastForwardError], done: str = "loaded"
) -> Iterator[None]:
    """Turn what a folder, a repository or the network refuses into one line of this ``kind``."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)

    def refused(e: HfHubHTTPError) -> FastForwardError:
        status = e.response.status_code if e.response is not None else None
        hint = "; log in with: hf auth login" if status in (401, 403) else ""
        return kind(f"{name}: the hub refused ({brief(e)}){hint}.")

    try:
        yield
    except FastForwardError:
        raise
    except HFValidationError:
        raise kind(
            f"{name} is neither a local folder nor a repository name like "
            "mlx-community/Llama-3.2-3B-Instruct-4bit."
        ) from None
    except GatedRepoError:
        raise kind(
            f"{name} is gated: accept its terms on its page, then run hf auth login."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise kind(
            f"{name} was not found: not a local folder, and no such repository "
            "(or it is private: hf auth login)."
        ) from None
    except HfHubHTTPError as e:
        raise refused(e) from None
    except Exception as e:
        if is_lost_peer(e):
            raise
        if isinstance(e.__cause__, HfHubHTTPError):  # told as if nothing were cached
            raise refused(e.__cause__) from None
        if isinstance(e, offline) or _below_the_hub(e):
            hint = "" if done != "loaded" else NOT_CACHED
            raise kind(f"{name}: the hub cannot be reached{hint}.") from None
        reason = brief(e) if e.__cause__ is None else f"{brief(e)} {brief(e.__cause__)}"
        raise kind(f"{name} cannot be {done}: {reason}") from e


def _below_the_hub(e: Exception) -> bool:
    """Whether the network failed below huggingface_hub."""
    return type(e).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")
