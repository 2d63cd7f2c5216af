"""How ranks on several hosts find each other: SLURM's variables in the words of ``torch.distributed``, and the interface."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping

# below the ports that Linux gives to outgoing connections (32768 and up)
FIRST_PORT, PORTS = 12000, 20000


def join_slurm_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what :func:`slurm_ranks` says. To be called before anything asks which rank this is."""
    environ.update(slurm_ranks(environ))


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``torchrun`` would have set for this task of an ``srun`` step.

    Rank 0 is on the step's first host. The port follows from the job and the step, so that jobs which share a host
    rarely meet; MASTER_ADDR and MASTER_PORT stay as they are where they are set.

    Returns: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; nothing outside of a step of several
        tasks, or where a launcher has set RANK.
    Raises: ValueError if the step lacks one of SLURM's variables or names its hosts in a way that is not known.
    """
    if "RANK" in environ or number_in("SLURM_STEP_NUM_TASKS", 1, environ) == 1:
        return {}
    try:
        tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
        ranks = {
            "RANK": environ["SLURM_PROCID"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": str(tasks),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + (job + 1009 * step) % PORTS),
        }
    except KeyError as error:
        raise ValueError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but {error.args[0]} is not set: start one task a node with "
            "torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each task"
        ) from None
    return ranks


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node, from SLURM's short form: ``4(x2),1`` -> ``[4, 4, 1]``."""
    tasks: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {counts!r} cannot be read, e.g. 4(x2),1 is expected")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: ``rack[1-2]n[08-15,20],login`` -> ``rack1n08``."""
    found = re.match(r"(?:[^\[\],]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", nodes)
    if found is None:
        raise ValueError(f"SLURM's list of nodes {nodes!r} cannot be read: set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def check_ranks(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError unless the variables of ``torch.distributed`` are all there and agree, or RANK and WORLD_SIZE say nothing.

    With WORLD_SIZE alone each process would be a run of its own, and all write to one folder.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environ and number_in("WORLD_SIZE", 1, environ) == 1:
        return
    rank, size, _ = (number_in(name, 0, environ) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if missing := [name for name in names if not environ.get(name)]:
        there = ", ".join(f"{name}={environ[name]}" for name in names if environ.get(name))
        raise ValueError(
            f"the environment has {there}, and not {', '.join(missing)}: start several ranks with torchrun, deepspeed or srun, "
            "which set all of them, or unset them for a single process"
        )
    if rank >= size:
        raise ValueError(
            f"RANK {rank} of WORLD_SIZE {size}: ranks count from 0 to {size - 1}; start them with torchrun"
        )


def number_in(name: str, default: int, environ: Mapping[str, str] = os.environ) -> int:
    """A launcher's variable that is a number. Raises: ValueError if it is none."""
    value = environ.get(name)
    if value is None:
        return default
    if not value.isdigit():
        raise ValueError(f"{name} in the environment is a whole number, given {value!r}: correct it, or unset it")
    return int(value)


def choose_gloo_interface(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo use the interface that leads to rank 0's host, unless GLOO_SOCKET_IFNAME names one."""
    name = interface_to(environ["MASTER_ADDR"])
    if name is not None and name != "lo":
        environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_to(host: str) -> str | None:
    """Name of the network interface whose IPv4 address this machine uses towards a host; ``None`` where there is none.

    A host's own name often leads to 127.0.1.1, which gloo would then tell the other hosts as its address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # of a datagram socket: asks for the route, sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
