"""Which entries of a matrix the sparse part trains: scores, top-k, and the gradients they come from.

Everything here is local mathematics; how ranks share the work is passed in (``owners``, ``reduce``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.registry import check_enabled
from rosa_ds.config.mask_scores import RANKINGS, Score, ranking_of
from rosa_ds.utils.files import TensorFiles, sync_files, write_tensors
from rosa_ds.utils.generators import keyed_generator
from rosa_ds.utils.suggest import did_you_mean
from rosa_kernels.collect.op import RunningTopK
from rosa_kernels.gradient import gradient_blocks

Mask = dict[str, Tensor]
"""Weight name -> (Z,) sorted int32 positions, flat row-major in the weight as it is stored."""


def compute_mask(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], score: Score = "mean_squared", seed: int = 42
) -> Mask:
    """The mask of every adapted layer with a sparse part, in one process.

    Args:
        model: a model after :func:`rosa_ds.inject`; its parameters and gradients are left as they are.
        batches: keyword arguments of the model with ``labels``, one per optimizer step. Not read for ``random``
            and ``magnitude``.
        score: how entries are ranked.
        seed: of ``random``.

    Raises: ValueError for an unknown score, no batches, if no layer has a sparse part, or a layer's gradient is zero everywhere.
    """
    check_enabled(model)
    ranking = ranking_of(score)
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.entries}
    if not layers:
        raise ValueError("no layer of this model has a sparse part: inject with method sparse or robust")
    if ranking.gradient is None:
        return {layer.weight_name: static_positions(score, layer, _whole(layer), seed) for layer in layers.values()}
    collector = MaskCollector(layers, score, dict.fromkeys(layers, 0), 0, lambda tensor, owner: None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    collector.attach()
    try:
        for batch in batches:
            torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
            collector.end_step()
    finally:
        collector.detach()
    if collector.steps == 0:
        raise ValueError(f"mask.score {score} needs gradients and batches has none: give one batch for each step")
    return {layer.weight_name: collector.positions(name, _whole(layer)) for name, layer in layers.items()}


class MaskCollector:
    """Gathers, during backward, what the mask is chosen from, one layer at a time.

    The gradient ``G = dYᵀ x`` of each adapted weight is formed inside its layer's backward, a block of rows at a time;
    each block is given to ``reduce(block, owner)``, which leaves the sum over ranks on the owner. There it is added up
    over the micro-batches of one optimizer step, and :meth:`end_step` folds that gradient into the running score.
    With ``single`` the gradient of one micro-batch is all there is: the owner keeps its largest entries alone.

    Args:
        layers: the adapted layers by name; those without a sparse part are left alone.
        score: a score that comes from gradients.
        owners: layer name -> rank that keeps it.
        rank: this rank.
        reduce: sums a tensor over ranks onto the owner, in place.
        single: one optimizer step of one micro-batch a rank.
        steps: optimizer steps that will be collected; with one the gradient is the sum, and no second matrix is kept.
        device_bytes: what the kept matrices may take on the device; those of further layers are kept in host memory.
        agree: do all ranks give this name now? Asked before a layer's gradient is summed, so that a layer that one rank
            did not use is an error and not the sum of two layers' gradients.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLinear],
        score: Score,
        owners: Mapping[str, int],
        rank: int,
        reduce: Callable[[Tensor, int], None],
        single: bool = False,
        steps: int = 2,
        device_bytes: int | None = None,
        agree: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.layers = {name: layer for name, layer in layers.items() if layer.entries}
        self.score, self.ranking = score, ranking_of(score)
        self.owners, self.rank, self.reduce, self.single, self.agree = owners, rank, reduce, single, agree
        self.totals: dict[str, Tensor] = {}
        self.steps = 0
        self._on_host, self.kept_bytes = self._place(1 if steps == 1 else 2, device_bytes)
        self._current: dict[str, Tensor] = {}
        self._largest: dict[str, RunningTopK] = {}

    def _place(self, matrices: int, device_bytes: int | None) -> tuple[set[str], dict[str, int]]:
        """The layers of this rank whose ``matrices`` do not fit the device, and the bytes kept ``device`` and ``host``."""
        on_host: set[str] = set()
        kept = {"device": 0, "host": 0}
        for name, layer in self.layers.items():
            if self.owners[name] != self.rank:
                continue
            wide = torch.promote_types(torch.float32, layer.dtype).itemsize
            # scores and positions of the best candidates, or whole matrices
            size = (wide + 4) * layer.entries if self.single else matrices * wide * layer.weight_numel
            fits = self.single or device_bytes is None or kept["device"] + size <= device_bytes
            kept["device" if fits else "host"] += size
            on_host |= set() if fits else {name}
        return on_host, kept

    def attach(self) -> None:
        for name, layer in self.layers.items():
            layer.collect = functools.partial(self._add, name)

    def detach(self) -> None:
        for layer in self.layers.values():
            layer.collect = None

    def _add(self, name: str, grad_TN: Tensor, x_TM: Tensor) -> None:
        layer, owner = self.layers[name], self.owners[name]
        if name in self._largest:
            raise ValueError(
                f"{layer.weight_name} is used more than once in a forward pass; with mask.steps 1 and one micro-batch a "
                "step no sum of gradients is kept: set mask.steps to 2"
            )
        if not self.agree(name):
            raise ValueError(
                f"the ranks used different layers in one step (here {name}), so their gradients cannot be summed for a mask: "
                "leave layers that are not used by every example (experts, layer drop) out of adapter.target_modules"
            )
        if self.single:
            self._largest[name] = RunningTopK(layer.entries)
        for first, block in gradient_blocks(*((x_TM, grad_TN) if layer.transposed else (grad_TN, x_TM))):
            self.reduce(block, owner)
            if owner == self.rank:
                self._take(name, first, block)

    def _take(self, name: str, first: int, block: Tensor) -> None:
        """Rows of a gradient, from ``first`` on, summed over the ranks."""
        layer, rows = self.layers[name], slice(first, first + len(block))
        if self.single:
            term = block.square_() if self.ranking.gradient == "squared" else block
            weight = _whole(layer, rows) if self.ranking.weight else layer.weight
            score = gradient_score(self.score, term, weight)
            self._largest[name].add(score, first * layer.weight_shape[1])
        else:
            if name not in self._current:
                device = torch.device("cpu") if name in self._on_host else block.device
                self._current[name] = torch.zeros(layer.weight_shape, dtype=block.dtype, device=device)
            self._current[name][rows] += block.to(self._current[name].device)

    def tensors(self) -> list[Tensor]:
        """All that is kept of gradients on this rank now."""
        candidates = [tensor for largest in self._largest.values() for tensor in largest.tensors()]
        return [*self._current.values(), *self.totals.values(), *candidates]

    def end_step(self, scale: float = 1.0, valid: bool = True) -> None:
        """Close an optimizer step. ``scale``: what the loss was multiplied with; ``valid`` false (fp16 overflow) forgets it."""
        current, self._current = self._current, {}
        if not valid:
            self._largest = {}
            return
        self.steps += 1
        for name, gradient in current.items():
            gradient /= scale
            term = gradient.square_() if self.ranking.gradient == "squared" else gradient
            if name in self.totals:
                self.totals[name] += term
            else:
                self.totals[name] = term

    def restore(self, totals: Mapping[str, Tensor], steps: int) -> None:
        """Go on from the sums that another collector had after ``steps`` steps; this rank takes those it owns."""
        owned = {name: layer for name, layer in self.layers.items() if self.owners[name] == self.rank}
        self.totals = {
            name: totals[name].to("cpu" if name in self._on_host else layer.weight.device, copy=True)
            for name, layer in owned.items()
            if name in totals
        }
        self.steps = steps

    def positions(self, name: str, weight: Tensor) -> Tensor:
        """The mask of a layer that this rank owns. Shapes: weight, the layer's, whole; (Z,) int32.

        Raises:
            ValueError: no valid step was collected, or this layer's gradient was zero everywhere.
        """
        if self.steps == 0:
            raise ValueError(
                "no gradient was collected for the mask (every collect step overflowed): raise mask.steps, lower "
                "fp16.initial_scale_power, or use bf16"
            )
        layer = self.layers[name]
        largest, total = self._largest.get(name), self.totals.get(name)
        scores = largest.scores() if largest is not None else total
        if scores is None or not bool(scores.any()):
            raise ValueError(
                f"the gradient of {layer.weight_name} is zero everywhere, so it has no mask: leave the layer out of "
                "adapter.target_modules, or raise mask.warmup_steps or mask.steps"
            )
        if largest is not None:
            _check_finite(scores)
            return largest.positions()
        return top_positions(gradient_score(self.score, scores.to(weight.device), weight), layer.entries)


