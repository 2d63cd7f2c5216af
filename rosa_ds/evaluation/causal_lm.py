"""How good a causal language model is on rows of data: what it writes, and perplexity. Each figure with its 95 % interval."""

from __future__ import annotations

import dataclasses
import logging
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
from rosa_ds.data.clock import stop_clock
from rosa_ds.data.formats import examples_of, parse_row
from rosa_ds.data.prepare import columns_of, prepare
from rosa_ds.data.sources import load_rows
from rosa_ds.data.tokenise import prompt_and_reference
from rosa_ds.data.turn_end import end_of_turn, stop_tokens
from rosa_ds.evaluation.bootstrap import mean_interval
from rosa_ds.evaluation.generate import Generation, continuations, padding_of
from rosa_ds.evaluation.reasoning import Choice, Reasoning, reasoning_of, without_special
from rosa_ds.evaluation.scores import CORPUS_SCORES, by_question, check_available, check_references, over_all
from rosa_ds.training.evaluate import visit_batches
from rosa_ds.training.head import settle_head
from rosa_ds.training.model import check_positions
from rosa_ds.training.padding import needs_mask

logger = logging.getLogger(__name__)


def written_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    settings: DataSettings,
    metrics: Sequence[str],
    how: Generation,
    resamples: int = 1000,
    reasoning: Choice = "auto",
) -> dict[str, Any]:
    """Metrics of what the model writes. Collective: every rank does a part and returns the same.

    Args:
        source: rows with prompt and answer; those with the same prompt are one question with several right answers.
        metrics: some of :data:`rosa_ds.evaluation.scores.GENERATED`.
        resamples: of the bootstrap; 0: no intervals.
        reasoning: whether what stands before the answer is compared, too, as :func:`rosa_ds.evaluation.reasoning.reasoning_of`.

    Returns: each metric by its name (a share of 1, BLEU and chrF of 100), ``<metric>_interval``, ``rows`` (questions), and
        ``samples``: of every question prompt, references, prediction and its ``scores``. Where reasoning is left out also
        ``unfinished_reasoning``, the predictions without an answer, and of every sample the ``answer`` that was compared.
    """
    check_available(metrics)
    with distributed.together(), distributed.main_first():
        questions = load_questions(source, tokenizer, settings)
    _warn_of_no_end(model, tokenizer)
    marks = reasoning_of(tokenizer, reasoning)
    references = [_expected(question.references, tokenizer, marks) for question in questions]
    check_references(metrics, references)
    written = continuations(model, tokenizer, [question.prompt for question in questions], how)
    if marks is None:
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        answers: list[str | None] = list(texts)
    else:  # special tokens may be what marks it
        texts = [tokenizer.decode(ids).strip() for ids in written]
        answers = [marks.answer(text, tokenizer.decode(q.prompt)) for text, q in zip(texts, questions, strict=True)]
    predictions = ["" if answer is None else without_special(tokenizer, answer).strip() for answer in answers]
    figures: dict[str, Any] = {}
    scores = {metric: by_question(metric, predictions, references) for metric in metrics}
    for metric in metrics:
        if metric in CORPUS_SCORES:
            figures |= over_all(metric, predictions, references, resamples)
            continue
        figures[metric] = sum(scores[metric]) / len(questions)
        if resamples:
            figures[f"{metric}_interval"] = mean_interval(scores[metric], resamples)
    samples = [
        {
            "prompt": tokenizer.decode(question.prompt),
            "references": references[number],
            "prediction": texts[number],
            **({} if marks is None else {"answer": predictions[number]}),
            "scores": {metric: scores[metric][number] for metric in metrics},
        }
        for number, question in enumerate(questions)
    ]
    if marks is not None:
        figures["unfinished_reasoning"] = answers.count(None)
        if figures["unfinished_reasoning"] and distributed.is_main():
            logger.warning(
                "%d of %d predictions have no answer: their reasoning does not end, and counts as an empty answer; give more "
                "--max-new-tokens (%d)",
                answers.count(None),
                len(answers),
                how.max_new_tokens,
            )
    return {**figures, "rows": len(questions), "samples": samples}


def _expected(references: Sequence[str], tokenizer: PreTrainedTokenizerBase, marks: Reasoning | None) -> list[str]:
    """References as predictions are compared with them: without special tokens, and without reasoning that ends."""
    answers = (None if marks is None else marks.answer(reference) for reference in references)
    found = (reference if answer is None else answer for reference, answer in zip(references, answers, strict=True))
    return [without_special(tokenizer, text).strip() for text in found]


def _warn_of_no_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where the template writes no end of a turn, only a model that learnt to write another stop token there stops."""
    if end_of_turn(tokenizer) is None and distributed.is_main():
        stops = tokenizer.convert_ids_to_tokens(stop_tokens(model.generation_config.eos_token_id, tokenizer))
        logger.warning(
            "%s: generation may not stop; it ends with %s, or at --max-new-tokens",
            "the chat template writes no token that ends an assistant's turn"
            if tokenizer.chat_template
            else "the tokenizer has neither a chat template nor an end-of-text token",
            " or ".join(stops) or "no token",
        )


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
    sums = torch.zeros(len(data.lengths), dtype=torch.float64)

    def add(indices: NDArray[np.int64], _: Batch, losses: Tensor) -> None:
        sums[torch.from_numpy(indices)] = losses.double().sum(dim=1).cpu()

    pad_id = padding_of(tokenizer)
    settle_head(model, data, pad_id, "auto")
    visit_batches(model, data, batch_size, pad_id, add, masked=needs_mask(model, data, pad_id))
    sums = distributed.sum_over_ranks(sums.to(distributed.device())).cpu()
    loss = float(sums.sum()) / int(data.trained.sum())
    figures: dict[str, Any] = {"perplexity": math.exp(loss), "loss": loss, "examples": len(data)}
    if resamples:
        losses, weights = (np.add.reduceat(values, data.firsts[:-1]) for values in (sums.numpy(), data.trained))
        ends = mean_interval((losses / weights).tolist(), resamples, weights=weights.tolist())
        figures["perplexity_interval"] = [math.exp(end) for end in ends]
    return {**figures, "trained_tokens": int(data.trained.sum())}


def load_questions(source: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[Question]:
    """The questions of a source, as ``data.train`` names one. Rows with the same prompt are one question.

    Raises: ValueError for a row that has no prompt and answer, with its number.
    """
    rows = load_rows(source, "eval")
    tokenizer = stop_clock(tokenizer, settings.template_clock)
    found: dict[tuple[int, ...], list[str]] = {}
    for index, row in enumerate(rows):
        try:
            for example in examples_of(parse_row(row, columns_of(settings))):
                ids, reference = prompt_and_reference(example, tokenizer, settings.separator)
                found.setdefault(tuple(ids), []).append(reference.strip())
        except ValueError as error:
            raise ValueError(f"{rows.where(index)}: {error}") from None
    return [Question(list(prompt), tuple(references)) for prompt, references in found.items()]


@dataclasses.dataclass(frozen=True)
class Question:
    """``prompt`` as token ids, and its ``references`` without outer white space, in the order of the data."""

    prompt: list[int]
    references: tuple[str, ...]
