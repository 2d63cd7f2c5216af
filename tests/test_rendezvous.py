"""How ranks find each other: SLURM's variables, and the network interface."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch

from rosa_ds import zero
from rosa_ds.utils.rendezvous import choose_gloo_interface, first_host, interface_to, slurm_ranks, tasks_per_node
from rosa_ds.zero.group import tell_of_locks

# of the sixth of seven tasks on three nodes, as srun sets them
TASK = {
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[007-008,012]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert slurm_ranks(TASK) == {
        "RANK": "5",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "12017",
    }
    chosen = slurm_ranks(TASK | {"MASTER_ADDR": "gpu007-ib", "MASTER_PORT": "4711"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("gpu007-ib", "4711")
    assert slurm_ranks(TASK | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != "12017"  # another step of the same job


@pytest.mark.parametrize("more", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["launcher", "one task"])
def test_who_needs_no_rank_of_slurm_gets_none(more: dict[str, str]) -> None:
    assert slurm_ranks(TASK | more) == {}
    assert (
        slurm_ranks({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    )  # the batch script itself


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("login-a.site.org,n2", "login-a.site.org"),
        ("n[1-16]", "n1"),
        ("n[08,10-12],m[1-3]", "n08"),
        ("rack[1-2]n[08-15,20]-ib,login", "rack1n08-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("4(x2),1,2(x1)") == [4, 4, 1, 2]
    with pytest.raises(ValueError, match="'4,two' cannot be read"):
        tasks_per_node("4,two")


def test_what_slurm_does_not_say_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="srun started 7 tasks, but SLURM_PROCID is not set"):
        slurm_ranks({key: value for key, value in TASK.items() if key != "SLURM_PROCID"})
    for nodes in ("", "[1-2", "n[1-2", "n[1-2]]"):
        with pytest.raises(ValueError, match="cannot be read: set MASTER_ADDR to the host of rank 0"):
            slurm_ranks(TASK | {"SLURM_STEP_NODELIST": nodes})
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    with pytest.raises(ValueError, match="srun started 4 tasks, but SLURM_STEP_TASKS_PER_NODE is not set"):
        zero.initialize()


def test_interface() -> None:
    names = [name for _, name in socket.if_nameindex()]
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("127.0.1.1") == "lo"
    assert interface_to("no-such-host.invalid") is None
    outside = interface_to("192.0.2.1")  # by the default route, where there is one; nothing is sent
    assert outside is None or outside in names
    environ = {"MASTER_ADDR": "127.0.0.1"}
    choose_gloo_interface(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ
    environ = {"MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "ib7"}
    choose_gloo_interface(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib7"


@pytest.mark.parametrize(("rank", "said"), [("3", {}), ("0", {"LOCAL_WORLD_SIZE": "4"}), ("0", {"LOCAL_SIZE": "4"})])
def test_a_rank_without_a_gpu_of_its_own_is_told_why(
    rank: str, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun --gpus-per-task shows each task a single GPU; rank 0 has one, and would wait for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environ | said).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=rf"rank {rank} of this host sees 1 GPU\(s\), and the host has 4 ranks.*--gpu-bind=none"
    ):
        zero.initialize()


def test_ranks_share_a_gpu_where_collectives_go_through_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class ChosenError(Exception):
        pass

    def choose(number: int) -> None:
        raise ChosenError(number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    ranks = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**ranks, "ROSA_COLLECTIVES": "host"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ChosenError, match="1"):
        zero.initialize()
    assert os.environ["LOCAL_RANK"] == "1"  # DeepSpeed's device
    monkeypatch.setenv("ROSA_COLLECTIVES", "nccl")
    with pytest.raises(ValueError, match="ROSA_COLLECTIVES='nccl': give host, .* or unset it"):
        zero.initialize()


def test_a_lock_that_was_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("now", 0), ("left", 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age, time.time() - age))
    tell_of_locks()
    assert [record.args[0] for record in caplog.records] == [tmp_path / "left" / "lock"]
    assert "60 minutes old" in caplog.text
