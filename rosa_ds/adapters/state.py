"""Saving and loading what an adapter adds to its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.folder import is_peft, open_adapter, write_adapter
from rosa_ds.adapters.inject import (
    adapted_layers,
    adapter_parts,
    changed_parameters,
    check_without_engine,
    inject,
    set_submodule,
)
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.mask import set_mask
from rosa_ds.adapters.registry import DEFAULT, active_adapter, adapter_names, adapters_of, check_enabled
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.adapters.switch import park, remove_adapter, set_adapter
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.models.quantized import quantization_of
from rosa_ds.models.task import check_task
from rosa_ds.utils.files import TensorFiles
from rosa_ds.utils.suggest import did_you_mean


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    base_files: Iterable[Path] | None = None,
    stop_tokens: Iterable[int] = (),
) -> None:
    """Write an adapter folder, whole or not at all.

    Of ``lora``, ``robust`` and ``sparse`` it is one that PEFT loads, too (LORA, SUPERTUNING), with what only we need in
    ``rosa_adapter.json`` beside its files; what PEFT has no format for is in our own, and a line of the log says why.

    A model that ZeRO-3 has partitioned is saved by all ranks together (the first one writes), any other by whoever calls.

    Args:
        base: where the base comes from (name, revision, hash); by default the name it was loaded by, and how it is quantised.
        tensors: float32 numbers of the trained parameters by name, where the model's own are only a 16-bit copy.
        base_files: safetensors files with the base weights that draws have changed, by name, and what a 16-bit one leaves
            out as ``NAME/residual`` (:func:`rosa_ds.adapters.subspace.split_bits`): they are linked. By default the model's
            own weights are written.
        stop_tokens: ids that end what the model was trained to write; evaluation and exports stop there.

    Raises: ValueError for a model without an adapter, or with one that is disabled; for ``tensors`` that are not all of them.
    """
    check_enabled(model)
    adapter = active_adapter(model)
    if base is None:
        base = {
            "name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
            **quantization_of(model),
        }
    shared = any(zero.is_partitioned(parameter) for parameter in model.parameters())
    read = zero.read_to_owners if shared else dict
    parts, whole = adapter_parts(model), set(adapter.whole)  # also if they are frozen now, as for inference
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in whole or parts.get(id(parameter), "positions") != "positions"
    }
    tensors = read(trained) if tensors is None else tensors
    drawn = {layer.drawn_name: layer.drawn_parameter for layer in adapted_layers(model).values() if layer.drawn}
    changed = read(drawn) if base_files is None else {}
    positions = read(known_positions(model))
    description = AdapterDescription(adapter.config, adapter.seed, dict(base), tuple(stop_tokens))
    stored = StoredAdapter(Path(folder), description, tensors, positions, changed)
    with distributed.together() if shared else contextlib.nullcontext():
        if distributed.is_main() or not shared:
            check_fit(folder, tensors, list(tensors), trained)
            write_adapter(model, stored, base_files or ())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def known_positions(model: nn.Module) -> dict[str, Tensor]:
    """Weight name -> the parameter with the positions, perhaps partitioned, of the layers whose mask is known."""
    return {
        layer.weight_name: layer.positions
        for layer in adapted_layers(model).values()
        if layer.positions is not None and layer.mask_known
    }


@torch.no_grad()
def load_adapter(
    model: nn.Module, folder: str | Path, name: str = DEFAULT, keep_base: bool = False
) -> AdapterDescription:
    """Give a model the adapter of a folder, of ours or of PEFT.

    A base model gets its layers injected. An adapter of the same name is given other numbers, which must fit. Under another
    name it comes beside those that are there: :func:`rosa_ds.set_adapter` goes from one to the other.

    Args:
        keep_base: as in :func:`rosa_ds.inject`.

    Raises:
        ValueError: the folder is no adapter, or its tensors do not fit the model (named); the model's numbers are
            then unchanged. As :func:`rosa_ds.disable` for a model whose base cannot be put back for another adapter.
    """
    before = adapters_of(model).active
    present = name in adapter_names(model)
    if present and is_peft(Path(folder)):
        raise ValueError(
            f"the model has an adapter {name!r}: give {folder} another name, or rosa_ds.remove_adapter first"
        )
    if not present:
        park(model)
    try:
        with contextlib.closing(open_adapter(Path(folder), model)) as stored:
            description = stored.description
            if present:
                set_adapter(model, name)
            else:
                check_task(folder, description.base, model)
                inject(
                    model, description.config, description.seed, draw=None, keep_base=keep_base, name=name, look=False
                )
            fill_adapter(model, stored)
            return description
    except BaseException:
        if not present:
            _abandon(model)
        if before is None:
            park(model)
        else:
            set_adapter(model, before.name)
        raise


def _abandon(model: nn.Module) -> None:
    """Take an adapter out again that could not be loaded, with the base's own numbers where they were kept."""
    adapter = adapters_of(model).active
    if adapter is not None:
        adapter.whole = [name for name in adapter.whole if name in adapter.kept]
        for layer in adapted_layers(model).values():
            layer.drawn = layer.drawn and layer.drawn_name in adapter.kept
        remove_adapter(model, adapter.name)
    for layer_name, layer in adapted_layers(model).items():  # for lack of memory it was left half way
        set_submodule(model, layer_name, layer.base_layer())


