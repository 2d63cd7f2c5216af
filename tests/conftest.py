"""Fixtures shared by all tests. Nothing here or in a test loosens a bound or hides a missing part."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gpu_sessions import check_expression, skip_gpu_tests

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; nothing runs in it unless a test asks

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rosa_ds.config.schema import ModelSettings
from rosa_ds.models.load import load_tokenizer


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in the tests' own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


_begun = time.time()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Killed runs leave DeepSpeed's buffers, 66 MiB a rank, which would fill a small machine's memory.

    With pytest-xdist when all its workers have ended, whose runs use theirs until then.
    """
    if hasattr(session.config, "workerinput"):
        return
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_*"):
        if path.stat().st_mtime >= _begun:
            path.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    check_expression(config.option.markexpr)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also tests that take many minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that start processes first, so that no worker is left with the longest of them at the end."""
    if not config.getoption("--nightly"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="without --nightly"))
    skip_gpu_tests(items, torch.cuda.is_available())
    slow = {item.path for item in items if item.get_closest_marker("ranks")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSettings())


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A random Llama of two layers with grouped queries, float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of two layers (Conv1D weights, tied head), float64, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Token ids and labels of three sequences."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (3, 11), generator=generator)
    return {"input_ids": ids, "labels": ids}
