"""The ops on the sparse part: gradient of its values, its values in a weight, its product; and how else to do them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import rosa_kernels
from kernel_bench.cases import Case, Inputs
from kernel_bench.measure import Call
from kernel_bench.ops import Candidate, Op, Outputs, missing, simple
from kernel_bench.roofline import Work
from rosa_kernels.pattern.csr import acknowledge_beta_csr, csr_pattern
from rosa_kernels.scatter.reference import scatter_add_reference
from rosa_kernels.sddmm.reference import sddmm_reference
from rosa_kernels.spmm.reference import spmm_reference


def _spops_absent(case: Case) -> str:
    reason = missing("spops")
    if not reason and case.device.type != "cpu":
        reason = missing("spops_backend") and "spops is built without CUDA"
        if max(case.shape) > torch.iinfo(torch.int16).max:
            reason = "spops takes int16 indices on a GPU"
    return reason


def _spops_pattern(inputs: Inputs) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The module, and row offsets, rows by falling count and columns in the types that its backend takes."""
    pointers, column_Z = csr_pattern(inputs.positions_Z, *inputs.case.shape)
    rows = pointers.diff().argsort(descending=True)
    small = torch.int16 if inputs.positions_Z.is_cuda else torch.int32  # the CPU backend would convert at every call
    return importlib.import_module("spops"), pointers, rows.to(small), column_Z.to(small)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 where it is of 16 bits: torch's sparse products have no narrower code on every device."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- sddmm


def _sddmm_reference(inputs: Inputs) -> Outputs:
    return {"values": sddmm_reference(inputs.grad_TN.double(), inputs.x_TM.double(), inputs.positions_Z)}


def _sampled_addmm(inputs: Inputs) -> Call:
    acknowledge_beta_csr()
    pointers, column_Z = csr_pattern(inputs.positions_Z, *inputs.case.shape)
    zeros = torch.zeros(inputs.case.entries, dtype=_wide(inputs.x_TM[:0]).dtype, device=inputs.x_TM.device)
    pattern = torch.sparse_csr_tensor(pointers, column_Z, zeros, inputs.case.shape, check_invariants=False)
    return lambda: torch.sparse.sampled_addmm(pattern, _wide(inputs.grad_TN).T, _wide(inputs.x_TM)).values()


def _spops_sddmm(inputs: Inputs) -> Call:
    spops, pointers, rows, column_Z = _spops_pattern(inputs)
    return lambda: spops.sddmm(pointers, rows, column_Z, inputs.grad_TN.T.contiguous(), inputs.x_TM.T.contiguous())


def sddmm_candidates(case: Case) -> list[Candidate]:
    """Times include every transpose and cast that a candidate needs of grad (T, N) and x (T, M)."""

    def ours(inputs: Inputs) -> Tensor:
        return rosa_kernels.sddmm(inputs.grad_TN, inputs.x_TM, inputs.positions_Z, inputs.plan)

    def dense(inputs: Inputs) -> Tensor:
        return (inputs.grad_TN.T @ inputs.x_TM).flatten()[inputs.positions_Z]

    def prepared(name: str, bind: Any, absent: str = "") -> Candidate:
        return Candidate(name, bind, lambda inputs: {"values": bind(inputs)()}, _sddmm_reference, absent=absent)

    return [
        simple("rosa_kernels.sddmm", "values", ours, _sddmm_reference),
        simple("dense product, sampled", "values", dense, _sddmm_reference),
        prepared("torch.sparse.sampled_addmm", _sampled_addmm),
        prepared("spops.sddmm", _spops_sddmm, _spops_absent(case)),
    ]


def sddmm_work(case: Case) -> Work:
    """Bytes ``T (N + M) · itemsize + Z (4 + 4)`` (positions read, float32 sums written); operations ``2 T Z``."""
    inputs = case.tokens * sum(case.shape) * case.dtype.itemsize
    return Work(inputs + case.entries * (case.positions_Z.element_size() + 4), 2 * case.tokens * case.entries)


# ---- scatter


def _scatter_reference(inputs: Inputs) -> Outputs:
    sparse = scatter_add_reference(inputs.weight_NM.double(), inputs.values_Z, inputs.positions_Z)
    return {"sum": sparse}


def _scatter_ours(inputs: Inputs) -> None:
    old_Z = rosa_kernels.scatter_add_into(inputs.weight_NM, inputs.values_Z, inputs.positions_Z)
    rosa_kernels.restore_into(inputs.weight_NM, old_Z, inputs.positions_Z)


def _scatter_ours_outputs(inputs: Inputs) -> Outputs:
    weight = inputs.weight_NM.clone()
    old_Z = rosa_kernels.scatter_add_into(weight, inputs.values_Z, inputs.positions_Z)
    total = weight.clone()
    rosa_kernels.restore_into(weight, old_Z, inputs.positions_Z)
    return {"sum": total, "restored": weight}


