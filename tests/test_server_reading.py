"""The server's generation thread: plans, batches, caches, sparsity per request, and its death."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, Optional

import models
import numpy as np
import pytest
from mlx_lm import server
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache
from models import demo_tokenizer, token_ids
from serving import PATIENCE, until

import mlx_fastforward as ff
from mlx_fastforward.attachment import switched
from mlx_fastforward.bench.studies import checkpoints as study
from mlx_fastforward.cli.serve import parser, patterns
from mlx_fastforward.prefill import prefill
from mlx_fastforward.server.batches import Batches, Kept, whose_turn
from mlx_fastforward.server.disk import DiskCache
from mlx_fastforward.server.generator import Generator, ThreadDied
from mlx_fastforward.server.names import renamed
from mlx_fastforward.server.prompts import PromptCache
from mlx_fastforward.server.provider import Provider
from mlx_fastforward.server.requests import Asked, ClientGone, Reading, Report
from mlx_fastforward.session import common_prefix, render

STORY = "Keawe was poor, brave, and active; he could read and write. "
CHUNK = 512  # tokens: prompts of several chunks need not be long
SYSTEM = "Be brief. " * 30
Said = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def thread(tiny_folder: Path) -> Iterator[Generator]:
    flags = ["--no-tune", "--prefill-step-size", str(CHUNK)]
    args = parser().parse_args(["--model", str(tiny_folder), *flags])
    args.sparsity, args.drop_line = 0.5, patterns(None)
    made = Generator(Provider(args), PromptCache())
    assert made.model_provider.loaded.wait(PATIENCE) and made.is_healthy
    yield made
    made.stop_and_join()


@pytest.fixture
def serving(thread: Generator) -> Generator:
    """Nothing is cached."""
    return emptied(thread)


def settings(n: int, seed: Optional[int] = None) -> server.GenerationArguments:
    return server.GenerationArguments(
        model=server.ModelDescription("default_model", "default_model", None),  # type: ignore
        sampling=server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1),
        logits=server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        stop_words=[],
        max_tokens=n,
        num_draft_tokens=3,
        logprobs=True,
        top_logprobs=0,
        seed=seed,
        chat_template_kwargs=None,
    )


def chat(text: str, system: Optional[str] = None, **more: Any) -> Asked:
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Asked("chat", "", messages, None, None, **more)


def ask(generator: Generator, asked: Asked, n: int = 6, **more: Any) -> Said:
    _, responses = generator.generate(asked, settings(n, **more))
    listed = list(responses)
    return [r.token for r in listed], [r.logprob for r in listed]


def settled(generator: Generator) -> Generator:
    """The thread has done what it does after an answer, as keeping it: this request is behind that."""
    with pytest.raises(ValueError, match="empty"):
        ask(generator, Asked("text", "", [], None, None))
    return generator


def emptied(generator: Generator, *disk: Any) -> Generator:
    """One that has nothing in memory; what it is about to keep goes with the rest."""
    settled(generator).prompt_cache = PromptCache(20, *disk)
    return generator


@functools.cache
def loaded(folder: Path, sparsity: float) -> Any:
    return ff.load(str(folder), sparsity, predictor="none")


def alone(folder: Path, asked: Asked, n: int = 6) -> tuple[Said, float, int]:
    """The same from the library: the system prompt densely, then the rest sparsely."""
    sparsity = 0.5 if asked.sparsity is None else asked.sparsity
    model, tokenizer = loaded(folder, sparsity)
    prompt, cache = render(tokenizer, asked.messages), make_prompt_cache(model)
    dense = 0
    if asked.messages[0]["role"] == "system":
        empty = [asked.messages[0], {"role": "user", "content": ""}]
        ids = tokenizer.apply_chat_template(empty, add_generation_prompt=False)
        dense = common_prefix(list(ids), prompt)
        with switched(model, False):
            prefill(model, models.mx.array(prompt[:dense]), cache)
    more: Any = dict(prompt_cache=cache, prefill_step_size=CHUNK)
    got = list(ff.stream_generate(model, tokenizer, prompt[dense:], n, **more))
    best = [float(r.logprobs[r.token]) for r in got]
    return ([r.token for r in got], best), got[0].ffn_sparsity, dense


def assert_same(got: Said, wanted: Said) -> None:
    assert got[0] == wanted[0]
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-3, atol=1e-3)


def test_answers_in_company_equal_answers_alone(
    tiny_folder: Path, serving: Generator
) -> None:
    """Prompts of all lengths, longer than a chunk too, at several sparsities, all at once."""
    asked = [
        chat(f"{i}. " + STORY * n, SYSTEM if i % 2 else None, sparsity=s)
        for i, (n, s) in enumerate(
            [(32, None), (58, 0.3), (3, None), (30, 0), (32, 0.3), (1, 0)]
        )
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: ask(serving, a, 6), asked))
    for request, answer in zip(asked, answers):
        wanted, share, dense = alone(tiny_folder, request)
        assert_same(answer, wanted)
        # the library counts what came after the system prompt, the server all
        assert (request.report.ffn_sparsity != 0) == (share != 0)
        if request.messages[0]["role"] == "user":
            assert request.report.ffn_sparsity == pytest.approx(share)
        # one that was done early leaves the template's first tokens to the others,
        # and its system prompt to those that have the same
        cached = request.report.cached_tokens
        assert (cached < 4 or cached == dense) and request.report.ttft_s > 0
    shares = [a.report.ffn_sparsity for a in asked]
    assert [s != 0 for s in shares] == [1, 1, 0, 0, 1, 0]


def test_a_short_prompt_need_not_wait_for_a_long_one() -> None:
    """Rows take turns, whatever becomes of those whose turn it is not."""
    model = models.tiny("llama")
    said: dict[int, list[int]] = {}
    sizes: dict[str, Any] = dict(
        prefill_batch_size=2, completion_batch_size=4, prefill_step_size=16
    )
    batches = Batches(lambda: Reading(None, 0, 0, Report()), model, **sizes)

    def insert(n: int) -> int:
        return batches.insert_segments([[token_ids(n, seed=n)]], max_tokens=[3])[0]

    def run(calls: int) -> list[int]:
        """Who finished, in order."""
        finished = []
        for _ in range(calls):
            for r in batches.next()[1]:
                said.setdefault(r.uid, []).append(r.token)
                finished += [r.uid] * (r.finish_reason is not None)
        return finished

    long = insert(200)
    assert run(3) == []
    short, third = insert(20), insert(40)
    assert run(40) == [short, third, long]
    for uid, n in ((long, 200), (short, 20), (third, 40)):
        assert said[uid] == models.decode(model, token_ids(n, seed=n), 3)[0]
    gone, short = insert(100), insert(20)
    run(1)
    assert batches.prompt_cache_nbytes > 0
    batches.remove([gone])
    assert run(20) == [short] and batches.prompt_cache_nbytes == 0
    assert [whose_turn([9, 3, 5], turn) for turn in range(5)] == [1, 1, 1, 0, 1]


def test_a_request_that_cannot_be_batched_reads_the_same(
    tiny_folder: Path, serving: Generator
) -> None:
    request = chat("0. " + STORY * 40, SYSTEM)
    assert_same(ask(serving, request, seed=1), alone(tiny_folder, request)[0])
    assert request.report.ffn_sparsity > 0.05


def test_what_was_read_alone_is_kept_for_those_that_read_alike(
    serving: Generator,
) -> None:
    """A dense system prompt from the cache does not make what follows it dense."""
    cached = []
    for text, sparsity, seed in (
        ("Who?", 0, None),
        (STORY * 40, 0.5, 1),
        (STORY * 40, 0, None),
        (STORY * 40 + "x", 0.5, 1),
    ):
        request = chat(text, SYSTEM, sparsity=sparsity)
        ask(serving, request, 2, seed=seed)
        cached.append(request.report.cached_tokens)
    assert cached[0] == 0 < cached[1] == cached[2] < cached[3]


def test_a_prefix_serves_those_that_read_alike(serving: Generator) -> None:
    """A dense one serves everybody; what was read sparsely only its own sparsity."""

    def cached(end: str, sparsity: Optional[float], system: str = SYSTEM) -> int:
        request = chat(STORY * 40 + end, system, sparsity=sparsity)
        ask(serving, request, 2)
        return request.report.cached_tokens

    assert cached("a", 0.5) == 0
    system = cached("b", 0.3)
    assert 30 < system < 200  # read densely, whatever the sparsity
    whole = cached("c", None)
    assert whole > 700
    assert cached("d", 0.3) == whole and cached("e", 0) == system
    assert cached("f", 0) == cached("g", 0.5) == cached("h", 0.7) == whole


@pytest.mark.parametrize("system", [None, "Be brief.", SYSTEM])
def test_an_answer_does_not_hang_on_who_asked_before(
    serving: Generator, system: Optional[str]
) -> None:
    """A few tokens that prompts share by chance, beyond the dense part, are read again."""
    asked = "11111. " + STORY * 40
    first = ask(serving, chat(asked, system, fresh=True))
    for text, sparsity in (
        ("11 " + STORY * 44, 0.5),
        ("111 " + STORY, 0.5),
        (asked[:99], 0),
    ):
        emptied(serving)
        ask(serving, chat(text, system, sparsity=sparsity), 1)
        again = chat(asked, system)
        assert_same(ask(serving, again), first)
        assert (again.report.cached_tokens > 0) == bool(system)


def test_a_tool_result_at_the_end_keeps_the_prefix(serving: Generator) -> None:
    """Where mlx-lm keeps no checkpoint of system prompt and tools."""
    for result in ("first ", "second "):
        asked = chat("Look it up.", SYSTEM)
        asked.messages += [
            {"role": "assistant", "content": "Looking."},
            {"role": "tool", "content": (result + STORY) * 35},
        ]
        ask(serving, asked, 2)
    again = chat(STORY, SYSTEM, sparsity=0)
    ask(serving, again, 2)
    system = again.report.cached_tokens
    assert system > 30 and asked.report.cached_tokens == system
    assert asked.report.ffn_sparsity > 0.05


def test_a_tool_result_is_kept_without_the_thinking_after_it(
    serving: Generator,
) -> None:
    """As a message is; a raw prompt is not cut."""
    tokenizer = study.tokenizer()
    start = tokenizer.encode("<think>", add_special_tokens=False)
    tokenizer._think_start, tokenizer._think_start_tokens = "<think>", tuple(start)
    tokenizer._think_end_tokens = tuple(tokenizer.encode("</think>"))
    asked = chat("Look it up.", SYSTEM)
    asked.messages.append({"role": "assistant", "content": "Looking."})
    asked.messages.append({"role": "tool", "content": STORY})
    prompt, segments, types, *_ = serving._tokenize(tokenizer, asked, settings(1))
    assert types == ["system", "user", "assistant"] and sum(segments, []) == prompt
    assert segments[2] == start and len(segments[0]) > 30
    raw = Asked("text", tokenizer.decode(prompt), [], None, None)
    assert serving._tokenize(tokenizer, raw, settings(1))[2] == ["assistant"]


def test_the_prefix_can_be_read_sparsely_too(
    serving: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "sparse_prefix", True)
    request = chat("Who?", STORY * 40)
    ask(serving, request, 2)
    assert request.report.ffn_sparsity > 0.05


def test_the_same_prompt_again_and_one_that_goes_on_from_an_answer(
    serving: Generator,
) -> None:
    """A prompt that is cached whole, which mlx-lm would choke on."""
    first = ask(serving, chat("Who?"), 4)
    again = chat("Who?")
    assert_same(ask(serving, again, 4), first)
    ids = render(demo_tokenizer(), again.messages) + first[0]
    text = demo_tokenizer().decode(ids)
    longer = Asked("text", text, [], None, None)
    assert len(ask(serving, longer, 4)[0]) == 4
    assert settled(serving).is_healthy  # an empty prompt is refused


def test_what_a_client_left_behind_is_dropped(serving: Generator) -> None:
    """In line or while it is read, and nobody else notices."""
    gone = threading.Event()
    left = [chat(STORY * 150, gone=gone.is_set), chat(STORY, gone=lambda: True)]
    for asked in left:
        with pytest.raises(ClientGone):
            _, responses = serving.generate(asked, settings(5), lambda *_: gone.set())
            list(responses)
    assert len(ask(serving, chat("Who?"), 3)[0]) == 3
    assert (
        len(settled(serving).prompt_cache) == 1
    )  # nobody else's prompt was read to its end
    assert not any(asked.report.ttft_s for asked in left)


def test_a_client_that_leaves_before_its_answer_can_be_stopped(
    serving: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look at it and before there is an answer to stop: it is stopped all the same."""
    gone, make = threading.Event(), serving._make_state_machine
    asked = chat(STORY, gone=gone.is_set)

    def left(*args: Any) -> Any:
        gone.set()
        assert asked.left.wait(PATIENCE)
        return make(*args)

    with monkeypatch.context() as patch, pytest.raises(ClientGone):
        patch.setattr(serving, "_make_state_machine", left)
        serving.generate(asked, settings(5))
    assert settled(serving) and asked.context._should_stop


