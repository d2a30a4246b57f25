"""mlx_fastforward upload: an adapter goes to the Hugging Face hub."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Iterator

import typer

from ..config import FastForwardError, expanded
from .common import fail, interruptible, is_connection_error, one_line_errors


def upload(
    path: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    upload_repo: Annotated[
        str, typer.Option(help="Hugging Face repository, made if it is not there.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload an adapter with a model card; needs hf auth login.

    Examples:

      mlx_fastforward upload --path adapter --upload-repo user/Llama-3.2-3B-fastforward
    """
    with one_line_errors(), interruptible():
        from .. import publishing

        with _hub_problems(upload_repo):
            print(publishing.upload(expanded(path), upload_repo, private))


@contextlib.contextmanager
def _hub_problems(repo: str) -> Iterator[None]:
    """Tell in one line why the hub did not take it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError:
        fail(f"{repo!r} is no repository name; expected one like user/name.", 2)
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else None
        hint = " Log in with: hf auth login." if status in (401, 403) else ""
        fail(f"{repo}: the hub refused ({str(e).splitlines()[0]}).{hint}")
    except FastForwardError:
        raise
    except (
        ValueError,
        RuntimeError,
    ) as e:  # a card, or a blob, that the hub does not take
        if isinstance(e, RuntimeError):
            print(file=sys.stderr)  # the transfer's bar was left open
        reason = " ".join(f"{e} {e.__cause__ or ''}".split())
        fail(f"{repo}: the hub refused ({reason}).")
    except Exception as e:
        if not is_connection_error(e):
            raise
        fail(f"{repo}: the hub cannot be reached ({str(e) or type(e).__name__}).")
