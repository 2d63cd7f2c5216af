"""The base of layers that are drawn from it: where its numbers are, beside the model and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rosa_ds import distributed, zero
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.subspace import join_bits, split_bits
from rosa_ds.checkpoints.checkpoint import SavedBase
from rosa_ds.config.schema import DrawSettings


def keeps_residual(settings: DrawSettings, layer: AdaptedLinear, dtype: torch.dtype) -> bool:
    """Whether a layer's base is kept with its lower bits, in a model of this type.

    Not beside a quantised weight, which has lost a hundred times as much as rounding the change to it loses.
    """
    return settings.residual and dtype == torch.bfloat16 and layer.form is None


Packed = tuple[Tensor, Tensor]
"""A quantised weight and its scales, whole."""


class ChangedBase:
    """The weights of some layers, which training changes, and what a 16-bit weight leaves out of them.

    A quantised weight stays as it is: what changes is the matrix beside it (:attr:`AdaptedLinear.drawn_parameter`), their difference.

    With ``draw.residual`` and a bfloat16 model the lower 16 bits of a float32 base are kept here, divided over the ranks at
    every stage and gathered a layer at a time: then storing the base rounds no more than float32 does.

    Attributes:
        drift: root of the sum of squares of the draws' relative rounding errors, each of the layer where it is largest.
        saved: the checkpoint that has the base as it is now.
    """

    def __init__(self, layers: Mapping[str, AdaptedLinear], settings: DrawSettings) -> None:
        self.layers = dict(layers)
        self.drift = 0.0
        self.saved: SavedBase | None = None
        self.residuals: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if keeps_residual(settings, layer, layer.dtype):
                # where the base is, which may be offloaded; as bytes, since NCCL sends no 16-bit integers
                place = zero.own_numbers(layer.drawn_parameter).device
                self.residuals[name] = torch.zeros(layer.weight_numel, 2, dtype=torch.uint8, device=place)
                zero.divide(self.residuals[name])

    @property
    def bytes(self) -> int:
        """Of the residuals on this rank."""
        return sum(zero.own_numbers(residual).nbytes for residual in self.residuals.values())

    def read_weight(self, name: str, owner: int) -> tuple[Tensor, Packed | None] | None:
        """A layer's base (N, M) in float32, with its residual, on its owner's device, and what of it is quantised; ``None`` on
        others. Collective.
        """
        layer = self.layers[name]
        weight = zero.read_whole(layer.drawn_parameter)
        low = zero.read_whole(self.residuals[name]) if name in self.residuals else None
        packed = None
        if layer.weight_scales is not None:
            packed = zero.read_whole(layer.weight), zero.read_whole(layer.weight_scales)
        if owner != distributed.rank():
            return None
        weight = weight.to(distributed.device())
        if low is not None:
            weight = join_bits(weight, low.to(weight.device).view(torch.int16).view(layer.weight_shape))
        weight = weight.float().view(layer.weight_shape)
        if layer.form is not None and packed is not None:
            packed = packed[0].to(weight.device), packed[1].to(weight.device)
            weight = weight + layer.form.unpack(*packed, torch.float32)
        return weight.T if layer.transposed else weight, packed

    def shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of what :meth:`pack` makes."""
        layer = self.layers[name]
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": (layer.weight_shape, layer.dtype)}
        return shapes | ({"residual": ((layer.weight_numel, 2), torch.uint8)} if name in self.residuals else {})

    def pack(self, name: str, weight: Tensor, packed: Packed | None) -> dict[str, Tensor]:
        """A float32 base (N, M) as it is stored and sent, beside what is ``packed`` of it."""
        layer = self.layers[name]
        weight = (weight.T if layer.transposed else weight).contiguous()
        if layer.form is not None and packed is not None:
            weight = weight - layer.form.unpack(*packed, torch.float32)
        if name not in self.residuals:
            return {"weight": weight.to(layer.dtype)}
        high, low = split_bits(weight)
        return {"weight": high, "residual": low.view(torch.uint8).view(-1, 2)}

    def seen(self, name: str, stored: Mapping[str, Tensor], packed: Packed | None) -> Tensor:
        """The base (N, M) that forward makes of what :meth:`pack` made."""
        layer = self.layers[name]
        weight = stored["weight"]
        if layer.form is not None and packed is not None:
            weight = layer.form.unpack(*packed) + weight
        return weight.T if layer.transposed else weight

    def write(self, name: str, packed: Mapping[str, Tensor]) -> None:
        """Keep what :meth:`pack` made, each rank its share. The same on every rank."""
        layer = self.layers[name]
        zero.write_whole(layer.drawn_parameter, packed["weight"])
        if name in self.residuals:
            zero.write_whole(self.residuals[name], packed["residual"])
        layer.drawn = True
        self.saved = None

    def read(self, owners: Mapping[str, int]) -> dict[str, Tensor]:
        """All of it by name, whole, on the CPU of the layers' owners; residuals, int16, as ``NAME/residual``. Collective."""
        changes: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            distributed.progress(f"reading the base of {name}")
            mine = owners[name] == distributed.rank()
            weight = zero.read_whole(layer.drawn_parameter)
            low = zero.read_whole(self.residuals[name]) if name in self.residuals else None
            if mine:
                changes[layer.drawn_name] = weight.cpu()
                if low is not None:
                    changes[f"{layer.drawn_name}/residual"] = low.cpu().view(torch.int16).view(layer.weight_shape)
        return changes

    def restore(self, changes: Mapping[str, Tensor], drift: float, saved: SavedBase | None) -> None:
        """Go on with the base of a checkpoint.

        Raises: ValueError if a layer is missing, of another shape, or stored in another type.
        """
        for name, layer in self.layers.items():
            parts = {layer.drawn_name: layer.dtype}
            if name in self.residuals:
                parts[f"{layer.drawn_name}/residual"] = torch.int16
            for key, dtype in parts.items():
                if key not in changes:
                    raise ValueError(f"--resume: the checkpoint lacks {key}, which a draw has changed: use another one")
                tensor = changes[key]
                if tuple(tensor.shape) != layer.weight_shape or tensor.dtype != dtype:
                    raise ValueError(
                        f"--resume: {key} of the checkpoint is {tuple(tensor.shape)} of {tensor.dtype}, and {layer.weight_shape} "
                        f"of {dtype} in this run: set model.dtype and draw.residual back"
                    )
            packed = {"weight": changes[layer.drawn_name]}
            if name in self.residuals:
                low = changes[f"{layer.drawn_name}/residual"].contiguous()
                packed["residual"] = low.view(torch.uint8).view(-1, 2)
            self.write(name, packed)
        self.drift, self.saved = drift, saved
