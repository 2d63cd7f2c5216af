"""What a model is trained for, :data:`rosa_ds.config.schema.Task`: its class in transformers, its classes, and the head that is new.

A classifier's head is what it has beside its base model, and a pooler that the base's files lack. It is trained whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rosa_ds.config.schema import ModelSettings, Task
from rosa_ds.models.checks import is_finite
from rosa_ds.utils.generators import keyed_generator

logger = logging.getLogger(__name__)
PEFT_TASKS: dict[Task, str] = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
"""What PEFT calls the tasks."""
_CLASSIFIER = "ForSequenceClassification"
_POOLER = "pooler"


def auto_class(task: Task) -> Any:
    """The class of transformers that loads a base for a task."""
    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification


def is_classifier(model: nn.Module) -> bool:
    return type(model).__name__.endswith(_CLASSIFIER)


def classes_of(config: Any) -> list[str]:
    """The classes of a classifier's config, in the order of its outputs (``LABEL_3`` is ``3``); none of another model's."""
    if not any(name.endswith(_CLASSIFIER) for name in getattr(config, "architectures", None) or ()):
        return []
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    return [name.removeprefix("LABEL_") for name in names]


def configure(config: Any, settings: ModelSettings) -> Any:
    """Give a config what the task wants of it: the classes, and no cache of keys and values, which only generation uses."""
    if settings.task == "classification":
        if settings.labels:
            config.id2label = dict(enumerate(settings.labels))
            config.label2id = {label: number for number, label in enumerate(settings.labels)}
        config.problem_type = "single_label_classification"
        config.use_cache = False
    return config


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that a classifier has beside its base model; none of another model's."""
    if not is_classifier(model):
        return []
    body: Any = model.base_model
    return [
        name for name, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    ]


def whole_modules(model: nn.Module) -> list[str]:
    """Modules of a classifier that are trained whole: its head, and a pooler that its files did not have."""
    poolers: list[str] = []
    for name in _new_poolers(getattr(model, "rosa_new", ())):
        parts = name.split(".")
        poolers.append(".".join(parts[: parts.index(_POOLER, 1) + 1]))
    return [*head_modules(model), *dict.fromkeys(poolers)]


def is_pooler(name: str) -> bool:
    """Whether a module of this name sums up a sequence, as far as names tell."""
    return name.rpartition(".")[2] == _POOLER


def new_parameters(model: nn.Module, missing: Collection[str], keeps_head: bool) -> tuple[list[str], list[str]]:
    """Parameters that begin with new numbers, and those that a base has to have and has not.

    Args:
        missing: names of the model's parameters that the base's files do not have.
        keeps_head: what the files have of a head goes on; else all of it is new.
    """
    inside = tuple(f"{name}." for name in head_modules(model))
    head = [name for name, _ in model.named_parameters() if name.startswith(inside)] if inside else []
    poolers = _new_poolers(missing) if inside else []
    fresh = {*poolers, *(set(head) & set(missing) if keeps_head else head)}
    new = [name for name, _ in model.named_parameters() if name in fresh]
    return new, [name for name in missing if name not in fresh]


def _new_poolers(names: Iterable[str]) -> list[str]:
    return [name for name in names if _POOLER in name.split(".")[1:-1]]


def new_numbers(model: Any, names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Numbers of new parameters as transformers initialises them, float32: the same for the same seed, wherever the model is."""
    numbers: dict[str, Tensor] = {}
    for name in names:
        module_name, _, part = name.rpartition(".")
        module = copy.deepcopy(model.get_submodule(module_name)).to_empty(device="cpu").float()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module.get_parameter(part).fill_(float("nan"))
            torch.manual_seed(keyed_generator(seed, name, "head").initial_seed())
            model._init_weights(module)
        numbers[name] = module.get_parameter(part).detach()
        if not is_finite(numbers[name]):
            raise ValueError(f"{type(model).__name__} does not say how {name} begins: no new head can be made for it")
    return numbers


def mark_new(model: Any, names: Iterable[str]) -> None:
    """Remember which parameters of a model are new, for :func:`whole_modules`."""
    names = tuple(names)
    model.rosa_new = names
    if names:
        logger.info("new, and not from the base: %s", ", ".join(names))


def settle_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads rows. Classifiers that read the last token find it by the padding token of their config: it and the
    tokenizer's become one.

    Raises: ValueError if neither has one.
    """
    if not is_classifier(model):
        return int(tokenizer.pad_token_id)
    config = model.config.get_text_config()
    known = config.pad_token_id
    own = (known if isinstance(known, int) and known >= 0 else None, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad_id = next((number for number in own if number is not None), None)
    if pad_id is None:
        raise ValueError(
            f"{model.name_or_path} and its tokenizer have no padding token and no end-of-text token: set pad_token_id in its config"
        )
    config.pad_token_id = model.config.pad_token_id = pad_id
    if tokenizer.pad_token_id != pad_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return int(pad_id)


def uses_types(config: Any) -> bool:
    """Whether a model tells the two texts of a pair apart by type ids, as BERT does."""
    return getattr(config, "type_vocab_size", 0) > 1


def describe_task(settings: ModelSettings) -> dict[str, Any]:
    """What an adapter or a checkpoint says of its task beside its base; nothing of ``causal-lm``, which older ones are."""
    return {} if settings.task == "causal-lm" else {"task": settings.task, "labels": settings.labels}


def check_task(where: Any, base: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError for an adapter that was trained for another task, or another number of classes, than the model is for.

    ``base`` is what the adapter says of its base.
    """
    labels = base.get("labels")
    if base.get("task", "causal-lm") == "classification" and labels is not None:
        count = getattr(getattr(model, "config", None), "num_labels", None)
        if not is_classifier(model) or count != len(labels):
            given = f"a classifier of {count} classes" if is_classifier(model) else type(model).__name__
            raise ValueError(
                f"{where} belongs to a classifier of {len(labels)} classes ({', '.join(labels)}), the model is {given}: load the "
                f"base with AutoModelForSequenceClassification and num_labels={len(labels)}"
            )