def _scatter_dense(inputs: Inputs) -> Tensor:
    sparse = torch.zeros_like(inputs.weight_NM)
    sparse.view(-1)[inputs.positions_Z] = inputs.values_Z
    return inputs.weight_NM + sparse


def _scatter_peft(inputs: Inputs) -> Tensor:
    flat = inputs.weight_NM.flatten().scatter_add(0, inputs.positions_Z.long(), inputs.values_Z)
    return flat.view_as(inputs.weight_NM)


def _spops_csr_add(inputs: Inputs) -> Call:
    spops, pointers, rows, column_Z = _spops_pattern(inputs)
    return lambda: spops.csr_add(inputs.values_Z, pointers, rows, column_Z, inputs.weight_NM)


def scatter_candidates(case: Case) -> list[Candidate]:
    """A weight with the sparse values for a while. Ours: both ways, in and out; the others: a copy, and no way back."""
    return [
        Candidate(
            "rosa_kernels.scatter_add_into, restore_into",
            lambda inputs: lambda: _scatter_ours(inputs),
            _scatter_ours_outputs,
            lambda inputs: _scatter_reference(inputs) | {"restored": inputs.weight_NM.double()},
        ),
        simple("W + S, dense", "sum", _scatter_dense, _scatter_reference),
        simple("scatter_add of a copy (as PEFT)", "sum", _scatter_peft, _scatter_reference),
        Candidate(
            "spops.csr_add",
            _spops_csr_add,
            lambda inputs: {"sum": _spops_csr_add(inputs)()},
            _scatter_reference,
            absent=_spops_absent(case),
        ),
    ]


def scatter_work(case: Case) -> Work:
    """Bytes ``Z (2 · 4 + 6 · itemsize)``: position, value, W read, old and W written; position, old read, W written.

    Operations: ``Z``.
    """
    entry = 2 * case.positions_Z.element_size() + 6 * case.dtype.itemsize
    return Work(case.entries * entry, case.entries)


# ---- spmm


def _spmm_reference(inputs: Inputs) -> Outputs:
    product = spmm_reference(
        inputs.x_TM.double(), inputs.values_Z.double(), inputs.positions_Z, inputs.case.shape, False
    )
    return {"y": inputs.y_TN.double() + product}


def _spmm_ours(y_TN: Tensor, inputs: Inputs) -> None:
    rosa_kernels.spmm_add_into(
        y_TN, inputs.x_TM, inputs.values_Z, inputs.positions_Z, inputs.case.shape, plan=inputs.plan
    )


def _spmm_dense(y_TN: Tensor, inputs: Inputs) -> None:
    sparse = torch.zeros(inputs.case.shape, dtype=y_TN.dtype, device=y_TN.device)
    sparse.view(-1)[inputs.positions_Z] = inputs.values_Z
    y_TN.addmm_(inputs.x_TM, sparse.T)


def _spmm_torch(y_TN: Tensor, inputs: Inputs) -> None:
    acknowledge_beta_csr()
    pointers, column_Z = csr_pattern(inputs.positions_Z, *inputs.case.shape)
    values_Z = _wide(inputs.values_Z)
    sparse = torch.sparse_csr_tensor(pointers, column_Z, values_Z, inputs.case.shape, check_invariants=False)
    y_TN.add_(torch.sparse.mm(sparse, _wide(inputs.x_TM).T).T)


def spmm_candidates(case: Case) -> list[Candidate]:
    """``y += x Sᵀ``. The dense S and the CSR tensor are made inside: the values change with every step."""

    def candidate(name: str, add: Any) -> Candidate:
        def outputs(inputs: Inputs) -> Outputs:
            y_TN = inputs.y_TN.clone()
            add(y_TN, inputs)
            return {"y": y_TN}

        return Candidate(name, lambda inputs: lambda: add(inputs.y_TN, inputs), outputs, _spmm_reference)

    return [
        candidate("rosa_kernels.spmm_add_into", _spmm_ours),
        candidate("dense S", _spmm_dense),
        candidate("torch.sparse.mm", _spmm_torch),
    ]


def spmm_work(case: Case) -> Work:
    """Bytes ``(T (M + 2 N) + Z) · itemsize + 4 Z`` (y read and written, positions read); operations ``2 T Z``."""
    rows, columns = case.shape
    numbers = case.tokens * (columns + 2 * rows) + case.entries
    positions = case.entries * case.positions_Z.element_size()
    return Work(numbers * case.dtype.itemsize + positions, 2 * case.tokens * case.entries)


OPS = (
    Op("sddmm", ("grad_TN", "x_TM", "plan"), sddmm_candidates, sddmm_work, lambda case: case.tokens),
    Op("scatter", ("weight_NM", "values_Z"), scatter_candidates, scatter_work, lambda case: 1),
    Op("spmm", ("x_TM", "y_TN", "values_Z", "plan"), spmm_candidates, spmm_work, lambda case: case.layer.columns),
)
