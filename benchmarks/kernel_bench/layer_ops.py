"""The low-rank products around dropout, and the whole adapted layer forward and backward; and how else to do them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rosa_kernels
from kernel_bench.cases import Case, Inputs
from kernel_bench.measure import Call, saved_bytes
from kernel_bench.ops import Candidate, Op, Outputs, missing
from kernel_bench.roofline import Work
from rosa_kernels.adapter_linear.reference import adapter_linear_reference
from rosa_kernels.low_rank import op as low_rank
from rosa_kernels.low_rank.reference import backward_reference, down_reference

SCALE = 2.0  # alpha / rank; PEFT's Supertuning has alpha = 2 · rank by default

# ---- low_rank


def _low_rank_ours(inputs: Inputs, grad_x_TM: Tensor, probability: float) -> Outputs:
    seed = torch.tensor([1])
    h_TR = low_rank.down(inputs.x_TM, inputs.A_RM, probability, seed)
    grad_A_RM = low_rank.backward(grad_x_TM, inputs.grad_h_TR, inputs.x_TM, inputs.A_RM, probability, seed)
    return {"h": h_TR, "grad_x": grad_x_TM, "grad_A": grad_A_RM}


def _low_rank_autograd(inputs: Inputs, grad_x_TM: Tensor, probability: float) -> Outputs:
    """torch's dropout, which keeps its mask, and the dropped x that the product keeps."""
    x_TM, A_RM = inputs.x_TM.detach().requires_grad_(), inputs.A_RM.detach().requires_grad_()
    h_TR = nn.functional.linear(nn.functional.dropout(x_TM, probability), A_RM)
    more, grad_A_RM = torch.autograd.grad(h_TR, (x_TM, A_RM), inputs.grad_h_TR)
    return {"h": h_TR.detach(), "grad_x": grad_x_TM.add_(more), "grad_A": grad_A_RM}


def _low_rank_reference(inputs: Inputs) -> Outputs:
    x_TM, A_RM = inputs.x_TM.double(), inputs.A_RM.double()
    ones = torch.ones_like(x_TM)
    grad_x_TM, grad_A_RM = backward_reference(inputs.grad_h_TR.double(), x_TM, A_RM, ones)
    grad_x_TM += inputs.grad_x_TM.double()
    return {"h": down_reference(x_TM, A_RM, ones), "grad_x": grad_x_TM, "grad_A": grad_A_RM}


def low_rank_candidates(case: Case) -> list[Candidate]:
    """Timed with dropout; the gate compares without it, since each draws its own."""

    def candidate(name: str, run: Callable[[Inputs, Tensor, float], Outputs]) -> Candidate:
        return Candidate(
            name,
            lambda inputs: lambda: run(inputs, inputs.grad_x_TM, case.dropout),
            lambda inputs: run(inputs, inputs.grad_x_TM.clone(), 0.0),
            _low_rank_reference,
        )

    return [
        candidate("rosa_kernels.low_rank", _low_rank_ours),
        candidate("torch, dropout mask kept", _low_rank_autograd),
    ]


def low_rank_work(case: Case) -> Work:
    """Bytes ``(4 T M + 2 T R + 3 R M) · itemsize``: x twice, its gradient read and written; operations ``6 T M R``.

    Of ``T R`` h is written and its gradient read, of ``R M`` A is read twice and its gradient written.
    """
    tokens, columns, rank = case.tokens, case.layer.columns, case.rank
    numbers = 4 * tokens * columns + 2 * tokens * rank + 3 * rank * columns
    return Work(numbers * case.dtype.itemsize, 6 * tokens * columns * rank)


# ---- adapter_linear

Parts = Literal["low-rank", "low-rank + sparse"]


