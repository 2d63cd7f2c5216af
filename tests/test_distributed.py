"""What concerns more than one rank, as far as one process shows it; whole runs on 2 and 4 ranks are in test_training."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from launching import environment, free_port
from rosa_ds import distributed, zero
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.distributed import group, watch
from rosa_ds.training.model import divide_positions
from rosa_ds.zero import prefetch as ahead
from rosa_ds.zero import sharded as partitioned

TWO_RANKS = """
import sys
import torch
from rosa_ds import distributed, zero
from rosa_ds.utils.errors import RunError

zero.initialize()
rank = distributed.rank()
owned = torch.full((3,), float(rank + 1))
distributed.sum_to_owner(owned, 1)
assert rank != 1 or owned.tolist() == [3.0] * 3
assert distributed.broadcast(torch.full((2,), float(rank)), 1).tolist() == [1.0, 1.0]
assert distributed.sum_over_ranks(torch.tensor(rank + 1.0)).item() == 3.0
assert distributed.any_rank(rank == 1) and not distributed.any_rank(False)
assert distributed.same_everywhere(b"7") and not distributed.same_everywhere(bytes([rank]))
order = []
with distributed.main_first():
    order.append(rank)
try:
    with distributed.together(), distributed.main_first():
        if rank == 0:
            raise OSError("disk full")
except OSError as error:
    assert rank == 0 and str(error) == "disk full"
except RunError as error:
    assert rank == 1 and "another rank failed" in str(error)
else:
    raise AssertionError("nothing was raised")
distributed.barrier()
open(f"{sys.argv[1]}/{rank}.ok", "w").close()
distributed.leave()
"""


@pytest.mark.ranks
def test_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for port in [str(free_port())]
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert sorted(path.name for path in tmp_path.glob("*.ok")) == ["0.ok", "1.ok"]


def test_alone_every_collective_is_the_identity() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_ranks(tensor.clone()).equal(tensor)
    assert distributed.broadcast(tensor.clone(), 0).equal(tensor)
    assert distributed.any_rank(True)
    assert distributed.same_everywhere(b"5")
    with distributed.main_first():
        pass
    with pytest.raises(KeyError), distributed.together():
        raise KeyError


def test_owners_share_the_cost() -> None:
    costs = {"a": 8, "b": 5, "c": 4, "d": 3, "e": 2, "f": 2}
    owners = distributed.owners_by_cost(costs, 3)
    load = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(3)]
    assert max(load) <= 8 * 4 / 3  # Graham's bound for longest first; the best division has 8
    assert owners == distributed.owners_by_cost(dict(reversed(costs.items())), 3)
    assert set(distributed.owners_by_cost(costs, 1).values()) == {0}


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert distributed.use_threads() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert distributed.use_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_layer_says_what_it_is() -> None:
    layer = AdaptedLinear(torch.nn.Linear(4, 3), "up", rank=2, scale=1.0, dropout=0.0, entries=5, seed=0)
    assert "in=4, out=3, rank=2, entries=5" in repr(layer)


STALL = """
import time
from rosa_ds import distributed, zero
from rosa_ds.distributed import watch

zero.initialize()
if distributed.rank() == 1:  # it stays, whoever notices first
    watch._end_process = lambda message: None
distributed.start_watch(2.0)
distributed.progress("step 1")
if distributed.rank() == 1:
    time.sleep(60)
distributed.progress("step 2")
distributed.barrier()
"""


def first_of_two_ranks(script: Path, *arguments: str, timeout: float) -> tuple[int, str]:
    """Exit status and standard error of the first of two ranks; the other one is killed when it has ended."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=timeout)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return ranks[0].returncode, said


@pytest.mark.ranks
def test_a_stalled_rank_is_named(tmp_path: Path) -> None:
    script = tmp_path / "stall.py"
    script.write_text(STALL)
    status, waiting = first_of_two_ranks(script, timeout=50)
    assert status == 74, waiting
    assert f"no progress for 2 s: rank 1 on {socket.gethostname()} at 'step 1' for" in waiting
    assert "the others wait at 'step 2'" in waiting
    assert "in barrier" in waiting  # the stack of the rank that waits


