"""One run a folder, also when the host that held it is gone."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from rosa_ds.checkpoints import folder_lock
from rosa_ds.checkpoints.folder_lock import hold_folder, holder


def lock_as(folder: Path, host: str) -> int:
    """What a process of ``host`` leaves at a file server. Returns: a descriptor; closing it gives the lock back."""
    path = folder.with_name(f".{folder.name}.lock")
    path.write_text(f"process 7 on {host}\n")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The end of a process closes its locks."""
    held: list[TextIO] = []
    monkeypatch.setattr(folder_lock, "_held", held)
    yield
    for stream in held:
        stream.close()


def test_a_lock_of_a_host_that_went_down_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    descriptor = lock_as(folder, "gone")
    server = threading.Timer(0.5, os.close, [descriptor])
    server.start()
    with caplog.at_level(logging.WARNING):
        hold_folder(folder, wait_seconds=20.0)
    server.join()
    assert caplog.text.count("held by a run on another host (process 7 on gone); waiting up to 20 s") == 1
    assert holder(folder) == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize(
    ("host", "wait", "least", "most"),
    [("busy", 0.4, 0.4, 5.0), ("busy", 0.0, 0.0, 0.3), (socket.gethostname(), 20.0, 0.0, 0.3)],
)
def test_a_run_that_lives_keeps_its_folder(tmp_path: Path, host: str, wait: float, least: float, most: float) -> None:
    """A process of this host is alive if it holds a lock: nothing to wait for."""
    descriptor = lock_as(tmp_path / "run", host)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"a run is writing there \(process 7 on {host}\); wait for it, end it, or"):
        hold_folder(tmp_path / "run", wait_seconds=wait)
    assert least <= time.monotonic() - begun < most
    os.close(descriptor)
    assert holder(tmp_path / "run") is None
    hold_folder(tmp_path / "run")
    assert (tmp_path / ".run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
