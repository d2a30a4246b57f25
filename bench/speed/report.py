"""Many results of `bench --save` as one page: tables, and pictures in the HTML."""

import html
from typing import Sequence

from .report_picture import svg
from .result import Result, cells

SAME = ("speed-up", "ideal", "of the ideal", "FFN", "GB", "stock GB", "KL", "facts")
HEAD = {"context": "context", "arm": "arm", "TTFT": "TTFT", "stock": "stock TTFT"}
HEAD |= {name: name for name in SAME}  # headings, and the names of cells()
NOTES = (
    "Medians of interleaved runs in one process; the range is in brackets. Stock is unmodified "
    "mlx-lm. Ideal: what the skipped FLOPs allow. Of the ideal: the share of the time that the "
    "ideal would save which was really saved; above 100 %, something else was faster too. FFN: "
    "the FFNs' share of stock's time. KL (nats) and facts (sparse of dense) are what eval --save "
    "measured of an arm for this predictor file."
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .5em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:nth-child(2), td:nth-child(2) { text-align: left; white-space: normal }
div { overflow-x: auto; font-size: 13px }
svg { max-width: 100%; height: auto }
p.about { color: #555 }
"""


def markdown(results: Sequence[Result]) -> str:
    """The tables, for a README or an issue."""
    parts = ["# Time to first token, sparse prefill against stock mlx-lm", NOTES]
    for result in results:
        lines = [[*HEAD], ["---"] * len(HEAD), *_cells(result)]
        table = "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)
        parts += [f"## {_plain(_title(result))}", _plain(_about(result)), table]
    return "\n\n".join(parts) + "\n"


def page(results: Sequence[Result]) -> str:
    """One HTML file that needs no other."""
    title = "Time to first token, sparse prefill against stock mlx-lm"
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(NOTES)}</p>", svg(results)]
    for result in results:
        rows = "\n".join(_row("td", line) for line in _cells(result))
        parts += [
            f"<h2>{html.escape(_title(result))}</h2>",
            f'<p class="about">{html.escape(_about(result))}</p>',
            f"<div><table>\n{_row('th', [*HEAD])}\n{rows}\n</table></div>",
        ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _row(tag: str, line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in line) + "</tr>"


def _plain(text: str) -> str:
    """Text from files may not end a cell, or be markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _title(result: Result) -> str:
    return f"{result.chip}: {result.weights}"


def _about(result: Result) -> str:
    m, v = result.machine, result.versions
    heat = f"{m['thermal_before']} before, {m['thermal_after']} after"
    tuned = "tuned" if result.run["tuned"] else "not tuned"
    if (processes := result.run.get("processes", 1)) > 1:
        how = " by layers" if result.run.get("pipeline") else ""
        tuned += f", {processes} processes{how}"
    return (
        f"{m['memory_gb']:g} GB, {m['cores']} cores, {m['os']}, {m['backend']}, BLAS "
        f"{m['blas']}, power {m['power']}, thermal state {heat}; mlx {v['mlx']}, mlx-lm "
        f"{v['mlx_lm']}, mlx-fastforward {v['mlx_fastforward']}; {result.run['trials']} trials, "
        f"{tuned}; {result.created[:10]}, {result.source}"
    )


def _cells(result: Result) -> list[list[str]]:
    found = [cells(row, result.quality_of(row)) for row in result.rows]
    return [[row[name] for name in HEAD.values()] for row in found]