NCCL = """
import os
import sys
import threading
import torch.distributed as dist
from rosa_ds import distributed, zero
from rosa_ds.distributed import watch

failed = []
gloos = dist.barrier

def barrier():
    \"\"\"As NCCL's kernels, which never end without the other rank; its watchdog sees a connection that is closed, or none.\"\"\"
    try:
        gloos()
    except RuntimeError:
        if sys.argv[1] == "aborts":
            if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3") != "0":
                os.abort()
            failed.append("REMOTE_ERROR")
        threading.Event().wait()

dist.barrier = barrier
watch.PAUSE_SECONDS = 0.3
watch.backend_error = lambda: failed[0] if failed else ""
distributed.leave_errors_to_watch()
zero.initialize()
distributed.start_watch(float("inf"))
distributed.barrier()
distributed.start_watch(120.0 if sys.argv[1] == "aborts" else 2.0)
distributed.progress("step 1")
if distributed.rank() == 1:
    threading.Event().wait(1.0)  # its signs of life are known
    os._exit(9)
distributed.progress("step 2")
distributed.barrier()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["aborts", "hangs"])
def test_a_dead_rank_under_nccl_is_named(backend: str, tmp_path: Path) -> None:
    """By the one that waits for it, before the stall's time where the backend sees it, and else after that."""
    script = tmp_path / "nccl.py"
    script.write_text(NCCL)
    status, waiting = first_of_two_ranks(script, backend, timeout=80)
    assert status == 74, waiting
    why = "no progress for 2 s" if backend == "hangs" else "a collective failed (REMOTE_ERROR)"
    assert f"{why}: rank 1 on {socket.gethostname()} (no sign of life) at 'step 1' for" in waiting
    assert "the others wait at 'step 2'" in waiting


