"""Where DeepSpeed keeps the float32 numbers and moments of a trained parameter, for each way of dividing them.

Keys: ``None`` is the master itself, others are the optimizer's (``exp_avg``, ``exp_avg_sq``). Reading is collective:
every rank does it in the same order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosa_ds import distributed, zero

Groups = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameter group name -> parameter name -> parameter, in the order given to the optimizer."""


Wanted = tuple[str, str | None]
"""A parameter's name, and a key."""


class Masters(Protocol):
    """Access to float32 masters and moments."""

    divided: bool
    """Whether a number has one master, on one rank; else each rank has all, which are equal."""

    def read(self, wanted: Sequence[Wanted]) -> list[Tensor | None]:
        """Each whole, in the parameter's shape; ``None`` for a moment of a parameter that never had a gradient. Collective."""
        ...

    def own(self, name: str, key: str | None) -> Tensor | None:
        """What this rank keeps of one, flat: a view of what the optimizer steps with. Not collective."""
        ...

    def write(self, name: str, key: str | None, value: Tensor) -> None: ...

    def stepped(self, group: int) -> list[Tensor]:
        """The tensors of a parameter group that the inner optimizer steps; its state is kept by them."""
        ...


class OwnMasters:
    """Stage 0: in float32 the parameters themselves, in 16 bits ``FP16_UnfusedOptimizer``'s clone of each."""

    divided = False

    def __init__(self, inner: torch.optim.Optimizer, groups: Groups) -> None:
        self.inner = inner
        self.by_name: dict[str, Tensor] = {}
        for stepped, group in zip(inner.param_groups, groups.values(), strict=True):
            assert len(stepped["params"]) == len(group), "DeepSpeed changed the order of the parameters"
            self.by_name |= dict(zip(group, stepped["params"], strict=True))

    def read(self, wanted: Sequence[Wanted]) -> list[Tensor | None]:
        return [self._whole(name, key) for name, key in wanted]

    def own(self, name: str, key: str | None) -> Tensor | None:
        whole = self._whole(name, key)
        return None if whole is None else whole.reshape(-1)

    def _whole(self, name: str, key: str | None) -> Tensor | None:
        master = self.by_name[name]
        return master if key is None else self.inner.state[master].get(key)

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        target = self._whole(name, key)
        assert target is not None, f"{name} has no {key}"
        target.copy_(value)

    def stepped(self, group: int) -> list[Tensor]:
        return list(self.inner.param_groups[group]["params"])


