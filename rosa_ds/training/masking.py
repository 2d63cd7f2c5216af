"""The mask of a distributed run: collected together, chosen by one owner a layer, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from rosa_ds import distributed
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.mask import Mask, MaskCollector, load_mask, static_positions
from rosa_ds.config import MaskSettings


def mask_owners(layers: Mapping[str, AdaptedLinear]) -> dict[str, int]:
    """Layer name -> the rank that sums its gradient and chooses its positions."""
    sizes = {name: layer.weight.numel() for name, layer in layers.items() if layer.entries}
    return distributed.owners_by_cost(sizes, distributed.world_size())


def build_collector(layers: Mapping[str, AdaptedLinear], settings: MaskSettings, micro_batches: int) -> MaskCollector:
    """A collector whose gradients are summed over all ranks. ``micro_batches``: of one rank in an optimizer step."""
    single = settings.steps == 1 and micro_batches == 1
    owners, rank = mask_owners(layers), distributed.rank()
    return MaskCollector(layers, settings.score, owners, rank, distributed.sum_to_owner, single, _all_at)


def _all_at(name: str) -> bool:
    """Collective: is every rank at this layer?"""
    return distributed.same_everywhere(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))


def mask_digest(mask: Mask) -> int:
    """62 bits of a hash over names and positions."""
    digest = hashlib.sha256()
    for name in sorted(mask):
        digest.update(name.encode() + mask[name].cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 2


def choose_mask(
    layers: Mapping[str, AdaptedLinear], settings: MaskSettings, seed: int, collector: MaskCollector | None
) -> Mask:
    """Positions of every layer with a sparse part: loaded, or chosen by each layer's owner and sent to all.

    Raises:
        ValueError: on the rank where it happened, with the layer; the others raise too.
    """
    sparse = {name: layer for name, layer in layers.items() if layer.entries}
    if settings.load is not None:
        with distributed.together():
            mask = load_mask(Path(settings.load))
        if not distributed.same_everywhere(mask_digest(mask)):
            raise ValueError(f"the ranks read different masks from {settings.load}: give a file that all hosts share")
        return mask
    owners = mask_owners(sparse)
    owned: Mask = {}
    error: ValueError | None = None
    try:
        for name, layer in sparse.items():
            if owners[name] == distributed.rank():
                chosen = collector.positions(name) if collector else static_positions(settings.score, layer, seed)
                owned[name] = chosen
    except ValueError as problem:
        error = problem
    distributed.raise_everywhere(error)
    mask = {}
    for name, layer in sparse.items():
        positions = owned.pop(name, None)
        if positions is None:
            positions = torch.empty(layer.entries, dtype=torch.int32, device=layer.weight.device)
        mask[layer.weight_name] = distributed.broadcast(positions.to(layer.weight.device), owners[name])
    if not distributed.same_everywhere(mask_digest(mask)):
        raise RuntimeError("the ranks have different masks: a broadcast went wrong; please report this")
    return mask
