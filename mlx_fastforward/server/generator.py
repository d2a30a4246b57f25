"""mlx-lm's generation thread, which reads each prompt as its request asks."""

import _thread
import copy
import functools
import itertools
import logging
import re
import threading
import time
import types
from dataclasses import replace
from queue import Empty, Queue
from typing import Any, Callable, Iterator, Optional

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import stream_generate

from ..attachment import resumed, switched
from ..session import common_prefix
from ..speculative import Speculative
from .batches import Batches, Kept, read_chunk
from .metrics import Metrics
from .names import renamed
from .parts import Healing, Partial, may_be_partial, read_partly
from .prompts import PromptCache
from .provider import Provider
from .requests import Asked, ClientGone, Reading

POLL = 0.2  # seconds between looks at whether client and thread are still there
TAIL = 11  # tokens in which mlx-lm looks for the beginning of the thinking
PAUSE = 0.5  # seconds between the death of a thread and the next one
DIED = "the generation thread died; try again."
STOP = ("stop",)  # the first process's last word to the others
Segments = tuple[list[int], list[list[int]], list[str], str, Any]


class ThreadDied(RuntimeError):
    """The generation thread ended while a request was in it; the next one finds a new thread."""


class _Whole(server.GenerationContext):
    """An answer that is generated to its end: the other processes do not hear of a client that left."""

    def stop(self) -> None:
        pass


