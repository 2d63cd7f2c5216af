"""How a Triton kernel is compiled where no GPU is: what :mod:`rosa_kernels.aot` needs to know of it.

A folder with a ``triton_kernel.py`` describes its kernels there, in ``compiled_as(dtype) -> list[Spec]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Spec:
    """One kernel as it is launched: argument types in order (``*x`` pointers) and what its launcher adds.

    Attributes:
        function: what ``triton.jit`` made of it.
        arguments: name -> type, in order; ``!`` marks a number that 16 divides, ``1`` the number itself.
        launch: constants, and Triton's own ``num_warps`` and ``num_stages``.
        tiles: a tile kernel, whose products of 16-bit inputs must run on tensor cores and whose loads are 16 bytes wide.
    """

    function: Any
    arguments: dict[str, str]
    launch: Mapping[str, Any]
    tiles: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in self.launch.items() if name.isupper()}

    @property
    def options(self) -> dict[str, int]:
        return {name: value for name, value in self.launch.items() if not name.isupper()}
