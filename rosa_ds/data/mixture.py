"""Several sources become one set of examples, of which an epoch takes so many of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

import datasets
import numpy as np

from rosa_ds.config.schema import MixedSource
from rosa_ds.data.prepare import TokenSet

Set = TypeVar("Set", bound=TokenSet)


def mix(sets: Sequence[Set], sources: Sequence[MixedSource]) -> Set:
    """The examples of all ``sets``, each of a source, one set after the other.

    An epoch takes as many of each as :func:`examples_an_epoch` says; those of a source that is not taken whole come in
    later epochs, before any comes again.

    Raises: ValueError for a weight so small that an epoch has no example of its source.
    """
    if len(sets) == 1 and sources[0].examples is None:
        return sets[0]
    taken = examples_an_epoch([len(tokens) for tokens in sets], sources)
    before = itertools.accumulate((len(tokens) for tokens in sets), initial=0)
    sequences = itertools.accumulate((len(tokens.lengths) for tokens in sets), initial=0)
    parts = (
        dataclasses.replace(tokens.parts[0], first=first, taken=count)
        for tokens, first, count in zip(sets, before, taken, strict=False)  # the last of ``before`` is the sum
    )
    return dataclasses.replace(
        sets[0],
        data=datasets.concatenate_datasets([tokens.data for tokens in sets]),
        lengths=np.concatenate([tokens.lengths for tokens in sets]),
        trained=np.concatenate([tokens.trained for tokens in sets]),
        firsts=np.concatenate(
            [[0], *(tokens.firsts[1:] + start for tokens, start in zip(sets, sequences, strict=False))]
        ),
        dropped="; ".join(f"{tokens.parts[0].name}: {tokens.dropped}" for tokens in sets if tokens.dropped),
        parts=tuple(parts),
    )


def examples_an_epoch(counts: Sequence[int], sources: Sequence[MixedSource]) -> list[int]:
    """How many examples of each source an epoch has.

    ``examples`` where that is given, else all. With weights an epoch has as many examples as all sources together, divided by
    the weights; what remains of the rounding goes to the largest fractions.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return [source.examples or count for source, count in zip(sources, counts, strict=True)]
    total = sum(counts)
    exact = [total * weight / sum(weights) for weight in weights]
    taken = [int(share) for share in exact]
    by_fraction = sorted(range(len(exact)), key=lambda number: taken[number] - exact[number])
    for number in by_fraction[: total - sum(taken)]:
        taken[number] += 1
    if 0 in taken:
        raise ValueError(
            f"data.train: the weight of {sources[taken.index(0)].source} gives it none of the {total} examples of an epoch: raise "
            "it, or say examples"
        )
    return taken
