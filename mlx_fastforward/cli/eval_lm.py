"""eval --longbench and --mmlu: the paper's tables 2 and 3, through lm-eval."""

from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import Progress

from ..errors import ConfigError
from .tables import show


def chosen(
    longbench: bool,
    mmlu: bool,
    limit: Optional[int],
    lengths: Optional[str],
    png: Optional[Path],
    prefill_draft: Optional[str] = None,
) -> Optional[str]:
    """Which of the two is asked for; flags that do not go together are refused."""
    if longbench and mmlu:
        raise ConfigError("give --longbench or --mmlu, not both.")
    name = "longbench" if longbench else "mmlu" if mmlu else None
    if name is None and limit is not None:
        raise ConfigError("--limit goes with --longbench or --mmlu; use --prompts.")
    given = {"--lengths": lengths, "--png": png, "--prefill-draft": prefill_draft}
    for flag, value in given.items():
        if name and value is not None:
            raise ConfigError(f"{flag} does not go with --{name}.")
    return name


def run_benchmark(
    name: str,
    net: Any,
    tokenizer: Any,
    arms: list[Any],
    predictor: Any,
    tasks: Optional[str],
    limit: Optional[int],
    data: Optional[Path],
    console: Console,
) -> dict[str, Any]:
    """Run it, dense first, print its table and return its report."""
    from ..bench.eval import longbench, mmlu
    from ..bench.eval.arms import DENSE
    from ..bench.eval.harness import table

    run: Any = {"longbench": longbench.longbench, "mmlu": mmlu.mmlu}[name]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        report: dict[str, Any] = run(
            net,
            tokenizer,
            [DENSE, *arms],
            predictor=predictor,
            tasks=[t.strip() for t in tasks.split(",")] if tasks else None,
            limit=limit,
            data=data,
            tick=tick,
        )
    show(table(report))
    return report
