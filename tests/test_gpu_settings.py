"""What a run sets of torch before a GPU is used, as far as that shows without one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import rosa_ds
from rosa_ds import zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.mask import top_positions
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.data.batches import collate
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.loss import token_loss_sum
from rosa_ds.training import gpu_settings
from rosa_ds.training.gpu_settings import (
    ALLOCATOR,
    check_deterministic,
    choose_allocator,
    deterministic,
    has_no_deterministic_form,
)
from rosa_ds.training.run import train
from rosa_ds.utils.errors import RunError


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


def flags() -> dict[str, object]:
    """Everything that makes arithmetic the same bit for bit."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "flash": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    }


def test_flags_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = flags()
    with deterministic(False):
        assert flags() == before
    with deterministic(True):
        assert flags() == {
            "algorithms": True,
            "warn only": False,
            "cudnn": True,
            "benchmark": False,
            "cudnn attention": False,
            "cublas": ":4096:8",
            "flash": "1",
        }
    assert flags() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert flags() == before


def test_a_work_space_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match=":0:0.*unset it"), deterministic(True):
        pass


def test_what_has_no_deterministic_form_is_named() -> None:
    with deterministic(True), pytest.raises(RuntimeError) as refused:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert has_no_deterministic_form(refused.value) == "put_"
    assert has_no_deterministic_form(RuntimeError("another")) is None
    check_deterministic("sdpa")
    check_deterministic(None)
    with pytest.raises(ValueError, match="flex_attention.*eager, sdpa or flash_attention_2"):
        check_deterministic("flex_attention")


def test_a_run_names_what_has_no_deterministic_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def join(_: float) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(zero, "initialize", join)
    words = ["--training.output_dir", str(tmp_path / "run"), "--training.deterministic", "true"]
    with pytest.raises(RunError, match=r"^training.deterministic: put_ has no form"):
        train(parse_command_line([*words, "--data.train", "builtin:sql[:4]"]))


def test_cublas_is_told_before_the_gpu_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = variables_of_a_run(monkeypatch, tmp_path / "run", "--training.deterministic", "true")
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


# of torch.use_deterministic_algorithms: what raises on CUDA, by the names of torch's operators
WITHOUT_A_FORM = {
    *("put_", "histc", "kthvalue", "median", "bincount", "nll_loss2d_forward", "_ctc_loss_backward", "max_unpool2d"),
    *("grid_sampler_2d_backward", "_embedding_bag_backward", "_adaptive_avg_pool2d_backward", "cumsum_of_floats"),
}


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found.add("cumsum_of_floats" if name == "cumsum" and args[0].is_floating_point() else name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "sparse", "robust", "robust-subspace"])
def test_our_operators_have_a_deterministic_form(method: Any) -> None:
    """A forward and a backward pass, a mask's choice, and the loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method=method, rank=2, density=0.1, dropout=0.1))
    sparse = [layer for layer in adapted_layers(model).values() if layer.entries]
    mask = {
        layer.weight_name: torch.randperm(layer.weight_numel)[: layer.entries].sort().values.int() for layer in sparse
    }
    if mask:
        rosa_ds.set_mask(model, mask)
    batch = collate([Tokens([5, 6, 7, 8], [True] * 4), Tokens([9, 3], [True] * 2)], 0)
    with deterministic(True), Names() as names:
        token_loss_sum(model, batch, torch.device("cpu")).backward()
        top_positions(torch.randn(20, 30), 40)
    assert "mm" in names.found
    assert not names.found & WITHOUT_A_FORM
