"""Make the built-in model ``tiny``: ``python -m rosa_ds.models.pretrain_tiny OUT_DIR``.

A Llama of 1.7 M parameters with a byte-level tokenizer and a chat template, pretrained on
:mod:`rosa_ds.models.grammar`. The folder ``rosa_ds/models/tiny`` in the package is this script's output
(the settings are its defaults). Weights are stored in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rosa_ds.models.grammar import generate_conversations

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a step")
    parser.add_argument("--length", type=int, default=384, help="tokens (bytes) a block")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(**vars(parser.parse_args()))


def pretrain(
    out_dir: Path, steps: int, batch_size: int, length: int, learning_rate: float, minutes: float, seed: int
) -> None:
    """Train for ``steps`` steps, or until ``minutes`` have passed (the schedule follows whichever is nearer)."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    blocks = token_blocks(tokenizer, seed, length)
    start = time.monotonic()
    for step in itertools.count():
        progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        ids = torch.tensor(list(itertools.islice(blocks, batch_size)))
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} seconds {time.monotonic() - start:.0f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    print(f"wrote {out_dir}: {sum(p.numel() for p in model.parameters()):,} parameters, {step} steps")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and five special tokens; every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,  # 261 tokens, padded to a multiple of 8
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def token_blocks(tokenizer: PreTrainedTokenizerBase, seed: int, length: int) -> Iterator[list[int]]:
    """Conversations, each whole in one block of ``length`` tokens, the rest of a block filled with padding."""
    block: list[int] = []
    for conversation in generate_conversations(seed):
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        if len(block) + len(ids) > length:
            yield block + [tokenizer.pad_token_id] * (length - len(block))
            block = []
        if len(ids) <= length:
            block = block + ids


if __name__ == "__main__":
    main()
