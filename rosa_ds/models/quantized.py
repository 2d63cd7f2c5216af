"""Weights in 4 or 8 bits: how one matrix is kept, and a linear layer that keeps its own so.

bitsandbytes' functions quantise and dequantise. Its modules are not used: on CPUs with AVX512-BF16 they repack the weight, which
ZeRO-3 does not survive. What is kept are two byte arrays a layer, ordinary frozen parameters, which DeepSpeed moves, partitions and
gathers like any other; no engine casts bytes to its own 16-bit type, as it would the float32 scales.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rosa_kernels

Kind = Literal["nf4", "int8"]
BLOCK, SCALE_BLOCK = 64, 256
ROWS_AT_ONCE = 2**23  # numbers that an int8 weight's float32 form is made of at a time
PACKED, SCALES = "weight", "weight_scales"


@dataclasses.dataclass(frozen=True)
class Form:
    """How a matrix is kept.

    ``nf4``: blocks of 64 entries of the flat matrix, 4 bits an entry, with the block's largest magnitude in float32, or with
    ``double`` in 8 bits (blocks of 256 of them): 4.5 or 4.127 bits an entry. ``int8``: 8 bits an entry and a float32 number a row.

    Attributes:
        shape: of the matrix as it is stored.
        dtype: in which forward and backward see it.

    Source: QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339 (its rounding; activations are not quantised).
    """

    kind: Kind
    double: bool
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def _blocks(self) -> int:
        return -(-self.numel // BLOCK)

    def sizes(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and type of the two arrays by name."""
        if self.kind == "int8":
            return {PACKED: (self.shape, torch.int8), SCALES: ((4 * self.shape[0], 1), torch.uint8)}
        scales = self._blocks + 4 * -(-self._blocks // SCALE_BLOCK) + 4 if self.double else 4 * self._blocks
        return {PACKED: ((-(-self.numel // 2), 1), torch.uint8), SCALES: ((scales, 1), torch.uint8)}

    @torch.no_grad()
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise a matrix. Shapes: weight as ``shape``, any floating-point type; result as :meth:`sizes`, on its device."""
        import bitsandbytes.functional as bnb

        if self.kind == "int8":
            # in float16 on every device, since on GPUs it is the only type that bitsandbytes takes
            packed, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
            return {PACKED: packed, SCALES: _bytes(scales.float())}
        packed, state = bnb.quantize_4bit(
            weight.float().reshape(-1), blocksize=BLOCK, compress_statistics=self.double, quant_type="nf4"
        )
        if not self.double:
            return {PACKED: packed, SCALES: _bytes(state.absmax)}
        return {PACKED: packed, SCALES: _bytes(state.state2.absmax, state.offset, state.absmax)}

    @torch.no_grad()
    def unpack(self, packed: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the arrays stand for, in ``dtype`` (by default the layer's own), a new tensor."""
        import bitsandbytes.functional as bnb

        dtype = self.dtype if dtype is None else dtype
        if self.kind == "int8":
            rows = _floats(scales, 0, self.shape[0])
            dense = torch.empty(self.shape, dtype=dtype, device=packed.device)
            for part in torch.arange(self.shape[0]).split(max(1, ROWS_AT_ONCE // self.shape[1])):  # it makes float32
                own = slice(int(part[0]), int(part[-1]) + 1)
                dense[own] = bnb.int8_vectorwise_dequant(packed[own], rows[own])
            return dense
        groups = -(-self._blocks // SCALE_BLOCK)
        if self.double:
            codes, offset = scales.reshape(-1)[4 * groups + 4 :].clone(), _floats(scales, 4 * groups, 1)
            largest = _floats(scales, 0, groups)
            absmax = offset + bnb.dequantize_blockwise(
                codes, absmax=largest, code=_scale_code(scales.device), blocksize=SCALE_BLOCK
            )
        else:
            absmax = _floats(scales, 0, self._blocks)
        # as rows of one block: 0.50's CPU kernel begins a block with each row, and is wrong for 160 columns
        shape = (self._blocks, BLOCK) if self.numel % BLOCK == 0 else (self.numel,)
        state = bnb.QuantState(absmax, torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return bnb.dequantize_4bit(packed.reshape(-1, 1), state).reshape(self.shape)


def _bytes(*tensors: Tensor) -> Tensor:
    """One after another, (n, 1) uint8."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])[:, None]


def _floats(content: Tensor, start: int, count: int) -> Tensor:
    """``count`` float32 numbers of an array of bytes. Cloned: gathered by ZeRO-3 it may begin at any address."""
    return content.reshape(-1)[start : start + 4 * count].clone().view(torch.float32)


@functools.cache
def _scale_code(device: torch.device) -> Tensor:
    """The 256 numbers of the 8-bit type that scales are kept in. Source: Dettmers et al., arXiv 2110.02861."""
    import bitsandbytes.functional as bnb

    return bnb.create_dynamic_map().to(device)


class QuantizedLinear(nn.Module):
    """A frozen ``nn.Linear`` or ``Conv1D`` whose weight is kept in 4 or 8 bits and is dense only while it is used.

    Parameters: ``weight`` and ``weight_scales``, what :meth:`Form.pack` made (on the meta device where nothing is given); ``bias`` is
    the dense layer's own.
    """

    weight: nn.Parameter
    weight_scales: nn.Parameter

    def __init__(
        self, form: Form, transposed: bool, bias: nn.Parameter | None, packed: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.form, self.transposed, self.bias = form, transposed, bias
        self.in_features, self.out_features = form.shape if transposed else form.shape[::-1]
        for name, (size, stored) in form.sizes().items():
            array = torch.empty(size, dtype=stored, device="meta") if packed is None else packed[name]
            kept = array if isinstance(array, nn.Parameter) else nn.Parameter(array, requires_grad=False)
            setattr(self, name, kept)

    def dense(self, packed: Tensor) -> Tensor:
        """The weight, given the parameter of that name."""
        return self.form.unpack(packed, self.weight_scales)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., M); result (..., N), of x's dtype."""
        x = to_dtype(x, self.form.dtype)
        return rosa_kernels.adapter_linear(x, self.weight, self.bias, transposed=self.transposed, dequantize=self.dense)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.form.kind}"


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input of a quantised layer. Raises: ValueError for another type than the layer's, but under autocast."""
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x is {x.dtype} and the weight is dequantised to {dtype}: cast x, or give dtype={x.dtype} to rosa_ds.quantize"
        )
    return x.to(dtype)


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """How a model's layers are quantised, by the names of the settings; nothing for a dense one."""
    forms = {form for module in model.modules() if isinstance(form := getattr(module, "form", None), Form)}
    kinds = {(form.kind, form.double) for form in forms}
    if not kinds:
        return {}
    kind, double = sorted(kinds)[0]
    return {"quantization": kind, "double_quantization": double}
