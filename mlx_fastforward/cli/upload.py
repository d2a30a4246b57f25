"""mlx_fastforward upload: a predictor file goes to the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

from ..errors import HubError
from ..files import expanded
from . import options as o
from .errors import interruptible, one_line_errors


def upload(
    path: Annotated[Path, o.opt("Folder of the predictor file.")],
    upload_repo: Annotated[
        str, o.opt("Hugging Face repository, made if it is not there.")
    ],
    private: Annotated[
        bool, o.opt("Make a new repository private.", "--private")
    ] = False,
) -> None:
    """Upload a predictor file with a model card; needs hf auth login.

    Examples:

      mlx_fastforward upload --path predictor --upload-repo user/Llama-3.2-3B-fastforward
    """
    with one_line_errors(), interruptible():
        from ..predictors.upload import upload

        try:
            print(upload(expanded(path), upload_repo, private))
        except HubError as e:
            if isinstance(e.__cause__, RuntimeError):
                print(file=sys.stderr)  # the transfer's bar was left open
            raise