def test_a_dead_thread_fails_its_requests_and_is_replaced(
    serving: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, seen, provider = (
        pytest.MonkeyPatch(),
        threading.Event(),
        serving.model_provider,
    )

    def boom(*args: Any) -> None:
        once.undo()
        raise RuntimeError("boom")

    deaths, reset = serving.deaths, provider.reset
    once.setattr(serving, "_make_state_machine", boom)
    monkeypatch.setattr(provider, "reset", lambda: seen.wait(PATIENCE) and reset())
    with pytest.raises(ThreadDied):
        ask(serving, chat("Who?"))
    assert not serving.is_healthy
    seen.set()
    until(lambda: serving.is_healthy)
    assert serving.deaths == deaths + 1
    assert len(ask(serving, chat("Who?"), 3)[0]) == 3


def test_a_model_that_is_not_there_leaves_the_loaded_one(
    serving: Generator, tmp_path: Path
) -> None:
    before = serving.model_provider.model
    for name, adapter in (("no/such/model", None), ("default_model", str(tmp_path))):
        with pytest.raises(ff.errors.LoadProblem):
            serving.model_provider.check(name, adapter)
    assert serving.model_provider.model is before


def test_names_that_mlx_lm_no_longer_uses_are_noticed() -> None:
    with pytest.raises(NameError, match="no longer uses Batches"):
        renamed(server.ResponseGenerator._generate, Batches=None)


# Prefixes on disk


def test_prefixes_survive_a_restart(
    serving: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was forgotten is read from disk, and says the same; damage is noticed."""
    answers, cached = [], []
    for start, sparsity in enumerate([None, None, 0.3, 0, None]):
        if start == 4:  # one bit
            for file in tmp_path.glob("*.safetensors"):
                raw = bytearray(file.read_bytes())
                raw[-5] ^= 1
                file.write_bytes(raw)
        disk = DiskCache(tmp_path, 10**9)
        emptied(serving, disk, serving.model_provider.identity)
        asked = chat(STORY * 40, sparsity=sparsity)
        answers.append(ask(serving, asked, 4))
        cached.append(asked.report.cached_tokens)
        settled(serving)
        disk.jobs.join()
    total = len(render(demo_tokenizer(), asked.messages))
    assert cached == [0, total - 1, 0, 0, 0]
    assert_same(answers[1], answers[0])
    assert_same(answers[4], answers[0])
    assert "damaged: the checksum is wrong" in caplog.text
    names = [p.suffix for p in tmp_path.iterdir()]
    assert sorted(names) == [".json"] * 2 + [".safetensors"] * 2
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")  # somebody else's
    assert not DiskCache(tmp_path, 1).entries
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_cached_prefix_is_read_once(serving: Generator) -> None:
    """Also where a layer has several caches."""
    tokens = list(range(30))
    caches = [CacheList(KVCache(), KVCache())]
    for part in caches[0].caches:
        part.update_and_fetch(*[models.mx.ones((1, 1, 10, 8))] * 2)
    prompts = PromptCache(20)
    prompts.reading = reading = Reading(None, 0, 30, Report())
    prompts.insert_cache("m", tokens[:10], Kept(caches, 0.0))
    _, left = prompts.fetch_nearest_cache("m", tokens)
    assert left == tokens[10:] and (reading.done, reading.read_at) == (10, 0.0)


def test_the_folder_keeps_to_its_size(tmp_path: Path) -> None:
    """The least recently used go, then what nobody used for a month; a longer one replaces its start."""
    cache = [KVCache()]
    cache[0].update_and_fetch(*[models.mx.ones((1, 1, 400, 64))] * 2)
    disk = DiskCache(tmp_path, 600_000)  # two entries of 0.26 MB

    def save(first: int, more: int = 0) -> None:
        disk.save("m", [first, *range(399 + more)], cache)
        disk.jobs.join()

    def first_tokens() -> set[int]:
        return {int(e.tokens[0]) for e in disk.entries.values()}

    for first in (1, 2):
        save(first)
    (old,) = [e for e in disk.entries.values() if e.tokens[0] == 1]
    assert disk.load(old) is not None  # used again
    save(3)
    assert first_tokens() == {1, 3}
    save(3, 300)
    assert first_tokens() == {1, 3} and disk.nearest(["m"], [3, *range(600)])[1] == 601
    assert disk.nearest(["other"], [3, *range(600)])[1] == 0
    os.utime(old.path, (0, 0))
    again = DiskCache(tmp_path, 10**9)
    assert [int(e.tokens[0]) for e in again.entries.values()] == [3]
