"""Evaluate a run or a model: ``python launch/eval.py MODEL_OR_RUN_DIR --data FILE --metric exact_match --output FILE.json``."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch

from rosa_ds import distributed
from rosa_ds.adapters.state import CONFIG_FILE
from rosa_ds.config import DataSettings, ModelSettings
from rosa_ds.evaluation.metrics import exact_match, perplexity
from rosa_ds.export.merge import load_merged, run_tokenizer
from rosa_ds.export.source import open_source
from rosa_ds.files import write_json
from rosa_ds.logs import run_program
from rosa_ds.models.load import load_model, load_tokenizer
from rosa_ds.training.checkpoint import is_checkpoint

METRICS = ("exact_match", "perplexity")
logger = logging.getLogger("rosa_ds.launch.eval")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("model", help="run, checkpoint or adapter folder, model folder, hub name, .gguf file or tiny")
    parser.add_argument("--data", required=True, help="as data.train, e.g. rows.jsonl[700:800] or builtin:sql")
    parser.add_argument(
        "--metric", action="append", choices=METRICS, help="may be given more than once; default: exact_match"
    )
    parser.add_argument("--output", type=Path, help="JSON file with the figures and every sample")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row, for perplexity")
    parser.add_argument("--prompt-column")
    parser.add_argument("--completion-column")
    options = parser.parse_args(arguments)
    settings = DataSettings(
        prompt_column=options.prompt_column, completion_column=options.completion_column, max_length=options.max_length
    )
    path, dtype = Path(options.model), getattr(torch, options.dtype)
    ours = (path / "adapter", path / CONFIG_FILE, path / "metrics.jsonl")
    if any(part.exists() for part in ours) or is_checkpoint(path):
        source = open_source(path)
        model, tokenizer = load_merged(source, dtype), run_tokenizer(source)
    else:
        base = ModelSettings(name_or_path=options.model)
        model, tokenizer = load_model(base, dtype), load_tokenizer(base)
    model.to(distributed.device()).eval()
    figures: dict[str, object] = {"model": options.model, "data": options.data, "dtype": options.dtype}
    for metric in dict.fromkeys(options.metric or ["exact_match"]):
        start = time.monotonic()
        if metric == "exact_match":
            result = exact_match(model, tokenizer, options.data, settings, options.batch_size, options.max_new_tokens)
        else:
            result = perplexity(model, tokenizer, options.data, settings, options.batch_size)
        shown = {name: value for name, value in result.items() if name != "samples"}
        logger.info("%s: %s (%.1f s)", metric, json.dumps(shown), time.monotonic() - start)
        figures |= result
    if options.output:
        write_json(options.output, figures)


if __name__ == "__main__":
    run_program(main)
