"""What a failure means: lack of memory by the account of what was held, and exit statuses in words."""

from __future__ import annotations

import torch

from rosa_ds.config.schema import RunConfig
from rosa_ds.distributed.watch import STALLED_STATUS
from rosa_ds.memory.account import ACTIVATIONS, BUCKETS, GATHERED, WORKING, Account
from rosa_ds.utils.errors import INTERRUPTED_STATUS

_GIB = 2**30
_STATUSES = {
    (
        -9,
        137,
    ): "killed by SIGKILL, mostly by the kernel for lack of host memory (dmesg says so) or by a scheduler's limit",
    (-15, 143): "ended by SIGTERM: its launcher, because another rank failed, or the scheduler",
    (-11, 139): "a segmentation fault in compiled code: its stack is in the rank's log",
    (-6, 134): "aborted by compiled code, NCCL's watchdog for example: the lines before say why",
    (INTERRUPTED_STATUS,): "it was asked to stop and its state is saved: --resume goes on",
    (STALLED_STATUS,): "it waited too long for another rank, which it names",
    (1,): "an error: its message stands before, or in logs/rank-*.log of the run's folder",
}


def explain_status(status: int) -> str:
    """What the exit status of a rank means, as a launcher (negative: a signal) or a shell (above 128) gives it."""
    for statuses, meaning in _STATUSES.items():
        if status in statuses:
            return meaning
    if status > 128 or status < 0:
        return f"ended by signal {abs(status) if status < 0 else status - 128}"
    return "all is well" if status == 0 else "not one of ours"


def all_statuses() -> str:
    """The statuses that launchers print, in one line."""
    return "; ".join(f"{' or '.join(map(str, statuses))}: {meaning}" for statuses, meaning in _STATUSES.items())


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of a library on it (NCCL, cuBLAS), of pinned memory, or of a CPU's allocator."""
    said = str(error).lower()
    told = any(text in said for text in ("out of memory", "alloc_failed", "can't allocate memory"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and told)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def suggestions(account: Account, settings: RunConfig, stage: int, micro_batch: int) -> list[str]:
    """Three things to do, the one that helps most first, by what the account says is largest."""
    held = account.memory
    ways: list[tuple[int, str]] = []
    activations = held.get(ACTIVATIONS, 0) + held.get(WORKING, 0)
    if not settings.training.gradient_checkpointing:
        ways.append((activations, "--training.gradient_checkpointing true recomputes activations"))
    if micro_batch > 1:
        half = f"--ds.train_micro_batch_size_per_gpu {micro_batch // 2}"
        ways.append((activations // 2, f"{half} and twice the accumulation steps give the same steps"))
    ways.append((activations // 3, f"a lower --data.max_length than {settings.data.max_length} (--data.too_long)"))
    divided = sum(held.get(name, 0) for name in ("base", "A", "B", "values", "positions", "optimizer"))
    if stage < 3:
        ways.append((divided, "--config ds_configs/zero3.json divides the base over the ranks"))
    else:
        ways.append((divided, "more ranks, or --config ds_configs/zero3_offload.json"))
        smaller = "--ds.zero_optimization.stage3_max_reuse_distance 0 and a smaller stage3_prefetch_bucket_size"
        ways.append((held.get(GATHERED, 0), f"{smaller} keep less gathered"))
    for remedy in dict.fromkeys(account.remedies.values()):
        sizes = (held[name] for name, other in account.remedies.items() if other == remedy)
        ways.append((sum(sizes), remedy))
    ways.append((held.get(BUCKETS, 0), "a smaller --ds.zero_optimization.reduce_bucket_size"))
    ways.append((held.get("optimizer", 0), "a lower --adapter.rank or --adapter.density"))
    return [text for _, text in sorted(ways, key=lambda way: -way[0])[:3]]


def explain_memory(account: Account, settings: RunConfig, stage: int, micro_batch: int, error: BaseException) -> str:
    """What a rank held by its account, and what to do."""
    held = sorted(account.memory.items(), key=lambda pair: -pair[1])
    terms = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in held if size > 0.01 * held[0][1])
    numbered = enumerate(suggestions(account, settings, stage, micro_batch), start=1)
    return (
        f"out of memory ({_first_line(error)}). The account of this rank, GiB: {terms}. What helps, most first: "
        + "; ".join(f"({number}) {text}" for number, text in numbered)
        + ". --dry-run and rosa-ds plan tell before the start what fits; --resume goes on from the last checkpoint"
    )


def explain_loading(settings: RunConfig, stage: int, error: BaseException) -> str:
    """What to do where memory ends before the first step, while the model is built and given to the engine."""
    ways = []
    if stage < 3:
        ways.append("--config ds_configs/zero3.json, where each rank reads its share of the base alone")
    if settings.model.quantization == "none" and not settings.parts.everything:
        ways.append("--model.quantization nf4, a quarter of a 16-bit base")
    ways += ["more ranks at stage 3", "--config ds_configs/zero3_offload.json, which keeps the base on the host"]
    numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(ways[:3], start=1))
    return (
        f"out of memory while the model was built at stage {stage} ({_first_line(error)}). What helps, most first: {numbered}. "
        "--dry-run and rosa-ds plan tell before the start what fits"
    )
