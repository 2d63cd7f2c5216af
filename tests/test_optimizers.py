"""Other optimizers than torch's: their moments read, written, reset and resumed like torch's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

import faults
from launching import ROOT, SMALL, TRAIN, losses, metrics, run
from rosa_ds import distributed
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.zero.eight_bit import collapse, expand, is_bitsandbytes
from rosa_ds.zero.engine import optimizer_class
from rosa_ds.zero.trained_state import TrainedState


def stepped(cls: Any, steps: int = 5) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer of a large and a small tensor in two groups, after some steps on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((70, 100), (10,))]
    optimizer = cls([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer, parameters


def test_the_moments_are_adams() -> None:
    eight, ours = stepped(bitsandbytes.optim.AdamW8bit)
    torchs, theirs = stepped(torch.optim.AdamW)
    assert is_bitsandbytes(eight)
    assert not is_bitsandbytes(torchs)
    pairs = [(0, ours[0]), (1, ours[1])]
    originals = expand(eight, pairs)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            found, expected = eight.state[mine][key], torchs.state[other][key]
            assert found.dtype == torch.float32
            assert (found - expected).norm() < 0.02 * expected.norm()
        assert eight.state[mine]["step"] == 5
    expanded = {key: value.clone() for key, value in eight.state[ours[0]].items() if torch.is_tensor(value)}
    collapse(eight, pairs, originals)
    assert eight.state[ours[0]]["state1"].dtype == torch.uint8
    originals = expand(eight, pairs)
    for key, value in expanded.items():
        assert (eight.state[ours[0]][key] - value).norm() < 1e-2 * value.norm()  # rounded once more
    collapse(eight, pairs, originals)
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    eight.step()
    assert eight.state[ours[0]]["step"] == 6


def test_state_is_read_written_and_reset() -> None:
    optimizer, parameters = stepped(bitsandbytes.optim.AdamW8bit)
    groups = {"low_rank": {"a": parameters[0]}, "whole": {"b": parameters[1]}}
    state = TrainedState(optimizer, groups)
    code = optimizer.state[parameters[0]]["qmap1"].clone()
    assert state.moment_keys("low_rank") == ["exp_avg", "exp_avg_sq"]
    tensors, scalars = state.read_optimizer()
    assert set(tensors) == {f"{name}/{key}" for name in "ab" for key in ("exp_avg", "exp_avg_sq")}
    assert scalars == {"low_rank": {"step": 5.0}, "whole": {"step": 5.0}}
    kept = {key: value.clone() for key, value in optimizer.state[parameters[0]].items() if torch.is_tensor(value)}
    fresh, others = stepped(bitsandbytes.optim.AdamW8bit, 0)
    again = TrainedState(fresh, {"low_rank": {"a": others[0]}, "whole": {"b": others[1]}})
    again.write_optimizer(tensors, scalars)
    for key, value in fresh.state[others[0]].items():  # what was saved is what both go on with, bit for bit
        assert value == 5 if key == "step" else torch.equal(value, kept[key]), key
    state.reset_optimizer(["low_rank"])
    moments = state.read_for({"a", "b"}, [("a", "exp_avg"), ("b", "exp_avg")])
    assert float(moments["a", "exp_avg"].abs().max()) == 0
    assert float(moments["b", "exp_avg"].abs().max()) > 0
    assert torch.equal(optimizer.state[parameters[0]]["qmap1"], code)
    assert state.bytes() < 2.2 * 7000 + 4 * 3000


def choose(name: str, **more: Any) -> Any:
    plan, _ = plan_deepspeed({"optimizer": {"type": name}, **more}, RunConfig(), 1, False)
    return plan


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw8bit", bitsandbytes.optim.AdamW8bit), ("AdamW", torch.optim.AdamW), ("Adam", torch.optim.AdamW)],
)
def test_the_class(name: str, expected: type) -> None:
    assert optimizer_class(choose(name)) is expected


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"'AdamW8' of the DeepSpeed file is not supported: .* Did you mean AdamW or AdamW8bit"
    ):
        choose("AdamW8")
    with pytest.raises(
        ValueError, match=r"params.amsgrad of the DeepSpeed file is not known: AdamW8bit has betas, eps"
    ):
        plan_deepspeed({"optimizer": {"type": "AdamW8bit", "params": {"amsgrad": True}}}, RunConfig(), 1, False)
    settings = RunConfig(checkpoint={"format": "deepspeed"})
    with pytest.raises(ValueError, match="checkpoint.format deepspeed keeps the moments of AdamW8bit in a form"):
        plan_deepspeed({"optimizer": {"type": "AdamW8bit"}}, settings, 1, False)
    with pytest.raises(ValueError, match="there is no GPU: use AdamW8bit"):
        optimizer_class(choose("PagedAdamW8bit"))
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    with pytest.raises(ValueError, match="DeepSpeedCPUAdam steps on the CPU: use it with zero_optimization.offload"):
        optimizer_class(choose("DeepSpeedCPUAdam"))


@pytest.mark.ranks
def test_a_run_with_draws_goes_on_with_its_8_bit_moments(tmp_path: Path) -> None:
    arguments = (
        *("--config", str(ROOT / "ds_configs" / "zero2.json"), *SMALL, "--method", "subspace", *faults.DRAWS),
        *("--training.max_steps", "6", "--training.save_steps", "1", "--training.keep_checkpoints", "9"),
        *("--ds.optimizer.type", "AdamW8bit", "--training.warmup_steps", "1", "--ds.train_batch_size", "8"),
    )
    run("fork", 2, TRAIN, *arguments, "--training.output_dir", "straight", cwd=tmp_path)
    expected = losses(tmp_path / "straight")
    draws = [line for line in metrics(tmp_path / "straight") if line.get("event") == "draw"]
    assert [line["moments_reset"] for line in draws] == [None, 1.0, 1.0]
    for name, ranks, stage in (("same", 2, "2"), ("other", 1, "3")):
        shutil.copytree(tmp_path / "straight", tmp_path / name)
        for step in (4, 5, 6):
            shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{step:06d}")
        more = ("--training.output_dir", name, "--ds.zero_optimization.stage", stage, "--resume")
        run("fork", ranks, TRAIN, *arguments, *more, cwd=tmp_path)
        found = losses(tmp_path / name)
        assert [line[:2] for line in found] == [line[:2] for line in expected]
        if name == "same":
            assert found == expected
        else:  # other blocks of 256 numbers share a scale
            assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-4)
