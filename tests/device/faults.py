"""Faults to plant, and small programs with one, each of which some check of this folder must find."""

from __future__ import annotations

import torch
import torch.distributed as dist

from device import sanitizer, timelines
from device.names import NAME


def missing_wait() -> None:
    timelines.Stream.wait_stream = lambda self, other: None


def missing_record_stream() -> None:
    torch.Tensor.record_stream = lambda self, stream: None


def _alone() -> None:
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,emu:emuccl", store=dist.HashStore(), rank=0, world_size=1)


def mixed_devices() -> None:
    torch.ones(2, device=NAME) + torch.ones(2)


def host_tensor_in_a_collective() -> None:
    dist.init_process_group("emuccl", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(2))


def int16_in_a_collective() -> None:
    _alone()
    dist.broadcast(torch.ones(2, dtype=torch.int16, device=NAME), src=0)


def strided_in_a_collective() -> None:
    _alone()
    dist.all_reduce(torch.ones(4, 4, device=NAME)[:, ::2])


def _told(watched: sanitizer.Sanitizer) -> None:
    print("findings:", sum(watched.findings.values()), *watched.findings, sep="\n")


def read_before_the_copy_is_done() -> None:
    """A result is copied to page-locked memory, and read without waiting."""
    watched = sanitizer.install()
    result, target = torch.ones(4, device=NAME), torch.empty(4, pin_memory=True)
    target.copy_(result, non_blocking=True)
    target.sum()
    _told(watched)


def read_after_the_copy_is_done() -> None:
    watched = sanitizer.install()
    result, target = torch.ones(4, device=NAME), torch.empty(4, pin_memory=True)
    target.copy_(result, non_blocking=True)
    done = timelines.Event()
    done.record()
    done.synchronize()
    target.tolist()
    _told(watched)


def overwritten_before_the_copy_is_done() -> None:
    """A page-locked buffer is filled again while its copy to the device is under way."""
    watched = sanitizer.install()
    source = torch.ones(4).pin_memory()
    source.to(NAME, non_blocking=True)
    source.zero_()
    _told(watched)


def freed_on_another_stream() -> None:
    """Memory of the default stream is let go of while another stream reads it."""
    watched = sanitizer.install()
    side = timelines.Stream()
    given = torch.ones(4, device=NAME)
    side.wait_stream(timelines.current_stream())
    with timelines.stream(side):
        given.mul(2)
    del given
    torch.ones(4, device=NAME)
    _told(watched)


def read_on_another_stream() -> None:
    watched = sanitizer.install()
    side = timelines.Stream()
    given = torch.ones(4, device=NAME)
    with timelines.stream(side):
        given.mul(2)
    timelines.synchronize()
    _told(watched)
