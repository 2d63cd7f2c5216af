"""One training run from a command line to the finished run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rosa_ds import distributed, zero
from rosa_ds.adapters.quantize import packed_hashes, quantized_forms
from rosa_ds.adapters.state import save_adapter
from rosa_ds.adapters.targets import with_head
from rosa_ds.checkpoints import checkpoint, deepspeed_format
from rosa_ds.checkpoints.checkpoint import Identity
from rosa_ds.checkpoints.folder_lock import OTHER_HOST_SECONDS, hold_folder
from rosa_ds.checkpoints.resume import check_resumable, read_checkpoint, run_of
from rosa_ds.checkpoints.run_folder import MARK_FILE, check_free
from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.deepspeed import DeepSpeedPlan, keep_batch
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.clock import reads_clock
from rosa_ds.data.turn_end import stop_tokens
from rosa_ds.memory.account import Account, table
from rosa_ds.memory.estimate import predict
from rosa_ds.memory.measuring import largest, with_activations
from rosa_ds.methods import Restart, build_methods, memory_terms
from rosa_ds.methods.sparse import check_loaded_mask, check_mask_file
from rosa_ds.models.attention import joins_results, makes_mask
from rosa_ds.models.load import download, identify, load_tokenizer
from rosa_ds.models.task import is_classifier
from rosa_ds.training.compiled import compiled
from rosa_ds.training.engine import build_engine, parameter_groups
from rosa_ds.training.failures import all_statuses, explain_loading, explain_memory, is_out_of_memory
from rosa_ds.training.gpu_settings import (
    check_deterministic,
    choose_allocator,
    deterministic,
    has_no_deterministic_form,
)
from rosa_ds.training.head import settle_loss
from rosa_ds.training.init_adapter import begin_from, check_start
from rosa_ds.training.interrupt import Interruption
from rosa_ds.training.loop import Loop, Run
from rosa_ds.training.metrics import MetricsLog
from rosa_ds.training.model import adapt, divide_positions, load_checked_base
from rosa_ds.training.packing import plan_batches, settle_batches
from rosa_ds.training.padding import needs_mask
from rosa_ds.training.reach import keep_dense, look_at_base, probe, settle_targets
from rosa_ds.training.settle import build_schedule, settle, warn_of
from rosa_ds.training.task import prepare_data, prepare_sets, settle_clock
from rosa_ds.utils.errors import RunError
from rosa_ds.utils.files import move_aside, write_json, written_folder
from rosa_ds.utils.logs import begin_log, log_to
from rosa_ds.zero.engine import forget_order

logger = logging.getLogger(__name__)


def train(command: CommandLine) -> Path:
    """Do a whole run, or the rest of one; every rank calls it.

    Returns: the run's folder.
    Raises:
        ValueError: anything that is wrong with settings, model or data, before anything is written.
        RunError: the run cannot go on.
        InterruptedRunError: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) came; the state is saved.
    """
    try:
        with Interruption() as interruption, deterministic(command.config.training.deterministic):
            return _train(command, interruption)
    except RunError:
        raise
    except (RuntimeError, MemoryError) as error:
        if operator := has_no_deterministic_form(error):
            raise RunError(
                f"training.deterministic: {operator} has no form that gives the same bits again: leave the setting out, or what needs "
                "this operator"
            ) from error
        if not is_out_of_memory(error):
            raise
        stage = command.deepspeed.get("zero_optimization", {}).get("stage", 0)
        raise RunError(explain_loading(command.config, stage, error)) from error
    finally:
        distributed.stop_watch()


def _train(command: CommandLine, interruption: Interruption) -> Path:
    begin_log()
    _fill_caches(command)
    choose_allocator()
    plan, settings = _join_ranks(command)
    output = Path(settings.training.output_dir)
    with distributed.together():
        if distributed.is_main():
            if command.resume is None:
                check_free(output)
            hold_folder(output, wait_seconds=OTHER_HOST_SECONDS if command.resume is not None else 0.0)
            (output / MARK_FILE).unlink(missing_ok=True)

    # A resumed run takes from its checkpoint what only the number of ranks decided.
    source, saved = read_checkpoint(settings, command.resume) if command.resume is not None else (None, None)
    plan = keep_batch(plan, command.deepspeed, saved.batch_size) if saved is not None else plan

    # Data come before the model: what is wrong with them is told before weights are read.
    mask = None if settings.mask.load is None or (saved and saved.positions) else Path(settings.mask.load)
    with distributed.together():
        if mask is not None:
            check_mask_file(mask, output)
    # One main_first() in a block of together(): a rank that fails must not skip a barrier.
    with distributed.together(), distributed.main_first():
        tokenizer = load_tokenizer(settings.model, settings.data)
    settings = settle_clock(settings, tokenizer, saved)
    with distributed.together():
        settings, data, eval_data = prepare_data(settings, tokenizer)

    # The base, what an adapter that the run begins with decides, and the adapters; sharded at stage 3.
    with distributed.together():
        unused = look_at_base(settings)
        settings = keep_dense(settings, unused)
    model, weights, pad_id = load_checked_base(settings, plan, tokenizer, data, eval_data)
    with distributed.together():
        base = identify(settings.model)
        if settings.training.deterministic:
            check_deterministic(model.config._attn_implementation)
    settings, start = begin_from(settings, model, base, saved)
    with distributed.together():
        settings = settle_targets(settings, model, unused)
    warn_of(settings)
    settings = with_head(settings, model)
    with distributed.together():
        adapt(model, weights, settings, plan)
        if start is not None:
            check_start(settings, model, start)
        if mask is not None:
            check_loaded_mask(mask, model)

    if quantized_forms(model):  # by which export knows that it merges into the numbers that are trained on
        base = {**base, "packed": packed_hashes(model, together=True)}

    # All ranks have the same input, and a resumed run the same as before.
    record = {**settings.model_dump(), "deepspeed": plan.record()}
    identity = Identity(record, plan.batch_size, base, data.digest())
    if not distributed.same_everywhere(f"{base['hash']} {identity.data}".encode()):
        raise ValueError(
            f"the ranks see different weights of {settings.model.name_or_path} or different examples of {data.name}: "
            "give folders that all hosts share, or the same files on each"
        )
    if saved is not None:
        with distributed.together():
            check_resumable(saved, identity)

    # The schedule, and before DeepSpeed takes the parameters what a restart puts back; then the engine.
    batches = plan_batches(data, settings, plan, distributed.world_size(), model.config)
    schedule = build_schedule(settings, batches.steps_per_epoch)
    methods = build_methods(model, settings, schedule)
    restarts = schedule.restart and schedule.mask_steps > 0
    restart = Restart(model, parameter_groups(model).get("whole", {}) if restarts else {})
    engine, state = build_engine(model, settings, plan)
    if settings.adapter.partition_positions and plan.stage < 3:
        divide_positions(model)
    recomputes = bool(settings.training.gradient_checkpointing)
    account = predict(model, plan, memory_terms(model, plan, settings), recomputes)
    logger.info("bytes of a rank, predicted:\n%s", table(account, {}, {}))

    calls = probe(engine, model, data, pad_id, traced=unused is not None)
    batches = settle_batches(batches, engine, data, settings.data.batching, by_sequence=plan.compiler is None)
    masked = needs_mask(engine, data, pad_id)
    settings = settle_loss(settings, engine, data, pad_id)
    forget_order(engine)

    folder = _open_folder(settings, plan, account, tokenizer, source, saved.step if saved else 0)
    run = Run(
        settings=settings,
        folder=folder,
        model=model,
        engine=engine,
        state=state,
        methods=methods,
        restart=restart,
        schedule=schedule,
        batches=batches,
        data=data,
        eval_data=eval_data,
        pad_id=pad_id,
        masked=masked,
        identity=identity,
        account=account,
        interruption=interruption,
        calls_a_pass=calls,
    )
    distributed.start_watch(60 * settings.training.stall_minutes)
    with contextlib.ExitStack() as closing:
        closing.enter_context(_explained(run, plan))
        if plan.compiler is not None:
            closing.enter_context(compiled(model, plan.compiler))
        with distributed.together():
            due = saved is not None and saved.evaluation_due
            resumed_at = saved.step if saved is not None else 0
            written = folder if distributed.is_main() else None
            log = MetricsLog(written, settings.training.tensorboard, resumed_at, due)
            closing.callback(log.close)
        loop = Loop(run, log)
        if saved is not None and source is not None:
            begun = time.monotonic()
            loop.restore(saved, source)
            saved.release()
            logger.info("state restored in %.2f s", time.monotonic() - begun)
        if start is not None:
            loop.begin_with(start)
            start.close()
        loop.train()
        _save_result(run, tokenizer)
    logger.info("done: %s; merge it into its base with: rosa-ds export %s OUT", folder, folder)
    return folder


def _fill_caches(command: CommandLine) -> None:
    """What may take long and needs no other rank, on the first rank of each node, before the ranks wait for each other in
    collectives: download and tokenise. An error is left to the same work later, which tells it to all ranks.
    """
    if distributed.planned_local_rank():
        return
    settings = command.config
    with contextlib.suppress(ValueError, OSError):
        tokenizer = load_tokenizer(settings.model, settings.data)
        if command.resume is None or not reads_clock(tokenizer):  # a resumed run has a date of its own
            prepare_sets(settings, tokenizer)
        download(settings.model)


def _join_ranks(command: CommandLine) -> tuple[DeepSpeedPlan, RunConfig]:
    """Join the other ranks, and resolve what the settings leave open and their number decides."""
    training = command.config.training
    # of a collective: rarely reached, since the watch looks at what is said of each step; a first download may take long
    usual = max(120.0, 2 * training.stall_minutes) if training.stall_minutes else 7 * 24 * 60.0
    if training.stall_minutes:
        distributed.leave_errors_to_watch()
    zero.initialize(training.timeout_minutes or usual)
    if training.stall_minutes:  # loading may take long: until the first step only a failed collective ends the run
        distributed.start_watch(math.inf)
    threads, ranks = distributed.use_threads(), distributed.world_size()
    plan, settings = settle(command, ranks, distributed.gpu_has_bfloat16())
    if plan.dtype == "float16" and not zero.has_float16():
        raise ValueError(
            f"float16 does not train on this device ({distributed.device().type}): use bfloat16 or float32"
        )
    logger.info("%d ranks, %d threads each, ZeRO-%d, %s; %s", ranks, threads, plan.stage, plan.dtype, plan.step())
    return plan, settings


def _open_folder(
    settings: RunConfig,
    plan: DeepSpeedPlan,
    account: Account,
    tokenizer: PreTrainedTokenizerBase,
    resumed_from: Path | None,
    step: int,
) -> Path:
    """Create the run's folder with its resolved configuration, and the tokenizer that its checkpoints are asked with.

    Going on in the folder that the checkpoint lies in, later checkpoints are set aside. Otherwise an older run in the
    folder is moved aside as a whole.

    Raises:
        ValueError: the folder holds something that is not a run.
    """
    folder = Path(settings.training.output_dir)
    in_place = resumed_from is not None and run_of(resumed_from.resolve()) == folder.resolve()
    with distributed.together():
        if distributed.is_main():
            if in_place:
                later = [
                    *checkpoint.folders(folder).set_aside_later(step),
                    *deepspeed_format.set_aside_later(folder, step),
                ]
                for abandoned in later:
                    logger.info("a checkpoint of a later step is kept as %s", abandoned)
            elif folder.exists() and any(folder.iterdir()):
                check_free(folder)
                logger.info("the run that was in %s is in %s now", folder, move_aside(folder))
            folder.mkdir(parents=True, exist_ok=True)
            with written_folder(folder / "tokenizer") as temporary:
                tokenizer.save_pretrained(temporary)
            write_json(folder / "config.json", settings.model_dump())
            write_json(folder / "ds_config.json", {**plan.config, **plan.record()})
            write_json(folder / "accounting.json", {"predicted": dataclasses.asdict(account)})
    with distributed.together():
        log_to(folder / "logs")
    return folder


@contextlib.contextmanager
def _explained(run: Run, plan: DeepSpeedPlan) -> Iterator[None]:
    """Lack of memory and ranks that are gone become RunErrors that say what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            rows = run.masked, makes_mask(run.model.config), joins_results(run.model)
            shape = largest(run.data, run.batches, run.pad_id, *rows)
            account = with_activations(run.account, run.settings, plan.dtype, shape)
            raise RunError(explain_memory(account, run.settings, plan.stage, plan.micro_batch_size, error)) from error
        if isinstance(error, MemoryError) or not distributed.lost_contact(error):
            raise
        raise RunError(
            f"another rank is gone: {distributed.describe_ranks()}; go on with --resume ({error}). Its launcher prints its exit "
            f"status: {all_statuses()}"
        ) from error


def _save_result(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """``adapter/`` in the run's folder: what training added to the base, in float32."""
    distributed.progress("saving the adapter")
    tensors = run.state.read()
    # the last checkpoint has the base as methods have left it; no rank need ever hold it
    saved = next((method.saved_base for method in run.methods if method.saved_base is not None), None)
    base_files = [saved.folder / name for name in saved.files] if saved is not None else None
    partitioned = any(zero.is_partitioned(parameter) for parameter in run.model.parameters())
    with distributed.together():
        if distributed.is_main() or partitioned:
            stops = [] if is_classifier(run.model) else stop_tokens(run.model.generation_config.eos_token_id, tokenizer)
            save_adapter(run.model, run.folder / "adapter", run.identity.base, tensors, base_files, stops)
