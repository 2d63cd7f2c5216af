"""What a run would do, found without weights, process group or GPU: ``rosa-ds train --dry-run``."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import torch

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.memory.account import table
from rosa_ds.memory.estimate import activation_terms
from rosa_ds.memory.measuring import largest
from rosa_ds.methods.sparse import check_mask_file
from rosa_ds.models.attention import can_be_by_sequence, makes_mask
from rosa_ds.models.load import load_tokenizer, read_config
from rosa_ds.models.no_numbers import Shape
from rosa_ds.models.stream import build_on_meta
from rosa_ds.planning.search import GIB, Planner
from rosa_ds.training.init_adapter import begin_from
from rosa_ds.training.model import check_readable
from rosa_ds.training.packing import plan_batches
from rosa_ds.training.schedule import Schedule
from rosa_ds.training.settle import build_schedule, settle, warn_of
from rosa_ds.training.task import prepare_data

logger = logging.getLogger(__name__)


def dry_run(command: CommandLine, ranks: int) -> None:
    """Print resolved settings, targets, phases, a sample with its mask, and the plan of a rank.

    Args:
        ranks: that the run would have.

    Raises: ValueError for what would end the run; what does not hang on it is printed before.
    """
    plan, settings = settle(command, ranks, gpu_has_bfloat16=True)
    if command.resume is not None:
        logger.warning("--dry-run looks at a new run: the checkpoint of --resume is not read")
    if settings.mask.load is not None:
        check_mask_file(Path(settings.mask.load), Path(settings.training.output_dir))
    if settings.adapter.init_from is not None:
        # that adapter decides some settings; whether its base has the same weights is not looked at
        model = build_on_meta(read_config(settings.model), settings.model, getattr(torch, plan.dtype))
        settings, start = begin_from(settings, model, {"name_or_path": settings.model.name_or_path, "hash": None}, None)
        if start is not None:
            start.close()
    warn_of(settings)
    if command.config.model.dtype == "auto" and plan.dtype == "bfloat16":
        logger.info("model.dtype auto: bfloat16, as on GPUs; a run on CPUs computes in float32")
    logger.info("settings:\n%s", json.dumps(settings.model_dump(), indent=2))
    planner = Planner(settings, command.deepspeed)
    logger.info("%s, %s: %s", settings.model.name_or_path, plan.dtype, planner.report)
    logger.info("targets:\n%s", targets(planner))
    problem, data, shape = None, None, Shape(plan.micro_batch_size, settings.data.max_length, settings.data.max_length)
    try:
        tokenizer = load_tokenizer(settings.model, settings.data)
        _, data, eval_data = prepare_data(settings, tokenizer)
        check_readable(planner.model, tokenizer, data, eval_data)
        config = planner.model.config
        batches = plan_batches(data, settings, plan, ranks, config)
        # which few language models need a mask only a pass with numbers tells
        masked = settings.model.task == "classification"
        masked_rows = makes_mask(config) and not (plan.compiler is None and can_be_by_sequence(config))
        shape = largest(data, batches, tokenizer.pad_token_id, masked, masked_rows)
    except ValueError as error:
        problem = error
        logger.warning("tokenizer or data would end the run; the plan is for rows of %d tokens", shape.length)
    steps = -(-sum(part.taken for part in data.parts) // plan.batch_size) if data is not None else 0
    if steps or settings.training.max_steps:
        logger.info("steps:\n%s", phases(build_schedule(settings, steps)))
    _show_plan(planner, plan, settings, ranks, shape)
    if problem is not None:
        raise problem


def targets(planner: Planner) -> str:
    """Adapted layers by the last part of their name, and how many of each there are."""
    counts = Counter(
        (name.rpartition(".")[2], layer.out_features, layer.in_features, layer.rank, layer.entries)
        for name, layer in adapted_layers(planner.model).items()
    )
    return "\n".join(
        f"{count:>4} × {name} ({rows} × {columns}): rank {rank}, {entries:,} sparse entries"
        for (name, rows, columns, rank, entries), count in counts.items()
    )


def phases(schedule: Schedule) -> str:
    """Runs of like steps, with what is done after or before them."""
    lines: list[str] = []
    first, draws = 0, []
    steps = [schedule.at(number) for number in range(schedule.total_steps)]
    for number, step in enumerate(steps):
        if step.draw is not None:
            draws.append(number + 1)
        last = number + 1 == len(steps) or steps[number + 1].phase != step.phase or step.restart_after
        if last:
            then = " → mask" * step.mask_after + " → restart" * step.restart_after
            lines.append(f"{first + 1:>6} to {number + 1}: {step.phase}{then}")
            first = number + 1
    if draws:
        shown = ", ".join(map(str, draws[:10])) + (f", ... ({len(draws)})" if len(draws) > 10 else "")
        lines.append(f"  draws before step {shown}")
    return "\n".join(lines)


def _show_plan(planner: Planner, plan: DeepSpeedPlan, settings: RunConfig, ranks: int, shape: Shape) -> None:
    checkpointing = bool(settings.training.gradient_checkpointing)
    account = planner.account(plan.stage, ranks, shape, checkpointing, plan.accumulation_steps)
    traced = {again: planner.activations.measure(shape, again) for again in (False, True)}
    account.memory |= activation_terms(traced[checkpointing])
    logger.info("DeepSpeed's configuration:\n%s", json.dumps(plan.config, indent=2))
    logger.info(
        "a rank of %d at stage %d, micro-batches of %d × %d tokens, %d a step:\n%s",
        ranks,
        plan.stage,
        shape.rows,
        shape.length,
        plan.accumulation_steps,
        table(account, {}, {}),
    )
    for again, found in traced.items():
        how = "with" if again else "without"
        logger.info(
            "activations %s checkpointing: %.3f GiB kept for backward, %.3f at the worst moment",
            how,
            found.saved / GIB,
            found.peak / GIB,
        )
