"""Programs as child processes: what each one takes, and how all of them end when this one is asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)
GRACE_SECONDS = 600.0
"""From a signal to the children until they are killed: a step, a draw and a checkpoint of a large model fit."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended. ``cpu_seconds``: user and system time of it and of the children that it waited for."""

    status: int
    seconds: float
    cpu_seconds: float


class Children:
    """Starts programs, from any thread, and hands on SIGTERM and SIGINT to them as SIGTERM inside a ``with`` block.

    Each has a session of its own, so that Ctrl-C in a terminal reaches them through here alone. A second signal kills them.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, environment: Mapping[str, str] | None = None, grace: float = GRACE_SECONDS) -> None:
        self.stopped = ""
        self._environment = dict(os.environ if environment is None else environment)
        self._grace = grace
        self._running: set[int] = set()
        self._lock = threading.RLock()  # a handler runs in the main thread, whatever that does
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Children:
        for number in self.SIGNALS:
            self._handlers.callback(signal.signal, number, signal.signal(number, self._stop))
        return self

    def __exit__(self, *exception: object) -> None:
        self._handlers.close()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Outcome:
        """Run a program to its end, its output added to a file. After a signal nothing is started any more: status 75.

        Args:
            environment: of this program alone, beside that of all.

        Raises: OSError if it cannot be started.
        """
        begun = time.monotonic()
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            with self._lock:
                if self.stopped:
                    return Outcome(os.EX_TEMPFAIL, 0.0, 0.0)
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**self._environment, **(environment or {})},
                    start_new_session=True,
                )
                self._running.add(process.pid)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # from here on the number may be another process's
            self._running.remove(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return Outcome(process.returncode, time.monotonic() - begun, usage.ru_utime + usage.ru_stime)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first = not self.stopped
        self.stopped = signal.Signals(number).name
        if not first:
            self._send(signal.SIGKILL)
            return
        logger.info("%s: the runs save their state and end; once more kills them", self.stopped)
        self._send(signal.SIGTERM)
        timer = threading.Timer(self._grace, self._send, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def _send(self, number: signal.Signals) -> None:
        with self._lock:
            for pid in self._running:
                # SIGTERM to the program itself, which ends its own children; a kill to all that it has started
                (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