def test_nccls_errors_are_left_to_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in watch._ERROR_HANDLING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    distributed.leave_errors_to_watch()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    distributed.leave_errors_to_watch()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize(("answer", "said"), [("SUCCESS", ""), ("COMM_ERROR", "COMM_ERROR"), (None, "")])
def test_what_a_backend_says_of_its_collectives(answer: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        def get_error(self) -> object:
            if answer is None:
                raise RuntimeError("Backend gloo does not support getError")
            return getattr(torch._C._distributed_c10d.ErrorType, answer)

    class Group:
        def _get_backend(self, _: torch.device) -> Backend:
            return Backend()

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", Group)
    assert watch.backend_error() == said


BUSY = """
import atexit
import sys
import threading
import torch
from rosa_ds import distributed, zero

def work():
    while True:
        torch.randn(100) + 1

zero.initialize()
threading.Thread(target=work, daemon=True).start()
atexit.register(print, "handlers ran")
print("flushed", end="")
distributed.leave(int(sys.argv[1]))
"""


@pytest.mark.ranks
@pytest.mark.parametrize("status", [0, 75])
def test_a_busy_thread_does_not_change_the_exit_status(tmp_path: Path, status: int) -> None:
    """With ``sys.exit`` this script ends with SIGABRT: the thread asks for Python's lock while Python is torn down."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    arguments = [sys.executable, str(script), str(status)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stderr
    assert "flushedhandlers ran\n" in done.stdout


def say(store: dist.Store, rank: int, report: watch.Report) -> None:
    store.set(f"rosa_ds/progress/{rank}", json.dumps(report))


@contextlib.contextmanager
def signs_of_life(store: dist.Store, rank: int, report: watch.Report) -> Iterator[None]:
    """Another rank that stays where it is, but lives."""
    done = threading.Event()

    def speak() -> None:
        for alive in itertools.count(1):
            say(store, rank, report._replace(alive=alive))
            if done.wait(0.02):
                return

    thread = threading.Thread(target=speak)
    thread.start()
    yield
    done.set()
    thread.join()


def stalled(store: dist.Store, place: str) -> str:
    """What rank 0 says when it stands still there."""
    messages: list[str] = []
    watched = watch.Watch(store, 0.2, messages.append)
    watched.progress(place)
    watched._thread.join(timeout=20)
    assert len(messages) == 1
    return messages[0]


@pytest.mark.parametrize(
    ("backend", "status", "left"), [("nccl", 0, True), ("nccl", 1, False), ("gloo", 1, True), ("gloo", 0, True)]
)
def test_a_failed_rank_does_not_wait_for_nccls_collectives(
    backend: str, status: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ProcessGroupNCCL's shutdown waits for its kernels, and these for the ranks that wait for this one."""
    calls: list[str] = []

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(group, "_on_leave", [lambda: None])
    monkeypatch.setattr(group.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(group.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(group.dist, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(group.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(group.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        distributed.leave(status)
    assert ended.value.code == status
    assert calls == ["left"] * left


def test_all_ranks_at_one_point_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "world_size", lambda: 2)
    store = dist.HashStore()
    with signs_of_life(store, 1, watch.Report(1, "step 1", 1.0, 0, "there")):
        message = stalled(store, "step 1")
    assert f"rank 0 on {socket.gethostname()} at 'step 1'" in message
    assert "rank 1 on there at 'step 1'" in message
    assert message.endswith("(all ranks)")


def test_a_rank_without_a_sign_of_life_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is cut off in the step that the others are in, or after it has got further than they."""
    monkeypatch.setattr(watch, "world_size", lambda: 3)
    for passed, where in ((1, "step 1"), (2, "step 2")):
        store = dist.HashStore()
        say(store, 2, watch.Report(passed, where, 1.0, 0, "there", 7))
        with signs_of_life(store, 1, watch.Report(1, "step 1", 1.0, 0, "here")):
            message = stalled(store, "step 1")
        assert message.startswith(f"no progress for 0 s: rank 2 on there (no sign of life) at {where!r} for ")
        assert message.endswith("s; the others wait at 'step 1'")
        assert "rank 1" not in message
        assert "rank 0" not in message


def test_a_rank_that_ended_the_wait_by_itself_is_not_the_one_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "world_size", lambda: 2)
    store = dist.HashStore()
    say(store, 1, watch.Report(1, "step 1", 1.0, 0, "there", watch.LEFT))
    assert "no sign of life" not in stalled(store, "step 1")
    assert watch.read_report(store, 0).alive == watch.LEFT


def test_a_rank_that_never_said_a_word_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "world_size", lambda: 2)
    message = stalled(dist.HashStore(), "step 1")
    assert message == "no progress for 0 s: rank 1 at 'nowhere yet'; the others wait at 'step 1'"


def test_a_rank_that_gets_further_while_it_asks_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "world_size", lambda: 1)
    looks = []

    class Store(dist.HashStore):
        def clone(self) -> Store:
            return self

        def multi_get(self, keys: list[str]) -> list[bytes]:
            looks.append(keys)
            if len(looks) == 1:
                watched.progress("step 1")
            return super().multi_get(keys)

    messages: list[str] = []
    watched = watch.Watch(Store(), 0.2, messages.append)
    watched._thread.join(timeout=20)
    assert len(looks) == 3  # the first, and two where it stood still for good
    assert len(messages) == 1


def test_a_store_that_does_not_answer_holds_no_rank_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host of rank 0 is cut off: its connections stay open, and questions to the store never return."""
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    messages: list[str] = []
    released = threading.Event()

    class Store:
        asked = 0

        def clone(self) -> Store:
            return self

        def set(self, key: str, value: str) -> None:
            self.asked += 1
            released.wait(60)

    store = Store()
    watched = watch.Watch(store, 0.4, messages.append)
    watched.progress("step 1")
    watched._thread.join(timeout=20)
    asked = store.asked
    released.set()
    assert asked == 1  # one question at a time
    assert len(messages) == 1
    assert messages[0].startswith(
        f"no progress for 0 s at 'step 1' on {socket.gethostname()}, and no word of the other"
    )
    assert messages[0].endswith("node1, where the ranks meet, does not answer")


def test_a_divided_parameter_is_whole_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same share stand in for a real gather, which whole runs do."""
    events: list[str] = []

    def start(parameter: torch.nn.Parameter, share: torch.Tensor) -> Callable[[], torch.Tensor]:
        events.append(f"start {int(share[0])}")
        return lambda: torch.cat([share, share])[: zero.full_numel(parameter)]

    monkeypatch.setattr(partitioned, "world_size", lambda: 2)
    monkeypatch.setattr(ahead, "start_gather", start)
    first, second, third = (
        torch.nn.Parameter(torch.full((3,), number, dtype=torch.int32), requires_grad=False) for number in (1, 2, 3)
    )
    for parameter in (first, second, third):
        zero.divide(parameter)
        assert parameter.numel() == 0
        assert zero.full_shape(parameter) == (3,)
    gatherer = zero.GatherAhead()
    for _ in range(3):
        events.clear()
        for number, parameter in ((1, first), (2, second), (3, third), (3, third), (2, second), (1, first)):
            with gatherer.whole(parameter):
                assert parameter.tolist() == [number] * 3
                events.append(f"use {number}")
            assert parameter.numel() == 0
    up = [
        "start 1",
        "start 2",
        "use 1",
        "start 3",
        "use 2",
        "use 3",
    ]  # each is started before the one before it is used
    assert events == [*up, "start 3", "start 2", "use 3", "start 1", "use 2", "use 1"]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("product", ["scatter", "separate"])
def test_a_layer_with_divided_positions_computes_the_same(
    implementation: str, product: Literal["scatter", "separate"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROSA_KERNELS", implementation)

    def start(parameter: torch.nn.Parameter, share: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: share[: zero.full_numel(parameter)].clone()

    monkeypatch.setattr(ahead, "start_gather", start)
    positions = torch.randperm(40 * 24)[:50].sort().values.to(torch.int32)
    x = torch.randn(7, 24)
    results = []
    for divides in (False, True):
        torch.manual_seed(0)
        layer = AdaptedLinear(torch.nn.Linear(24, 40), "up", 2, 1.0, 0.0, 50, 0, product)
        if divides:
            divide_positions(torch.nn.Sequential(layer))
        layer.set_positions(positions)
        assert layer.values is not None
        layer.values.data.normal_(generator=torch.Generator().manual_seed(1))
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        assert layer.positions is not None
        assert layer.positions.numel() == (0 if divides else 50)
        results.append((y.detach(), given.grad, layer.values.grad))
    for whole, divided in zip(*results, strict=True):
        assert torch.equal(whole, divided)
    assert results[0][2].any()


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 300)
    assert distributed.free_memory() == 500
