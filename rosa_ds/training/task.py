"""The examples of a run's task."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.labelled import find_classes, prepare_labelled
from rosa_ds.data.prepare import TokenSet, prepare
from rosa_ds.data.sources import BUILTIN
from rosa_ds.models.load import base_classes, read_config
from rosa_ds.models.task import uses_types

logger = logging.getLogger(__name__)


def sources(settings: RunConfig) -> list[tuple[str, str]]:
    """Data sources, each with what it is for: ``train``, and ``eval`` where there is one."""
    data = settings.data
    evaluation = data.eval or (BUILTIN if data.train.startswith(BUILTIN) else None)
    return [(data.train, "train"), *([(evaluation, "eval")] if evaluation else [])]


def prepare_sets(settings: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[RunConfig, dict[str, TokenSet]]:
    """Tokenised examples by what they are for, and the settings with the classes that the data has.

    Raises: ValueError as :func:`rosa_ds.data.prepare.prepare` and :func:`rosa_ds.data.labelled.prepare_labelled`.
    """
    data = settings.data
    if settings.model.task == "causal-lm":
        return settings, {purpose: prepare(source, purpose, tokenizer, data) for source, purpose in sources(settings)}
    if data.train.startswith(BUILTIN):
        raise ValueError(
            f"data.train {data.train} has no classes: give rows with a text and a label for model.task classification"
        )
    labels = settings.model.labels or find_classes(data.train, data, base_classes(settings.model))
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"labels": labels})})
    types = uses_types(read_config(settings.model))
    return settings, {
        purpose: prepare_labelled(source, purpose, tokenizer, data, labels, types)
        for source, purpose in sources(settings)
    }


def prepare_data(
    settings: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RunConfig, TokenSet, TokenSet | None]:
    """:func:`prepare_sets`, to train and to evaluate on; says how much there is, and shows an example."""
    with distributed.main_first():
        settings, found = prepare_sets(settings, tokenizer)
    for source, purpose in sources(settings):
        logger.info("%s: %s", source, found[purpose].summary())
    logger.info("%s", found["train"].sample(tokenizer))
    return settings, found["train"], found.get("eval")
