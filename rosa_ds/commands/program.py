"""A program from its command line to its exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rosa_ds.utils.errors import INTERRUPTED_STATUS, InterruptedRunError, RunError
from rosa_ds.utils.logs import set_up_logging
from rosa_ds.utils.rendezvous import join_slurm_step


def run_program(main: Callable[[list[str]], None]) -> NoReturn:
    """Call ``main`` with the command line and end the process; what a user can mend is one message and exit status 1."""
    try:
        join_slurm_step()
    except ValueError as error:
        sys.exit(f"error: {error}")
    set_up_logging()
    status = _status_of(main)
    if "torch" not in sys.modules:
        sys.exit(status)
    from rosa_ds import distributed

    distributed.leave(status)


def _status_of(main: Callable[[list[str]], None]) -> int:
    ours = logging.getLogger("rosa_ds")
    try:
        main(sys.argv[1:])
    except InterruptedRunError as error:
        ours.info("%s", error)
        return INTERRUPTED_STATUS
    except (ValueError, OSError, RunError) as error:
        ours.debug("where it was found", exc_info=True)
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"error: {error}\n" if rank == "0" else f"[rank {rank}] error: {error}\n")
        return 1
    except Exception:
        ours.debug("ended by", exc_info=True)  # for the rank's file
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
