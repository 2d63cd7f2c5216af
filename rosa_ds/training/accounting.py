"""Where a rank's memory and a step's communication go: predicted before the first step, measured after the second.

Everything is bytes of one rank. What is measured of parameters and optimizer state is the tensors that are really there,
of communication the payload of every collective.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rosa_ds import distributed
from rosa_ds.adapters.inject import adapted_layers, adapter_parts
from rosa_ds.adapters.quantize import quantized_forms
from rosa_ds.config import RunConfig
from rosa_ds.ds_config import BITSANDBYTES, DeepSpeedPlan
from rosa_ds.training.changed_base import ChangedBase, keeps_residual
from rosa_ds.training.draw import BATCH_BYTES
from rosa_ds.training.engine import PERSISTENCE
from rosa_ds.training.trained_state import TrainedState

PARTS = ("base", "whole modules", "A", "B", "values", "positions")
RESIDUAL = "base residual"
_MIB = 2**20


@dataclasses.dataclass
class Account:
    """``memory`` and ``traffic``: name -> bytes on this rank; ``total``: name -> bytes on one rank without any division."""

    memory: dict[str, int]
    traffic: dict[str, int]
    total: dict[str, int]


def _named_parts(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Each parameter with the part of :data:`PARTS` that it is."""
    own = adapter_parts(model)
    for parameter in model.parameters():
        yield own.get(id(parameter), "whole modules" if parameter.requires_grad else "base"), parameter


