"""A stream sanitizer: every access of every operator, collective and copy has a time on its timeline, and two accesses of the
same bytes, one of them a write, must be ordered by what one timeline knows of the other.

A time is a number that grows with each access of a timeline. A timeline knows of another all accesses up to some time: from
waits for streams and events, from the launch of work by the host, and, of the host, from synchronisations. The host's own
memory takes part once an asynchronous copy has touched it.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from device import emulated, timelines
from device.host_waits import is_asynchronous, place, tensors, wait_of
from device.names import NAME
from device.timelines import HOST

LONGEST_HISTORY = 64
NOT_ACCESSES = ("record_stream", "detach", "is_pinned", "sym_", "_has_", "is_same_size", "set_")
MAKERS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
)


@dataclasses.dataclass(frozen=True)
class Access:
    """Bytes ``low`` to ``high`` of a storage, read or written on a timeline at a time."""

    timeline: int
    time: int
    write: bool
    low: int
    high: int
    what: str


@dataclasses.dataclass
class Memory:
    """A storage: the timeline that it was allocated on, those told to its allocator, and who has used it."""

    owner: int
    recorded: set[int] = dataclasses.field(default_factory=set)
    history: list[Access] = dataclasses.field(default_factory=list)
    kept: Tensor | None = None


class Sanitizer(timelines.Order):
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.known: defaultdict[int, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.memory: dict[int, Memory] = {}
        self.findings: Counter[str] = Counter()
        self.operations: Counter[int] = Counter()

    def snapshot(self, timeline: int) -> dict[int, int]:
        with self.lock:
            return dict(self.known[timeline])

    def join(self, timeline: int, known: dict[int, int]) -> None:
        with self.lock:
            mine = self.known[timeline]
            for other, time in known.items():
                mine[other] = max(mine[other], time)

    def everything(self) -> dict[int, int]:
        with self.lock:
            return {timeline: self.known[timeline][timeline] for timeline in list(self.known)}

    def record_stream(self, tensor: Tensor, timeline: int) -> None:
        with self.lock:
            memory = self.memory.get(tensor.untyped_storage().data_ptr())
            if memory is not None:
                memory.recorded.add(timeline)

    def allocate(self, tensor: Tensor, timeline: int) -> None:
        with self.lock:
            self._forget_freed()
            if tensor.device.type == NAME and tensor.numel():
                self.memory.setdefault(tensor.untyped_storage().data_ptr(), Memory(timeline))

    def _forget_freed(self) -> None:
        """Memory goes back to its owner's stream, which must know of every use on another one."""
        for address in emulated.backend().drain_frees():
            memory = self.memory.pop(address, None)
            if memory is None or memory.owner == HOST:
                continue
            for use in memory.history:
                reaches = max(self.known[memory.owner][use.timeline], self.known[HOST][use.timeline])
                if (
                    use.timeline not in (memory.owner, HOST)
                    and use.timeline not in memory.recorded
                    and reaches < use.time
                ):
                    self.findings[f"freed while in use, without record_stream: {use.what}"] += 1

    def access(self, timeline: int, name: str, reads: list[Tensor], writes: list[Tensor], shared: bool = False) -> None:
        """An operator on a timeline. ``shared``: an asynchronous copy, whose host memory takes part from now on."""
        with self.lock:
            self._forget_freed()
            if timeline != HOST:
                self.join(timeline, self.known[HOST])
            known = self.known[timeline]
            known[timeline] += 1
            self.operations[timeline] += 1
            what = ""
            for write, used in ((False, reads), (True, writes)):
                for tensor in used:
                    memory = self._memory_of(tensor, timeline, shared)
                    if memory is not None:
                        what = what or f"{name} in {place()}"
                        self._note(memory, self._access_of(tensor, timeline, write, what))

    def _memory_of(self, tensor: Tensor, timeline: int, shared: bool) -> Memory | None:
        if tensor.numel() == 0 or tensor.device.type not in (NAME, "cpu"):
            return None
        address = tensor.untyped_storage().data_ptr()
        memory = self.memory.get(address)
        if memory is not None:
            return memory
        if tensor.device.type == "cpu":
            if not shared:
                return None
            # frees of ordinary memory are not told, so that it is held as long as it takes part
            memory = Memory(HOST, kept=None if tensor.is_pinned() else tensor)
        else:
            memory = Memory(timeline)
        self.memory[address] = memory
        return memory

    def _access_of(self, tensor: Tensor, timeline: int, write: bool, what: str) -> Access:
        low = tensor.storage_offset() * tensor.element_size()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        return Access(timeline, self.known[timeline][timeline], write, low, low + reach * tensor.element_size(), what)

    def _note(self, memory: Memory, new: Access) -> None:
        known, kept = self.known[new.timeline], []
        for old in memory.history:
            overlap = old.low < new.high and new.low < old.high
            ordered = old.timeline == new.timeline or known[old.timeline] >= old.time
            if overlap and not ordered and (old.write or new.write):
                kinds = f"{'write' if old.write else 'read'} then {'write' if new.write else 'read'}"
                self.findings[f"not ordered, {kinds}: {old.what}; {new.what}"] += 1
            covered = new.low <= old.low and old.high <= new.high
            if covered and ((ordered and new.write) or (old.timeline == new.timeline and old.write == new.write)):
                continue
            kept.append(old)
        memory.history = [*kept[-LONGEST_HISTORY:], new]

    def record(self) -> dict[str, Any]:
        return {
            "operations": sum(self.operations.values()),
            "timelines": {
                ("host" if timeline == HOST else str(timeline)): n for timeline, n in self.operations.items()
            },
            "findings": dict(self.findings),
        }


