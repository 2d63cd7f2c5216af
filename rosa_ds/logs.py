"""What a program of ours prints: the messages of rank 0, and warnings and errors of the others."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

import transformers

from rosa_ds.errors import INTERRUPTED_STATUS, InterruptedRunError, RunError


def set_up_logging() -> None:
    """Send our messages to standard error with their time; quieten what libraries say of themselves."""
    main = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if main else f"[rank {os.environ['RANK']}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("rosa_ds")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if main else logging.WARNING)
    # DeepSpeed calls these; torch 2.13 says so at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not main:
        import datasets  # slow, and not every program reads data

        datasets.disable_progress_bars()


def run_program(main: Callable[[list[str]], None]) -> None:
    """Call ``main`` with the command line; what a user can mend ends it with one message and exit status 1."""
    set_up_logging()
    try:
        main(sys.argv[1:])
    except InterruptedRunError as error:
        logging.getLogger("rosa_ds").info("%s", error)
        sys.exit(INTERRUPTED_STATUS)
    except (ValueError, OSError, RunError) as error:
        logging.getLogger("rosa_ds").debug("where it was found", exc_info=True)
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"[rank {rank}] error: {error}")
