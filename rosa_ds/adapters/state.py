"""Saving and loading what an adapter adds to its base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers, changed_parameters, check_without_engine, inject, set_submodule
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.mask import set_mask
from rosa_ds.adapters.peft_folder import is_peft, read_peft
from rosa_ds.adapters.registry import DEFAULT, adapter_names, adapters_of, check_enabled
from rosa_ds.adapters.subspace import join_bits
from rosa_ds.adapters.switch import park, remove_adapter, set_adapter
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.config.validation import validation_message
from rosa_ds.models.quantized import quantization_of
from rosa_ds.models.task import check_task
from rosa_ds.utils.files import (
    TensorFiles,
    link_file,
    write_json,
    write_manifest,
    write_tensors,
    written_folder,
)
from rosa_ds.utils.json_files import read_json
from rosa_ds.utils.suggest import did_you_mean

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
BASE_FILES = "base-"


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """What an adapter folder says of itself: enough to build the adapted model again."""

    config: AdapterConfig
    seed: int
    base: dict[str, Any]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the parameter of the base that draws write, perhaps partitioned, of the layers whose low-rank part is a piece of it."""
    return {layer.drawn_name: layer.drawn_parameter for layer in adapted_layers(model).values() if layer.drawn}


def known_positions(model: nn.Module) -> dict[str, Tensor]:
    """Weight name -> the parameter with the positions, perhaps partitioned, of the layers whose mask is known."""
    return {
        layer.weight_name: layer.positions
        for layer in adapted_layers(model).values()
        if layer.positions is not None and layer.mask_known
    }


def describe(model: nn.Module, base: Mapping[str, Any] | None = None) -> AdapterDescription:
    """The description of an injected model. ``base`` says where it comes from; by default the name it was loaded by, and how it
    is quantised.
    """
    injected = getattr(model, "rosa_injected", None)
    if injected is None:
        raise ValueError("this model has no adapter: rosa_ds.inject(model, config) comes first")
    if base is None:
        base = {
            "name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
            **quantization_of(model),
        }
    config, seed = injected
    return AdapterDescription(config, seed, dict(base))


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    base_files: Iterable[Path] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    A model that ZeRO-3 has partitioned is saved by all ranks together (the first one writes), any other by whoever calls.

    Args:
        base: where the base comes from (name, revision, hash); by default the name it was loaded by.
        tensors: float32 numbers of the trained parameters by name, where the model's own are only a 16-bit copy.
        base_files: safetensors files with the base weights that draws have changed, by name, and what a 16-bit one leaves
            out as ``NAME/residual`` (:func:`rosa_ds.adapters.subspace.split_bits`): they are linked. By default the model's
            own weights are written.
    """
    check_enabled(model)
    description = describe(model, base)
    shared = any(zero.is_partitioned(parameter) for parameter in model.parameters())
    read = zero.read_to_owners if shared else dict
    tensors = read(trained_parameters(model)) if tensors is None else tensors
    changes = read(changed_weights(model)) if base_files is None else {}
    content = {f"trained.{name}": tensor.detach() for name, tensor in tensors.items()}
    content |= {f"positions.{name}": positions for name, positions in read(known_positions(model)).items()}
    with distributed.together() if shared else contextlib.nullcontext():
        if distributed.is_main() or not shared:
            _write(Path(folder), content, changes, base_files or (), description)


def _write(
    folder: Path,
    content: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    base_files: Iterable[Path],
    description: AdapterDescription,
) -> None:
    with written_folder(folder) as temporary:
        write_tensors(temporary / TENSOR_FILE, content, {"format": "pt"})
        if changes:
            write_tensors(temporary / f"{BASE_FILES}00000.safetensors", changes)
        for number, path in enumerate(sorted(base_files)):
            link_file(path, temporary / f"{BASE_FILES}{number:05d}.safetensors")
        write_json(
            temporary / CONFIG_FILE,
            {
                "format": "rosa_ds adapter",
                "format_version": FORMAT_VERSION,
                "config": description.config.model_dump(),
                "seed": description.seed,
                "base": description.base,
            },
        )
        write_manifest(temporary)


def read_description(folder: str | Path) -> AdapterDescription:
    """What ``adapter_config.json`` says. Raises ValueError if the folder holds no adapter of ours, or a newer one."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    content = read_json(path)
    if content.get("format") != "rosa_ds adapter":
        raise ValueError(f"{path} is not an adapter of rosa_ds")
    version = content.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path} has format version {version!r}, this rosa_ds reads up to {FORMAT_VERSION}: it was written by a newer one, "
            "update this one (pip install -U rosa-ds), or export the adapter merged where it was made"
        )
    try:
        return AdapterDescription(AdapterConfig(**content["config"]), content["seed"], content["base"])
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is damaged; take the folder from its run again") from None
    except (TypeError, ValidationError) as error:
        fields = list(AdapterConfig.model_fields)
        said = validation_message(error, "config", fields) if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{path} has settings that this rosa_ds does not read ({said}): it is damaged, or a newer one has written it"
        ) from None


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter on the disk: ``trained`` by parameter name, ``positions`` and changed ``base`` by weight name."""

    description: AdapterDescription
    trained: Mapping[str, Tensor]
    positions: Mapping[str, Tensor]
    base: Mapping[str, Tensor]

    def close(self) -> None:
        """Give back what is read only when it is asked for."""
        for part in (self.trained, self.positions, self.base):
            if isinstance(part, TensorFiles):
                part.close()


def open_adapter(folder: str | Path, model: nn.Module) -> StoredAdapter:
    """A folder of ours or of PEFT, for a base ``model`` (which says what PEFT leaves unsaid).

    Raises: ValueError if it is none, or one of PEFT's that no adapter here can be.
    """
    folder = Path(folder)
    if is_peft(folder):
        found = read_peft(folder, model)
        return StoredAdapter(AdapterDescription(found.config, 42, found.base), found.trained, found.positions, {})
    description = read_description(folder)
    content = TensorFiles([folder / TENSOR_FILE])
    base = TensorFiles(sorted(folder.glob(f"{BASE_FILES}*.safetensors")))
    return StoredAdapter(description, content.under("trained."), content.under("positions."), base)


def _shape_of(config: AdapterConfig) -> dict[str, Any]:
    """The settings that decide what an adapter's tensors mean."""
    return config.model_dump(exclude={"dropout", "low_rank_lr", "sparse_lr", "partition_positions", "sparse_product"})


