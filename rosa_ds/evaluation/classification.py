"""How well a classifier tells classes apart: accuracy, Matthews correlation, F1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.config.schema import DataSettings
from rosa_ds.data.batches import Batch
from rosa_ds.data.labelled import prepare_labelled
from rosa_ds.evaluation.bootstrap import percentile_interval, resampled_rows
from rosa_ds.models.loss import batch_logits
from rosa_ds.models.task import classes_of, is_classifier, settle_padding, uses_types
from rosa_ds.training.evaluate import visit_batches
from rosa_ds.training.model import check_positions


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    settings: DataSettings,
    batch_size: int,
    resamples: int = 0,
) -> dict[str, Any]:
    """The most probable class of each row beside its label. Collective where there are ranks, which share the rows.

    Args:
        model: a classifier whose ``config.id2label`` names the classes as the rows' labels do.
        source: as ``data.eval``; settings: columns, ``max_length`` and what to do with longer rows.
        resamples: of the bootstrap; 0: no intervals.

    Returns: ``accuracy``, ``mcc`` and ``f1`` as :func:`scores`, each with its 95 % ``_interval``, ``rows``, and ``samples``: of every
        row prompt, references (its label), prediction and ``scores``. The same on every rank.
    Raises: ValueError for a model that is no classifier, and as :func:`rosa_ds.data.labelled.prepare_labelled`.
    """
    if not is_classifier(model):
        raise ValueError(
            f"{type(model).__name__} has no classes to tell apart: give a run with model.task classification, or a model for "
            "sequence classification"
        )
    pad_id = settle_padding(model, tokenizer)
    classes = classes_of(model.config) or [str(model.config.id2label[n]) for n in range(model.config.num_labels)]
    with distributed.together(), distributed.main_first():
        data = prepare_labelled(source, "eval", tokenizer, settings, classes, uses_types(model.config))
    check_positions(model, {source: data})
    mine: dict[int, int] = {}

    def take(indices: NDArray[np.int64], _: Batch, logits: Tensor) -> None:
        mine.update(zip(indices.tolist(), logits.argmax(-1).flatten().tolist(), strict=True))

    with torch.inference_mode():
        visit_batches(model, data, batch_size, pad_id, take, asked=batch_logits)
    found = {index: number for part in distributed.gather_objects(mine) for index, number in part.items()}
    labels, predictions = data.labels(), np.asarray([found[index] for index in range(len(data))], dtype=np.int64)
    samples = [
        {
            "prompt": tokenizer.decode(data.tokens(index).ids, skip_special_tokens=True),
            "references": [classes[labels[index]]],
            "prediction": classes[predictions[index]],
            "scores": {"accuracy": float(labels[index] == predictions[index])},
        }
        for index in range(len(data))
    ]
    figures: dict[str, Any] = {**scores(labels, predictions), "rows": len(data), "samples": samples}
    if resamples:
        resampled = [scores(labels[rows], predictions[rows]) for rows in resampled_rows(len(labels), resamples, 0)]
        figures |= {f"{name}_interval": percentile_interval([one[name] for one in resampled]) for name in resampled[0]}
    return figures


def scores(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> dict[str, float]:
    """``accuracy``, Matthews correlation ``mcc`` (0 where only one class is there), and ``f1``, the mean F1 over the classes that
    occur in either. By scikit-learn.

    Shapes: both (rows,).
    Raises: ValueError if scikit-learn is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError:
        raise ValueError(
            "metrics of classification need the package scikit-learn: pip install 'rosa-ds[classification]'"
        ) from None
    several = len(np.union1d(labels, predictions)) > 1
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "mcc": float(metrics.matthews_corrcoef(labels, predictions)) if several else 0.0,
        "f1": float(metrics.f1_score(labels, predictions, average="macro", zero_division=0.0)),
    }
