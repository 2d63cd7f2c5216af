"""The command line of ``rosa-ds eval``: what is evaluated, on which rows, and how."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rosa_ds import distributed
from rosa_ds.checkpoints.source import run_folder
from rosa_ds.config.schema import DataSettings
from rosa_ds.config.validation import validation_message
from rosa_ds.evaluation.generate import Generation
from rosa_ds.evaluation.harness import require_harness
from rosa_ds.evaluation.scores import CLASSIFIED, GENERATED, check_available
from rosa_ds.utils.files import check_place
from rosa_ds.utils.json_files import read_json

METRICS = (*GENERATED, "perplexity", *CLASSIFIED)
COLUMNS = ("prompt_column", "prompt_template", "completion_column", "text_column", "pair_column", "label_column")
OF_THE_RUN = ("max_length", "too_long", "separator")
"""Settings of data that are the run's where they are not given; columns are the file's."""
TEMPLATE = ("chat_template", "template_arguments")
"""Settings of data that are the tokenizer's, a run's or a model's, where they are not given."""
GENERATION = ("batch_size", "max_new_tokens", "temperature", "top_p", "seed")


def parse(arguments: Sequence[str], description: str = "") -> argparse.Namespace:
    """Options, and of them ``how`` to generate and the settings of the ``rows``.

    Args:
        description: for ``--help``.

    Raises:
        ValueError: what cannot be done.
        SystemExit: an unknown option, or ``--help``.
    """
    options = _parser(description).parse_args(arguments)
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
    if options.template_arguments is not None:
        options.template_arguments = _read_arguments(options.template_arguments)
    config = run_folder(Path(options.model)) / "config.json"
    data = read_json(config).get("data", {}) if config.is_file() else {}
    of_run = {name: data[name] for name in OF_THE_RUN if name in data}
    given = {
        name: value for name in (*COLUMNS, *OF_THE_RUN, *TEMPLATE) if (value := getattr(options, name)) is not None
    }
    try:
        options.rows = DataSettings(**of_run | given)
    except ValidationError as error:
        raise ValueError(validation_message(error, "data", list(DataSettings.model_fields))) from None
    return options


def _read_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f'--template-arguments is a JSON object, as {{"enable_thinking": false}}, given {text!r}')
    return arguments


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rosa-ds eval", description=description)
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
    said = "of a reasoning model: drop compares the answer behind the reasoning, keep the whole text; auto (default) drops what the chat template marks"
    parser.add_argument("--reasoning", choices=("auto", "keep", "drop"), default="auto", help=said)
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the 95 %% intervals; 0: none")
    for name in COLUMNS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"as data.{name} of rosa-ds train")
    for name in OF_THE_RUN:
        kind = int if name == "max_length" else str
        said = f"as data.{name} of rosa-ds train; default: the run's, else its"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=said)
    said = "as data.chat_template of rosa-ds train, a file or the text; default: the tokenizer's, of a run the one that it trained with"
    parser.add_argument("--chat-template", metavar="FILE", help=said)
    said = "as data.template_arguments of rosa-ds train, e.g. '{\"enable_thinking\": false}'; of a run they go before its own"
    parser.add_argument("--template-arguments", metavar="JSON", help=said)
    parser.add_argument("--harness", action="append", metavar="TASK", help="of lm-eval; may be given more than once")
    parser.add_argument("--harness-tasks", type=Path, metavar="FOLDER", help="with task files of your own")
    parser.add_argument("--harness-limit", type=int, metavar="N", help="rows of each of lm-eval's tasks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser
