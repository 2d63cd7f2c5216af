"""Where DeepSpeed keeps the float32 numbers and moments of a trained parameter, for each way of dividing them.

Keys: ``None`` is the master itself, others are the optimizer's (``exp_avg``, ``exp_avg_sq``). Reading and writing is
collective: every rank does it in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from rosa_ds import distributed

Groups = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameter group name -> parameter name -> parameter, in the order given to the optimizer."""


class Masters(Protocol):
    """Access to float32 masters and moments, whole."""

    def read(self, name: str, key: str | None) -> Tensor | None:
        """``None`` for a moment of a parameter that never had a gradient."""
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

    def read(self, name: str, key: str | None) -> Tensor | None:
        master = self.by_name[name]
        return master if key is None else self.inner.state[master].get(key)

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        target = self.read(name, key)
        assert target is not None, f"{name} has no {key}"
        target.copy_(value)

    def stepped(self, group: int) -> list[Tensor]:
        return list(self.inner.param_groups[group]["params"])

    def link(self) -> None:
        pass


class FlatMasters:
    """Stages 1 and 2, and ``BF16_Optimizer``: flat partitions behind DeepSpeed's safe functions."""

    def __init__(self, optimizer: Any, groups: Groups) -> None:
        self.optimizer = optimizer
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}

    def read(self, name: str, key: str | None) -> Tensor:
        parameter = self.parameters[name]
        found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert found is not None, f"{name} has no {key or 'master'}"
        return found

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


class PartitionedMasters:
    """Stage 3: flat subgroups of every parameter's shares.

    DeepSpeed's functions that set a whole parameter fail where its size is no multiple of the number of ranks, so shares
    are read and written here.
    """

    def __init__(self, optimizer: Any, groups: Groups) -> None:
        self.optimizer = optimizer
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}

    def _share(self, name: str, key: str | None) -> Tensor:
        """A view; DeepSpeed's ``safe_get_local`` functions copy to the accelerator what is offloaded."""
        optimizer, parameter = self.optimizer, self.parameters[name]
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[group]
        whole = flat if key is None else optimizer.optimizer.state[flat][key]
        return whole.detach().narrow(0, start, size)

    def read(self, name: str, key: str | None) -> Tensor:
        return distributed.gather(self.parameters[name], self._share(name, key))

    def write(self, name: str, key: str | None, value: Tensor) -> None:
        mine = value.reshape(-1)[distributed.own_share(self.parameters[name])]
        self._share(name, key)[: mine.numel()].copy_(mine)

    def stepped(self, group: int) -> list[Tensor]:
        flat = self.optimizer.fp32_partitioned_groups_flat
        owners = self.optimizer.sub_group_to_group_id
        return [tensor for index, tensor in enumerate(flat) if owners[index] == group]

    def link(self) -> None:
        pass


def find_masters(optimizer: Any, groups: Groups) -> Masters:
    """The right access for ``engine.optimizer``."""
    parameters = [parameter for group in groups.values() for parameter in group.values()]
    if any(distributed.is_partitioned(parameter) for parameter in parameters):
        return PartitionedMasters(optimizer, groups)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return FlatMasters(optimizer, groups)
    return OwnMasters(getattr(optimizer, "optimizer", optimizer), groups)
