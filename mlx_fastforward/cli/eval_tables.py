"""What eval prints: tables, and a verdict per arm."""

from collections import Counter
from typing import Any, Iterator, Optional

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import printable
from .tables import say
from .tables import show as show_table


def announce(
    console: Console, documents: Any, labels: list[str], shortest: int
) -> None:
    """How many prompts of which length, and what reads them."""
    built = Counter(d.length for d in documents if d.task != "qa")
    parts = [f"{n} of {length:,} tokens" for length, n in sorted(built.items())]
    if own := [d.length for d in documents if d.task == "qa"]:
        parts.append(f"{len(own)} of yours of {min(own):,} to {max(own):,} tokens")
    questions = sum(len(d.questions) for d in documents)
    say(
        f"{len(documents)} documents ({', '.join(parts)}) with {questions} questions; each is "
        f"read {len(labels) + 1} times: dense, {', '.join(labels)}.",
        console,
    )
    if short := sum(d.length < shortest for d in documents):
        say(
            f"{short} of them have fewer than {shortest} tokens and are always read densely.",
            console,
        )


def show(environment: dict[str, Any], found: Any, worst: Any, points: Any) -> None:
    """Environment, scores, KL, perplexity, the worst cases, the frontier, and a line per arm."""
    console = Console(highlight=False)
    say(", ".join(f"{k} {v}" for k, v in environment.items()), console)
    answered = scores_and_kl(found, points)
    # one line for each, with little room
    lines = not console.is_terminal or console.width >= 120
    show_table(_worst(worst, *((22, 15) if lines else ())), console)
    for arm in dict.fromkeys(s.arm for s in answered):
        say(verdict([s for s in answered if s.arm == arm][-1]), console)


def scores_and_kl(found: Any, points: Any) -> list[Any]:
    """The tables of arms and tasks; returns the summaries with answers."""
    console = Console(highlight=False)
    answered = [s for s in found if s.score_dense is not None]
    if answered:
        show_table(_scores(answered), console)
    show_table(_kl(found), console)
    if texts := [s for s in found if s.perplexity_dense is not None]:
        rows = [s for s in texts if s.task == "continuation"]
        show_table(_perplexity(rows), console)
    if len(points) > 1:
        show_table(frontier(points), console)
    return answered


def verdict(s: Any) -> str:
    """Did it get worse? One line from an arm's summary."""
    said = f"{s.arm}: score {s.score_sparse:.3f}, dense {s.score_dense:.3f}"
    bounds = s.score_difference_bounds
    if bounds is None:
        return f"{said}. One document says nothing about others: use more --prompts."
    low, high = bounds
    if low == high == 0:
        return f"{said}: every question as before."
    spread = f"{s.score_difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    if high < 0:
        return f"{said}: worse by more than chance ({spread})."
    if low > 0:
        return f"{said}: better by more than chance ({spread})."
    return f"{said}: no difference beyond chance ({spread})."


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold"
    )
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    return table


def _scores(found: Any) -> Table:
    title = "Scores: share of answers that hold the value; quote and qa: token F1; "
    title += "table and code: copied exactly"
    names = ("dense", "sparse", "difference", "95 % interval", "exact")
    table = _table(title, "arm", "task", "questions", *names)
    for arm, s in _named(table, found):
        table.add_row(
            arm,
            s.task,
            str(s.scored),
            f"{s.score_dense:.3f}",
            f"{s.score_sparse:.3f}",
            f"{s.score_difference:+.3f}",
            _bounds(s.score_difference_bounds, "+.3f"),
            f"{s.exact_dense:.3f}, {s.exact_sparse:.3f}",
        )
    return table


def _kl(found: Any) -> Table:
    title = "KL(dense || sparse) in nats per token of what follows the prompt"
    names = ("KL", "95 % interval", "top-1", "95 % interval", "FFN FLOPs skipped")
    table = _table(title, "arm", "task", *names)
    for arm, s in _named(table, found):
        table.add_row(
            arm,
            s.task,
            f"{s.kl:.4f}",
            _bounds(s.kl_bounds, ".4f"),
            f"{s.top1:.3f}",
            _bounds(s.top1_bounds, ".3f"),
            f"{s.ffn_sparsity:.1%}",
        )
    return table


def _named(table: Table, found: Any) -> Iterator[tuple[str, Any]]:
    """Every arm's name once, and a line before the next arm."""
    last = None
    for s in found:
        if last not in (None, s.arm):
            table.add_section()
        yield "" if s.arm == last else s.arm, s
        last = s.arm


def frontier(points: Any) -> Table:
    """Every arm by how fast its FLOPs allow it to be, a mark on those worth having."""
    title = (
        "What each arm costs, scores of dense ones; "
        "*: none is as fast with a lower KL and as many facts"
    )
    names = ("by FLOPs", "KL", "95 % interval", "facts", "quotes", "")
    table = _table(title, "arm", *names)
    for p in points:
        table.add_row(
            p.arm,
            f"{p.speedup:.2f}",
            f"{p.kl:.4f}",
            _bounds(p.kl_bounds, ".4f"),
            _of(p.facts, p.facts_dense),
            _of(p.quotes, p.quotes_dense),
            "*" if p.best else "",
        )
    return table


def _of(value: Optional[float], dense: Optional[float]) -> str:
    """Beside what the dense model reaches."""
    return "-" if value is None else f"{value:.3f} of {dense:.3f}"


def _perplexity(found: Any) -> Table:
    title = "Perplexity of the true tokens after the prompt"
    names = ("dense", "sparse", "sparse - dense", "95 % interval")
    table = _table(title, "arm", *names)
    for s in found:
        table.add_row(
            s.arm,
            f"{s.perplexity_dense:.2f}",
            f"{s.perplexity_sparse:.2f}",
            f"{s.perplexity_difference:+.2f}",
            _bounds(s.perplexity_difference_bounds, "+.2f"),
        )
    return table


def _worst(records: Any, asked: int = 60, said: int = 60) -> Table:
    """Where they are furthest apart; questions and answers are cut to so many letters."""
    title = f"Largest KL under {records[0].arm}"
    answers = ("expected", "dense", "sparse")
    table = _table(title, "task", "question", "depth", "tokens", "KL", *answers)
    for r in [r for r in records if r.kl >= 0.0005] or records[:1]:
        table.add_row(
            r.task,
            _short(_brief(r.name), asked),
            "-" if r.depth is None else f"{r.depth:.0%}",
            f"{r.tokens:,}",
            f"{r.kl:.3f}",
            *(_short(text, said) for text in (r.expected, r.dense, r.sparse)),
        )
    return table


def _brief(question: str) -> str:
    """Without the words that many questions begin with."""
    for words in ("What is the ", "Complete this sentence from the text: "):
        question = question.removeprefix(words)
    return question


def _short(text: str, most: int) -> Text:
    """A few letters of what may hold anything."""
    text = printable(text)
    return Text(text if len(text) <= most else f"{text[: most - 1]}…")


def _bounds(bounds: Optional[tuple[float, float]], form: str) -> str:
    """Drawn from values that do not differ, an interval of no width would promise too much."""
    if bounds is None:
        return "-"
    low, high = bounds
    return "all equal" if low == high else f"{low:{form}} to {high:{form}}"
