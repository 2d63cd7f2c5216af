"""Finding out which rank the others wait for.

Every rank says where it is with :func:`progress`, in the same order as the others. A thread of each rank writes that
to the group's store again and again, with a count of the times: its sign of life. A rank that has not got further for
a while reads twice what all have said. Those that gave no sign of life in between are the ones waited for, and if all did,
those that are furthest behind. It names them and ends, instead of waiting for ever. Where the backend says that a
collective has failed, it does not wait for that while.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from rosa_ds.distributed.group import device, peak_memory_bytes, rank, world_size

logger = logging.getLogger(__name__)
STALLED_STATUS = 74  # of a process that ended because a rank stalled (EX_IOERR)
ANSWER_SECONDS = 10.0  # that the store may take
PAUSE_SECONDS = 5.0  # between two signs of life, at most
_ERROR_HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
LEFT = -1  # in place of a count of signs of life
Answer = TypeVar("Answer")
_active: Watch | None = None


def leave_errors_to_watch() -> None:
    """Before the ranks are joined: NCCL's watchdog shall not abort the process when another rank is gone, which would end the
    watch before it can name that rank. What a user has chosen stays.
    """
    if not any(name in os.environ for name in _ERROR_HANDLING):
        os.environ[_ERROR_HANDLING[0]] = "0"


def start_watch(seconds: float) -> None:
    """Begin to watch this rank, or go on with another time; nothing to do alone, or with 0 seconds.

    Args:
        seconds: without progress, after which the run ends; ``inf``: only where a collective has failed.
    """
    global _active
    if world_size() == 1 or seconds <= 0:
        return
    if _active is None:
        _active = Watch(dist.distributed_c10d._get_default_store(), seconds)
    else:
        _active.allow(seconds)


def stop_watch() -> None:
    global _active
    if _active is not None:
        _active.close()
        _active = None


def progress(where: str) -> None:
    """This rank has got here, e.g. ``"step 12 train, micro-batch 3"``. All ranks say the same in the same order."""
    if _active is not None:
        _active.progress(where)


def describe_ranks() -> str:
    """Where each rank was last, and its largest memory: what is known when one of them is gone."""
    try:
        assert _active is not None
        reports = _active.ask_all()
    except (RuntimeError, AssertionError, ValueError, TimeoutError):
        return "nothing is known of the ranks"
    return "; ".join(
        f"rank {other}{report.placed(' {:.0f} s ago')}, peak memory {report.peak_memory_bytes / 2**30:.2f} GiB"
        for other, report in enumerate(reports)
    )


def lost_contact(error: RuntimeError) -> bool:
    """Does a collective say that another rank is gone?"""
    said = str(error)
    gone = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited",
        "NCCL",
        "timed out",
    )
    return isinstance(error, dist.DistError) or any(text in said for text in gone)


def backend_error() -> str:
    """How the collectives of this rank's device have failed, by the backend's word; empty where it says nothing, or cannot."""
    with contextlib.suppress(RuntimeError, AttributeError, AssertionError, ValueError):
        error = dist.distributed_c10d._get_default_group()._get_backend(device()).get_error()
        if error.name != "SUCCESS":
            return str(error.name)
    return ""


class Watch:
    """Watches this rank's progress and tells the others.

    Args:
        store: shared by the ranks, a :class:`torch.distributed.Store` (whose type does not declare ``clone``).
        seconds: without progress, after which the run ends, as soon as it is known who gives no sign of life.
        end: called then with the message; by default the process is ended with a dump of its stacks.
    """

    def __init__(self, store: Any, seconds: float, end: Callable[[str], None] | None = None) -> None:
        # a client of its own: another's blocking call would hold this thread up
        self.store, self.seconds = store.clone(), seconds
        self.end = end or _end_process
        self.pause = min(PAUSE_SECONDS, seconds / 4)
        self._failure, self._failed_at = "", 0.0
        self._report = Report(0, "start", time.time(), 0, socket.gethostname())
        self._asking: threading.Thread | None = None
        self._since = time.monotonic()
        self._closed = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rosa-watch", daemon=True)
        self._thread.start()

    def progress(self, where: str) -> None:
        last = self._report
        self._report = last._replace(
            passed=last.passed + 1, where=where, since=time.time(), peak_memory_bytes=peak_memory_bytes()
        )
        self._since = time.monotonic()

    def allow(self, seconds: float) -> None:
        """Another time without progress, from now on."""
        self._since = time.monotonic()
        self.seconds, self.pause = seconds, min(PAUSE_SECONDS, seconds / 4)
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        alive = 0
        before: list[Report] = []
        while True:
            alive += 1
            if not self._failure and (failure := backend_error()):
                self._failure, self._failed_at = failure, time.monotonic()
            due = self._failed_at if self._failure else self._since + self.seconds
            stalled = time.monotonic() - due
            try:
                self._tell(alive)
                if stalled <= 0:
                    before = []
                elif not before:
                    before = self.ask_all()
                elif stalled > 3 * self.pause:  # two signs of life of every rank that gives any
                    return self._leave(describe_stall(before, self.ask_all(), self._said()))
            except (dist.DistError, RuntimeError, TimeoutError) as error:
                if stalled > 0:
                    last = self._report
                    said = f"{self._said()} at {last.where!r} on {last.host}"
                    return self._leave(f"{said}, and no word of the other ranks: {error}")
            self._woken.wait(self.pause)
            self._woken.clear()
            if self._closed:
                return

    def _said(self) -> str:
        return f"a collective failed ({self._failure})" if self._failure else f"no progress for {self.seconds:.0f} s"

    def _leave(self, message: str) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, TimeoutError):
            self._tell(LEFT)  # it is not this rank's silence that the others' run ends for
        self.end(message)

    def _tell(self, alive: int) -> None:
        said = json.dumps(self._report._replace(alive=alive))
        self.ask(functools.partial(self.store.set, _key(rank()), said))

    def ask_all(self) -> list[Report]:
        return self.ask(functools.partial(read_reports, self.store, world_size()))

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The store's answer. Raises: TimeoutError if it does not come: a host that is cut off leaves its connections open."""
        results: list[Answer | Exception] = []

        def call() -> None:
            try:
                results.append(question())
            except Exception as error:
                results.append(error)

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=call, name="rosa-watch-store", daemon=True)
            self._asking.start()
            self._asking.join(ANSWER_SECONDS)
        if not results:
            master = os.environ.get("MASTER_ADDR", "rank 0's host")
            raise TimeoutError(f"{master}, where the ranks meet, does not answer")
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]


