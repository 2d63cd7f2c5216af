"""The training loop: one optimizer step after another, and what happens between them."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.mask import Mask, MaskCollector, save_mask, set_mask
from rosa_ds.adapters.state import StoredAdapter
from rosa_ds.checkpoints import checkpoint
from rosa_ds.checkpoints.checkpoint import Checkpoint, SavedBase
from rosa_ds.checkpoints.saving import save_state
from rosa_ds.memory.estimate import DRAWING
from rosa_ds.memory.measuring import Measurement, note_collected, peak_of
from rosa_ds.methods.sparse import build_collector, fix_mask
from rosa_ds.methods.subspace import describe_draw
from rosa_ds.models.loss import accepts_kept_positions, token_loss_sum
from rosa_ds.training.context import Run, seed_step
from rosa_ds.training.engine import learning_rates
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.interrupt import end_interrupted, take_save_request
from rosa_ds.training.metrics import MetricsLog
from rosa_ds.training.schedule import Step
from rosa_ds.utils.errors import RunError
from rosa_ds.utils.files import write_json

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 20  # in a row; halving a loss scale of 2^16 takes 16 to reach 1


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
        self._evaluation_due = True
        self._stop = False
        self._settled_at: int | None = None
        self._save_asked = False
        self._measurement: Measurement | None = None

    def train(self) -> None:
        """All remaining steps, with evaluations and checkpoints where the settings want them.

        Raises: InterruptedRunError once the state is saved, if a signal asked to stop.
        """
        if self._done and not self._evaluation_due:
            logger.info("all %d steps were done already", self.step)
            return
        first, begun = self.step, time.monotonic()
        self._begin()
        for step in self._steps():
            if step.draw is not None:
                self._draw(step.draw)
            measures = self._settled_at is not None and self.step == self._settled_at + 1
            self._measured_step(step) if measures else self._train_step(step)
            self.step += 1
            if step.mask_after:
                self._finish_collecting(step)
            if self.step == first + 1:
                logger.info("memory after the first step: %.2f GiB", distributed.peak_memory_bytes() / 2**30)
            self._after_step()
        logger.info(
            "%d steps in %.0f s, %s trained tokens in the whole run, peak memory %.2f GiB",
            self.step - first,
            time.monotonic() - begun,
            f"{self.trained_tokens:,}",
            distributed.peak_memory_bytes() / 2**30,
        )

    def _begin(self) -> None:
        """What comes before the first step, or was still due when the run was interrupted."""
        if self._evaluation_due:
            self._evaluate()
        static = self.run.settings.parts.sparse and self.run.schedule.mask_steps == 0
        if static and not self._mask_known and not self._stop:
            self._fix_mask(None)
        if self._stop:
            self._leave()
        if self._done:
            self.save()
        if self._mask_known:
            self._settled_at = self.step

    def _after_step(self) -> None:
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

    @property
    def _mask_known(self) -> bool:
        return all(layer.mask_known for layer in self.layers.values() if layer.entries)

    def _leave(self) -> None:
        self.save()
        end_interrupted(self.run.folder, self.run.interruption.received, self.step, distributed.is_main())

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
        """The second step with the mask known: the first one still allocates and learns the order of the layers."""
        run, self._measurement = self.run, Measurement(self.run)
        with self._measurement.step():
            self._train_step(step)
        found, self._measurement = self._measurement, None
        report = found.report()
        logger.info("where memory and communication of rank 0 go:\n%s", report.table())
        if distributed.is_main():
            write_json(run.folder / "accounting.json", report.record())

    def _train_step(self, step: Step) -> None:
        run, start = self.run, time.monotonic()
        ranks, rank = distributed.world_size(), distributed.rank()
        seed_step(run.settings.training.seed, step.number, rank)
        self._set_learning_rates(step)
        if step.phase == "collect" and self.collector is None:
            self._begin_collecting()
        indices = run.batches.step_indices(step.data_step)
        trained_tokens = int(run.data.trained[indices[indices >= 0]].sum())
        tokens = int(run.data.lengths[indices[indices >= 0]].sum())
        scale = run.state.loss_scale()
        run.engine.train()
        nll = torch.zeros((), dtype=torch.float64, device=run.engine.device)
        micro_batches = run.batches.micro_batches(step.data_step, rank)
        for number, micro in enumerate(micro_batches, start=1):
            distributed.progress(f"step {step.number + 1} {step.phase}, micro-batch {number}")
            batch = run.data.batch(micro, run.pad_id)
            with self._measurement.forward(batch, number) if self._measurement else contextlib.nullcontext():
                loss_sum = token_loss_sum(run.engine, batch, run.engine.device, self._selects)
            # DeepSpeed averages gradients over ranks; the sum over ranks divided by all trained tokens is wanted.
            run.engine.backward(loss_sum * (ranks / trained_tokens), scale_wrt_gas=False)
            nll += loss_sum.detach().double()
            if number == len(micro_batches):
                loss = self._agree(nll) / trained_tokens
                left_out = self._leave_out(step, loss)
                if self._measurement:
                    self._measurement.gradients()
            run.engine.step()
        skipped = run.state.overflowed()
        if self.collector is not None:
            note_collected(run, self.collector.tensors())
            self.collector.end_step(scale * ranks, valid=not skipped and not left_out)
        self._check_finite(step, loss, skipped or left_out)
        self.trained_tokens += trained_tokens
        self._log_step(step, loss, tokens, time.monotonic() - start, skipped or left_out)

    def _agree(self, nll: Tensor) -> float:
        """The loss summed over ranks; with it, in one message, whether any rank was asked to stop or to save."""
        run = self.run
        asked = distributed.is_main() and take_save_request(run.folder)
        flags = [float(run.interruption.requested), float(asked), float(self.log.error is not None)]
        together = distributed.sum_over_ranks(
            torch.tensor([float(nll), *flags], dtype=torch.float64, device=nll.device)
        )
        loss, stop, save, failed = together.tolist()
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
        self._set_learning_rates(None)
        return True

    def _check_finite(self, step: Step, loss: float, skipped: bool) -> None:
        """Stop before a state that is not finite can be saved, and after too many steps without one in a row."""
        norm = self.run.engine.get_global_grad_norm()
        finite = math.isfinite(loss) and (norm is None or math.isfinite(float(norm)))
        self._skipped = self._skipped + 1 if skipped else 0
        # float16 skips steps while it looks for its loss scale
        limit = (
            MAX_SKIPPED_STEPS
            if self.run.settings.model.dtype == "float16"
            else self.run.settings.training.max_bad_steps
        )
        if 0 < self._skipped <= limit or (finite and not skipped):
            return
        newest = next(iter(checkpoint.folders(self.run.folder).found()), None)
        raise RunError(
            f"step {step.number + 1}: loss {loss}, gradient norm {norm}, {self._skipped} steps in a row left out: lower the "
            f"learning rates, or train in bf16 or fp32; the last good checkpoint is {newest or 'none'}"
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
            "lr": self._learning_rates(step),
            "grad_norm": float(norm) if norm is not None and math.isfinite(float(norm)) else None,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": distributed.peak_memory_bytes(),
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

    def _learning_rates(self, step: Step) -> dict[str, float]:
        factors = {"low_rank": step.lr_factor * step.low_rank_factor}
        return {name: self._rates[name] * factors.get(name, step.lr_factor) for name in self.run.state.groups}

    def _set_learning_rates(self, step: Step | None) -> None:
        """Those of a step; ``None``: zero."""
        rates = self._learning_rates(step) if step is not None else dict.fromkeys(self.run.state.groups, 0.0)
        for group in self.run.engine.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _begin_collecting(self) -> None:
        self.collector = build_collector(
            self.layers, self.run.settings.mask, self.run.engine.gradient_accumulation_steps()
        )
        self.collector.attach()

    def _finish_collecting(self, step: Step) -> None:
        assert self.collector is not None
        self.collector.detach()
        self._fix_mask(self.collector)
        self.collector, self._settled_at = None, self.step
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
        source = self._mask_source
        self.log.write(step=self.step, event="mask", source=source, entries=entries, layers=layers, seconds=seconds)
        logger.info("mask (%s): %s entries in %d layers, %.1f s", source, f"{entries:,}", layers, seconds)

    @property
    def _mask_source(self) -> str:
        """A score, or the folder or file that the positions came from."""
        settings = self.run.settings
        return settings.mask.load or settings.adapter.init_from or settings.mask.score

    def _write_mask(self, mask: Mask) -> None:
        """The first rank has it."""
        with distributed.together():
            if distributed.is_main():
                origin = {"score": self._mask_source, "base": self.run.base["hash"]}
                save_mask(mask, self.run.folder / "mask.safetensors", origin)

    def _restart(self) -> None:
        """Back to the beginning with the mask known: fresh A, B and values, the base's own modules, an empty optimizer."""
        state = self.run.state
        for name, own in self.run.whole_at_start.items():
            state.write({name: zero.whole_of(state.parameters[name], own)})
        for name, layer in self.layers.items():
            state.write({f"{name}.{part}": tensor for part, tensor in layer.initial_parameters().items()})
        self.run.state.reset_optimizer(self.run.state.groups)

    def _draw(self, number: int) -> None:
        """Draw the low-rank part again, unless the run was asked to stop: a resumed one then makes the same draw."""
        if self._interrupted():
            self._leave()
        assert self.run.drawing is not None
        with peak_of(self.run, DRAWING) if DRAWING not in self.run.held else contextlib.nullcontext():
            fields = self.run.drawing.draw(number)
        self.log.write(step=self.step, event="draw", **fields)
        logger.info(
            "draw %d before step %d: %s", number, self.step + 1, describe_draw(fields, self.run.settings.draw.moments)
        )

    def _evaluate(self) -> None:
        run, data = self.run, self.run.eval_data
        if data is None:
            self._evaluation_due = False
            return
        start = time.monotonic()
        run.engine.eval()
        batch_size = run.settings.training.eval_batch_size
        figures = evaluate(run.engine, data, batch_size, run.pad_id, self._selects, self._interrupted)
        if figures is None:
            return  # a resumed run does it again
        self._evaluation_due = False
        seconds = time.monotonic() - start
        self.log.write(step=self.step, event="eval", **figures, examples=len(data), seconds=seconds)
        shown = ", ".join(f"{name} {number:.4f}" for name, number in figures.items())
        logger.info("evaluation after step %d: %s (%.1f s)", self.step, shown, seconds)

    def _interrupted(self) -> bool:
        """Collective: was any rank asked to stop?"""
        self._stop = self._stop or distributed.any_rank(self.run.interruption.requested)
        return self._stop

    def save(self) -> None:
        """Write a checkpoint of the state between two steps."""
        distributed.progress(f"checkpoint after step {self.step}")
        fields = save_state(
            self.run,
            step=self.step,
            trained_tokens=self.trained_tokens,
            evaluation_due=self._evaluation_due,
            collector=self.collector,
        )
        self.log.write(step=self.step, event="save", **fields)

    def begin_with(self, start: StoredAdapter) -> None:
        """Take the numbers and the mask of an adapter instead of fresh ones."""
        if start.positions:
            set_mask(self.run.model, start.positions)
            with distributed.together():
                self._write_mask(dict(start.positions) if distributed.is_main() else {})
        self.run.state.write(start.trained)
        logger.info(
            "beginning with the %s adapter of %s", self.run.settings.method, self.run.settings.adapter.init_from
        )

    def restore(self, saved: Checkpoint, source: Path) -> None:
        """Continue from a checkpoint in ``source``: the next step is the one that the interrupted run would have done."""
        run = self.run
        if run.drawing is not None and run.schedule.has_drawn(saved.step):
            run.drawing.base.restore(saved.base_changes, saved.drift, SavedBase.of(source))
        if saved.positions:
            set_mask(run.model, saved.positions)
            with distributed.together():
                self._write_mask(dict(saved.positions) if distributed.is_main() else {})
        run.state.write(saved.trained)
        if saved.moments:
            run.state.write_optimizer(saved.moments, saved.optimizer_scalars)
        run.state.write_scaler(saved.loss_scaler)
        self.step, self.trained_tokens = saved.step, saved.trained_tokens
        self._evaluation_due = saved.evaluation_due
        if not self._done and run.schedule.at(self.step).phase == "collect" and saved.collected_steps:
            self._begin_collecting()
            assert self.collector is not None
            self.collector.restore(saved.collected, saved.collected_steps)
