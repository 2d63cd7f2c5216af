"""Ending a run early with nothing lost: signals, files that a user touches in the run's folder, and one run a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rosa_ds.errors import InterruptedRunError
from rosa_ds.files import write_json

logger = logging.getLogger(__name__)
SAVE_FILE = "save"
MARK_FILE = "interrupted.json"
_held: list[TextIO] = []


class Interruption:
    """Remembers that this rank was asked to stop: SIGTERM (a scheduler's), SIGUSR1 (SLURM's ``--signal``), SIGINT (Ctrl-C).

    A handler only takes note; the loop asks at points that all ranks pass, and they agree there. A second SIGINT, later
    than ``AGAIN_SECONDS`` after the first, raises KeyboardInterrupt: launchers pass on what the terminal has sent to all.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    AGAIN_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: str = ""
        self._interrupted_at: float | None = None  # the first Ctrl-C, in seconds of the monotonic clock
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # what nohup, or ``&`` in a script, has switched off stays so
        heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if os.environ.get("RANK", "0") == "0":  # not by logging, which may be at work below this handler
                os.write(2, b"\nCtrl-C: saving after this step; once more ends without saving\n")
        elif now - self._interrupted_at > self.AGAIN_SECONDS:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        return bool(self.received)


def take_save_request(folder: Path) -> bool:
    """Whether a user has asked for a checkpoint by ``touch RUN_DIR/save``; the file is removed."""
    try:
        (folder / SAVE_FILE).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning("%s asks for no checkpoint: %s", folder / SAVE_FILE, error)
        return False
    return True


def hold_folder(folder: Path, setting: str = "training.output_dir") -> None:
    """Keep other runs out of a folder until this process ends, however it ends. A lock beside it, since runs are moved aside.

    Args:
        setting: that named the folder, for messages.

    Raises: ValueError if another run holds it.
    """
    folder = folder.resolve()
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise ValueError(f"{setting} {folder}: its lock {path} cannot be made ({error}); give another folder") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise ValueError(
            f"{setting} {folder}: a run is writing there ({holder}); wait for it, end it, or give another folder"
        ) from None
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
    path = folder.resolve().with_name(f".{folder.name}.lock")
    if not path.exists():
        return None
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "another process"
        except OSError:  # a file system without locks
            return None
    return None


def leave(folder: Path, received: str, step: int, main: bool) -> None:
    """End an interrupted run whose state is saved: mark the folder for scripts that requeue. Always raises."""
    if main:
        write_json(folder / MARK_FILE, {"signal": received, "step": step})
    raise InterruptedRunError(
        f"interrupted ({received or 'another rank got a signal'}) after step {step}: the state is saved, go on with --resume"
    )
