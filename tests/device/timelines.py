"""Streams and events as names of timelines: everything runs at once, and an observer learns what is ordered after what."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

HOST = -1
"""The timeline of the program itself, beside those of the streams."""


class Order:
    """What of every timeline is known to be done, at one moment; the observer's own record in :mod:`sanitizer`."""

    def snapshot(self, timeline: int) -> dict[int, int]:
        return {}

    def join(self, timeline: int, known: dict[int, int]) -> None: ...

    def record_stream(self, tensor: Any, timeline: int) -> None: ...

    def everything(self) -> dict[int, int]:
        return {}


_observer = Order()
_thread = threading.local()


def observe(order: Order) -> None:
    """Tell ``order`` of everything that happens from now on."""
    global _observer
    _observer = order


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._known: dict[int, int] = {}
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._known = _observer.snapshot((stream or current_stream()).number)
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        _observer.join(HOST, self._known)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._seconds - self._seconds)


class Stream:
    _numbers = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.number = next(Stream._numbers)

    def wait_event(self, event: Event) -> None:
        _observer.join(self.number, event._known)

    def wait_stream(self, other: Stream) -> None:
        _observer.join(self.number, _observer.snapshot(other.number))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _observer.join(HOST, _observer.snapshot(self.number))

    def query(self) -> bool:
        self.synchronize()
        return True


DEFAULT = Stream()


def default_stream(device: Any = None) -> Stream:
    return DEFAULT


def current_stream(device: Any = None) -> Stream:
    stream: Stream = getattr(_thread, "stream", DEFAULT)
    return stream


def set_stream(stream: Stream) -> None:
    _thread.stream = stream


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    before = current_stream()
    set_stream(chosen or before)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:
    _observer.join(HOST, _observer.everything())


def record_stream(tensor: Any, used_on: Stream) -> None:
    """``Tensor.record_stream``: its memory is not given away before what ``used_on`` does with it is done."""
    _observer.record_stream(tensor, used_on.number)
