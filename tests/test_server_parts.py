"""The server where part of a long prompt is not read, and where tokens skip FFNs."""

from pathlib import Path
from typing import Any, Iterator, Optional

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load
from models import demo_tokenizer
from serving import PATIENCE, Server, until
from test_server_reading import (
    STORY,
    SYSTEM,
    ask,
    assert_same,
    chat,
    emptied,
    settled,
)

from mlx_fastforward.cli.part_read import keep_config, speculative
from mlx_fastforward.cli.serve import parser, patterns
from mlx_fastforward.server.disk import DiskCache
from mlx_fastforward.server.generator import Generator
from mlx_fastforward.server.prompts import PromptCache
from mlx_fastforward.server.provider import Provider
from mlx_fastforward.session import render

KEEPING = keep_config("self", 0.5, 400)
LONG = STORY * 40


def started(folder: Path, sparsity: float, *flags: str) -> Generator:
    args = parser().parse_args(["--model", str(folder), "--no-tune", *flags])
    args.sparsity, args.drop_line = sparsity, patterns(None)
    reader = lambda net, tok: speculative(net, tok, args.prefill_draft, KEEPING)
    made = Generator(Provider(args, make_reader=reader), PromptCache())
    assert made.model_provider.loaded.wait(PATIENCE) and made.is_healthy
    return made


@pytest.fixture(scope="module")
def thread(tiny_folder: Path) -> Iterator[Generator]:
    made = started(tiny_folder, 0.0, "--prefill-draft", "self", "--no-heal")
    yield made
    made.stop_and_join()


@pytest.fixture
def serving(thread: Generator, tmp_path: Path) -> Generator:
    disk = DiskCache(tmp_path, 10**9)
    return emptied(thread, disk, thread.model_provider.identity)


def alone(folder: Path, asked: Any, n: int) -> tuple[Any, int]:
    """The library's answer, and how many tokens it read."""
    model, tokenizer = load(str(folder))
    ids, cache = render(tokenizer, asked.messages), make_prompt_cache(model)
    reader = speculative(model, tokenizer, "self", KEEPING)
    assert reader is not None
    got = list(reader.stream_generate(tokenizer, ids, 0, cache, n))
    best = [float(r.logprobs[r.token]) for r in got]
    return ([r.token for r in got], best), got[0].read_tokens


def test_a_long_prompt_is_read_in_part_and_its_cache_is_nobody_elses(
    tiny_folder: Path, serving: Generator
) -> None:
    asked = chat(LONG)
    wanted, read = alone(tiny_folder, asked, 5)
    for _ in range(2):
        request = chat(LONG)
        assert_same(ask(serving, request, 5), wanted)
        report = request.report
        assert report.read_tokens == read and report.cached_tokens == 0
        assert report.rounded()["read_tokens"] == read
    total = len(render(demo_tokenizer(), asked.messages))
    assert 0.4 * total < read < 0.6 * total
    disk: Any = settled(serving).prompt_cache.disk
    disk.jobs.join()
    assert not len(serving.prompt_cache) and not disk.entries


def test_what_is_always_read(serving: Generator) -> None:
    """Short prompts, requests with tools unless they ask for it, and system prompts."""

    def read(text: str, tools: Any = None, **more: Any) -> Optional[int]:
        request = chat(text, **more)
        request.tools = tools
        ask(serving, request, 2)
        reports.append(request.report)
        return request.report.read_tokens

    reports: list[Any] = []
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assert read(STORY) is None
    assert read("1" + LONG, [tool]) is None and read("2" + LONG, keep=1) is None
    half, forced = read("3" + LONG), read("4" + LONG, [tool], keep=0.5)
    assert half is not None and half == forced
    assert (read("5" + LONG, keep=0.75) or 0) > 1.3 * half
    assert read("6" + LONG, system=SYSTEM) and reports[-1].cached_tokens < 4
    assert read("7" + LONG, system=SYSTEM) and reports[-1].cached_tokens > 80
    fourth = chat("8" + LONG)
    fourth.messages.append({"role": "tool", "content": STORY})
    ask(serving, fourth, 2)
    assert fourth.report.read_tokens is None


def test_a_draft_that_fails(
    serving: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole prompt is read, which is said, and it may be reused."""
    reader: Any = serving.model_provider.reader
    asked, whole = chat(LONG), chat(LONG, keep=1, fresh=True)
    monkeypatch.setattr(reader.scorer, "score", lambda *a: 1 / 0)
    got = ask(serving, asked)
    assert asked.report.read_tokens is None
    assert asked.report.note.startswith("the draft self failed (division by zero")
    assert_same(ask(serving, whole), got)
    assert not whole.report.note and len(settled(serving).prompt_cache) == 1


def test_the_rest_is_read_while_nobody_waits(
    serving: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.cli_args, "heal", True)
    first = chat(LONG, SYSTEM)
    ask(serving, first, 4)
    settled(serving)
    until(lambda: serving.healing.heal is None)
    again, whole = chat(LONG, SYSTEM), chat(LONG, SYSTEM, keep=1, fresh=True)
    got, wanted = ask(serving, again, 4), ask(serving, whole, 4)
    assert first.report.read_tokens and again.report.read_tokens is None
    assert again.report.cached_tokens > 600 and whole.report.cached_tokens == 0
    assert_same(got, wanted)


def test_tokens_that_skip_are_settings_of_a_prefix(tiny_folder: Path) -> None:
    """A request of sparsity 0 is dense, and does not get what was pruned at sparsity 0."""
    made = started(tiny_folder, 0.0, "--prune-tokens", "0.5")
    try:
        reports = []
        for sparsity in (None, 0, None, 0.5):
            request = chat(LONG, sparsity=sparsity, fresh=sparsity == 0.5)
            ask(made, request, 2)
            reports.append(request.report)
        shares = [r.ffn_sparsity for r in reports]
        assert shares[0] > 0.05 and shares[1] == 0 and shares[3] > shares[0]
        assert [r.cached_tokens > 600 for r in reports] == [False, False, True, False]
    finally:
        made.stop_and_join()


def test_over_http(tiny_folder: Path) -> None:
    flags = ("--prefill-draft", "self", "--prefill-threshold", "400", "--keep", "0.4")
    server = Server(tiny_folder, *flags, "--prune-tokens", "0.25")
    try:
        assert (
            "approximate: of prompts from 400 tokens on 40% are read" in server.banner
        )
        assert "25% of the tokens skip FFNs" in server.banner
        usage = server.chat(LONG)["usage"]
        assert 0.3 < usage["read_tokens"] / usage["prompt_tokens"] < 0.5
        assert "read_tokens" not in server.chat("Who?")["usage"]
        said = server.anthropic.messages.create(
            model="claude-x",
            max_tokens=2,
            messages=[{"role": "user", "content": "x" + LONG}],
        )
        assert said.usage.read_tokens < 500  # type: ignore[attr-defined]
    finally:
        server.stop()
