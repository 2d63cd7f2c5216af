"""Compile every Triton kernel for GPUs that need not be here, and read what came out: ``python -m rosa_kernels.aot``.

For each kernel, dtype and target it prints registers of a thread, bytes spilled, shared memory, tensor-core instructions and
the widest global load; on AMD, what the compiler reports of the same. Triton must compile for real: not under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = ("fp32", "bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RANKS = (8, 64)
TENSOR_CORE = re.compile(r"^(HGMMA|HMMA|QGMMA|v_mfma)")
GLOBAL_LOAD = re.compile(r"^(?:LDG|LDGSTS|LDG\.\S*|LDGSTS\.\S*|global_load_\S+|buffer_load_\S+)$")


@dataclass(frozen=True)
class Spec:
    """One kernel as it is launched: argument types in order (``*x`` pointers) and what its launcher adds.

    Attributes:
        launch: constants, and Triton's own ``num_warps`` and ``num_stages``.
        tiles: a tile kernel, whose products of 16-bit inputs must run on tensor cores and whose loads are 16 bytes wide.
    """

    name: str
    module: str
    arguments: dict[str, str]
    launch: Mapping[str, Any]
    tiles: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in self.launch.items() if name.isupper()}

    @property
    def options(self) -> dict[str, int]:
        return {name: value for name, value in self.launch.items() if not name.isupper()}


def specs(dtype: str) -> list[Spec]:
    """Every kernel of this package for inputs of ``dtype``, as the launchers call it."""
    from rosa_kernels.low_rank import triton_kernel as low_rank_code
    from rosa_kernels.pattern import triton_kernel as columns_code
    from rosa_kernels.pattern.tiles import TILE
    from rosa_kernels.scatter import triton_kernel as scatter_code
    from rosa_kernels.sddmm import triton_kernel as sddmm_code
    from rosa_kernels.spmm import triton_kernel as spmm_code

    data, wide, index = f"*{dtype}", "*fp32", "*i32"
    gather = {"source_ptr": data, "order_ptr": index, "target_ptr": data, "width": "i32", "target_width": "i32!"}
    gather |= {"source_stride_t": "i32!", "source_stride_c": "1"}
    tiles = {"grad_ptr": data, "x_ptr": data, "tiles_ptr": index, "starts_ptr": index, "slots_ptr": index}
    tiles |= {"cells_ptr": index, "values_ptr": wide, "num_tokens": "i32", "tokens_per_split": "i32!"}
    tiles |= {"num_entries": "i32", "grad_width": "i32!", "x_width": "i32!"}
    entries = {"grad_ptr": data, "x_ptr": data, "positions_ptr": index, "slots_ptr": index, "values_ptr": wide}
    entries |= dict.fromkeys(("num_chosen", "num_tokens", "tokens_per_split", "num_entries", "columns"), "i32")
    entries |= {"grad_stride_t": "i32!", "grad_stride_n": "1", "x_stride_t": "i32!", "x_stride_m": "1"}
    product = {"y_ptr": data, "x_ptr": data, "blocks_ptr": data, "order_ptr": index, "pointers_ptr": index}
    product |= {"members_ptr": index, "num_tokens": "i32", "x_width": "i32!"}
    product |= {"y_stride_t": "i32!", "y_stride_c": "1"}
    down = {"x_ptr": data, "A_ptr": data, "h_ptr": data, "seed": "i64", "probability": "fp32", "num_tokens": "i32"}
    down |= {"features": "i32!", "rank": "i32", "x_stride_t": "i32!", "x_stride_m": "1"}
    backward = {"grad_x_ptr": data, "grad_h_ptr": data, "x_ptr": data, "A_ptr": data, "grad_A_ptr": wide}
    backward |= {"seed": "i64", "probability": "fp32", "num_tokens": "i32", "tokens_per_split": "i32!"}
    backward |= {"features": "i32!", "rank": "i32", "grad_x_stride_t": "i32!", "grad_x_stride_m": "1"}
    backward |= {"x_stride_t": "i32!", "x_stride_m": "1"}
    scatter = {"weight_ptr": data, "values_ptr": wide, "positions_ptr": index, "old_ptr": data, "num_entries": "i32"}
    restore = {"weight_ptr": data, "positions_ptr": index, "old_ptr": data, "num_entries": "i32"}
    size = BYTES[dtype]
    scatter_launch = {"BLOCK_Z": scatter_code.BLOCK_Z, "num_warps": 4}
    return [
        *(
            Spec("gather_columns_kernel", "pattern", gather, columns_code.gather_launch(size, width, width * 3 // 4))
            for width in (4096, 11008, 128256)
        ),
        Spec(
            "sddmm_tiles_kernel",
            "sddmm",
            tiles,
            {"ACCUMULATE": True, "TILE": TILE, **sddmm_code.TILES_LAUNCH[size]},
            tiles=True,
        ),
        Spec("sddmm_gather_kernel", "sddmm", entries, {"CHOSEN": True, "ACCUMULATE": True, **sddmm_code.GATHER_LAUNCH}),
        *(
            Spec(
                "spmm_tiles_kernel",
                "spmm",
                product,
                {"TRANSPOSE": transpose, "TILE": TILE, **spmm_code.LAUNCH[size]},
                tiles=True,
            )
            for transpose in (False, True)
        ),
        Spec("scatter_add_kernel", "scatter", scatter, {"SUM_DTYPE": "fp32", **scatter_launch}),
        Spec("restore_kernel", "scatter", restore, scatter_launch),
        *(Spec("down_kernel", "low_rank", down, low_rank_code.down_launch(size, rank)) for rank in RANKS),
        *(
            Spec(
                "low_rank_backward_kernel",
                "low_rank",
                backward,
                {"NEEDS_X": True, **low_rank_code.backward_launch(size, rank)},
            )
            for rank in RANKS
        ),
    ]


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses. Bytes; ``spilled`` -1 and ``widest_load`` 0 where a tool does not say."""

    kernel: str
    dtype: str
    target: str
    constants: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    widest_load: int
    tiles: bool