def _differing(stored: AdapterConfig, present: AdapterConfig) -> str:
    """The settings that keep one adapter's tensors from being the other's, with both values."""
    theirs, ours = _shape_of(stored), _shape_of(present)
    return "; ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in theirs if theirs[name] != ours[name])


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
    if name in adapter_names(model):
        if is_peft(Path(folder)):
            raise ValueError(
                f"the model has an adapter {name!r}: give {folder} another name, or rosa_ds.remove_adapter first"
            )
        with contextlib.closing(open_adapter(folder, model)) as stored:
            set_adapter(model, name)
            try:
                fill_adapter(model, folder, stored.description, stored.trained, stored.positions, stored.base)
            except BaseException:
                _go_back(model, before)
                raise
            return stored.description
    park(model)
    try:
        with contextlib.closing(open_adapter(folder, model)) as stored:
            description = stored.description
            check_task(folder, description.base, model)
            inject(model, description.config, description.seed, draw=None, keep_base=keep_base, name=name)
            fill_adapter(model, folder, description, stored.trained, stored.positions, stored.base)
            return description
    except BaseException:
        _abandon(model)
        _go_back(model, before)
        raise


def _abandon(model: nn.Module) -> None:
    """Take an adapter out again that could not be loaded, with the base's own numbers where they were kept."""
    known = adapters_of(model)
    known.whole = [name for name in known.whole if name in known.kept]
    for layer in adapted_layers(model).values():
        layer.drawn = layer.drawn and layer.drawn_name in known.kept
    if known.active is not None:
        remove_adapter(model, known.active)
    for layer_name, layer in adapted_layers(model).items():  # for lack of memory it was left half way
        set_submodule(model, layer_name, layer.base_layer())


def _go_back(model: nn.Module, before: str | None) -> None:
    """The adapter that was in the model before, or none."""
    if before is None:
        park(model)
    else:
        set_adapter(model, before)


@torch.no_grad()
def fill_adapter(
    model: nn.Module,
    where: str | Path,
    description: AdapterDescription,
    trained: Mapping[str, Tensor],
    positions: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> None:
    """Inject a model where it has no adapter yet, and give it trained numbers, positions and a changed base.

    Errors as :func:`load_adapter`, which name ``where``.
    """
    check_task(where, description.base, model)
    if getattr(model, "rosa_injected", None) is None:
        inject(model, description.config, description.seed, draw=None)
    elif different := _differing(description.config, describe(model).config):
        raise ValueError(
            f"{where} has another form than the adapter in the model ({different}): load it into the plain base model"
        )
    parameters = trained_parameters(model)
    check_without_engine(model)
    changed = [name for name in base if not name.endswith("/residual")]
    if not changed and any(layer.drawn for layer in adapted_layers(model).values()):
        raise ValueError(
            f"{where} has no changed base, and the model has been drawn from its own: load it into the plain base model"
        )
    layers = {layer.drawn_name: layer for layer in adapted_layers(model).values() if layer.rank and changed}
    _check_quantized(where, changed, layers)
    check_fit(where, trained, list(trained), parameters)
    check_fit(where, base, changed, {name: layer.drawn_parameter for name, layer in layers.items()})
    if positions:
        set_mask(model, positions)
    for layer in layers.values():
        layer.drawn = True
    try:
        for name in trained:
            zero.write_whole(parameters[name], trained[name])
        for name in changed:
            zero.write_whole(layers[name].drawn_parameter, join_bits(base[name], base.get(f"{name}/residual")))
    except BaseException as error:
        lost = set(changed_parameters(model)) - set(adapters_of(model).kept)
        again = "the base model and the adapter" if lost else "the adapter"
        error.add_note(f"{where} was being written into the model: load {again} again")
        raise


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
            raise ValueError(f"{where}: {name} is {found}, the model's is {shape}: {_other_base(found, shape)}")


def _other_base(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(found) == 2 and found[1:] == wanted[1:]:
        return "is it another base, or one whose embedding was resized? Save the resized model and give that folder"
    return "is it another base?"
