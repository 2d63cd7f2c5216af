"""What a run sets of torch before a GPU is used, as far as that shows without one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from rosa_ds import zero
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.training import gpu_settings
from rosa_ds.training.gpu_settings import ALLOCATOR, choose_allocator
from rosa_ds.training.run import train


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is built for NVIDIA's GPUs, and a user who has chosen nothing."""
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(gpu_settings.sys, "platform", "linux")


@pytest.mark.parametrize(("version", "name"), [("2.8.0+cu128", ALLOCATOR[1]), ("2.13.0", ALLOCATOR[0])])
def test_segments_grow(
    version: str, name: str, nvidia: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch, "__version__", version)
    choose_allocator()
    assert {key: os.environ[key] for key in ALLOCATOR if key in os.environ} == {name: "expandable_segments:True"}
    assert f"{name}=expandable_segments:True" in caplog.text


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_a_user_has_chosen_stays(
    name: str, nvidia: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    choose_allocator()
    assert {key: os.environ[key] for key in ALLOCATOR if key in os.environ} == {name: "max_split_size_mb:128"}
    assert f"{name}=max_split_size_mb:128, as given" in caplog.text


@pytest.mark.parametrize("why", ["AMD", "Windows", "CUDA runs"])
def test_segments_that_cannot_grow_are_left(why: str, nvidia: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "AMD":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif why == "Windows":
        monkeypatch.setattr(gpu_settings.sys, "platform", "win32")
    else:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    choose_allocator()
    assert not any(name in os.environ for name in ALLOCATOR)


class ReachedTheGPUError(ValueError):
    """The ranks are joined, which starts CUDA."""


def variables_of_a_run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, str]:
    """The environment of a run at the moment in which its ranks are joined."""
    seen: dict[str, str] = {}

    def join(_: float) -> None:
        seen.update(os.environ)
        raise ReachedTheGPUError

    monkeypatch.setattr(zero, "initialize", join)
    command = parse_command_line(["--training.output_dir", str(folder), "--data.train", "builtin:sql[:4]", *words])
    with pytest.raises(ReachedTheGPUError):
        train(command)
    return seen


def test_a_run_chooses_before_it_reaches_the_gpu(nvidia: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = variables_of_a_run(monkeypatch, tmp_path / "run")
    assert "expandable_segments:True" in [found.get(name) for name in ALLOCATOR]
