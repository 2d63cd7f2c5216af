"""What a measured op consists of, the gate before its measurement, and the measurement of one case."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernel_bench import measure
from kernel_bench.cases import Case, Inputs, make_inputs
from kernel_bench.roofline import Work, percent_of_peak
from rosa_kernels.testing import bound, relative_rms

Outputs: TypeAlias = dict[str, Tensor]
"""Results by name."""

Row: TypeAlias = dict[str, Any]
"""One line of the table and of the JSON file."""


class GateError(Exception):
    """A candidate computes something else than the reference, so its time means nothing."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to do an op.

    Attributes:
        bind: prepares, untimed, the call on a set of inputs.
        outputs: what that call computes, for the gate; may change copies of the inputs alone.
        reference: the same in float64; candidates of one reference share the function, so that it runs once.
        against: the candidate of ours that its time is divided by; empty: the first one.
        absent: why it does not run here; empty where it does.
        saved: bytes kept for backward, where there is one.
    """

    name: str
    bind: Callable[[Inputs], measure.Call]
    outputs: Callable[[Inputs], Outputs]
    reference: Callable[[Inputs], Outputs]
    against: str = ""
    absent: str = ""
    saved: Callable[[Inputs], int] | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """An op to measure.

    Attributes:
        reads: names of the tensors of :class:`Inputs` that it needs.
        candidates: all ways to do it in a case, ours first.
        work: bytes and operations that it cannot do without.
        terms: of its longest sum, for the bound of the gate.
    """

    name: str
    reads: tuple[str, ...]
    candidates: Callable[[Case], list[Candidate]]
    work: Callable[[Case], Work]
    terms: Callable[[Case], int]


def simple(
    name: str,
    output: str,
    run: Callable[[Inputs], Tensor],
    reference: Callable[[Inputs], Outputs],
    absent: str = "",
) -> Candidate:
    """A candidate whose call is ``run`` and returns its only output."""

    def bind(inputs: Inputs) -> measure.Call:
        return lambda: run(inputs)

    return Candidate(name, bind, lambda inputs: {output: run(inputs)}, reference, absent=absent)


def missing(package: str, attribute: str = "") -> str:
    """Why a peer cannot be compared; empty where it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if attribute and not hasattr(importlib.import_module(package), attribute):
        return f"this {package} has no {attribute}"
    return ""


def gate(candidate: Candidate, inputs: Inputs, reference: Outputs, limit: float) -> float:
    """The largest relative RMS error of its outputs against those of the reference.

    Raises: GateError for a shape that differs, a number that is not finite, or an error above ``limit``.
    """
    outputs = candidate.outputs(inputs)
    if outputs.keys() != reference.keys():
        raise GateError(f"{candidate.name} gives {', '.join(outputs)} and the reference {', '.join(reference)}")
    worst = 0.0
    for name, expected in reference.items():
        actual = outputs[name]
        if actual.shape != expected.shape:
            raise GateError(f"{candidate.name}: {name} is {tuple(actual.shape)}, not {tuple(expected.shape)}")
        error = relative_rms(actual, expected)
        if not error <= limit:  # also NaN
            raise GateError(
                f"{candidate.name}: {name} has a relative RMS error of {error:.3g} against the float64 reference, above "
                f"{limit:.3g}; nothing was timed"
            )
        worst = max(worst, error)
    return worst


def _row(op: Op, case: Case, candidate: Candidate) -> Row:
    return {
        "row": "candidate",
        "op": op.name,
        "shape": str(case.layer),
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mask": case.mask,
        "entries": case.entries,
        "rank": case.rank,
        "candidate": candidate.name,
    }


def measure_case(op: Op, case: Case, repeats: int, warm: bool = False) -> list[Row]:
    """Gate, then time and memory of each candidate: one row each, absent ones with the reason.

    ``warm`` repeats on one set of inputs; otherwise each repeat finds its inputs outside the caches.

    Raises: GateError before anything is timed.
    """
    candidates = op.candidates(case)
    present = [candidate for candidate in candidates if not candidate.absent]
    sets = [make_inputs(case, op.reads, seed=0)]
    limit = bound(case.dtype, op.terms(case))
    references = {function: function(sets[0]) for function in {candidate.reference for candidate in present}}
    errors = {each.name: gate(each, sets[0], references[each.reference], limit) for each in present}
    del references
    number = 1 if warm else measure.number_of_sets(sets[0].nbytes(), repeats * len(present), case.device)
    sets += [make_inputs(case, op.reads, seed) for seed in range(1, number)]
    calls = {candidate.name: [candidate.bind(inputs) for inputs in sets] for candidate in present}
    times = measure.interleaved(calls, repeats, case.device)
    middle = {name: measure.median(each) for name, each in times.items()}
    rows = []
    for candidate in candidates:
        row = _row(op, case, candidate)
        rows.append(row)
        if candidate.absent:
            row["absent"] = candidate.absent
            continue
        name = candidate.name
        row["milliseconds"] = middle[name]
        row["fastest"], row["slowest"] = min(times[name]), max(times[name])
        row["ratio"] = middle[name] / middle[candidate.against or present[0].name]
        row["against"] = candidate.against or present[0].name
        row["peak_bytes"] = measure.peak_bytes(calls[name][0], case.device)
        row["error"] = errors[name]
        if candidate.saved is not None:
            row["saved_bytes"] = candidate.saved(sets[0])
        if case.device.type != "cpu":
            percent = percent_of_peak(measure.device_name(case.device), op.work(case), case.dtype, middle[name])
            row["roofline_percent"] = "unknown device" if percent is None else percent
    return rows


def clear_device(device: torch.device) -> None:
    """Give what a case allocated back, so that the next one's peak does not depend on it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
