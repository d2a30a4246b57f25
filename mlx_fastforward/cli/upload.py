"""mlx_fastforward upload: a predictor file goes to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from ..files import expanded
from .errors import interruptible, one_line_errors


def upload(
    path: Annotated[Path, typer.Option(help="Folder of the predictor file.")],
    upload_repo: Annotated[
        str, typer.Option(help="Hugging Face repository, made if it is not there.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload a predictor file with a model card; needs hf auth login.

    Examples:

      mlx_fastforward upload --path predictor --upload-repo user/Llama-3.2-3B-fastforward
    """
    with one_line_errors(), interruptible():
        from ..predictors.upload import upload

        print(upload(expanded(path), upload_repo, private))
