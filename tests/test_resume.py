"""Runs that go on elsewhere: on other numbers of ranks, at other stages, from DeepSpeed's own files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import faults
from launching import ROOT, TRAIN, losses, run
from rosa_ds.export.merge import export_merged

pytestmark = pytest.mark.ranks
COMMON = (
    *faults.STEPS[2:],
    "--adapter.dropout",
    "0",
    "--training.keep_checkpoints",
    "20",
    "--training.eval_steps",
    "0",
)


def zero(stage: int) -> tuple[str, str]:
    return "--config", str(ROOT / "ds_configs" / f"zero{stage}.json")


def forget_after(folder: Path, step: int) -> None:
    """As if the run had been killed after ``step``."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def assert_close(found: list[tuple[int, str, float]], expected: list[tuple[int, str, float]]) -> None:
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-5)


def test_other_ranks_and_stages(tmp_path: Path) -> None:
    """2 ranks at stage 2, then 1 at stage 3 (between collect steps), 3 at stage 1, and 2 at stage 3.

    Three ranks cannot share 16 examples equally, and are not told that there are 16.
    """
    run("fork", 2, TRAIN, *zero(2), *COMMON, cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    straight = losses(folder)
    untold = ("--ds.train_batch_size", "auto", "--ds.train_micro_batch_size_per_gpu", "3")
    for step, ranks, stage, more in ((4, 1, 3, ()), (7, 3, 1, untold), (10, 2, 3, ())):
        forget_after(folder, step)
        output = run("fork", ranks, TRAIN, *zero(stage), *COMMON, *more, "--resume", cwd=tmp_path)
        assert f"step {step}" in output
        assert ("as in the checkpoint; a step: 16 examples, 18 places (3 ranks × 2" in output) == bool(more)
        assert_close(losses(folder), straight)
    # what two ranks of ZeRO-3 have saved is exported as what one rank saves of the same state
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    exported = [export_merged(path, tmp_path / f"out{n}", None) for n, path in enumerate((folder, last))]
    run("fork", 1, TRAIN, *zero(0), *COMMON, "--resume", cwd=tmp_path)
    exported.append(export_merged(folder, tmp_path / "alone", None))
    contents = {(path / "model.safetensors").read_bytes() for path in exported}
    assert len(contents) == 1


@pytest.mark.parametrize(("stage", "goes_on"), [(0, [1]), (1, [1]), (2, [2]), (3, [2, 1])])
def test_deepspeeds_own_files(tmp_path: Path, stage: int, goes_on: list[int]) -> None:
    """Only DeepSpeed's shards are left: on as many ranks the same bits, on one rank the same run."""
    arguments = (*zero(stage), *COMMON, "--mask.score", "random", "--checkpoint.format", "deepspeed")
    run("fork", 2, TRAIN, *arguments, cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    straight = losses(folder)
    assert (folder / "deepspeed" / "global_step6").is_dir()
    for ranks in goes_on:
        shutil.rmtree(folder / "checkpoints")
        for step in (4, 5, 6):
            shutil.rmtree(folder / "deepspeed" / f"global_step{step}", ignore_errors=True)
        output = run("fork", ranks, TRAIN, *arguments, "--resume", cwd=tmp_path)
        assert "global_step3, step 3" in output
        if ranks == 2:
            assert losses(folder) == straight
        else:
            assert_close(losses(folder), straight)


def test_a_folder_of_deepspeeds_files_alone(tmp_path: Path) -> None:
    """As DeepSpeed's own programs leave it: the shards lie in the run's folder itself. One that was asked for is checked."""
    arguments = (*zero(2), *COMMON, "--mask.score", "random", "--checkpoint.format", "deepspeed")
    run("fork", 2, TRAIN, *arguments, cwd=tmp_path)
    folder, bare = tmp_path / "runs" / "default", tmp_path / "bare"
    straight = losses(folder)
    bare.mkdir()
    (folder / "deepspeed" / "global_step3").rename(bare / "global_step3")
    (bare / "latest").write_text("global_step3")
    shard = bare / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    here = (*arguments, "--training.output_dir", str(bare), "--resume")
    output = run("fork", 2, TRAIN, *here, str(bare / "global_step3"), cwd=tmp_path, status=1)
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt has" in output
    shard.write_bytes(kept)
    output = run("fork", 2, TRAIN, *here, cwd=tmp_path)
    assert "global_step3, step 3" in output
    assert losses(bare) == [entry for entry in straight if entry[0] > 3]
    assert {"adapter", "global_step3"} <= {path.name for path in bare.iterdir()}


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_files_that_are_not_trusted(tmp_path: Path) -> None:
    """Missing, cut and foreign files, and one that would run a program."""
    arguments = (*zero(2), *COMMON, "--mask.score", "random", "--checkpoint.format", "deepspeed")
    run("fork", 2, TRAIN, *arguments, "--training.max_steps", "2", cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "deepspeed" / "global_step1")
    shards = folder / "deepspeed" / "global_step2"
    model, optimizer = shards / "mp_rank_00_model_states.pt", shards / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def refused(message: str) -> None:
        output = run("fork", 1, TRAIN, *arguments, "--training.max_steps", "2", "--resume", cwd=tmp_path, status=1)
        assert message in output
        assert "Traceback" not in output

    kept = optimizer.read_bytes()
    optimizer.write_bytes(kept[: len(kept) // 2])
    refused("global_step2 is damaged (zero_pp_rank_1_mp_rank_00_optim_states.pt has")
    (shards / "manifest.json").unlink()  # as where only DeepSpeed's own files were copied
    refused("zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged, or holds what a checkpoint of DeepSpeed's does not")
    optimizer.unlink()
    refused("was written by 2 ranks, and the files of ranks [0] are there")
    optimizer.write_bytes(kept)
    content = torch.load(model, weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "rosa_ds"}, model)
    refused("was not written by a run of rosa_ds")
    torch.save({"module": Payload()}, model, pickle_protocol=pickle.DEFAULT_PROTOCOL)
    refused("mp_rank_00_model_states.pt is damaged, or holds what")
    assert not (tmp_path / "executed").exists()
