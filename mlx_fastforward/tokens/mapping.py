"""Scores from one tokenizer's tokens to another's, through the characters that both stand for."""

from typing import Any, Sequence

import numpy as np

from ..errors import ConfigError, UnsupportedModel

Span = tuple[int, int]  # first character, and one past the last


class Translation:
    """A prompt in the draft's tokens, and its scores back in the model's.

    Raises:
        ConfigError: a tokenizer that cannot tell where in a text its tokens are.
    """

    def __init__(self, model: Any, draft: Any):
        self.model, self.draft = (getattr(t, "_tokenizer", t) for t in (model, draft))
        for tokenizer in (self.model, self.draft):
            if not getattr(tokenizer, "is_fast", False):
                raise ConfigError(
                    "a draft of another vocabulary needs fast tokenizers (tokenizer.json) on both "
                    "sides; take a smaller model of the same family, or --prefill-draft self."
                )

    def to_draft(self, ids: Sequence[int]) -> tuple[list[int], list[Span], list[Span]]:
        """The draft's tokens of a prompt, their characters, and those of ``ids``."""
        text = self.model.decode(list(ids), clean_up_tokenization_spaces=False)
        again, spans = _spans(self.model, text)
        if again != list(ids):
            raise UnsupportedModel("the prompt's tokens are not those of its text")
        theirs, their_spans = _spans(self.draft, text)
        return theirs, their_spans, spans


def _spans(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [(a, b) for a, b in found["offset_mapping"]]


def carried(
    scores: np.ndarray, spans: Sequence[Span], wanted: Sequence[Span]
) -> np.ndarray:
    """For each wanted span the highest score of a token that shares a character with it."""
    letters = np.zeros(max([b for _, b in [*spans, *wanted]], default=0) + 1)
    for (start, stop), score in zip(spans, scores):
        part = letters[start:stop]
        np.maximum(part, score, out=part)
    return np.array([letters[a : max(b, a + 1)].max() for a, b in wanted])
