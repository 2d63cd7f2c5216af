"""How the entries of a matrix are ranked for its mask: every score is one entry of a table, and one name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from rosa_ds.utils.suggest import did_you_mean

if TYPE_CHECKING:  # settings know the scores' names without waiting for torch
    from torch import Tensor

_TINY = 2.0**-60
"""A weight of zero is not divided by. Far below float16's smallest, 2^-24, and gradients of up to 2^67 stay finite."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a score needs, and how it follows; entries with the largest are trained.

    ``means``: for ``--help``.
    ``gradient``: what is summed over the collect phase's steps, gradients ``plain`` or ``squared``, if any. The number of
    steps scales all entries alike, so it is left out.
    ``weight``: whether it reads the weight.
    ``of``: from that sum and the weight, both of the matrix's shape; ``None``: entries are drawn at random. Without
    ``gradient`` the sum is the weight again.
    """

    means: str
    of: Callable[[Tensor, Tensor], Tensor] | None
    gradient: Literal["plain", "squared"] | None = None
    weight: bool = False


RANKINGS = {
    # the diagonal empirical Fisher of RoSA, arXiv 2401.04679
    "mean_squared": Ranking("mean of the squared gradient", lambda total, weight: total, gradient="squared"),
    "mean": Ranking("|mean gradient|", lambda total, weight: total.abs(), gradient="plain"),
    # GaLLoP's
    "gradient_over_magnitude": Ranking(
        "|mean gradient| / |weight|",
        lambda total, weight: total.abs() / weight.abs().to(total.dtype).clamp_min(_TINY),
        gradient="plain",
        weight=True,
    ),
    "magnitude": Ranking("|weight|", lambda _, weight: weight.float().abs(), weight=True),
    "random": Ranking("drawn at random", None),
}


if TYPE_CHECKING:
    Score = str
else:
    Score = Literal[tuple(RANKINGS)]


def ranking_of(score: str) -> Ranking:
    """Raises: ValueError for a score that is not known."""
    if score not in RANKINGS:
        raise ValueError(f"there is no score {score!r}.{did_you_mean(score, RANKINGS)} Known: {', '.join(RANKINGS)}")
    return RANKINGS[score]
