"""The account of a rank: bytes by name, predicted before the first step and measured in the run.

Everything is bytes of one rank. What is measured of parameters and optimizer state is the tensors that are really there,
of communication the payload of every collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

BUCKETS, GATHERED = "gradient buckets", "gathered at once"
ACTIVATIONS, WORKING = "activations", "forward and backward, beside"
_IN_EVERY_STEP = (GATHERED, ACTIVATIONS, WORKING)
_MIB = 2**20

When = Literal["always", "in some steps", "between steps"]
"""When a method holds something: from its first use on, beside forward and backward of some steps, or while nothing trains."""


@dataclasses.dataclass(frozen=True)
class Term:
    """Bytes that a method holds on one rank.

    Attributes:
        unsharded: bytes on one rank if nothing were sharded; ``None`` for what comes and goes.
        may_leave: goes to host memory where the device has no room for it.
        remedy: what makes it smaller, for the message of a run that lacks memory.
    """

    name: str
    bytes: int
    when: When = "always"
    unsharded: int | None = None
    may_leave: bool = False
    remedy: str = ""


@dataclasses.dataclass
class Account:
    """``memory`` and ``traffic``: name -> bytes on this rank; ``total``: name -> bytes on one rank without any division.

    ``when``, ``may_leave`` and ``remedies`` are of the methods' terms, see :class:`Term`.
    """

    memory: dict[str, int]
    traffic: dict[str, int]
    total: dict[str, int]
    when: dict[str, When] = dataclasses.field(default_factory=dict)
    may_leave: list[str] = dataclasses.field(default_factory=list)
    remedies: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, terms: Iterable[Term]) -> None:
        """Enter what methods hold."""
        for term in terms:
            self.memory[term.name] = term.bytes
            if term.unsharded is not None:
                self.total[term.name] = term.unsharded
            if term.when != "always":
                self.when[term.name] = term.when
            if term.may_leave:
                self.may_leave.append(term.name)
            if term.remedy:
                self.remedies[term.name] = term.remedy

    @property
    def resident(self) -> int:
        """Bytes that are there all the time, or from mask or first step on."""
        passing = (*_IN_EVERY_STEP, *self.when)
        return sum(size for name, size in self.memory.items() if name not in passing)

    def peak(self, budget: float) -> tuple[int, int]:
        """Bytes of the device at the worst moment, and of host memory for what has no room on it.

        Args:
            budget: bytes that the device has. Half of what the resident terms leave of it is for terms that may leave.
        """
        resident = self.resident
        step = sum(self.memory.get(name, 0) for name in _IN_EVERY_STEP)
        sums = sum(self.memory[name] for name in self.may_leave)
        here = int(min(sums, max(0.0, budget - resident) / 2))
        some = self._at("in some steps")
        moments = (step, step + some - sums + here if some else 0, self._at("between steps"))
        return resident + max(moments), sums - here

    def _at(self, when: When) -> int:
        return sum(self.memory[name] for name, at in self.when.items() if at == when)


def table(predicted: Account, measured: Mapping[str, int], traffic: Mapping[str, int]) -> str:
    """Both side by side, in MiB."""

    def cell(size: int | None) -> str:
        return f"{size / _MIB:12.3f}" if size is not None else f"{'-':>12}"

    names = [name for name in predicted.memory | dict(measured) if predicted.memory.get(name) or measured.get(name)]
    width = max(len(name) for name in ("communication, MiB", *names, *predicted.traffic, *traffic)) + 2
    lines = [f"{'memory, MiB':{width}}{'undivided':>12}{'predicted':>12}{'measured':>12}"]
    for name in names:
        sizes = (predicted.total.get(name), predicted.memory.get(name), measured.get(name))
        lines.append(f"{name:{width}}" + "".join(map(cell, sizes)))
    if predicted.traffic or traffic:
        lines.append(f"{'communication, MiB':{width}}{'':>12}{'at most':>12}{'measured':>12}")
        lines += [f"{name:{width}}{'':>12}{cell(size)}" for name, size in predicted.traffic.items()]
        lines += [f"{name:{width}}{'':>24}{cell(size)}" for name, size in traffic.items()]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """A prediction beside what one step and what went before it have shown."""

    account: Account
    memory: dict[str, int]
    traffic: dict[str, int]

    def table(self) -> str:
        return table(self.account, self.memory, self.traffic)

    def record(self) -> dict[str, Any]:
        """For ``accounting.json``; :func:`compare` reads it."""
        return {
            "predicted": dataclasses.asdict(self.account),
            "measured": {"memory": self.memory, "traffic": self.traffic},
        }


def compare(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Term -> predicted and measured bytes, of every term that has both, from what :meth:`Report.record` gave."""
    predicted, measured = record["predicted"], record["measured"]
    both = (
        (predicted["memory"], measured["memory"]),
        (_sums(predicted["traffic"]), _sums(measured["traffic"])),
    )
    pairs = {name: (first[name], second[name]) for first, second in both for name in first if name in second}
    return {name: pair for name, pair in pairs.items() if any(pair)}


def _sums(traffic: Mapping[str, int]) -> dict[str, int]:
    """What was summed over ranks, and what was gathered, of a prediction or a measurement."""
    sums = {"sent: gradients": 0, "sent: gathers": 0}
    for name, size in traffic.items():
        reduces = name == "gradients" or name.startswith(("reduce", "all_reduce"))
        if reduces or name == "updated parameters" or name.startswith(("gather", "all_gather")):
            sums["sent: gradients" if reduces else "sent: gathers"] += size
    return sums