class Report(NamedTuple):
    """What a rank said last."""

    passed: int = -1  # how often it got further
    where: str = "nowhere yet"
    since: float = 0.0  # seconds since the epoch, by its own clock
    peak_memory_bytes: int = 0
    host: str = ""
    alive: int = 0  # how often it has said something; LEFT: it has ended by itself

    def placed(self, ago: str, mark: str = "") -> str:
        """`` on node3 at 'step 9 train' for 12 s``; ``ago``: what is said of the seconds, ``mark``: of the rank."""
        host = f" on {self.host}" if self.host else ""
        return f"{host}{mark} at {self.where!r}" + (ago.format(time.time() - self.since) if self.since else "")


def describe_stall(before: Sequence[Report], after: Sequence[Report], why: str) -> str:
    """Which ranks the others wait for.

    Args:
        before: of every rank, what it had said when this one was found to stand still.
        after: what it has said since, long enough for a sign of life.
        why: the run ends, in words.
    """
    silent = [
        other
        for other, (then, now) in enumerate(zip(before, after, strict=True))
        if now.passed >= 0 and now.alive == then.alive != LEFT
    ]
    last = min(report.passed for report in after)
    missing = silent or [other for other, report in enumerate(after) if report.passed == last]
    mark = " (no sign of life)" if silent else ""
    named = ", ".join(f"rank {other}{after[other].placed(' for {:.0f} s', mark)}" for other in missing)
    places = sorted({report.where for other, report in enumerate(after) if other not in missing})
    waiting = f"; the others wait at {', '.join(map(repr, places))}" if places else " (all ranks)"
    return f"{why}: {named}{waiting}"


def read_reports(store: dist.Store, ranks: int) -> list[Report]:
    """Of every rank, in two questions: one for each of hundreds of ranks would take a store longer than it is given."""
    keys = [_key(other) for other in range(ranks)]
    if store.check(keys):
        return [Report(*json.loads(said)) for said in store.multi_get(keys)]
    return [read_report(store, other) for other in range(ranks)]


def read_report(store: dist.Store, other: int) -> Report:
    """Of one rank; ``Report()`` if it has said nothing yet."""
    return Report(*json.loads(store.get(_key(other)))) if store.check([_key(other)]) else Report()


def _key(other: int) -> str:
    return f"rosa_ds/progress/{other}"


def _end_process(message: str) -> None:
    logger.error("%s. The stacks of rank %d follow; training.stall_minutes sets the time.", message, rank())
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    os._exit(STALLED_STATUS)
