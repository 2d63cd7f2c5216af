"""Engines with one section after another in the same processes; started by test_zero_options.py and test_deepspeed_keys.py.

Arguments: a folder with a model ``llama``, a file with the cases as JSON, and where the first rank writes what they gave. A case has
a ``dtype`` and a section ``zero``, and may have ``more`` sections, another ``base`` and other ``targets``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from engines import make_engine
from rosa_ds import distributed, zero
from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.compiled import compiled
from rosa_ds.training.settle import settle
from rosa_ds.zero.trained_state import TrainedState

warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
LR, MICRO_BATCHES = 1e-2, 2
TARGETS = ["q_proj", "up_proj", "down_proj"]
Numbers = dict[str, Tensor]


def train(case: dict[str, Any]) -> tuple[Numbers, Numbers]:
    """:func:`steps` of a case. Raises: ValueError where settings are refused before work."""
    given = RunConfig(
        model={"name_or_path": str(Path(sys.argv[1]) / case.get("base", "llama")), "dtype": case["dtype"]},
        adapter={
            "rank": 3,
            "density": 0.05,
            "dropout": 0.0,
            "low_rank_lr": LR,
            "modules_to_save": ["model.norm"],
            "target_modules": case.get("targets", TARGETS),
        },
    )
    config = {
        "zero_optimization": case["zero"],
        "train_batch_size": distributed.world_size() * MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.5,
        **case.get("more", {}),
    }
    plan, given = settle(CommandLine(given, config, None), distributed.world_size(), False)
    torch.manual_seed(0)
    model, engine, state = make_engine(given, plan)
    with contextlib.nullcontext() if plan.compiler is None else compiled(model, plan.compiler):
        return steps(engine, state)


def steps(engine: Any, state: TrainedState) -> tuple[Numbers, Numbers]:
    """Two steps; then everything is read, overwritten, checked, and written back, as for a resume; and a third step.

    Returns: masters and moments after two steps, and masters and parameters after three, on every rank.
    """
    for number in range(2):
        step(engine, number)
    moments, scalars = state.read_optimizer(dict.fromkeys(state.parameters, distributed.rank()))
    masters = read(state)
    state.check("in this test")
    state.write({name: torch.full_like(tensor, 0.5) for name, tensor in masters.items()})
    state.check("in this test, after writing")
    state.write(masters)
    state.write_optimizer(moments, scalars)
    step(engine, 2)
    state.check("in this test, after a resume")
    after = {f"{name} in forward": zero.read_whole(p).float().cpu() for name, p in state.parameters.items()}
    after |= read(state)
    engine.destroy()
    return {**masters, **moments}, after


def read(state: TrainedState) -> Numbers:
    """All masters, whole, on every rank."""
    return state.read(dict.fromkeys(state.parameters, distributed.rank()))


def step(engine: Any, number: int) -> None:
    for micro in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + distributed.rank())
        ids = torch.randint(3, 90, (2, 11), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()


def largest(found: Numbers, expected: Numbers) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def outcome(case: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    key = str({name: case.get(name) for name in ("dtype", "base", "targets")} | {"stage": case["zero"]["stage"]})
    if key not in references:
        references[key] = train({**case, "zero": {"stage": case["zero"]["stage"]}, "more": {}})
    try:
        found = train(case)
    except ValueError as error:
        return {"refused": str(error)}
    except Exception as error:  # the test says which case ended so
        return {"error": f"{type(error).__name__}: {error}"}
    return {"apart": [largest(ours, theirs) for ours, theirs in zip(found, references[key], strict=True)]}


def main() -> None:
    zero.initialize(1.0)
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    cases, results, references = json.loads(Path(sys.argv[2]).read_text()), {}, {}
    for name, case in cases.items():
        results[name] = outcome(case, references)
        gc.collect()
        gc.freeze()  # what is left is modules, and looking through them takes longer than training
        if distributed.is_main():
            Path(sys.argv[3]).write_text(json.dumps(results))
    distributed.leave()


if __name__ == "__main__":
    main()
