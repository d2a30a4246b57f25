"""A conversation with its KV cache: what was read before is not read again."""

import contextlib
import sys
import time
from dataclasses import replace
from typing import Any, Iterator, Optional, Sequence

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from .attachment import engine_of, switched
from .checkpoints import Checkpoints, can_trim, trimmable
from .engine import EDGE
from .errors import TemplateError
from .generation import Response, stream_generate
from .model.caches import counted, parts
from .prefill import pausing


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def render(
    tokenizer: Any, messages: list[dict[str, str]], template: dict[str, Any] = {}
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn or in the middle of it.

    ``template`` goes to the chat template, e.g. {"enable_thinking": False}.
    """
    return list(_templated(tokenizer, messages, template, tokenize=True))


def rendered_text(
    tokenizer: Any, messages: list[dict[str, str]], template: dict[str, Any] = {}
) -> str:
    """The same before it becomes tokens."""
    return str(_templated(tokenizer, messages, template, tokenize=False))


def system_tokens(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template: dict[str, Any],
    ids: list[int],
) -> int:
    """Tokens of a system prompt in ``ids``, with all that stands before the first message."""
    if messages[0]["role"] != "system":
        return 0
    other = [messages[0], {"role": "user", "content": ""}]
    return common_prefix(ids, render(tokenizer, other, template))


def _templated(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template: dict[str, Any],
    tokenize: bool,
) -> Any:
    if not tokenizer.has_chat_template:
        raise TemplateError(
            "the model's tokenizer has no chat template; use an instruct model, or "
            "mlx_fastforward generate --ignore-chat-template."
        )
    begun = bool(messages) and messages[-1]["role"] == "assistant"
    ending = {"continue_final_message" if begun else "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, **ending, **template
        )
    except Exception as e:  # jinja2 raises whatever the template asks for
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise TemplateError(f"the model's chat template refused: {reason}") from e


def lasting_places(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template: dict[str, Any],
    ids: list[int],
) -> list[int]:
    """How far later prompts will agree with ``ids``, those of ``messages``, whatever is answered.

    The first place is the end of the system prompt, if that is long: a short one costs little to read
    again, and the dense head would end there. The last place is before what the template adds for the
    answer alone, such as the beginning of its thinking.
    """
    text, some = rendered_text(tokenizer, messages, template), {"content": "."}
    n = system_tokens(tokenizer, messages, template, ids)
    found = [n] if n >= EDGE else []
    turns = [{"role": role, **some} for role in ("assistant", "user")]
    later = rendered_text(tokenizer, messages + turns, template)
    tail = text[common_prefix(text, later) :]
    n = max(1, len(tokenizer.encode(tail, add_special_tokens=False)))
    while n < len(ids) and len(tokenizer.decode(ids[-n:])) < len(tail):
        n += 1
    return sorted({*found, len(ids) - n})


class Session:
    """Messages so far, and a prompt cache that holds a prefix of them.

    Each turn renders the whole conversation and reuses the part whose tokens the cache holds, so
    templates that rewrite earlier turns, stopped answers and resets all stay correct.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        system_prompt: Optional[str] = None,
        max_kv_size: Optional[int] = None,
        template: Optional[dict[str, Any]] = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_kv_size = max_kv_size
        self.system_prompt = system_prompt
        self.template = template or {}
        self.speculative: Any = None  # a Speculative, where prompts are read in part
        self.shelf: Any = None  # where prefixes outlive this process
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict[str, str]] = []
        if self.system_prompt is not None:
            self.messages.append({"role": "system", "content": self.system_prompt})
        self.tokens: list[int] = []  # of all up to the end of the last answer
        self.finished = False  # that answer, by the model itself
        self.forget_cache()

    def forget_cache(self) -> None:
        """Keep the conversation, but read it anew at the next turn."""
        self.cache = make_prompt_cache(self.model, self.max_kv_size)
        self.cached: list[int] = []
        self.checkpoints = Checkpoints()
        if self.speculative is not None:
            self.speculative.forget()

    def take_model(self, model: nn.Module, tokenizer: Any) -> None:
        """Another model goes on with the conversation, and reads it anew."""
        self.model, self.tokenizer = model, tokenizer
        self.tokens = []
        self.speculative = None  # its draft was the other model's
        self.forget_cache()

    def set_system(self, text: Optional[str]) -> None:
        """Another system prompt, or none, for the conversation as it is."""
        self.system_prompt = text
        if self.messages and self.messages[0]["role"] == "system":
            self.messages.pop(0)
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    @property
    def cut(self) -> bool:
        """Whether the last answer ended before the model ended it."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return answered and bool(self.tokens) and not self.finished

    @property
    def asked(self) -> bool:
        """Whether there is a message of the user's."""
        return any(m["role"] == "user" for m in self.messages)

    def render(self, text: Optional[str] = None) -> list[int]:
        """Token ids of the conversation, with ``text`` as a new user message."""
        new = [] if text is None else [{"role": "user", "content": text}]
        return render(self.tokenizer, self.messages + new, self.template)

    def answer(
        self, text: str, ids: Optional[list[int]] = None, **kwargs: Any
    ) -> Iterator[Response]:
        """Add a user message and stream the answer; closing the stream keeps what was said.

        ``ids`` are the tokens of the conversation with the message, if they are known.
        """
        ids = self.render(text) if ids is None else ids
        self.messages.append({"role": "user", "content": text})
        yield from self._answer(ids, None, **kwargs)

    def go_on(self, **kwargs: Any) -> Iterator[Response]:
        """Stream more of the last answer, from the token at which it was cut."""
        said = self.messages.pop()["content"]
        yield from self._answer(self.tokens, said, **kwargs)

    def take_back(self) -> str:
        """Remove the last message and its answer from the conversation; returns the message."""
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        return self.messages.pop()["content"]

    def _answer(
        self, ids: list[int], before: Optional[str], **kwargs: Any
    ) -> Iterator[Response]:
        """Stream what follows ``ids``; ``before`` is the answer so far, if they hold one."""
        said, reason, tokens = before or "", None, list(ids)
        start = time.perf_counter()
        cached = self._reuse(ids)
        seconds = time.perf_counter() - start if self.shelf is not None else 0.0
        responses = self._stream(ids, cached, **kwargs)
        try:
            with contextlib.closing(responses):
                whole = before is None and self.speculative is None
                places = self._places(ids, **kwargs) if whole else []
                for r in self._with_checkpoints(responses, places):
                    if r.generation_tokens > len(tokens) - len(ids):
                        tokens.append(r.token)
                    if said == before and r.text:
                        r = replace(r, text=self._joined(ids, tokens, r.text))
                    said += r.text
                    reason = r.finish_reason
                    yield replace(r, ttft=r.ttft + seconds) if seconds else r
        finally:
            self._settle(tokens)
            if said or reason or before is not None:
                self.messages.append({"role": "assistant", "content": said})
                self.tokens, self.finished = tokens, reason == "stop"
                if self.shelf is not None:
                    self.shelf.put(self)
            else:  # stopped while reading: as if never asked
                self.messages.pop()

    def _stream(self, ids: list[int], cached: int, **kwargs: Any) -> Any:
        if self.speculative is None:
            new = ids[cached:]
            return stream_generate(
                self.model, self.tokenizer, new, prompt_cache=self.cache, **kwargs
            )
        protect = 0
        with contextlib.suppress(TemplateError):
            protect = system_tokens(self.tokenizer, self.messages, self.template, ids)
        return self.speculative.stream_generate(
            self.tokenizer, ids, cached, self.cache, protect=protect, **kwargs
        )

    def _joined(self, ids: list[int], tokens: list[int], text: str) -> str:
        """``text`` with the space before it, which mlx-lm leaves out where an answer begins."""
        start, decode = max(0, len(ids) - 8), self.tokenizer.decode
        more = decode(tokens[start:])[len(decode(ids[start:])) :]
        space = more.startswith(" ") and not text.startswith(" ")
        return " " + text if space else text

    def answer_again(self, sparse: bool, **kwargs: Any) -> Iterator[Response]:
        """Answer the last user message from an empty cache, without touching the conversation.

        Dense means stock mlx-lm: the engine steps aside for the whole answer.
        """
        last = max(i for i, m in enumerate(self.messages) if m["role"] == "user")
        ids = render(self.tokenizer, self.messages[: last + 1], self.template)
        with switched(self.model, sparse):
            cache = make_prompt_cache(self.model, self.max_kv_size)
            yield from stream_generate(
                self.model, self.tokenizer, ids, prompt_cache=cache, **kwargs
            )

    def warm_up(self) -> None:
        """Run both paths once on a short prompt, so that a comparison times no first calls."""
        engine = engine_of(self.model)
        ids = [i % 64 for i in range(engine.shortest + 1 if engine else 2)]
        for sparse in (True, False):
            with switched(self.model, sparse):
                for _ in stream_generate(self.model, self.tokenizer, ids, 2):
                    pass

    def _places(self, ids: list[int], max_tokens: float = 256, **_: Any) -> list[int]:
        """Where to keep a checkpoint while ``ids`` are read; none if the cache can be trimmed."""
        answer = max_tokens if max_tokens >= 0 else float("inf")
        if trimmable(self.cache, len(ids) + answer):
            return []
        with contextlib.suppress(TemplateError):
            return lasting_places(self.tokenizer, self.messages, self.template, ids)
        return []

    def _with_checkpoints(
        self, responses: Iterator[Response], places: list[int]
    ) -> Iterator[Response]:
        """The same responses; the prompt is read for the first one."""
        keep = len(self.cached)
        if later := [n - keep for n in places if n > keep]:
            at = lambda n: self.checkpoints.add(keep + n, self.cache)
            with pausing(self.model, later, at):
                first = next(responses)
            yield first
        yield from responses

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache down to what it shares with ``ids``; returns how many tokens stay."""
        keep = min(common_prefix(self.cached, ids), len(ids) - 1)
        if self.shelf is not None and (found := self.shelf.find(self, ids, keep)):
            self.forget_cache()
            self.cached, self.cache = found
            keep = min(common_prefix(self.cached, ids), len(ids) - 1)
        surplus = len(self.cached) - keep
        if surplus and not can_trim(self.cache, keep):
            keep = self.checkpoints.back(self.cache, keep)
        elif surplus:
            self.checkpoints.drop_from(keep + 1)
            trim_prompt_cache(self.cache, surplus)
        if keep == 0:
            self.forget_cache()
        self.cached = self.cached[:keep]
        return keep

    def _settle(self, tokens: list[int]) -> None:
        """Note what the cache holds.

        mlx-lm runs one step ahead of what it yields: a stopped answer leaves a token in the cache
        that nobody has seen, and, stopped inside a forward pass, layers of different lengths.
        """
        counts = counted(self.cache)
        known = min([len(tokens), *counts])
        if can_trim(self.cache, known):
            for part, count in zip(parts(self.cache), counts):
                part.trim(count - known)
        elif max(counts, default=0) > known or self._uncertain(len(counts)):
            known = self.checkpoints.back(self.cache, known)
            if known == 0:
                self.forget_cache()
        self.cached = tokens[:known]

    def _uncertain(self, counting: int) -> bool:
        """Whether states that count nothing, of linear attention, may be ahead of the others."""
        if counting == len([*parts(self.cache)]):
            return False
        stopped = sys.exc_info()[0] not in (None, GeneratorExit)  # in a forward pass
        return stopped or counting == 0