def gradient_score(kind: Score, total: Tensor, weight: Tensor) -> Tensor:
    """The score of every entry from ``total``, the sum over steps of what :class:`rosa_ds.config.mask_scores.Ranking` says.

    Raises: ValueError for a score that does not come from gradients.
    """
    ranking = ranking_of(kind)
    if ranking.gradient is None or ranking.of is None:
        from_gradients = [name for name, other in RANKINGS.items() if other.gradient is not None]
        raise ValueError(f"mask.score {kind!r} does not come from gradients: use one of {', '.join(from_gradients)}")
    return ranking.of(total, weight.detach())


def static_positions(kind: Score, layer: AdaptedLinear, weight: Tensor, seed: int) -> Tensor:
    """The mask of a score that needs no gradient. Shapes: weight whole; (Z,) int32."""
    ranking = ranking_of(kind)
    if ranking.gradient is not None:
        raise ValueError(f"mask.score {kind!r} needs gradients")
    if ranking.of is None:
        generator = keyed_generator(seed, layer.name, "mask")
        chosen = torch.randperm(layer.weight_numel, generator=generator)[: layer.entries]
        return chosen.sort().values.to(torch.int32)
    return top_positions(ranking.of(weight.detach(), weight.detach()), layer.entries)


def top_positions(score: Tensor, count: int) -> Tensor:
    """The ``count`` entries with the largest score. Shapes: score any; result (count,) int32, sorted."""
    _check_finite(score)
    return score.flatten().topk(count, sorted=False).indices.sort().values.to(torch.int32)


