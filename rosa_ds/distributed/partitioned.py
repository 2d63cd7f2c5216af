"""Parameters that ZeRO-3 has divided over the ranks: their true shapes, and reading, writing and making them.

DeepSpeed gives a partitioned parameter ``ds_shape``, ``ds_numel`` and ``ds_tensor``, this rank's share of its flat
numbers, all shares of one size and the last one padded. Outside its module's forward and backward ``parameter.data``
is empty, so nothing but this file may read the shape or the numbers of a parameter that could be one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosa_ds.distributed.group import device, is_main


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has divided this parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of all of it, without gathering it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_numel(parameter: Tensor) -> int:
    """How many numbers all of it has, without gathering it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_share(parameter: Any) -> slice:
    """Which of a partitioned parameter's flat numbers this rank keeps; empty where the others have them all."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return slice(start, min(start + size, parameter.ds_numel))


def gather(parameter: Any, share: Tensor) -> Tensor:
    """All of what the ranks hold in shares like those of ``parameter``, in its shape. Collective.

    Shapes: share as ``parameter.ds_tensor``, any dtype; result ``ds_shape``, on this rank's device.
    """
    share = share.detach().to(device()).contiguous()
    whole = torch.empty(share.numel() * parameter.ds_zero_partition_world_size, dtype=share.dtype, device=share.device)
    dist.all_gather_into_tensor(whole, share, group=parameter.ds_process_group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def read_whole(parameter: Any) -> Tensor:
    """All of a parameter, which may be partitioned: then a new tensor on this rank's device. Collective."""
    whole: Tensor = gather(parameter, parameter.ds_tensor) if is_partitioned(parameter) else parameter.detach()
    return whole


def read_on_main(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named parameters, whole, one after another. Collective if one is partitioned.

    Returns: of partitioned ones a copy on the CPU on the first rank and nothing on the others; others as they are.
    """
    result: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        whole = read_whole(parameter)
        if not is_partitioned(parameter):
            result[name] = whole
        elif is_main():
            result[name] = whole.cpu()
    return result


@torch.no_grad()
def write_whole(parameter: Any, value: Tensor) -> None:
    """Give a parameter new numbers; of a partitioned one each rank keeps its share. Not collective.

    Every rank gives the same ``value``, in the parameter's full shape; it is cast to the parameter's dtype.
    """
    if not is_partitioned(parameter):
        parameter.copy_(value)
        return
    assert value.shape == parameter.ds_shape, f"{tuple(value.shape)} for a parameter of {tuple(parameter.ds_shape)}"
    mine = value.reshape(-1)[own_share(parameter)]
    parameter.ds_tensor[: mine.numel()].copy_(mine)
    if parameter.data.shape == parameter.ds_shape:  # gathered at the moment, or small enough to stay so
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
    """DeepSpeed's own, used without entering it as a context, which would patch torch's and all modules' constructors."""
    import deepspeed

    partitioner = deepspeed.zero.Init(config_dict_or_path=dict(config))
    if config.get("zero_optimization", {}).get("memory_efficient_linear", True):
        partitioner._enable_mem_efficient_linear()  # layers that are not adapted keep no gathered weight for backward
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
