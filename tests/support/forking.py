"""Ranks without their start: ``python tests/support/forking.py`` imports everything once, then forks the ranks of one run after another.

Each request is a line of JSON on standard input (arguments, ranks, port, cwd, environment, output), each answer a line with the
run's exit status. A rank finds what ``torchrun`` would give it; only the seconds of importing are gone, which are most of a
short run. What forked ranks share and started ones do not, the seed of Python's hashes, is why some tests start theirs.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

SECONDS_TO_END = 60.0  # for the other ranks, when one has ended with an error


def exit_status(ended: SystemExit) -> int:
    """What Python ends with; it prints a message first, as here."""
    if isinstance(ended.code, str):
        sys.stderr.write(f"{ended.code}\n")
        return 1
    return int(ended.code or 0)


def _run_script(script: str) -> None:
    runpy.run_path(script, run_name="__main__")


def _call(script: str, call: Callable[[str], None]) -> int:
    try:
        call(script)
    except SystemExit as ended:
        return exit_status(ended)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _be_rank(request: dict[str, Any], rank: int, call: Callable[[str], None]) -> NoReturn:
    """Become what ``python ARGUMENTS`` or a rank of ``torchrun ARGUMENTS`` is after its imports, and end with its status."""
    ranks, arguments = request["ranks"], request["arguments"]
    os.environ.clear()
    os.environ.update(request["environment"])
    if ranks > 1:
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]), "GROUP_RANK": "0"}
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update(master | {name: str(value) for name, value in own.items()})
    os.chdir(request["cwd"])
    streams = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for number, descriptor in zip((0, 1, 2), (streams[0], streams[1], streams[1]), strict=True):
        os.dup2(descriptor, number)
    sys.argv, sys.path[0] = list(arguments), str(Path(arguments[0]).parent)
    status = _call(arguments[0], call)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fork(request: dict[str, Any], call: Callable[[str], None]) -> int:
    """Exit status of the run: a single process' own, or 1 where one of several ranks has ended with another than 0."""
    ranks: set[int] = set()
    for rank in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            _be_rank(request, rank, call)
        ranks.add(child)
    status, end = 0, float("inf")
    while ranks:
        child, ended = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > end:
                for left in ranks:
                    os.kill(left, signal.SIGKILL)
            time.sleep(0.005)
            continue
        ranks.discard(child)
        if ended and not status:
            code = os.waitstatus_to_exitcode(ended)
            status, end = code if request["ranks"] == 1 else 1, time.monotonic() + SECONDS_TO_END
            for left in ranks:
                os.kill(left, signal.SIGTERM)
    return status


def serve(prepare: Callable[[], None] | None = None, call: Callable[[str], None] = _run_script) -> None:
    """Answer the requests of standard input. ``prepare`` runs once, before any rank; ``call`` runs a rank's script."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    if prepare is not None:
        prepare()
    import transformers.modeling_utils  # noqa: F401

    import rosa_ds.training.run  # noqa: F401

    for line in sys.stdin:
        answers.write(f"{_fork(json.loads(line), call)}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
