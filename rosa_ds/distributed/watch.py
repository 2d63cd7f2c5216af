"""Finding out which rank the others wait for.

Every rank says where it is with :func:`progress`, in the same order as the others. A thread of each rank writes that
to the group's store. A rank that has not got further for a while reads what all have said: those that are furthest
behind are the ones waited for. It names them and ends, instead of waiting for ever.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rosa_ds.distributed.group import peak_memory_bytes, rank, world_size

logger = logging.getLogger(__name__)
STALLED_STATUS = 74  # of a process that ended because a rank stalled (EX_IOERR)
ANSWER_SECONDS = 10.0  # that the store may take
Answer = TypeVar("Answer")
_active: Watch | None = None


class Watch:
    """Watches this rank's progress and tells the others.

    Args:
        store: shared by the ranks; ``set`` and ``get`` of bytes by name.
        seconds: without progress, after which the run ends.
        end: called then with the message; by default the process is ended with a dump of its stacks.
    """

    def __init__(self, store: Any, seconds: float, end: Callable[[str], None] | None = None) -> None:
        # a client of its own: another's blocking call would hold this thread up
        self.store, self.seconds = store.clone() if hasattr(store, "clone") else store, seconds
        self.end = end or _end_process
        self._host = socket.gethostname()
        self._at = (0, "start", time.time(), 0)
        self._asking: threading.Thread | None = None
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rosa-watch", daemon=True)
        self._thread.start()

    def progress(self, where: str) -> None:
        self._at = (self._at[0] + 1, where, time.time(), peak_memory_bytes())
        self._since = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        told = None
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            stalled = time.monotonic() - self._since > self.seconds
            try:
                if (at := self._at) != told:
                    said = json.dumps([*at, self._host])
                    self.ask(functools.partial(self.store.set, f"rosa_ds/progress/{rank()}", said))
                    told = at
                message = self.ask(self._message) if stalled else ""
            except (dist.DistError, RuntimeError, TimeoutError) as error:
                message = f"no progress for {self.seconds:.0f} s at {self._at[1]!r} on {self._host}, and no word of the other ranks: {error}"
            if stalled:
                self.end(message)
                return

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

    def _message(self) -> str:
        reports = [read_progress(self.store, other) for other in range(world_size())]
        last = min(count for count, *_ in reports)
        now = time.time()
        behind = [
            f"rank {other}{_on(host)} at {where!r} for {now - since:.0f} s"
            for other, (count, where, since, _, host) in enumerate(reports)
            if count == last
        ]
        ahead = sorted({where for count, where, *_ in reports if count > last})
        waiting = f"; the others wait at {', '.join(map(repr, ahead))}" if ahead else " (all ranks)"
        return f"no progress for {self.seconds:.0f} s: {', '.join(behind)}{waiting}"


def read_progress(store: Any, other: int) -> list[Any]:
    """What a rank said last: how often it got further, where, when, its largest memory, its host."""
    key = f"rosa_ds/progress/{other}"
    if not store.check([key]):
        return [-1, "nowhere yet", time.time(), 0, ""]
    said: list[Any] = json.loads(store.get(key))
    return said


def _on(host: str) -> str:
    return f" on {host}" if host else ""


def _end_process(message: str) -> None:
    logger.error("%s. The stacks of rank %d follow; training.stall_minutes sets the time.", message, rank())
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    os._exit(STALLED_STATUS)


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


def describe_ranks() -> str:
    """Where each rank was last, and its largest memory: what is known when one of them is gone."""
    reports = []
    for other in range(world_size()):
        try:
            assert _active is not None
            report = _active.ask(functools.partial(read_progress, _active.store, other))
            _, where, since, memory, host = report
        except (RuntimeError, AssertionError, ValueError, TimeoutError):
            reports.append(f"rank {other} unknown")
            continue
        ago = time.time() - since
        reports.append(f"rank {other}{_on(host)} at {where!r} {ago:.0f} s ago, peak memory {memory / 2**30:.2f} GiB")
    return "; ".join(reports)


def start_watch(seconds: float) -> None:
    """Begin to watch this rank; nothing to do alone, or with 0 seconds."""
    global _active
    if _active is None and world_size() > 1 and seconds > 0:
        _active = Watch(dist.distributed_c10d._get_default_store(), seconds)


def stop_watch() -> None:
    global _active
    if _active is not None:
        _active.close()
        _active = None


def progress(where: str) -> None:
    """This rank has got here, e.g. ``"step 12 train, micro-batch 3"``. All ranks say the same in the same order."""
    if _active is not None:
        _active.progress(where)
