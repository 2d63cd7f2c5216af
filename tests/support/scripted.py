"""A tokenizer of bytes, and a model that writes what it is told to: made for tests."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = (
    "<end>",
    "<pad>",
    "<bos>",
    "<im_start>",
    "<im_end>",
    "<user>",
    "<assistant>",
    "<response>",
    "</response>",
    "<return>",
)
CHATML = "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<im_end>\n{% endfor %}{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"


def byte_tokenizer(template: str | None = None, eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    """A token a byte, and those of :data:`SPECIAL`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=list(SPECIAL[3:]),
    )
    tokenizer.chat_template = template
    return tokenizer


class Scripted(LlamaForCausalLM):
    """Writes the same tokens whatever it is asked, then those again."""

    script: list[int]
    prompt_length: int

    def forward(self, input_ids: torch.Tensor, **rest: object) -> object:  # type: ignore[override]
        if input_ids.shape[1] > 1:
            self.prompt_length = input_ids.shape[1]
        output = super().forward(input_ids=input_ids, **rest)
        cache = output.past_key_values
        written = cache.get_seq_length() - self.prompt_length
        output.logits = torch.zeros_like(output.logits)
        output.logits[:, -1, self.script[written % len(self.script)]] = 1.0
        return output


def scripted(tokenizer: PreTrainedTokenizerBase, text: str) -> Scripted:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=0,
    )
    model = Scripted(config).eval()
    model.script = tokenizer(text, add_special_tokens=False)["input_ids"]
    return model