def _source(spec: Spec) -> Any:
    """Triton's description of a specialised kernel: ``!`` marks a number divisible by 16, ``1`` the number itself."""
    import importlib

    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"rosa_kernels.{spec.module}.triton_kernel"), spec.name)
    if not isinstance(function, triton.JITFunction):
        raise ValueError("kernels cannot be compiled under TRITON_INTERPRET: unset it for this process")
    constants = {name: tl.float32 if value == "fp32" else value for name, value in spec.constants.items()}
    signature = {name: kind.rstrip("!") for name, kind in spec.arguments.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    ones = {name: 1 for name, kind in spec.arguments.items() if kind == "1"}
    signature |= dict.fromkeys(ones, "constexpr")
    aligned = [i for i, kind in enumerate(spec.arguments.values()) if kind.startswith("*") or kind.endswith("!")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(fn=function, signature=signature, constexprs=constants | ones, attrs=attributes)


def _nvidia(cubin: bytes) -> tuple[int, int, list[tuple[str, str]]]:
    """Registers, spilled bytes (stack frame) and (opcode, operands) of a cubin, by the tools in Triton's wheel."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tools = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    registers, stack, local = (re.search(rf"{key}:(\d+)", text) for key in ("REG", "STACK", "LOCAL"))
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump's report has changed: {text!r}")
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?);", code.stdout)
    return int(registers[1]), int(stack[1]) + int(local[1]), lines


def _amd(assembly: str) -> tuple[int, int, list[tuple[str, str]]]:
    """Vector registers, spilled bytes and (opcode, operands) of AMD assembly with the compiler's notes."""
    registers, spills = (re.search(rf"\.{key}:\s*(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count"))
    if registers is None or spills is None:
        raise RuntimeError("the AMD compiler's notes have changed")
    lines = re.findall(r"^\s+([a-z]\w+)\s*(.*)$", assembly, re.MULTILINE)
    return int(registers[1]), 4 * int(spills[1]), lines


def _load_bytes(opcode: str) -> int:
    """Bytes that one thread loads from global memory with this instruction; 0 for another instruction."""
    if opcode.startswith(("LDG", "LDGSTS")):
        bits = re.search(r"\.(64|128|U8|U16|S8|S16)(?:\.|$)", opcode)
        return {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[bits[1]] if bits else 4
    wide = re.match(r"(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte)", opcode)
    return {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(wide[1], 2) if wide else 0


def compile_row(spec: Spec, dtype: str, target: str) -> Row:
    """Compile one kernel for one target."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(_source(spec), target=GPUTarget(*TARGETS[target]), options=spec.options)
    if TARGETS[target][0] == "cuda":
        registers, spilled, code = _nvidia(compiled.asm["cubin"])
    else:
        registers, spilled, code = _amd(compiled.asm["amdgcn"])
    return Row(
        spec.name.removesuffix("_kernel"),
        dtype,
        target,
        " ".join(f"{name}={value}" for name, value in spec.constants.items()),
        registers,
        spilled,
        compiled.metadata.shared,
        sum(TENSOR_CORE.match(opcode) is not None for opcode, _ in code),
        max((_load_bytes(opcode) for opcode, _ in code), default=0),
        spec.tiles,
    )


def rows(targets: list[str], dtypes: list[str]) -> Iterator[Row]:
    """Every kernel × dtype × target, one at a time."""
    for target in targets:
        for dtype in dtypes:
            for spec in specs(dtype):
                yield compile_row(spec, dtype, target)


def table(compiled: list[Row]) -> str:
    """The rows as text."""
    head = f"{'kernel':20} {'dtype':5} {'target':7} {'regs':>5} {'spill':>6} {'shared':>7} {'tensor':>7} {'load':>5}  constants"
    lines = [
        f"{r.kernel:20} {r.dtype:5} {r.target:7} {r.registers:5} {r.spilled:6} {r.shared:7} {r.tensor_core:7} "
        f"{r.widest_load:5}  {r.constants}"
        for r in compiled
    ]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rosa_kernels.aot", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1: unset it")
    compiled = list(rows(chosen.target or list(TARGETS), chosen.dtype or list(DTYPES)))
    text = "\n".join(json.dumps(asdict(row)) for row in compiled) if chosen.json else table(compiled)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
