"""Collectives through host memory, so that several ranks can share a GPU, which NCCL refuses.

A process group whose every collective copies its tensors to the host, calls gloo there, and copies the results back. It is
for checks and tests: nothing overlaps, and every collective waits for the device.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VARIABLE = "ROSA_COLLECTIVES"
BACKEND = "host"
_ProcessGroup: Any = dist.ProcessGroup  # whose declared arguments change with torch's versions
_c10d: Any = torch._C._distributed_c10d


def wanted() -> bool:
    """Whether the environment asks for it. Raises: ValueError for another value."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", BACKEND):
        raise ValueError(
            f"{VARIABLE}={value!r}: give {BACKEND}, which sends collectives through host memory so that ranks can share a GPU, "
            "or unset it"
        )
    return value == BACKEND


def register() -> str:
    """Make the backend known to torch; its name."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _Group, devices=["cpu", "cuda"])
    return BACKEND


class _Group(_ProcessGroup):
    """Torch calls these methods with its lists of tensors and options, a list a device; there is one device a rank."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self._ranks = size
        self._gloo = dist.ProcessGroup(dist.PrefixStore(f"{BACKEND}/", store), rank, size)
        backend = dist.ProcessGroupGloo(dist.PrefixStore(f"{BACKEND}/gloo/", store), rank, size, timeout=timeout)
        backend._set_sequence_number_for_group()
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        self._gloo._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def getBackendName(self) -> str:
        return BACKEND

    def _call(self, call: Callable[[list[Tensor]], Any], results: Sequence[Tensor]) -> Any:
        """``call`` with the host's copies of ``results``, which then get what it has left in them."""
        copies = [tensor.cpu() if tensor.device.type != "cpu" else tensor for tensor in results]
        call(copies).wait()
        for tensor, copy in zip(results, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
        return _done(results)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        average = opts.reduceOp == dist.ReduceOp.AVG  # which gloo lacks
        if average:
            opts.reduceOp = dist.ReduceOp.SUM
        work = self._call(lambda copies: self._gloo.allreduce(copies, opts), tensors)
        if average:
            for tensor in tensors:
                tensor.div_(self._ranks)
        return work

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> Any:
        one = dist.AllreduceOptions()
        for tensor in tensors:
            one.reduceOp = opts.reduceOp
            self.allreduce([tensor], one)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._call(lambda copies: self._gloo.broadcast(copies, opts), tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._call(lambda copies: self._gloo.reduce(copies, opts), tensors)

    def allgather(self, results: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> Any:
        (parts,), (mine,) = results, given
        return self._call(lambda copies: self._gloo.allgather([copies], [mine.cpu()]), parts)

    def _allgather_base(self, result: Tensor, mine: Tensor, opts: Any = None) -> Any:
        parts = list(result.view(-1).chunk(self._ranks))
        return self._call(lambda copies: self._gloo.allgather([copies], [mine.cpu().view(-1)]), parts)

    all_gather_single = _allgather_base  # its name since torch 2.13

    def allgather_into_tensor_coalesced(self, results: list[Tensor], given: list[Tensor], opts: Any = None) -> Any:
        for result, mine in zip(results, given, strict=True):
            self._allgather_base(result, mine)
        return _done(results)

    def _reduce_scatter_base(self, result: Tensor, given: Tensor, opts: Any) -> Any:
        whole, options = given.cpu().clone(), dist.AllreduceOptions()
        options.reduceOp = opts.reduceOp
        self.allreduce([whole], options)
        result.copy_(whole.view(-1).chunk(self._ranks)[self.rank()].view(result.shape))
        return _done([result])

    reduce_scatter_single = _reduce_scatter_base  # as above

    def reduce_scatter(self, results: list[Tensor], given: list[list[Tensor]], opts: Any) -> Any:
        (result,), (parts,) = results, given
        return self._reduce_scatter_base(result, torch.cat([part.reshape(-1) for part in parts]), opts)

    def reduce_scatter_tensor_coalesced(self, results: list[Tensor], given: list[Tensor], opts: Any) -> Any:
        for result, whole in zip(results, given, strict=True):
            self._reduce_scatter_base(result, whole, opts)
        return _done(results)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()


def _done(results: Sequence[Tensor]) -> Any:
    """A handle of work that is over."""
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(list(results))
    return _c10d._create_work_from_future(future)
