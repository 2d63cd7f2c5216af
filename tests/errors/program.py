"""Call a program's ``main`` in this process as its command line would, and give what a user sees of it.

What a process has for itself (environment, folder, log handlers, locks, the process group) is put back afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import transformers

from forking import exit_status
from rosa_ds import distributed
from rosa_ds.checkpoints import folder_lock
from rosa_ds.commands.program import run_program
from rosa_ds.distributed import group
from rosa_ds.training import run as training

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit status, and all that came to standard output and error."""

    status: int
    output: str

    @property
    def messages(self) -> list[str]:
        """What begins with ``error:`` (argparse puts the program before it), each up to the end of the output."""
        begins = [
            found.end() for found in re.finditer(r"^(?:rosa-ds \w+: |\[rank \w+\] )?error: ", self.output, re.MULTILINE)
        ]
        return [self.output[begin:].strip() for begin in begins]


@functools.cache
def main_of(program: str) -> Callable[[list[str]], None]:
    main: Callable[[list[str]], None] = importlib.import_module(f"rosa_ds.commands.{program}").main
    return main


@contextlib.contextmanager
def _captured() -> Iterator[Path]:
    """What the process writes to its standard streams, C code's too, goes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        streams = (sys.stdout, sys.stderr)
        kept = [os.dup(1), os.dup(2)]
        with path.open("w") as target:
            os.dup2(target.fileno(), 1)
            os.dup2(target.fileno(), 2)
            sys.stdout = sys.stderr = target
            try:
                yield path
            finally:
                target.flush()
                sys.stdout, sys.stderr = streams
                for number, descriptor in zip((1, 2), kept, strict=True):
                    os.dup2(descriptor, number)
                    os.close(descriptor)


def _not_refused(*arguments: object) -> None:
    """An engine is what a run has when nothing is left to refuse; in one process there can be only one."""
    raise AssertionError("the input was not refused: an engine would be built")


@contextlib.contextmanager
def _own_process(program: str, arguments: tuple[str, ...], folder: Path, environ: Mapping[str, str]) -> Iterator[None]:
    ours, before = logging.getLogger("rosa_ds"), Path.cwd()
    logs = (ours.handlers, ours.propagate, ours.level)
    verbosity, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    with (
        mock.patch.dict(os.environ, {**kept, **environ}, clear=True),
        mock.patch.object(sys, "argv", [f"rosa-ds {program}", *arguments]),
        mock.patch.object(group, "_on_leave", []),
        mock.patch.object(folder_lock, "_held", []),
        mock.patch.object(sys, "excepthook", sys.excepthook),  # joining a process group wraps it
        mock.patch.object(training, "build_engine", _not_refused),
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does outside of its main module
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            for stream in folder_lock._held:  # the end of a process closes it
                stream.close()
            for handler in ours.handlers:
                handler.close()
            ours.handlers, ours.propagate, ours.level = logs
            ours.manager._clear_cache()
            transformers.utils.logging.set_verbosity(verbosity)
            if bars:
                transformers.utils.logging.enable_progress_bar()


def call(
    program: str,
    *arguments: str,
    folder: Path,
    environ: Mapping[str, str] | None = None,
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome:
    """``rosa-ds PROGRAM ARGUMENTS`` in ``folder``; ``around`` is entered there."""

    def leave(status: int = 0) -> None:
        """What :func:`rosa_ds.distributed.leave` does, but for the end of the process."""
        distributed.shutdown()
        raise SystemExit(status)

    main = main_of(program)
    with _captured() as output:
        with (
            _own_process(program, arguments, folder, environ or {}),
            mock.patch.object(distributed, "leave", leave),
            around(),
        ):
            try:
                run_program(main)
            except SystemExit as ended:
                status = exit_status(ended)
        sys.stderr.flush()
        return Outcome(status, output.read_text())
