"""Float32 numbers and optimizer state of the trained parameters, whatever DeepSpeed has made of them.

DeepSpeed keeps a trained parameter twice: the copy that the model computes with, and a float32 master inside the
optimizer, flattened and partitioned over ranks. Writing only one of them is undone at the next step, or not seen
until then. This file reads and writes both, for:

- stage 0, float32: a plain torch optimizer on the parameters themselves;
- stage 0, 16-bit: ``FP16_UnfusedOptimizer`` with a float32 clone of each parameter;
- stages 1 and 2, and ``BF16_Optimizer``: flat partitions behind DeepSpeed's ``safe_get``/``safe_set`` functions.

All methods are collective: every rank calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class TrainedState:
    """Access to the trained parameters of a DeepSpeed engine by name.

    Args:
        optimizer: ``engine.optimizer``.
        groups: parameter group name -> parameter name -> parameter, in the order given to the optimizer.
    """

    def __init__(self, optimizer: Any, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.groups = groups
        self.inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        self._flat = any(hasattr(parameter, "_hp_mapping") for parameter in self.parameters.values())
        assert len(self.inner.param_groups) == len(groups), "DeepSpeed changed the parameter groups"
        self._masters = {} if self._flat else self._find_masters()

    def _find_masters(self) -> dict[str, Tensor]:
        """Name -> the float32 tensor that the inner optimizer steps, where that is one tensor a parameter."""
        masters: dict[str, Tensor] = {}
        for inner, group in zip(self.inner.param_groups, self.groups.values(), strict=True):
            assert len(inner["params"]) == len(group), "DeepSpeed changed the order of the parameters"
            masters |= dict(zip(group, inner["params"], strict=True))
        return masters

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """Float32 masters by name, whole, on the CPU."""
        result = {}
        for name, parameter in self.parameters.items():
            master = safe_get_full_fp32_param(parameter) if self._flat else self._masters[name]
            assert master is not None, f"{name} has no master"
            result[name] = master.detach().float().to("cpu", copy=True)
        return result

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set both copies of the named parameters. Shapes as the parameters; float32."""
        for name, value in values.items():
            parameter = self.parameters[name]
            value = value.to(parameter.device, torch.float32)
            parameter.copy_(value)
            if self._flat:
                safe_set_full_fp32_param(parameter, value)
            elif self._masters[name] is not parameter:
                self._masters[name].copy_(value)

    def _link_moments(self) -> None:
        """Let DeepSpeed's safe functions find the moments of every group.

        DeepSpeed 0.19 links them once, after the first group's first step, when the other groups have none yet.
        """
        if self._flat:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def read_optimizer(self) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Moments as ``"parameter name/key"`` -> float32 tensor on the CPU, and scalars as group -> key -> number."""
        self._link_moments()
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, dict[str, float]] = {}
        for inner, (group, members) in zip(self.inner.param_groups, self.groups.items(), strict=True):
            states = [self.inner.state.get(master, {}) for master in inner["params"]]
            filled: dict[str, Any] = next((state for state in states if state), {})
            scalars[group] = {key: float(value) for key, value in filled.items() if _is_scalar(value)}
            keys = [key for key, value in filled.items() if not _is_scalar(value)]
            for index, name in enumerate(members):
                for key in keys if self._flat or states[index] else ():
                    parameter = self.parameters[name]
                    moment = safe_get_full_optimizer_state(parameter, key) if self._flat else states[index][key]
                    tensors[f"{name}/{key}"] = moment.detach().to("cpu", copy=True)
        return tensors, scalars

    @torch.no_grad()
    def write_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, float]]) -> None:
        """Restore what :meth:`read_optimizer` gave, into an optimizer that has not stepped yet."""
        for inner, (group, members) in zip(self.inner.param_groups, self.groups.items(), strict=True):
            keys = {key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] in members}
            for master in inner["params"]:
                state: dict[str, Any] = {key: torch.tensor(value) for key, value in scalars[group].items()}
                self.inner.state[master] = state | {key: torch.zeros_like(master) for key in keys}
        self._link_moments()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            if self._flat:
                parameter = self.parameters[name]
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)
            else:
                self.inner.state[self._masters[name]][key].copy_(tensor)

    @torch.no_grad()
    def reset_optimizer(self, groups: Iterable[str]) -> int:
        """Moments and step counts of these groups back to zero, which for Adam is as before the first step.

        Returns: how many numbers were reset on this rank.
        """
        count = 0
        for inner, group in zip(self.inner.param_groups, self.groups, strict=True):
            if group not in groups:
                continue
            for master in inner["params"]:
                state = self.inner.state.get(master, {})
                for key, value in state.items():
                    if torch.is_tensor(value):
                        value.zero_()
                        count += value.numel()
                    else:
                        state[key] = type(value)(0)
        return count

    def read_scaler(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty where there is none."""
        scaler = self._scaler()
        return {field: getattr(scaler, field) for field in _SCALER_FIELDS if hasattr(scaler, field)}

    def write_scaler(self, state: Mapping[str, float]) -> None:
        scaler = self._scaler()
        for field, value in state.items():
            setattr(scaler, field, value)

    def _scaler(self) -> Any:
        for holder in ("loss_scaler", "loss_scale_config"):
            if hasattr(self.optimizer, holder):
                return getattr(self.optimizer, holder)
        return self.optimizer

    def loss_scale(self) -> float:
        """What the loss is multiplied with before backward."""
        return float(getattr(self.optimizer, "loss_scale", None) or 1.0)

    def overflowed(self) -> bool:
        """Whether the last step was skipped because a gradient was not finite."""
        return bool(getattr(self.optimizer, "overflow", False))


def _is_scalar(value: Any) -> bool:
    return not torch.is_tensor(value) or value.ndim == 0
