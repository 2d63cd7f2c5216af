"""Which layers a run adapts and quantises: those that the loss depends on, looked at before the base is read and again as it runs."""

from __future__ import annotations

import logging
import time
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.reach import Unused, find_unused, leave_out, refusal, unreached, uses
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import Batch, collate
from rosa_ds.data.labelled import LabelledSet
from rosa_ds.data.prepare import TokenSet
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.checks import rounding_of
from rosa_ds.models.load import read_config
from rosa_ds.models.loss import batch_logits, loss_of
from rosa_ds.models.stream import build_on_meta
from rosa_ds.models.task import is_classifier
from rosa_ds.utils.texts import summary

logger = logging.getLogger(__name__)
_LENGTH, _TARGETS = 256, 8


def look_at_base(settings: RunConfig, config: Any = None) -> Unused | None:
    """:func:`rosa_ds.adapters.reach.find_unused` of a run's base, before it is loaded.

    Args:
        config: of transformers; by default the base's.
    """
    if settings.parts.everything:
        return Unused((), ())
    config = read_config(settings.model) if config is None else config
    return find_unused(lambda own, dtype: build_on_meta(own, settings.model, dtype), config, settings.data.max_length)


def keep_dense(settings: RunConfig, unused: Unused | None) -> RunConfig:
    """The settings of a base that is to be quantised, with the layers whose weight the model reads itself left as they are."""
    if settings.model.quantization == "none" or unused is None or not unused.read:
        return settings
    logger.warning(
        "%d layers whose weight the model reads itself are not quantised: %s", len(unused.read), summary(unused.read)
    )
    skip = list(dict.fromkeys([*settings.model.quantization_skip, *unused.read]))
    return settings.model_copy(update={"model": settings.model.model_copy(update={"quantization_skip": skip})})


def settle_targets(settings: RunConfig, model: nn.Module, unused: Unused | None) -> RunConfig:
    """The settings with ``all-linear`` resolved where it would adapt layers that the loss does not depend on; says which.

    Arguments and errors as :func:`rosa_ds.adapters.reach.leave_out`.
    """
    if settings.parts.everything:
        return settings
    kept = leave_out(model, settings.adapter.target_modules, unused)
    adapter = settings.adapter.model_copy(update={"target_modules": kept})
    return settings.model_copy(update={"adapter": adapter})


def probe(engine: Any, model: PreTrainedModel, data: TokenSet, pad_id: int, traced: bool) -> int:
    """One forward pass of two short rows with the adapters, on the device and by the kernels of the run. Collective.

    Args:
        traced: :func:`look_at_base` could look at the model. What this pass does not reach may then need longer rows, or a
            kernel passes it by, and is told; else it is refused.

    Returns: how often it calls the layer that it calls most.
    Raises: ValueError for adapted layers that the loss does not depend on, or a language model that sees the tokens that it
        is to predict.
    """
    begun = time.monotonic()
    layers = adapted_layers(model)
    device = engine.device
    batch = _short_batch(data, pad_id)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(batch_logits(engine, batch, device))
        return loss_of(seen[0], batch.targets.to(device))

    engine.eval()
    found = uses(model, layers, loss, numbers=True)
    length = batch.input_ids.shape[1]
    if dead := unreached(found):
        if not traced:
            raise ValueError(refusal("there are adapters on", dead, layers))
        logger.warning(
            "no gradient reaches the adapters of %d layers in rows of %d tokens: %s; if a kernel passes them by, they are not trained",
            len(dead),
            length,
            summary(dead),
        )
    if not is_classifier(model):
        _check_causal(model, seen[0].detach())
    logger.info("one forward pass of two rows of %d tokens: %.2f s", length, time.monotonic() - begun)
    return max((use.calls for use in found.values()), default=1)


def _short_batch(data: TokenSet, pad_id: int) -> Batch:
    """Two rows: the shortest, or for a language model half of the longest, and the same with another last token; so they hold
    no more tokens than the longest one.
    """
    if isinstance(data, LabelledSet):
        return data.batch([int(data.lengths.argmin())] * 2, pad_id)
    length = max(2, min(_LENGTH, int(data.lengths.max()) // 2))
    ids = data.sequence(int(data.lengths.argmax())).ids[:length]
    other = [*ids[:-1], next((token for token in ids if token != ids[-1]), pad_id)]
    trained = [number >= len(ids) - _TARGETS for number in range(len(ids))]
    return collate([Tokens(row, trained) for row in (ids, other)], pad_id)


def _check_causal(model: PreTrainedModel, logits: Tensor) -> None:
    """Raise ValueError if what is said before the last token depends on it. Shapes: logits (2, K, V) of the K positions before it."""
    wide = logits.float()
    if float((wide[0] - wide[1]).abs().max()) > rounding_of(logits):
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it is to predict (another last token changes what it says before it): it "
            "is no language model that continues a text; encoders have a setting such as is_decoder in config.json, or use "
            "model.task classification"
        )
