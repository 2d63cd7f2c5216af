"""What ``rosa-ds eval`` does with its options: load, evaluate, write."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds import distributed, zero
from rosa_ds.adapters.folder import is_adapter
from rosa_ds.checkpoints.checkpoint import is_checkpoint
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import ModelSettings
from rosa_ds.data.chat import choose_template
from rosa_ds.evaluation.causal_lm import perplexity, written_metrics
from rosa_ds.evaluation.classification import classify
from rosa_ds.evaluation.harness import harness_metrics
from rosa_ds.evaluation.scores import CLASSIFIED, GENERATED, check_available
from rosa_ds.export.adapted import load_adapted, load_merged, run_tokenizer
from rosa_ds.models.load import base_classes, load_model, load_tokenizer
from rosa_ds.models.task import is_classifier
from rosa_ds.utils.files import write_json

logger = logging.getLogger(__name__)


def evaluate(options: argparse.Namespace) -> None:
    """Log the figures, and write them where an output is given.

    Args:
        options: as :func:`rosa_ds.evaluation.options.parse` makes them.
    """
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if distributed.planned_world_size() > 1:
        zero.initialize()
        distributed.use_threads()
    with distributed.together(), distributed.main_first():
        model, tokenizer = _load(options)
    model.to(distributed.device()).eval()
    start = time.monotonic()
    figures: dict[str, Any] = {"model": options.model, "data": options.data, "dtype": options.dtype}
    metrics, how, rows = _metrics(options, model), options.how, options.rows
    check_available(metrics)
    if written := [metric for metric in metrics if metric in GENERATED]:
        resamples, reasoning = options.bootstrap, options.reasoning
        figures |= written_metrics(model, tokenizer, options.data, rows, written, how, resamples, reasoning)
    if any(metric in CLASSIFIED for metric in metrics):
        figures |= classify(model, tokenizer, options.data, rows, how.batch_size, options.bootstrap)
    if "perplexity" in metrics:
        figures |= perplexity(model, tokenizer, options.data, rows, how.batch_size, options.bootstrap)
    if options.harness:
        limit, folder = options.harness_limit, options.harness_tasks
        figures["harness"] = harness_metrics(model, tokenizer, options.harness, folder, limit, how.batch_size)
    shown = {name: value for name, value in figures.items() if name != "samples"}
    logger.info("%s (%.1f s)", json.dumps(shown, indent=1), time.monotonic() - start)
    if options.output and distributed.is_main():
        write_json(options.output, figures)


def _load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path, dtype = Path(options.model), getattr(torch, options.dtype)
    run = (path / "adapter", path / "metrics.jsonl")
    if any(part.exists() for part in run) or is_adapter(path) or is_checkpoint(path):
        source = open_source(path)
        model = load_adapted(source, dtype) if options.unmerged else load_merged(source, dtype)
        tokenizer = run_tokenizer(source)
        if options.rows.chat_template is not None or options.rows.template_arguments:
            choose_template(tokenizer, options.rows)
            logger.warning(
                "%s is not asked as it was trained: its chat template or its arguments are others here", path
            )
        return model, tokenizer
    if options.unmerged:
        raise ValueError(f"--unmerged is for runs, checkpoints and adapters; {options.model} is a model")
    base = ModelSettings(name_or_path=options.model)
    if base_classes(base):
        base = base.model_copy(update={"task": "classification"})
    return load_model(base, dtype), load_tokenizer(base, options.rows)


def _metrics(options: argparse.Namespace, model: PreTrainedModel) -> list[str]:
    """What is asked for. Raises: ValueError for what the model is not made for."""
    known = CLASSIFIED if is_classifier(model) else (*GENERATED, "perplexity")
    metrics = list(dict.fromkeys(options.metric or [known[0]])) if options.data else []
    for metric in metrics:
        if metric not in known:
            kind = "a classifier" if is_classifier(model) else "a language model"
            raise ValueError(f"--metric {metric}: {options.model} is {kind}, whose metrics are {', '.join(known)}")
    return metrics
