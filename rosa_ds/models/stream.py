"""A base for ZeRO-3: its shape on the meta device, and its numbers read from safetensors a few rows at a time.

No rank ever holds the base, or reads more of it than its own share.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rosa_ds import zero
from rosa_ds.config.schema import ModelSettings
from rosa_ds.models.checks import is_finite, not_finite
from rosa_ds.models.convert import Conversion, NotStreamableError, match_tensors
from rosa_ds.models.load import check_files, check_language_model, damaged, keeps_head, load_model, read_config, resolve
from rosa_ds.models.task import auto_class, mark_new, new_numbers, new_parameters
from rosa_ds.models.weights import SINGLE, find_safetensors

logger = logging.getLogger(__name__)


def open_base(settings: ModelSettings, dtype: torch.dtype, seed: int = 42) -> tuple[PreTrainedModel, Base | None]:
    """A base model whose parameters are on the meta device, and where their numbers are.

    A checkpoint that is not safetensors is loaded whole on every rank, with a warning; there is then nothing left to read.

    Args:
        seed: of a classifier's head, as in :func:`rosa_ds.models.load.load_model`.

    Raises: ValueError as :func:`rosa_ds.models.load.load_model`.
    """
    try:
        return stream_base(settings, dtype, seed)
    except NotStreamableError as reason:
        return load_whole(settings, dtype, reason, seed), None


def stream_base(settings: ModelSettings, dtype: torch.dtype, seed: int = 42) -> tuple[PreTrainedModel, Base]:
    """As :func:`open_base`, but NotStreamableError for a checkpoint that cannot be read parameter by parameter."""
    name, arguments = resolve(settings.name_or_path)
    if "gguf_file" in arguments:
        raise NotStreamableError("it is a .gguf file")
    check_files(settings)
    if settings.task == "causal-lm":
        check_language_model(settings)
    config = read_config(settings)
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamableError("its weights are quantised")
    if getattr(config, "transformers_weights", None) is not None:
        raise NotStreamableError("its config names other weight files")
    model, revision = build_on_meta(config, settings, dtype), settings.revision or "main"
    base = _match(model, *_tensors(name, revision), seed, keeps_head(settings))
    model.name_or_path = name
    if model.can_generate():
        with contextlib.suppress(OSError):  # a base without one uses its config's
            model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    return model.eval(), base


def build_on_meta(config: Any, settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device. Raises: ValueError if there is no such model."""
    more = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    try:
        with parameters_on_meta():
            model = auto_class(settings.task).from_config(config, dtype=dtype, trust_remote_code=False, **more)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model.name_or_path {settings.name_or_path!r} cannot be loaded: {error}") from error
    return _completed(model)


