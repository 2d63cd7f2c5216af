"""What a run sets of torch before it first uses a GPU: its allocator, and arithmetic that is the same bit for bit."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second is what torch before 2.9 reads, and later ones where the first is not set."""
_EXPANDABLE = "expandable_segments:True"
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""Sizes of cuBLAS' work space with which its sums have one order."""
_FLASH = "FLASH_ATTENTION_DETERMINISTIC"
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
"""Whose backward has a form without atomic additions, which the settings here choose."""
_NO_FORM = " does not have a deterministic implementation"


def choose_allocator() -> None:
    """Have torch's allocator grow the segments that it has, since no two micro-batches have rows of one length: pieces of other
    lengths are of no use to it, and stay taken. Not where a user has chosen anything, or it cannot be done.
    """
    chosen = next((name for name in ALLOCATOR if name in os.environ), None)
    if chosen is not None:
        logger.info("GPU memory: %s=%s, as given", chosen, os.environ[chosen])
    elif has_expandable_segments() and not torch.cuda.is_initialized():
        name = ALLOCATOR[0 if Version(torch.__version__) >= Version("2.9") else 1]
        os.environ[name] = _EXPANDABLE
        logger.info("GPU memory: %s=%s, since row lengths vary", name, _EXPANDABLE)


def has_expandable_segments() -> bool:
    """Whether torch is built for NVIDIA's GPUs on Linux; for others its allocator warns and goes on without."""
    return sys.platform == "linux" and torch.version.cuda is not None


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """In the block, where wanted, torch takes the form of each operator that gives the same bits again, and refuses those that have
    none. To be entered before CUDA starts; all is as before behind it.

    torch's flash and memory-efficient attention then have a backward without atomic additions; cuDNN's, which promises none, is
    not used.

    Raises: ValueError for a cuBLAS work space with which its sums have no one order.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(_WORKSPACE)
    if given is not None and given not in _WORKSPACES:
        raise ValueError(
            f"training.deterministic: {_WORKSPACE} is {given!r}, with which cuBLAS does not promise the same bits: unset it, or give "
            f"{' or '.join(_WORKSPACES)}"
        )
    variables = {name: os.environ.get(name) for name in (_WORKSPACE, _FLASH)}
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, cuda.cudnn_sdp_enabled(), memory.fill_uninitialized_memory
    os.environ.update({_WORKSPACE: given or _WORKSPACES[0], _FLASH: "1"})
    cudnn.deterministic, cudnn.benchmark = True, False
    cuda.enable_cudnn_sdp(False)
    memory.fill_uninitialized_memory = False  # all that is read was written
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, sdp, memory.fill_uninitialized_memory = flags
        cuda.enable_cudnn_sdp(sdp)
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_deterministic(attention: str | None) -> None:
    """Raise ValueError for an attention of transformers whose backward is not known to give the same bits again."""
    if attention is not None and attention not in _ATTENTIONS:
        raise ValueError(
            f"training.deterministic: attention {attention!r} is not known to give the same bits again: set "
            f"model.attn_implementation to {', '.join(_ATTENTIONS[:-1])} or {_ATTENTIONS[-1]}"
        )


def has_no_deterministic_form(error: BaseException) -> str | None:
    """The operator that torch has refused, if that is what an error says."""
    said = str(error)
    return said.partition(_NO_FORM)[0] if isinstance(error, RuntimeError) and _NO_FORM in said else None
