"""Parameters that are divided over the ranks, by ZeRO-3 or by us: their true shapes, and reading, writing and making them.

DeepSpeed gives a partitioned parameter ``ds_shape``, ``ds_numel`` and ``ds_tensor``, this rank's share of its flat
numbers, all shares of one size and the last one padded. Outside its module's forward and backward ``parameter.data``
is empty, so nothing but this file may read the shape or the numbers of a parameter that could be one of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosa_ds.distributed.group import device, rank, world_size


@dataclasses.dataclass
class Partition:
    """How one parameter is divided: this rank's ``share`` of its flat numbers, all of one size, the last ones padded."""

    shape: torch.Size
    share: Tensor
    rank: int
    ranks: int
    group: dist.ProcessGroup | None

    @property
    def own(self) -> slice:
        """Which of the flat numbers this rank keeps; empty where the others have them all."""
        numel, size = self.shape.numel(), self.share.numel()
        return slice(min(size * self.rank, numel), min(size * (self.rank + 1), numel))


_OURS = "rosa_partition"


def partition_of(parameter: Any) -> Partition | None:
    """How ZeRO-3, or :func:`divide`, has divided a parameter; ``None`` where it is whole."""
    if hasattr(parameter, "ds_id"):
        rank, ranks = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
        return Partition(parameter.ds_shape, parameter.ds_tensor, rank, ranks, parameter.ds_process_group)
    ours: Partition | None = getattr(parameter, _OURS, None)
    return ours


def is_partitioned(parameter: Tensor) -> bool:
    """Whether the ranks share this parameter's numbers."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, _OURS)


def belongs_to_engine(parameter: Tensor) -> bool:
    """Whether a DeepSpeed engine keeps a float32 master of this parameter, which would undo what is written to it."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def comes_and_goes(parameter: Any) -> bool:
    """Whether ZeRO-3 gathers it when its module runs, and lets it go again."""
    return hasattr(parameter, "ds_id") and not parameter.ds_persist


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of all of it, without gathering it."""
    partition = partition_of(parameter)
    return parameter.shape if partition is None else partition.shape


def full_numel(parameter: Tensor) -> int:
    """How many numbers all of it has, without gathering it."""
    return full_shape(parameter).numel()


def own_share(parameter: Tensor) -> slice:
    """Which of a partitioned parameter's flat numbers this rank keeps."""
    partition = partition_of(parameter)
    assert partition is not None
    return partition.own


def gather(parameter: Tensor, share: Tensor) -> Tensor:
    """All of what the ranks hold in shares like those of ``parameter``, in its shape. Collective.

    Shapes: share as the partition's, any dtype; result ``full_shape(parameter)``, on this rank's device.
    """
    return start_gather(parameter, share)()


def start_gather(parameter: Tensor, share: Tensor) -> Callable[[], Tensor]:
    """:func:`gather` without waiting: what it returns waits and gives the result. Collective."""
    partition = partition_of(parameter)
    assert partition is not None
    share = share.detach().to(device()).contiguous()
    whole = torch.empty(share.numel() * partition.ranks, dtype=share.dtype, device=share.device)
    handle = dist.all_gather_into_tensor(whole, share, group=partition.group, async_op=True)

    def wait() -> Tensor:
        handle.wait()
        return whole[: partition.shape.numel()].view(partition.shape)

    return wait


