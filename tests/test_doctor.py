"""The doctor's findings, what failures say, and the logs of ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launching import ROOT, run
from rosa_ds import distributed, zero
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.config.schema import ModelSettings, RunConfig
from rosa_ds.memory.account import ACTIVATIONS, Account
from rosa_ds.planning import doctor
from rosa_ds.training import run as run_module
from rosa_ds.training.failures import (
    explain_loading,
    explain_memory,
    explain_status,
    is_out_of_memory,
    suggestions,
)
from rosa_ds.utils import logs
from rosa_ds.utils.errors import INTERRUPTED_STATUS, RunError
from rosa_kernels import dispatch

GIB = 2**30


@pytest.mark.ranks
def test_two_ranks_are_examined_and_timed(tmp_path: Path) -> None:
    output = run(
        "torchrun", 2, str(ROOT / "launch" / "doctor.py"), "--output", str(tmp_path), "--megabytes", "1", cwd=tmp_path
    )
    for wanted in (
        "torch: 2",
        "compiler:",
        "/dev/shm:",
        "write speed:",
        "network interfaces:",
        "kernel sddmm: torch",
        "kernel tried:",
    ):
        assert output.count(wanted) == 1  # one host, however many ranks
    assert "all-reduce of 1 MB, gloo:" in output
    assert "all-gather of 1 MB, gloo:" in output
    assert "findings with something to do" in output
    assert not list(tmp_path.iterdir())


def test_each_package_is_named_once() -> None:
    names = [finding.what for finding in doctor.versions()]
    assert len(names) == len(set(names))
    assert {"torch", "triton", "bitsandbytes"} <= set(names)


def test_findings_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "apt-get install g++" in next(iter(doctor.compilers())).advice
    monkeypatch.setattr(doctor, "SHARED_BUFFER", 2**50)
    assert "--shm-size" in next(iter(doctor.memory_and_limits())).advice
    monkeypatch.setattr(doctor, "_mount_of", lambda path: ("/net", "nfs4"))
    found = {finding.what: finding.advice for finding in doctor.disks(tmp_path / "not" / "there")}
    assert "network disk" in found["Triton cache (TRITON_CACHE_DIR)"]
    assert "network disk" not in found["model cache (HF_HOME)"]
    alone = doctor.examine_ranks(2**20)
    assert "torchrun --nproc_per_node N" in alone[-1].advice


def test_a_kernel_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.probe(torch.device("cpu"))
    assert not found.advice, found
    right = doctor.rosa_kernels.sddmm
    monkeypatch.setattr(doctor.rosa_kernels, "sddmm", lambda *given: 1.1 * right(*given))
    assert "its results are wrong" in doctor.probe(torch.device("cpu")).advice

    def fails(*given: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor.rosa_kernels, "sddmm", fails)
    found = doctor.probe(torch.device("cpu"))
    assert found.found == "RuntimeError: no compiler"
    assert "ROSA_KERNELS=torch" in found.advice


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (-9, "lack of host memory"),
        (137, "lack of host memory"),
        (INTERRUPTED_STATUS, "--resume goes on"),
        (74, "waited too long"),
        (1, "an error"),
        (-15, "SIGTERM"),
        (130, "signal 2"),
        (3, "not one of ours"),
        (0, "all is well"),
    ],
)
def test_exit_statuses_in_words(status: int, meaning: str) -> None:
    assert meaning in explain_status(status)


def test_lack_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(ValueError("no column 'out of memory'"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def test_lack_of_memory_names_what_was_held_and_the_largest_remedy_first() -> None:
    account = Account({"base": 60 * GIB, ACTIVATIONS: 12 * GIB, "optimizer": GIB}, {}, {})
    message = explain_memory(account, RunConfig(), 2, 4, RuntimeError("no more"))
    assert "base 60.00, activations 12.00, optimizer 1.00" in message
    assert message.index("(1) --config ds_configs/zero3.json") < message.index("(2) --training.gradient_checkpointing")
    assert "out of memory (MemoryError)" in explain_memory(account, RunConfig(), 2, 4, MemoryError())
    account.memory["base"] = GIB
    first, second, _ = suggestions(account, RunConfig(), 2, 4)
    assert "gradient_checkpointing" in first
    assert "--ds.train_micro_batch_size_per_gpu 2" in second
    settings = RunConfig(training={"gradient_checkpointing": True})
    assert "train_micro_batch_size_per_gpu" in suggestions(account, settings, 2, 4)[0]
    assert not any("micro_batch" in text for text in suggestions(account, settings, 3, 1))


@pytest.fixture
def our_logger() -> Iterator[logging.Logger]:
    ours = logging.getLogger("rosa_ds")
    before = (ours.handlers, ours.propagate, ours.level)
    yield ours
    for handler in ours.handlers:
        handler.close()
    ours.handlers, ours.propagate = before[:2]
    ours.setLevel(before[2])


def test_each_rank_has_its_log_with_what_was_said_before(
    tmp_path: Path, our_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    logs.set_up_logging()
    our_logger.info("before there is a folder")
    logs.log_to(tmp_path / "logs")
    our_logger.info("and after")
    our_logger.warning("on the screen, too")
    our_logger.warning("of rank 0's screen", extra=logs.SAME_ON_ALL_RANKS)
    lines = (tmp_path / "logs" / "rank-0003.log").read_text().splitlines()
    assert [line.partition(" rank 3 ")[2] for line in lines] == [
        "INFO before there is a folder",
        "INFO and after",
        "WARNING on the screen, too",
        "WARNING of rank 0's screen",
    ]
    assert "[rank 3] on the screen, too" in (screen := capsys.readouterr().err)
    assert "folder" not in screen
    assert "rank 0's" not in screen


def test_a_second_run_in_a_process_has_a_log_of_its_own(tmp_path: Path, our_logger: logging.Logger) -> None:
    logs.set_up_logging()
    for name in ("first", "second"):
        logs.begin_log()
        our_logger.info("%s begins", name)
        logs.log_to(tmp_path / name)
        our_logger.info("%s ends", name)
        lines = (tmp_path / name / "rank-0000.log").read_text().splitlines()
        assert [line.partition(" INFO ")[2] for line in lines] == [f"{name} begins", f"{name} ends"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("")])
def test_memory_that_ends_while_the_model_is_built(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*given: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "_train", fails)
    command = parse_command_line(["--ds.zero_optimization.stage", "2"])
    with pytest.raises(RunError, match=r"while the model was built at stage 2 .* \(1\) --config ds_configs/zero3.json"):
        run_module.train(command)
    quantised = RunConfig(model=ModelSettings(quantization="nf4"))
    assert "(1) more ranks at stage 3; (2) --config ds_configs/zero3_offload" in explain_loading(quantised, 3, error)


def test_a_torch_that_is_too_old_for_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    (finding,) = doctor.accelerators()
    assert finding.advice == "GPUs need torch 2.8 or newer, installed is 2.7.1+cu126: pip install 'torch>=2.8'"
    before = dict(os.environ)
    with pytest.raises(ValueError, match="GPUs need torch 2.8 or newer"):
        zero.initialize()
    assert dict(os.environ) == before  # which later processes would have
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert list(doctor.accelerators()) == []


@pytest.mark.parametrize(
    ("version", "refused"), [("3.2.0", True), ("3.3.1", True), ("3.4.0", False), ("3.10.0", False)]
)
def test_a_triton_that_is_too_old_is_refused(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(doctor, "probe", lambda device: doctor.Finding("sddmm", "fine"))
    dispatch._choose.cache_clear()
    monkeypatch.delenv("ROSA_KERNELS", raising=False)
    found = [finding.advice for finding in doctor.kernels() if "3.4 or newer" in finding.advice]
    dispatch._choose.cache_clear()
    assert len(found) == refused
    assert not refused or version in found[0]