@torch.no_grad()
def fill_adapter(model: nn.Module, stored: StoredAdapter) -> None:
    """Inject a model where it has no adapter yet, and give it trained numbers, positions and a changed base.

    Errors as :func:`load_adapter`, which name the folder.
    """
    where, description = stored.folder, stored.description
    check_task(where, description.base, model)
    if adapters_of(model).active is None:
        inject(model, description.config, description.seed, draw=None, look=False)
    elif different := _differing(description.config, active_adapter(model).config):
        raise ValueError(
            f"{where} has another form than the adapter in the model ({different}): load it into the plain base model"
        )
    parameters = trained_parameters(model)
    check_without_engine(model)
    changed = [name for name in stored.base if not name.endswith("/residual")]
    if not changed and any(layer.drawn for layer in adapted_layers(model).values()):
        raise ValueError(
            f"{where} has no changed base, and the model has been drawn from its own: load it into the plain base model"
        )
    layers = {layer.drawn_name: layer for layer in adapted_layers(model).values() if layer.rank and changed}
    _check_quantized(where, changed, layers)
    check_fit(where, stored.trained, list(stored.trained), parameters)
    check_fit(where, stored.base, changed, {name: layer.drawn_parameter for name, layer in layers.items()})
    if stored.positions:
        set_mask(model, stored.positions)
    for layer in layers.values():
        layer.drawn = True
    try:
        for name in stored.trained:
            zero.write_whole(parameters[name], stored.trained[name])
        for name in changed:
            changed_weight = stored.changed(name)
            assert changed_weight is not None
            zero.write_whole(layers[name].drawn_parameter, changed_weight)
    except BaseException as error:
        lost = set(changed_parameters(model)) - set(active_adapter(model).kept)
        again = "the base model and the adapter" if lost else "the adapter"
        error.add_note(f"{where} was being written into the model: load {again} again")
        raise


def _differing(stored: AdapterConfig, present: AdapterConfig) -> str:
    """The settings that keep one adapter's tensors from being the other's, with both values."""
    says_nothing = {"dropout", "low_rank_lr", "sparse_lr", "partition_positions", "sparse_product"}
    theirs, ours = stored.model_dump(exclude=says_nothing), present.model_dump(exclude=says_nothing)
    return "; ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in theirs if theirs[name] != ours[name])


def _check_quantized(where: str | Path, changed: list[str], layers: Mapping[str, AdaptedLinear]) -> None:
    """Raise ValueError for a changed base of the other kind than the model's, dense or quantised."""
    if changed and not layers.keys() & set(changed):
        quantized = changed[0].endswith(".change")
        kinds = ("a quantised base", "dense") if quantized else ("a dense base", "quantised")
        raise ValueError(
            f"{where} was drawn from {kinds[0]}, and the model's is {kinds[1]}: give the base that it was trained on"
        )


def check_changes(where: str | Path, base: Iterable[str], model: nn.Module) -> None:
    """Raise ValueError for a changed base that no layer of the model is drawn from."""
    changed = [name for name in base if not name.endswith("/residual")]
    layers = {layer.drawn_name: layer for layer in adapted_layers(model).values()}
    _check_quantized(where, changed, layers)
    if wrong := sorted(set(changed) - set(layers)):
        raise ValueError(f"{where}: {wrong[0]} is not in the model.{did_you_mean(wrong[0], layers)}")


def check_fit(
    where: str | Path, tensors: Mapping[str, Tensor], names: list[str], parameters: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the adapter has just these parameters, in their shapes."""
    if wrong := sorted(set(names) ^ set(parameters)):
        place, there = ("model", list(parameters)) if wrong[0] in names else ("adapter", names)
        raise ValueError(f"{where}: {wrong[0]} is not in the {place}.{did_you_mean(wrong[0], there)}")
    for name in names:
        found = tensors.shape(name) if isinstance(tensors, TensorFiles) else tuple(tensors[name].shape)
        if found != (shape := tuple(zero.full_shape(parameters[name]))):
            resized = len(found) == 2 and found[1:] == shape[1:]
            more = (
                ", or one whose embedding was resized? Save the resized model and give that folder" if resized else "?"
            )
            raise ValueError(f"{where}: {name} is {found}, the model's is {shape}: is it another base{more}")
