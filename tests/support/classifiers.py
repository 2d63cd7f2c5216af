"""Small bases to classify with, and a task that they learn: made for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.data.labelled import LabelledSet, find_classes, prepare_labelled

GOOD, BAD = ("fine", "lovely", "warm", "bright"), ("poor", "dull", "cold", "grim")
PLAIN = ("the", "film", "a", "day", "was", "and", "very", "soup")
ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": 24,
    "initializer_range": 0.15,
}
NEW = {
    "bert": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
}
"""What of each kind is new, and trained whole."""
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words, with the special tokens of an encoder; a decoder's has an end of text and nothing to pad or part texts with."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *PLAIN, *GOOD, *BAD])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind in DECODERS:
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_base(folder: Path, kind: str, bare: bool = False, **more: Any) -> str:
    """A random language model of two layers with its tokenizer, or its ``bare`` body."""
    torch.manual_seed(3)
    if kind == "bert":
        config: Any = BertConfig(**SIZES, **STILL, **more)
    elif kind == "roberta":
        config = RobertaConfig(**SIZES, **STILL, type_vocab_size=1, pad_token_id=1, **more)
    elif kind == "gpt2":
        sizes = {
            "n_positions": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 24,
            "initializer_range": 0.15,
        }
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more)
    else:
        config = LlamaConfig(**SIZES, num_key_value_heads=2, **more)
    language = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
    if bare:
        model = AutoModel.from_config(config)
    else:
        model = language[kind](config) if kind in language else AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return str(folder)


def make_rows(count: int, seed: int = 0, pairs: bool = False) -> list[dict[str, Any]]:
    """Texts of 3 to 7 words of which one says the class, good or bad; or pairs, whose class the second text says."""
    rng = random.Random(seed)

    def text(good: bool) -> str:
        words = rng.choices(PLAIN, k=rng.randint(2, 6))
        words.insert(rng.randrange(len(words) + 1), rng.choice(GOOD if good else BAD))
        return " ".join(words)

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        first, second = rng.random() < 0.5, rng.random() < 0.5
        if pairs:
            rows.append({"sentence1": text(first), "sentence2": text(second), "label": int(second)})
        else:
            rows.append({"text": text(first), "label": "good" if first else "bad"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(base: Path | str, *labels: str) -> ModelSettings:
    return ModelSettings(name_or_path=str(base), task="classification", labels=list(labels or ("bad", "good")))


def labelled(path: Path, kind: str, rows: list[dict[str, Any]], **more: Any) -> LabelledSet:
    classes = find_classes([write_rows(path, rows)], DataSettings())
    return prepare_labelled(str(path), "train", make_tokenizer(kind), DataSettings(**more), classes, kind == "bert")
