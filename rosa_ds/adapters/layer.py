"""One adapted linear layer: a frozen base weight with an optional low-rank and an optional sparse part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

import rosa_kernels
from rosa_ds import zero
from rosa_ds.adapters.low_rank import initial_A, low_rank_delta
from rosa_ds.adapters.subspace import split_off
from rosa_ds.config.schema import DrawSettings
from rosa_ds.models.quantized import PACKED, SCALES, QuantizedLinear, to_dtype
from rosa_kernels.adapter_linear.op import Around, Collect, SparseProduct
from rosa_kernels.pattern.plan import waits_for_device

MAX_POSITIONS = 2**31 - 1


class AdaptedLinear(nn.Module):
    """``y = x (W + S)ᵀ + scale · drop(x) Aᵀ Bᵀ + bias`` in place of an ``nn.Linear``, transformers' ``Conv1D`` or a quantised one.

    Parameters keep the base layer's names (``weight``, ``bias``), so the names of the base model do not change;
    the trainable ones are ``A`` (R, M), ``B`` (N, R) and ``values`` (Z,), with ``positions`` (Z,) frozen int32.
    The sparse part sleeps until :meth:`set_positions`; ``values`` then has a zero gradient. Under ZeRO-3 all of them are
    partitioned and whole only inside forward and backward, so shapes come from ``in_features`` and ``out_features``.

    The subspace methods' ``A`` and ``B`` are split off the base, ``W`` being what is left of it. A quantised ``weight`` stays as it
    is: what draws make of it is ``W`` = its numbers + ``change``, a frozen parameter in the shape of the dense weight.

    Source: RoSA, arXiv 2401.04679; ROSA, arXiv 2407.07802.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    A: nn.Parameter | None
    B: nn.Parameter | None
    values: nn.Parameter | None
    positions: nn.Parameter | None
    change: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear | Conv1D | QuantizedLinear,
        name: str,
        rank: int,
        scale: float,
        dropout: float,
        entries: int,
        seed: int,
        sparse_product: SparseProduct = "scatter",
        draws: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.form = base.form if isinstance(base, QuantizedLinear) else None
        self.transposed = base.transposed if isinstance(base, QuantizedLinear) else isinstance(base, Conv1D)
        assert isinstance(base.weight, nn.Parameter)
        self.weight = base.weight
        self.weight_scales = base.weight_scales if isinstance(base, QuantizedLinear) else None
        self.bias = base.bias
        shape = stored_shape(base)
        self.in_features, self.out_features = shape if self.transposed else shape[::-1]
        self.rank, self.scale, self.dropout, self.entries, self.seed = rank, scale, dropout, entries, seed
        self.sparse_product: SparseProduct = sparse_product
        self.collect: Collect | None = None
        self.around: Around | None = None
        self.mask_known = False
        self.disabled = False  # computes as the base layer does
        self.drawn = False  # whether A and B are a piece of the weight, which alone is then not the base any more
        self.plan: rosa_kernels.Plan | None = None
        device = self.weight.device
        if rank:
            # on the meta device numbers are not needed: who fills the parameters asks initial_parameters
            shape_A = (rank, self.in_features)
            A = (
                torch.empty(shape_A, device=device)
                if device.type == "meta"
                else initial_A(name, *shape_A, seed).to(device)
            )
            self.A = nn.Parameter(A)
            self.B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        else:
            self.A = self.B = None
        if entries:
            self.values = nn.Parameter(torch.zeros(entries, device=device))
            unknown = torch.full((entries,), -1, dtype=torch.int32, device=device)
            self.positions = nn.Parameter(unknown, requires_grad=False)
        else:
            self.values = self.positions = None
        if draws and rank and self.form is not None:
            change = torch.zeros(self.form.shape, dtype=self.form.dtype, device=device)
            self.change = nn.Parameter(change, requires_grad=False)
        else:
            self.change = None

    @property
    def dtype(self) -> torch.dtype:
        """In which forward sees the weight."""
        return self.weight.dtype if self.form is None else self.form.dtype

    @property
    def weight_name(self) -> str:
        """Name of the base weight in the model, the key of this layer's mask."""
        return f"{self.name}.weight"

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the whole ``weight`` as it is stored."""
        sizes = (self.out_features, self.in_features)
        return sizes[::-1] if self.transposed else sizes

    @property
    def drawn_name(self) -> str:
        """Name of :attr:`drawn_parameter` in the model."""
        return self.weight_name if self.form is None else f"{self.name}.change"

    @property
    def drawn_parameter(self) -> nn.Parameter:
        """What draws write: the weight, or of a quantised one the change beside it."""
        parameter = self.weight if self.form is None else self.change
        assert parameter is not None
        return parameter

    @property
    def weight_numel(self) -> int:
        """Numbers of the whole ``weight``."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., M); result (..., N), of the weight's dtype, which is x's but under autocast."""
        if self.disabled:
            return self._base_forward(x)
        return rosa_kernels.adapter_linear(
            x if self.form is None else to_dtype(x, self.form.dtype),
            self.weight,
            self.bias,
            self.A,
            self.B,
            self.scale,
            self.values,
            self.positions if self.mask_known else None,
            self.dropout if self.training else 0.0,
            transposed=self.transposed,
            plan=self._current_plan(),
            sparse_product=self.sparse_product,
            dequantize=None if self.form is None else self._dense,
            collect=self.collect,
            around=self.around if self.mask_known else None,
        )

    def _base_forward(self, x: Tensor) -> Tensor:
        """With the operations of the layer that this one replaced, so that not a bit differs."""
        if self.form is not None:
            return self.base_layer()(x)
        if not self.transposed:
            return nn.functional.linear(x, self.weight, self.bias)
        assert self.bias is not None
        y = torch.addmm(self.bias, x.view(-1, self.in_features), self.weight)
        return y.view(*x.shape[:-1], self.out_features)

    def _dense(self, packed: Tensor) -> Tensor:
        """A quantised weight as forward sees it, a new tensor. Of a layer whose parameters are whole."""
        assert self.form is not None
        assert self.weight_scales is not None
        dense = self.form.unpack(packed, self.weight_scales)
        return dense if self.change is None else dense.add_(self.change)

    def whole_weight(self) -> Tensor:
        """All of the base as forward sees it, in the layout of ``weight``; of a quantised one in float32. Collective if partitioned."""
        frozen = self.frozen_weight()
        if frozen is None:
            return zero.read_whole(self.weight)
        return frozen if self.change is None else frozen.add_(zero.read_whole(self.change).float())

    def frozen_weight(self) -> Tensor | None:
        """What no draw changes: the numbers of a quantised weight in float32; of a dense one nothing. Collective if partitioned."""
        if self.form is None or self.weight_scales is None:
            return None
        packed, scales = (zero.read_whole(part) for part in (self.weight, self.weight_scales))
        return self.form.unpack(packed, scales, torch.float32)

    def weight_rows(self, rows: slice) -> Tensor:
        """Rows of the weight as it is stored densely. Of a layer whose parameters are whole."""
        return (self.weight if self.form is None else self._dense(self.weight))[rows]

    def _current_plan(self) -> rosa_kernels.Plan | None:
        """The mask's plan, made when the mask is set, or here after the layer was moved, loaded or copied.

        A plan may be as large as the positions. Where those are partitioned, a CPU makes it again in each backward; a
        device, which would be waited for, keeps it.
        """
        if self.plan is None and self.mask_known and self.positions is not None:
            self._make_plan(self.positions)
        return self.plan

    def _make_plan(self, positions: Tensor) -> None:
        if isinstance(positions, FakeTensor):
            return  # of a plan of memory: there is nothing to sort
        divided = self.positions is not None and zero.is_partitioned(self.positions)
        if positions.numel() == self.entries and (not divided or waits_for_device(positions.device)):
            self.plan = rosa_kernels.make_plan(positions, *self.weight_shape, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        if self.plan is not None and self.positions is not None and self.plan.device != self.positions.device:
            self.plan = None
        return self

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.plan = None
        if self.positions is not None and self.positions.numel() == self.entries and not self.positions.is_meta:
            self.mask_known = not self._problem_of(self.positions)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None, "around": None}

    def _problem_of(self, positions: Tensor) -> str:
        """What keeps these positions from being a mask of this layer, if anything."""
        problem = ""
        if positions.shape != (self.entries,) or positions.dtype != torch.int32:
            problem = f"{tuple(positions.shape)} of {positions.dtype} given, ({self.entries},) of torch.int32 expected"
        elif self.entries and (positions[0] < 0 or positions[-1] >= self.weight_numel):
            problem = f"indices from {int(positions[0])} to {int(positions[-1])} in {self.weight_numel} entries"
        elif bool((positions[1:] <= positions[:-1]).any()):
            problem = "not sorted, or an entry stands twice"
        return problem

    def check_positions(self, positions: Tensor) -> None:
        """Raise ValueError unless ``positions`` is a mask of this layer: (Z,) int32, strictly increasing, in range."""
        if problem := self._problem_of(positions):
            raise ValueError(f"mask of {self.weight_name}: {problem}")

    @torch.no_grad()
    def set_positions(self, positions: Tensor) -> None:
        """Fix which entries the sparse part trains. Shapes: (Z,) int32, sorted. Raises: see check_positions."""
        self.check_positions(positions)
        assert self.positions is not None
        zero.write_whole(self.positions, positions)
        self.mask_known = True
        self.plan = None
        if not self.positions.is_meta:
            self._make_plan(positions.to(self.positions.device))

    @torch.no_grad()
    def initial_parameters(self) -> dict[str, Tensor]:
        """Fresh float32 numbers of the trainable parts, by parameter name: what a restart begins with."""
        fresh: dict[str, Tensor] = {}
        if self.A is not None and self.B is not None:
            fresh["A"] = initial_A(self.name, self.rank, self.in_features, self.seed)
            fresh["B"] = torch.zeros(self.out_features, self.rank)
        if self.values is not None:
            fresh["values"] = torch.zeros(self.entries)
        return fresh

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """``W + scale · B A`` in float32 or wider, in the layout of ``weight``."""
        wide = torch.promote_types(torch.float32, self.dtype)
        folded = self.whole_weight().to(wide, copy=self.form is None)
        if self.A is not None and self.B is not None:
            delta = low_rank_delta(self.A, self.B, self.scale)
            folded += delta.T if self.transposed else delta
        return folded

    @torch.no_grad()
    def undrawn(self, weight: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
        """``weight``, or rows of it, with the piece that a draw split off it: the matrix whose magnitude a mask may ask for.

        Of a layer that was not drawn ``weight`` itself. Shapes: as they are stored; ``A``, ``B`` with the same rows left out.
        """
        if not self.drawn or A is None or B is None:
            return weight
        delta = low_rank_delta(A, B, self.scale)
        return weight.detach() + (delta.T if self.transposed else delta)

    @torch.no_grad()
    def redraw(self, settings: DrawSettings, generator: torch.Generator) -> None:
        """Fold the low-rank part into the base and split a new one off; the function stays, but for rounding the base.

        Of a layer whose parameters are whole. Raises: ValueError as :func:`rosa_ds.adapters.subspace.split_off`.
        """
        A, B = self.A, self.B
        if A is None or B is None:
            raise ValueError("it has no low-rank part")
        folded = self.folded_weight()
        narrow = min(self.dtype, A.dtype, key=lambda dtype: dtype.itemsize)
        drawn = split_off(folded.T if self.transposed else folded, self.rank, settings, generator, narrow)
        A.copy_(drawn.A)
        B.copy_(drawn.B)
        rest = drawn.rest.T if self.transposed else drawn.rest
        frozen = self.frozen_weight()
        self.drawn_parameter.copy_(rest if frozen is None else rest - frozen)
        self.drawn = True

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + scale · B A + S`` in float32 or wider, in the layout of ``weight``."""
        merged = self.folded_weight()
        if self.values is not None and self.positions is not None and self.mask_known:
            merged.view(-1).index_add_(0, self.positions, self.values.detach().to(merged.dtype))
        return merged

    def base_layer(self) -> nn.Linear | Conv1D | QuantizedLinear:
        """The layer that this one replaced, with the same Parameters."""
        if self.form is None or self.weight_scales is None:
            return plain_layer(self, self.weight)
        base = QuantizedLinear(self.form, self.transposed, self.bias, {PACKED: self.weight, SCALES: self.weight_scales})
        return base.train(self.training)

    def extra_repr(self) -> str:
        kept = "" if self.form is None else f", {self.form.kind}"
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, entries={self.entries}{kept}"


def stored_shape(layer: nn.Module) -> torch.Size:
    """Of a linear layer's weight as it is stored, or if it is quantised as it was before. Without gathering it."""
    if isinstance(layer, QuantizedLinear):
        return torch.Size(layer.form.shape)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return zero.full_shape(weight)


def plain_layer(layer: AdaptedLinear | QuantizedLinear, weight: nn.Parameter) -> nn.Linear | Conv1D:
    """An ordinary layer with this ``weight``, which is dense, and the layer's ``bias`` Parameter."""
    plain: nn.Linear | Conv1D
    with torch.device("meta"):
        if layer.transposed:
            plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = weight
    plain.bias = layer.bias
    return plain.train(layer.training)
