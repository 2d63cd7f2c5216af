"""What is saved is what was trained: float32 masters and parameters on two ranks, however DeepSpeed divides and orders them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from launching import ROOT, SMALL, TRAIN, losses, run
from rosa_ds.utils.errors import RunError
from rosa_ds.zero.masters import OwnMasters
from rosa_ds.zero.trained_state import TrainedState

CHECKS = ROOT / "tests" / "support" / "masters_ranks.py"


@pytest.mark.ranks
def test_two_ranks(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.float().save_pretrained(tmp_path / "llama")
    output = run("fork", 2, str(CHECKS), str(tmp_path), cwd=tmp_path)
    passed = {line.split()[1] for line in output.splitlines() if line.startswith("passed ")}
    assert passed == {
        line[4:].split("(")[0] for line in CHECKS.read_text().splitlines() if line.startswith("def check_")
    }


@pytest.mark.ranks
def test_a_run_with_round_robin_gradients_goes_on_and_is_saved_as_without(tmp_path: Path) -> None:
    arguments = (
        *("--config", str(ROOT / "ds_configs" / "zero2.json"), *SMALL, "--training.warmup_steps", "0"),
        *("--mask.warmup_steps", "2", "--training.max_steps", "4", "--training.save_steps", "3"),
        *("--training.keep_checkpoints", "9"),
        *("--ds.train_batch_size", "4", "--adapter.dropout", "0", "--adapter.low_rank_lr", "5e-3"),
    )
    for value in ("true", "false"):
        more = ("--ds.zero_optimization.round_robin_gradients", value, "--training.output_dir", value)
        run("fork", 2, TRAIN, *arguments, *more, cwd=tmp_path)
        expected = losses(tmp_path / value)
        adapter = (tmp_path / value / "adapter" / "adapter_model.safetensors").read_bytes()
        run("fork", 2, TRAIN, *arguments, *more, "--resume", f"{value}/checkpoints/step-000003", cwd=tmp_path)
        assert losses(tmp_path / value) == expected
        assert (tmp_path / value / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    assert (tmp_path / "true" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


class Moved(OwnMasters):
    """Masters of which two are exchanged, as a wrong order of a flat vector would do."""

    def _whole(self, name: str, key: str | None) -> torch.Tensor | None:
        return super()._whole({"a": "b", "b": "a"}[name], key)


def test_masters_of_other_parameters_are_found() -> None:
    parameters = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.tensor([0.0, 0.25, 0.0]))}
    groups = {"low_rank": parameters}
    optimizer = torch.optim.AdamW(parameters.values())
    state = TrainedState(optimizer, groups)
    state.check("before the first step")
    state.masters = Moved(optimizer, groups)
    with pytest.raises(
        RunError,
        match=r"^before the first step: a on rank 0 differs from its float32 master, which is what is saved, by up to 0.25 "
        r"\(2 of 2 trained parameters differ\). Nothing is saved now: leave everything but the stage out",
    ):
        state.check("before the first step")


def test_what_is_not_finite_is_equal_to_itself_and_to_nothing_else() -> None:
    parameter = torch.nn.Parameter(torch.tensor([float("nan"), float("inf"), 1.0], dtype=torch.float16))
    optimizer = torch.optim.AdamW([parameter])
    state = TrainedState(optimizer, {"low_rank": {"a": parameter}})
    for master, differs in (
        ([float("nan"), 1e6, 1.0001], False),
        ([1.0, 1e6, 1.0], True),
        ([float("nan"), 1.0, 1.0], True),
    ):
        assert isinstance(state.masters, OwnMasters)
        state.masters.by_name["a"] = torch.tensor(master)
        if not differs:
            state.check("now")
            continue
        with pytest.raises(RunError, match="a on rank 0 differs .* by up to inf"):
            state.check("now")
