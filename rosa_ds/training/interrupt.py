"""Ending a run early with nothing lost: signals, and files that a user touches in the run's folder."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rosa_ds.checkpoints.run_folder import MARK_FILE, SAVE_FILE
from rosa_ds.utils.errors import InterruptedRunError
from rosa_ds.utils.files import write_json

logger = logging.getLogger(__name__)


class Interruption:
    """Remembers that this rank was asked to stop: SIGTERM (a scheduler's), SIGUSR1 (SLURM's ``--signal``), SIGINT (Ctrl-C).

    A handler only takes note; the loop asks at points that all ranks pass, and they agree there. A second SIGINT, later
    than ``AGAIN_SECONDS`` after the first, raises KeyboardInterrupt: launchers pass on what the terminal has sent to all.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    AGAIN_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: str = ""
        self._process = os.getpid()
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
        if os.getpid() != self._process:  # a process forked from this one (data.workers) just ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
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


def end_interrupted(folder: Path, received: str, step: int, main: bool) -> None:
    """End an interrupted run whose state is saved: mark the folder for scripts that requeue. Always raises."""
    if main:
        write_json(folder / MARK_FILE, {"signal": received, "step": step})
    raise InterruptedRunError(
        f"interrupted ({received or 'another rank got a signal'}) after step {step}: the state is saved, go on with --resume"
    )
