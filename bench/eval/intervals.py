"""How far a mean can be trusted: a bootstrap that draws whole documents.

Questions about one document share its prefill, so they are no independent samples; documents are.
"""

from typing import Any, Callable, Optional, Sequence

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 1_000  # resamples held in memory
LEAST_KL = 1e-6  # rounding; a logarithmic axis has no zero

Bounds = Optional[tuple[float, float]]


def interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[str],
    of: Callable[[np.ndarray], np.ndarray] = lambda means: means[:, 0],
) -> Bounds:
    """95 % interval of a mean over questions, or of a function of several means.

    Percentile bootstrap (Efron and Tibshirani 1993), clusters drawn with replacement. A paired
    difference is a mean of differences: pass those.

    Args:
        values: One number per question, (n,), or several, (n, k).
        clusters: The document of every question, (n).
        of: Turns resampled means (resamples, k) into what is reported, (resamples,).

    Returns:
        (low, high), or None where fewer than two documents say nothing about others.
    """
    columns = np.asarray(values, dtype=np.float64).reshape(len(clusters), -1)
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, place, columns)
    sizes = np.bincount(place)
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), AT_ONCE)
        found.append(of((drawn @ sums) / (drawn @ sizes)[:, None]))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def errors(values: Sequence[float], bounds: Sequence[Bounds]) -> Any:
    """For bars: distances below and above; 0 where there is no interval. A log axis needs a rest below."""
    both = [b or (v, v) for v, b in zip(values, bounds)]
    low = [max(0.0, min(v - b[0], 0.999 * v)) for v, b in zip(values, both)]
    return [low, [max(0.0, b[1] - v) for v, b in zip(values, both)]]
