"""ROSA's draws in a run: each layer is factorised by its owner, and all ranks take the owner's result.

All ranks work on layers at once, each whole on its owner only. What a draw makes of a weight is
sent to all, so that every rank has the same bits whatever its hardware; ZeRO-3 keeps its share of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rosa_ds import distributed
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.low_rank import draw_generator, float32_products
from rosa_ds.adapters.subspace import Drawn, project_moments, split_off
from rosa_ds.checkpoints.checkpoint import Checkpoint, MethodState, SavedBase
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import DrawSettings, RunConfig
from rosa_ds.memory.account import Term
from rosa_ds.memory.measuring import peak_beside
from rosa_ds.methods import method
from rosa_ds.methods.subspace_base import ChangedBase, Packed, keeps_residual

if TYPE_CHECKING:
    from rosa_ds.training.schedule import Schedule, Step
    from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)
RESIDUAL = "base residual"
DRAWING, WORKSPACE = "draw, at once", "draw, factorisation"
GROUP = "low_rank"
MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNMENT = 16
"""Bytes, of the tensors in a message."""
BATCH_BYTES = 64 * 2**20
"""Of float32 weights that a rank holds at once: one large layer, or several small ones, so that ranks wait less often."""


class Method(method.Method):
    """Draws the low-rank part again before the steps that the schedule says.

    Raises: ValueError if no layer has a low-rank part.
    """

    def __init__(self, model: nn.Module, settings: RunConfig, schedule: Schedule) -> None:
        super().__init__(model, settings, schedule)
        self.layers = {name: layer for name, layer in adapted_layers(model).items() if layer.rank}
        if not self.layers:
            raise ValueError(
                f"method {settings.method} has nothing to draw: adapter.rank_pattern gives every layer rank 0"
            )
        self._draw_bytes = 0

    def start(self, context: method.Context) -> None:
        super().start(context)
        base = ChangedBase(self.layers, self.settings.draw)
        self.drawing = Drawing(base, context.state, self.settings.draw, self.settings.training.seed)

    def restore(self, saved: Checkpoint, source: Path) -> None:
        if self.schedule.has_drawn(saved.step):
            self.drawing.base.restore(saved.base_changes, saved.drift, SavedBase.of(source))

    def before_step(self, step: Step) -> None:
        """Draw again, unless the run was asked to stop: a resumed one then makes the same draw."""
        if step.draw is None:
            return
        self.context.leave_if_asked()
        measures = not self._draw_bytes
        with peak_beside(self.model, self.context.state) if measures else contextlib.nullcontext() as seen:
            fields = self.drawing.draw(step.draw)
        if seen is not None:
            self._draw_bytes = seen.peak
        self.context.record(step=step.number, event="draw", **fields)
        logger.info(
            "draw %d before step %d: %s",
            step.draw,
            step.number + 1,
            describe_draw(fields, self.settings.draw.moments),
        )

    def state(self) -> MethodState | None:
        base = self.drawing.base
        if not any(layer.drawn for layer in self.layers.values()):
            return MethodState({"drift": base.drift})
        same = base.saved
        gone = same is not None and distributed.is_main() and not same.is_there()  # somebody has deleted it
        same = None if distributed.any_rank(gone) else same
        changes = base.read(self.drawing.owners) if same is None else {}
        return MethodState({"drift": base.drift, "base_changes": changes}, same)

    def saved(self, folder: Path) -> None:
        if any(layer.drawn for layer in self.layers.values()):
            with distributed.together():
                self.drawing.base.saved = SavedBase.of(folder)

    @property
    def saved_base(self) -> SavedBase | None:
        return self.drawing.base.saved

    def measured_memory(self) -> dict[str, int]:
        found = {RESIDUAL: self.drawing.base.bytes, DRAWING: self._draw_bytes}
        return {name: size for name, size in found.items() if size}

    @staticmethod
    def memory_terms(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int, gpu: bool) -> list[Term]:
        layers = {name: layer for name, layer in adapted_layers(model).items() if layer.rank}
        dtype = getattr(torch, plan.dtype)
        kept = [layer.weight_numel for layer in layers.values() if keeps_residual(settings.draw, layer, dtype)]
        drawing, workspace = _draw_bytes(layers, plan, settings.draw, ranks)
        remedy = "--draw.directions projection factorises nothing"
        residual = Term(RESIDUAL, 2 * sum(-(-numel // ranks) for numel in kept), unsharded=2 * sum(kept))
        return [
            *([residual] if kept else []),
            Term(DRAWING, drawing, "between steps", remedy=remedy),
            Term(WORKSPACE, workspace, "between steps"),
        ]


class Drawing:
    """The layers whose low-rank part is drawn from their base.

    Raises: ValueError for moments that cannot be projected.
    """

    def __init__(self, base: ChangedBase, state: TrainedState, settings: DrawSettings, seed: int) -> None:
        self.base, self.layers = base, base.layers
        self.state, self.settings, self.seed = state, settings, seed
        self.owners, self.turns = share_draws(self.layers, settings, distributed.world_size())
        if settings.moments == "project" and any(group.get("amsgrad") for group in state.inner.param_groups):
            raise ValueError("draw.moments project does not know AMSGrad's third moment: use reset, or no amsgrad")

    @torch.no_grad()
    def draw(self, number: int) -> dict[str, Any]:
        """Fold and draw all layers again; collective.

        Returns: what metrics.jsonl says of it. ``rounding`` is the largest relative error of a layer's ``W + B A``,
        ``compute_rounding`` that of the 16-bit base alone, which forward uses.
        Raises: ValueError for a weight that cannot be factorised, RuntimeError if moments are not what was asked for.
        """
        with self.state.float32_moments():
            begun = time.monotonic()
            keys = self.state.moment_keys(GROUP) if self.settings.moments == "project" and number else []
            done: list[_Result] = []
            longest = max(self._places(name, keys)[1] for name in self.layers)
            # one for all layers, so that its pages are touched once
            message = torch.empty(longest, dtype=torch.uint8, device=distributed.device())
            hidden = None if distributed.is_main() else True
            with tqdm(total=len(self.layers), desc=f"draw {number}", unit="layer", leave=False, disable=hidden) as bar:
                for turn in self.turns:
                    batch = [name for names in turn for name in names]
                    distributed.progress(f"draw {number}, {batch[0]}")
                    results = self._work_on(batch, number, keys)
                    done += [dataclasses.replace(result, tensors={}) for result in results.values()]
                    for name in batch:
                        self._take(name, results.pop(name, None), keys, message)
                    bar.update(len(batch))
            found = [result for part in distributed.gather_objects(done) for result in part]
            rounding = max(result.rounding for result in found)
            self.base.drift = (self.base.drift**2 + rounding**2) ** 0.5
            return {
                "number": number,
                "directions": self.settings.directions,
                "layers": len(self.layers),
                "rounding": rounding,
                "compute_rounding": max(result.compute_rounding for result in found),
                "drift": self.base.drift,
                "fallbacks": sum(result.fallbacks for result in found),
                "moments_reset": self._finish_moments(),
                "seconds": time.monotonic() - begun,
            }

    def _work_on(self, batch: list[str], number: int, keys: list[str]) -> dict[str, _Result]:
        """Gather the layers of a batch one after another; each rank draws its own. An error is raised on all ranks."""
        mine = self._read(batch, keys)
        results: dict[str, _Result] = {}
        problem: Exception | None = None
        name = ""
        try:
            while mine:
                name = mine[0].name
                results[name] = self._split(mine.pop(0), number)
        except ValueError as error:
            problem = ValueError(f"{name}: {error}")
        except Exception as error:
            problem = error
        distributed.raise_everywhere(problem)
        return results

    def _read(self, batch: list[str], keys: list[str]) -> list[_Layer]:
        """Those of the layers that are this rank's; collective."""
        wanted = [(f"{name}.{part}", key) for name in batch for part in "AB" for key in (None, *keys)]
        own = {f"{name}.{part}" for name in batch for part in "AB" if self.owners[name] == distributed.rank()}
        found = self.state.read_for(own, wanted)
        mine = []
        for name in batch:
            base = self.base.read_weight(name, self.owners[name])
            if base is not None:
                A, B = found[f"{name}.A", None].to(base[0]), found[f"{name}.B", None].to(base[0])
                moments = {f"{part}/{key}": found[f"{name}.{part}", key] for part in "AB" for key in keys}
                mine.append(_Layer(name, *base, A, B, moments))
        return mine

    @float32_products()
    def _split(self, mine: _Layer, number: int) -> _Result:
        name, layer = mine.name, self.layers[mine.name]
        folded = torch.addmm(mine.weight, mine.B, mine.A, alpha=layer.scale)
        drawn = split_off(folded, layer.rank, self.settings, draw_generator(self.seed, name, number), layer.dtype)
        tensors = {"A": drawn.A, "B": drawn.B, **self.base.pack(name, drawn.rest, mine.packed)}
        compute_rounding = drawn.error(self.base.seen(name, tensors, mine.packed), folded)
        rounding = drawn.error(drawn.rest, folded) if "residual" in tensors else compute_rounding
        if mine.moments:
            tensors |= _project(mine, drawn)
        keys = {key.partition("/")[2] for key in tensors if "/" in key}
        found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        assert found == self._shapes(name, keys), f"{name}: not what the others wait for: {found}"
        return _Result(tensors, rounding, compute_rounding, drawn.fallbacks)

    def _shapes(self, name: str, keys: Iterable[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What the owner sends of a layer, in this order."""
        layer = self.layers[name]
        factors = {"A": (layer.rank, layer.in_features), "B": (layer.out_features, layer.rank)}
        moments = {f"{part}/{key}": (factors[part], torch.float32) for part in factors for key in keys}
        return {part: (shape, torch.float32) for part, shape in factors.items()} | self.base.shapes(name) | moments

    def _places(self, name: str, keys: Iterable[str]) -> tuple[dict[str, tuple[int, int]], int]:
        """Where in a layer's message each tensor begins and ends, and how long it is, in bytes."""
        places, end = {}, 0
        for key, (shape, dtype) in self._shapes(name, keys).items():
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + math.prod(shape) * dtype.itemsize
            places[key] = begin, end
        return places, end

    def _take(self, name: str, result: _Result | None, keys: list[str], message: Tensor) -> None:
        """Send or receive what the owner found, and write it: factors in both copies, the base, the moments. Collective."""
        shapes = self._shapes(name, keys)
        places, length = self._places(name, keys)
        tensors = {key: message[slice(*places[key])].view(dtype).view(shape) for key, (shape, dtype) in shapes.items()}
        if result is not None:
            for key, tensor in result.tensors.items():
                tensors[key].copy_(tensor)
        distributed.broadcast(message[:length], self.owners[name])
        self.state.write({f"{name}.{part}": tensors[part] for part in ("A", "B")})
        self.base.write(name, tensors)
        for key, tensor in tensors.items():
            part, _, moment = key.partition("/")
            if moment:
                self.state.masters.write(f"{name}.{part}", moment, tensor)

    def _finish_moments(self) -> float | None:
        """Forget the moments where that is wanted. Returns: the share of them that is zero now; ``None`` if none was kept."""
        if self.settings.moments != "reset" or not self.state.moment_keys(GROUP):
            return None
        self.state.reset_optimizer([GROUP])
        zeros, total = self.state.zeros(GROUP)
        if zeros < total or not total:
            raise RuntimeError(
                f"{zeros} of {total} moments were reset at a draw: this version of DeepSpeed keeps them in another "
                "place than rosa_ds knows; please report this"
            )
        return zeros / total


def _project(mine: _Layer, drawn: Drawn) -> dict[str, Tensor]:
    """All four moments of a layer along its new directions."""
    first_A, second_A, first_B, second_B = (mine.moments[f"{part}/{key}"].float() for part in "AB" for key in MOMENTS)
    first_A, second_A = project_moments(first_A, second_A, drawn.B, mine.B)
    first_B, second_B = project_moments(first_B.T, second_B.T, drawn.A.T, mine.A.T)
    moved = (first_A, second_A, first_B.T.contiguous(), second_B.T.contiguous())
    return dict(zip((f"{part}/{key}" for part in "AB" for key in MOMENTS), moved, strict=True))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer as its owner gathers it: its base (N, M) in float32 and what of it is quantised, its masters, and their moments where
    they are moved."""

    name: str
    weight: Tensor
    packed: Packed | None
    A: Tensor
    B: Tensor
    moments: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Result:
    """What the owner of a layer found: ``tensors`` by the names and in the shapes of ``Drawing._shapes``."""

    tensors: dict[str, Tensor]
    rounding: float
    compute_rounding: float
    fallbacks: int


def describe_draw(fields: Mapping[str, Any], moments: str) -> str:
    """What :meth:`Drawing.draw` tells of a draw, in words; ``moments`` as ``draw.moments``."""
    if moments == "reset" and fields["moments_reset"] is not None:
        moments = f"{fields['moments_reset']:.0%} reset"
    return (
        f"{fields['layers']} layers, {fields['directions']}; base rounded by {fields['rounding']:.1e}, drift {fields['drift']:.1e}, "
        f"moments: {moments}, {fields['seconds']:.1f} s"
    )


def share_draws(
    layers: Mapping[str, AdaptedLinear], settings: DrawSettings, ranks: int
) -> tuple[dict[str, int], list[list[list[str]]]]:
    """Layer -> the rank that draws it; and turns: of each rank as many layers as a little memory holds, all ranks' about
    as costly.
    """
    costs = {name: _cost(layer, settings) for name, layer in layers.items()}
    owners = distributed.owners_by_cost(costs, ranks)
    queues: list[list[list[str]]] = [[] for _ in range(ranks)]
    room = [0] * ranks
    for name in sorted(layers, key=lambda name: (-costs[name], name)):
        owner, size = owners[name], 4 * layers[name].weight_numel
        if size > room[owner]:
            queues[owner].append([])
            room[owner] = BATCH_BYTES
        queues[owner][-1].append(name)
        room[owner] -= size
    return owners, [list(turn) for turn in itertools.zip_longest(*queues, fillvalue=[])]


def _cost(layer: AdaptedLinear, settings: DrawSettings) -> int:
    """Operations of a draw, up to a factor."""
    small, large = sorted(layer.weight_shape)
    if settings.directions == "projection":
        return small * large * layer.rank
    return small * small * (large + 9 * small)


def _draw_bytes(
    layers: Mapping[str, AdaptedLinear], plan: DeepSpeedPlan, settings: DrawSettings, ranks: int
) -> tuple[int, int]:
    """On the rank with the most: tensors of a draw, and beside them what a factorisation takes for itself."""
    _, turns = share_draws(layers, settings, ranks)
    narrow = plan.dtype != "float32"
    copied = plan.stage == 3 or narrow
    dtype = getattr(torch, plan.dtype)
    moved = 3 if settings.moments == "project" else 1  # a factor, and its moments
    most = side = message = 0
    for mine in (names for turn in turns for names in turn):
        sizes = [layers[name].weight_shape for name in mine]
        factors = [4 * moved * layers[name].rank * sum(layers[name].weight_shape) for name in mine]
        held = sum(4 * rows * columns * copied for rows, columns in sizes) + sum(factors)
        for name, (rows, columns), factor in zip(mine, sizes, factors, strict=True):
            stored = dtype.itemsize + 2 * keeps_residual(settings, layers[name], dtype)
            matrix, side = 4 * rows * columns, max(side, min(rows, columns))
            message = max(message, stored * rows * columns + factor)
            # the fold; then Gram matrix and its eigenvectors, or what is left and its error, of a 16-bit one twice
            found = 0 if settings.directions == "projection" else 8 * min(rows, columns) ** 2
            most = max(most, held + factor + matrix + max(found, (3 if narrow else 2) * matrix))
            held += stored * rows * columns - matrix * copied
    return message + most, 0 if settings.directions == "projection" else 8 * side**2
