"""What a rank will hold and send, by what settings and sizes say: of an injected model, also one without storage."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapter_parts
from rosa_ds.config.deepspeed import BITSANDBYTES, DeepSpeedPlan
from rosa_ds.memory.account import ACTIVATIONS, BUCKETS, GATHERED, WORKING, Account, Term
from rosa_ds.zero.engine import PERSISTENCE

if TYPE_CHECKING:
    from rosa_ds.memory.activation_tracer import Activations


def predict(
    model: nn.Module, plan: DeepSpeedPlan, terms: Iterable[Term], recomputes: bool, ranks: int | None = None
) -> Account:
    """The account of one rank, without activations (:func:`activation_terms`).

    Args:
        model: injected; on the meta device, whole, or divided already.
        plan: its ``config`` settled by :func:`rosa_ds.zero.engine.settle_zero`.
        terms: what the run's method holds (:func:`rosa_ds.methods.memory_terms`).
        recomputes: whether activations are computed again in backward.
        ranks: by default as many as there are.
    """
    ranks = distributed.world_size() if ranks is None else ranks
    stage, parts = plan.stage, _parts(model, plan)
    trained = [part for part in parts if part.trains]
    numbers = sum(part.numel for part in trained)
    own = numbers if stage == 0 else sum(_share(part.numel, ranks) for part in trained)
    moments = 2 + 8 / 256 if plan.optimizer.name in BITSANDBYTES else 8
    # stage 0 in float32 steps the parameters themselves
    kept = moments + (4 if stage or plan.dtype != "float32" else 0)
    total: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for part in parts:
        total[part.name] += part.bytes
        memory[part.name] += part.resident(ranks) * part.itemsize
    total["optimizer"] = round(kept * numbers)
    total["gradients"] = sum(part.bytes for part in trained)
    memory["optimizer"] = round(kept * own)
    memory["gradients"] = sum(
        (part.numel if stage < 1 else _share(part.numel, ranks)) * part.itemsize for part in trained
    )
    gathering = None
    if stage:
        memory[BUCKETS] = _bucket_bytes(parts, plan)
    if stage == 3:
        gathering = _gathering(model, parts, plan.config["zero_optimization"])
        memory[GATHERED] = gathering.peak
    uses = 3 if recomputes else 2  # forward, again where it is recomputed, backward
    account = Account(dict(memory), _predict_traffic(parts, plan, ranks, gathering, uses), dict(total))
    account.add(terms)
    return account


def activation_terms(found: Activations) -> dict[str, int]:
    """What a trace found, by the account's names."""
    return {ACTIVATIONS: found.saved, WORKING: found.peak - found.saved}


def named_parts(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Each parameter with what it is: a part of an adapter by its name, ``whole modules`` that are trained, or ``base``."""
    own = adapter_parts(model)
    for parameter in model.parameters():
        yield own.get(id(parameter), "whole modules" if parameter.requires_grad else "base"), parameter


@dataclasses.dataclass(frozen=True)
class _Part:
    """One parameter: its name in the account, its elements, bytes of one, and how ranks keep it."""

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
        """Elements on one rank: all, its share, or at stage 3 of a small one both."""
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
        for name, parameter in named_parts(model)
    ]


def _share(numel: int, ranks: int) -> int:
    return -(-numel // ranks)


def _bucket_bytes(parts: list[_Part], plan: DeepSpeedPlan) -> int:
    """DeepSpeed's buffers for gradients on their way; with ``overlap_comm`` two of them at stages 1 and 2."""
    section = plan.config["zero_optimization"]
    if not section.get("contiguous_gradients", True):
        return 0
    buffers = 2 if plan.stage < 3 and section.get("overlap_comm", False) else 1
    itemsize = max(part.itemsize for part in parts if part.trains)
    return buffers * int(section.get("reduce_bucket_size", 5e8)) * itemsize


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