class _Operators(TorchDispatchMode):
    """Tells a sanitizer of every operator."""

    supports_higher_order_operators = True

    def __init__(self, sanitizer: Sanitizer) -> None:
        super().__init__()
        self.sanitizer = sanitizer
        self.collective = threading.local()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if views or name.startswith(NOT_ACCESSES) or func.namespace in ("prim", "profiler"):
            return out
        stream: int = getattr(self.collective, "timeline", None) or timelines.current_stream().number
        if name in MAKERS:
            self.sanitizer.allocate(out, stream)
            return out
        reads, writes = self._used(func, name, args, kwargs, out)
        on_device = any(tensor.device.type == NAME for tensor in (*reads, *writes))
        why = wait_of(name, args, kwargs, out)
        copies = on_device and not why and is_asynchronous(name, args, kwargs)
        if why and name in ("_to_copy", "copy_", "_copy_from"):  # the host's own memory is used when the copy is done
            host = [[tensor for tensor in used if tensor.device.type == "cpu"] for used in (reads, writes)]
            self.sanitizer.access(HOST, name, *host)
        self.sanitizer.access(stream if on_device else HOST, name, reads, writes, shared=copies)
        if why:
            self.sanitizer.join(HOST, self.sanitizer.snapshot(stream))
        return out

    def _used(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that an operator reads, and those that it writes."""
        reads, writes = [], []
        named = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            given = tensors(named.get(argument.name))
            if func.namespace == "c10d":
                written = "output" in argument.name or argument.name == "tensors"
            else:
                written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(given)
        if name.endswith("_like") or name.startswith("new_"):
            reads = []
        seen = {id(tensor) for tensor in writes}
        return reads, writes + [tensor for tensor in tensors(out) if id(tensor) not in seen]


class _Pending:
    """The handle of a collective: who waits for it knows of its stream."""

    def __init__(self, sanitizer: Sanitizer, work: Any, known: dict[int, int], used: list[Tensor]) -> None:
        self._sanitizer, self._work, self._known, self._used = sanitizer, work, known, used

    def wait(self, *given: Any) -> Any:
        self._sanitizer.join(timelines.current_stream().number, self._known)
        self._used = []
        return self._work.wait(*given) if self._work is not None else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _on_own_stream(
    collective: Any, sanitizer: Sanitizer, operators: _Operators, streams: dict[int, timelines.Stream]
) -> Any:
    """A collective of NCCL runs on its group's stream, after the current one; the current one waits unless it is asynchronous."""

    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or dist.group.WORLD
        own, current = streams.setdefault(id(group), timelines.Stream()), timelines.current_stream()
        own.wait_stream(current)
        operators.collective.timeline = own.number
        try:
            work = collective(*args, **kwargs)
        finally:
            operators.collective.timeline = None
        if kwargs.get("async_op"):
            return _Pending(sanitizer, work, sanitizer.snapshot(own.number), tensors(args, kwargs))
        sanitizer.join(current.number, sanitizer.snapshot(own.number))
        return work

    return call


def _noted(method: Any, name: str, sanitizer: Sanitizer) -> Any:
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "cpu":
            sanitizer.access(HOST, name, [self], [])
        return method(self, *args, **kwargs)

    return read


def _reads_of_the_host(sanitizer: Sanitizer) -> None:
    """Python's ways to a tensor's numbers that are no operators, and DeepSpeed's optimizer in C++."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    for name in ("tolist", "numpy", "__array__"):
        setattr(Tensor, name, _noted(getattr(Tensor, name), name, sanitizer))
    step = DeepSpeedCPUAdam.step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        sanitizer.access(HOST, "DeepSpeedCPUAdam.step", [p.grad for p in used], [p.data for p in used])
        return step(self, *args, **kwargs)

    DeepSpeedCPUAdam.step = stepped


def install(file: Path | None = None) -> Sanitizer:
    """Watch this process from now on, and write what is found at its end."""
    sanitizer = Sanitizer()
    operators = _Operators(sanitizer)
    streams: dict[int, timelines.Stream] = {}
    for name in COLLECTIVES:
        watched = _on_own_stream(getattr(dist, name), sanitizer, operators, streams)
        setattr(dist, name, watched)
        setattr(dist.distributed_c10d, name, watched)
    _reads_of_the_host(sanitizer)
    emulated.backend().record_frees(True)
    timelines.observe(sanitizer)
    operators.__enter__()
    if file is not None:
        atexit.register(lambda: file.write_text(json.dumps(sanitizer.record())))
    return sanitizer
