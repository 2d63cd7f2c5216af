"""Numbers that say how good a model is on rows of data."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds.config import DataSettings
from rosa_ds.data.formats import parse_row
from rosa_ds.data.prepare import columns_of, prepare
from rosa_ds.data.sources import load_rows
from rosa_ds.data.tokenise import prompt_and_reference
from rosa_ds.evaluation.generate import generate
from rosa_ds.training.evaluate import evaluate_loss
from rosa_ds.training.loss import accepts_kept_positions


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    settings: DataSettings,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Share of rows whose greedy completion equals the reference after both are stripped of outer white space.

    Returns: ``exact_match``, ``rows``, and ``samples`` with every prompt, reference and prediction.
    """
    rows = load_rows(source, "eval")
    prompts, references = [], []
    for index, row in enumerate(rows):
        try:
            ids, reference = prompt_and_reference(parse_row(row, columns_of(settings)), tokenizer, settings.separator)
        except ValueError as error:
            raise ValueError(f"{rows.where(index)}: {error}") from None
        prompts.append(ids)
        references.append(reference.strip())
    predictions = [text.strip() for text in generate(model, tokenizer, prompts, batch_size, max_new_tokens)]
    hits = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    samples = [
        {"prompt": tokenizer.decode(ids), "reference": reference, "prediction": prediction, "match": hit}
        for ids, reference, prediction, hit in zip(prompts, references, predictions, hits, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits), "rows": len(hits), "samples": samples}


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, settings: DataSettings, batch_size: int
) -> dict[str, Any]:
    """``exp`` of the mean negative log-likelihood of the completions' tokens, as training sees them."""
    data = prepare(source, "eval", tokenizer, settings)
    with torch.inference_mode():
        loss = evaluate_loss(model, data, batch_size, tokenizer.pad_token_id, accepts_kept_positions(model))
    assert loss is not None, "nobody interrupts this evaluation"
    return {"perplexity": math.exp(loss), "loss": loss, "rows": len(data), "trained_tokens": int(data.trained.sum())}