@dataclass(frozen=True, eq=False)
class BoundLayer:
    """A layer on one set of inputs; ``trained``: A, B and with a sparse part the values, leaves of autograd."""

    inputs: Inputs
    forward: Callable[[Tensor], Tensor]
    trained: list[Tensor]

    def __call__(self) -> Outputs:
        """Forward and backward."""
        x_TM = self.inputs.x_TM.detach().requires_grad_()
        y_TN = self.forward(x_TM)
        grads = torch.autograd.grad(y_TN, [x_TM, *self.trained], self.inputs.grad_TN)
        names = ("grad_x", "grad_A", "grad_B", "grad_values")
        return {"y": y_TN.detach(), **dict(zip(names, grads, strict=False))}

    def saved(self) -> int:
        """Bytes kept for backward, without parameters and positions."""
        x_TM = self.inputs.x_TM.detach().requires_grad_()
        parameters = [*self.trained, self.inputs.weight_NM, self.inputs.positions_Z]
        return saved_bytes(lambda: self.forward(x_TM), parameters)


Build = Callable[[Inputs], BoundLayer]


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _ours(parts: Parts, sparse_product: Literal["scatter", "separate"] = "scatter") -> Build:
    def build(inputs: Inputs) -> BoundLayer:
        trained = _leaves(inputs.A_RM, inputs.B_NR, inputs.values_Z)
        A_RM, B_NR, values_Z = trained
        if parts == "low-rank":
            return BoundLayer(
                inputs,
                lambda x: rosa_kernels.adapter_linear(x, inputs.weight_NM, None, A_RM, B_NR, SCALE),
                trained[:2],
            )
        sparse: dict[str, Any] = {"values": values_Z, "positions": inputs.positions_Z, "plan": inputs.plan}
        return BoundLayer(
            inputs,
            lambda x: rosa_kernels.adapter_linear(
                x, inputs.weight_NM, None, A_RM, B_NR, SCALE, sparse_product=sparse_product, **sparse
            ),
            trained,
        )

    return build


def _autograd(inputs: Inputs) -> BoundLayer:
    trained = _leaves(inputs.A_RM, inputs.B_NR)

    def forward(x: Tensor) -> Tensor:
        down = nn.functional.linear(x, trained[0])
        return nn.functional.linear(x, inputs.weight_NM) + SCALE * nn.functional.linear(down, trained[1])

    return BoundLayer(inputs, forward, trained)


class _OneLinear(nn.Module):
    """What PEFT adapts: a model of one layer on a given weight, which is shared and not copied."""

    def __init__(self, weight_NM: Tensor) -> None:
        super().__init__()
        rows, columns = weight_NM.shape
        self.linear = nn.Linear(columns, rows, bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight_NM, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def _peft_layer(inputs: Inputs, config: Any) -> Any:
    """PEFT's layer alone: its model around it would cost Python time that a real model has once."""
    peft = importlib.import_module("peft")
    return peft.get_peft_model(_OneLinear(inputs.weight_NM), config).base_model.model.linear


@torch.no_grad()
def _set_low_rank(A: nn.Module, B: nn.Module, inputs: Inputs) -> list[Tensor]:
    weights = [module.get_parameter("weight") for module in (A, B)]
    for weight, value in zip(weights, (inputs.A_RM, inputs.B_NR), strict=True):
        weight.copy_(value)
    return list(weights)


def _peft_lora(inputs: Inputs) -> BoundLayer:
    rank = inputs.case.rank
    config = importlib.import_module("peft").LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["linear"])
    layer = _peft_layer(inputs, config)
    return BoundLayer(inputs, layer, _set_low_rank(layer.lora_A["default"], layer.lora_B["default"], inputs))


def _peft_supertuning(inputs: Inputs) -> BoundLayer:
    """Its r and its sparsity of this mask's density, but our positions in place of the weight's largest entries."""
    case = inputs.case
    density = (case.entries + 0.5) / inputs.weight_NM.numel()  # it rounds down
    config = importlib.import_module("peft").SupertuningConfig(
        r=case.rank, lora_alpha=SCALE * case.rank, sparsity=max(0.0, 1.0 - density), target_modules=["linear"]
    )
    layer = _peft_layer(inputs, config)
    low_rank_part = _set_low_rank(layer.supertuning_lora_A["default"], layer.supertuning_lora_B["default"], inputs)
    layer.supertuning_indices["default"] = inputs.positions_Z
    layer.supertuning_values["default"] = nn.Parameter(inputs.values_Z.float())
    return BoundLayer(inputs, layer, [*low_rank_part, layer.supertuning_values["default"]])


