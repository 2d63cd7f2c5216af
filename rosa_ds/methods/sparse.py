"""RoSA's mask in a run: gradients are collected, positions chosen by one owner a layer, and training begins with them.

Each layer's gradient is summed over the ranks onto its owner, which chooses its positions and sends them to all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.mask import Mask, MaskCollector, check_mask, open_mask, save_mask, set_mask, static_positions
from rosa_ds.checkpoints.checkpoint import Checkpoint, MethodState
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.mask_scores import RANKINGS
from rosa_ds.config.schema import MaskSettings, RunConfig
from rosa_ds.memory.account import Term
from rosa_ds.methods import method
from rosa_ds.utils.files import file_hash
from rosa_kernels.gradient import BLOCK_BYTES, TOKENS_AT_ONCE, block_rows

if TYPE_CHECKING:
    from rosa_ds.adapters.stored import StoredAdapter
    from rosa_ds.training.schedule import Schedule, Step

logger = logging.getLogger(__name__)
COLLECTED, COLLECTING = "collected gradients", "collect, at once"
PLANS = "plans of masks"
PLAN_BYTES = 8
"""Of an entry on a GPU, about: two 32-bit indices."""


class Method(method.Method):
    """The phases of a sparse part: its mask is loaded, chosen at once, or from gradients of the first steps."""

    def __init__(self, model: nn.Module, settings: RunConfig, schedule: Schedule) -> None:
        super().__init__(model, settings, schedule)
        self.layers = {name: layer for name, layer in adapted_layers(model).items() if layer.entries}
        self.collector: MaskCollector | None = None
        self._collected_bytes = 0

    @property
    def settled(self) -> bool:
        return all(layer.mask_known for layer in self.layers.values())

    def restore(self, saved: Checkpoint, source: Path) -> None:
        self._take(saved.positions)
        collects = saved.step < self.schedule.total_steps and self.schedule.at(saved.step).phase == "collect"
        if collects and saved.collected_steps:
            self.collector = self._start_collecting()
            self.collector.restore(saved.collected, saved.collected_steps)

    def begin_with(self, start: StoredAdapter) -> None:
        self._take(start.positions)

    def _take(self, positions: Mapping[str, Tensor]) -> None:
        """Give the layers a mask that is known, and write it to the run's folder."""
        if positions:
            set_mask(self.model, positions)
            with distributed.together():
                self._write(dict(positions) if distributed.is_main() else {})

    def begin(self, step: int) -> None:
        if self.schedule.mask_steps == 0 and not self.settled:
            self._choose_mask(step)

    def before_step(self, step: Step) -> None:
        if step.phase == "collect" and self.collector is None:
            self.collector = self._start_collecting()

    def _start_collecting(self) -> MaskCollector:
        collector = build_collector(self.layers, self.settings.mask, self.context.gradients_a_step)
        collector.attach()
        return collector

    def after_step(self, step: Step, scale: float, applied: bool) -> None:
        if self.collector is not None:
            kept = sum(tensor.nbytes for tensor in self.collector.tensors())
            self._collected_bytes = max(self._collected_bytes, kept)
            self.collector.end_step(scale, valid=applied)
        if step.mask_after:
            assert self.collector is not None
            self.collector.detach()
            self._choose_mask(step.number + 1)
            self.collector = None
            if not step.restart_after:
                self.context.state.reset_optimizer(["sparse"])  # its step count ran while the values slept

    def _choose_mask(self, step: int) -> None:
        """Choose the positions, give them to the layers and write ``mask.safetensors``."""
        start = time.monotonic()
        mask = fix_mask(self.layers, self.settings.mask, self.settings.training.seed, self.collector)
        self._write(mask)
        entries = sum(layer.entries for layer in self.layers.values())
        seconds = time.monotonic() - start
        self.context.record(
            step=step, event="mask", source=self._source, entries=entries, layers=len(self.layers), seconds=seconds
        )
        logger.info(
            "mask (%s): %s entries in %d layers, %.1f s", self._source, f"{entries:,}", len(self.layers), seconds
        )

    @property
    def _source(self) -> str:
        """A score, or the folder or file that the positions came from."""
        return self.settings.mask.load or self.settings.adapter.init_from or self.settings.mask.score

    def _write(self, mask: Mask) -> None:
        """The first rank has it."""
        with distributed.together():
            if distributed.is_main():
                origin = {"score": self._source, "base": self.context.base["hash"]}
                save_mask(mask, self.context.folder / "mask.safetensors", origin)

    def state(self) -> MethodState | None:
        if self.collector is None:
            return None
        fields = {"collected": self.collector.totals, "collected_steps": self.collector.steps}
        return MethodState(fields, not_for_deepspeed="sums of gradients while they are collected")

    def measured_memory(self) -> dict[str, int]:
        plans = [layer.plan for layer in self.layers.values() if layer.plan is not None]
        tensors = [leaf for plan in plans for leaf in tree_leaves(vars(plan)) if torch.is_tensor(leaf) and leaf.numel()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found = {PLANS: sum(storages.values()), COLLECTED: self._collected_bytes}
        return {name: size for name, size in found.items() if size}

    @staticmethod
    def memory_terms(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int, gpu: bool) -> list[Term]:
        layers = {name: layer for name, layer in adapted_layers(model).items() if layer.entries}
        terms = [Term(PLANS, sum(_plan_bytes(layer, gpu) for layer in layers.values()))]
        if settings.collects_gradients and layers:
            kept, at_once = _collect_bytes(layers, plan, settings, ranks)
            remedy = "--mask.device_memory_gib 0 sums gradients on the host"
            terms += [
                Term(COLLECTED, kept, "in some steps", may_leave=True, remedy=remedy),
                Term(COLLECTING, at_once, "in some steps", remedy=remedy),
            ]
        return terms


def check_mask_file(path: Path, output: Path) -> None:
    """Raise ValueError unless the file is a mask, and outside the folder that a new run moves aside."""
    open_mask(path).close()
    if path.resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"mask.load {path} lies in training.output_dir {output}, which a new run moves aside: give another "
            "training.output_dir, or copy the mask elsewhere"
        )


