"""Quantise a base: which layers, and one after another, so that the dense base is never there as a whole."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers, set_submodule
from rosa_ds.adapters.targets import head_names, linear_layers, match_names
from rosa_ds.config.schema import ModelSettings
from rosa_ds.models.convert import NotStreamableError
from rosa_ds.models.load import stored_dtype
from rosa_ds.models.quantized import PACKED, SCALES, Form, Kind, QuantizedLinear
from rosa_ds.models.stream import Base, allocate, load_whole, stream_base
from rosa_ds.models.task import whole_modules
from rosa_ds.utils.logs import log_once
from rosa_ds.utils.packages import require_bitsandbytes
from rosa_ds.utils.texts import kind_of

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Layers that the ranks quantise at the same time, one each."""


def quantize(
    model: nn.Module,
    kind: Kind,
    double: bool = True,
    dtype: torch.dtype | None = None,
    skip: Iterable[str] = (),
    device: torch.device | None = None,
) -> nn.Module:
    """Keep the linear layers' weights in 4 or 8 bits, but for the output head's. Before :func:`rosa_ds.inject`.

    Args:
        model: changed in place, one layer after another; those on the meta device become quantised layers on the meta device.
        kind: ``nf4`` or ``int8``; ``double``: of ``nf4``, the blocks' scales in 8 bits, too.
        dtype: in which the layers compute; by default the model's.
        skip: modules that stay dense with all that is in them, by name or name ending: what is trained whole.
        device: to quantise on and to keep the layers on; by default where each is.

    Returns: the same model.
    Raises: ValueError without bitsandbytes, for an injected model, a type that it does not know, or a module to skip that is not there.
    """
    require_bitsandbytes("model.quantization")
    if kind not in get_args(Kind):
        raise ValueError(f"{kind!r} is no way to quantise: {' and '.join(get_args(Kind))} are")
    if adapted_layers(model):
        raise ValueError("this model has adapters already: quantise the base first, then inject")
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        raise ValueError(
            "this model's parameters are partitioned by ZeRO-3: quantise it before, or let rosa-ds train do both"
        )
    dense = _stay_dense(model, skip)
    for name, layer in linear_layers(model).items():
        if name in dense or isinstance(layer, QuantizedLinear):
            continue
        computes = layer.weight.dtype if dtype is None else dtype
        if computes not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} would compute in {computes}: bitsandbytes makes float32, bfloat16 and float16 of its bits"
            )
        rows, columns = layer.weight.shape
        form = Form(kind, double, (rows, columns), computes)
        packed = None if layer.weight.is_meta else form.pack(layer.weight.detach().to(device))
        new = QuantizedLinear(form, isinstance(layer, Conv1D), layer.bias, packed)
        set_submodule(model, name, new.train(layer.training))
    log_once(logger, logging.INFO, _what_stays_dense(model), same_on_all_ranks=True)  # plans make a model many times
    return model


def _what_stays_dense(model: nn.Module) -> str:
    packed = {f"{name}.{part}" for name in quantized_forms(model) for part in (PACKED, SCALES)}
    sizes: Counter[str] = Counter()
    small = 0
    for name, parameter in model.named_parameters():
        if name in packed:
            small += parameter.nbytes
        else:
            sizes[kind_of(name)] += parameter.nbytes
    dense = sizes.total()
    largest = ", ".join(f"{name} {size / 2**30:.3f}" for name, size in sizes.most_common(4))
    return (
        f"quantised are {small / 2**30:.3f} GiB of the base; {dense / 2**30:.3f} GiB, {dense / (dense + small):.0%} of it, stay dense "
        f"({largest})"
    )


def _stay_dense(model: nn.Module, skip: Iterable[str]) -> set[str]:
    """Linear layers that are not quantised: the head, and those in modules to skip or that are trained whole."""
    layers = linear_layers(model)
    names = [name for name, _ in model.named_modules() if name]
    whole = match_names(skip, names, "skip (adapter.modules_to_save, model.quantization_skip)")
    whole += whole_modules(model)
    inside = {name for name in layers for module in whole if f"{name}.".startswith(f"{module}.")}
    return head_names(model, layers) | inside


class QuantizedNumbers:
    """The arrays of quantised layers, made from a checkpoint: a layer is read and quantised by one rank and sent to all.

    Layers are asked for in the order of ``forms``, the same on all ranks; each array once. Not ``together``: one rank alone does all.
    """

    def __init__(
        self, forms: Mapping[str, Form], base: Base, device: torch.device | None = None, together: bool = True
    ) -> None:
        self.forms, self.base, self.together = forms, base, together
        self.device = distributed.device() if device is None else device
        self._order = list(forms)
        self._ready: dict[str, dict[str, Tensor]] = {}

    def read(self, name: str, part: str) -> Tensor:
        """``weight`` or ``weight_scales`` of a layer, whole, on :attr:`device`. Collective if together."""
        if name not in self._ready:
            self._make(self._order.index(name))
        arrays = self._ready[name]
        tensor = arrays.pop(part)
        if not arrays:
            del self._ready[name]
        return tensor

    def _make(self, first: int) -> None:
        """Each rank quantises one of the next layers, then all send theirs."""
        ranks = min(distributed.world_size(), AT_ONCE) if self.together else 1
        apart = distributed.world_size() // ranks  # so that many hosts read, not the first alone
        owners = {name: apart * index for index, name in enumerate(self._order[first : first + ranks])}
        mine: dict[str, Tensor] = {}
        rank = distributed.rank() if self.together else 0
        with distributed.together() if self.together else contextlib.nullcontext():
            for name, owner in owners.items():
                if owner == rank:
                    weight = self.base.rows(f"{name}.weight", slice(None))
                    mine = self.forms[name].pack(weight.to(self.device))
        for name, owner in owners.items():
            self._ready[name] = {}
            for part, (shape, dtype) in self.forms[name].sizes().items():
                own = owner == rank
                array = mine[part] if own else torch.empty(shape, dtype=dtype, device=self.device)
                assert (tuple(array.shape), array.dtype) == (shape, dtype), f"{name}: {part} is {array.shape}"
                array = array.contiguous()
                self._ready[name][part] = distributed.broadcast(array, owner) if self.together else array


