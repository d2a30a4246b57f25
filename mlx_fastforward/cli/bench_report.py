"""mlx_fastforward bench report: saved results of many machines as one page."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import options as o
from .errors import fail, one_line_errors
from .outputs import check_files, write


def report(
    files: Annotated[
        list[Path], typer.Argument(help="Files of bench --save.", show_default=False)
    ],
    html: Annotated[
        Optional[Path], o.opt("Write tables and pictures as one HTML file.")
    ] = None,
    markdown: Annotated[Optional[Path], o.opt("Write the tables as Markdown.")] = None,
) -> None:
    """Turn saved results into one page: speed-up by context and chip, and what it costs.

    Without --html or --markdown the Markdown is printed.

    Examples:

      mlx_fastforward bench report results/*.json --html report.html
    """
    with one_line_errors():
        from ..bench.speed import report as pages
        from ..bench.speed.result import read

        check_files(html, None)
        check_files(markdown, None)
        if html is not None and html == markdown:
            fail("--html and --markdown must be two files.", 2)
        results = [read(path) for path in files]
        for path, result in zip(files, results):
            try:
                pages.markdown([result])
            except (KeyError, TypeError, ValueError) as e:
                fail(f"{path} is damaged: {type(e).__name__} {e}.")
        if html is not None:
            text = pages.page(results)
            write(html, lambda half: half.write_text(text, encoding="utf-8"))
        tables = pages.markdown(results)
        if markdown is not None:
            write(markdown, lambda half: half.write_text(tables, encoding="utf-8"))
        elif html is None:
            print(tables, end="")
