"""What each step of a run does, as a pure function of the step's number."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Phase = Literal["warmup", "collect", "train"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step.

    ``phase``: what it does. ``data_step``: the number of its batch since the data order began. ``lr_factor``: every
    group's learning rate is its base rate times this. ``mask_after``: the mask is chosen when it is done.
    ``restart_after``: low-rank part, optimizer and data order then begin again. ``draw``: the number of the draw that is
    made before it. ``low_rank_factor``: that of ``A`` and ``B``, which grows again after a draw.
    """

    number: int
    phase: Phase
    data_step: int
    lr_factor: float
    mask_after: bool = False
    restart_after: bool = False
    draw: int | None = None
    low_rank_factor: float = 1.0


def lr_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """Linear growth over ``warmup`` steps, then linear, cosine or no decay to step ``total``; always in [0, 1]."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The whole run: ``warmup`` and ``collect`` steps before the mask, ``train`` steps in all after a restart.

    Without a mask to compute, ``mask_warmup`` and ``mask_steps`` are 0. With ``restart`` the run has
    ``mask_warmup + mask_steps + train_steps`` steps; without, the mask is chosen on the way through ``train_steps``.

    With ``draws`` the low-rank part is drawn before the first step, after a restart, and where ``draw_every`` is not 0
    every so many steps again; before a restart it is LoRA's, so that the base is as it was. After each draw but the first
    the learning rate of ``A`` and ``B`` grows over ``draw_warmup`` steps.
    """

    train_steps: int
    mask_warmup: int
    mask_steps: int
    restart: bool
    lr_warmup: int
    lr_kind: str
    draws: bool = False
    draw_every: int = 0
    draw_warmup: int = 0

    def __post_init__(self) -> None:
        if self.draw_every and self.draw_warmup >= self.draw_every:
            raise ValueError(
                f"draw.warmup_steps {self.draw_warmup} does not end before the next draw, after {self.draw_every} steps: lower it"
            )
        if self.mask_steps and not self.restart and self._before >= self.train_steps:
            raise ValueError(
                f"mask.warmup_steps + mask.steps = {self._before} leave no step of {self.train_steps} to train the sparse "
                "part with mask.after continue: lower them, train longer, or use mask.after restart"
            )

    @property
    def _before(self) -> int:
        return self.mask_warmup + self.mask_steps

    @property
    def total_steps(self) -> int:
        return self._before + self.train_steps if self.restart and self.mask_steps else self.train_steps

    def at(self, number: int) -> Step:
        """Step ``number``, from 0 to ``total_steps - 1``."""
        if not 0 <= number < self.total_steps:
            raise ValueError(f"step {number} of a run of {self.total_steps} steps")
        before = self._before if self.mask_steps else 0
        restarts = self.restart and before > 0
        begun = number - before if restarts and number >= before else number
        if number >= before:
            phase: Phase = "train"
        else:
            phase = "warmup" if number < self.mask_warmup else "collect"
        last_of_collect = before > 0 and number == before - 1
        # Before a restart the schedule is that of a run which is long enough for the steps before the mask.
        total = max(self.train_steps, before) if restarts and number < before else self.train_steps
        factor = lr_factor(begun, total, self.lr_warmup, self.lr_kind)
        draw, low_rank_factor = (None, 1.0) if restarts and number < before else self._draw(begun)
        return Step(number, phase, begun, factor, last_of_collect, last_of_collect and restarts, draw, low_rank_factor)

    def _draw(self, begun: int) -> tuple[int | None, float]:
        """The draw before a step, counted from the beginning or the restart, and the factor that the last draw leaves."""
        if not self.draws:
            return None, 1.0
        number, since = divmod(begun, self.draw_every) if self.draw_every else (0, begun)
        grows = number > 0 and since < self.draw_warmup
        return number if since == 0 else None, (since + 1) / (self.draw_warmup + 1) if grows else 1.0

    def has_drawn(self, number: int) -> bool:
        """Whether there was a draw before the state between step ``number - 1`` and step ``number``."""
        return self.draws and number > (self._before if self.restart and self.mask_steps else 0)
