"""The benchmark: what it prints, that it times nothing wrong, and that its figures are what they are called."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_bench import measure, ops
from kernel_bench.cases import MODELS, Case, Layer, make_inputs, parse_shape
from kernel_bench.masks import gradient_mask, tile_statistics
from kernel_bench.roofline import Work, percent_of_peak
from kernel_ops import OPS, main
from safetensors.torch import save_file

import rosa_kernels

CPU = torch.device("cpu")
MIB = 2**20
SMALL = ("--shape", "96x64", "--tokens", "33", "--repeats", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few sets of inputs; and the threads afterwards are those of before."""
    monkeypatch.setattr(measure, "MAX_SETS", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_op_runs(op: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert main([op, *SMALL, "--dtype", dtype, "--json", str(file)]) == 0
    environment, mask, *rows = rows_of(file)
    assert environment["torch"] == torch.__version__
    assert mask["row"] == "mask"
    printed = capsys.readouterr().out
    assert len(rows) > 1
    for row in rows:
        assert row["candidate"] in printed
        if row.get("absent"):
            assert f"absent: {row['absent']}" in printed
        else:
            assert 0.0 < row["fastest"] <= row["milliseconds"] <= row["slowest"] < math.inf
            assert row["ratio"] > 0.0
            assert row["peak_bytes"] > 0
    assert rows[0]["ratio"] == 1.0
    assert all(row.get("saved_bytes", 1) > 0 for row in rows)
    assert ("saved_bytes" in rows[0]) == (op == "adapter_linear")


def test_the_layer_saves_its_input_and_little_more(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    main(["adapter_linear", *SMALL, "--density", "0.1", "--json", str(file)])
    saved = {row["candidate"]: row.get("saved_bytes") for row in rows_of(file)[2:]}
    x_bytes, h_bytes = 33 * 64 * 4, 33 * 8 * 4
    assert saved["rosa_kernels, low-rank + sparse"] == x_bytes + h_bytes
    assert saved["torch autograd, LoRA"] == x_bytes + h_bytes
    supertuning = saved["PEFT Supertuning with rank"]
    assert supertuning is None or supertuning >= x_bytes + h_bytes + 96 * 64 * 4  # the weight's copy


def test_a_wrong_candidate_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = rosa_kernels.sddmm
    monkeypatch.setattr(rosa_kernels, "sddmm", lambda *given: right(*given) * 1.01)
    assert main(["sddmm", *SMALL]) == 1
    output = capsys.readouterr()
    assert "rosa_kernels.sddmm: values has a relative RMS error of 0.01 " in output.err
    assert "median" not in output.out


def test_the_gate_wants_shapes_names_and_numbers() -> None:
    case = Case(parse_shape("4x4"), 2, torch.float32, CPU, torch.tensor([1], dtype=torch.int32), "mine")
    inputs = make_inputs(case, ("x_TM",), 0)
    expected = {"values": torch.ones(3).double()}

    def check(outputs: dict[str, torch.Tensor]) -> float:
        candidate = ops.Candidate("it", lambda _: lambda: None, lambda _: outputs, lambda _: expected)
        return ops.gate(candidate, inputs, expected, 1e-3)

    assert check({"values": torch.full((3,), 1.0005)}) == pytest.approx(5e-4, rel=1e-3)
    for wrong in ({"values": torch.ones(1)}, {"values": torch.full((3,), torch.nan)}, {"y": torch.ones(3)}):
        with pytest.raises(ops.GateError, match="it"):
            check(wrong)


def test_peak_memory_is_that_of_the_fullest_moment() -> None:
    def freed_first() -> torch.Tensor:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(MIB, dtype=torch.uint8)
        del first
        third = torch.empty(MIB, dtype=torch.uint8)
        return second if second.data_ptr() < third.data_ptr() else third

    def freed_last() -> None:
        first, second, third = (torch.empty(MIB, dtype=torch.uint8) for _ in range(3))
        del first, second, third

    assert measure.peak_bytes(freed_first, CPU) == 2 * MIB
    assert measure.peak_bytes(freed_last, CPU) == 3 * MIB
    held = [torch.empty(MIB, dtype=torch.uint8)]
    assert measure.peak_bytes(held.clear, CPU) == 0


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) + torch.nn.functional.linear(x, 2 * weight)

    assert measure.saved_bytes(forward, [weight]) == (4 * 8 + 8 * 8) * 4  # x and 2 · weight


def test_candidates_take_turns_and_every_call_the_next_inputs() -> None:
    seen: list[str] = []
    calls = {name: [lambda which=f"{name}{k}": seen.append(which) for k in range(3)] for name in "AB"}
    times = measure.interleaved(calls, 3, CPU)
    assert seen[2:] == ["A0", "B1", "A2", "B0", "A1", "B2"]  # after one call each to warm up
    assert {name: len(each) for name, each in times.items()} == {"A": 3, "B": 3}


def test_inputs_are_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_SETS", 64)
    assert measure.number_of_sets(10 * MIB, 1000, CPU) * 10 * MIB > 128 * MIB
    assert measure.number_of_sets(2**30, 1000, CPU) == 2
    assert measure.number_of_sets(1, 1000, CPU) == 64
    assert measure.number_of_sets(1, 6, CPU) == 6


def test_tile_statistics_of_a_mask_by_hand() -> None:
    """128 x 256, 2 x 4 tiles: rows 0 and 127 hold 8 entries each, spread over all tiles; sorted, one tile holds all."""
    columns = torch.arange(0, 256, 32)
    positions = torch.cat([columns, 127 * 256 + columns]).to(torch.int32)
    expected = {
        "empty_rows": 100 * 126 / 128,
        "empty_columns": 100 * 248 / 256,
        "tiles_given": 100.0,
        "tiles_sorted": 12.5,
        "tiles_heavy": 12.5,
        "entries_outside": 0.0,
    }
    assert tile_statistics(positions, parse_shape("128x256"), torch.float32) == pytest.approx(expected)
    alone = tile_statistics(positions[:1], parse_shape("128x256"), torch.float32)
    assert (alone["tiles_sorted"], alone["tiles_heavy"], alone["entries_outside"]) == (12.5, 0.0, 100.0)


@pytest.mark.parametrize("layer", MODELS["smollm2"], ids=str)
def test_a_gradient_fills_few_tiles(layer: Layer) -> None:
    """As unequal as masks of SmolLM2 are, within what its own layers differ by."""
    positions = gradient_mask(layer, 0.006, CPU)
    assert positions.dtype == torch.int32
    assert positions.numel() == round(layer.rows * layer.columns * 0.006)
    assert bool((positions.diff() > 0).all())
    share = tile_statistics(positions, layer, torch.float32)
    assert share["tiles_given"] > 70.0
    assert 5.0 < share["tiles_sorted"] < 25.0
    assert share["entries_outside"] < 1.0


def test_masks_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mask.safetensors"
    save_file({"layers.0.up": torch.tensor([5, 700, 6000], dtype=torch.int32)}, file)
    arguments = ["scatter", "--device", "cpu", "--repeats", "1", "--tokens", "3", "--mask", str(file)]
    assert main([*arguments, "--weight", "layers.0.up", "--shape", "96x64"]) == 0
    assert "96x64 layers.0.up" in capsys.readouterr().out
    for more, message in (
        (["--weight", "layers.0.upp", "--shape", "96x64"], "among them layers.0.up"),
        (["--weight", "layers.0.up", "--shape", "8x8"], "give its shape with --shape"),
        (["--weight", "layers.0.up"], "one for all or one for each"),
        (["--weight", "layers.0.up", "--shape", "96x64", "--density", "0.1"], "leave --density out"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, *more])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "invalid choice: 'dense'"),
        (["sddmm", "--shape", "96"], "give out-features x in-features"),
        (["sddmm", "--shape", "8x8", "--model", "smollm2"], "not allowed with"),
        (["sddmm", "--tokens", "0"], "not a whole number of at least 1"),
        (["sddmm", "--density", "6"], "give a share above 0"),
        (["sddmm", "--device", "gpu"], "give cpu, cuda or cuda:NUMBER"),
        (["sddmm", "--device", "cuda:99"], "torch sees"),
        (["sddmm", "--mask", "nowhere.safetensors"], "--mask takes uniform, gradient or a file"),
        (["sddmm", "--weight", "a.b"], "give --mask FILE with it"),
        (["sddmm", "--json", "/nowhere/rows"], "make it first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_roofline() -> None:
    work = Work(bytes=3_350_000_000, flops=989_400_000)  # one millisecond of an H100's bandwidth
    assert percent_of_peak("NVIDIA H100 80GB HBM3", work, torch.bfloat16, 2.0) == pytest.approx(50.0)
    assert percent_of_peak("NVIDIA H200", Work(1, 67_000_000_000), torch.float32, 1.0) == pytest.approx(100.0)
    assert percent_of_peak("NVIDIA A100-SXM4-80GB", work, torch.float16, 1.0) is not None
    assert percent_of_peak("AMD EPYC", work, torch.float32, 1.0) is None


def test_ours_reads_the_work_it_is_credited_with() -> None:
    """The formula of the layer against a count by hand: T 2, N 3, M 5, R 8, Z 1, float32 and int32."""
    case = Case(parse_shape("3x5"), 2, torch.float32, CPU, torch.tensor([4], dtype=torch.int32), "mine")
    work = OPS["adapter_linear"].work(case)
    assert work.flops == 2 * (2 * 2 * 3 * 5) + 6 * 2 * 8 * (3 + 5) + 2 * 2 * 1
    assert OPS["sddmm"].work(case) == Work(2 * (3 + 5) * 4 + 8, 2 * 2)
    assert OPS["scatter"].work(case).bytes == 2 * 4 + 6 * 4
