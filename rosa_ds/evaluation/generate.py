"""Batched greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a generation: the tokenizer's end of text and what the model's own configuration names."""
    configured = model.generation_config.eos_token_id
    named = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt, decoded without special tokens, in the order given.

    Prompts of similar length share a batch; they are padded on the left.
    """
    stops = stop_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="generating", unit="batch", disable=None):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        for row, index in enumerate(chosen):
            texts[index] = tokenizer.decode(output[row, longest:], skip_special_tokens=True)
    return texts
