"""What runs on the emulated device: a selection in which every pair of settings meets in some run."""

from __future__ import annotations

import itertools

FACTORS: dict[str, tuple[str, ...]] = {
    "stage": ("0", "1", "2", "3"),
    "method": ("lora", "robust", "subspace", "sparse"),
    "precision": ("float32", "bfloat16", "float16", "int8"),
    "offload": ("none", "optimizer", "parameters"),
    "accumulation": ("1", "2"),
    "checkpointing": ("off", "on"),
    "ranks": ("1", "2"),
}
Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def possible(case: Case) -> bool:
    """Whether settings can be in one run: only stage 3 offloads, and stage 0 has no loss scale."""
    if case["offload"] != "none" and case["stage"] != "3":
        return False
    return not (case["precision"] == "float16" and case["stage"] == "0")


def pairs_of(case: Case) -> set[Pair]:
    return set(itertools.combinations(case.items(), 2))


def all_pairs() -> set[Pair]:
    """Every pair of settings that some run can have."""
    every = itertools.product(*FACTORS.values())
    cases = [dict(zip(FACTORS, values, strict=True)) for values in every]
    return set().union(*(pairs_of(case) for case in cases if possible(case)))


def covering() -> list[Case]:
    """Runs that have all pairs: each next one is the first, in the order of the factors, with the most new pairs."""
    every = (dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values()))
    left = [(case, pairs_of(case)) for case in every if possible(case)]
    missing, chosen = all_pairs(), []
    while missing:
        case, pairs = max(left, key=lambda entry: len(entry[1] & missing))
        chosen.append(case)
        missing -= pairs
    return chosen


def name_of(case: Case) -> str:
    offload = {"none": [], "optimizer": ["offload"], "parameters": ["offload-all"]}[case["offload"]]
    others = [*offload, *(["checkpointing"] if case["checkpointing"] == "on" else [])]
    parts = [f"zero{case['stage']}x{case['ranks']}", case["method"], case["precision"], f"acc{case['accumulation']}"]
    return "-".join([*parts, *others])


COMMON = {
    "data.train": "builtin:sql[:16]",
    "data.eval": "builtin:sql[:4]",
    "training.warmup_steps": "1",
    "training.max_steps": "3",
    "adapter.rank": "4",
    "adapter.density": "0.02",
    "adapter.dropout": "0",
    "adapter.low_rank_lr": "0.02",
    "adapter.sparse_lr": "0.02",
    "mask.warmup_steps": "1",
    "draw.every": "2 steps",
}
PRECISIONS = {
    "float32": {"model.dtype": "float32", "training.deterministic": "true"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "float16": {"model.dtype": "float16", "ds.fp16.initial_scale_power": "4"},
    "nf4": {"model.dtype": "bfloat16", "model.quantization": "nf4"},
    "int8": {"model.dtype": "bfloat16", "model.quantization": "int8"},
}
OFFLOADS = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}


def words(case: Case) -> list[str]:
    """Settings of a case as a user gives them, but for base and folder."""
    ranks, accumulation = int(case["ranks"]), int(case["accumulation"])
    given = COMMON | PRECISIONS[case["precision"]]
    given |= {
        "method": case["method"],
        "ds.train_batch_size": "4",
        "ds.train_micro_batch_size_per_gpu": str(4 // ranks // accumulation),
        "ds.zero_optimization.stage": case["stage"],
        "training.gradient_checkpointing": str(case["checkpointing"] == "on").lower(),
    }
    for what in OFFLOADS[case["offload"]]:
        given[f"ds.zero_optimization.offload_{what}.device"] = "cpu"
        given[f"ds.zero_optimization.offload_{what}.pin_memory"] = "true"
    return [word for name, value in given.items() for word in (f"--{name}", value)]