class Generator(server.ResponseGenerator):
    """Serves Asked requests; a thread that dies fails what it had in hand and is replaced.

    Under mlx.launch the first process hands every request to the others, which do all that it does;
    there a thread that dies ends its process: ``failure`` says why.

    Args:
        sparse_prefix: Also read sparsely what every turn begins with: system prompt and tools.
    """

    model_provider: Provider
    prompt_cache: PromptCache

    def __init__(
        self, provider: Provider, prompt_cache: PromptCache, sparse_prefix: bool = False
    ):
        self.sparse_prefix = sparse_prefix
        self.deaths = 0
        self.metrics = Metrics(lambda: self.requests.qsize(), lambda: self.deaths)
        self.volatile = [re.compile(p) for p in provider.cli_args.drop_line]
        self._counting = threading.Lock()
        self._asked: Optional[Asked] = None  # the generation thread's, in hand
        self._reader: Optional[Speculative] = None  # of a prompt that is read in part
        self.healing = Healing()
        self._waiting = threading.local()  # the handlers', one request each
        self.failure: Optional[BaseException] = None
        super().__init__(provider, prompt_cache)

    # The generation thread

    def _generate(self) -> None:
        names: dict[str, Any] = {"GenerationContext": self._context}
        names["BatchGenerator"] = functools.partial(
            Batches, lambda: self.prompt_cache.in_hand()
        )
        renamed(server.ResponseGenerator._generate, **names)(self)

    def _context(self, *args: Any, **kwargs: Any) -> server.GenerationContext:
        """The answer to the request in hand; its client may have left before it could be stopped."""
        context = server.GenerationContext(*args, **kwargs)
        assert self._asked is not None
        self._asked.context = context
        if self._asked.left.is_set():
            context.stop()
        return context

    def _run_generate(self) -> None:
        """In a thread that stays, asleep: what mlx keeps per thread must not be freed at an exit.

        That takes the GIL after the thread has ended for Python; a process that ends meanwhile aborts.
        """
        done = threading.Event()

        def work() -> None:
            try:
                self._work()
            finally:
                done.set()
            threading.Event().wait()

        threading.Thread(target=work, daemon=True).start()
        done.wait()

    def _work(self) -> None:
        try:
            self._generate()
            if self._is_distributed and self._rank == 0:
                self._share_object(STOP)
        except BaseException as e:
            self._generation_failed = True
            if self.model_provider.failure is not None or self._stop:
                return
            if self._is_distributed:
                self.failure = e
                if self._rank == 0:
                    _thread.interrupt_main()  # it serves; in others it waits for this thread
                return
            logging.exception(f"the generation thread died: {e}")
            self._restart()

    def _restart(self) -> None:
        time.sleep(PAUSE)
        self.deaths += 1
        self.model_provider.reset()  # whatever state it was left in
        self.prompt_cache = self.prompt_cache.emptied()
        self.model_provider.loaded.clear()
        self._generation_thread = threading.Thread(target=self._run_generate)
        self._generation_failed = False
        self._generation_thread.start()

    def _share_request(self, request: Any) -> Any:
        if not self._is_distributed:
            return request
        if request is not None and request[1].left.is_set():
            request[0].put(ClientGone("the client went away"))
            request = None
        found = super()._share_request(request)
        if found is not None and found[1:] == STOP:
            self._stop = True
            return None
        return found

    @property
    def is_healthy(self) -> bool:
        """The thread is alive and its model loaded."""
        return self.generation_available() and self.model_provider.loaded.is_set()

    def _tokenize(self, tokenizer: Any, request: Asked, args: Any) -> Segments:
        self._check_client(request)
        prompt, segments, types, state, vision = super()._tokenize(
            tokenizer, request, args
        )
        if not prompt:
            raise ValueError("the prompt is empty.")
        if types == ["assistant"] and request.request_type == "chat" and vision is None:
            segments, types = _before_thinking(tokenizer, prompt)
        dense = len(segments[0]) if types[0] == "system" else 0
        if not dense and vision is None:
            dense = self._prefix(tokenizer, request, args, prompt)
            dense = min(dense, len(segments[0]) - 1)
            if dense:
                segments = [prompt[:dense], segments[0][dense:], *segments[1:]]
                types = ["system", *types]
        engine = self.model_provider.engine(request.sparsity)
        reading = Reading(
            engine,
            0 if self.sparse_prefix else dense,
            len(prompt),
            request.report,
            request.fresh,
            ids=prompt,
            prefix=dense,
        )
        self.prompt_cache.reading, self._asked = reading, request
        return prompt, segments, types, state, vision

    def _check_client(self, request: Asked) -> None:
        """Do no more for a client that left; other processes know nothing of clients."""
        if request.left.is_set() and not self._is_distributed:
            raise ClientGone("the client went away")

    def _prefix(
        self, tokenizer: Any, request: Asked, args: Any, prompt: list[int]
    ) -> int:
        """Tokens of system prompt and tools where mlx-lm does not look for them.

        That is where the last message is a tool's result, or tools come without a system prompt.
        """
        system = list(
            itertools.takewhile(lambda m: m["role"] == "system", request.messages)
        )
        if not (system or request.tools) or not tokenizer.has_chat_template:
            return 0
        probe = replace(request, messages=[*system, {"role": "user", "content": ""}])
        alone = super()._tokenize(tokenizer, probe, args)[0]
        return common_prefix(alone, prompt)

    def _is_batchable(self, args: Any) -> bool:
        return super()._is_batchable(args) and not getattr(args, "in_part", False)

    def _next_request(self, timeout: Optional[float] = None) -> Any:
        """mlx-lm waits a while where nobody is served: time to read the rest of a prompt."""
        idle = timeout is not None and self.healing.heal is not None
        request = super()._next_request(None if idle else timeout)
        if idle and request is None:
            self.healing.step(self.model_provider.model, self.prompt_cache)
        return request

    def _serve_single(self, request: Any, stream: Any) -> None:
        names: dict[str, Any] = {"stream_generate": self._read_alone}
        if self._is_distributed:
            names["GenerationContext"] = _Whole
        renamed(server.ResponseGenerator._serve_single, **names)(self, request, stream)
        reader, partial = self._reader, self.prompt_cache.partial
        self._reader = self.prompt_cache.partial = None
        if partial is not None and reader is not None and self.cli_args.heal:
            key, tokens, cache = partial
            model = self.model_provider.model
            self.healing.begin(Partial(model, key, tokens, cache, reader))

    def _read_alone(
        self,
        model: Any,
        tokenizer: Any,
        prompt: list[int],
        prompt_cache: list[Any],
        prefill_step_size: int,
        prompt_progress_callback: Callable[[int, int], None],
        draft_model: Any = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """stream_generate for what cannot be batched: draft models, seeds, parts, quantised caches."""
        asked, reading = self._asked, self.prompt_cache.in_hand()
        assert asked is not None
        left = reading.total - reading.done

        def progress(done: int, _: int) -> None:
            self._check_client(asked)
            prompt_progress_callback(start + done, left)

        start = 0
        parts = [(model, prompt_cache[: len(model.layers)])]
        if draft_model is not None:
            parts.append((draft_model, prompt_cache[len(model.layers) :]))
        while kwargs.get("input_embeddings") is None and (n := reading.dense_left()):
            ids = mx.array([prompt[start : start + min(n, prefill_step_size)]])
            read_chunk(model, reading, ids.shape[1], lambda: _feed(parts, ids))
            start += ids.shape[1]
            progress(0, 0)
        engine = reading.engine
        plan = (
            switched(model, False)
            if engine is None
            else resumed(model, engine, reading.prompt)
        )
        kwargs |= {"prefill_step_size": prefill_step_size}
        kwargs |= {"prompt_progress_callback": progress}
        if draft_model is None and (reader := self._reader_for(asked)):
            if start and not reading.read_at:
                self._keep_prefix(reading, prompt_cache)
            self._reader, args = reader, (reader, reading, tokenizer, prompt_cache)
            with plan:
                yield from read_partly(*args, **kwargs)
            return
        kwargs |= {"prompt_cache": prompt_cache, "draft_model": draft_model}
        responses = stream_generate(model, tokenizer, prompt[start:], **kwargs)
        with plan:
            for i, response in enumerate(responses):
                if i == 0:
                    reading.was_read(len(prompt) - start, False)
                yield response

    def _reader_for(self, asked: Asked) -> Optional[Speculative]:
        """The server's, with the share that a request asks for; None where all of it is read."""
        reader = self.model_provider.reader
        if reader is None or not asked.in_part:
            return None
        config = reader.config
        if asked.keep is not None:
            config = replace(config, keep=asked.keep)
        return Speculative(reader.model, reader.scorer, config)

    def _keep_prefix(self, reading: Reading, cache: list[Any]) -> None:
        """What was read of a prompt before gaps begin serves everybody."""
        key, ids = self.model_provider.model_key, list(reading.ids[: reading.done])
        prefix = Kept(copy.deepcopy(cache), 0.0)
        self.prompt_cache.insert_cache(key, ids, prefix, cache_type="system")

    # The handlers' threads

    def generate(  # type: ignore[override]
        self,
        request: Asked,
        generation_args: Any,
        progress_callback: Optional[Callable[[int, int], None]] = None,
    ) -> tuple[Any, Iterator[Any]]:
        start = time.perf_counter()
        reader = self.model_provider.reader
        if reader is not None and may_be_partial(request):
            tokens = self._length(request, generation_args)
            request.in_part = tokens >= reader.config.threshold
            generation_args.in_part = request.in_part
        self._waiting.asked = request
        self._waiting.thread = self._generation_thread
        if not self.generation_available():
            raise ThreadDied(DIED)
        try:
            ctx, responses = super().generate(
                request, generation_args, progress_callback
            )
        except BaseException:
            request.left.set()
            if request.context is not None:
                request.context.stop()
            raise

        def timed() -> Iterator[Any]:
            tokens = 0
            try:
                for tokens, response in enumerate(responses, 1):
                    if not request.report.ttft_s:
                        request.report.ttft_s = time.perf_counter() - start
                    yield response
                self.metrics.answered(request.report, len(ctx.prompt), tokens)
            finally:
                request.left.set()
                ctx.stop()

        return ctx, timed()

    def _await_response(self, response_queue: Queue) -> Any:
        waiting = self._waiting
        while True:
            if waiting.asked.gone():
                raise ClientGone("the client went away")
            try:
                return response_queue.get(timeout=POLL)
            except Empty:
                pass
            if (
                waiting.thread is not self._generation_thread
                or not self.generation_available()
            ):
                raise ThreadDied(DIED)

    def drop_lines(self, body: dict[str, Any]) -> None:
        """Take lines out of system prompts that change every turn: what follows could not be reused."""
        messages = body.get("messages")
        for m in messages if isinstance(messages, list) else []:
            if isinstance(m, dict) and m.get("role") == "system":
                if isinstance(text := m.get("content"), str):
                    m["content"] = self._lasting(text)
                for part in text if isinstance(text, list) else []:
                    if isinstance(part, dict) and isinstance(part.get("text"), str):
                        part["text"] = self._lasting(part["text"])

    def _lasting(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(l for l in lines if not any(p.search(l) for p in self.volatile))

    def count(self, body: dict[str, Any]) -> int:
        """Tokens of a chat's prompt for the loaded model."""
        request = Asked("chat", "", body["messages"], body.get("tools"), None)
        args = types.SimpleNamespace(
            chat_template_kwargs=body.get("chat_template_kwargs")
        )
        return self._length(request, args)

    def _length(self, request: Asked, args: Any) -> int:
        """Tokens of a prompt, in any thread."""
        with self._counting:
            tokenizer = self.model_provider.own_tokenizer()
            return len(super()._tokenize(tokenizer, request, args)[0])


def _before_thinking(tokenizer: Any, prompt: list[int]) -> tuple[list, list[str]]:
    """A prompt that is cut where the template opens the thinking: later turns agree up to there.

    As mlx-lm does where the last message is a user's; here it is a tool's result.
    """
    start = -1
    if tokenizer.has_thinking:
        start = tokenizer.rfind_think_start(prompt, start=len(prompt) - TAIL)
    if start <= 0:
        return [prompt], ["assistant"]
    return [prompt[:start], prompt[start:]], ["user", "assistant"]


def _feed(parts: list[tuple[Any, list[Any]]], ids: mx.array) -> None:
    for model, cache in parts:
        model(ids, cache=cache)
        mx.eval([c.state for c in cache])
