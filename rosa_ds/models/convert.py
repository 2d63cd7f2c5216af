"""Which tensors of a checkpoint make which parameter, by transformers' own table of conversions.

Models of transformers 5 keep the experts of a layer in one parameter, where checkpoints have one tensor an expert.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class NotStreamableError(Exception):
    """Why a checkpoint cannot be read parameter by parameter."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How some tensors of a checkpoint become parameters of a model.

    Attributes:
        converter: transformers', which has collected nothing.
        first: the parameter that it is called by.
        sources: pattern of the converter -> tensors, in transformers' order.
        model: on the meta device, whose shapes some operations ask for.
        shapes: of the parameters that it makes, by name.
    """

    converter: WeightConverter
    first: str
    sources: dict[str, list[str]]
    model: PreTrainedModel
    shapes: dict[str, torch.Size] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def stacks(self) -> bool:
        """Whether row ``i`` is made of the ``i``-th tensor of each pattern alone, as with one tensor an expert."""
        first, *others = self.converter.operations
        keeps_rows = (
            (type(operation) is Concatenate and operation.dim >= 1)
            or (type(operation) is Transpose and min(operation.dim0, operation.dim1) >= 1)
            for operation in others
        )
        counts = {len(keys) for keys in self.sources.values()}
        return type(first) is MergeModulelist and first.dim == 0 and all(keeps_rows) and len(counts) == 1

    def run(self, read: Callable[[str], Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
        """The parameters by name, of the tensors that ``read`` gives. ``rows``: of a conversion that stacks, those alone."""
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys[rows]:
                converter.add_tensor(self.first, key, pattern, read(key))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


def match_tensors(
    model: PreTrainedModel, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, str], dict[str, Conversion]]:
    """Parameter or buffer -> its tensor, and parameter -> its conversion, of a checkpoint's tensors as transformers loads them.

    Tensors that belong to nothing are left out.

    Raises: NotStreamableError for tensors that cannot be converted.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    plain: dict[str, str] = {}
    sources: dict[str, dict[str, list[str]]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is None:
            plain.setdefault(name, key)
        else:
            sources.setdefault(name, {}).setdefault(pattern, []).append(key)
    if both := sorted(plain.keys() & sources.keys()):
        raise NotStreamableError(f"it has {both[0]} twice, as it is and to be converted")
    shadow = copy.deepcopy(model).to("meta") if sources else model
    conversions: dict[str, Conversion] = {}
    for name, keys in sources.items():
        used = {id(of_pattern[pattern]): of_pattern[pattern] for pattern in keys}
        if len(used) > 1:
            raise NotStreamableError(f"it has tensors of two kinds for {name}")
        (converter,) = used.values()
        conversion = _with_shapes(Conversion(converter, name, keys, shadow), shapes)
        conversions |= dict.fromkeys(conversion.shapes, conversion)
    return plain, conversions


def _with_shapes(conversion: Conversion, shapes: Mapping[str, torch.Size]) -> Conversion:
    """Run a conversion without numbers. Raises: NotStreamableError if it fails."""
    try:
        made = conversion.run(lambda key: torch.empty(shapes[key], device="meta"))
    except Exception as error:  # operations of any family, on shapes of any file
        raise NotStreamableError(f"its tensors for {conversion.first} cannot be converted ({error})") from error
    return dataclasses.replace(conversion, shapes={name: part.shape for name, part in made.items()})