class DividedMasters(abc.ABC):
    """Each rank keeps some numbers of a parameter.

    DeepSpeed's own functions read one parameter with one collective; here as many as are wanted take one, since adapters
    have hundreds of small parameters and a collective's delay is longer than its data take.
    """

    divided = True

    def __init__(self, optimizer: Any, groups: Groups) -> None:
        self.optimizer = optimizer
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}

    @abc.abstractmethod
    def _own(self, name: str, key: str | None) -> tuple[int, Tensor]:
        """Where this rank's numbers begin in the flat parameter, and a view of them."""

    def own(self, name: str, key: str | None) -> Tensor:
        return self._own(name, key)[1]

    def read(self, wanted: Sequence[Wanted]) -> list[Tensor | None]:
        shapes = [zero.full_shape(self.parameters[name]) for name, _ in wanted]
        numbers = torch.zeros(sum(shape.numel() for shape in shapes), device=distributed.device())
        parts = numbers.split([shape.numel() for shape in shapes])
        for part, (name, key) in zip(parts, wanted, strict=True):
            start, own = self._own(name, key)
            assert own.dtype == torch.float32, f"{name}: {key or 'master'} is {own.dtype}"
            part[start : start + own.numel()].copy_(own)
        distributed.sum_over_ranks(numbers.view(torch.int32))  # all but one are 0: sums of bits, which keep -0.0
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this rank's numbers of a parameter are: ``numel`` from ``start`` of the flat parameter, from ``at`` of its group's master."""

    group: int
    start: int
    at: int
    numel: int


class FlatMasters(DividedMasters):
    """Stages 1 and 2, and ``BF16_Optimizer``: the parameters of a group are views of one flat vector, of which each rank keeps
    the master of a part.

    Where a parameter lies is read from its memory, since that is what DeepSpeed copies masters to. Its order need not be
    the group's: ``round_robin_gradients`` changes it, and ``_hp_mapping`` of DeepSpeed 0.19.8 does not know; and
    ``parameter_alignment`` leaves gaps.
    """

    def __init__(self, optimizer: Any, groups: Groups) -> None:
        super().__init__(optimizer, groups)
        self.places: dict[str, Place] = {}
        zero_optimizer = hasattr(optimizer, "bit16_groups_flat")
        parts = optimizer.parallel_partitioned_bit16_groups if zero_optimizer else optimizer.bf16_partitioned_groups
        self.flat: list[Tensor] = (
            optimizer.single_partition_of_fp32_groups if zero_optimizer else optimizer.fp32_groups_flat_partition
        )
        for number, (group, divided) in enumerate(zip(groups.values(), parts, strict=True)):
            own = divided[dist.get_rank(optimizer.real_dp_process_group[number])]
            whole = sum(part.numel() for part in divided)
            assert own.numel() == self.flat[number].numel(), "a master of another size than what it is copied to"
            for name, parameter in group.items():
                begin = (parameter.data_ptr() - divided[0].data_ptr()) // own.itemsize
                assert 0 <= begin <= whole - parameter.numel(), f"{name} lies outside of DeepSpeed's flat vector"
                at = begin - (own.data_ptr() - divided[0].data_ptr()) // own.itemsize
                start, stop = max(0, -at), min(parameter.numel(), own.numel() - at)
                self.places[name] = (
                    Place(number, start, at + start, stop - start) if start < stop else Place(number, 0, 0, 0)
                )

    def _own(self, name: str, key: str | None) -> tuple[int, Tensor]:
        place = self.places[name]
        flat = self.flat[place.group]
        whole = flat if key is None else self.optimizer.optimizer.state[flat][key]
        return place.start, whole.detach().narrow(0, place.at, place.numel)

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        start, own = self._own(name, key)
        own.copy_(value.reshape(-1)[start : start + own.numel()])

    def stepped(self, group: int) -> list[Tensor]:
        return list(self.optimizer.optimizer.param_groups[group]["params"])


class PartitionedMasters(DividedMasters):
    """Stage 3: flat subgroups of every parameter's shares.

    DeepSpeed's functions that set a whole parameter fail where its size is no multiple of the number of ranks, so shares
    are written here, too.
    """

    def _own(self, name: str, key: str | None) -> tuple[int, Tensor]:
        """Of the share without its padding; DeepSpeed's ``safe_get_local`` functions copy to the accelerator what is offloaded."""
        optimizer, parameter = self.optimizer, self.parameters[name]
        group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[group]
        whole = flat if key is None else optimizer.optimizer.state[flat][key]
        mine = zero.own_share(parameter)
        return mine.start, whole.detach().narrow(0, start, mine.stop - mine.start)

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        self.own(name, key).copy_(value.reshape(-1)[zero.own_share(self.parameters[name])])

    def stepped(self, group: int) -> list[Tensor]:
        flat = self.optimizer.fp32_partitioned_groups_flat
        owners = self.optimizer.sub_group_to_group_id
        return [tensor for index, tensor in enumerate(flat) if owners[index] == group]


def find_masters(optimizer: Any, groups: Groups) -> Masters:
    """The right access for ``engine.optimizer``."""
    parameters = [parameter for group in groups.values() for parameter in group.values()]
    if any(zero.is_partitioned(parameter) for parameter in parameters):
        return PartitionedMasters(optimizer, groups)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return FlatMasters(optimizer, groups)
    return OwnMasters(getattr(optimizer, "optimizer", optimizer), groups)
