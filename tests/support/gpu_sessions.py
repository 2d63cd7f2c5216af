"""Whether this session of pytest has GPUs. Importing it decides: all but ``-m gpu`` is as on a machine without any.

So is every process that tests start. It is imported before torch, which looks for GPUs once, and transformers, which imports
Triton, which asks then whether it interprets.
"""

from __future__ import annotations

import argparse
import os
import sys

import pytest
from _pytest.mark.expression import Expression


def only_gpu_tests(expression: str) -> bool:
    """Whether ``-m EXPRESSION`` takes tests that are marked ``gpu``, and none that have no mark."""
    taken = [bool(expression) and Expression.compile(expression).evaluate(marked.__eq__) for marked in ("gpu", "")]
    return taken == [True, False]


def _expression_of_command_line() -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    return str(parser.parse_known_args(sys.argv[1:])[0].m)


if "PYTEST_XDIST_WORKER" in os.environ:  # whose environment pytest itself has made
    GPUS_ASKED = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
else:
    GPUS_ASKED = only_gpu_tests(_expression_of_command_line())
if not GPUS_ASKED:
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


def check_expression(expression: str) -> None:
    """Raise UsageError where pytest has read another ``-m`` than this module."""
    if only_gpu_tests(expression) and not GPUS_ASKED:
        raise pytest.UsageError(f"GPUs are hidden: give -m and {expression!r} as two words of their own")


def skip_gpu_tests(items: list[pytest.Item], there: bool) -> None:
    """Where GPUs are not asked for, or not ``there``; those that can use Triton's interpreter do so unless asked."""
    if GPUS_ASKED and there:
        return
    reason = "needs a GPU, and torch sees none" if GPUS_ASKED else "needs a GPU: pytest -m gpu"
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark and (GPUS_ASKED or not mark.kwargs.get("or_interpreter")):
            item.add_marker(pytest.mark.skip(reason=reason))
