"""The mask of a distributed run: collected together, chosen by one owner a layer, the same on every rank."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.mask import Mask, MaskCollector, check_mask, open_mask, static_positions
from rosa_ds.config.mask_scores import RANKINGS
from rosa_ds.config.schema import MaskSettings
from rosa_ds.utils.files import file_hash
from rosa_kernels.collect.op import BLOCK_BYTES

logger = logging.getLogger(__name__)


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


def mask_owners(layers: Mapping[str, AdaptedLinear]) -> dict[str, int]:
    """Layer name -> the rank that sums its gradient and chooses its positions."""
    sizes = {name: layer.weight_numel for name, layer in layers.items() if layer.entries}
    return distributed.owners_by_cost(sizes, distributed.world_size())


def build_collector(layers: Mapping[str, AdaptedLinear], settings: MaskSettings, micro_batches: int) -> MaskCollector:
    """A collector whose gradients are summed over all ranks. ``micro_batches``: of one rank in an optimizer step."""
    owners = mask_owners(layers)
    limit = settings.device_memory_gib
    collector = MaskCollector(
        layers,
        settings.score,
        owners,
        distributed.rank(),
        distributed.sum_to_owner,
        single=settings.steps == 1 and micro_batches == 1,
        steps=settings.steps,
        device_bytes=distributed.free_memory() // 2 if limit is None else int(limit * 2**30),
        agree=_all_at,
    )
    logger.info(
        "collecting gradients: %.3f GiB on the device and %.3f in host memory on this rank, and one block of %.3f GiB",
        collector.kept_bytes["device"] / 2**30,
        collector.kept_bytes["host"] / 2**30,
        BLOCK_BYTES / 2**30,
    )
    return collector


def _all_at(name: str) -> bool:
    """Collective: is every rank at this layer?"""
    return distributed.same_everywhere(name.encode())


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


def _read_base(layer: AdaptedLinear) -> Tensor:
    """All of a layer's base, with what a draw has split off it. Collective."""
    A, B = (None if part is None or not layer.drawn else zero.read_whole(part) for part in (layer.A, layer.B))
    return layer.undrawn(layer.whole_weight(), A, B)


def _choose(
    layers: Mapping[str, AdaptedLinear], settings: MaskSettings, seed: int, collector: MaskCollector | None
) -> Iterator[tuple[str, Tensor]]:
    """Positions of each layer: chosen by its owner, then sent to all, one layer after another."""
    owners = mask_owners(layers)
    owned: Mask = {}
    error: Exception | None = None
    for name, layer in layers.items():
        distributed.progress(f"choosing the mask of {name}")
        weight = _read_base(layer) if RANKINGS[settings.score].weight else layer.weight
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
