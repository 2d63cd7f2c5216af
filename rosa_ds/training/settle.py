"""What the settings of a run come to, for the run itself and for the plan of one: DeepSpeed's part, warnings, steps."""

from __future__ import annotations

import logging

from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.deepspeed import DeepSpeedPlan, check_packages, plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.config.unused import settings_without_effect
from rosa_ds.training.schedule import Schedule
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS
from rosa_ds.zero.schema import check_by_deepspeed

logger = logging.getLogger(__name__)


def settle(command: CommandLine, ranks: int, gpu_has_bfloat16: bool) -> tuple[DeepSpeedPlan, RunConfig]:
    """DeepSpeed's part and ours. Arguments as :func:`rosa_ds.config.deepspeed.plan_deepspeed`.

    Raises: ValueError for what cannot work, or DeepSpeed would refuse, and for packages that are missing.
    """
    plan, settings = plan_deepspeed(command.deepspeed, command.config, ranks, gpu_has_bfloat16)
    check_by_deepspeed(plan.config)
    check_packages(plan, settings.training.tensorboard)
    return plan, settings


def warn_of(settings: RunConfig) -> None:
    """Say what was given and changes nothing, or not what is meant. Once the method is known, which ``adapter.init_from`` may decide."""
    for unused in settings_without_effect(settings):
        logger.warning("setting without effect: %s", unused, extra=SAME_ON_ALL_RANKS)
    if settings.parts.resampled and settings.training.weight_decay:
        logger.warning(
            "training.weight_decay %g shrinks what is drawn, which with method %s is a piece of the base",
            settings.training.weight_decay,
            settings.method,
            extra=SAME_ON_ALL_RANKS,
        )


def build_schedule(settings: RunConfig, steps_per_epoch: int) -> Schedule:
    """The run's steps. A method without a low-rank part has nothing to warm up."""
    training, mask = settings.training, settings.mask
    warms_up = settings.collects_gradients and settings.parts.low_rank
    schedule = Schedule(
        train_steps=training.max_steps or training.epochs * steps_per_epoch,
        mask_warmup=mask.warmup_steps if warms_up else 0,
        mask_steps=mask.steps if settings.collects_gradients else 0,
        restart=mask.after == "restart",
        lr_warmup=training.warmup_steps,
        lr_kind=training.scheduler,
        draws=settings.parts.resampled,
        draw_every=settings.draw.steps(steps_per_epoch) if settings.parts.resampled else 0,
        draw_warmup=settings.draw.warmup_steps if settings.parts.resampled else 0,
    )
    if schedule.total_steps - schedule.train_steps > schedule.train_steps:
        logger.warning(
            "%d steps find the mask and only %d train with it: lower mask.warmup_steps (%d), or train for more epochs",
            schedule.total_steps - schedule.train_steps,
            schedule.train_steps,
            mask.warmup_steps,
            extra=SAME_ON_ALL_RANKS,
        )
    if training.warmup_steps >= schedule.train_steps:
        logger.warning(
            "training.warmup_steps %d is no shorter than the %d steps of training: the learning rate never reaches its value",
            training.warmup_steps,
            schedule.train_steps,
            extra=SAME_ON_ALL_RANKS,
        )
    if schedule.draws and schedule.draw_every >= schedule.train_steps:
        logger.warning(
            "draw.every %s is no shorter than the %d steps of training: the low-rank part is drawn once, at the start",
            settings.draw.every,
            schedule.train_steps,
            extra=SAME_ON_ALL_RANKS,
        )
    return schedule
