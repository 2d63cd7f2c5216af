"""The ranks of a run: who this one is, what it computes on, what all do together, and how it leaves.

Every function works with a single process that has no process group, too. All ranks call each of them in the
same order.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from rosa_ds.utils.errors import RunError
from rosa_ds.utils.rendezvous import number_in

_ANOTHER_FAILED = "another rank failed; its message says why"
_on_leave: list[Callable[[], None]] = []


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank prints and writes what is written once."""
    return rank() == 0


def planned_rank() -> int:
    """This process's rank by the environment, before :func:`initialize`."""
    return number_in("RANK", 0)


def planned_world_size() -> int:
    """Number of ranks by the environment, before :func:`initialize`."""
    return number_in("WORLD_SIZE", 1)


def planned_local_rank() -> int:
    """This process's rank on its node by the environment."""
    return number_in("LOCAL_RANK", 0)


def planned_local_size(unsaid: int) -> int:
    """Number of ranks on this node by the environment; ``unsaid`` where the launcher does not tell."""
    return number_in("LOCAL_WORLD_SIZE", number_in("LOCAL_SIZE", unsaid))  # torchrun and srun; DeepSpeed's launcher


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def send(tensor: Tensor, target: torch.device) -> Tensor:
    """A tensor of the CPU on a device, which copies it when it gets there: the host does not wait."""
    if target.type == "cpu":
        return tensor
    return tensor.pin_memory().to(target, non_blocking=True)  # torch keeps page-locked memory until its copies are done


def gpu_has_bfloat16() -> bool:
    """Whether this rank has a GPU that computes in bfloat16, and does not only imitate it (which Triton cannot)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def free_memory() -> int:
    """Bytes that this rank's device could still give: of the GPU with what torch keeps for itself, else of the machine."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: on the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def use_threads() -> int:
    """Share this machine's cores among its ranks, unless OMP_NUM_THREADS says otherwise; threads of this rank."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // planned_local_size(planned_world_size())))
    return torch.get_num_threads()


def leave_hub_to_first_rank() -> None:
    """On a node's other ranks: read from the cache what the first one brought there (:func:`main_first`).

    A hub turns hundreds of ranks away that ask at once. Without effect where ``huggingface_hub`` is imported already.
    """
    if planned_local_rank():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The block runs on each node's first rank, then on its others: for work that leaves a cache on disk.

    Raises: RunError on the others, without running the block, if a first rank failed in it.
    """
    first, failed = planned_local_rank() == 0, False
    if not first and any_rank(False):
        raise RunError(_ANOTHER_FAILED)
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        if first:
            any_rank(failed)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error in the block on any rank ends it with an error on all, so that none waits for one that is gone.

    Inside the block ranks may do different things, but no collectives that another rank might not reach.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    raise_everywhere(error)


def raise_everywhere(error: BaseException | None) -> None:
    """Raise a rank's own error there, and on all other ranks one that says so, so that none waits for it."""
    failed = any_rank(error is not None)
    if error is not None:
        raise error
    if failed:
        raise RunError(_ANOTHER_FAILED)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank: the same answer on all."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor([int(flag)], device=device())).item())


def same_everywhere(content: bytes) -> bool:
    """Whether all ranks gave the same bytes, by 62 bits of their hash: the same answer on all."""
    if world_size() == 1:
        return True
    number = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 2
    ends = torch.tensor([number, -number], device=device())
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place, on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_to_owner(tensor: Tensor, owner: int) -> None:
    """Leave the sum on the owner; on other ranks the content is undefined afterwards."""
    if world_size() > 1:
        dist.reduce(tensor, dst=owner)


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Copy the owner's content into every rank's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def gather_objects(mine: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks, on all of them. For a few small objects."""
    if world_size() == 1:
        return [mine]
    result: list[Any] = [None] * world_size()
    dist.all_gather_object(result, mine)
    return result


def owners_by_cost(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Divide named work over ranks: the most costly first, each to the rank with the least so far."""
    load = [0] * ranks
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners


def on_leave(clean: Callable[[], None]) -> None:
    """Have ``clean`` called when this process leaves its process group; whoever initialises one says what it leaves behind."""
    if clean not in _on_leave:
        _on_leave.append(clean)


def leave(status: int = 0) -> NoReturn:
    """End this process; where it has been in a process group, with everything that Python does at the end except its own teardown.

    A thread of gloo lets go of a collective's tensors some time after the collective, which takes Python's lock. If Python
    is being torn down by then, the process ends with SIGABRT instead of its status, and its launcher takes the run for
    failed (pytorch issue 190489). DeepSpeed keeps groups alive, so that leaving them does not end those threads.

    With NCCL a rank that failed does not leave the group: that waits for the collectives in which the others wait for it.
    """
    if not _on_leave:
        sys.exit(status)
    if status and dist.is_initialized() and dist.get_backend() == "nccl":
        _clean()
    else:
        shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(status)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _clean()


def _clean() -> None:
    for clean in _on_leave:
        clean()
