"""Float32 numbers and optimizer state of the trained parameters, whatever DeepSpeed has made of them.

DeepSpeed keeps a trained parameter twice: the copy that the model computes with, and a float32 master inside the
optimizer, flattened and partitioned over ranks. Writing only one of them is undone at the next step, or not seen
until then. This file reads and writes both; where the masters are, :mod:`rosa_ds.zero.masters` knows.

All methods are collective: every rank calls them in the same order. What they read of a parameter is given to one rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad
from torch import Tensor

from rosa_ds import distributed, zero
from rosa_ds.utils.errors import RunError
from rosa_ds.zero.eight_bit import MOMENTS, collapse, expand, is_bitsandbytes
from rosa_ds.zero.gradients import averaged_gradients
from rosa_ds.zero.masters import Groups, Wanted, find_masters

BATCH_BYTES = 64 * 2**20
"""Of what is read at once for a checkpoint."""
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class TrainedState:
    """Access to the trained parameters of a DeepSpeed engine by name.

    Args:
        optimizer: ``engine.optimizer``.
        groups: parameter group name -> parameter name -> parameter, in the order given to the optimizer.
    """

    def __init__(self, optimizer: Any, groups: Groups) -> None:
        self.optimizer = optimizer
        self.groups = groups
        self.inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        assert len(self.inner.param_groups) == len(groups), "DeepSpeed changed the parameter groups"
        self.masters = find_masters(optimizer, groups)
        self._expands = is_bitsandbytes(self.inner)

    @contextlib.contextmanager
    def float32_moments(self) -> Iterator[None]:
        """In the block an optimizer's 8-bit moments are float32; others always are. Everything here that needs it enters it; who
        does many of these things does better to enter it once.
        """
        if not self._expands:
            yield
            return
        tensors = [(index, tensor) for index in range(len(self.groups)) for tensor in self.masters.stepped(index)]
        originals = expand(self.inner, tensors)
        self._expands = False
        try:
            yield
        finally:
            self._expands = True
            collapse(self.inner, tensors, originals)

    @torch.no_grad()
    def read(self, owners: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Float32 masters by name, whole, on the CPU of their owners: parameter name -> rank, by default the first one.

        Raises: as :meth:`check`, which costs nothing more here.
        """
        return {name: master for (name, _), master in self._for_owners(self._read_checked("before saving"), owners)}

    @torch.no_grad()
    def check(self, when: str) -> None:
        """Compare every trained parameter with its master, rounded to the parameter's type, on every rank. Collective.

        It costs what reading the masters for a checkpoint does.

        Args:
            when: of the run, for the message: "after a resume".

        Raises: RunError on every rank if one of them computes with other numbers than would be saved.
        """
        for _ in self._read_checked(when):
            pass

    def _read_checked(self, when: str) -> Iterator[tuple[Wanted, Tensor]]:
        apart: dict[str, float] = {}
        for (name, key), master in self._read_in_batches([(name, None) for name in self.parameters]):
            if (difference := self._apart(name, master)) is not None:
                apart[name] = difference
            yield (name, key), master
        if not distributed.any_rank(bool(apart)):
            return
        found = enumerate(distributed.gather_objects(max(apart.items(), key=lambda item: item[1], default=None)))
        rank, (name, difference) = max(((r, worst) for r, worst in found if worst), key=lambda item: item[1][1])
        count = max(distributed.gather_objects(len(apart)))
        raise RunError(
            f"{when}: {name} on rank {rank} differs from its float32 master, which is what is saved, by up to {difference:.3g} "
            f"({count} of {len(self.parameters)} trained parameters differ). Nothing is saved now: leave everything but the stage "
            "out of zero_optimization in the DeepSpeed file, go on with --resume where a checkpoint was written, and report the "
            "run's ds_config.json"
        )

    def _apart(self, name: str, master: Tensor) -> float | None:
        """The largest difference of what this rank holds of a parameter to its rounded master; ``None`` where there is none."""
        parameter = self.parameters[name]
        expected = master.detach().reshape(-1).to(parameter.dtype)
        if not self.masters.divided:  # each rank has its own, and one of them is saved
            expected = distributed.broadcast(expected.to(distributed.device(), copy=True), 0)
        largest = None
        for numbers, held in zero.held_numbers(parameter):
            wanted = expected[numbers].to(held.device)
            if not torch.equal(held, wanted):
                # two NaN agree: a state that is not finite is refused elsewhere, by its name
                differences = (held.float() - wanted.float()).abs()[
                    ~((held == wanted) | (held.isnan() & wanted.isnan()))
                ]
                if differences.numel():
                    largest = max(largest or 0.0, float(differences.nan_to_num(nan=math.inf, posinf=math.inf).max()))
        return largest

    @torch.no_grad()
    def read_for(self, names: Collection[str], wanted: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Copies of what is wanted of the parameters ``names``, whole, on this rank's device; every rank wants the same.

        Args:
            wanted: float32 masters, and with a key of :meth:`moment_keys` moments.
        """
        with self.float32_moments() if any(key for _, key in wanted) else contextlib.nullcontext():
            found = self._read_in_batches(wanted)
            return {
                (name, key): tensor.detach().to(distributed.device(), copy=True)
                for (name, key), tensor in found
                if name in names
            }

    def _read_in_batches(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Wanted, Tensor]]:
        """What there is of what is wanted, in this order, not much more than ``BATCH_BYTES`` at once."""
        batch: list[Wanted] = []
        room = BATCH_BYTES
        for index, (name, key) in enumerate(wanted):
            batch.append((name, key))
            room -= 4 * zero.full_numel(self.parameters[name])
            if room <= 0 or index == len(wanted) - 1:
                found = zip(batch, self.masters.read(batch), strict=True)
                yield from ((entry, tensor) for entry, tensor in found if tensor is not None)
                batch, room = [], BATCH_BYTES

    @staticmethod
    def _for_owners(
        found: Iterable[tuple[Wanted, Tensor]], owners: Mapping[str, int] | None
    ) -> Iterator[tuple[Wanted, Tensor]]:
        """Copies on the CPU of what this rank owns; all of it is read."""
        for (name, key), tensor in found:
            if distributed.rank() == (owners[name] if owners else 0):
                yield (name, key), tensor.detach().float().to("cpu", copy=True)

    def stored_order(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Group -> name -> shape in the order in which DeepSpeed has flattened them (``round_robin_gradients`` changes it)."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        stored = getattr(self.optimizer, "round_robin_bit16_groups", None)
        members = [list(group.values()) for group in self.groups.values()] if stored is None else stored
        return {
            group: {names[id(p)]: tuple(zero.full_shape(p)) for p in parameters}
            for group, parameters in zip(self.groups, members, strict=True)
        }

    def moment_keys(self, group: str) -> list[str]:
        """The moments that the optimizer keeps of a parameter group; none before it has stepped."""
        state = next(iter(self._states(list(self.groups).index(group))), {})
        if state and self._expands:
            return sorted(MOMENTS)
        return sorted(key for key, value in state.items() if not _is_scalar(value))

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set both copies of the named parameters. Shapes as the parameters; float32; the same on every rank."""
        for name, value in values.items():
            zero.write_whole(self.parameters[name], value)
            self.masters.write(name, None, value)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Replace all gradients by zeros, after the last backward of a step and before it is applied."""
        averaged = averaged_gradients(self.optimizer)
        for gradient in averaged:
            gradient.zero_()
        for parameter in () if averaged else self.parameters.values():
            if hasattr(parameter, "ds_id"):
                safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))
            elif (grad := safe_get_full_grad(parameter)) is not None:
                safe_set_full_grad(parameter, torch.zeros_like(grad))

    def _states(self, group: int) -> list[dict[str, Any]]:
        """The inner optimizer's state of a parameter group on this rank, without the tensors that have none yet."""
        states = [self.inner.state.get(tensor, {}) for tensor in self.masters.stepped(group)]
        return [state for state in states if state]

    def tensors(self) -> list[Tensor]:
        """Masters that are not the parameters themselves, and moments, of this rank."""
        own = {id(parameter) for parameter in self.parameters.values()}
        tensors = [t for index in range(len(self.groups)) for t in self.masters.stepped(index) if id(t) not in own]
        for index in range(len(self.groups)):
            tensors += [value for state in self._states(index) for value in state.values() if torch.is_tensor(value)]
        return tensors

    def bytes(self) -> int:
        """Of :meth:`tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @torch.no_grad()
    def read_optimizer(
        self, owners: Mapping[str, int] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Moments as ``"parameter name/key"`` -> float32 tensor on the CPU of the parameter's owner, and scalars as group
        -> key -> number on every rank.
        """
        with self.float32_moments():
            tensors: dict[str, Tensor] = {}
            scalars: dict[str, dict[str, float]] = {}
            for index, (group, members) in enumerate(self.groups.items()):
                state = next(iter(self._states(index)), {})
                scalars[group] = {key: float(value) for key, value in state.items() if _is_scalar(value)}
                keys = sorted(key for key, value in state.items() if not _is_scalar(value))
                found = self._read_in_batches([(name, key) for name in members for key in keys])
                tensors |= {f"{name}/{key}": moment for (name, key), moment in self._for_owners(found, owners)}
            return tensors, scalars

    @torch.no_grad()
    def write_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, float]]) -> None:
        """Restore what :meth:`read_optimizer` gave, into an optimizer that has not stepped yet."""
        with self.float32_moments():
            for index, (group, members) in enumerate(self.groups.items()):
                # sorted: each rank has another order of a set's strings, and reading is collective in the order of the state
                keys = sorted({key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] in members})
                for master in self.masters.stepped(index):
                    state: dict[str, Any] = {key: torch.tensor(value) for key, value in scalars[group].items()}
                    self.inner.state[master] = state | {key: torch.zeros_like(master) for key in keys}
            for full_name, tensor in tensors.items():
                name, _, key = full_name.rpartition("/")
                self.masters.write(name, key, tensor)

    @torch.no_grad()
    def zeros(self, group: str) -> tuple[int, int]:
        """How many of a group's moments are 0, and how many there are. Collective.

        Read where DeepSpeed's optimizer will use them, not where :meth:`reset_optimizer` writes.
        """
        with self.float32_moments():
            keys = self.moment_keys(group)
            found = [self.masters.own(name, key) for name in self.groups[group] for key in keys]
        moments = [moment for moment in found if moment is not None]
        mine = sum(int((moment == 0).sum()) for moment in moments), sum(moment.numel() for moment in moments)
        zeros, total = zip(*distributed.gather_objects(mine), strict=True)
        return sum(zeros), sum(total)

    @torch.no_grad()
    def reset_optimizer(self, groups: Iterable[str]) -> int:
        """Moments and step counts of these groups back to zero, which for Adam is as before the first step.

        Returns: how many numbers were reset on this rank.
        """
        with self.float32_moments():
            count = 0
            for index, group in enumerate(self.groups):
                for state in self._states(index) if group in groups else ():
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
