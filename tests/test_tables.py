"""What the commands print at 80, 100 and 140 columns, and in a pipe: no line too long, no word cut."""

import importlib
import io
from types import SimpleNamespace
from typing import Callable

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_fastforward.bench.eval.frontier import Point
from mlx_fastforward.bench.speed.ttft import Row
from mlx_fastforward.cli import eval_tables, tables, verified_table

# the commands have the names of their files
bench, inspect = (
    importlib.import_module(f"mlx_fastforward.cli.{name}")
    for name in ("bench", "inspect")
)

BENCH = [
    Row(
        4096,
        0.5,
        0.0,
        1024,
        "first-block",
        "columns",
        512,
        *(47.71, (46.02, 51.33), 67.52, (66.1, 70.91)),
        *(1.41, 1.32, 0.55, 1.2, 0.36, 86.0, 5.31, 6.02, 12.4, 12.6),
    )
]
EVAL = [
    SimpleNamespace(
        arm="trained 50% block 1024 low-rank",
        task="conversation",
        scored=34,
        score_dense=0.794,
        score_sparse=0.765,
        score_difference=-0.029,
        score_difference_bounds=(-0.125, 0.062),
        exact_dense=0.794,
        exact_sparse=0.765,
        kl=0.0021,
        kl_bounds=(0.0015, 0.0032),
        top1=0.987,
        top1_bounds=(0.981, 0.993),
        ffn_sparsity=0.362,
    )
]
WORST = SimpleNamespace(
    arm="a",
    task="key-value",
    name="What is the secret code of the gardener's youngest niece Mabel?",
    depth=0.5,
    tokens=1900,
    kl=0.912,
    expected="7306",
    dense="7306",
    sparse="7360 and a long tail of other words",
)
SAME = SimpleNamespace(**{**vars(WORST), "kl": 0.0004})
OVERLAP = SimpleNamespace(neighbours=0.712)
LAYER = SimpleNamespace(
    layer=27,
    importance=0.412,
    kept=4096,
    neurons=8192,
    by_importance=4096,
    recall=0.871,
    error=0.151,
    error_compensated=0.112,
    stream_error=0.021,
    selector=OVERLAP,
    oracle=OVERLAP,
)
POINTS = [
    Point(
        *("trained + low-rank 50% keep 70% by Qwen3-0.6B-4bit", 0.5, 0.0, 0.7, "Q"),
        *(2.34, 0.0123, (0.0101, 0.0156), 0.75, None, 0.8),
    )
]
VERIFIED = {
    "rows": [
        {
            "sparsity": 0.5,
            "kl": 0.0021,
            "kl_bounds": [0.0015, 0.0032],
            "facts": 0.765,
            "facts_dense": 0.794,
            "facts_difference_bounds": [-0.13, 0.06],
            "speedup": 1.27,
        }
    ],
    "documents": 8,
    "prompt_tokens": 1900,
    "questions": 34,
}
SHOWN: dict[str, Callable[[], Table]] = {
    "bench": lambda: bench._table(BENCH),
    "scores": lambda: eval_tables._scores(EVAL),
    "kl": lambda: eval_tables._kl(EVAL),
    "frontier": lambda: eval_tables.frontier(POINTS),
    "worst": lambda: eval_tables._worst([WORST, SAME]),
    "worst in lines": lambda: eval_tables._worst([WORST], 22, 15),
    "inspect": lambda: inspect._table([LAYER]),
    "verified": lambda: verified_table.table(VERIFIED),
}


def printed(name: str, width: int, terminal: bool) -> tuple[list[str], list[str]]:
    """The lines of a table, and its cells."""
    file, table = io.StringIO(), SHOWN[name]()
    console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None
    )
    tables.show(table, console)
    cells = [str(cell) for column in table.columns for cell in column.cells]
    heads = [str(column.header) for column in table.columns]
    return file.getvalue().splitlines(), [*heads, *filter(None, cells)]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("name", SHOWN)
def test_every_cell_is_whole_on_one_line_of_a_terminal(name: str, width: int) -> None:
    lines, cells = printed(name, width, terminal=True)
    assert max(map(len, lines)) <= width
    for cell in cells:
        assert any(cell in line for line in lines), cell


@pytest.mark.parametrize("name", SHOWN)
def test_plain_text_in_a_pipe(name: str) -> None:
    """A line per row, without boxes, however wide."""
    lines, cells = printed(name, 80, terminal=False)
    for cell in cells:
        assert any(cell in line for line in lines), cell
    text = "\n".join(lines)
    assert not set(text) & set("│┃━─╭┏┡\x1b") and len(lines) <= 3


@pytest.mark.parametrize("width", [80, 140])
def test_long_lines_break_between_words(width: int) -> None:
    words = [f"word{i}" for i in range(60)]
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(
            file=file, width=width, force_terminal=is_terminal, color_system=None
        )
        tables.say(" ".join(words), console)
        lines = file.getvalue().splitlines()
        assert " ".join(lines).split() == words
        assert (max(map(len, lines)) <= width) == is_terminal == (len(lines) > 1)


def test_lines_stay_as_far_in_as_they_begin() -> None:
    """And a path is not cut for the terminal's width."""
    file, path = io.StringIO(), "/a/long-path" * 9
    console = Console(file=file, width=40, force_terminal=True, color_system=None)
    tables.say(f"    see {path} and these words of a long line", console)
    tables.labelled("label", "some words that do not fit beside it", console)
    assert file.getvalue().splitlines() == [
        "    see",
        f"    {path}",
        "    and these words of a long line",
        "label       some words that do not fit",
        "            beside it",
    ]


def test_a_warning_stays_above_a_bar() -> None:
    """Written past the bar it would be overwritten by the bar's next lines."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console=console) as bar:
        bar.add_task("verifying")
        tables.warn("stopped.")
        bar.refresh()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert 0 <= shown.index("mlx_fastforward: stopped.") < shown.rindex("verifying")


def test_what_differs_from_dense_is_shown_at_length_and_nothing_else() -> None:
    lines, cells = printed("worst", 80, True)
    assert WORST.sparse in cells and "0.000" not in cells
    assert eval_tables._worst([SAME]).row_count == 1
