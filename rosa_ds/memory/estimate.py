"""Where a rank's memory and a step's communication go: predicted before the first step, measured after the second.

Everything is bytes of one rank. What is measured of parameters and optimizer state is the tensors that are really there,
of communication the payload of every collective.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers, adapter_parts
from rosa_ds.config.deepspeed import BITSANDBYTES, DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.methods.subspace import share_draws
from rosa_ds.methods.subspace_base import keeps_residual
from rosa_ds.zero.engine import PERSISTENCE
from rosa_kernels.collect.op import BLOCK_BYTES, TOKENS_AT_ONCE, block_rows

if TYPE_CHECKING:  # what a plan does not need imports deepspeed
    from rosa_ds.memory.activation_tracer import Activations
    from rosa_ds.methods.subspace_base import ChangedBase
    from rosa_ds.zero.trained_state import TrainedState

PARTS = ("base", "whole modules", "A", "B", "values", "positions")
RESIDUAL, PLANS = "base residual", "plans of masks"
PLAN_BYTES = 8  # of an entry on a GPU, about: two 32-bit indices
BUCKETS, GATHERED = "gradient buckets", "gathered at once"
COLLECTED, COLLECTING = "collected gradients", "collect, at once"
DRAWING, WORKSPACE = "draw, at once", "draw, factorisation"
ACTIVATIONS, WORKING = "activations", "forward and backward, beside"
_PASSING = (GATHERED, COLLECTED, COLLECTING, DRAWING, WORKSPACE, ACTIVATIONS, WORKING)
_MIB = 2**20


@dataclasses.dataclass
class Account:
    """``memory`` and ``traffic``: name -> bytes on this rank; ``total``: name -> bytes on one rank without any division."""

    memory: dict[str, int]
    traffic: dict[str, int]
    total: dict[str, int]

    @property
    def resident(self) -> int:
        """Bytes that are there all the time, or from mask or first step on."""
        return sum(size for name, size in self.memory.items() if name not in _PASSING)

    def passing(self, *names: str) -> int:
        """Bytes of terms that come and go, where the account has them."""
        return sum(self.memory.get(name, 0) for name in names)


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
    section = plan.config["zero_optimization"]
    persistent = section.get(PERSISTENCE, 100_000) if plan.stage == 3 else 0
    return [
        _Part(
            name,
            numel := zero.full_numel(parameter),
            parameter.itemsize,
            parameter.requires_grad,
            divided=plan.stage == 3 or zero.is_partitioned(parameter),
            persists=numel <= persistent,
        )
        for name, parameter in _named_parts(model)
    ]


def predict(
    model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int | None = None, gpu: bool | None = None
) -> Account:
    """What settings and sizes say; of an injected model, on the meta device, whole, or divided already.

    Args:
        plan: its ``config`` settled by :func:`rosa_ds.zero.engine.settle_zero`.
        ranks: by default as many as there are.
        gpu: whether they are GPUs; by default as here.
    """
    ranks = distributed.world_size() if ranks is None else ranks
    gpu = distributed.device().type == "cuda" if gpu is None else gpu
    stage, parts = plan.stage, _parts(model, plan)
    trained = [part for part in parts if part.trains]
    numbers = sum(part.numel for part in trained)
    own = numbers if stage == 0 else sum(_share(part.numel, ranks) for part in trained)
    moments = 2 + 8 / 256 if plan.optimizer.name in BITSANDBYTES else 8
    # stage 0 in float32 steps the parameters themselves
    kept = moments + (4 if stage or plan.dtype != "float32" else 0)
    total = _sum((part.name, part.bytes) for part in parts)
    total |= {"optimizer": round(kept * numbers), "gradients": sum(part.bytes for part in trained)}
    memory = _sum((part.name, part.resident(ranks) * part.itemsize) for part in parts)
    memory["optimizer"] = round(kept * own)
    memory["gradients"] = sum(
        (part.numel if stage < 1 else _share(part.numel, ranks)) * part.itemsize for part in trained
    )
    if gpu:  # on a CPU they hang on which rows and columns a mask will have entries in
        memory[PLANS] = sum(PLAN_BYTES * part.numel for part in parts if part.name == "positions")
    gathering = None
    if stage:
        memory[BUCKETS] = _bucket_bytes(parts, plan)
    if stage == 3:
        gathering = _gathering(model, parts, plan.config["zero_optimization"])
        memory[GATHERED] = gathering.peak
    if settings.collects_gradients:
        memory[COLLECTED], memory[COLLECTING] = _collect_bytes(model, plan, settings, ranks)
    if settings.parts.resampled:
        _add_draws(model, plan, settings, ranks, memory, total)
    uses = 3 if settings.training.gradient_checkpointing else 2  # forward, again where it is recomputed, backward
    return Account(memory, _predict_traffic(parts, plan, ranks, gathering, uses), total)


def activation_terms(found: Activations) -> dict[str, int]:
    """What a trace found, by the account's names."""
    return {ACTIVATIONS: found.saved, WORKING: found.peak - found.saved}


