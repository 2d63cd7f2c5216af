"""Numbers that say how good a model is on rows of data, each with its 95 % bootstrap interval over the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.config.schema import DataSettings
from rosa_ds.data.batches import Batch
from rosa_ds.data.prepare import prepare
from rosa_ds.evaluation.generate import Generation, generate
from rosa_ds.evaluation.questions import load_questions
from rosa_ds.evaluation.scores import CORPUS_SCORES, by_question, check_available, check_references, interval, over_all
from rosa_ds.models.loss import losses_of
from rosa_ds.training.evaluate import visit_batches
from rosa_ds.training.model import check_positions


def written_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    settings: DataSettings,
    metrics: Sequence[str],
    how: Generation,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Metrics of what the model writes. Collective: every rank does a part and returns the same.

    Args:
        source: rows with prompt and answer; those with the same prompt are one question with several right answers.
        metrics: some of :data:`rosa_ds.evaluation.scores.GENERATED`.
        resamples: of the bootstrap; 0: no intervals.

    Returns: each metric by its name (a share of 1, BLEU and chrF of 100), ``<metric>_interval``, ``rows`` (questions), and
        ``samples``: of every question prompt, references, prediction and its ``scores``.
    """
    check_available(metrics)
    with distributed.together(), distributed.main_first():
        questions = load_questions(source, tokenizer, settings)
    check_references(metrics, [question.references for question in questions])
    predictions = [text.strip() for text in generate(model, tokenizer, [q.prompt for q in questions], how)]
    references = [question.references for question in questions]
    figures: dict[str, Any] = {}
    scores = {metric: by_question(metric, predictions, references) for metric in metrics}
    for metric in metrics:
        if metric in CORPUS_SCORES:
            figures |= over_all(metric, predictions, references, resamples)
            continue
        figures[metric] = sum(scores[metric]) / len(questions)
        if resamples:
            figures[f"{metric}_interval"] = interval(scores[metric], resamples)
    samples = [
        {
            "prompt": tokenizer.decode(question.prompt),
            "references": list(question.references),
            "prediction": prediction,
            "scores": {metric: scores[metric][number] for metric in metrics},
        }
        for number, (question, prediction) in enumerate(zip(questions, predictions, strict=True))
    ]
    return {**figures, "rows": len(questions), "samples": samples}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    settings: DataSettings,
    batch_size: int,
    resamples: int = 1000,
) -> dict[str, Any]:
    """``exp`` of the mean negative log-likelihood of the completions' tokens, as training sees them. Collective.

    Returns: ``perplexity``, ``perplexity_interval``, ``loss`` (nats a token), ``examples``, ``trained_tokens``.
    """
    with distributed.together(), distributed.main_first():
        data = prepare(source, "eval", tokenizer, settings)
    check_positions(model, {source: data})
    sums = torch.zeros(len(data), dtype=torch.float64)

    def add(indices: NDArray[np.int64], batch: Batch, logits: Tensor) -> None:
        losses = losses_of(logits, batch.targets.to(logits.device))
        sums[torch.from_numpy(indices)] = losses.double().sum(dim=1).cpu()

    visit_batches(model, data, batch_size, tokenizer.pad_token_id, add)
    sums = distributed.sum_over_ranks(sums.to(distributed.device())).cpu()
    loss = float(sums.sum()) / int(data.trained.sum())
    figures: dict[str, Any] = {"perplexity": math.exp(loss), "loss": loss, "examples": len(data)}
    if resamples:
        ends = interval((sums.numpy() / data.trained).tolist(), resamples, weights=data.trained.tolist())
        figures["perplexity_interval"] = [math.exp(end) for end in ends]
    return {**figures, "trained_tokens": int(data.trained.sum())}
