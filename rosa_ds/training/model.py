"""The model that a run trains: base, adapters, and at stage 3 their division over the ranks."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rosa_kernels
from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers, inject
from rosa_ds.adapters.quantize import QuantizedNumbers, allocate_quantized, open_quantized, quantized_forms
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.prepare import TokenSet
from rosa_ds.models.load import enable_checkpointing, load_model
from rosa_ds.models.quantized import PACKED, SCALES
from rosa_ds.models.stream import Base, open_base
from rosa_ds.models.task import settle_padding
from rosa_ds.zero.schema import leaf_modules

logger = logging.getLogger(__name__)
POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""What transformers calls embeddings of positions."""


def load_base(settings: RunConfig, plan: DeepSpeedPlan) -> tuple[PreTrainedModel, Base | None]:
    """The base; at stage 3 its shape alone, where possible, and where its numbers are."""
    dtype, seed = getattr(torch, plan.dtype), settings.training.seed
    quantized = settings.model.quantization != "none"
    base: Base | None = None
    with distributed.together(), distributed.main_first():  # all leave if one fails: what follows is collective
        if quantized:
            model, base = open_quantized(settings.model, dtype, settings.adapter.modules_to_save, seed=seed)
        elif plan.stage == 3:
            model, base = open_base(settings.model, dtype, seed)
        else:
            model = load_model(settings.model, dtype, seed)
    if quantized and base is not None and plan.stage < 3:
        allocate_quantized(model, base)
        base = None
    return model, base


def _partition(model: PreTrainedModel, base: Base | None, plan: DeepSpeedPlan) -> None:
    """Divide base and adapters over the ranks, one parameter at a time."""
    layers = adapted_layers(model)
    quantized = None if base is None else QuantizedNumbers(quantized_forms(model), base)

    def fill(name: str, parameter: nn.Parameter, target: Tensor, rows: slice) -> None:
        module, _, part = name.rpartition(".")
        if module in layers and part in ("A", "B", "values"):
            target.copy_(layers[module].initial_parameters()[part])
        elif not parameter.is_meta:
            zero.keep_numbers(name, parameter, target, rows)
        elif module in layers and part in ("positions", "change"):
            target.zero_()  # before a mask is known, or a draw made
        elif quantized is not None and module in quantized.forms and part in (PACKED, SCALES):
            target.copy_(quantized.read(module, part))
        else:
            assert base is not None, f"nothing to fill {name} with"
            base.fill(name, parameter, target, rows)

    zero.partition_model(model, plan.config, getattr(torch, plan.dtype), fill)
    if base is not None:
        base.close()


def _check_leaf_modules(model: PreTrainedModel, section: Mapping[str, Any]) -> None:
    """Modules that the file has gathered as one: what is trained deeper in them fails in DeepSpeed's backward.

    Raises: ValueError for such a module.
    """
    if not section.get("leaf_module"):
        return
    leaves = leaf_modules(model, section)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for leaf in leaves:
        below = [name for name in trained if name.startswith(f"{leaf}.") and "." in name.removeprefix(f"{leaf}.")]
        if below:
            raise ValueError(
                f"zero_optimization.leaf_module has {leaf} gathered as one, and {below[0]} inside of it is trained, which fails in "
                "backward: leave the module out there, or its layers out of adapter.target_modules"
            )
    if not leaves:
        logger.warning("setting without effect: zero_optimization.leaf_module (this model has no such module)")


def adapt(model: PreTrainedModel, base: Base | None, settings: RunConfig, plan: DeepSpeedPlan) -> PreTrainedModel:
    """Give a base, as :func:`load_base` makes it, its adapters, and at stage 3 divide both over the ranks. Collective there.

    Raises: ValueError for targets that match nothing, and for such inside of a leaf module of stage 3.
    """
    report = inject(model, settings.adapter_config(), settings.training.seed, draw=None, look=False)
    if settings.parts.everything and getattr(model.config.get_text_config(), "router_aux_loss_coef", None):
        logger.warning("the routers' auxiliary loss (router_aux_loss_coef) is not part of the loss that is trained")
    logger.info("%s, %s: %s", settings.model.name_or_path, plan.dtype, report)
    if report.adapted:
        chosen = rosa_kernels.explain(distributed.device())
        logger.info("kernels: %s", "; ".join(f"{op} {c.implementation} ({c.reason})" for op, c in chosen.items()))
    if plan.stage == 3:
        _check_leaf_modules(model, plan.config["zero_optimization"])
        _partition(model, base, plan)
    enable_checkpointing(model, settings.training.gradient_checkpointing)
    return model


def check_vocabulary(model: PreTrainedModel, data: Mapping[str, TokenSet], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for tokens that the model's embedding has no row for, with the data's name."""
    embedding = model.get_input_embeddings()
    rows = zero.full_shape(embedding.weight)[0]
    head = model.get_output_embeddings()
    apart = head is not None and head.weight is not embedding.weight
    whole = [name for name, module in model.named_modules() if module is embedding or (apart and module is head)]
    largest = {"the padding token": int(tokenizer.pad_token_id)} | {key: d.largest_id() for key, d in data.items()}
    for what, number in largest.items():
        if number >= rows:
            raise ValueError(
                f"{what} has token {number} ({tokenizer.convert_ids_to_tokens(number)!r}), the model's embedding has {rows} rows "
                f"and the tokenizer {len(tokenizer)} tokens: resize the model once (model.resize_token_embeddings({len(tokenizer)}), "
                "save_pretrained), give that folder as model.name_or_path, and train the new rows with "
                f"adapter.modules_to_save {json.dumps(whole)}"
            )


def check_positions(model: PreTrainedModel, data: Mapping[str, TokenSet]) -> None:
    """Raise ValueError for rows with more tokens than the model has learnt positions for; rotary ones have no end."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in POSITIONS:
            continue
        # with a padding index positions are counted from behind it
        known = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        known -= int(getattr(module, "offset", 0))  # OPT's and BART's first are never used
        for what, tokens in data.items():
            if (longest := int(tokens.lengths.max())) > known:
                raise ValueError(
                    f"{what} has a row of {longest} tokens, {name} has positions for {known}: set data.max_length "
                    f"{known} and data.too_long truncate or drop"
                )


def check_readable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TokenSet, eval_data: TokenSet | None
) -> None:
    """Raise ValueError for data that the model, also one without numbers, cannot read."""
    sets = {"data.train": data, "data.eval": eval_data}
    known = {f"{what} ({tokens.name})": tokens for what, tokens in sets.items() if tokens is not None}
    check_vocabulary(model, known, tokenizer)
    check_positions(model, known)


def load_checked_base(
    settings: RunConfig,
    plan: DeepSpeedPlan,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenSet,
    eval_data: TokenSet | None,
) -> tuple[PreTrainedModel, Base | None, int]:
    """The base as :func:`load_base` gives it, and the token that pads its rows.

    Raises: ValueError, on all ranks, for a base that cannot be loaded, or cannot read the data.
    """
    with distributed.together():
        model, numbers = load_base(settings, plan)
        pad_id = settle_padding(model, tokenizer)
        check_readable(model, tokenizer, data, eval_data)
    return model, numbers, pad_id


def divide_positions(model: nn.Module) -> None:
    """Leave each rank its share of every mask, whole only while its layer runs. After DeepSpeed has taken the model."""
    ahead = zero.GatherAhead()
    for layer in adapted_layers(model).values():
        if layer.positions is not None:
            zero.divide(layer.positions)
            layer.around = functools.partial(ahead.whole, layer.positions)
