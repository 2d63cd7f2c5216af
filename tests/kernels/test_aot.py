"""Every Triton kernel compiled for real GPUs, in a process that does not interpret, and its machine code read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rosa_kernels import aot

WANTED = {"sm_80", "sm_90", "gfx942"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", "-m", "rosa_kernels.aot", "--json"]
    command += [part for target in sorted(WANTED) for part in ("--target", target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd="/")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print("\n" + aot.table([aot.Row(**row) for row in rows]))
    return rows


def test_every_kernel_dtype_and_target(compiled: list[dict[str, Any]]) -> None:
    sources = Path(aot.__file__).parent.glob("*/triton_kernel.py")
    kernels = {name for path in sources for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)}
    assert {"scatter_add", "spmm_tiles"} <= kernels
    wanted = {(kernel, dtype, target) for kernel in kernels for dtype in aot.DTYPES for target in WANTED}
    assert {(row["kernel"], row["dtype"], row["target"]) for row in compiled} == wanted


def test_no_spills(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["spilled"] and row["target"] != "gfx942"] == []
    assert all(0 < row["registers"] <= 255 for row in compiled if row["target"] != "gfx942")


def test_tiles_use_tensor_cores_and_16_byte_loads(compiled: list[dict[str, Any]]) -> None:
    tiles = [row for row in compiled if row["tiles"]]
    assert tiles
    for row in tiles:
        assert row["widest_load"] == 16, row
        assert (row["tensor_core"] > 0) or row["dtype"] == "fp32", row


def test_rows_are_permuted_in_shared_memory_where_they_fit(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["kernel"] == "gather_columns":
            assert (row["shared"] > 0) == ("SHARED=True" in row["constants"])
            assert row["shared"] <= 64 * 2**10


LOOPS = {
    "bf16": {("down", 16): 11, ("down", 64): 16, ("down", 512): 56}
    | {("low_rank_backward", 16): 30, ("low_rank_backward", 64): 32},
    "fp32": {("down", 16): 36, ("down", 64): 99, ("down", 256): 335}
    | {("low_rank_backward", 16): 77, ("low_rank_backward", 32): 135},
}
"""Instructions for an entry of x, (kernel, padded rank), on sm_90; in bf16 71 to 91 with a Philox call an entry."""


@pytest.mark.parametrize("dtype", LOOPS)
def test_instructions_of_the_dropout_kernels(dtype: str, compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["target"] == "sm_90" and row["dtype"] == dtype and row["per_element"]]
    ranks = [int(re.findall(r"RANK=(\d+)", row["constants"])[0]) for row in rows]
    counted = {(row["kernel"], rank): row["per_element"] for row, rank in zip(rows, ranks, strict=True)}
    assert counted.keys() == LOOPS[dtype].keys()
    assert all(0 < counted[key] <= most for key, most in LOOPS[dtype].items()), counted


def test_a_loop_is_found() -> None:
    line = "        /*0000*/  {} ;"
    before, inside = [line.format("MOV R1, R2")] * 3, [line.format("@P0 FADD R1, R2, R3")] * 5
    loop = [".L_x_1:", *inside, line.format("@!P0 BRA `(.L_x_1)")]
    assert aot.longest_loop("\n".join([*before, *loop, ".L_x_2:", line.format("BRA `(.L_x_2)")])) == 6
    assert aot.longest_loop("\n".join(before)) == 0


def test_load_widths_are_read() -> None:
    wanted = {
        "LDG.E.128.CONSTANT": 16,
        "LDGSTS.E.BYPASS.128": 16,
        "LDG.E.64": 8,
        "LDG.E": 4,
        "LDG.E.U16": 2,
        "LDS.128": 0,
    }
    wanted |= {"global_load_dwordx4": 16, "buffer_load_dword": 4, "global_load_ushort": 2, "ds_read_b128": 0}
    assert {opcode: aot._load_bytes(opcode) for opcode in wanted} == wanted


def test_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "unset it" in capsys.readouterr().err
