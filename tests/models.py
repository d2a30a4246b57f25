"""Tiny models of every supported architecture, and the sparse forward by hand."""

import copy
import dataclasses
import functools
import importlib
import json
import shutil
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import reference
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from reference import float64

from mlx_fastforward import PrefillConfig, save_predictor
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.predictors.base import BaseModel

HIDDEN, FFN, LAYERS, VOCAB, BLOCK, WINDOW = 32, 128, 4, 96, 8, 24

SIZES: dict[str, Any] = dict(
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
)
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
POSITIONS: dict[str, Any] = dict(max_position_embeddings=512, rope_theta=1e4)
HEADS: dict[str, Any] = dict(head_dim=8, query_pre_attn_scalar=8)
SLIDING: dict[str, Any] = dict(sliding_window=WINDOW, sliding_window_pattern=2)
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias-sliding": dict(mlp_bias=True, layer_types=KINDS, sliding_window=WINDOW),
    "qwen2": {},
    "qwen3": dict(head_dim=8, tie_word_embeddings=False, **POSITIONS),
    "gemma2": HEADS,
    "gemma3": dict(model_type="gemma3_text", **HEADS, **SLIDING),
    "gemma3_text": dict(**HEADS, **SLIDING),
    "phi3": {},
}
NAMES = list(MORE)
WITH_EMBEDDINGS = [n for n in NAMES if n not in ("gemma2", "phi3")]  # as inputs


def _untrained(name: str, vocab: int, **more: Any) -> nn.Module:
    kind = name.partition("-")[0]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    sizes: dict[str, Any] = {**SIZES, **MORE[name], **more}
    if name == "gemma3":
        sizes = {"text_config": sizes}
    return module.Model(
        module.ModelArgs(**{"model_type": kind, "vocab_size": vocab, **sizes})
    )


