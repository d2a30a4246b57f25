"""The command line: ``mlx_fastforward`` and ``python -m mlx_fastforward``."""

import os
from typing import Annotated

import typer

from ..version import __version__
from .bench import bench
from .chat import chat
from .convert import convert
from .demo import demo
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .predictors import predictors
from .serve import serve
from .train import train
from .tune import tune
from .upload import upload

app = typer.Typer(
    help="A shorter time to first token with mlx-lm: block-wise FFN-sparse prefill.",
    epilog="Start with: mlx_fastforward demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    # Read when a command imports transformers: it would comment on long prompts otherwise.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


app.command()(chat)
app.command()(generate)
# its flags are mlx_lm.server's: argparse reads them, --help too
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve)
app.command()(demo)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(tune)
app.command()(train)
app.command()(convert)
app.command()(predictors)
app.command()(upload)


def main() -> None:
    app(prog_name="mlx_fastforward")
