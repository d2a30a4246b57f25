"""Prompts that are read in part, by a scorer's word, and the rest of them while nobody waits."""

import logging
from dataclasses import dataclass
from typing import Any, Iterator, Optional

import mlx.nn as nn
from mlx_lm.server import _image_parts

from ..errors import brief
from ..heal import Heal
from ..model.positions import is_whole
from ..speculative import Speculative
from .batches import Kept
from .prompts import PromptCache
from .requests import Asked, Reading


def may_be_partial(asked: Asked) -> bool:
    """Whether gaps may be left in a prompt: with tools only where the request asks for it."""
    tools = asked.tools or any(
        m["role"] == "tool" or m.get("tool_calls") for m in asked.messages
    )
    keep = asked.keep or (1 if tools else None)
    return keep != 1 and not any(_image_parts(asked.messages))


def read_partly(
    reader: Speculative, reading: Reading, tokenizer: Any, cache: list[Any], **more: Any
) -> Iterator[Any]:
    """Stream the answer to a prompt whose first ``reading.done`` tokens are in the cache.

    ``more`` is for Speculative.stream_generate. What became of the prompt goes into the report.
    """
    before = reading.done - reading.report.cached_tokens  # read for this request, too
    reader.exact = 0 if reading.read_at else reading.done
    responses = reader.stream_generate(
        tokenizer, reading.ids, reading.done, cache, protect=reading.prefix, **more
    )
    for i, r in enumerate(responses):
        if i == 0:
            reading.report.ffn_sparsity = r.ffn_sparsity
            if r.read_tokens is not None:
                reading.report.read_tokens = r.read_tokens + before
            if r.ffn_sparsity:
                reading.read_at = reading.sparsity
            for note in reader.take_notes():
                logging.warning(note)
                reading.report.note = note
        yield r


@dataclass
class Partial:
    """A text of which a cache holds a part; to Heal, a conversation."""

    model: nn.Module
    key: Any  # of the model in the prompt cache
    cached: list[int]
    cache: list[Any]
    speculative: Speculative


class Healing:
    """Reads the last partial prompt whole, in steps, so that the next turn finds it in the cache."""

    def __init__(self) -> None:
        self.heal: Optional[Heal] = None

    def begin(self, partial: Partial) -> None:
        """What was read for the one before may be this one's beginning."""
        if self.heal is None or self.heal.session.model is not partial.model:
            self.heal = Heal(partial)  # type: ignore[arg-type]
        self.heal.session = partial  # type: ignore[assignment]

    def step(self, model: Any, prompts: PromptCache) -> None:
        """Read a little more, unless ``model``, the loaded one, is another by now."""
        heal = self.heal
        assert heal is not None
        partial: Any = heal.session
        try:
            if partial.model is model and heal.step() and not is_whole(partial.cache):
                return
        except Exception as e:  # the next request matters more
            logging.warning(f"the rest of a prompt could not be read: {brief(e)}")
        self.heal = None
        if is_whole(partial.cache):
            whole = Kept(partial.cache, 0.0)
            prompts.insert_cache(partial.key, partial.cached, whole)
