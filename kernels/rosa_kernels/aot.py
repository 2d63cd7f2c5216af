"""Compile every Triton kernel for GPUs that need not be here, and read what came out: ``python -m rosa_kernels.aot``.

For each kernel, dtype and target it prints registers of a thread, bytes spilled, shared memory, tensor-core instructions and
the widest global load, and instructions for an entry of x; on AMD, what the compiler reports of the same. Triton must compile for real: not under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rosa_kernels.spec import Spec

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = ("fp32", "bf16", "fp16")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?);")
TENSOR_CORE = re.compile(r"^(HGMMA|HMMA|QGMMA|v_mfma)")


def specs(dtype: str) -> list[Spec]:
    """Every kernel of this package for inputs of ``dtype``: what ``compiled_as`` of the folders' ``triton_kernel.py`` lists."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton_kernel.py"))
    modules = [importlib.import_module(f"rosa_kernels.{folder}.triton_kernel") for folder in folders]
    return [spec for module in modules for spec in module.compiled_as(dtype)]


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses. Bytes; ``spilled`` -1 and ``widest_load`` 0 where a tool does not say.

    ``per_element``: instructions of a thread in the longest loop for one entry of x that it works on, on NVIDIA; 0 for a
    kernel whose blocks are not (BLOCK_T, BLOCK_M) of x.
    """

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
    per_element: float


def _source(spec: Spec) -> Any:
    """Triton's description of a specialised kernel: ``!`` marks a number divisible by 16, ``1`` the number itself."""
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    if not isinstance(spec.function, triton.JITFunction):
        raise ValueError("kernels cannot be compiled under TRITON_INTERPRET: unset it for this process")
    constants = {name: tl.float32 if value == "fp32" else value for name, value in spec.constants.items()}
    signature = {name: kind.rstrip("!") for name, kind in spec.arguments.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    ones = {name: 1 for name, kind in spec.arguments.items() if kind == "1"}
    signature |= dict.fromkeys(ones, "constexpr")
    aligned = [i for i, kind in enumerate(spec.arguments.values()) if kind.startswith("*") or kind.endswith("!")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(fn=spec.function, signature=signature, constexprs=constants | ones, attrs=attributes)


def longest_loop(code: str) -> int:
    """Instructions of the longest loop in nvdisasm's text: from a label to the last branch back to it; 0 without one."""
    labels: dict[str, int] = {}
    number = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = number
        elif found := _INSTRUCTION.search(line):
            number += 1
            target = re.search(r"L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if target is not None and target[0] in labels:
                longest = max(longest, number - labels[target[0]])
    return longest


def _entries_a_thread(spec: Spec) -> float:
    """Entries of a block of x for each of a program's threads; 0 for a kernel that has no such block."""
    block = spec.constants.get("BLOCK_T", 0), spec.constants.get("BLOCK_M", 0)
    return block[0] * block[1] / (32 * spec.options.get("num_warps", 4))


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes (stack frame) and the assembly of a cubin, by the tools in Triton's wheel."""
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
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    registers, stack, local = (re.search(rf"{key}:(\d+)", text) for key in ("REG", "STACK", "LOCAL"))
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump's report has changed: {text!r}")
    return int(registers[1]), int(stack[1]) + int(local[1]), code.stdout


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
    per_element = 0.0
    if TARGETS[target][0] == "cuda":
        registers, spilled, text = _nvidia(compiled.asm["cubin"])
        code = _INSTRUCTION.findall(text)
        if entries := _entries_a_thread(spec):
            per_element = round(longest_loop(text) / entries, 1)
    else:
        registers, spilled, code = _amd(compiled.asm["amdgcn"])
    return Row(
        spec.function.__name__.removesuffix("_kernel"),
        dtype,
        target,
        " ".join(f"{name}={value}" for name, value in spec.constants.items()),
        registers,
        spilled,
        compiled.metadata.shared,
        sum(TENSOR_CORE.match(opcode) is not None for opcode, _ in code),
        max((_load_bytes(opcode) for opcode, _ in code), default=0),
        spec.tiles,
        per_element,
    )


def rows(targets: list[str], dtypes: list[str]) -> Iterator[Row]:
    """Every kernel × dtype × target, one at a time."""
    for target in targets:
        for dtype in dtypes:
            for spec in specs(dtype):
                yield compile_row(spec, dtype, target)


def table(compiled: list[Row]) -> str:
    """The rows as text."""
    head = f"{'kernel':20} {'dtype':5} {'target':7} {'regs':>5} {'spill':>6} {'shared':>7} {'tensor':>7} {'load':>5} {'entry':>5}  constants"
    lines = [
        f"{r.kernel:20} {r.dtype:5} {r.target:7} {r.registers:5} {r.spilled:6} {r.shared:7} {r.tensor_core:7} "
        f"{r.widest_load:5} {r.per_element or '':>5}  {r.constants}"
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