def build_like(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """As :func:`build_on_meta`, of a class of transformers."""
    with parameters_on_meta():
        model = kind._from_config(config, dtype=dtype)
    return _completed(model)


def _completed(model: PreTrainedModel) -> PreTrainedModel:
    """A model on the meta device with its buffers, and with weights that are shared."""
    with torch.random.fork_rng(devices=[]):
        _compute_buffers(model)
    model.tie_weights()
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute buffers again as ``from_pretrained`` does: in float32, and then rounded to the model's type.

    A model that is built in a type of 16 bits has computed them in it: GPT-J's table of rotations is off by 0.36 then.
    """
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside the block new modules have parameters without memory; buffers are computed as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _tensors(name: str, revision: str) -> tuple[dict[str, Path], dict[str, torch.Size]]:
    """Tensor name -> file, and its shape, of a checkpoint in safetensors, downloaded where it is on the hub.

    As transformers does, all that is in the shards counts, whatever their index lists.
    """
    try:
        single, shards = find_safetensors(name, revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.name_or_path {name!r} cannot be loaded: {error}") from error
    if single is None and not shards:
        raise NotStreamableError(f"it has no {SINGLE}")
    files: dict[str, Path] = {}
    shapes: dict[str, torch.Size] = {}
    for path in sorted(set(shards.values())) if single is None else [single]:
        try:
            with safe_open(path, framework="pt") as reader:
                for key in [*reader.keys()]:
                    files[key], shapes[key] = path, torch.Size(reader.get_slice(key).get_shape())
        except SafetensorError as error:
            raise damaged(name, str(path), error) from error
    return files, shapes


def _match(
    model: PreTrainedModel, files: dict[str, Path], shapes: dict[str, torch.Size], seed: int, keeps: bool
) -> Base:
    """The checkpoint under the model's names, and new numbers for a classifier's head unless it ``keeps`` that of the base.

    Raises NotStreamableError unless every other parameter has its tensors.
    """
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    plain, conversions = match_tensors(model, shapes)
    known = plain.keys() | conversions.keys()
    new, missing = new_parameters(model, [name for name in wanted if name not in known], keeps)
    if missing:
        raise NotStreamableError(f"it has no tensor for {missing[0]} ({len(missing)} parameters)")
    numbers = {name: tensor.to(model.dtype) for name, tensor in new_numbers(model, new, seed).items()}
    names = {name: key for name, key in plain.items() if name not in numbers and (name in wanted or name in buffers)}
    base = Base(files, names, numbers, conversions)
    mark_new(model, new)
    for name, shape in wanted.items():
        if (found := base.shape(name)) != shape:
            raise NotStreamableError(f"{names.get(name, name)} is {tuple(found)} and {name} {tuple(shape)}")
    _check_tied(model, Base(files, plain))
    with torch.no_grad():
        for name, buffer in buffers.items():
            if name in base.stored_names():
                stored = base.rows(name, slice(None))
                module, _, own = name.rpartition(".")
                model.get_submodule(module)._buffers[own] = (
                    stored.to(buffer.dtype) if buffer.is_meta else buffer.copy_(stored)
                )
            elif buffer.is_meta:
                raise NotStreamableError(f"it has no tensor for {name}, which is made of a parameter")
    base.close()
    return base


def _check_tied(model: PreTrainedModel, base: Base) -> None:
    """Tied weights that a checkpoint has twice must be equal: else transformers unties them. Compared some rows at a time."""
    named: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = named.setdefault(id(parameter), name)
        if first == name or not {first, name} <= base.names.keys():
            continue
        for start in range(0, len(parameter), 4096):
            rows = slice(start, min(start + 4096, len(parameter)))
            if not torch.equal(base.rows(first, rows), base.rows(name, rows)):
                raise NotStreamableError(f"{first} and {name} are tied by its config and not equal")


class Base:
    """The parameters of a model as they come from the tensors of a checkpoint, opened as they are needed.

    Args:
        files: tensor name in the checkpoint -> its file.
        names: parameter or buffer name in the model -> tensor name.
        new: numbers of parameters that the checkpoint has not, such as those of a classifier's head.
        conversions: parameter name -> how it is made of several tensors, or of one in another form.
    """

    def __init__(
        self,
        files: dict[str, Path],
        names: dict[str, str],
        new: dict[str, Tensor] | None = None,
        conversions: dict[str, Conversion] | None = None,
    ) -> None:
        self.files, self.names, self.new, self.conversions = files, names, new or {}, conversions or {}
        self._readers: dict[Path, Any] = {}
        self._asked = ""
        self._made: dict[str, Tensor] = {}

    def stored_names(self) -> set[str]:
        """What the checkpoint has, by its name in the model."""
        return {*self.names, *self.conversions}

    def _ask(self, name: str) -> None:
        """Keep no other files open than those of one name: the pages of a mapped file count as this process's memory."""
        if name == self._asked:
            return
        conversion = self.conversions.get(name)
        if name not in self._made:
            self._made = {}
        paths = {self.files[key] for key in ([self.names[name]] if conversion is None else conversion.keys)}
        self._readers = {path: reader for path, reader in self._readers.items() if path in paths}
        self._asked = name

    def _reader(self, key: str) -> Any:
        path = self.files[key]
        if path not in self._readers:
            self._readers[path] = safe_open(path, framework="pt")
        return self._readers[path]

    def unconverted(self) -> Base:
        """The tensors that are converted, as they lie in the files, by their own names."""
        keys = [key for conversion in self.conversions.values() for key in conversion.keys]
        return Base(self.files, dict(zip(keys, keys, strict=True)))

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self._reader(key).get_tensor(key)
        return tensor

    def shape(self, name: str) -> torch.Size:
        if name in self.new:
            return self.new[name].shape
        if name in self.conversions:
            return self.conversions[name].shapes[name]
        self._ask(name)
        key = self.names[name]
        return torch.Size(self._reader(key).get_slice(key).get_shape())

    def rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a parameter, or all of one without dimensions. Of one that is converted no more is made than has to be."""
        if name in self.new:
            return self.new[name][rows]
        self._ask(name)
        if name not in self.conversions:
            key = self.names[name]
            part: Tensor = self._reader(key).get_slice(key)[rows] if self.shape(name) else self._read(key)
            return part
        conversion = self.conversions[name]
        if conversion.stacks:
            return conversion.run(self._read, rows)[name]
        if name not in self._made:
            self._made = conversion.run(self._read)
        made = self._made[name]
        return made[rows] if made.ndim else made

    def fill(self, name: str, parameter: nn.Parameter, target: Tensor, rows: slice) -> None:
        """See :data:`rosa_ds.zero.sharded.Fill`."""
        for some in self._pieces(name, rows):
            part = self.rows(name, some)
            if part.is_floating_point() and not is_finite(part):
                raise not_finite(name, ", ".join(map(str, self._readers)))
            (target[some] if target.ndim else target).copy_(part)

    def _pieces(self, name: str, rows: slice) -> list[slice]:
        """The rows one by one where each is made for itself, such as one expert's."""
        if name not in self.conversions or not self.conversions[name].stacks:
            return [rows]
        return [slice(row, row + 1) for row in range(*rows.indices(self.shape(name)[0]))]

    def close(self) -> None:
        self._readers, self._asked, self._made = {}, "", {}


def load_whole(
    settings: ModelSettings, dtype: torch.dtype, reason: NotStreamableError, seed: int = 42
) -> PreTrainedModel:
    """:func:`rosa_ds.models.load.load_model`, with a warning that says why."""
    model = load_model(settings, dtype, seed)
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    logger.warning(
        "%s is loaded whole on every rank first, %.2f GiB each (%s): save it once with transformers' "
        "save_pretrained(folder, save_original_format=False) to avoid that",
        settings.name_or_path,
        size / 2**30,
        reason,
    )
    return model


@torch.no_grad()
def allocate(model: nn.Module, fill: zero.Fill, device: torch.device) -> None:
    """Give all parameters that are on the meta device memory on ``device``, and ``fill`` their numbers.

    Shared parameters stay shared.
    """
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(prefix, recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in done:
                numbers = torch.empty_like(parameter, device=device)
                fill(name, parameter, numbers, slice(None))
                done[id(parameter)] = nn.Parameter(numbers, requires_grad=parameter.requires_grad)
            module._parameters[name.rpartition(".")[2]] = done[id(parameter)]