def _bucket_bytes(parts: list[_Part], plan: DeepSpeedPlan) -> int:
    """DeepSpeed's buffers for gradients on their way; with ``overlap_comm`` two of them at stages 1 and 2."""
    section = plan.config["zero_optimization"]
    if not section.get("contiguous_gradients", True):
        return 0
    buffers = 2 if plan.stage < 3 and section.get("overlap_comm", False) else 1
    itemsize = max(part.itemsize for part in parts if part.trains)
    return buffers * int(section.get("reduce_bucket_size", 5e8)) * itemsize


def _collect_bytes(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int) -> tuple[int, int]:
    """On the rank with the most: what is kept of gradients, and what forming one block of one takes."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.entries}
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
        wide = max(4 * TOKENS_AT_ONCE * (min(rows, block_rows(columns, 4)) + columns) for rows, columns in shapes)
    # the block and its scores, what of 16-bit factors is wide, and where candidates are kept those of the block: scores,
    # 64-bit indices, old and new
    return max(load), 2 * block + wide + (40 * most if single else 0)


def _add_draws(
    model: nn.Module,
    plan: DeepSpeedPlan,
    settings: RunConfig,
    ranks: int,
    memory: dict[str, int],
    total: dict[str, int],
) -> None:
    layers = [layer for layer in adapted_layers(model).values() if layer.rank]
    kept = [layer.weight_numel for layer in layers if keeps_residual(settings.draw, layer, getattr(torch, plan.dtype))]
    if kept:
        total[RESIDUAL] = 2 * sum(kept)
        memory[RESIDUAL] = 2 * sum(_share(numel, ranks) for numel in kept)
    memory[DRAWING], memory[WORKSPACE] = _draw_bytes(model, plan, settings, ranks)


def _draw_bytes(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int) -> tuple[int, int]:
    """On the rank with the most: tensors of a draw, and beside them what a factorisation takes for itself."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.rank}
    _, turns = share_draws(layers, settings.draw, ranks)
    narrow = plan.dtype != "float32"
    copied = plan.stage == 3 or narrow
    dtype = getattr(torch, plan.dtype)
    moved = 3 if settings.draw.moments == "project" else 1  # a factor, and its moments
    most = side = message = 0
    for mine in (names for turn in turns for names in turn):
        sizes = [layers[name].weight_shape for name in mine]
        factors = [4 * moved * layers[name].rank * sum(layers[name].weight_shape) for name in mine]
        held = sum(4 * rows * columns * copied for rows, columns in sizes) + sum(factors)
        for name, (rows, columns), factor in zip(mine, sizes, factors, strict=True):
            stored = dtype.itemsize + 2 * keeps_residual(settings.draw, layers[name], dtype)
            matrix, side = 4 * rows * columns, max(side, min(rows, columns))
            message = max(message, stored * rows * columns + factor)
            # the fold; then Gram matrix and its eigenvectors, or what is left and its error, of a 16-bit one twice
            found = 0 if settings.draw.directions == "projection" else 8 * min(rows, columns) ** 2
            most = max(most, held + factor + matrix + max(found, (3 if narrow else 2) * matrix))
            held += stored * rows * columns - matrix * copied
    return message + most, 0 if settings.draw.directions == "projection" else 8 * side**2


@dataclasses.dataclass(frozen=True)
class _Gathering:
    """What stage 3 gathers: at most at once, and in backward again, in bytes."""

    peak: int
    again: int


