"""mlx-lm's continuous batching, with a plan for each prompt."""

from typing import Any, Callable, Optional

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch

from ..attachment import resumed, switched
from .requests import Reading


class Kept(list):
    """A prompt cache that knows at which sparsity its tokens were read."""

    def __init__(self, cache: list[Any], read_at: float):
        super().__init__(cache)
        self.read_at = read_at


def read_chunk(model: nn.Module, reading: Reading, tokens: int, run: Callable) -> None:
    """Let ``run`` feed a prompt's next tokens to the model, all of its dense part or none."""
    dense = reading.dense_left() > 0
    if reading.engine is None or dense:
        with switched(model, False):
            run()
    else:
        with resumed(model, reading.engine, reading.prompt):
            run()
    reading.was_read(tokens, dense)


class _Row(PromptProcessingBatch):
    """The prompt that is being read; decode steps of others are no part of it."""

    reading: Optional[Reading] = None

    def prompt(self, tokens: list[list[int]]) -> None:
        if not tokens or self.reading is None:
            return super().prompt(tokens)
        (row,) = tokens
        run = lambda: super(_Row, self).prompt([row])
        read_chunk(self.model, self.reading, len(row), run)


def whose_turn(left: list[int], turn: int) -> int:
    """Which prompt is read next, given the tokens that each has left, oldest first.

    The one with the fewest, so that a short one need not wait for a book; every fourth time the
    oldest, so that the book is read at all.
    """
    return 0 if turn % 4 == 3 else min(range(len(left)), key=lambda i: left[i])


class Batches(BatchGenerator):
    """Reads a chunk of one prompt at a time, and lets all others decode in between.

    A plan is a prompt's own: rows of different lengths padded to one shape would have to share it.
    mlx-lm's prompt batch is therefore one row; ``_parked`` are the rows whose turn it is not.
    """

    def __init__(
        self, next_reading: Callable[[], Reading], model: nn.Module, **settings: Any
    ):
        self._most_rows = settings["prefill_batch_size"]
        super().__init__(model, **{**settings, "prefill_batch_size": 1})
        self._turn = 0
        self._parked: list[tuple[_Row, list]] = []  # and what is left of it
        self._next_reading = next_reading
        self._readings: dict[int, Reading] = {}
        self._prompt_batch = self._empty_row()

    def _empty_row(self) -> _Row:
        return _Row.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )

    def insert_segments(self, segments: list, *args: Any, **kwargs: Any) -> list[int]:
        (uid,) = super().insert_segments(segments, *args, **kwargs)
        self._readings[uid] = reading = self._next_reading()
        reading.last_token()
        return [uid]

    def _make_batch(self, n: int) -> PromptProcessingBatch:
        made = super()._make_batch(n)
        self._prompt_batch.reading = self._readings[made.uids[0]]
        return made

    def _take_turns(self) -> None:
        """Begin what is new, and go on with one row."""
        rows = self._parked
        if len(self._prompt_batch):
            rows.append((self._prompt_batch, self._currently_processing))
        while self._unprocessed_sequences and len(rows) < self._most_rows:
            self._prompt_batch, self._currently_processing = self._empty_row(), []
            self._prompt_batch.extend(self._make_batch(1))
            rows.append((self._prompt_batch, self._currently_processing))
        self._prompt_batch, self._currently_processing = self._empty_row(), []
        if rows:
            rows.sort(key=lambda row: row[0].uids[0])
            left = [total - done for _, ((_, done, total),) in rows]
            chosen = rows.pop(whose_turn(left, self._turn))
            self._prompt_batch, self._currently_processing = chosen
            self._turn += 1

    def _next(self) -> tuple[list, list]:
        if len(self._generation_batch) < self.completion_batch_size:
            self._take_turns()
        prompts, answers = super()._next()
        for r in answers:
            if r.finish_reason is not None:
                done = self._readings.pop(r.uid)
                r.prompt_cache = Kept(r.prompt_cache, done.read_at)
        return prompts, answers

    def extract_cache(self, uids: Any) -> dict[int, tuple[Kept, list[int]]]:
        found = super().extract_cache(uids)
        return {
            uid: (Kept(cache, self._readings[uid].read_at), tokens)
            for uid, (cache, tokens) in found.items()
        }

    @property
    def prompt_cache_nbytes(self) -> int:
        parked = [c.nbytes for row, _ in self._parked for c in row.prompt_cache]
        return super().prompt_cache_nbytes + sum(parked)

    def remove(self, uids: Any, *args: Any, **kwargs: Any) -> dict:
        caches = super().remove(uids, *args, **kwargs)
        self._parked = [row for row in self._parked if row[0].uids[0] not in uids]
        for uid in uids:
            self._readings.pop(uid, None)
        return caches
