"""Joining the other ranks through DeepSpeed, and what its communication op leaves behind."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rosa_ds import distributed
from rosa_ds.distributed import through_host
from rosa_ds.utils.errors import RunError
from rosa_ds.utils.packages import torch_for_gpus
from rosa_ds.utils.rendezvous import check_ranks, choose_gloo_interface, join_slurm_step

logger = logging.getLogger(__name__)
LOCK_MINUTES = 5.0
SHARED_MEMORY = Path("/dev/shm")
_BUFFER = "deepspeed_allreduce_buffer"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def initialize(timeout_minutes: float = 30.0) -> None:
    """Join the process group that the launcher describes in the environment; alone, be a group of one.

    Works under ``deepspeed``, ``torchrun``, ``srun``, plain ``python``, and anything that sets RANK, WORLD_SIZE and MASTER_ADDR.
    With ``ROSA_COLLECTIVES=host`` ranks share the GPUs there are, see :mod:`rosa_ds.distributed.through_host`.

    Raises:
        ValueError: SLURM's tasks without what tells their ranks, or without a GPU for each rank; a launcher's variables that
            lack one, or contradict each other; a torch that is too old for GPUs; another value of ``ROSA_COLLECTIVES``.
    """
    import deepspeed  # slow, and needed by nobody who only imports this module

    if problem := torch_for_gpus():
        raise ValueError(problem)
    join_slurm_step()
    check_ranks()
    distributed.on_leave(_remove_shared_buffer)
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        # all ranks of a host end, not only those without a GPU
        here = max(local + 1, distributed.planned_local_size(1))
        if through_host.wanted():
            local %= gpus
            os.environ["LOCAL_RANK"] = str(local)  # by which DeepSpeed chooses the GPU
        elif here > gpus:
            raise ValueError(
                f"rank {local} of this host sees {gpus} GPU(s), and the host has {here} ranks: start as many ranks a host as it has GPUs, and let each see all "
                "of them (with srun: --gpus-per-node and not --gpus-per-task, --gpu-bind=none)"
            )
        torch.cuda.set_device(local)
    if through_host.wanted() or not torch.cuda.is_available():
        choose_gloo_interface()
    if not dist.is_initialized():
        tell_of_locks()
        _tell_of_compiling()
        try:
            deepspeed.init_distributed(
                through_host.register() if through_host.wanted() else None,
                timeout=datetime.timedelta(minutes=timeout_minutes),
                verbose=False,
            )
        except (dist.DistError, RuntimeError) as error:
            master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(
                f"rank {os.environ['RANK']} on {socket.gethostname()} does not reach the others of "
                f"{os.environ['WORLD_SIZE']} ranks, which meet at {master}: are all started, the port free and open between the hosts, and the interface right (GLOO_SOCKET_IFNAME on CPUs, "
                f"NCCL_SOCKET_IFNAME on GPUs)? ({error})"
            ) from error


def _compiled_ops() -> Path:
    """Where PyTorch keeps what it has compiled."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))


def _tell_of_compiling() -> None:
    """A first start on CPUs is silent for as long as the compiler takes."""
    if not torch.cuda.is_available() and not any(_compiled_ops().glob("**/deepspeed_shm_comm*.so")):
        logger.info(
            "compiling DeepSpeed's communication op into %s: once, half a minute or more on a busy machine",
            _compiled_ops(),
        )


def tell_of_locks() -> None:
    """Warn of what a process leaves that is killed while it compiles an op: every later one waits for it without a word."""
    for lock in _compiled_ops().glob("**/lock"):
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:  # its compiler is done
            continue
        if minutes > LOCK_MINUTES:
            logger.warning(
                "%s is %.0f minutes old: if no process compiles there now, one was killed that did, and this run will wait for ever: "
                "delete the file",
                lock,
                minutes,
            )


def shared_buffers() -> list[Path]:
    """Those of this user's runs on this machine, also of runs that were killed."""
    return sorted(SHARED_MEMORY.glob(f"{_BUFFER}_{os.getuid()}_*"))


def _remove_shared_buffer() -> None:
    """DeepSpeed's communication op for CPUs leaves 66 MiB of shared memory behind for each rank of every run."""
    name = "_".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    (SHARED_MEMORY / f"{_BUFFER}_{os.getuid()}_{name}").unlink(missing_ok=True)


def has_float16() -> bool:
    """Whether DeepSpeed trains in float16 on this rank's device."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())
