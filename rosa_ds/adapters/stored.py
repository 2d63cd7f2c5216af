"""What training has added to a base, as named tensors: on the disk, where each is read when it is asked for, or to be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_ds.adapters.subspace import join_bits
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.utils.files import TensorFiles


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """What an adapter folder says of itself: enough to build the adapted model again.

    Attributes:
        stop_tokens: ids that end what it was trained to write, where they are known.
    """

    config: AdapterConfig
    seed: int
    base: dict[str, Any]
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter: of a folder of ours or of PEFT, or the state of a checkpoint.

    Attributes:
        folder: where it lies.
        trained: tensors by parameter name; positions: int32, (Z,), by weight name.
        base: weights that draws have changed, or the change of quantised ones, by name, and ``NAME/residual``.
    """

    folder: Path
    description: AdapterDescription
    trained: Mapping[str, Tensor]
    positions: Mapping[str, Tensor]
    base: Mapping[str, Tensor]

    def changed(self, name: str) -> Tensor | None:
        """What draws have written to a parameter, in float32 where its residual is there; ``None`` if nothing."""
        if name not in self.base:
            return None
        return join_bits(self.base[name], self.base.get(f"{name}/residual"))

    def close(self) -> None:
        """Give back what is read only when it is asked for."""
        for part in (self.trained, self.positions, self.base):
            if isinstance(part, TensorFiles):
                part.close()