def tiny(
    name: str, seed: int = 0, vocab: int = VOCAB, wide: int = 0, **more: Any
) -> nn.Module:
    """A random model of one architecture; ``more`` overrides sizes.

    The weights are large enough for the FFNs to matter: with mlx's own initialisation,
    dropping half of the neurons would hardly show.

    wide: Neurons of layer 1 of a llama, where others have FFN.
    """
    model = _untrained(name, vocab, **more)
    if wide:
        args = dataclasses.replace(model.args, intermediate_size=wide)
        model.layers[1].mlp = type(model.layers[1].mlp)(args)
    offset = 0.0 if "gemma" in name else 1.0  # Gemma's norms multiply by 1 + weight
    key = mx.random.key(seed)

    def fill(path: str, w: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        noise = mx.random.normal(w.shape, key=now)
        if path.endswith("norm.weight"):
            return offset + 0.2 * noise
        if w.ndim == 1:
            return 0.5 * noise
        if "embed_tokens" in path:
            return noise
        return (2.0 if "mlp" in path else 1.0) * noise / w.shape[1] ** 0.5

    model.update(tree_map_with_path(fill, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def settings(**more: Any) -> PrefillConfig:
    """Half of the neurons in every layer, blocks of eight tokens."""
    usual = {"sparsity": 0.5, "block_size": BLOCK, "schedule": "uniform"}
    return PrefillConfig(**{**usual, **more})


def token_ids(n: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """A random prompt without the demo tokenizer's special tokens."""
    return np.random.default_rng(seed).integers(16, vocab, n).tolist()


@functools.cache
def demo_tokenizer(ends: bool = False) -> TokenizerWrapper:
    """The bundled tokenizer, 4096 tokens; models with fewer use its first ones.

    Without ``ends`` no token ends an answer, so that tests know how many to expect.
    """
    tokenizer = load_tokenizer(DEMO)
    if not ends:
        tokenizer.eos_token_ids = []
    return tokenizer


def prefill(
    model: nn.Module, ids: Sequence[int], cache: Optional[list] = None
) -> tuple[np.ndarray, list]:
    """All logits (L, vocabulary) of one call, and the cache that it filled."""
    cache = make_prompt_cache(model) if cache is None else cache
    logits = model(mx.array([ids]), cache=cache)
    mx.eval(logits, [c.state for c in cache])
    return np.array(logits[0]), cache


def decode(
    model: nn.Module, prompt: list[int], n: int, cache: Optional[list] = None
) -> tuple[list[int], np.ndarray]:
    """n greedy tokens and their log-probabilities (n, vocabulary), read as by mlx-lm:
    all but the last token of the prompt in one call, and then one token at a time."""
    _, cache = prefill(model, prompt[:-1], cache)
    return continue_from(model, prompt[-1], n, cache)


def continue_from(
    model: nn.Module, token: int, n: int, cache: list
) -> tuple[list[int], np.ndarray]:
    """n greedy tokens and their log-probabilities after ``token``."""
    tokens, logprobs = [token], []
    for _ in range(n):
        logits = prefill(model, tokens[-1:], cache)[0][-1].astype(np.float64)
        logprobs.append(logits - np.logaddexp.reduce(logits))
        tokens.append(int(logits.argmax()))
    return tokens[1:], np.stack(logprobs)


def logprobs(responses: Iterable[Any]) -> np.ndarray:
    """What was streamed, (tokens, vocabulary)."""
    return np.stack([np.array(r.logprobs.astype(mx.float32)) for r in responses])


def cached_arrays(cache: list) -> list[np.ndarray]:
    """Keys and values that a cache holds, layer by layer."""
    return [np.array(a) for c in cache for a in c.keys_and_values()]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to the largest entry."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def assert_close(
    got: tuple[np.ndarray, list], wanted: tuple[np.ndarray, list], most: float = 1e-4
) -> None:
    """Two results of prefill() agree in logits and caches; most 0: to the last bit."""
    pairs = zip(cached_arrays(got[1]), cached_arrays(wanted[1]), strict=True)
    for a, b in [(got[0], wanted[0]), *pairs]:
        assert a.shape == b.shape and distance(a, b) <= most


def idle(model: nn.Module) -> bool:
    """Whether no call and no prompt of an attached model is under way."""
    attached = model.__dict__["_fastforward"]
    return attached.call is None and attached.prompt is None


class OracleMLP(nn.Module):
    """A layer's FFN under the per-block oracle, in float64 and from the equations.

    Everything is computed densely; in each sparse block only the K best neurons count. ``stay``
    tokens of start..stop run, those farthest from their mean; the others get the mean of their outputs.
    """

    def __init__(
        self,
        mlp: nn.Module,
        gelu: bool,
        start: int,
        stop: int,
        keep: Optional[int],
        stay: Optional[int] = None,
    ):
        super().__init__()
        self.act = reference.gelu_tanh if gelu else reference.silu
        names = ["gate_proj", "up_proj", "down_proj"]
        if "gate_up_proj" in mlp:
            names = ["gate_up_proj", "down_proj"]
        w = [float64(mlp[n].weight) for n in names]
        b = [float64(mlp[n].bias) if "bias" in mlp[n] else None for n in names]
        if len(w) == 2:
            w, b = [*np.split(w[0], 2), w[1]], [None, None, b[1]]
        self.weights, self.biases = (tuple(w), tuple(b))
        self.middle = start, stop
        self.keep = keep
        self.stay = stop - start if stay is None else stay

    def __call__(self, x: mx.array) -> mx.array:
        rows = [self._row(row) for row in float64(x)]
        return mx.array(np.stack(rows).astype(np.float32))

    def _row(self, x: np.ndarray) -> np.ndarray:
        start, stop = self.middle
        stay = reference.top_k(reference.far_from_mean(x[start:stop]), self.stay)
        places = [*range(start), *(start + i for i in stay), *range(stop, len(x))]
        run = self._sparse(x[places], range(start, start + self.stay, BLOCK))
        y = np.tile(run[start : start + self.stay].mean(axis=0), (len(x), 1))
        y[places] = run
        return y

    def _sparse(self, x: np.ndarray, blocks: range) -> np.ndarray:
        gate, up, down = self.weights
        gate_bias, up_bias, _ = self.biases

        def run(x: np.ndarray, neurons: Optional[list[int]]) -> np.ndarray:
            return reference.gated_ffn(
                x, gate, up, down, neurons, self.act, *self.biases
            )

        y = run(x, None)
        for i in blocks if self.keep else ():
            block = x[i : i + BLOCK]
            z = reference.activations(block, gate, up, self.act, gate_bias, up_bias)
            scores = reference.weighted(z, down)
            y[i : i + BLOCK] = run(block, reference.top_k(scores, self.keep))
        return y


def by_hand(
    model: nn.Module,
    name: str,
    start: int,
    stop: int,
    keep: int | Sequence[Optional[int]],
    stay: Optional[int] = None,
) -> nn.Module:
    """A copy of a plain model that prefills tokens start..stop sparsely, by itself.

    The last layer stays dense; ``keep`` may be a number per layer, None for a dense one. ``stay``
    of the tokens do not skip the FFN, in all layers but the first.
    """
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.layers[:-1]):
        most = keep if isinstance(keep, int) else keep[i]
        layer.mlp = OracleMLP(
            layer.mlp, "gemma" in name, start, stop, most, stay if i else None
        )
    return model


def save_folder(
    model: nn.Module, path: Path, chat_template: bool = True, **config: Any
) -> Path:
    """A model folder as mlx-lm loads it, with the demo tokenizer."""
    path.mkdir(parents=True)
    args = {**dataclasses.asdict(model.args), "eos_token_id": 1, **config}
    args = {k: v for k, v in args.items() if v is not None}
    (path / "config.json").write_text(json.dumps(args))
    model.save_weights(str(path / "model.safetensors"))
    shutil.copy(DEMO / "tokenizer.json", path)
    tokenizer = json.loads((DEMO / "tokenizer_config.json").read_text())
    if not chat_template:
        del tokenizer["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return path


def save_random_predictor(
    model: nn.Module,
    path: Path,
    rank: int = 4,
    predictor: Optional[str] = None,
    compensator: Optional[str] = None,
) -> Path:
    """Untrained predictors for a model, and maybe a compensator, as a predictor file."""
    base, key, tensors = BaseModel.of(model, "tiny"), mx.random.key(11), {}
    kinds = {"predictor": predictor or "pooled", "compensator": compensator}
    for i, f in enumerate(base.widths):
        d, k = base.hidden_size, rank
        shapes: dict[Optional[str], dict[str, tuple[int, ...]]] = {
            None: {},
            "pooled": {"query": (d,), "w1": (d, k), "w2": (k, f)},
            "token-wise": {"w1": (d, k), "w2": (2 * k, f), "bias": (f,)},
            "mlp": {"w1": (d, k), "w2": (k, d)},
            "low-rank": {"center": (d,), "v": (d, k), "u": (f, k + 1)},
        }
        for part, kind in kinds.items():
            for name, shape in shapes[kind].items():
                key, now = mx.random.split(key)
                tensors[f"layers.{i}.{part}.{name}"] = mx.random.normal(shape, key=now)
    info: dict[str, Any] = {"base_model": dataclasses.asdict(base)}
    info |= {part: {"kind": k, "rank": rank} for part, k in kinds.items() if k}
    save_predictor(path, info, tensors)
    return path