def _whole(layer: AdaptedLinear, rows: slice = slice(None)) -> Tensor:
    """Rows of a layer's base as it is stored, with what a draw has split off it."""
    A, B = layer.A, layer.B
    if A is not None and B is not None:
        A, B = (A[:, rows], B) if layer.transposed else (A, B[rows])  # type: ignore[assignment]
    return layer.undrawn(layer.weight_rows(rows), A, B)


def _check_finite(score: Tensor) -> None:
    if not torch.isfinite(score).all():
        raise ValueError("a mask's score is not finite: the loss or its gradient overflowed while it was collected")


def set_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Give every layer with a sparse part its positions; nothing is set unless all fit. Raises: as :func:`check_mask`."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.entries}
    check_mask(layers, mask)
    for layer in layers.values():
        layer.set_positions(mask[layer.weight_name])


def check_mask(layers: Mapping[str, AdaptedLinear], mask: Mapping[str, Tensor]) -> None:
    """Does the mask fit these layers (by any key), each of which has a sparse part?

    Raises:
        ValueError: a layer without a mask, a mask without a layer, or positions that do not fit.
    """
    layers = {layer.weight_name: layer for layer in layers.values()}
    unknown = sorted(set(mask) - set(layers))
    missing = sorted(set(layers) - set(mask))
    if unknown:
        raise ValueError(f"the mask has {unknown[0]}, which has no sparse part here.{did_you_mean(unknown[0], layers)}")
    if missing:
        raise ValueError(
            f"the mask has nothing for {missing[0]} ({len(missing)} layers): was it made with other targets?"
        )
    for name, layer in layers.items():
        layer.check_positions(mask[name])


def save_mask(mask: Mapping[str, Tensor], path: Path, origin: Mapping[str, str] | None = None) -> None:
    """Write positions as safetensors, one int32 tensor per weight name; ``origin`` says how the mask came about.

    The same mask and origin give the same bytes (safetensors orders several metadata keys at random, so there is one).
    """
    temporary = path.with_name(f".{path.name}.partial")
    metadata = {"rosa_ds": json.dumps({"kind": "mask", **(origin or {})}, sort_keys=True)}
    write_tensors(temporary, mask, metadata)
    sync_files([temporary])
    temporary.rename(path)


def open_mask(path: Path) -> TensorFiles:
    """A mask that :func:`save_mask` wrote, each matrix's read when it is asked for. Raises ValueError if it is no such file."""
    tensors = TensorFiles([path])
    try:
        kind = json.loads(tensors.metadata.get("rosa_ds", "{}")).get("kind")
    except (ValueError, AttributeError):  # another program's
        kind = None
    if kind != "mask":
        raise ValueError(f"{path} is not a mask: mask.load takes the mask.safetensors of a run folder")
    return tensors


def load_mask(path: Path) -> Mask:
    """:func:`open_mask` with all of it read."""
    return dict(open_mask(path))