def check_loaded_mask(path: Path, model: nn.Module) -> None:
    """Raise ValueError unless the mask of a file fits the adapted model."""
    mask = open_mask(path)
    try:
        check_mask({name: layer for name, layer in adapted_layers(model).items() if layer.entries}, mask)
    except ValueError as error:
        raise ValueError(
            f"mask.load {path}: {error}; it fits runs with the base, adapter.target_modules and adapter.density that it was made with"
        ) from None
    finally:
        mask.close()


def fix_mask(
    layers: Mapping[str, AdaptedLinear], settings: MaskSettings, seed: int, collector: MaskCollector | None
) -> Mask:
    """Give every layer with a sparse part its positions: loaded, or chosen by each layer's owner and sent to all.

    One layer's positions at a time are whole on every rank.

    Returns: the mask on the CPU of the first rank; nothing on the others.
    Raises:
        ValueError: on the rank where it happened, with the layer; the others raise too.
    """
    sparse = {name: layer for name, layer in layers.items() if layer.entries}
    chosen = _load(sparse, settings.load) if settings.load is not None else _choose(sparse, settings, seed, collector)
    kept: Mask = {}
    digest = hashlib.sha256()
    for name, positions in chosen:
        distributed.progress(f"mask of {name}")
        sparse[name].set_positions(positions)
        digest.update(name.encode() + positions.cpu().numpy().tobytes())
        if distributed.is_main():
            kept[sparse[name].weight_name] = positions.cpu()
    if not distributed.same_everywhere(digest.digest()):
        raise RuntimeError("the ranks have different masks: a broadcast went wrong; please report this")
    return kept


def _load(layers: Mapping[str, AdaptedLinear], path: str) -> Iterator[tuple[str, Tensor]]:
    """Positions of each layer from a file that is the same on all hosts."""
    with distributed.together():
        mask = open_mask(Path(path))
        check_mask(layers, mask)
    if not distributed.same_everywhere(file_hash(Path(path)).encode()):
        raise ValueError(f"the ranks read different masks from {path}: give a file that all hosts share")
    with contextlib.closing(mask):
        for name, layer in layers.items():
            yield name, mask[layer.weight_name]


