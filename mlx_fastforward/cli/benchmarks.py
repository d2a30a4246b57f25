"""eval --longbench and --mmlu: the paper's tables 2 and 3, through lm-eval."""

from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import Progress

from ..config import ConfigError

NAMES = ("longbench", "mmlu")


def chosen(longbench: bool, mmlu: bool, **others: Any) -> Optional[str]:
    """Which of the two is asked for; ``others`` are flags of eval that do not go with them."""
    name = "longbench" if longbench else "mmlu" if mmlu else None
    if longbench and mmlu:
        raise ConfigError("give --longbench or --mmlu, not both.")
    for flag, value in others.items():
        if name and value is not None:
            raise ConfigError(f"--{flag} does not go with --{name}.")
    return name


def run_benchmark(
    name: str,
    net: Any,
    tokenizer: Any,
    arms: list[Any],
    adapter: Any,
    tasks: Optional[str],
    limit: Optional[int],
    data: Optional[Path],
    console: Console,
) -> dict[str, Any]:
    """Run it, dense first, and return its report."""
    from ..bench import longbench, mmlu

    run = {"longbench": longbench.longbench, "mmlu": mmlu.mmlu}[name]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        report: dict[str, Any] = run(
            net,
            tokenizer,
            [("dense", None), *((arm.label, arm.config) for arm in arms)],
            adapter=adapter,
            tasks=[t.strip() for t in tasks.split(",")] if tasks else None,
            limit=limit,
            data=data,
            tick=tick,
        )
    return report
