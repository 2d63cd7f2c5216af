"""One run a folder: a lock beside it that lives as long as the process that holds it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)
OTHER_HOST_SECONDS = 180.0
_held: list[TextIO] = []


def _lock_of(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _read_holder(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read().strip() or "another process"


def _try_lock(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_other_host(stream: TextIO, folder: Path, seconds: float) -> bool:
    """Whether the lock came free. One that a process of this host holds is not waited for: it lives."""
    deadline, told = time.monotonic() + seconds, False
    while (holder := _read_holder(stream)) and not holder.endswith(f" on {socket.gethostname()}"):
        if time.monotonic() >= deadline:
            return False
        if not told:
            logger.warning(
                "%s is held by a run on another host (%s); waiting up to %.0f s, since a file server keeps the lock of a host "
                "that went down for a while",
                folder,
                holder,
                seconds,
            )
            told = True
        time.sleep(min(1.0, seconds / 10))
        if _try_lock(stream):
            return True
    return False


def hold_folder(folder: Path, setting: str = "training.output_dir", wait_seconds: float = 0.0) -> None:
    """Keep other runs out of a folder until this process ends, however it ends. A lock beside it, since runs are moved aside.

    Args:
        setting: that named the folder, for messages.
        wait_seconds: for a lock that a process of another host holds. NFS servers give back a host's locks when its lease
            ends, some 90 s after it went down.

    Raises: ValueError if another run holds it.
    """
    folder, path = folder.resolve(), _lock_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise ValueError(f"{setting} {folder}: its lock {path} cannot be made ({error}); give another folder") from None
    try:
        if not _try_lock(stream) and not _wait_for_other_host(stream, folder, wait_seconds):
            holder = _read_holder(stream)
            stream.close()
            raise ValueError(
                f"{setting} {folder}: a run is writing there ({holder}); wait for it, end it, or give another folder"
            )
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): make sure that no other run writes to %s", path, error, folder)
        stream.close()
        return
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    _held.append(stream)  # closing the file would give the lock back


def holder(folder: Path) -> str | None:
    """Which process writes to a folder that :func:`hold_folder` keeps for it; ``None`` if there is none."""
    path = _lock_of(folder)
    if not path.exists():
        return None
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_holder(stream)
        except OSError:  # a file system without locks
            return None
    return None
