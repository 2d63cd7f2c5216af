"""Time training steps: ``python benchmarks/step_time.py MODEL --candidate peft-lora --candidate robust [--dtype bfloat16]``.

Adapters of ours and of PEFT on one model, in turns; ``--profile``: also where the time goes, operator by operator. With
``--config ds_configs/zero3.json`` under ``torchrun`` or ``deepspeed`` every candidate is a DeepSpeed engine.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import importlib
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapter_parts, inject
from rosa_ds.adapters.mask import Mask, compute_mask, load_mask, set_mask
from rosa_ds.adapters.quantize import quantize
from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.config.deepspeed import DeepSpeedPlan, plan_deepspeed
from rosa_ds.config.methods import METHODS, Method
from rosa_ds.config.schema import AdapterConfig, ModelSettings, RunConfig
from rosa_ds.models.load import load_model
from rosa_ds.models.quantized import Kind
from rosa_ds.zero.engine import keep_vectors_everywhere

logger = logging.getLogger("rosa_ds.benchmarks.step_time")
PEERS = ("peft-lora", "peft-supertuning")
OURS: tuple[Method, ...] = ("robust", "sparse", "lora")
QUANTIZED: dict[str, tuple[Method, Kind]] = {
    f"{method}-{kind}": (method, kind) for kind in get_args(Kind) for method in OURS
}
"""The same on a base in 4 or 8 bits."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="step_time.py", description=__doc__)
    parser.add_argument("model", help="model folder, hub name, .gguf file or tiny")
    parser.add_argument(
        "--candidate",
        action="append",
        choices=(*OURS, *PEERS, *QUANTIZED),
        help="repeatable; ratios are to the first; default: all on a dense base",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--mask", type=Path, help="mask.safetensors of a run; default: from a gradient of the batch")
    parser.add_argument("--config", help="DeepSpeed JSON; its batch sizes do not count")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    for name, default in (("rank", 8), ("batch", 4), ("length", 256), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--density", type=float, default=0.006, help="default: 0.006")
    parser.add_argument("--profile", action="store_true", help="also: what each operator takes, beside the first's")
    options = parser.parse_args(arguments)
    if min(options.rank, options.batch, options.length - 1, options.repeats) < 1:
        raise ValueError("--rank, --batch and --repeats are 1 or more, --length 2 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("rank", "density", "batch", "length", "repeats")}
    model, plan = ModelSettings(name_or_path=options.model, dtype=options.dtype), None
    if options.config:
        zero.initialize()
        batch = {"train_batch_size": options.batch * distributed.world_size()}
        config = {**parse_command_line(["--config", options.config]).deepspeed, **batch}
        config |= {"train_micro_batch_size_per_gpu": options.batch, "gradient_accumulation_steps": 1}
        plan, _ = plan_deepspeed(config, RunConfig(model=model), distributed.world_size(), gpu_has_bfloat16=False)
    case = StepCase(model, getattr(torch, options.dtype), **sizes, deepspeed=plan)
    names = options.candidate or [PEERS[0], *OURS, PEERS[1]]
    if options.profile and len(set(names)) < 2:
        raise ValueError("--profile compares: give --candidate twice, or not at all for all of them")
    mask = load_mask(options.mask) if options.mask else None
    bench = StepBench(case, names, mask)
    rows = bench.measure()
    logger.info(
        "%s, %s, %d ranks of %d × %d tokens, %d threads each, medians of %d steps in turns, torch %s",
        *(options.model, options.dtype, distributed.world_size(), case.batch, case.length),
        *(torch.get_num_threads(), case.repeats),
        torch.__version__,
    )
    for row in rows:
        logger.info(
            "%-17s %10s trained  forward %.3f s  backward %.3f s  update %.3f s  step %.3f s  ratio %.3f",
            *(row.name, f"{row.trained:,}", row.forward, row.backward, row.update, row.step, row.ratio),
        )
    if options.profile:
        for name, found in bench.profile().items():
            _show(names[0], name, found)


def _show(first: str, name: str, operators: list[OperatorTime]) -> None:
    """Operators whose times differ by a millisecond, the others as one line, so that the columns add up."""
    apart = [row for row in operators if abs(row.other - row.first) >= 1e-3]
    alike = [row for row in operators if abs(row.other - row.first) < 1e-3]
    rest = OperatorTime(f"{len(alike)} others", sum(row.first for row in alike), sum(row.other for row in alike))
    both = OperatorTime("all", sum(row.first for row in operators), sum(row.other for row in operators))
    logger.info("%-50s %12s %17s %10s", "ms a step in the operator itself", first, name, "difference")
    for row in (*apart, rest, both):
        times = (1e3 * row.first, 1e3 * row.other, 1e3 * (row.other - row.first))
        logger.info("%-50s %12.1f %17.1f %+10.1f", row.operator[:50], *times)


@dataclasses.dataclass(frozen=True)
class StepCase:
    """What is timed. ``batch`` sequences of ``length`` random tokens; no dropout, since peers differ in what they drop.

    ``deepspeed``: a plan under which every candidate becomes an engine; without one it is a plain model with AdamW.
    """

    model: ModelSettings
    dtype: torch.dtype
    rank: int = 8
    density: float = 0.006
    batch: int = 4
    length: int = 256
    repeats: int = 7
    seed: int = 42
    deepspeed: DeepSpeedPlan | None = None


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds are medians; ``ratio`` is of whole steps, to the first candidate's."""

    name: str
    trained: int
    forward: float
    backward: float
    update: float
    step: float
    ratio: float


@dataclasses.dataclass
class _Candidate:
    forward: Callable[..., Any]
    backward: Callable[[Tensor], object]
    update: Callable[[], object]
    trained: int

    def step(self, ids: Tensor) -> tuple[float, float, float]:
        """One optimizer step. Returns: seconds of forward, backward and update."""
        begin = _now()
        loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        forward = _now()
        self.backward(loss)
        backward = _now()
        self.update()
        return forward - begin, backward - forward, _now() - backward


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """Seconds of a step in one operator itself, without those it calls: the first candidate's and another's."""

    operator: str
    first: float
    other: float


def _now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _adapter(case: StepCase, method: Method) -> AdapterConfig:
    return AdapterConfig(method=method, rank=case.rank, density=case.density, dropout=0.0)


def gradient_mask(case: StepCase, ids: Tensor) -> Mask:
    """Positions of the largest gradients of one batch, which have the clusters that trained masks have."""
    model = load_model(case.model, torch.float32).to(distributed.device())
    inject(model, _adapter(case, "sparse"), case.seed)
    return compute_mask(model, [{"input_ids": ids, "labels": ids}])


def _peer(model: nn.Module, case: StepCase, name: str) -> nn.Module:
    peft: Any = importlib.import_module("peft")
    shared = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name == "peft-lora":
        config = peft.LoraConfig(lora_dropout=0.0, **shared)
    else:
        config = peft.SupertuningConfig(sparsity=1.0 - case.density, **shared)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _build(case: StepCase, name: str, mask: Callable[[], Mask]) -> _Candidate:
    model: nn.Module = load_model(case.model, case.dtype).to(distributed.device())
    if name in PEERS:
        model = _peer(model, case, name)
    else:
        if name in QUANTIZED:
            name, kind = QUANTIZED[name]
            quantize(model, kind)
        inject(model, _adapter(case, name), case.seed)
    candidate = _on_deepspeed(case, model) if case.deepspeed else _plain(model)
    if name not in PEERS and METHODS[name].sparse:
        set_mask(model, mask())
    return candidate


def _plain(model: nn.Module) -> _Candidate:
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _Candidate(model, lambda loss: loss.backward(), update, sum(p.numel() for p in trained))


def _on_deepspeed(case: StepCase, model: nn.Module) -> _Candidate:
    import deepspeed

    assert case.deepspeed is not None
    config = copy.deepcopy(case.deepspeed.config)
    if case.deepspeed.stage == 3:
        keep_vectors_everywhere(model, config, adapter_parts(model))
        zero.partition_model(model, config, case.dtype, zero.keep_numbers)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    count = sum(map(zero.full_numel, trained))
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.0), config=config)
    return _Candidate(engine, engine.backward, engine.step, count)


class StepBench:
    """Candidates that are stepped in turns (A, B, A, B, ...) on one batch.

    Args:
        case: model, shapes, repeats.
        names: of :data:`OURS`, :data:`PEERS` and :data:`QUANTIZED`; ratios and differences are to the first.
        mask: of the sparse parts; where not given, one from a gradient of the same batch.

    Raises: ValueError for an unknown name, or a peer that is not installed.
    """

    def __init__(self, case: StepCase, names: Sequence[str], mask: Mask | None = None) -> None:
        if unknown := [name for name in names if name not in (*OURS, *PEERS, *QUANTIZED)]:
            raise ValueError(f"no candidate {unknown[0]!r}: choose from {', '.join((*OURS, *PEERS, *QUANTIZED))}")
        self.repeats = case.repeats
        ids = torch.randint(0, 256, (case.batch, case.length), generator=torch.Generator().manual_seed(case.seed))
        self.ids = ids.to(distributed.device())
        kept: list[Mask] = [mask] if mask is not None else []

        def one_mask() -> Mask:
            if not kept:
                kept.append(gradient_mask(case, self.ids))
            return kept[0]

        try:
            self.candidates = {name: _build(case, name, one_mask) for name in dict.fromkeys(names)}
        except (ImportError, AttributeError) as error:
            raise ValueError(f"a peer cannot be built ({error}): pip install 'peft>=0.21', or leave it out") from error
        for candidate in self.candidates.values():
            candidate.step(self.ids)  # the first allocates what later ones use again

    def measure(self) -> list[StepTime]:
        """Medians of the repeats."""
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self.candidates}
        for _ in range(self.repeats):
            for name, candidate in self.candidates.items():
                times[name].append(candidate.step(self.ids))
        rows: list[StepTime] = []
        for name, candidate in self.candidates.items():
            forward, backward, update = (statistics.median(part) for part in zip(*times[name], strict=True))
            step = statistics.median(map(sum, times[name]))
            ratio = step / rows[0].step if rows else 1.0
            rows.append(StepTime(name, candidate.trained, forward, backward, update, step, ratio))
        return rows

    def profile(self) -> dict[str, list[OperatorTime]]:
        """What each operator takes of a step, with torch's profiler, which slows the step down itself.

        Returns: for each candidate but the first all operators that one of the two calls, the largest difference first; means
        over the repeats. Times are the device's where it is a GPU, else the CPU's.
        """
        gpu = torch.cuda.is_available()
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
        seconds: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in self.candidates}
        for _ in range(self.repeats):
            for name, candidate in self.candidates.items():
                with torch.profiler.profile(activities=activities, acc_events=True) as profile:
                    candidate.step(self.ids)
                for event in profile.key_averages():
                    spent = event.self_device_time_total if gpu else event.self_cpu_time_total
                    seconds[name][event.key] += spent / 1e6 / self.repeats
        (_, first), *others = seconds.items()
        return {
            name: sorted(
                (OperatorTime(operator, first[operator], found[operator]) for operator in {**first, **found}),
                key=lambda row: -abs(row.other - row.first),
            )
            for name, found in others
        }


if __name__ == "__main__":
    run_program(main)
