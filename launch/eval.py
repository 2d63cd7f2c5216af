"""Evaluate a run or a model: ``python launch/eval.py MODEL_OR_RUN_DIR --data FILE --metric exact_match --output FILE.json``.

Under ``torchrun`` or ``deepspeed`` the rows are divided over the ranks; each has the whole model. lm-eval's tasks: ``--harness``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.adapters.state import CONFIG_FILE
from rosa_ds.cli import validation_message
from rosa_ds.config import DataSettings, ModelSettings
from rosa_ds.evaluation.classification import classify
from rosa_ds.evaluation.generate import Generation
from rosa_ds.evaluation.harness import harness_metrics, require_harness
from rosa_ds.evaluation.metrics import perplexity, written_metrics
from rosa_ds.evaluation.scores import CLASSIFIED, GENERATED, check_available
from rosa_ds.export.merge import load_adapted, load_merged, run_tokenizer
from rosa_ds.export.source import open_source, run_folder
from rosa_ds.files import check_place, write_json
from rosa_ds.json_files import read_json
from rosa_ds.logs import run_program
from rosa_ds.models.load import base_classes, load_model, load_tokenizer
from rosa_ds.models.task import is_classifier
from rosa_ds.training.checkpoint import is_checkpoint

METRICS = (*GENERATED, "perplexity", *CLASSIFIED)
COLUMNS = ("prompt_column", "prompt_template", "completion_column", "text_column", "pair_column", "label_column")
OF_THE_RUN = ("max_length", "too_long", "separator")
"""Settings of data that are the run's where they are not given; columns are the file's."""
GENERATION = ("batch_size", "max_new_tokens", "temperature", "top_p", "seed")
logger = logging.getLogger("rosa_ds.launch.eval")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("model", help="run, checkpoint or adapter folder, model folder, hub name, .gguf file or tiny")
    parser.add_argument("--data", help="as data.train, e.g. rows.jsonl[700:800] or builtin:sql")
    said = "may be given more than once; default: exact_match, of a classifier accuracy"
    parser.add_argument("--metric", action="append", choices=METRICS, help=said)
    parser.add_argument("--output", type=Path, help="JSON file with the figures and every sample")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32"
    )
    parser.add_argument("--unmerged", action="store_true", help="keep a run's adapter beside its base")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the 95 %% intervals; 0: none")
    for name in COLUMNS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"as data.{name} of train.py")
    for name in OF_THE_RUN:
        kind = int if name == "max_length" else str
        said = f"as data.{name} of train.py; default: the run's, else train.py's"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=said)
    parser.add_argument("--harness", action="append", metavar="TASK", help="of lm-eval; may be given more than once")
    parser.add_argument("--harness-tasks", type=Path, metavar="FOLDER", help="with task files of your own")
    parser.add_argument("--harness-limit", type=int, metavar="N", help="rows of each of lm-eval's tasks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, and of them ``how`` to generate and the settings of the ``rows``. Raises: ValueError for what cannot be done."""
    options = _parser().parse_args(arguments)
    if options.data is None and not options.harness:
        raise ValueError("there is nothing to evaluate: give --data, or --harness with a task of lm-eval")
    if options.data is None and options.metric:
        raise ValueError(f"--metric {options.metric[0]} needs --data")
    if options.harness and distributed.planned_world_size() > 1:
        raise ValueError("--harness runs in one process: start it with plain python")
    if options.bootstrap < 0:
        raise ValueError(f"--bootstrap is 0 or more, given {options.bootstrap}")
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"--output {options.output} is a folder: give a JSON file to write")
    if options.output is not None:
        check_place(options.output, "--output")
    if options.harness:
        require_harness()
    check_available(options.metric or [])
    options.how = Generation(**{name: getattr(options, name) for name in GENERATION})
    options.rows = _data_settings(options)
    return options


def _data_settings(options: argparse.Namespace) -> DataSettings:
    given = {name: value for name in (*COLUMNS, *OF_THE_RUN) if (value := getattr(options, name)) is not None}
    config = run_folder(Path(options.model)) / "config.json"
    data = read_json(config).get("data", {}) if config.is_file() else {}
    try:
        return DataSettings(**{name: data[name] for name in OF_THE_RUN if name in data} | given)
    except ValidationError as error:
        raise ValueError(validation_message(error, "data", list(DataSettings.model_fields))) from None


def _is_ours(path: Path) -> bool:
    ours = (path / "adapter", path / CONFIG_FILE, path / "metrics.jsonl")
    return any(part.exists() for part in ours) or is_checkpoint(path)


def _load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path, dtype = Path(options.model), getattr(torch, options.dtype)
    if _is_ours(path):
        source = open_source(path)
        model = load_adapted(source, dtype) if options.unmerged else load_merged(source, dtype)
        return model, run_tokenizer(source)
    if options.unmerged:
        raise ValueError(f"--unmerged is for runs, checkpoints and adapters; {options.model} is a model")
    base = ModelSettings(name_or_path=options.model)
    if base_classes(base):
        base = base.model_copy(update={"task": "classification"})
    return load_model(base, dtype), load_tokenizer(base)


def _metrics(options: argparse.Namespace, model: PreTrainedModel) -> list[str]:
    """What is asked for. Raises: ValueError for what the model is not made for."""
    known = CLASSIFIED if is_classifier(model) else (*GENERATED, "perplexity")
    metrics = list(dict.fromkeys(options.metric or [known[0]])) if options.data else []
    for metric in metrics:
        if metric not in known:
            kind = "a classifier" if is_classifier(model) else "a language model"
            raise ValueError(f"--metric {metric}: {options.model} is {kind}, whose metrics are {', '.join(known)}")
    return metrics


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, Any]:
    figures: dict[str, Any] = {"model": options.model, "data": options.data, "dtype": options.dtype}
    metrics, how, rows = _metrics(options, model), options.how, options.rows
    check_available(metrics)
    if written := [metric for metric in metrics if metric in GENERATED]:
        figures |= written_metrics(model, tokenizer, options.data, rows, written, how, options.bootstrap)
    if any(metric in CLASSIFIED for metric in metrics):
        figures |= classify(model, tokenizer, options.data, rows, how.batch_size, options.bootstrap)
    if "perplexity" in metrics:
        figures |= perplexity(model, tokenizer, options.data, rows, how.batch_size, options.bootstrap)
    if options.harness:
        limit, folder = options.harness_limit, options.harness_tasks
        figures["harness"] = harness_metrics(model, tokenizer, options.harness, folder, limit, how.batch_size)
    return figures


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    if distributed.planned_world_size() > 1:
        distributed.initialize()
        distributed.use_threads()
    with distributed.together():
        model, tokenizer = _load(options)
    model.to(distributed.device()).eval()
    start = time.monotonic()
    figures = _evaluate(model, tokenizer, options)
    shown = {name: value for name, value in figures.items() if name != "samples"}
    logger.info("%s (%.1f s)", json.dumps(shown, indent=1), time.monotonic() - start)
    if options.output and distributed.is_main():
        write_json(options.output, figures)


if __name__ == "__main__":
    run_program(main)
