"""The training loop: one optimizer step after another, and what happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rosa_ds import distributed
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.checkpoints import checkpoint
from rosa_ds.checkpoints.checkpoint import Checkpoint, Identity
from rosa_ds.checkpoints.saving import Progress, save_state
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import BatchPlan
from rosa_ds.data.prepare import TokenSet
from rosa_ds.memory.account import Account, Report
from rosa_ds.memory.measuring import StepMeasurement, with_activations
from rosa_ds.methods import Context, Method, Restart
from rosa_ds.models.loss import token_loss_sum
from rosa_ds.training.compiled import as_it_is
from rosa_ds.training.engine import learning_rates
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.interrupt import Interruption, end_interrupted, take_save_request
from rosa_ds.training.metrics import MetricsLog
from rosa_ds.training.schedule import Schedule, Step
from rosa_ds.utils.errors import RunError
from rosa_ds.utils.files import write_json
from rosa_ds.zero.engine import forget_order
from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 20  # in a row; halving a loss scale of 2^16 takes 16 to reach 1


@dataclasses.dataclass(frozen=True)
class Run:
    """What a loop works with; built by :mod:`rosa_ds.training.run`.

    Attributes:
        methods: what acts around steps; ``restart``: what they begin again with.
        identity: what a resumed run must have again.
        masked: padded rows have an attention mask, which the model needs.
        calls_a_pass: how often a forward pass calls the adapted layer that it calls most.
    """

    settings: RunConfig
    folder: Path
    model: PreTrainedModel
    engine: Any
    state: TrainedState
    methods: list[Method]
    restart: Restart
    schedule: Schedule
    batches: BatchPlan
    data: TokenSet
    eval_data: TokenSet | None
    pad_id: int
    masked: bool
    identity: Identity
    account: Account
    interruption: Interruption
    calls_a_pass: int = 1


class Loop:
    """Runs the steps of a :class:`Run` from ``step`` on."""

    def __init__(self, run: Run, log: MetricsLog) -> None:
        self.run, self.log = run, log
        self.step = 0
        self.trained_tokens = 0
        self._rates = learning_rates(run.settings)
        self._skipped = 0
        self._evaluation_due = True
        self._stop = False
        self._save_asked = False
        self._settled_at: int | None = None
        self._measurement: StepMeasurement | None = None
        context = Context(
            model=run.model,
            state=run.state,
            folder=run.folder,
            gradients_a_step=run.engine.gradient_accumulation_steps() * run.calls_a_pass,
            base=run.identity.base,
            record=log.write,
            leave_if_asked=self._leave_if_asked,
        )
        for method in run.methods:
            method.start(context)

    def restore(self, saved: Checkpoint, source: Path) -> None:
        """Continue from a checkpoint in ``source``: the next step is the one that the interrupted run would have done."""
        for method in self.run.methods:
            method.restore(saved, source)
        state = self.run.state
        state.write(saved.trained)
        if saved.moments:
            state.write_optimizer(saved.moments, saved.optimizer_scalars)
        state.write_scaler(saved.loss_scaler)
        state.check("after the resume")
        self.step, self.trained_tokens = saved.step, saved.trained_tokens
        self._evaluation_due = saved.evaluation_due

    def begin_with(self, start: StoredAdapter) -> None:
        """Take the parameters and the mask of an adapter instead of fresh ones."""
        for method in self.run.methods:
            method.begin_with(start)
        self.run.state.write(start.trained)
        self.run.state.check("after adapter.init_from")
        settings = self.run.settings
        logger.info("beginning with the %s adapter of %s", settings.method, settings.adapter.init_from)

    def train(self) -> None:
        """All remaining steps, with evaluations and checkpoints where the settings want them.

        Raises: InterruptedRunError once the state is saved, if a signal asked to stop.
        """
        if self._done and not self._evaluation_due:
            logger.info("all %d steps were done already", self.step)
            return
        first, begun = self.step, time.monotonic()
        if self._evaluation_due:
            self._evaluate()
            forget_order(self.run.engine)
        if not self._stop:
            for method in self.run.methods:
                method.begin(self.step)
        if self._stop:
            self._leave()
        if self._done:
            self.save()
        self._note_settled()
        schedule, hidden = self.run.schedule, None if distributed.is_main() else True
        with tqdm(total=schedule.total_steps, initial=self.step, disable=hidden, unit="step") as bar:
            while not self._done:
                step = schedule.at(self.step)
                bar.set_description(step.phase)
                self._do(step)
                if self.step == first + 1:
                    logger.info("memory after the first step: %.2f GiB", distributed.peak_memory_bytes() / 2**30)
                self._evaluate_and_save()
                bar.update()
        logger.info(
            "%d steps in %.0f s, %s trained tokens in the whole run, peak memory %.2f GiB",
            self.step - first,
            time.monotonic() - begun,
            f"{self.trained_tokens:,}",
            distributed.peak_memory_bytes() / 2**30,
        )

    def _do(self, step: Step) -> None:
        """One optimizer step with what the methods do around it."""
        methods = self.run.methods
        for method in methods:
            method.before_step(step)
        with self._measuring():
            scale, applied = self._train_step(step)
        self.step += 1
        for method in methods:
            method.after_step(step, scale, applied)
        if step.restart_after:
            self.run.restart.apply(self.run.state)
            for method in methods:
                method.restart()
        self._note_settled()

    def _train_step(self, step: Step) -> tuple[float, bool]:
        """Forward and backward of this rank's micro-batches, and the optimizer's step.

        Returns: what the loss was multiplied with, and whether the step was applied.
        """
        run, start = self.run, time.monotonic()
        ranks, rank = distributed.world_size(), distributed.rank()
        seed_step(run.settings.training.seed, step.number, rank)
        self._set_learning_rates(self._learning_rates(step))
        sequences = run.batches.step_sequences(step.data_step)
        trained_tokens = int(run.data.trained[sequences].sum())
        tokens = int(run.data.lengths[sequences].sum())
        scale = run.state.loss_scale()
        run.engine.train()
        nll = torch.zeros((), dtype=torch.float64, device=run.engine.device)
        micro_batches = run.batches.micro_batches(step.data_step, rank)
        for number, micro in enumerate(micro_batches, start=1):
            distributed.progress(f"step {step.number + 1} {step.phase}, micro-batch {number}")
            batch = run.data.batch(micro, run.pad_id, run.batches.packed, run.masked)
            measuring = self._measurement.forward(batch, number) if self._measurement else contextlib.nullcontext()
            # gradients are collected by code that a graph cannot hold
            with measuring, as_it_is() if step.phase == "collect" else contextlib.nullcontext():
                loss_sum = token_loss_sum(run.engine, batch, run.engine.device)
            # DeepSpeed averages gradients over ranks; the sum over ranks divided by all trained tokens is wanted.
            run.engine.backward(loss_sum * (ranks / trained_tokens), scale_wrt_gas=False)
            nll += loss_sum.detach().double()
            if number == len(micro_batches):
                loss = self._agree(nll) / trained_tokens
                left_out = self._leave_out(step, loss)
                if self._measurement:
                    self._measurement.gradients()
            run.engine.step()
        skipped = run.state.overflowed() or left_out
        found = run.engine.get_global_grad_norm()
        norm = None if found is None else float(found)
        self._check_finite(step, loss, norm, skipped)
        self.trained_tokens += trained_tokens
        if (step.number + 1) % run.settings.training.logging_steps == 0:
            self._log_step(step, loss, norm, tokens, time.monotonic() - start, skipped)
        return scale * ranks, not skipped

    def _agree(self, nll: Tensor) -> float:
        """The loss summed over ranks; with it, in one message, whether any rank was asked to stop or to save."""
        run = self.run
        asked = distributed.is_main() and take_save_request(run.folder)
        flags = [float(run.interruption.requested), float(asked), float(self.log.error is not None)]
        sent = distributed.send(torch.tensor(flags, dtype=torch.float64), nll.device)
        together = distributed.sum_over_ranks(torch.cat([nll[None], sent]))
        loss, stop, save, failed = together.tolist()  # the one wait for the device before the optimizer's step
        if failed:
            distributed.raise_everywhere(self.log.error)
        self._stop, self._save_asked = self._stop or stop > 0, self._save_asked or save > 0
        return loss

    def _leave_out(self, step: Step, loss: float) -> bool:
        """A step whose loss is not finite changes no parameter: gradients and learning rates of zero. float16 has its own way."""
        if math.isfinite(loss) or self.run.settings.model.dtype == "float16":
            return False
        logger.warning("step %d is left out: its loss is %s", step.number + 1, loss)
        self.run.state.drop_gradients()
        self._set_learning_rates(dict.fromkeys(self.run.state.groups, 0.0))
        return True

    def _check_finite(self, step: Step, loss: float, norm: float | None, skipped: bool) -> None:
        """Stop before a state that is not finite can be saved, and after too many steps without one in a row."""
        finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
        self._skipped = self._skipped + 1 if skipped else 0
        # float16 skips steps while it looks for its loss scale
        float16 = self.run.settings.model.dtype == "float16"
        limit = MAX_SKIPPED_STEPS if float16 else self.run.settings.training.max_bad_steps
        if 0 < self._skipped <= limit or (finite and not skipped):
            return
        newest = next(iter(checkpoint.folders(self.run.folder).found()), None)
        raise RunError(
            f"step {step.number + 1}: loss {loss}, gradient norm {norm}, {self._skipped} steps in a row left out: lower the "
            f"learning rates, or train in bf16 or fp32; the last good checkpoint is {newest or 'none'}"
        )

    def _log_step(
        self, step: Step, loss: float, norm: float | None, tokens: int, seconds: float, skipped: bool
    ) -> None:
        fields = {
            "step": step.number + 1,
            "epoch": round((step.data_step + 1) / self.run.batches.steps_per_epoch, 4),
            "phase": step.phase,
            "loss": loss if math.isfinite(loss) else None,
            "lr": self._learning_rates(step),
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": distributed.peak_memory_bytes(),
            "trained_tokens": self.trained_tokens,
        }
        self.log.write(**fields, **({"overflow": True} if skipped else {}))
        total = self.run.schedule.total_steps
        if (step.number + 1) % max(1, total // 20) == 0:
            per_second = tokens / seconds
            message = "step %d/%d %s loss %.4f, %.0f tokens/s"
            logger.info(message, step.number + 1, total, step.phase, loss, per_second)

    def _learning_rates(self, step: Step) -> dict[str, float]:
        factors = {"low_rank": step.lr_factor * step.low_rank_factor}
        return {name: self._rates[name] * factors.get(name, step.lr_factor) for name in self.run.state.groups}

    def _set_learning_rates(self, rates: dict[str, float]) -> None:
        for group in self.run.engine.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _note_settled(self) -> None:
        if self._settled_at is None and all(method.settled for method in self.run.methods):
            self._settled_at = self.step

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Account for the second step in which methods are settled: the first one still allocates and learns the order of the layers."""
        if self._settled_at is None or self.step != self._settled_at + 1:
            yield
            return
        run, self._measurement = self.run, StepMeasurement(self.run.model, self.run.engine, self.run.state)
        with self._measurement.step():
            yield
        found, self._measurement = self._measurement, None
        memory = dict(found.memory)
        for method in run.methods:
            memory |= method.measured_memory()
        account = run.account
        if found.shape is not None:
            account = with_activations(account, run.settings, run.settings.model.dtype, found.shape)
        report = Report(account, memory, found.traffic)
        logger.info("where memory and communication of rank 0 go:\n%s", report.table())
        if distributed.is_main():
            write_json(run.folder / "accounting.json", report.record())

    def _evaluate_and_save(self) -> None:
        """Evaluation and checkpoint, and the end if one was asked for."""
        settings = self.run.settings.training
        if self._done or (settings.eval_steps and self.step % settings.eval_steps == 0):
            self._evaluation_due = True
            if not self._stop:
                self._evaluate()
        if self._stop:
            self._leave()
        due = self._done or (settings.save_steps and self.step % settings.save_steps == 0)
        if due or self._save_asked:
            self.save()  # after the evaluation, so that a resumed run does not do it again
            self._save_asked = False

    def _evaluate(self) -> None:
        run, data = self.run, self.run.eval_data
        if data is None:
            self._evaluation_due = False
            return
        start = time.monotonic()
        run.engine.eval()
        batch_size = run.settings.training.eval_batch_size
        figures = evaluate(run.engine, data, batch_size, run.pad_id, self._interrupted, run.masked)
        if figures is None:
            return  # a resumed run does it again
        self._evaluation_due = False
        seconds = time.monotonic() - start
        self.log.write(step=self.step, event="eval", **figures, examples=len(data), seconds=seconds)
        shown = [f"{name} {number:.4f}" for name, number in figures.items() if not isinstance(number, dict)]
        shown += [f"{source} {loss:.4f}" for source, loss in figures.get("losses", {}).items()]
        logger.info("evaluation after step %d: %s (%.1f s)", self.step, ", ".join(shown), seconds)

    def save(self) -> None:
        """Write a checkpoint of the state between two steps."""
        run = self.run
        distributed.progress(f"checkpoint after step {self.step}")
        phase = "done" if self._done else run.schedule.at(self.step).phase
        folder, fields = save_state(
            run.folder,
            run.engine,
            run.model,
            run.state,
            [state for method in run.methods if (state := method.state()) is not None],
            Progress(self.step, phase, self.trained_tokens, self._evaluation_due),
            run.identity,
            keep=run.settings.training.keep_checkpoints,
            for_deepspeed=run.settings.checkpoint.format == "deepspeed",
        )
        for method in run.methods:
            method.saved(folder)
        self.log.write(step=self.step, event="save", **fields)

    def _leave_if_asked(self) -> None:
        if self._interrupted():
            self._leave()

    def _interrupted(self) -> bool:
        """Collective: was any rank asked to stop?"""
        self._stop = self._stop or distributed.any_rank(self.run.interruption.requested)
        return self._stop

    def _leave(self) -> None:
        self.save()
        end_interrupted(self.run.folder, self.run.interruption.received, self.step, distributed.is_main())

    @property
    def _done(self) -> bool:
        return self.step >= self.run.schedule.total_steps


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every random stream for one step. Dropout then depends on (seed, step, rank), so nothing of it has to be saved."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