def _choose(
    layers: Mapping[str, AdaptedLinear], settings: MaskSettings, seed: int, collector: MaskCollector | None
) -> Iterator[tuple[str, Tensor]]:
    """Positions of each layer: chosen by its owner, then sent to all, one layer after another."""
    owners = mask_owners(layers)
    owned: Mask = {}
    error: Exception | None = None
    for name, layer in layers.items():
        distributed.progress(f"choosing the mask of {name}")
        weight: Tensor = layer.weight
        if RANKINGS[settings.score].weight:  # all of the base, with what a draw has split off it
            A, B = (None if part is None or not layer.drawn else zero.read_whole(part) for part in (layer.A, layer.B))
            weight = layer.undrawn(layer.whole_weight(), A, B)
        try:
            if owners[name] == distributed.rank() and error is None:
                chosen = (
                    collector.positions(name, weight)
                    if collector
                    else static_positions(settings.score, layer, weight, seed)
                )
                owned[name] = chosen
        except Exception as problem:
            error = problem
    distributed.raise_everywhere(error)
    for name, layer in layers.items():
        positions = owned.pop(name, None)
        if positions is None:
            positions = torch.empty(layer.entries, dtype=torch.int32)
        yield name, distributed.broadcast(positions.to(distributed.device()), owners[name])


def mask_owners(layers: Mapping[str, AdaptedLinear]) -> dict[str, int]:
    """Layer name -> the rank that sums its gradient and chooses its positions."""
    sizes = {name: layer.weight_numel for name, layer in layers.items() if layer.entries}
    return distributed.owners_by_cost(sizes, distributed.world_size())


def build_collector(
    layers: Mapping[str, AdaptedLinear], settings: MaskSettings, gradients_a_step: int
) -> MaskCollector:
    """A collector whose gradients are summed over all ranks. ``gradients_a_step``: of a layer on one rank."""
    owners = mask_owners(layers)
    limit = settings.device_memory_gib
    collector = MaskCollector(
        layers,
        settings.score,
        owners,
        distributed.rank(),
        distributed.sum_to_owner,
        single=settings.steps == 1 and gradients_a_step == 1,
        steps=settings.steps,
        device_bytes=distributed.free_memory() // 2 if limit is None else int(limit * 2**30),
        agree=lambda name: distributed.same_everywhere(name.encode()),
    )
    logger.info(
        "collecting gradients: %.3f GiB on the device and %.3f in host memory on this rank, and one block of %.3f GiB",
        collector.kept_bytes["device"] / 2**30,
        collector.kept_bytes["host"] / 2**30,
        BLOCK_BYTES / 2**30,
    )
    return collector


def _plan_bytes(layer: AdaptedLinear, gpu: bool) -> int:
    """At most, of what the ops prepare for a mask: on a CPU it hangs on how many rows and columns have entries."""
    if gpu:
        return PLAN_BYTES * layer.entries
    rows, columns = (min(size, layer.entries) for size in layer.weight_shape)
    # indices of rows and columns in 64 bits; row pointers and column indices in 32
    return 8 * (rows + columns) + 4 * (rows + 1 + layer.entries)


def _collect_bytes(
    layers: Mapping[str, AdaptedLinear], plan: DeepSpeedPlan, settings: RunConfig, ranks: int
) -> tuple[int, int]:
    """On the rank with the most: what is kept of gradients, and what forming one block of one takes."""
    sizes = {name: layer.weight_numel for name, layer in layers.items()}
    single = settings.mask.steps == 1 and plan.accumulation_steps == 1
    load = [0] * ranks
    for name, owner in distributed.owners_by_cost(sizes, ranks).items():
        # scores and positions of the best candidates, or whole float32 matrices
        matrices = 1 if settings.mask.steps == 1 else 2
        load[owner] += 8 * layers[name].entries if single else matrices * 4 * sizes[name]
    block = min(BLOCK_BYTES, 4 * max(sizes.values()))
    most = max(layer.entries for layer in layers.values())
    wide = 0
    if plan.dtype != "float32":
        shapes = [layer.weight_shape for layer in layers.values()]
        wide = max(4 * TOKENS_AT_ONCE * (min(rows, block_rows(columns)) + columns) for rows, columns in shapes)
    # the block and its scores, what of 16-bit factors is wide, and where candidates are kept those of the block: scores,
    # 64-bit indices, old and new
    return max(load), 2 * block + wide + (40 * most if single else 0)
