"""The training loop: one optimizer step after another, and what happens between them."""

from __future__ import annotations

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
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.mask import Mask, MaskCollector, save_mask, set_mask
from rosa_ds.adapters.state import positions_of
from rosa_ds.config import SPARSE_METHODS, RunConfig
from rosa_ds.data.batches import BatchPlan, load_batch
from rosa_ds.data.prepare import TokenSet
from rosa_ds.errors import RunError
from rosa_ds.files import write_json
from rosa_ds.training import checkpoint
from rosa_ds.training.accounting import Account, measure_memory, measured_traffic, table
from rosa_ds.training.checkpoint import Checkpoint
from rosa_ds.training.engine import learning_rates
from rosa_ds.training.evaluate import evaluate_loss
from rosa_ds.training.loss import accepts_kept_positions, token_loss_sum
from rosa_ds.training.masking import build_collector, fix_mask
from rosa_ds.training.metrics import MetricsLog, peak_memory_bytes
from rosa_ds.training.schedule import Schedule, Step
from rosa_ds.training.trained_state import TrainedState

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 20  # in a row; halving a loss scale of 2^16 takes 16 to reach 1


@dataclasses.dataclass
class Run:
    """Everything that a loop works with; built by :mod:`rosa_ds.training.run`."""

    settings: RunConfig
    folder: Path
    model: PreTrainedModel
    engine: Any
    state: TrainedState
    schedule: Schedule
    batches: BatchPlan
    data: TokenSet
    data_digest: str
    eval_data: TokenSet | None
    pad_id: int
    base: dict[str, Any]
    account: Account
    record: dict[str, Any]
    """The resolved settings and what the DeepSpeed file adds to them: a resumed run must have the same."""
    whole_at_start: dict[str, Tensor]
    """Numbers of the modules that are trained whole, as the base has them: a restart goes back to them."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every random stream for one step. Dropout then depends on (seed, step, rank), so nothing of it has to be saved."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


class Loop:
    """Runs the steps of a :class:`Run` from ``step`` on."""

    def __init__(self, run: Run, log: MetricsLog) -> None:
        self.run, self.log = run, log
        self.layers = adapted_layers(run.model)
        self.step = 0
        self.trained_tokens = 0
        self.collector: MaskCollector | None = None
        self._selects = accepts_kept_positions(run.model)
        self._rates = learning_rates(run.settings)
        self._skipped = 0

    def train(self) -> None:
        """All remaining steps, with evaluations and checkpoints where the settings want them."""
        settings = self.run.settings.training
        if self._done:
            logger.info("all %d steps were done already", self.step)
            return
        if self.step == 0:
            self._evaluate()
            if self.run.settings.method in SPARSE_METHODS and self.run.schedule.mask_steps == 0:
                self._fix_mask(None)
        first, begun = self.step, time.monotonic()
        for step in self._steps():
            self._measured_step(step) if self.step == first + 1 else self._train_step(step)
            self.step += 1
            if step.mask_after:
                self._finish_collecting(step)
            if self.step == first + 1:
                logger.info("memory after the first step: %.2f GiB", peak_memory_bytes() / 2**30)
            if self._done or (settings.eval_steps and self.step % settings.eval_steps == 0):
                self._evaluate()
            if self._done or (settings.save_steps and self.step % settings.save_steps == 0):
                self.save()  # after the evaluation, so that a resumed run does not do it again
        logger.info(
            "%d steps in %.0f s, %s trained tokens in the whole run, peak memory %.2f GiB",
            *(self.step - first, time.monotonic() - begun),
            *(f"{self.trained_tokens:,}", peak_memory_bytes() / 2**30),
        )

    @property
    def _done(self) -> bool:
        return self.step >= self.run.schedule.total_steps

    def _steps(self) -> Iterator[Step]:
        total = self.run.schedule.total_steps
        with tqdm(total=total, initial=self.step, disable=None if distributed.is_main() else True, unit="step") as bar:
            while not self._done:
                step = self.run.schedule.at(self.step)
                bar.set_description(step.phase)
                yield step
                bar.update()

    def _measured_step(self, step: Step) -> None:
        """The second step of a run: the first one still allocates and learns the order of the layers."""
        run = self.run
        with distributed.TrafficCounter() as counter:
            self._train_step(step)
        memory, traffic = measure_memory(run.model, run.state), measured_traffic(counter)
        logger.info("where memory and communication of rank 0 go:\n%s", table(run.account, memory, traffic))
        if distributed.is_main():
            content = {"predicted": dataclasses.asdict(run.account), "measured": {"memory": memory, "traffic": traffic}}
            write_json(run.folder / "accounting.json", content)

    def _train_step(self, step: Step) -> None:
        run, start = self.run, time.monotonic()
        ranks, rank = distributed.world_size(), distributed.rank()
        seed_step(run.settings.training.seed, step.number, rank)
        self._set_learning_rates(step.lr_factor)
        if step.phase == "collect" and self.collector is None:
            self._begin_collecting()
        indices = run.batches.step_indices(step.data_step)
        trained_tokens = int(run.data.trained[indices[indices >= 0]].sum())
        tokens = int(run.data.lengths[indices[indices >= 0]].sum())
        scale = run.state.loss_scale()
        run.engine.train()
        nll = torch.zeros((), dtype=torch.float64, device=run.engine.device)
        for number, micro in enumerate(run.batches.micro_batches(step.data_step, rank)):
            distributed.progress(f"step {step.number + 1} {step.phase}, micro-batch {number + 1}")
            loss_sum = token_loss_sum(
                run.engine, load_batch(run.data, micro, run.pad_id), run.engine.device, self._selects
            )
            # DeepSpeed averages gradients over ranks; the sum over ranks divided by all trained tokens is wanted.
            run.engine.backward(loss_sum * (ranks / trained_tokens), scale_wrt_gas=False)
            run.engine.step()
            nll += loss_sum.detach().double()
        loss = float(distributed.sum_over_ranks(nll)) / trained_tokens
        skipped = run.state.overflowed()
        if self.collector is not None:
            self.collector.end_step(scale * ranks, valid=not skipped)
        self._check_finite(step, loss, skipped)
        self.trained_tokens += trained_tokens
        self._log_step(step, loss, tokens, time.monotonic() - start, skipped)

    def _check_finite(self, step: Step, loss: float, skipped: bool) -> None:
        """Stop before a state that is not finite can be saved; float16 may skip steps while it looks for its loss scale."""
        norm = self.run.engine.get_global_grad_norm()
        finite = math.isfinite(loss) and (norm is None or math.isfinite(float(norm)))
        self._skipped = self._skipped + 1 if skipped else 0
        searching = self.run.settings.model.dtype == "float16" and 0 < self._skipped <= MAX_SKIPPED_STEPS
        if searching or (finite and not skipped):
            return
        raise RunError(
            f"step {step.number + 1}: loss {loss}, gradient norm {norm}, {self._skipped} steps skipped: lower the learning rates, or "
            f"train in bf16 or fp32; the checkpoints in {self.run.folder} are from before"
        )

    def _log_step(self, step: Step, loss: float, tokens: int, seconds: float, skipped: bool) -> None:
        settings = self.run.settings.training
        if (step.number + 1) % settings.logging_steps:
            return
        norm = self.run.engine.get_global_grad_norm()
        fields = {
            "step": step.number + 1,
            "epoch": round((step.data_step + 1) / self.run.batches.steps_per_epoch, 4),
            "phase": step.phase,
            "loss": loss if math.isfinite(loss) else None,
            "lr": {name: self._rates[name] * step.lr_factor for name in self.run.state.groups},
            "grad_norm": float(norm) if norm is not None and math.isfinite(float(norm)) else None,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "trained_tokens": self.trained_tokens,
        }
        self.log.write(**fields, **({"overflow": True} if skipped else {}))
        if (step.number + 1) % max(1, self.run.schedule.total_steps // 20) == 0:
            logger.info(
                "step %d/%d %s loss %.4f, %.0f tokens/s",
                step.number + 1,
                self.run.schedule.total_steps,
                step.phase,
                loss,
                tokens / seconds,
            )

    def _set_learning_rates(self, factor: float) -> None:
        for group in self.run.engine.optimizer.param_groups:
            group["lr"] = self._rates[group["name"]] * factor

    def _begin_collecting(self) -> None:
        self.collector = build_collector(
            self.layers, self.run.settings.mask, self.run.engine.gradient_accumulation_steps()
        )
        self.collector.attach()

    def _finish_collecting(self, step: Step) -> None:
        assert self.collector is not None
        self.collector.detach()
        self._fix_mask(self.collector)
        self.collector = None
        if step.restart_after:
            self._restart()
        else:
            self.run.state.reset_optimizer(["sparse"])  # its step count ran while the values slept

    def _fix_mask(self, collector: MaskCollector | None) -> None:
        """Choose the positions, give them to the layers and write ``mask.safetensors``."""
        start, settings = time.monotonic(), self.run.settings
        mask = fix_mask(self.layers, settings.mask, settings.training.seed, collector)
        self._write_mask(mask)
        entries = sum(layer.entries for layer in self.layers.values())
        layers = sum(layer.entries > 0 for layer in self.layers.values())
        seconds = time.monotonic() - start
        source = settings.mask.load or settings.mask.score
        self.log.write(step=self.step, event="mask", source=source, entries=entries, layers=layers, seconds=seconds)
        logger.info("mask (%s): %s entries in %d layers, %.1f s", source, f"{entries:,}", layers, seconds)

    def _write_mask(self, mask: Mask) -> None:
        """The first rank has it."""
        with distributed.together():
            if distributed.is_main():
                origin = {"score": self.run.settings.mask.score, "base": self.run.base["hash"]}
                save_mask(mask, self.run.folder / "mask.safetensors", origin)

    def _restart(self) -> None:
        """Back to the beginning with the mask known: fresh A, B and values, the base's own modules, an empty optimizer."""
        fresh = dict(self.run.whole_at_start)
        for name, layer in self.layers.items():
            fresh |= {f"{name}.{part}": tensor for part, tensor in layer.initial_parameters().items()}
        self.run.state.write(fresh)
        self.run.state.reset_optimizer(self.run.state.groups)

    def _evaluate(self) -> None:
        run, data = self.run, self.run.eval_data
        if data is None:
            return
        start = time.monotonic()
        run.engine.eval()
        loss = evaluate_loss(run.engine, data, run.settings.training.eval_batch_size, run.pad_id, self._selects)
        seconds = time.monotonic() - start
        self.log.write(step=self.step, event="eval", loss=loss, examples=len(data), seconds=seconds)
        logger.info("evaluation loss after step %d: %.4f (%.1f s)", self.step, loss, seconds)

    def save(self) -> None:
        """Write a checkpoint of the state between two steps."""
        distributed.progress(f"checkpoint after step {self.step}")
        run = self.run
        moments, scalars = run.state.read_optimizer()
        state = Checkpoint(
            step=self.step,
            trained=run.state.read(),
            moments=moments,
            positions=positions_of(run.model),
            collected=self.collector.totals if self.collector else {},
            collected_steps=self.collector.steps if self.collector else 0,
            optimizer_scalars=scalars,
            loss_scaler=run.state.read_scaler(),
            trained_tokens=self.trained_tokens,
            config=run.record,
            batch_size=run.batches.batch_size,
            base=run.base,
            data=run.data_digest,
        )
        folder, size, seconds = checkpoint.save(run.folder, state, run.settings.training.keep_checkpoints)
        self.log.write(step=self.step, event="save", folder=folder.name, bytes=size, seconds=seconds)
        logger.info("saved %s: %.1f MiB, %.1f s", folder, size / 2**20, seconds)

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: the next step is the one that the interrupted run would have done."""
        run = self.run
        if saved.positions:
            set_mask(run.model, saved.positions)
            self._write_mask(dict(saved.positions))
        run.state.write(saved.trained)
        if saved.moments:
            run.state.write_optimizer(saved.moments, saved.optimizer_scalars)
        run.state.write_scaler(saved.loss_scaler)
        self.step, self.trained_tokens = saved.step, saved.trained_tokens
        if not self._done and run.schedule.at(self.step).phase == "collect" and saved.collected_steps:
            self._begin_collecting()
            assert self.collector is not None
            self.collector.restore(saved.collected, saved.collected_steps)
