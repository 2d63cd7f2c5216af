"""What can be said of a few seeds and many rows: mean, spread, and differences of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from rosa_ds.evaluation.bootstrap import mean_interval

FEWEST_PAIRS = 3
"""Below these a p-value would only show how few they are."""
RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of a figure over seeds; ``sd``: sample standard deviation, ``None`` of one value."""

    count: int
    mean: float
    sd: float | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation (n - 1) of one value or more."""
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


@dataclasses.dataclass(frozen=True)
class PairedSeeds:
    """A variant beside the reference, over the seeds that both have.

    Attributes:
        differences: seed -> variant minus reference.
        t_p: two-sided p-value of the paired t-test; ``None`` for fewer than three pairs, or where all differences are equal.
        sign_p: of the test that turns the sign of each difference (exact for up to 13 pairs); ``None`` for fewer than three, or
            where there is no difference at all.
    """

    differences: dict[int, float]
    summary: Summary
    t_p: float | None
    sign_p: float | None


def compare_seeds(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedSeeds | None:
    """Seed -> figure of a variant and of the reference; ``None`` if they have no seed in common."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    ours, theirs = (np.array([figures[seed] for seed in seeds], float) for figures in (values, reference))
    differences = ours - theirs
    t_p = sign_p = None
    if len(seeds) >= FEWEST_PAIRS and differences.any():
        if np.ptp(differences) > 1e-12 * np.abs(ours).max():  # else rounding alone would be the spread
            t_p = float(stats.ttest_rel(ours, theirs).pvalue)
        permuted = stats.permutation_test(
            (ours, theirs),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        )
        sign_p = float(permuted.pvalue)
    return PairedSeeds(
        dict(zip(seeds, differences.tolist(), strict=True)), summarise(differences.tolist()), t_p, sign_p
    )


@dataclasses.dataclass(frozen=True)
class RowInterval:
    """Mean difference over rows and seeds, and where it lies in 95 % of draws of as many rows."""

    rows: int
    seeds: int
    mean: float
    low: float
    high: float


def compare_rows(values: Mapping[int, Sequence[float]], reference: Mapping[int, Sequence[float]]) -> RowInterval | None:
    """Bootstrap over rows (percentiles): rows are drawn again, each with all of its seeds, of variant and reference.

    So it says how much the difference depends on the rows, not on the seeds.

    Args:
        values, reference: seed -> score of each row, the same rows in the same order.

    Returns: ``None`` if they have no seed in common.
    Raises: ValueError if they have not as many rows.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    if len({len(rows) for seed in seeds for rows in (values[seed], reference[seed])}) > 1:
        raise ValueError("the runs were evaluated on different numbers of rows: evaluate them again on the same data")
    by_seed = np.array([values[seed] for seed in seeds], float) - np.array([reference[seed] for seed in seeds], float)
    differences = by_seed.mean(axis=0)
    mean = float(differences.mean())
    if len(differences) == 1:
        return RowInterval(1, len(seeds), mean, mean, mean)
    low, high = mean_interval(differences.tolist(), RESAMPLES)
    return RowInterval(len(differences), len(seeds), mean, low, high)
