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
from ...errors import FastForwardError
from ...generation import Response
from ...model.positions import cut_back, make_compact
from ...prefill import read
from ...session import Session
from ...speculative import Speculative
from .scores import first_line
from .tasks import Document, first_message, render


@dataclass
class Reading:
    """One question's prompt and its answer.

    Args:
        prompt: Tokens of the prompt; ``cache`` holds them but for ``rest``.
        tokens: The answer, its end included.
        skipped: Share of the FFN FLOPs of the document's first prompt.
        read: Share of that prompt's tokens that was read.
    """

    prompt: int
    rest: list[int]
    cache: Any
    tokens: list[int]
    text: str
    skipped: float
    read: float = 1.0


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
    read: float


def reply(
    model: nn.Module,
    tokenizer: Any,
    document: Document,
    targets: Optional[list[list[int]]],
    steps: set[bool],
    max_tokens: int,
    reader: Optional[Speculative] = None,
) -> list[Reply]:
    """Answers to all questions of a document, sparsely where the model is attached.

    Args:
        targets: The tokens to score; None is the true ones of a continuation, else the answer.
        steps: Score them token by token, in one call, or both.
        reader: Says which part of each prompt is read; None: all.
    """
    if document.task == "chat":
        readings = _converse(model, tokenizer, document, max_tokens, reader)
    elif reader is None:
        readings = _ask_each(model, tokenizer, document, max_tokens)
    else:
        readings = _ask_in_part(model, tokenizer, document, max_tokens, reader)
    replies = []
    for i, reading in enumerate(readings):
        target = targets[i] if targets else document.following or reading.tokens
        rest = mx.array(reading.rest)
        logprobs = {}
        for step in steps:
            cache = copy.deepcopy(reading.cache)
            logprobs[step] = follow(model, rest, mx.array(target), cache, step)
        text = reading.text.strip()
        if not tokenizer.has_chat_template:
            text = first_line(text)
        figures = reading.prompt, text, reading.skipped, reading.read
        replies.append(Reply(target, logprobs, *figures))
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


def _ask_in_part(
    model: nn.Module,
    tokenizer: Any,
    document: Document,
    max_tokens: int,
    reader: Speculative,
) -> Iterator[Reading]:
    """Every prompt from its beginning: what is read of it depends on the question."""
    first: Optional[tuple[float, float]] = None
    for ids in document.prompts:
        cache = make_prompt_cache(model)
        make_compact(cache)  # one that can be cut back
        responses: Any = reader.stream_generate(tokenizer, ids, 0, cache, 1)
        with contextlib.closing(responses):
            share = _share(reader, next(responses))
        cut_back(cache, len(ids) - 1)
        first = first or share
        rest = ids[-1:]
        answer = _greedy(
            model, tokenizer, rest, copy.deepcopy(cache), False, max_tokens
        )
        yield Reading(len(ids), rest, cache, *answer, *first)


def _share(reader: Speculative, r: Response) -> tuple[float, float]:
    """Shares of FFN FLOPs skipped and of tokens read; raises where a draft failed."""
    for note in reader.take_notes():
        raise FastForwardError(note)
    return r.ffn_sparsity, (r.read_tokens or r.prompt_tokens) / r.prompt_tokens


def _converse(
    model: nn.Module,
    tokenizer: Any,
    document: Document,
    max_tokens: int,
    reader: Optional[Speculative],
) -> Iterator[Reading]:
    """One conversation as ``chat`` has it: earlier answers stay, and the cache is kept.

    What a reader left out stays missing: nothing heals here.
    """
    session = Conversation(model, tokenizer)
    session.speculative = reader
    share = 0.0, 1.0
    for turn, question in enumerate(document.questions):
        said = question.text
        if turn == 0:
            said = first_message(document.text, question.text)["content"]
        ids = session.render(said)
        before: list[Any] = []

        def keep(done: int, total: int) -> None:
            if reader is None and done == total - 1:  # all but the last token is cached
                before.append(copy.deepcopy(session.cache))

        tokens: list[int] = []
        text = ""
        responses: Any = session.answer(
            said, max_tokens=max_tokens, prompt_progress_callback=keep
        )
        with contextlib.closing(responses):
            for r in responses:
                if not before:  # with a reader: nobody tells how far it is
                    before.append(copy.deepcopy(session.cache))
                    cut_back(before[0], len(ids) - 1)
                if r.generation_tokens > len(tokens):
                    tokens.append(r.token)
                text += r.text
                if _ended(tokenizer, text):
                    break
        if turn == 0:
            share = (r.ffn_sparsity, 1.0) if reader is None else _share(reader, r)
        yield Reading(len(ids), ids[-1:], before[0], tokens, text, *share)


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
