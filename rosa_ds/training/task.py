"""The examples of a run's task."""

from __future__ import annotations

import logging
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.checkpoints.checkpoint import Checkpoint
from rosa_ds.config.schema import MixedSource, RunConfig
from rosa_ds.data.clock import reads_clock
from rosa_ds.data.labelled import find_classes, prepare_labelled
from rosa_ds.data.mixture import mix
from rosa_ds.data.prepare import TokenSet, prepare
from rosa_ds.data.sources import BUILTIN
from rosa_ds.models.load import base_classes, read_config
from rosa_ds.models.task import uses_types

logger = logging.getLogger(__name__)


def sources(settings: RunConfig) -> dict[str, list[MixedSource]]:
    """Data sources by what they are for: ``train``, and ``eval`` where there are such."""
    data = settings.data
    evaluation = data.eval or (BUILTIN if isinstance(data.train, str) and data.train.startswith(BUILTIN) else None)
    if evaluation is None:
        return {"train": data.mixture}
    names = [evaluation] if isinstance(evaluation, str) else evaluation
    return {"train": data.mixture, "eval": [MixedSource(source=name) for name in names]}


def prepare_sets(
    settings: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RunConfig, dict[str, list[TokenSet]]]:
    """Tokenised examples of each source, by what they are for, and the settings with the classes that the data has.

    Raises: ValueError as :func:`rosa_ds.data.prepare.prepare` and :func:`rosa_ds.data.labelled.prepare_labelled`.
    """
    data, wanted = settings.data, sources(settings)
    if settings.model.task == "causal-lm":
        return settings, {
            purpose: [prepare(source.source, purpose, tokenizer, data) for source in found]
            for purpose, found in wanted.items()
        }
    for source in data.mixture:
        if source.source.startswith(BUILTIN):
            raise ValueError(
                f"data.train {source.source} has no classes: give rows with a text and a label for model.task classification"
            )
    trained = [source.source for source in data.mixture]
    labels = settings.model.labels or find_classes(trained, data, base_classes(settings.model))
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"labels": labels})})
    types = uses_types(read_config(settings.model))
    return settings, {
        purpose: [prepare_labelled(source.source, purpose, tokenizer, data, labels, types) for source in found]
        for purpose, found in wanted.items()
    }


def settle_clock(settings: RunConfig, tokenizer: PreTrainedTokenizerBase, saved: Checkpoint | None) -> RunConfig:
    """The settings with the one moment that a chat template which reads the clock shows in the whole run: the one given, else
    that of the checkpoint, else now, the same on every rank. Collective.
    """
    now = distributed.gather_objects(datetime.now().isoformat(timespec="seconds"))[0]
    if settings.model.task != "causal-lm" or not reads_clock(tokenizer):
        return settings
    before = saved.config["data"].get("template_clock") if saved is not None else None
    clock = settings.data.template_clock or before or now
    logger.info(
        "the chat template reads the clock (strftime_now): %s is trained; evaluation, and whoever serves the model, ask with the date "
        "of the day",
        clock,
    )
    return settings.model_copy(update={"data": settings.data.model_copy(update={"template_clock": clock})})


def prepare_data(
    settings: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RunConfig, TokenSet, TokenSet | None]:
    """:func:`prepare_sets`, mixed, to train and to evaluate on; says how much there is, and shows an example."""
    with distributed.main_first():
        settings, found = prepare_sets(settings, tokenizer)
    for tokens in (tokens for sets in found.values() for tokens in sets):
        logger.info("%s: %s", tokens.name, tokens.summary())
    mixed = {purpose: mix(found[purpose], wanted) for purpose, wanted in sources(settings).items()}
    data = mixed["train"]
    if len(data.parts) > 1 or data.parts[0].taken != len(data):
        logger.info("an epoch of data.train:\n%s", "\n".join(data.shares()))
    logger.info("%s", data.sample(tokenizer))
    return settings, data, mixed.get("eval")
