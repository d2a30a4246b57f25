"""lm-eval's view of a model: batch 1, greedy, prompts read sparsely where the model is attached."""

import contextlib
import copy
from collections import defaultdict
from typing import Any, Sequence

import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.models.cache import make_prompt_cache

from ...attachment import engine_of, reading, switched
from ...generation import encode_prompt, stream_generate
from ...model.families import context_length
from ...prefill import prefill
from ...tokens.plan import CHUNK

MAX_TOKENS = 256  # of an answer, where a task has no cap of its own
STEP = 512  # tokens scored at once: their logits take 4 bytes times the vocabulary each


class SparseLM(TemplateLM):
    """One prompt at a time. What follows a prompt is dense, unless ``sparse_decode`` is set.

    ``ffn_sparsity`` is the share of FFN FLOPs that the last prompt's prefill skipped.

    Args:
        model: Attached or not; it may change between calls.
        tokenizer: As returned by ``load``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = context_length(model)
        self.ffn_sparsity = 0.0

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(
        self, string: str, add_special_tokens: Any = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            ids: Any = encode_prompt(self.tokenizer, string).tolist()
            return ids
        return list(
            self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        )

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Answers, each cut at its first stop string. A context is a text or its token ids."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str | list[int], options: dict[str, Any]) -> str:
        limit = options.get("max_gen_toks", MAX_TOKENS)
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        ids = self.tok_encode(context) if isinstance(context, str) else context
        said = ""
        responses = stream_generate(
            self.model, self.tokenizer, self._fit(ids, limit), limit
        )
        with contextlib.closing(responses):
            for r in responses:
                self.ffn_sparsity = r.ffn_sparsity
                # "skip" is ours: what an answer may begin with before a stop string counts
                said = (said + r.text).lstrip(options.get("skip", ""))
                if any(stop in said for stop in until):
                    break
        mx.clear_cache()
        return said[: min((said.find(s) for s in until if s in said), default=None)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests that share their context share its prefill: the choices of one question."""
        shared = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            shared[tuple(context)].append((place, continuation))
        scores: dict[int, tuple[float, bool]] = {}
        for context, asked in shared.items():
            longest = max(len(continuation) for _, continuation in asked)
            logits, cache = self._read(self._fit(list(context), longest))
            for place, continuation in asked:
                scores[place] = self._score(logits, cache, continuation)
            mx.clear_cache()
        return [scores[place] for place in range(len(requests))]

    def _read(self, ids: list[int]) -> tuple[mx.array, Any]:
        """Logits (1, vocabulary) after a whole prompt, and its cache."""
        tokens, cache = mx.array(ids), make_prompt_cache(self.model)
        with reading(self.model, len(ids)) as state:
            prefill(self.model, tokens[:-1], cache)
            logits = self.model(tokens[None, -1:], cache=cache)[0]
        self.ffn_sparsity = state.flops.sparsity
        mx.eval(logits)
        return logits, cache

    def _score(
        self, logits: mx.array, cache: Any, continuation: list[int]
    ) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether greedy decoding would write it."""
        engine = engine_of(self.model)
        sparse = engine is not None and engine.config.sparse_decode
        rows, given = [logits], mx.array(continuation[:-1], dtype=mx.int32)
        step = 1 if sparse else max(1, given.size)
        if given.size:
            cache = copy.deepcopy(cache)
        with switched(self.model, sparse):
            for i in range(0, given.size, step):
                rows.append(self.model(given[None, i : i + step], cache=cache)[0])
        table, targets = mx.concatenate(rows), mx.array(continuation)
        greedy = mx.all(mx.argmax(table, axis=-1) == targets)
        return float(mx.sum(_logprobs(table, targets))), bool(greedy)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, dense: there is no prompt to read."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(
            ids, self.prefix_token_id, self.max_length or CHUNK, context_len=1
        )
        return sum(self._dense(*make_disjoint_window(pair)) for pair in windows)

    def _dense(self, context: list[int], continuation: list[int]) -> float:
        tokens, cache = mx.array(context + continuation), make_prompt_cache(self.model)
        total, last = 0.0, tokens.size - 1
        with switched(self.model, sparse=False):
            prefill(self.model, tokens[: len(context) - 1], cache)
            for start in range(len(context) - 1, last, STEP):
                stop = min(start + STEP, last)
                logits = self.model(tokens[None, start:stop], cache=cache)[0]
                total += float(mx.sum(_logprobs(logits, tokens[start + 1 : stop + 1])))
        return total

    def _fit(self, ids: list[int], more: int) -> list[int]:
        """The end of a prompt that is too long for the model, as lm-eval's own models cut it."""
        if not self.max_length:
            return ids
        return ids[-max(1, self.max_length - more) :]


def _logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probabilities (tokens,) of ``targets`` under logits (tokens, vocabulary)."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(logits, axis=-1)
