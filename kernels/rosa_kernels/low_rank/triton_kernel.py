"""Triton kernels of the low-rank products around a dropped input: one pass over x forward, one backward.

Sixteen random bits decide an entry: (t, m) takes lane m mod 8 of Philox of (seed, t, m div 8), whatever the blocks, so that
both kernels draw the same, and one Philox, some 50 instructions, decides eight entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.limits import token_splits
from rosa_kernels.spec import BYTES, Spec


def down_launch(itemsize: int, rank: int) -> dict[str, int]:
    """Blocks of the forward: few tokens each, so that few tokens still fill the GPU; A's block within shared memory."""
    padded = max(16, triton.next_power_of_2(rank))
    width = max(32, min(128, 16384 // (padded * itemsize)))
    # two warps leave each thread more entries for one addressing of A; a larger rank would take 210 registers
    return {"RANK": padded, "BLOCK_T": 16, "BLOCK_M": width, "num_warps": 2 if padded * itemsize <= 32 else 4}


def backward_launch(itemsize: int, rank: int) -> dict[str, int]:
    """Blocks of the backward: the largest that spill no registers on sm_80 and sm_90 (``rosa_kernels.aot``)."""
    padded = max(16, triton.next_power_of_2(rank))
    width = 64 if itemsize == 2 or padded == 16 else 32
    return {"RANK": padded, "BLOCK_T": 16, "BLOCK_M": width, "num_warps": 4}


def threshold_of(probability: float) -> int:
    """16 random bits below this drop an entry: p rounded to a multiple of 2^-16, as on the CPU."""
    return min(round(probability * 2**16), 2**16 - 1)


# Of one launch, by bytes of a number; more go in parts, each of which draws the dropout again. Twice as many spill registers
# in float32. In 16 bits a backward of 128 takes 302 instructions an entry, two of 64 take 62.
DOWN_RANKS = {2: 512, 4: 256}
BACKWARD_RANKS = {2: 64, 4: 32}

ROUNDS = tl.constexpr(7)
"""Of Philox: the fewest that pass all tests of BigCrush (Salmon et al., SC 2011); a round more is 6 instructions."""


@triton.jit
def _words(seed, offs_t, first_m, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Random bits of [BLOCK_T] × [first_m, first_m + BLOCK_M): four words of (BLOCK_T, BLOCK_M / 8), two lanes each.

    ``offs_t``: [BLOCK_T, 1].
    """
    groups = first_m // 8 + tl.arange(0, BLOCK_M // 8)[None, :]  # [1, BLOCK_M / 8]
    tokens, groups = tl.broadcast(offs_t.to(tl.uint32), groups.to(tl.uint32))
    zeros = tokens * 0
    return tl.philox(seed, tokens, groups, zeros, zeros, ROUNDS)


@triton.jit
def _kept_by_lane(a, b, c, d, threshold, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which entries are not dropped, for operands of 16 bits, of which a thread has a whole group: it knows their lanes.

    So nothing is left of the choices but shifts. Joined words would have the compiler load the product's other operand in
    another order and move it together: 86 of 346 instructions of the forward at rank 64.
    """
    lane = tl.arange(0, 8)[None, None, :]
    first, second = tl.where(lane < 2, a[:, :, None], b[:, :, None]), tl.where(lane < 6, c[:, :, None], d[:, :, None])
    word = tl.where(lane < 4, first, second)
    half = tl.where(lane % 2 == 0, word << 16, word)  # its lane is in the upper 16 bits
    return tl.reshape(half, [BLOCK_T, BLOCK_M]) >= threshold.to(tl.uint32) << 16


@triton.jit
def _kept_joined(a, b, c, d, threshold, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """The same where a thread has a part of a group, as of float32 or of a product's result: by lane it would draw all of it."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [..., 2, 2]: a, b, c, d
    halves = tl.join(pairs << 16, pairs)  # [..., 2, 2, 2]: eight lanes, in their upper 16 bits
    return tl.reshape(halves, [BLOCK_T, BLOCK_M]) >= threshold.to(tl.uint32) << 16


@triton.jit
def _scale(threshold):
    """1/(1 - p), which kept entries are multiplied with: once, after the sums."""
    return 65536.0 / (65536 - threshold)


@triton.jit(do_not_specialize=["seed", "threshold", "num_tokens"])
def down_kernel(
    x_ptr,
    A_ptr,
    h_ptr,
    seed,
    threshold,
    num_tokens,
    features,
    rank,
    x_stride_t,
    x_stride_m,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """h[t, r] = Σ_m factor(t, m) · x[t, m] · A[r, m]. One program owns BLOCK_T tokens."""
    offs_t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]  # [BLOCK_T, 1]
    offs_r = tl.arange(0, RANK)  # [RANK], rank rounded up
    acc = tl.zeros([BLOCK_T, RANK], dtype=tl.float32)
    for start in range(0, features, BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M))[None, :]  # [1, BLOCK_M]
        inside = (offs_t < num_tokens) & (offs_m < features)
        x = tl.load(x_ptr + offs_t * x_stride_t + offs_m.to(tl.int64) * x_stride_m, mask=inside, other=0.0)
        a, b, c, d = _words(seed, offs_t, start, BLOCK_T, BLOCK_M)
        if x.dtype.primitive_bitwidth == 16:
            kept = _kept_by_lane(a, b, c, d, threshold, BLOCK_T, BLOCK_M)
        else:
            kept = _kept_joined(a, b, c, d, threshold, BLOCK_T, BLOCK_M)
        dropped = tl.where(kept, x, 0.0)
        A_mask = (offs_r < rank)[:, None] & (offs_m < features)
        A = tl.load(A_ptr + offs_r[:, None] * features + offs_m, mask=A_mask, other=0.0)
        acc = tl.dot(dropped, tl.trans(A), acc, input_precision="ieee")
    acc *= _scale(threshold)
    target = h_ptr + offs_t * rank + offs_r[None, :]
    tl.store(target, acc.to(h_ptr.dtype.element_ty), mask=(offs_t < num_tokens) & (offs_r < rank)[None, :])


@triton.jit(do_not_specialize=["seed", "threshold", "num_tokens"])
def low_rank_backward_kernel(
    grad_x_ptr,
    grad_h_ptr,
    x_ptr,
    A_ptr,
    grad_A_ptr,
    seed,
    threshold,
    num_tokens,
    tokens_per_split,
    features,
    rank,
    grad_x_stride_t,
    grad_x_stride_m,
    x_stride_t,
    x_stride_m,
    NEEDS_X: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program owns BLOCK_M features and a share of the tokens.

    grad_x[t, m] += factor(t, m) · Σ_r grad_h[t, r] · A[r, m];  grad_A[split, r, m] = Σ_t grad_h[t, r] · factor · x[t, m]
    """
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]  # [1, BLOCK_M]
    split = tl.program_id(1).to(tl.int64)
    offs_r = tl.arange(0, RANK)  # [RANK], rank rounded up
    A_mask = (offs_r < rank)[:, None] & (offs_m < features)
    A = tl.load(A_ptr + offs_r[:, None] * features + offs_m, mask=A_mask, other=0.0)
    acc = tl.zeros([RANK, BLOCK_M], dtype=tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_T):
        offs_t = (start + tl.arange(0, BLOCK_T))[:, None]  # [BLOCK_T, 1], int64
        inside = (offs_t < last) & (offs_m < features)
        h_mask = (offs_t < last) & (offs_r < rank)[None, :]
        grad_h = tl.load(grad_h_ptr + offs_t * rank + offs_r[None, :], mask=h_mask, other=0.0)
        x = tl.load(x_ptr + offs_t * x_stride_t + offs_m.to(tl.int64) * x_stride_m, mask=inside, other=0.0)
        a, b, c, d = _words(seed, offs_t, tl.program_id(0) * BLOCK_M, BLOCK_T, BLOCK_M)
        kept = _kept_joined(a, b, c, d, threshold, BLOCK_T, BLOCK_M)
        acc = tl.dot(tl.trans(grad_h), tl.where(kept, x, 0.0), acc, input_precision="ieee")
        if NEEDS_X:
            target = grad_x_ptr + offs_t * grad_x_stride_t + offs_m.to(tl.int64) * grad_x_stride_m
            grad_x = tl.load(target, mask=inside, other=0.0)
            more = tl.dot(grad_h, A, input_precision="ieee") * tl.where(kept, _scale(threshold), 0.0)
            tl.store(target, (grad_x.to(tl.float32) + more).to(grad_x.dtype), mask=inside)
    acc *= _scale(threshold)
    tl.store(grad_A_ptr + (split * rank + offs_r[:, None]) * features + offs_m, acc, mask=A_mask)


def launch_down(x_TM: Tensor, A_RM: Tensor, probability: float, seed: int) -> Tensor:
    """h (T, R) of x's dtype. Inputs are checked, A is contiguous and of x's dtype."""
    (tokens, features), rank = x_TM.shape, A_RM.shape[0]
    most = DOWN_RANKS[x_TM.element_size()]
    if rank > most:
        return torch.cat([launch_down(x_TM, part, probability, seed) for part in A_RM.split(most)], dim=1)
    h_TR = torch.empty(tokens, rank, dtype=x_TM.dtype, device=x_TM.device)
    launch = down_launch(x_TM.element_size(), rank)
    down_kernel[(triton.cdiv(tokens, launch["BLOCK_T"]),)](
        x_TM,
        A_RM,
        h_TR,
        seed,
        threshold_of(probability),
        tokens,
        features,
        rank,
        *x_TM.stride(),
        **launch,
    )
    return h_TR


def launch_backward(
    grad_x_TM: Tensor | None, grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: int
) -> Tensor:
    """grad_A (R, M) in float32; adds to ``grad_x_TM`` in place. Inputs are checked, grad_h and A are contiguous."""
    (tokens, features), rank = x_TM.shape, A_RM.shape[0]
    most = BACKWARD_RANKS[x_TM.element_size()]
    if rank > most:
        parts = zip(grad_h_TR.split(most, dim=1), A_RM.split(most), strict=True)
        return torch.cat([launch_backward(grad_x_TM, h.contiguous(), x_TM, A, probability, seed) for h, A in parts])
    launch = backward_launch(x_TM.element_size(), rank)
    block_t = launch["BLOCK_T"]
    blocks = triton.cdiv(features, launch["BLOCK_M"])
    splits = token_splits(blocks, tokens, 8 * block_t)
    share = triton.cdiv(triton.cdiv(tokens, splits), block_t) * block_t
    grad_A = torch.empty(splits, rank, features, dtype=torch.float32, device=x_TM.device)
    target = x_TM if grad_x_TM is None else grad_x_TM
    low_rank_backward_kernel[(blocks, splits)](
        target,
        grad_h_TR,
        x_TM,
        A_RM,
        grad_A,
        seed,
        threshold_of(probability),
        tokens,
        share,
        features,
        rank,
        *target.stride(),
        *x_TM.stride(),
        NEEDS_X=grad_x_TM is not None,
        **launch,
    )
    return grad_A[0] if splits == 1 else grad_A.sum(0)


def compiled_as(dtype: str) -> list[Spec]:
    """For :mod:`rosa_kernels.aot`, as they are launched here."""
    data, size = f"*{dtype}", BYTES[dtype]
    down = {"x_ptr": data, "A_ptr": data, "h_ptr": data, "seed": "i64", "threshold": "i32", "num_tokens": "i32"}
    down |= {"features": "i32!", "rank": "i32", "x_stride_t": "i32!", "x_stride_m": "1"}
    backward = {"grad_x_ptr": data, "grad_h_ptr": data, "x_ptr": data, "A_ptr": data, "grad_A_ptr": "*fp32"}
    backward |= {"seed": "i64", "threshold": "i32", "num_tokens": "i32", "tokens_per_split": "i32!"}
    backward |= {"features": "i32!", "rank": "i32", "grad_x_stride_t": "i32!", "grad_x_stride_m": "1"}
    backward |= {"x_stride_t": "i32!", "x_stride_m": "1"}
    largest = [] if dtype == "fp16" else [DOWN_RANKS[size]]  # slow to compile, and as in bf16
    downs = [down_launch(size, rank) for rank in (8, 64, *largest)]
    backwards = [{"NEEDS_X": True, **backward_launch(size, rank)} for rank in (8, BACKWARD_RANKS[size])]
    return [
        *(Spec(down_kernel, down, launch) for launch in downs),
        *(Spec(low_rank_backward_kernel, backward, launch) for launch in backwards),
    ]
