"""The method in float64 NumPy, written from its equations.

Nothing here is fast, and nothing here imports the package under test. Layouts: tokens
are rows, ``gate`` and ``up`` are (f, d), ``down`` is (d, f), a mask's 0 hides a token.
"""

import math
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import numpy as np

Array = np.ndarray
Activation = Callable[[Array], Array]


def float64(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def float32(x: Array) -> mx.array:
    return mx.array(x.astype(np.float32))


def distance(found: mx.array, wanted: Array) -> float:
    """Of whole outputs, relative to the norm of what is wanted."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(float64(found) - wanted) / np.linalg.norm(wanted))


def weight(linear: Any) -> Array:
    """A projection's weight (out, in), quantisation and LoRA multiplied out."""
    if hasattr(linear, "lora_a"):
        delta = float64(linear.lora_a) @ float64(linear.lora_b)
        return weight(linear.linear) + linear.scale * delta.T
    if not hasattr(linear, "scales"):
        return float64(linear.weight)
    w = (linear.weight, linear.scales, linear.get("biases"))
    group, bits, mode = linear.group_size, linear.bits, linear.mode
    return float64(mx.dequantize(*w, group_size=group, bits=bits, mode=mode))


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """x times the normal distribution's cumulative distribution function."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def predictor(x: Array, query: Array, w1: Array, w2: Array) -> Array:
    """Eq. 12-13 for one block: pooling by a query's attention, two layers. -> (f,)."""
    pooled = softmax(x @ query / math.sqrt(len(query))) @ x
    return relu(pooled @ w1) @ w2


def token_wise(x: Array, w1: Array, w2: Array, bias: Array) -> Array:
    """Hidden units fire on single tokens; a block is scored by their mean and RMS. -> (f,).

    The 1e-6 under the root, with which predictors are fitted, shows where no token fires.
    """
    hidden = relu(x @ w1)
    rms = np.sqrt((hidden**2).mean(axis=0) + 1e-6)
    return np.concatenate([hidden.mean(axis=0), rms]) @ w2 + bias


def far_from_mean(x: Array, real: Optional[Array] = None) -> Array:
    """Squared distance of each token's FFN input from their mean; padding is nearest. -> (m,)."""
    real = np.ones(len(x)) if real is None else real
    mean = x[real > 0].mean(axis=0)
    return np.where(real > 0, ((x - mean) ** 2).sum(axis=1), -np.inf)


def top_k(scores: Array, k: int) -> list[int]:
    """The k largest of one block's scores, as ascending indices."""
    return sorted(np.argsort(-scores, kind="stable")[:k].tolist())


def activations(
    x: Array, gate: Array, up: Array, act: Activation = silu, *biases: Optional[Array]
) -> Array:
    """Z of every neuron (eq. 15-16). biases: the gate's and up's."""
    g, u = x @ gate.T, x @ up.T
    for y, bias in zip((g, u), biases):
        y += 0 if bias is None else bias
    return act(g) * u


def gated_ffn(
    x: Array,
    gate: Array,
    up: Array,
    down: Array,
    neurons: Optional[Sequence[int]] = None,
    act: Activation = silu,
    *biases: Optional[Array],
) -> Array:
    """Eq. 15-18: the FFN in which only the chosen neurons exist; None chooses all."""
    z = activations(x, gate, up, act, *biases)
    if neurons is not None:
        chosen = np.zeros(z.shape[-1])
        chosen[list(neurons)] = 1
        z = z * chosen
    y = z @ down.T
    return y + biases[2] if biases and biases[2] is not None else y


def compensator(x: Array, w1: Array, w2: Array, act: Activation) -> Array:
    """W_c2 act(W_c1 X) (eq. 20-22), with w1 (d, h) and w2 (h, d)."""
    return np.stack([w2.T @ act(w1.T @ token) for token in x])


def features(x: Array, center: Array, v: Array) -> Array:
    """[1, (x - center) V] per token. (n, d) -> (n, rank + 1)."""
    return np.stack([np.concatenate([[1.0], v.T @ (token - center)]) for token in x])


def with_guesses(z: Array, phi: Array, u: Array, neurons: Sequence[int]) -> Array:
    """Activations in which those of dropped neurons are guessed: z_j = phi . u_j."""
    filled = phi @ u.T
    filled[:, list(neurons)] = z[:, list(neurons)]
    return filled


def griffin(z: Array) -> Array:
    """Norm over tokens of activations normalised per token. (n, f) -> (f,)."""
    unit = np.stack([row / np.linalg.norm(row) for row in z])
    return np.linalg.norm(unit, axis=0)


def weighted(z: Array, down: Array) -> Array:
    """Activation norm over the tokens times the norm of the neuron's down column."""
    return np.linalg.norm(z, axis=0) * column_norms(down)


def column_norms(down: Array) -> Array:
    return np.array([np.linalg.norm(down[:, j]) for j in range(down.shape[1])])


def layerwise(importances: Sequence[float], sparsity: float) -> list[float]:
    """Algorithm 1: b_l = min(1, s_l / S_rest * T_rest), in layer order."""
    budgets: list[float] = []
    for i, s in enumerate(importances):
        s_rest = math.fsum(importances[i:])
        t_rest = (1 - sparsity) * len(importances) - math.fsum(budgets)
        budgets.append(min(1.0, s / s_rest * t_rest) if s else 0.0)
    return budgets


def probe(block: Array, real: Array, x: Array, z: Array, down: Array) -> Array:
    """Neuron energies of one block, regressed on the row's dense tokens. -> (f,).

    Every fourth token of the block (n, d), from the second on, estimates each neuron's
    z^2 as an average over the dense tokens' z^2, with weights softmax(32 cos); the
    block's energy is the sum of the estimates. Tokens that are not real do not count.
    """
    energy = np.zeros(z.shape[1])
    for token in (block[t] for t in range(1, len(block), 4) if real[t]):
        sizes = np.linalg.norm(token) * np.linalg.norm(x, axis=1)
        energy += softmax(32 * (x @ token) / sizes) @ z**2
    return np.sqrt(energy) * column_norms(down)