def quantized_forms(model: nn.Module) -> dict[str, Form]:
    """How the quantised layers of a model are kept, by name, in the model's order."""
    return {
        name: form for name, module in model.named_modules() if isinstance(form := getattr(module, "form", None), Form)
    }


def packed_hash(packed: Mapping[str, Tensor]) -> str:
    """Of the two arrays of a quantised layer, wherever they are."""
    digest = hashlib.sha256()
    for part in (PACKED, SCALES):
        digest.update(packed[part].detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def packed_hashes(model: nn.Module, together: bool = False) -> dict[str, str]:
    """:func:`packed_hash` of every quantised layer, by name.

    Args:
        together: the ranks share the work, and all have the result; of a model that is divided it has to be so. Else each rank
            that calls it does all of it.
    """
    mine = {}
    ranks, rank = (distributed.world_size(), distributed.rank()) if together else (1, 0)
    for number, name in enumerate(quantized_forms(model)):
        layer = model.get_submodule(name)
        arrays = {part: zero.read_whole(getattr(layer, part)) for part in (PACKED, SCALES)}
        if number % ranks == rank:
            mine[name] = packed_hash(arrays)
    parts = distributed.gather_objects(mine) if together else [mine]
    return dict(sorted((name, value) for part in parts for name, value in part.items()))


def other_numbers(base: Mapping[str, Any], found: Mapping[str, str]) -> str | None:
    """What is to be said where layers are quantised to other numbers than those that a run saw: sums and ties fall otherwise on
    another device, or in another bitsandbytes.

    Args:
        base: as the run has described it; one of before such hashes were kept says nothing.
        found: hashes of layers here.
    """
    known = base.get("packed", {})
    differ = [name for name, value in found.items() if known.get(name, value) != value]
    if not differ:
        return None
    count = f" ({len(differ)} of {len(found)} layers)" if len(found) > 1 else ""
    return f"{differ[0]} is quantised to other numbers here than the run trained on{count}"


def quantize_as(
    model: nn.Module,
    settings: ModelSettings,
    dtype: torch.dtype,
    skip: Iterable[str],
    device: torch.device | None = None,
) -> None:
    """:func:`quantize` as the settings say, by default on this rank's device; nothing where they say none."""
    if settings.quantization != "none":
        device = distributed.device() if device is None else device
        skip = [*skip, *settings.quantization_skip]
        quantize(model, settings.quantization, settings.double_quantization, dtype, skip, device)


def open_quantized(
    settings: ModelSettings,
    dtype: torch.dtype,
    skip: Iterable[str],
    device: torch.device | None = None,
    seed: int = 42,
) -> tuple[PreTrainedModel, Base | None]:
    """As :func:`rosa_ds.models.stream.open_base`, with the layers quantised that ``settings`` want to be.

    The numbers that are quantised are those of the base's files whatever ``dtype`` is, so that every later use has the same bits.
    ``device``: to quantise on, by default this rank's. ``seed``: as in :func:`rosa_ds.models.load.load_model`.

    Raises: ValueError as :func:`quantize`.
    """
    assert settings.quantization != "none"
    require_bitsandbytes("model.quantization")  # before anything is downloaded
    try:
        model, base = stream_base(settings, dtype, seed)
    except NotStreamableError as reason:
        model, base = load_whole(settings, stored_dtype(settings), reason, seed), None
    quantize_as(model, settings, dtype, skip, device)
    for parameter in model.parameters() if base is None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model, base


def allocate_quantized(
    model: PreTrainedModel, base: Base, device: torch.device | None = None, together: bool = True
) -> None:
    """Give a model of :func:`open_quantized` all its numbers, by default on this rank's device.

    Args:
        together: the ranks share the work, on devices that their collectives know; else each does all of it.
    """
    device = distributed.device() if device is None else device
    numbers = QuantizedNumbers(quantized_forms(model), base, device, together)

    def fill(name: str, parameter: nn.Parameter, target: Tensor, rows: slice) -> None:
        module, _, part = name.rpartition(".")
        if module in numbers.forms and part in (PACKED, SCALES):
            target.copy_(numbers.read(module, part))
        else:
            base.fill(name, parameter, target, rows)

    allocate(model, fill, device)
    base.close()


def load_quantized(settings: ModelSettings, dtype: torch.dtype, skip: Iterable[str]) -> PreTrainedModel:
    """The base with quantised layers, which compute in ``dtype``, on the CPU. Each rank that calls it does so for itself.

    Raises: ValueError as :func:`open_quantized`.
    """
    cpu = torch.device("cpu")
    model, base = open_quantized(settings, dtype, skip, cpu)
    if base is not None:
        allocate_quantized(model, base, cpu, together=False)
    return model.eval()
