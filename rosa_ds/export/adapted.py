"""A trained state with its base: on the meta device, loaded beside it, or folded in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds.adapters.folder import description_file
from rosa_ds.adapters.inject import adapted_layers, inject, merge
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.quantize import load_quantized, open_quantized, other_numbers, packed_hashes
from rosa_ds.adapters.state import fill_adapter
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.checkpoints.checkpoint import is_checkpoint
from rosa_ds.checkpoints.source import run_folder
from rosa_ds.config.schema import DataSettings, MergeBase, ModelSettings
from rosa_ds.data.turn_end import stop_tokens
from rosa_ds.models.checks import is_finite
from rosa_ds.models.load import identified, identify, load_model, load_tokenizer, stored_dtype
from rosa_ds.models.stream import Base, open_base
from rosa_ds.models.task import settle_padding
from rosa_ds.utils.json_files import read_json

logger = logging.getLogger(__name__)


def load_merged(source: StoredAdapter, dtype: torch.dtype, merge_base: MergeBase = "dequantized") -> PreTrainedModel:
    """The base with its adapter folded in: summed in float32, rounded once to ``dtype``.

    A base that is stored in ``dtype``, quantised by nobody and changed by no draw is never held in float32.
    """
    settings = identified(source.description.base)
    narrow = not source.base and settings.quantization == "none" and stored_dtype(settings) == dtype
    model = load_adapted(source, dtype if narrow else torch.float32, merge_base)
    refuse_other_numbers(source.description.base, packed_hashes(model))
    merge(model)
    # buffers, such as rotary frequencies, stay in float32 as transformers keeps them
    for name, parameter in model.named_parameters():
        parameter.data = rounded(name, parameter.data, dtype)
    model.config.dtype = dtype
    return model


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the type that it is written in. Raises: ValueError for numbers that float16 has not."""
    found = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and not is_finite(found):
        raise ValueError(f"{name} has numbers beyond float16's 65,504: give --dtype bfloat16 or float32")
    return found


def refuse_other_numbers(base: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raise ValueError for a merge into other quantised numbers than were trained on. Arguments as
    :func:`rosa_ds.adapters.quantize.other_numbers`.
    """
    if problem := other_numbers(base, found):
        raise ValueError(
            f"{problem}: export where there is such a GPU and bitsandbytes as the run had, or merge into the weights as they were "
            "before (--merge-base original)"
        )


def load_adapted(source: StoredAdapter, dtype: torch.dtype, merge_base: MergeBase = "dequantized") -> PreTrainedModel:
    """The base with its adapter, not merged, in ``dtype`` with a float32 adapter.

    Args:
        merge_base: a base that was quantised, quantised again, or as it was before.

    Raises:
        ValueError: the base's weights are not those that the adapter was trained on.
    """
    settings, description = check_base(source), source.description
    if settings.quantization == "none":
        model = load_model(settings, dtype)
    elif merge_base == "dequantized":
        model = load_quantized(settings, dtype, description.config.modules_to_save)
        if problem := other_numbers(description.base, packed_hashes(model)):
            logger.warning("%s; what it says may differ a little", problem)
    else:
        return _load_on_original(source, load_model(settings, dtype))
    settle_generation(model, source, run_tokenizer(source))
    fill_adapter(model, source)
    return model.eval()


@torch.no_grad()
def _load_on_original(source: StoredAdapter, model: PreTrainedModel) -> PreTrainedModel:
    """What a quantised run has trained, on the dense base."""
    settle_generation(model, source, run_tokenizer(source))
    fill_adapter(model, dataclasses.replace(source, base={}))
    for name, layer in adapted_layers(model).items():
        if (change := source.changed(f"{name}.change")) is not None:
            layer.weight.add_(change)
            layer.drawn = True
    return model.eval()


def settle_generation(model: PreTrainedModel, source: StoredAdapter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base the padding and the stop tokens that go with what was trained. A stop token of its own stays one."""
    settle_padding(model, tokenizer)
    stops = stops_of(model, source, tokenizer)
    if not stops:
        return
    own = model.generation_config
    if stops in (own.eos_token_id, [own.eos_token_id]):
        return
    own.eos_token_id = stops
    own._from_model_config = False  # else transformers may take it from config.json again
    if own.pad_token_id is None:  # else transformers takes the first of these, and says so at each generation
        own.pad_token_id = tokenizer.pad_token_id


def stops_of(model: PreTrainedModel, source: StoredAdapter, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a generation of the base with what was trained; none of a classifier."""
    if not model.can_generate() or model.generation_config is None:
        return []
    known = stop_tokens(model.generation_config.eos_token_id, tokenizer)
    return [*known, *(token for token in source.description.stop_tokens if token not in known)]


def check_base(source: StoredAdapter) -> ModelSettings:
    """Settings that load the base of a trained state. Raises: ValueError if its weights are others now."""
    description = source.description
    settings = identified(description.base)
    if description.base.get("hash") not in (None, identify(settings)["hash"]):
        raise ValueError(
            f"{source.folder} was trained on other weights than {settings.name_or_path} has now: restore the base, or give its "
            f"path in {description_file(source.folder).name}"
        )
    return settings


def run_tokenizer(source: StoredAdapter) -> PreTrainedTokenizerBase:
    """The tokenizer that the run trained with; of a checkpoint that lies in no run the base's, with the template of its settings.

    Raises: ValueError where that template's file is gone.
    """
    folder = run_folder(source.folder) / "tokenizer"
    if folder.is_dir():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return tokenizer
    data = DataSettings()
    if is_checkpoint(source.folder):
        kept = read_json(source.folder / "state.json")["config"]["data"]
        data = DataSettings(**{name: kept[name] for name in ("chat_template", "template_arguments") if name in kept})
    return load_tokenizer(identified(source.description.base), data)


def open_adapted(source: StoredAdapter) -> tuple[PreTrainedModel, Base | None]:
    """The base injected for a trained state, without numbers, and where they are, as :func:`rosa_ds.models.stream.open_base`.

    Errors as :func:`load_adapted`.
    """
    settings, description = check_base(source), source.description
    if settings.quantization == "none":
        model, base = open_base(settings, stored_dtype(settings))
    else:
        model, base = open_quantized(settings, torch.float32, description.config.modules_to_save)
    inject(model, description.config, description.seed, draw=None, look=False)
    return model, base


def dense_change(
    layer: AdaptedLinear, source: StoredAdapter, base: Base | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``W_fixed + scale · B A − W``, (N, M): what draws and the low-rank part make of a layer that :func:`open_adapted` has."""
    changed = source.changed(layer.drawn_name)
    if changed is None:
        difference = torch.zeros(layer.weight_shape, dtype=dtype)
    elif layer.form is not None:
        difference = changed.to(dtype)
    else:
        before = layer.weight.detach() if base is None else base.rows(layer.weight_name, slice(None))
        difference = changed.to(dtype) - before.to(dtype)
    difference = difference.T if layer.transposed else difference
    if f"{layer.name}.A" not in source.trained:
        return difference
    A, B = source.trained[f"{layer.name}.A"].to(dtype), source.trained[f"{layer.name}.B"].to(dtype)
    return torch.addmm(difference, B, A, alpha=layer.scale)
