"""How much scratch memory a launch takes and how many programs fill a GPU: one place for all kernels."""

from __future__ import annotations

import torch

# Copies of a block of inputs are at most this large, but in Triton of no fewer tokens than LEAST_TOKENS.
SCRATCH_BYTES = 64 * 2**20
LEAST_TOKENS = 4096
# Programs that fill a large GPU (an H100 has 132 multiprocessors): with fewer blocks of the output, the tokens are split.
ENOUGH_PROGRAMS = 264


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are formed in: float32, or float64 for float64."""
    return torch.promote_types(torch.float32, dtype)


def tokens_at_once(bytes_a_token: int) -> int:
    """Tokens whose copies a launch holds at a time."""
    return max(LEAST_TOKENS, SCRATCH_BYTES // max(bytes_a_token, 1))


def token_splits(programs: int, tokens: int, fewest: int) -> int:
    """Shares of the tokens for ``programs`` blocks of output: enough for the GPU, none of fewer than ``fewest`` tokens."""
    return max(1, min(ENOUGH_PROGRAMS // max(programs, 1), tokens // fewest))
