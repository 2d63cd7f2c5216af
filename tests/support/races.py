"""Every load and store of every program of a Triton kernel, seen in its interpreter: who touches whose bytes, and what lies outside."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

Addresses = NDArray[np.int64]


@dataclasses.dataclass
class Watched:
    """What has been launched, and what is wrong with it."""

    programs: int = 0
    accesses: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Access:
    program: tuple[int, ...]
    write: bool
    addresses: Addresses
    size: int


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Kernels that are launched inside are watched. They must be interpreted, on the CPU."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch, host = (
        builder.create_masked_load,
        builder.create_masked_store,
        executor.__call__,
        executor._init_args_hst,
    )
    found, log, tensors = Watched(), [], []

    def note(self: Any, write: bool, pointers: Any, mask: Any, dtype: np.dtype[Any]) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        chosen = np.broadcast_to(mask.data, shape).astype(bool)
        addresses = np.broadcast_to(pointers.data, shape)[chosen].astype(np.int64).ravel()
        log.append(_Access(tuple(self.grid_idx), write, addresses, dtype.itemsize))

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(self, False, pointers, mask, np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())))
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(self, True, pointers, mask, value.data.dtype)
        return store(self, pointers, value, mask, *rest)

    def arguments(self: Any, given: Any, named: Any) -> Any:
        result = host(self, given, named)
        tensors.extend(each for each in (*result[0], *result[1].values()) if isinstance(each, torch.Tensor))
        return result

    def launched(self: Any, *given: Any, **named: Any) -> Any:
        log.clear()
        tensors.clear()
        result = launch(self, *given, **named)
        _examine(self.fn.__name__, log, _ranges(tensors), found)
        return result

    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (builder, "create_masked_load", masked_load),
            (builder, "create_masked_store", masked_store),
            (executor, "_init_args_hst", arguments),
            (executor, "__call__", launched),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        yield found


def _ranges(tensors: list[torch.Tensor]) -> NDArray[np.int64]:
    """Begin and end of each allocation, (K, 2), sorted."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    ranges = {(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages}
    return np.array(sorted(ranges), dtype=np.int64)


def _examine(kernel: str, log: list[_Access], ranges: NDArray[np.int64], found: Watched) -> None:
    programs = {access.program: number for number, access in enumerate(log)}
    found.programs += len(programs)
    found.accesses += sum(len(access.addresses) for access in log)
    for access in log:
        kind = "stores" if access.write else "loads"
        within = np.searchsorted(ranges[:, 0], access.addresses, side="right") - 1
        outside = (within < 0) | (access.addresses + access.size > ranges[np.maximum(within, 0), 1])
        if outside.any():
            found.problems.append(f"{kernel} {kind} {int(outside.sum())} numbers outside of its tensors")
        if access.write and len(np.unique(access.addresses)) < len(access.addresses):
            found.problems.append(f"{kernel} stores an address twice at once")
    reads, writes = (_by_program(log, programs, write) for write in (False, True))
    order = np.lexsort((writes[1], writes[0]))
    address, owner = writes[:, order]
    if ((address[1:] == address[:-1]) & (owner[1:] != owner[:-1])).any():
        found.problems.append(f"{kernel}: two programs store the same address")
    if len(address):
        at = np.minimum(np.searchsorted(address, reads[0]), len(address) - 1)
        if ((address[at] == reads[0]) & (owner[at] != reads[1])).any():
            found.problems.append(f"{kernel}: a program loads what another one stores")


def _by_program(log: list[_Access], programs: dict[tuple[int, ...], int], write: bool) -> NDArray[np.int64]:
    """Addresses and the programs that touch them, (2, accesses)."""
    chosen = [access for access in log if access.write == write]
    parts = [np.stack([a.addresses, np.full_like(a.addresses, programs[a.program])]) for a in chosen]
    return np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), dtype=np.int64)
