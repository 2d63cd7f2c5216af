"""What a program of ours prints: the messages of rank 0, and warnings and errors of the others."""

from __future__ import annotations

import functools
import logging
import logging.handlers
import os
import socket
import sys
import warnings
from pathlib import Path

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What makes transformers say less, unless the user has set it: read when it is imported, which is slow and comes later."""


SAME_ON_ALL_RANKS = {"same_on_all_ranks": True}
"""The ``extra`` of a warning that every rank comes to: rank 0 alone shows it, all write it to their files."""


@functools.cache
def log_once(logger: logging.Logger, level: int, message: str, of: str = "", same_on_all_ranks: bool = False) -> None:
    """Log a message the first time that it is said ``of`` something."""
    logger.log(level, "%s", message, extra=SAME_ON_ALL_RANKS if same_on_all_ranks else None)


def set_up_logging() -> None:
    """Send our messages to standard error with their time; quieten what libraries say of themselves."""
    main = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if main else f"[rank {os.environ['RANK']}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if main else logging.WARNING)
    if not main:
        handler.addFilter(lambda record: not hasattr(record, "same_on_all_ranks"))
    ours = logging.getLogger("rosa_ds")
    ours.handlers, ours.propagate = [handler, _kept()], False
    ours.setLevel(logging.DEBUG)
    # DeepSpeed calls these; torch 2.13 says so at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    quiet = QUIET if main else QUIET | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def _kept() -> logging.Handler:
    """For what is said before there is a folder for it."""
    return logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def begin_log() -> None:
    """Keep what is said from now on for a folder yet to come; the file of an earlier run in this process is closed."""
    ours = logging.getLogger("rosa_ds")
    for handler in [one for one in ours.handlers if isinstance(one, logging.FileHandler)]:
        handler.close()
        ours.removeHandler(handler)
        ours.addHandler(_kept())


def log_to(folder: Path) -> None:
    """Write all that this rank says from now on, and has said, to ``rank-0003.log`` in a folder; the screen stays as it is.

    Nothing without :func:`set_up_logging`. Raises: OSError if it cannot be written.
    """
    ours = logging.getLogger("rosa_ds")
    waiting = [handler for handler in ours.handlers if isinstance(handler, logging.handlers.MemoryHandler)]
    if not waiting:
        return
    rank = int(os.environ.get("RANK", "0"))
    folder.mkdir(parents=True, exist_ok=True)
    target = logging.FileHandler(folder / f"rank-{rank:04}.log")
    where = f"{socket.gethostname()} rank {rank}"
    target.setFormatter(logging.Formatter(f"%(asctime)s {where} %(levelname)s %(message)s"))
    ours.addHandler(target)
    for handler in waiting:
        handler.setTarget(target)
        handler.flush()
        ours.removeHandler(handler)
