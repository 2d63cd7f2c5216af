"""A training step of models with the layers of Llama 3's 1B and 8B, ours and PEFT's LoRA, and its peak against the plan's."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import rosa_ds
from rosa_ds import zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.mask import static_positions, top_positions
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import ModelSettings, RunConfig, StartedAdapterSettings
from rosa_ds.models.no_numbers import Shape
from rosa_ds.planning.gpu_check.stage import NEEDS_A_GPU, Check
from rosa_ds.planning.search import GIB, Planner
from rosa_ds.training.engine import build_engine

RANK = 16
DEPTHS = (2, 4)
"""Layers that are built; the time of a model with all of its layers lies on their line."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's shape and the micro-batch that is timed. ``layers``: of the whole model, which is not built."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tied: bool
    rows: int
    length: int

    def config(self, depth: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=depth,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
        )


ON_GPU = (
    Size("1B", 16, 2048, 8192, 32, 128256, True, 4, 1024),
    Size("8B", 32, 4096, 14336, 32, 128256, False, 2, 1024),
)
ON_CPU = (Size("tiny", 8, 64, 160, 4, 256, True, 2, 32),)


def measure(check: Check) -> None:
    candidates: dict[str, Callable[[nn.Module], Callable[..., object]]] = {
        "peft-lora": _peft_lora,
        "lora": lambda model: _plain(_adapted(model, "lora")),
        "robust, clustered mask": lambda model: _plain(_adapted(model, "robust", _clustered)),
        "robust, random mask": lambda model: _plain(_adapted(model, "robust", _random)),
    }
    if importlib.util.find_spec("peft") is None:
        check.tell(candidate="peft-lora", time="not run: needs peft")
        del candidates["peft-lora"]
    for size in ON_GPU if check.gpu else ON_CPU:
        first: float | None = None
        for name, make in candidates.items():
            try:
                times = {depth: timed(check, make(_build(check, size, depth)), size) for depth in DEPTHS}
            except torch.OutOfMemoryError as error:
                check.tell(size=size.name, candidate=name, time=f"out of memory: {error}")
                continue
            few, more = (times[depth] for depth in DEPTHS)
            layer = (more["step_ms"] - few["step_ms"]) / (DEPTHS[1] - DEPTHS[0])
            whole = few["step_ms"] + layer * (size.layers - DEPTHS[0])
            first = first or whole
            check.tell(
                size=size.name,
                candidate=name,
                tokens=size.rows * size.length,
                layer_ms=layer,
                **{f"step of {size.layers} layers, extrapolated from {DEPTHS[0]} and {DEPTHS[1]}, ms": whole},
                ratio=whole / first,
                **{f"{key} of {DEPTHS[1]} layers": value for key, value in more.items()},
            )
        found = against_plan(check, size)
        check.tell(size=size.name, candidate=f"robust on DeepSpeed, stage 2, {DEPTHS[1]} layers", **found)


def _build(check: Check, size: Size, depth: int) -> nn.Module:
    """Random weights, made where they stay."""
    gc.collect()
    torch.manual_seed(0)
    with torch.device(check.device):
        model: nn.Module = AutoModelForCausalLM.from_config(size.config(depth), dtype=torch.bfloat16)
    return model


def _adapted(model: nn.Module, method: str, positions: Callable[[Any], Tensor] | None = None) -> nn.Module:
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method=method, rank=RANK, dropout=0.0))
    if positions is not None:
        for layer in adapted_layers(model).values():
            layer.set_positions(positions(layer))
    return model


def _random(layer: Any) -> Tensor:
    return static_positions("random", layer, layer.weight, 0)


def _clustered(layer: Any) -> Tensor:
    """A few rows and columns hold most entries, as in masks of gradients."""
    rows, columns = (torch.rand(n, device=layer.weight.device).pow(6) for n in layer.weight_shape)
    return top_positions(rows[:, None] * columns * torch.rand(layer.weight_shape, device=rows.device), layer.entries)


def _peft_lora(model: nn.Module) -> Callable[..., object]:
    peft: Any = importlib.import_module("peft")
    kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return _plain(peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, **kind)))


def _plain(model: nn.Module) -> Callable[..., object]:
    """A step without DeepSpeed, so that only the adapters differ."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ids(check: Check, size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size.vocabulary, (size.rows, size.length), generator=generator).to(check.device)


def timed(check: Check, step: Callable[[Tensor], object], size: Size) -> dict[str, Any]:
    """Of a step: milliseconds, those until the host had given all of it to the device, the share of kernels, and its peak."""
    ids, repeats = _ids(check, size), 7 if check.gpu else 2
    for _ in range(2):  # the first one compiles kernels
        step(ids)
    check.synchronize()
    steps, hosts = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        step(ids)
        hosts.append(time.perf_counter() - begun)
        check.synchronize()
        steps.append(time.perf_counter() - begun)
    seconds = statistics.median(steps)
    found: dict[str, Any] = {"step_ms": 1e3 * seconds, "host_ms": 1e3 * statistics.median(hosts)}
    if not check.gpu:
        return found | {"busy_share": f"not run: {NEEDS_A_GPU}", "peak_GiB": f"not run: {NEEDS_A_GPU}"}
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step(ids)
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return found | {"busy_share": busy / seconds, "peak_GiB": torch.cuda.max_memory_allocated() / GIB}


def host_waits(run: Callable[[], object]) -> list[str]:
    """What torch says of each time that the host waits for the GPU in ``run``."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def against_plan(check: Check, size: Size) -> dict[str, Any]:
    """A step of the engine that a run has, at stage 2 on one rank: its largest memory beside what ``rosa-ds plan`` says."""
    depth = DEPTHS[1]
    settings = RunConfig(
        method="robust",
        model=ModelSettings(dtype="bfloat16"),
        adapter=StartedAdapterSettings(rank=RANK, dropout=0.0),
    )
    config = {"zero_optimization": {"stage": 2}, "train_batch_size": size.rows}
    account = Planner(settings, config, size.config(depth)).account(
        2, 1, Shape(size.rows, size.length, size.rows * size.length, padded=False), False
    )
    planned = account.peak(float("inf"))[0]
    zero.initialize()
    plan, settled = plan_deepspeed(config, settings, 1, gpu_has_bfloat16=True)
    if check.gpu:
        torch.cuda.reset_peak_memory_stats()
    engine, _ = build_engine(_adapted(_build(check, size, depth), "robust", _clustered), settled, plan)
    ids = _ids(check, size)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    for _ in range(2):
        step()
    found: dict[str, Any] = {"planned_GiB": planned / GIB}
    if check.gpu:
        peak = torch.cuda.max_memory_allocated()
        found |= {"peak_GiB": peak / GIB, "peak_of_planned": peak / planned}
        found |= {"reserved_GiB": torch.cuda.max_memory_reserved() / GIB, "waits of a step": host_waits(step)}
    else:
        found |= {"peak_GiB": f"not run: {NEEDS_A_GPU}"}
    return found
