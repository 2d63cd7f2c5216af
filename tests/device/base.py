"""A base small enough that a run on the emulated device takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rosa_ds.models.load import TINY_FOLDER

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(folder: Path) -> Path:
    """A random Llama of two layers with the built-in tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(TINY_FOLDER / name, folder / name)
    return folder