@torch.no_grad()
def divide(parameter: Any) -> None:
    """Leave each rank its share of a parameter that all have whole: at stages where DeepSpeed does not.

    ``parameter.data`` is empty from now on, but where :class:`rosa_ds.zero.prefetch.GatherAhead` brings it in.
    """
    ranks, rank_here = world_size(), rank()
    share = torch.zeros(-(-parameter.numel() // ranks), dtype=parameter.dtype, device=parameter.device)
    partition = Partition(parameter.shape, share, rank_here, ranks, None)
    mine = parameter.reshape(-1)[partition.own]
    share[: mine.numel()].copy_(mine)
    setattr(parameter, _OURS, partition)
    parameter.data = parameter.new_empty(0)


def read_whole(parameter: Tensor) -> Tensor:
    """All of a parameter, which may be partitioned: then a new tensor on this rank's device. Collective."""
    partition = partition_of(parameter)
    return parameter.detach() if partition is None else gather(parameter, partition.share)


def own_numbers(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter, all of one that is whole. :func:`whole_of` is the way back."""
    partition = partition_of(parameter)
    return parameter.detach() if partition is None else partition.share


def whole_of(parameter: Tensor, own: Tensor) -> Tensor:
    """All of what the ranks kept with :func:`own_numbers`. Collective."""
    return gather(parameter, own) if is_partitioned(parameter) else own


def held_numbers(parameter: Any) -> list[tuple[slice, Tensor]]:
    """Which of a parameter's flat numbers are on this rank, and they: its share, and all of one that is whole or gathered."""
    partition, held = partition_of(parameter), parameter.detach().reshape(-1)
    if partition is None:
        return [(slice(0, held.numel()), held)]
    own = partition.own
    gathered = [(slice(0, held.numel()), held)] if parameter.data.shape == partition.shape else []
    return [(own, partition.share[: own.stop - own.start]), *gathered]


def read_to_owners(parameters: Mapping[str, Tensor], owners: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Named parameters, whole, one after another, on the CPU of the ranks that own them. Collective if one is partitioned.

    Args:
        owners: name -> rank; without it the first rank owns all.
    """
    result: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        whole = read_whole(parameter)
        if rank() == (owners[name] if owners is not None else 0):
            result[name] = whole.cpu()
    return result


@torch.no_grad()
def write_whole(parameter: Any, value: Tensor) -> None:
    """Give a parameter new numbers; of a partitioned one each rank keeps its share. Not collective.

    Every rank gives the same ``value``, in the parameter's full shape; it is cast to the parameter's dtype.
    """
    partition = partition_of(parameter)
    if partition is None:
        parameter.copy_(value)
        return
    assert value.shape == partition.shape, f"{tuple(value.shape)} for a parameter of {tuple(partition.shape)}"
    mine = value.reshape(-1)[partition.own]
    partition.share[: mine.numel()].copy_(mine)
    if parameter.data.shape == partition.shape:  # gathered at the moment, or small enough to stay so
        parameter.data.copy_(value)


Fill = Callable[[str, nn.Parameter, Tensor, slice], None]
"""``fill(name, parameter, target, rows)`` writes a parameter's numbers into ``target``, of which only ``rows`` are kept."""


def _share_of_rows(shape: torch.Size, size: int, rank: int) -> slice:
    """The rows (of the first dimension) that hold the flat numbers from ``size · rank`` on."""
    if not shape:
        return slice(0, 1)
    width = max(1, shape.numel() // max(1, shape[0]))
    start, stop = min(size * rank, shape.numel()), min(size * (rank + 1), shape.numel())
    return slice(start // width, -(-stop // width))


def partition_model(model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype, fill: Fill) -> None:
    """Turn every parameter of a model into one that ZeRO-3 has partitioned, one at a time. Collective.

    Parameters on the meta device are allocated here, others give their own numbers to ``fill`` as ``parameter``. At no
    time is more than one of them whole on a rank, and on a CPU memory is taken only for the rows that ``fill`` writes.
    Floating-point parameters become ``dtype``, which DeepSpeed asks of all that it trains. Shared parameters stay
    shared. Buffers go to this rank's device.

    Args:
        config: what ``deepspeed.initialize`` will be given.
        fill: writes the numbers; called in the same order on all ranks.
    """
    partitioner = _make_partitioner(config)
    # one buffer for all: allocations of ever other sizes would leave the heap far larger than the shares
    scratch = torch.empty(
        max(p.numel() * max(p.itemsize, dtype.itemsize) for p in model.parameters()), dtype=torch.uint8, device=device()
    )
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(prefix, recurse=False, remove_duplicate=False)):
            if id(parameter) not in done:
                done[id(parameter)] = _partition(partitioner, scratch, name, parameter, dtype, fill)
            module._parameters[name.rpartition(".")[2]] = done[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device())


def _make_partitioner(config: Mapping[str, Any]) -> Any:
    """DeepSpeed's own, used without entering it as a context, which would patch torch's and all modules' constructors.

    ``torch.nn.functional.linear`` it does replace for the whole process, by one that keeps no gathered weight for backward.
    """
    import deepspeed

    partitioner = deepspeed.zero.Init(config_dict_or_path=dict(config))
    if config.get("zero_optimization", {}).get("memory_efficient_linear", True):
        partitioner._enable_mem_efficient_linear()
    return partitioner


def _partition(
    partitioner: Any, scratch: Tensor, name: str, old: nn.Parameter, dtype: torch.dtype, fill: Fill
) -> nn.Parameter:
    wanted = dtype if old.is_floating_point() else old.dtype
    whole = scratch[: old.numel() * wanted.itemsize].view(wanted).view(old.shape)
    new: Any = nn.Parameter(whole, requires_grad=old.requires_grad)
    ranks = dist.get_world_size()
    share = -(-old.numel() // ranks)
    with torch.no_grad():
        fill(name, old, new.data, _share_of_rows(old.shape, share, dist.get_rank()))
    partitioner._convert_to_deepspeed_param(new)
    new.partition()
    assert new.ds_tensor.ds_numel == share, "DeepSpeed divides parameters in another way than this file knows"
    for key, value in vars(old).items():
        setattr(new, key, value)
    parameter: nn.Parameter = new
    return parameter


def keep_numbers(name: str, parameter: nn.Parameter, target: Tensor, rows: slice) -> None:
    """A :data:`Fill` for a model that has its numbers already."""
    target.copy_(parameter) if not parameter.ndim else target[rows].copy_(parameter[rows])
