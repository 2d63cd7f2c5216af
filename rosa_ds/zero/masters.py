"""Where DeepSpeed keeps the float32 numbers and moments of a trained parameter, for each way of dividing them.

Keys: ``None`` is the master itself, others are the optimizer's (``exp_avg``, ``exp_avg_sq``). Reading is collective:
every rank does it in the same order.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from rosa_ds import distributed, zero

Groups = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameter group name -> parameter name -> parameter, in the order given to the optimizer."""


Wanted = tuple[str, str | None]
"""A parameter's name, and a key."""


class Masters(Protocol):
    """Access to float32 masters and moments."""

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

    def link(self) -> None:
        """Called when the optimizer's state was made or replaced."""
        ...


class OwnMasters:
    """Stage 0: in float32 the parameters themselves, in 16 bits ``FP16_UnfusedOptimizer``'s clone of each."""

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

    def link(self) -> None:
        pass


class DividedMasters(abc.ABC):
    """Each rank keeps some numbers of a parameter.

    DeepSpeed's own functions read one parameter with one collective; here as many as are wanted take one, since adapters
    have hundreds of small parameters and a collective's delay is longer than its data take.
    """

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


class FlatMasters(DividedMasters):
    """Stages 1 and 2, and ``BF16_Optimizer``: flat partitions, which DeepSpeed maps to parameters."""

    def _own(self, name: str, key: str | None) -> tuple[int, Tensor]:
        parameter: Any = self.parameters[name]  # what DeepSpeed hangs on it is no part of torch's type
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks have all of it
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach().reshape(-1)

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        parameter = self.parameters[name]
        value = value.to(parameter.device, torch.float32)
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def stepped(self, group: int) -> list[Tensor]:
        return list(self.optimizer.optimizer.param_groups[group]["params"])

    def link(self) -> None:
        """DeepSpeed 0.19 links moments once, after the first group's first step, when the others have none yet."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()


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

    def link(self) -> None:
        pass


def find_masters(optimizer: Any, groups: Groups) -> Masters:
    """The right access for ``engine.optimizer``."""
    parameters = [parameter for group in groups.values() for parameter in group.values()]
    if any(zero.is_partitioned(parameter) for parameter in parameters):
        return PartitionedMasters(optimizer, groups)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return FlatMasters(optimizer, groups)
    return OwnMasters(getattr(optimizer, "optimizer", optimizer), groups)