def _gathering(model: nn.Module, parts: list[_Part], section: Mapping[str, Any]) -> _Gathering:
    """Follow DeepSpeed's coordinator through forward and backward.

    A module's parameters stay gathered after forward if fewer than ``stage3_max_reuse_distance`` numbers are used before
    they are needed again. Beside them there are at most the largest module and what is gathered ahead.
    """
    reuse = int(section.get("stage3_max_reuse_distance", 1e9))
    seen = {id(p) for p, part in zip(model.parameters(), parts, strict=True) if part.persists}
    modules = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own:
            sizes = [zero.full_numel(p) for p in own]
            modules.append((sum(sizes), sum(n * p.itemsize for n, p in zip(sizes, own, strict=True))))
    behind = kept = again = largest = 0
    for numel, size in reversed(modules):
        if 2 * behind < reuse:
            kept += size
        else:
            again, largest = again + size, max(largest, size)
        behind += numel
    ahead = int(section.get("stage3_prefetch_bucket_size", 5e7)) * max(part.itemsize for part in parts)
    return _Gathering(min(kept + largest + ahead, kept + again), again)


def _predict_traffic(
    parts: list[_Part], plan: DeepSpeedPlan, ranks: int, gathering: _Gathering | None, uses: int
) -> dict[str, int]:
    """Payloads of one optimizer step. What is divided is gathered for forward, and again for backward unless it is kept.

    Args:
        uses: of a layer in a micro-batch.
    """
    traffic: Counter[str] = Counter()
    for part in parts if ranks > 1 else ():
        if part.trains:
            traffic["gradients"] += part.bytes * (plan.accumulation_steps if plan.stage >= 2 else 1)
            if plan.stage in (1, 2) or part.persists:
                traffic["updated parameters"] += part.bytes
        if part.divided and not part.persists:
            # stage 3 may keep it from forward to backward; what we divide ourselves is gathered for each use
            traffic[f"gather {part.name}"] += (1 if gathering else uses) * plan.accumulation_steps * part.bytes
    if gathering is not None and ranks > 1:
        traffic["gather again for backward"] += plan.accumulation_steps * gathering.again
    return {name: size for name, size in traffic.items() if size}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def measure_memory(model: nn.Module, state: TrainedState, base: ChangedBase | None) -> dict[str, int]:
    """The tensors of this rank, between two steps."""
    memory: Counter[str] = Counter()
    plans: list[Tensor] = []
    for name, parameter in _named_parts(model):
        memory[name] += parameter.nbytes  # all of it, or what of it is gathered
        if (partition := zero.partition_of(parameter)) is not None:
            memory[name] += partition.share.nbytes
    for layer in adapted_layers(model).values():
        if layer.plan is not None:
            plans += [leaf for leaf in tree_leaves(vars(layer.plan)) if torch.is_tensor(leaf)]
    if plans:
        memory[PLANS] = _bytes(plans)
    memory["optimizer"] = state.bytes()
    if base is not None and base.bytes:
        memory[RESIDUAL] = base.bytes
    return dict(memory)


def measured_traffic(counter: distributed.TrafficCounter) -> dict[str, int]:
    """Kind and dtype -> bytes, e.g. ``all_gather int32`` (positions). A group of one, which DeepSpeed asks too, sends nothing."""
    if distributed.world_size() == 1:
        return {}
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


def _sums(traffic: Mapping[str, int]) -> dict[str, int]:
    """What was summed over ranks, and what was gathered, of a prediction or a measurement."""
    sums = {"sent: gradients": 0, "sent: gathers": 0}
    for name, size in traffic.items():
        reduces = name == "gradients" or name.startswith(("reduce", "all_reduce"))
        if reduces or name == "updated parameters" or name.startswith(("gather", "all_gather")):
            sums["sent: gradients" if reduces else "sent: gathers"] += size
    return sums


@dataclasses.dataclass(frozen=True)
class Report:
    """A prediction beside what one step and what went before it have shown."""

    account: Account
    memory: dict[str, int]
    traffic: dict[str, int]

    def table(self) -> str:
        return table(self.account, self.memory, self.traffic)

    def record(self) -> dict[str, Any]:
        """For ``accounting.json``; :func:`compare` reads it."""
        return {
            "predicted": dataclasses.asdict(self.account),
            "measured": {"memory": self.memory, "traffic": self.traffic},
        }


def compare(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Term -> predicted and measured bytes, of every term that has both, from what :meth:`Report.record` gave."""
    predicted, measured = record["predicted"], record["measured"]
    both = (
        (predicted["memory"], measured["memory"]),
        (_sums(predicted["traffic"]), _sums(measured["traffic"])),
    )
    pairs = {name: (first[name], second[name]) for first, second in both for name in first if name in second}
    return {name: pair for name, pair in pairs.items() if any(pair)}
