"""How fast the ranks' network is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from rosa_ds.distributed.group import barrier, device, sum_over_ranks, world_size


def time_collectives(size: int, repeats: int = 5) -> dict[str, float]:
    """Seconds, the median on this rank, of an all-reduce of ``size`` bytes and of an all-gather that puts out as many.

    The first of each, in which connections are made, has a line of its own. Collective; nothing alone.
    """
    ranks = world_size()
    if ranks == 1:
        return {}
    whole = torch.zeros(size // 4 // ranks * ranks, device=device())
    share = torch.zeros(len(whole) // ranks, device=device())
    runs: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: sum_over_ranks(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, share),
    }
    found: dict[str, float] = {}
    for name, run in runs.items():
        times = []
        for _ in range(repeats + 1):
            barrier()
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found |= {f"first {name}": times[0], name: statistics.median(times[1:])}
    return found


def backend() -> str:
    """``nccl``, ``gloo``, ... of the process group; "none" alone without one."""
    return str(dist.get_backend()) if dist.is_initialized() else "none"
