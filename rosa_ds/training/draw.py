"""The draws of a distributed run: each layer is factorised by its owner, and all ranks take the owner's numbers.

As many layers as there are ranks are worked on at once, each whole on its owner only. What a draw makes of a weight is
sent to all, so that every rank has the same bits whatever its hardware; ZeRO-3 keeps its share of them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rosa_ds import distributed
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.low_rank import draw_generator
from rosa_ds.adapters.subspace import join_bits, project_moments, split_bits, split_off
from rosa_ds.config import DrawSettings
from rosa_ds.training.trained_state import TrainedState

logger = logging.getLogger(__name__)
GROUP = "low_rank"
MOMENTS = ("exp_avg", "exp_avg_sq")


def keeps_residual(settings: DrawSettings, dtype: torch.dtype) -> bool:
    """Whether a base of this type is kept with its lower bits."""
    return settings.residual and dtype == torch.bfloat16


@dataclasses.dataclass(frozen=True)
class _Result:
    """What the owner of a layer found; ``tensors`` as they are sent, in this order on every rank."""

    tensors: dict[str, Tensor]
    rounding: float
    fallbacks: int


class Drawing:
    """The layers whose low-rank part is drawn from their base, and what is kept of the base beside the model.

    With ``draw.residual`` and a bfloat16 model the base's lower 16 bits are kept here, divided over the ranks at every
    stage and gathered a layer at a time in a draw: then a draw rounds nothing but as float32 does.

    Attributes:
        drift: root of the sum of squares of the draws' relative rounding errors, each of the layer where it is largest.
        saved_in: the checkpoint that has the base as it is now.
    """

    def __init__(
        self, layers: Mapping[str, AdaptedLinear], state: TrainedState, settings: DrawSettings, seed: int
    ) -> None:
        self.layers, self.state, self.settings, self.seed = dict(layers), state, settings, seed
        self.owners = distributed.owners_by_cost(
            {name: self._cost(layer) for name, layer in layers.items()}, distributed.world_size()
        )
        self.drift = 0.0
        self.saved_in: Path | None = None
        self._residuals: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if keeps_residual(settings, layer.weight.dtype):
                # NCCL sends no 16-bit integers
                self._residuals[name] = torch.zeros(
                    layer.weight_numel, 2, dtype=torch.uint8, device=distributed.device()
                )
                distributed.divide(self._residuals[name])

    def _cost(self, layer: AdaptedLinear) -> int:
        """Operations of a draw, up to a factor."""
        small, large = sorted(layer.weight_shape)
        if self.settings.directions == "projection":
            return small * large * layer.rank
        return small * small * (large + 9 * small)

    @property
    def bytes(self) -> int:
        """Of the residuals on this rank."""
        return sum(distributed.own_numbers(residual).nbytes for residual in self._residuals.values())

    @torch.no_grad()
    def draw(self, number: int) -> dict[str, Any]:
        """Fold and draw all layers again; collective.

        Returns: what metrics.jsonl says of it.
        Raises: ValueError for a weight that cannot be factorised, RuntimeError if moments are not what was asked for.
        """
        begun = time.monotonic()
        rounding = fallbacks = 0.0
        hidden = None if distributed.is_main() else True
        with tqdm(total=len(self.layers), desc=f"draw {number}", unit="layer", leave=False, disable=hidden) as bar:
            for batch in self._batches():
                distributed.progress(f"draw {number}, {batch[0]}")
                result, error = self._work_on(batch, number)
                distributed.raise_everywhere(error)
                for name in batch:
                    self._take(name, result if self.owners[name] == distributed.rank() else None)
                if result is not None:
                    rounding, fallbacks = max(rounding, result.rounding), fallbacks + result.fallbacks
                bar.update(len(batch))
        self.saved_in = None
        found = distributed.gather_objects((rounding, fallbacks))
        rounding = max(entry[0] for entry in found)
        self.drift = (self.drift**2 + rounding**2) ** 0.5
        return {
            "number": number,
            "directions": self.settings.directions,
            "layers": len(self.layers),
            "rounding": rounding,
            "drift": self.drift,
            "fallbacks": int(sum(entry[1] for entry in found)),
            "moments_reset": self._finish_moments(),
            "seconds": time.monotonic() - begun,
        }

    def _batches(self) -> Iterator[list[str]]:
        """Layers that are worked on at once: one of each rank that has one left."""
        queues = [
            [name for name in self.layers if self.owners[name] == rank] for rank in range(distributed.world_size())
        ]
        for turn in range(max(map(len, queues))):
            yield [queue[turn] for queue in queues if turn < len(queue)]

    def _work_on(self, batch: list[str], number: int) -> tuple[_Result | None, Exception | None]:
        """Gather the layers of a batch one after another; this rank's own is then drawn. What went wrong is returned."""
        mine: str | None = None
        folded = old = moments = None
        for name in batch:
            factors = {part: self.state.read_one(f"{name}.{part}") for part in ("A", "B")}
            weight = self._read_weight(name)
            known = self._read_moments(name) if self.settings.moments == "project" else {}
            if self.owners[name] == distributed.rank():
                mine, folded, old, moments = name, weight, factors, known
        if mine is None:
            return None, None
        assert folded is not None
        assert old is not None
        try:
            return self._split(mine, folded, old, moments or {}, number), None
        except Exception as error:
            problem = ValueError(f"{mine}: {error}") if isinstance(error, ValueError) else error
            return None, problem

    def _read_weight(self, name: str) -> Tensor:
        """A layer's base (N, M) in float32, with its residual. Collective."""
        layer = self.layers[name]
        weight = distributed.read_whole(layer.weight).view(layer.weight_shape)
        if name in self._residuals:
            low = distributed.read_whole(self._residuals[name]).view(torch.int16).view(layer.weight_shape)
            weight = join_bits(weight, low)
        weight = weight.to(distributed.device(), torch.float32)
        return weight.T if layer.transposed else weight

    def _read_moments(self, name: str) -> dict[str, Tensor]:
        """``A/exp_avg`` and so on; nothing before the first step. Collective."""
        keys = self.state.moment_keys(GROUP)
        return {f"{part}/{key}": self.state.read_one(f"{name}.{part}", key) for part in "AB" for key in keys}

    def _split(
        self, name: str, weight: Tensor, old: Mapping[str, Tensor], moments: Mapping[str, Tensor], number: int
    ) -> _Result:
        layer = self.layers[name]
        folded = torch.addmm(weight, old["B"].to(weight), old["A"].to(weight), alpha=layer.scale)
        generator = draw_generator(self.seed, name, number)
        drawn = split_off(folded, layer.rank, self.settings, generator, layer.weight.dtype)
        rest = (drawn.rest.T if layer.transposed else drawn.rest).contiguous()
        tensors = {"A": drawn.A, "B": drawn.B, "weight": rest.to(layer.weight.dtype)}
        kept = tensors["weight"]
        if name in self._residuals:
            tensors["weight"], low = split_bits(rest)
            tensors["residual"] = low.view(torch.uint8).view(-1, 2)
            kept = rest
        kept = kept.float().T if layer.transposed else kept.float()
        again = torch.addmm(kept, drawn.B, drawn.A, alpha=layer.scale)
        if moments:
            tensors |= _project(moments, drawn.A, drawn.B, old["A"].to(weight), old["B"].to(weight))
        return _Result(tensors, float((again - folded).norm() / folded.norm()), drawn.fallbacks)

    def _shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What the owner sends of a layer."""
        layer = self.layers[name]
        A, B = (layer.rank, layer.in_features), (layer.out_features, layer.rank)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "A": (A, torch.float32),
            "B": (B, torch.float32),
            "weight": (layer.weight_shape, layer.weight.dtype),
        }
        if name in self._residuals:
            shapes["residual"] = ((layer.weight_numel, 2), torch.uint8)
        if self.settings.moments == "project":
            keys = self.state.moment_keys(GROUP)
            shapes |= {f"{part}/{key}": (A if part == "A" else B, torch.float32) for part in "AB" for key in keys}
        return shapes

    def _take(self, name: str, result: _Result | None) -> None:
        """Send or receive what the owner found, and write it: factors in both copies, the base, the moments. Collective."""
        layer = self.layers[name]
        tensors = {}
        for key, (shape, dtype) in self._shapes(name).items():
            if result is None:
                tensor = torch.empty(shape, dtype=dtype, device=distributed.device())
            else:
                tensor = result.tensors[key].contiguous()
                assert (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype), f"{name} {key}"
            tensors[key] = distributed.broadcast(tensor, self.owners[name])
        self.state.write({f"{name}.{part}": tensors[part] for part in ("A", "B")})
        distributed.write_whole(layer.weight, tensors["weight"])
        if "residual" in tensors:
            distributed.write_whole(self._residuals[name], tensors["residual"])
        for key, tensor in tensors.items():
            part, _, moment = key.partition("/")
            if moment:
                self.state.masters.write(f"{name}.{part}", moment, tensor)

    def _finish_moments(self) -> float | None:
        """Forget the moments where that is wanted. Returns: the share of them that is zero now; ``None`` if none was kept.

        Read as DeepSpeed's optimizer will use them, not as they were written.
        """
        if self.settings.moments != "reset" or not self.state.moment_keys(GROUP):
            return None
        self.state.reset_optimizer([GROUP])
        zeros = total = 0
        for name in self.layers:
            for moment in self._read_moments(name).values():
                zeros, total = zeros + int((moment == 0).sum()), total + moment.numel()
        if zeros < total or not total:
            raise RuntimeError(
                f"{zeros} of {total} moments were reset at a draw: this version of DeepSpeed keeps them in another "
                "place than rosa_ds knows; please report this"
            )
        return zeros / total

    def read_changes(self, owners: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The base of the drawn layers, whole, by weight name; residuals, int16, as ``NAME/residual``. Collective.

        Args:
            owners: layer name -> the rank that gets it, on its CPU; by default the one that draws it.
        """
        changes: dict[str, Tensor] = {}
        owners = self.owners if owners is None else owners
        for name, layer in self.layers.items():
            distributed.progress(f"reading the base of {name}")
            mine = owners[name] == distributed.rank()
            weight = distributed.read_whole(layer.weight)
            low = distributed.read_whole(self._residuals[name]) if name in self._residuals else None
            if mine:
                changes[layer.weight_name] = weight.cpu()
                if low is not None:
                    changes[f"{layer.weight_name}/residual"] = low.cpu().view(torch.int16).view(layer.weight_shape)
        return changes

    def restore(self, changes: Mapping[str, Tensor], drift: float, source: Path) -> None:
        """Go on with the base of a checkpoint in ``source``.

        Raises: ValueError if a layer is missing, of another shape, or stored in another type.
        """
        self._write_changes(changes)
        self.drift, self.saved_in = drift, source

    def _write_changes(self, changes: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            parts = {layer.weight_name: layer.weight.dtype}
            if name in self._residuals:
                parts[f"{layer.weight_name}/residual"] = torch.int16
            for key, dtype in parts.items():
                if key not in changes:
                    raise ValueError(f"--resume: the checkpoint lacks {key}, which a draw has changed: use another one")
                tensor = changes[key]
                if tuple(tensor.shape) != layer.weight_shape or tensor.dtype != dtype:
                    raise ValueError(
                        f"--resume: {key} of the checkpoint is {tuple(tensor.shape)} of {tensor.dtype}, and {layer.weight_shape} "
                        f"of {dtype} in this run: set model.dtype and draw.residual back"
                    )
            distributed.write_whole(layer.weight, changes[layer.weight_name])
            if name in self._residuals:
                low = changes[f"{layer.weight_name}/residual"].contiguous()
                distributed.write_whole(self._residuals[name], low.view(torch.uint8).view(-1, 2))


def _project(moments: Mapping[str, Tensor], A: Tensor, B: Tensor, old_A: Tensor, old_B: Tensor) -> dict[str, Tensor]:
    """All four moments of a layer along its new directions."""
    first_A, second_A, first_B, second_B = (moments[f"{part}/{key}"].to(A) for part in "AB" for key in MOMENTS)
    first_A, second_A = project_moments(first_A, second_A, B, old_B)
    first_B, second_B = project_moments(first_B.T, second_B.T, A.T, old_A.T)
    return dict(
        zip(
            (f"{part}/{key}" for part in "AB" for key in MOMENTS),
            (first_A, second_A, first_B.T, second_B.T),
            strict=True,
        )
    )
