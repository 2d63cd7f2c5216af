"""Masters and parameters in the engines of several ranks; started by test_masters.py with a folder that holds a model ``llama``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from engines import make_engine
from rosa_ds import distributed, zero
from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.settle import settle
from rosa_ds.utils.errors import RunError
from rosa_ds.zero.trained_state import TrainedState

FOLDER = Path(sys.argv[1])
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)

ENGINES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 0, bfloat16": {"stage": 0, "dtype": "bfloat16"},
    "stage 1": {"stage": 1},
    "stage 1, bfloat16": {"stage": 1, "dtype": "bfloat16"},
    "stage 2": {"stage": 2},
    "stage 2, bfloat16": {"stage": 2, "dtype": "bfloat16"},
    "stage 2, float16": {"stage": 2, "dtype": "float16"},
    "stage 2, round robin": {"stage": 2, "round_robin_gradients": True},
    "stage 1, round robin, gaps": {"stage": 1, "round_robin_gradients": True, "parameter_alignment": True},
    "stage 2, full": {"stage": 2, "dtype": "bfloat16", "method": "full"},
    "stage 2, 8 bits": {"stage": 2, "dtype": "bfloat16", "optimizer": "AdamW8bit"},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "stage 3, bfloat16, gathered": {"stage": 3, "dtype": "bfloat16", "stage3_param_persistence_threshold": 10**6},
    "stage 3, float16": {"stage": 3, "dtype": "float16"},
    "stage 3, 8 bits": {"stage": 3, "dtype": "bfloat16", "optimizer": "AdamW8bit"},
    "stage 3, full": {"stage": 3, "dtype": "bfloat16", "method": "full"},
    "stage 3, offloaded": {
        **{"stage": 3, "dtype": "bfloat16", "sub_group_size": 100},
        **{"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
}


def make(chosen: dict[str, Any]) -> tuple[Any, TrainedState]:
    section = dict(chosen)
    method, dtype = section.pop("method", "robust"), section.pop("dtype", "float32")
    optimizer = {"type": section.pop("optimizer", "AdamW")}
    given = RunConfig(
        method=method,
        model={"name_or_path": str(FOLDER / "llama"), "dtype": dtype},
        adapter={}
        if method == "full"
        else {"rank": 3, "density": 0.05, "dropout": 0.0, "modules_to_save": ["model.norm"]},
        training={"learning_rate": 1e-2},
    )
    config = {"zero_optimization": section, "optimizer": optimizer, "train_batch_size": distributed.world_size()}
    plan, given = settle(CommandLine(given, config, None), distributed.world_size(), False)
    torch.manual_seed(0)
    _, engine, state = make_engine(given, plan)
    return engine, state


def backward(engine: Any) -> None:
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(distributed.rank()))
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)


def numbers(state: TrainedState) -> dict[str, torch.Tensor]:
    return {name: zero.read_whole(parameter).clone() for name, parameter in state.parameters.items()}


def check_masters_are_the_parameters(chosen: dict[str, Any]) -> None:
    engine, state = make(chosen)
    before = numbers(state)
    for _ in range(20 if chosen.get("dtype") == "float16" else 2):  # the loss scale is looked for
        backward(engine)
        engine.step()
        state.check("in this test")
    after = numbers(state)
    assert all(not torch.equal(before[name], after[name]) for name in after), "a parameter that is not trained"
    state.write({name: tensor.float() / 3 for name, tensor in after.items()})
    state.check("after writing")


def check_dropped_gradients_change_nothing(chosen: dict[str, Any]) -> None:
    engine, state = make(chosen)
    before = numbers(state)
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.0
    backward(engine)
    state.drop_gradients()
    engine.step()
    after = numbers(state)
    assert all(torch.equal(before[name], after[name]) for name in after)


def check_what_differs_is_named(chosen: dict[str, Any]) -> None:
    """One number of one parameter, on the last rank alone."""
    _, state = make(chosen)
    name, parameter = list(state.parameters.items())[-1]
    last = distributed.world_size() - 1
    if distributed.rank() == last:
        with torch.no_grad():
            zero.held_numbers(parameter)[0][1][-1] += 0.5
    message = (
        rf"in this test: {name} on rank {last} differs from its float32 master.* by up to 0\.[45]\d* \(1 of \d+ trained"
    )
    with pytest.raises(RunError, match=message):
        state.check("in this test")
    with pytest.raises(RunError, match=f"before saving: {name} on rank {last}"):
        state.read()


def main() -> None:
    zero.initialize(2.0)
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    accelerator = get_accelerator()  # a CPU can compute in float16, which DeepSpeed denies
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    checks = (check_masters_are_the_parameters, check_dropped_gradients_change_nothing, check_what_differs_is_named)
    for check in checks:
        for name, chosen in ENGINES.items():
            if check is check_dropped_gradients_change_nothing and chosen.get("dtype") == "float16":
                continue  # which leaves steps out in its own way
            try:
                check(chosen)
            except BaseException:
                sys.stderr.write(f"{check.__name__}, {name}:\n")
                raise
        if distributed.is_main():
            sys.stdout.write(f"passed {check.__name__}\n")
            sys.stdout.flush()
    distributed.leave()


if __name__ == "__main__":
    main()