def _layer_reference(parts: Parts) -> Callable[[Inputs], Outputs]:
    def reference(inputs: Inputs) -> Outputs:
        x_TM, A_RM, B_NR, values_Z = _leaves(*(t.double() for t in (inputs.x_TM, inputs.A_RM, inputs.B_NR, inputs.values_Z)))  # fmt: skip
        sparse = (values_Z, inputs.positions_Z) if parts == "low-rank + sparse" else ()
        y_TN = adapter_linear_reference(x_TM, inputs.weight_NM.double(), None, A_RM, B_NR, SCALE, *sparse)
        leaves = {"grad_x": x_TM, "grad_A": A_RM, "grad_B": B_NR} | ({"grad_values": values_Z} if sparse else {})
        grads = torch.autograd.grad(y_TN, list(leaves.values()), inputs.grad_TN.double())
        return {"y": y_TN.detach(), **dict(zip(leaves, grads, strict=True))}

    return reference


def adapter_linear_candidates(case: Case) -> list[Candidate]:
    """Forward and backward to x and all that is trained. A layer is compared with ours of the same parts."""
    ours: dict[Parts, str] = {
        "low-rank": "rosa_kernels, low-rank",
        "low-rank + sparse": "rosa_kernels, low-rank + sparse",
    }

    references = {parts: _layer_reference(parts) for parts in ours}

    def candidate(name: str, parts: Parts, build: Build, absent: str = "") -> Candidate:
        def bind(inputs: Inputs) -> Call:
            return build(inputs)

        return Candidate(
            name,
            bind,
            lambda inputs: build(inputs)(),
            references[parts],
            ours[parts],
            absent,
            lambda inputs: build(inputs).saved(),
        )

    both: Parts = "low-rank + sparse"
    return [
        candidate(ours[both], both, _ours(both)),
        candidate("the same, sparse_product=separate", both, _ours(both, "separate")),
        candidate("PEFT Supertuning with rank", both, _peft_supertuning, missing("peft", "SupertuningConfig")),
        candidate(ours["low-rank"], "low-rank", _ours("low-rank")),
        candidate("torch autograd, LoRA", "low-rank", _autograd),
        candidate("PEFT LoRA", "low-rank", _peft_lora, missing("peft")),
    ]


def adapter_linear_work(case: Case) -> Work:
    """With both parts: operations ``4 T N M + 6 T R (N + M) + 2 T Z``.

    Bytes ``(T (3 M + 3 N) + 2 N M + 3 R (N + M) + 3 Z) · itemsize + 2 · 4 Z``: x and its gradient, y and its gradient,
    x and y's gradient once more for the trained parts; the weight twice; A, B and values twice and their gradients.
    """
    (rows, columns), tokens, rank, entries = case.shape, case.tokens, case.rank, case.entries
    numbers = 3 * tokens * (rows + columns) + 2 * rows * columns + 3 * rank * (rows + columns) + 3 * entries
    positions = 2 * entries * case.positions_Z.element_size()
    flops = 4 * tokens * rows * columns + 6 * tokens * rank * (rows + columns) + 2 * tokens * entries
    return Work(numbers * case.dtype.itemsize + positions, flops)


OPS = (
    Op(
        "low_rank",
        ("x_TM", "A_RM", "grad_h_TR", "grad_x_TM"),
        low_rank_candidates,
        low_rank_work,
        lambda case: max(case.tokens, case.layer.columns),
    ),
    Op(
        "adapter_linear",
        ("grad_TN", "x_TM", "weight_NM", "values_Z", "A_RM", "B_NR", "plan"),
        adapter_linear_candidates,
        adapter_linear_work,
        lambda case: max(case.tokens, *case.shape),
    ),
)
