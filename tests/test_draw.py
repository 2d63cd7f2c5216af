"""Draws at every ZeRO stage on two ranks, and in whole runs: schedule, checkpoints, resumes, other numbers of ranks."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import faults
from launching import ROOT, TRAIN, go_on, kill, losses, metrics, run
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.prepare import prepare
from rosa_ds.export.adapted import load_adapted, load_merged
from rosa_ds.training.evaluate import evaluate
from rosa_ds.utils.files import manifest_problem, write_manifest

SUBSPACE = ("--method", "subspace", *faults.DRAWS)
Losses = list[tuple[int, str, float]]
CHECKS = ROOT / "tests" / "support" / "draw_ranks.py"


@pytest.mark.ranks
def test_two_ranks(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.float().save_pretrained(tmp_path / "llama")
    output = run("fork", 2, str(CHECKS), str(tmp_path / "llama"), cwd=tmp_path)
    passed = [line.split()[1] for line in output.splitlines() if line.startswith("passed ")]
    assert passed == ["zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """A run of 6 steps that draws before every other one."""
    folder = tmp_path_factory.mktemp("straight")
    return folder / "runs" / "default", faults.straight_losses(folder, *SUBSPACE, "--training.keep_checkpoints", "9")


@pytest.mark.ranks
def test_what_a_run_leaves(straight: tuple[Path, Losses]) -> None:
    folder, found = straight
    draws = [line for line in metrics(folder) if line.get("event") == "draw"]
    assert [(line["step"], line["number"]) for line in draws] == [(0, 0), (2, 1), (4, 2)]
    assert all(line["moments_reset"] == 1.0 for line in draws[1:])
    assert all(line["rounding"] < 1e-7 for line in draws)
    inodes = [path.stat().st_ino for path in sorted((folder / "checkpoints").glob("step-*/base_changes-00000*"))]
    assert len(inodes) == 6
    assert [a == b for a, b in itertools.pairwise(inodes)] == [True, False, True, False, True]
    assert found[-1][2] < 0.95 * found[0][2]  # it learns


@pytest.mark.ranks
def test_the_saved_adapter_is_the_trained_model(straight: tuple[Path, Losses], tokenizer: Any) -> None:
    """On the plain base, merged and not, it has the run's last evaluation loss."""
    source = open_source(straight[0])
    data = prepare("builtin:sql[:16]", "eval", tokenizer, RunConfig().data)
    last = [line["loss"] for line in metrics(straight[0]) if line.get("event") == "eval"][-1]
    for model in (load_adapted(source, torch.float32), load_merged(source, torch.float32)):
        assert evaluate(model, data, 8, tokenizer.pad_token_id)["loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.ranks
def test_resumed_draws_are_the_same_draws(straight: tuple[Path, Losses], tmp_path: Path) -> None:
    """Right before a draw, bit for bit on as many ranks; after one, to 1e-5 on one rank at another stage."""
    copy = go_on(straight[0], tmp_path / "two", 4)
    faults.finish(tmp_path / "two", *SUBSPACE)
    assert losses(copy) == straight[1]
    copy = go_on(straight[0], tmp_path / "one", 3)
    zero3 = ("--config", str(ROOT / "ds_configs" / "zero3.json"), *faults.STEPS[2:])
    run("fork", 1, TRAIN, *zero3, *SUBSPACE, "--resume", cwd=tmp_path / "one")
    assert [entry[2] for entry in losses(copy)] == pytest.approx([entry[2] for entry in straight[1]], rel=1e-5)


@pytest.mark.ranks
def test_a_checkpoint_without_its_base_is_refused(straight: tuple[Path, Losses], tmp_path: Path) -> None:
    checkpoint = go_on(straight[0], tmp_path, 3) / "checkpoints" / "step-000003"
    for path in checkpoint.glob("base_changes-*"):
        path.unlink()
    write_manifest(checkpoint)
    output = run("fork", 1, TRAIN, *faults.STEPS, *SUBSPACE, "--resume", cwd=tmp_path, status=1)
    assert "the checkpoint lacks model.layers.0" in output
    assert "Traceback" not in output


@pytest.mark.ranks
def test_a_linked_base_outlives_its_checkpoint(straight: tuple[Path, Losses], tmp_path: Path) -> None:
    """Into another folder, with old checkpoints deleted meanwhile, and once with the source gone."""
    out = tmp_path / "elsewhere"
    one = ("--training.keep_checkpoints", "1", "--training.output_dir", str(out))
    source = go_on(straight[0], tmp_path, 3) / "checkpoints" / "step-000003"
    run("fork", 2, TRAIN, *faults.STEPS, *SUBSPACE, *one, "--resume", str(source), cwd=tmp_path)
    assert losses(out) == [entry for entry in straight[1] if entry[0] > 3]
    (last,) = (out / "checkpoints").glob("step-*")
    assert manifest_problem(last) is None
    assert len(list((out / "adapter").glob("base-*.safetensors"))) == 2


@pytest.mark.ranks
def test_a_bfloat16_run_goes_on_with_its_residual(tmp_path: Path) -> None:
    size = ("--training.max_steps", "4", "--ds.train_batch_size", "4", "--data.eval", "none")
    arguments = (*faults.STEPS, *SUBSPACE, *size, "--ds.bf16.enabled", "true", "--training.keep_checkpoints", "9")
    run("fork", 2, TRAIN, *arguments, cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    expected = losses(folder)
    drift = [line["drift"] for line in metrics(folder) if line.get("event") == "draw"]
    assert len(drift) == 2
    assert drift[-1] < 1e-6
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 1:
            shutil.rmtree(path)
    run("fork", 2, TRAIN, *arguments, "--resume", cwd=tmp_path)
    assert losses(folder) == expected
    assert [line["drift"] for line in metrics(folder) if line.get("event") == "draw"] == drift


@pytest.mark.ranks
def test_a_signal_at_a_draw(straight: tuple[Path, Losses], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "default"
    process = faults.start(tmp_path, *SUBSPACE)
    try:
        end = time.monotonic() + 200
        while not faults.draws_now(folder):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(faults.ranks_of(process)[1], signal.SIGTERM)
        assert process.wait(timeout=100) != 0
    finally:
        if process.poll() is None:
            kill(process)
    assert json.loads((folder / "interrupted.json").read_text())["step"] in (2, 3)
    faults.finish(tmp_path, *SUBSPACE)
    assert losses(folder) == straight[1]


@pytest.mark.ranks
def test_a_mask_and_draws_in_one_run(tmp_path: Path) -> None:
    """Warm-up, collected mask, restart with the first draw, then draws beside the sparse part; resumed at another stage."""
    arguments = ("--method", "robust-subspace", "--draw.every", "2 steps", "--draw.moments", "project")
    run("fork", 2, TRAIN, *faults.STEPS, *arguments, "--training.keep_checkpoints", "20", cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    events = [(line["step"], line["event"]) for line in metrics(folder) if line.get("event") in ("mask", "draw")]
    assert events == [(6, "mask"), (6, "draw"), (8, "draw"), (10, "draw")]
    expected = losses(folder)
    for step in (7, 6):
        for path in (folder / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        zero3 = ("--config", str(ROOT / "ds_configs" / "zero3.json"), *faults.STEPS[2:])
        run("fork", 2, TRAIN, *zero3, *arguments, "--resume", "--training.keep_checkpoints", "20", cwd=tmp_path)
        assert [entry[2] for entry in losses(folder)] == pytest.approx([entry[2] for entry in expected], rel=1e-5)