def _sum(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for name, size in pairs:
        counter[name] += size
    return dict(counter)


def _share(numel: int, ranks: int) -> int:
    return -(-numel // ranks)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One parameter: the part of :data:`PARTS` that it is, its numbers, bytes of one, and how ranks keep it."""

    name: str
    numel: int
    itemsize: int
    trains: bool
    divided: bool
    persists: bool

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize

    def resident(self, ranks: int) -> int:
        """Numbers on one rank: all, its share, or at stage 3 of a small one both."""
        return (_share(self.numel, ranks) if self.divided else 0) + (
            0 if self.divided and not self.persists else self.numel
        )


def _parts(model: nn.Module, plan: DeepSpeedPlan) -> list[_Part]:
    zero = plan.config["zero_optimization"]
    persistent = zero.get(PERSISTENCE, 100_000) if plan.stage == 3 else 0
    return [
        _Part(
            name,
            numel := distributed.full_numel(parameter),
            parameter.itemsize,
            parameter.requires_grad,
            divided=plan.stage == 3 or distributed.is_partitioned(parameter),
            persists=numel <= persistent,
        )
        for name, parameter in _named_parts(model)
    ]


def predict(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig) -> Account:
    """What settings and sizes say; of an injected model, whether it is divided already or not."""
    ranks, stage, parts = distributed.world_size(), plan.stage, _parts(model, plan)
    trained = [part for part in parts if part.trains]
    numbers = sum(part.numel for part in trained)
    own = numbers if stage == 0 else sum(_share(part.numel, ranks) for part in trained)
    moments = 2 + 8 / 256 if plan.optimizer.name in BITSANDBYTES else 8
    kept = moments + (
        4 if stage or plan.dtype != "float32" else 0
    )  # stage 0 in float32 steps the parameters themselves
    total = _sum((part.name, part.bytes) for part in parts)
    total |= {"optimizer": round(kept * numbers), "gradients": sum(part.bytes for part in trained)}
    memory = _sum((part.name, part.resident(ranks) * part.itemsize) for part in parts)
    memory["optimizer"] = round(kept * own)
    memory["gradients"] = sum(
        (part.numel if stage < 2 else _share(part.numel, ranks)) * part.itemsize for part in trained
    )
    if forms := quantized_forms(model):
        memory["dequantised at once"] = max(form.numel * form.dtype.itemsize for form in forms.values())
    if stage == 3:
        memory["gathered at once"] = _gather_peak(model, parts, plan.config["zero_optimization"])
    if settings.draws:
        sizes = [layer.weight_shape for layer in adapted_layers(model).values() if layer.rank]
        if keeps_residual(settings.draw, getattr(torch, plan.dtype)):
            total[RESIDUAL] = 2 * sum(rows * columns for rows, columns in sizes)
            memory[RESIDUAL] = 2 * sum(_share(rows * columns, ranks) for rows, columns in sizes)
        # weight, fold, what is left of it, and the larger of a copy for the check, or Gram matrix, eigenvectors, workspace
        at_once = max(
            3 * rows * columns + max(2 * rows * columns, 4 * min(rows, columns) ** 2) for rows, columns in sizes
        )
        waiting = min(BATCH_BYTES, 4 * sum(rows * columns for rows, columns in sizes) // ranks)
        memory["draw, at once"] = 4 * at_once + waiting
    return Account(memory, _predict_traffic(parts, plan), total)


def _gather_peak(model: nn.Module, parts: list[_Part], zero: Mapping[str, Any]) -> int:
    """The largest module, and what DeepSpeed gathers ahead of it; never more than all parameters."""
    largest = max(
        sum(distributed.full_numel(p) * p.itemsize for p in module.parameters(recurse=False))
        for module in model.modules()
    )
    ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7)) * max(part.itemsize for part in parts)
    return min(largest + ahead, sum(part.bytes for part in parts))


def _predict_traffic(parts: list[_Part], plan: DeepSpeedPlan) -> dict[str, int]:
    """Payloads of one optimizer step. What is divided is gathered for forward and again for backward; at stage 3 unless it
    is kept in between (``stage3_max_live_parameters``, ``stage3_max_reuse_distance``), so the figures are the upper bound.
    """
    traffic: Counter[str] = Counter()
    for part in parts if distributed.world_size() > 1 else ():
        if part.trains:
            traffic["gradients"] += part.bytes * (plan.accumulation_steps if plan.stage >= 2 else 1)
            if plan.stage in (1, 2) or part.persists:
                traffic["updated parameters"] += part.bytes
        if part.divided and not part.persists:
            traffic[f"gather {part.name}"] += 2 * plan.accumulation_steps * part.bytes
    return dict(traffic)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def measure_memory(model: nn.Module, state: TrainedState, base: ChangedBase | None) -> dict[str, int]:
    """The tensors of this rank, between two steps."""
    memory: Counter[str] = Counter()
    plans: list[Tensor] = []
    for name, parameter in _named_parts(model):
        memory[name] += parameter.nbytes  # all of it, or what of it is gathered
        if (partition := distributed.partition_of(parameter)) is not None:
            memory[name] += partition.share.nbytes
    for layer in adapted_layers(model).values():
        if layer.plan is not None:
            plans += [leaf for leaf in tree_leaves(vars(layer.plan)) if torch.is_tensor(leaf)]
    if plans:
        memory["plans of masks"] = _bytes(plans)
    memory["optimizer"] = state.bytes()
    if base is not None and base.bytes:
        memory[RESIDUAL] = base.bytes
    return dict(memory)


def measured_traffic(counter: distributed.TrafficCounter) -> dict[str, int]:
    """Kind and dtype -> bytes, e.g. ``all_gather int32`` (positions)."""
    return {
        f"{kind} {str(dtype).removeprefix('torch.')}": size
        for (kind, dtype), size in sorted(counter.bytes.items(), key=str)
        if size
    }


def table(predicted: Account, measured: Mapping[str, int], traffic: Mapping[str, int]) -> str:
    """Both side by side, in MiB."""

    def cell(size: int | None) -> str:
        return f"{size / _MIB:12.3f}" if size is not None else f"{'-':>12}"

    names = [name for name in predicted.memory | dict(measured) if predicted.memory.get(name) or measured.get(name)]
    lines = [f"{'memory, MiB':22}{'undivided':>12}{'predicted':>12}{'measured':>12}"]
    for name in names:
        sizes = (predicted.total.get(name), predicted.memory.get(name), measured.get(name))
        lines.append(f"{name:22}" + "".join(map(cell, sizes)))
    if predicted.traffic or traffic:
        lines.append(f"{'communication, MiB':22}{'':>12}{'at most':>12}{'measured':>12}")
        lines += [f"{name:34}{cell(size)}" for name, size in predicted.traffic.items()]
        lines += [f"{name:46}{cell(size)}" for name, size in traffic.items()]
    return "\n".join(lines)
