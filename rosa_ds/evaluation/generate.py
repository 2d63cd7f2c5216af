"""Batched generation with a KV cache, greedy or sampled, divided over ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.data.turn_end import stop_tokens


@dataclasses.dataclass(frozen=True)
class Generation:
    """How continuations are made.

    Attributes:
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: tokens are drawn from the likeliest that together have this probability.
        seed: of the draws.
    """

    batch_size: int = 16
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.max_new_tokens) < 1:
            raise ValueError(
                f"--batch-size and --max-new-tokens are 1 or more, given {self.batch_size} and {self.max_new_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature is 0 (greedy) or more, --top-p above 0 and at most 1; given {self.temperature} and {self.top_p}"
            )
        if not self.temperature and self.top_p < 1:
            raise ValueError("--top-p has no meaning for greedy generation: give a --temperature above 0, too")


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], how: Generation
) -> list[str]:
    """The continuation of each prompt, decoded without special tokens, as :func:`continuations` gives its ids."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in continuations(model, tokenizer, prompts, how)]


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads what is evaluated. Nothing depends on it, so where the tokenizer has none, another one does."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], how: Generation
) -> list[list[int]]:
    """The token ids that follow each prompt, up to the token that ends them, in the order given: the same on every rank.

    Prompts of similar length share a batch; they are padded on the left. Each rank has the whole model and does every n-th
    batch; what is drawn for a batch depends on its number and the seed alone, so not on the number of ranks.

    Raises: ValueError for a prompt beyond the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    most = max(map(len, prompts), default=0)
    if positions is not None and most + how.max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt has {most} tokens, and with --max-new-tokens {how.max_new_tokens} that is more than the model's "
            f"{positions} positions: give fewer new tokens, or shorter rows"
        )
    drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature else {}
    stops = stop_tokens(model.generation_config.eos_token_id, tokenizer)
    pad_id = padding_of(tokenizer)  # masked on the left, behind an end on the right
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=bool(how.temperature),
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        use_cache=True,
        **drawn,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + how.batch_size] for start in range(0, len(order), how.batch_size)]
    mine: dict[int, list[int]] = {}
    turns = range(distributed.rank(), len(batches), distributed.world_size())
    for number in tqdm(turns, desc="generating", unit="batch", disable=None if distributed.is_main() else True):
        chosen = batches[number]
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with (
            torch.random.fork_rng([model.device.index] if model.device.type == "cuda" else []),
            _default_generation_config(model),
        ):
            torch.manual_seed(how.seed * 1_000_003 + number)
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        for row, index in enumerate(chosen):
            new_ids = output[row, longest:].tolist()
            mine[index] = list(itertools.takewhile(lambda token: token not in stops, new_ids))
    written = {index: ids for part in distributed.gather_objects(mine) for index, ids in part.items()}
    return [written[index] for index in range(len(prompts))]


@contextlib.contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """In place of the model's own, whose wishes (a penalty for repetition) transformers would add to what is asked for."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
