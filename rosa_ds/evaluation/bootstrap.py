"""95 % bootstrap intervals: of a mean, or of whatever is computed from the rows that were drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def mean_interval(
    values: Sequence[float], resamples: int, weights: Sequence[float] | None = None, seed: int = 0
) -> list[float]:
    """95 % percentile bootstrap interval of the (weighted) mean: low and high end.

    Args:
        values: one for each question, (n,).
        weights: of each in the mean; by default all alike.
    """
    given = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(given) if weights is None else np.asarray(weights, dtype=np.float64)
    drawn = resampled_rows(len(given), resamples, seed)
    return percentile_interval([np.average(given[rows], weights=weight[rows]) for rows in drawn])


def resampled_rows(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """As many of ``count`` rows as there are, with repetition, again and again."""
    generator = np.random.default_rng(seed)
    return (generator.integers(0, count, count) for _ in range(resamples))


def percentile_interval(values: Sequence[float]) -> list[float]:
    """Between them lie 95 % of the values."""
    return [float(end) for end in np.percentile(values, [2.5, 97.5])]
