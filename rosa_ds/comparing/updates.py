"""What a run has done to single layers: the change of their weights, and where the entries of their masks lie."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.checkpoints.source import open_source
from rosa_ds.comparing.results import Results
from rosa_ds.export.adapted import dense_change, open_adapted
from rosa_ds.models.stream import Base
from rosa_ds.utils.suggest import did_you_mean


def read_updates(results: Results) -> tuple[dict[str, Changes], list[str]]:
    """Variant -> what the first finished run of it has changed; and the layers that are drawn."""
    runs = {}
    for variant in results.study.variants:
        finished = [result.run.folder / "run" for result in results.finals_of(variant) if result.state == "finished"]
        if finished:
            runs[variant] = finished[0]
    adapted = next((names for run in runs.values() if (names := adapted_names(run))), [])
    named = bool(results.study.layers)
    layers = results.study.layers or (middle_layers(adapted) if adapted else [])
    return {variant: read_changes(run, layers, demanded=named) for variant, run in runs.items()}, layers


def adapted_names(run: Path) -> list[str]:
    """The layers that a run has given an adapter; none if it trained everything."""
    trained = open_source(run).trained
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained if name.endswith((".A", ".values"))))


def middle_layers(names: Sequence[str], count: int = 3) -> list[str]:
    """First, middle and last of the layers of the middle block: names whose first number is the same are of one block."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        blocks.setdefault(found[1] if found else "", []).append(name)
    if len(blocks) > 1:
        blocks.pop("", None)
    block = list(blocks.values())[len(blocks) // 2]
    return list(dict.fromkeys(block[round(i * (len(block) - 1) / (count - 1))] for i in range(count)))


@torch.no_grad()
def read_changes(run: Path, layers: Sequence[str], demanded: bool = True) -> Changes:
    """What a finished run has changed in these layers. Weights are read one at a time.

    Raises: ValueError for a layer that the model has not, if it is ``demanded``.
    """
    source = open_source(run)
    model, base = open_adapted(source)
    weights = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() == 2}
    weights |= set(adapted_layers(model))
    spectra = {}
    for name in layers:
        if name not in weights and not demanded:
            continue
        if name not in weights:
            raise ValueError(
                f"layers: {name} is no layer of {source.description.base['name_or_path']}.{did_you_mean(name, weights)}"
            )
        change = _weight_change(name, model, source, base)
        values = torch.linalg.svdvals(change)
        if values[0] > 0:
            spectra[name] = (values / values[0]).numpy()
    masks = {
        layer.weight_name: LayerMask(source.positions[layer.weight_name], layer.weight_shape)
        for layer in adapted_layers(model).values()
        if layer.weight_name in source.positions
    }
    return Changes(spectra, masks)


def _weight_change(name: str, model: torch.nn.Module, source: StoredAdapter, base: Base | None) -> Tensor:
    """Float64, in the layout of the weight or its transpose: W of the run minus W of the base."""
    layer = adapted_layers(model).get(name)
    weight = f"{name}.weight"
    if layer is None:  # trained whole, or not at all
        before = model.get_parameter(weight) if base is None else base.rows(weight, slice(None))
        after = source.trained.get(weight, before)
        return after.double() - before.double()
    change = dense_change(layer, source, base, torch.float64)
    if weight in source.positions:
        sparse = torch.zeros(layer.weight_shape, dtype=torch.float64)
        sparse.view(-1)[source.positions[weight].long()] = source.trained[f"{name}.values"].double()
        change = change + (sparse.T if layer.transposed else sparse)
    return change


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes of some layers of a run; ``singular_values``: by layer, largest first, divided by the largest.

    A layer without any change has no singular values. ``masks`` has all layers of the model that have one.
    """

    singular_values: dict[str, np.ndarray]
    masks: dict[str, LayerMask]


@dataclasses.dataclass(frozen=True)
class LayerMask:
    """Positions (Z,) of a weight of this shape as it is stored, flat and row-major."""

    positions: Tensor
    shape: tuple[int, int]

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Entries of each row, (rows,), and of each column, (columns,)."""
        rows, columns = self.shape
        flat = self.positions.long()
        return torch.bincount(flat // columns, minlength=rows), torch.bincount(flat % columns, minlength=columns)

    @property
    def empty_shares(self) -> tuple[float, float]:
        """Share of rows, and of columns, without any entry."""
        rows, columns = self.counts
        return float((rows == 0).double().mean()), float((columns == 0).double().mean())

    def pooled(self, largest: int = 256) -> Tensor:
        """1 where a block of the matrix has an entry, else 0: (rows / k, columns / k) for the least k that keeps both up to ``largest``.

        Source: the RoSA paper (arXiv 2401.04679) shows its masks max-pooled.
        """
        width = -(-max(self.shape) // largest)
        blocks = tuple(-(-size // width) for size in self.shape)
        flat = self.positions.long()
        picture = torch.zeros(blocks, dtype=torch.uint8)
        picture[flat // self.shape[1] // width, flat % self.shape[1] // width] = 1
        return picture


def cumulated_shares(counts: Tensor) -> np.ndarray:
    """Share of all entries that lie in the 1, 2, ... busiest rows (or columns). Shapes: counts (n,), with any entry; result (n,)."""
    ordered = counts.double().sort(descending=True).values.cumsum(0)
    return (ordered / ordered[-1]).numpy()
