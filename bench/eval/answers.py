"""One document's questions, answered by the dense model or under an engine."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ...attachment import engine_of, switched
from ...continuation import follow
from ...prefill import read
from ...session import Session
from .scores import first_line
from .tasks import Document, first_message, render


@dataclass
class Reading:
    """One question's prompt and its answer.

    Args:
        prompt: Tokens of the prompt; ``cache`` holds them but for ``rest``.
        tokens: The answer, its end included.
        skipped: Share of the FFN FLOPs of the document's first prompt.
    """

    prompt: int
    rest: list[int]
    cache: Any
    tokens: list[int]
    text: str
    skipped: float


@dataclass
class Reply:
    """An answer, and log-probabilities (tokens, vocabulary) of ``target`` after the prompt.

    ``logprobs`` says by its key whether they were computed token by token: the two differ by
    rounding, so like is compared with like. ``tokens`` are the prompt's.
    """

    target: list[int]
    logprobs: dict[bool, mx.array]
    tokens: int
    text: str
    skipped: float


def reply(
    model: nn.Module,
    tokenizer: Any,
    document: Document,
    targets: Optional[list[list[int]]],
    steps: set[bool],
    max_tokens: int,
) -> list[Reply]:
    """Answers to all questions of a document, sparsely where the model is attached.

    Args:
        targets: The tokens to score; None is the true ones of a continuation, else the answer.
        steps: Score them token by token, in one call, or both.
    """
    ask = _converse if document.task == "chat" else _ask_each
    replies = []
    for i, reading in enumerate(ask(model, tokenizer, document, max_tokens)):
        target = targets[i] if targets else document.following or reading.tokens
        rest = mx.array(reading.rest)
        logprobs = {}
        for step in steps:
            cache = copy.deepcopy(reading.cache)
            logprobs[step] = follow(model, rest, mx.array(target), cache, step)
        text = reading.text.strip()
        if not tokenizer.has_chat_template:
            text = first_line(text)
        replies.append(Reply(target, logprobs, reading.prompt, text, reading.skipped))
    return replies


def _ask_each(
    model: nn.Module, tokenizer: Any, document: Document, max_tokens: int
) -> Iterator[Reading]:
    """The shared beginning of the prompts is read once; each question goes on from a copy."""
    prompts, cache = document.prompts, make_prompt_cache(model)
    shared, longest = shared_tokens(prompts), max(map(len, prompts))
    sparsity = read(model, mx.array(prompts[0][:shared]), cache, longest)
    engine = engine_of(model)
    skipped = sparsity * shared / longest
    for ids in prompts:
        rest = ids[shared:]
        sparse = engine is not None and engine.config.sparse_decode
        answer = _greedy(
            model, tokenizer, rest, copy.deepcopy(cache), sparse, max_tokens
        )
        yield Reading(len(ids), rest, cache, *answer, skipped)


def _converse(
    model: nn.Module, tokenizer: Any, document: Document, max_tokens: int
) -> Iterator[Reading]:
    """One conversation as ``chat`` has it: earlier answers stay, and the cache is kept."""
    session = Conversation(model, tokenizer)
    skipped = 0.0
    for turn, question in enumerate(document.questions):
        said = question.text
        if turn == 0:
            said = first_message(document.text, question.text)["content"]
        ids = session.render(said)
        before: list[Any] = []

        def keep(done: int, total: int) -> None:
            if done == total - 1:  # all but the last token of the prompt is cached
                before.append(copy.deepcopy(session.cache))

        tokens: list[int] = []
        text = ""
        responses: Any = session.answer(
            said, max_tokens=max_tokens, prompt_progress_callback=keep
        )
        with contextlib.closing(responses):
            for r in responses:
                if r.generation_tokens > len(tokens):
                    tokens.append(r.token)
                text += r.text
                if _ended(tokenizer, text):
                    break
        skipped = r.ffn_sparsity if turn == 0 else skipped
        yield Reading(len(ids), ids[-1:], before[-1], tokens, text, skipped)


class Conversation(Session):
    """A session that also does without a chat template."""

    def render(self, text: Optional[str] = None) -> list[int]:
        new = [] if text is None else [{"role": "user", "content": text}]
        return render(self.tokenizer, self.messages + new)


def shared_tokens(prompts: list[list[int]]) -> int:
    """Length of the common beginning; every prompt keeps at least one token of its own."""
    most = min(map(len, prompts)) - 1
    for i in range(most):
        if any(p[i] != prompts[0][i] for p in prompts):
            return i
    return most


def _greedy(
    model: nn.Module,
    tokenizer: Any,
    rest: list[int],
    cache: Any,
    sparse: bool,
    max_tokens: int,
) -> tuple[list[int], str]:
    """The answer's tokens, its end included, and its text. The rest of the prompt is dense."""
    with switched(model, sparse=False):
        logits = model(mx.array(rest)[None], cache=cache)
    tokens: list[int] = []
    with switched(model, sparse=sparse):
        while True:
            token: Any = mx.argmax(logits[0, -1]).item()
            tokens.append(token)
            done = token in tokenizer.eos_token_ids
            text = tokenizer.decode(tokens[:-1] if done else tokens)
            if done or len(tokens) == max_tokens or _ended(tokenizer, text):
                return tokens, text
            logits = model(mx.array([[token]]), cache=cache)


def _ended(tokenizer: Any, text: str) -> bool:
    """A model without a chat template does not end its answer: the first line is it."""
    return not tokenizer.has_chat_template and "\n" in text.strip(" ").lstrip("\n")
