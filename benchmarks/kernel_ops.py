"""``python benchmarks/kernel_ops.py OP``: time and memory of an op beside other ways to do it, on real shapes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from kernel_bench import layer_ops, measure, sparse_ops
from kernel_bench.cases import MODELS, Case, Layer, parse_shape
from kernel_bench.masks import gradient_mask, saved_mask, tile_statistics, uniform_mask
from kernel_bench.ops import GateError, Op, Row, clear_device, measure_case
from torch import Tensor

OPS: dict[str, Op] = {op.name: op for op in (*sparse_ops.OPS, *layer_ops.OPS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSITY = 0.006
TOKENS = 1024
MIB = 2**20


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no density: give a share above 0, at most 1, such as 0.006")
    return value


def _shape(text: str) -> Layer:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: give cpu, cuda or cuda:NUMBER") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be measured: give cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("kernel_ops.py", description=__doc__)
    parser.add_argument("op", choices=tuple(OPS), help="what to measure")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--model", choices=tuple(MODELS), help="all linear layers of a model (default: smollm2)")
    layers.add_argument("--shape", type=_shape, action="append", metavar="NxM", help="out x in-features; repeatable")
    parser.add_argument("--mask", default="gradient", metavar="uniform|gradient|FILE", help="default: gradient")
    parser.add_argument("--weight", action="append", metavar="NAME", help="weight whose mask FILE holds; repeatable")
    parser.add_argument("--density", type=_density, help=f"share of a matrix in the mask (default: {DENSITY})")
    parser.add_argument("--tokens", type=_positive, action="append", help=f"repeatable (default: {TOKENS})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    parser.add_argument(
        "--warm", action="store_true", help="repeat on the same inputs; default: inputs outside the caches"
    )
    parser.add_argument("--repeats", type=_positive, default=7, help="of each candidate (default: 7)")
    parser.add_argument("--threads", type=_positive, help="of the CPU (default: torch's)")
    parser.add_argument("--device", type=_device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, one JSON object a line")
    return parser


def _masks(options: argparse.Namespace, device: torch.device) -> list[tuple[Layer, str, Callable[[], Tensor]]]:
    """Layer, name and maker of each mask. Raises: ValueError for options that do not go together."""
    layers: list[Layer] = list(options.shape or MODELS[options.model or "smollm2"])
    if options.mask in ("uniform", "gradient"):
        if options.weight:
            raise ValueError(f"--weight names a mask in a file, and --mask is {options.mask}: give --mask FILE with it")
        density = options.density or DENSITY
        if options.mask == "uniform":
            return [(layer, "uniform", partial(uniform_mask, layer, density)) for layer in layers]
        return [(layer, "gradient", partial(gradient_mask, layer, density, device)) for layer in layers]
    if not Path(options.mask).is_file():
        raise ValueError(
            f"--mask takes uniform, gradient or a file of masks that a run saved; there is no file {options.mask}"
        )
    if options.density:
        raise ValueError(f"the density of {options.mask} is that of its masks: leave --density out")
    if not options.weight or not options.shape or len(layers) not in (1, len(options.weight)):
        raise ValueError(
            f"--mask {options.mask} takes the --weight names to use and their --shape, one for all or one for each (a file "
            f"holds no shapes; or --mask uniform or gradient); given {len(options.weight or ())} weights and "
            f"{len(options.shape or ())} shapes"
        )
    layers = layers if len(layers) > 1 else [layers[0]] * len(options.weight)
    return [
        (layer, name, partial(saved_mask, options.mask, name, layer))
        for layer, name in zip(layers, options.weight, strict=True)
    ]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """First column to the left, the others to the right; a line of two cells is a name and a remark."""
    cells = [list(header), *(list(line) for line in lines)]
    full = [line for line in cells if len(line) == len(header)]
    widths = [max(len(line[column]) for line in full) for column in range(len(header))]
    widths[0] = max(len(line[0]) for line in cells)
    rendered = []
    for line in cells:
        rest = (
            [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)] if line in full else line[1:]
        )
        rendered.append("  ".join(["  " + line[0].ljust(widths[0]), *rest]).rstrip() + "\n")
    return "".join(rendered)


def format_rows(rows: Sequence[Row]) -> str:
    """The table of one case."""
    present = [row for row in rows if "absent" not in row]
    columns: dict[str, Callable[[Row], str]] = {
        "candidate": lambda row: row["candidate"],
        "median ms": lambda row: f"{row['milliseconds']:.3f}",
        "fastest": lambda row: f"{row['fastest']:.3f}",
        "of ours": lambda row: f"{row['ratio']:.2f}",
        "peak MiB": lambda row: f"{row['peak_bytes'] / MIB:.2f}",
    }
    if any("saved_bytes" in row for row in present):
        columns["saved MiB"] = lambda row: f"{row['saved_bytes'] / MIB:.2f}"
    if any("roofline_percent" in row for row in present):
        columns["roofline %"] = lambda row: (
            row["roofline_percent"] if isinstance(row["roofline_percent"], str) else f"{row['roofline_percent']:.0f}"
        )
    columns["error"] = lambda row: f"{row['error']:.1e}"
    lines = [
        [row["candidate"], f"absent: {row['absent']}"] if "absent" in row else [cell(row) for cell in columns.values()]
        for row in rows
    ]
    return _table(list(columns), lines)


def format_statistics(rows: Sequence[Row]) -> str:
    """The table of the masks, in percent."""
    header = ["mask, %", "empty rows", "empty columns", "tiles given", "tiles sorted", "tiles heavy", "entries outside"]
    names = [name.replace(" ", "_") for name in header[1:]]
    lines = [[f"{row['shape']} {row['mask']}", *(f"{row[name]:.1f}" for name in names)] for row in rows]
    return _table(header, lines)


def run(options: argparse.Namespace, write: Callable[[str], object]) -> list[Row]:
    """Measure what the options ask for and write the tables; all rows.

    Raises: ValueError for options that do not go together; GateError for a candidate with wrong results.
    """
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for peers with an OpenMP of their own, not loaded yet
    op, dtype = OPS[options.op], DTYPES[options.dtype]
    makers = _masks(options, device)
    rows: list[Row] = [{"row": "environment", **measure.environment(device)}]
    write("".join(f"{key}: {value}\n" for key, value in rows[0].items() if key != "row") + "\n")
    masks = [(layer, name, make().to(device)) for layer, name, make in makers]
    statistics: list[Row] = [
        {"row": "mask", "shape": str(layer), "mask": name, "entries": positions.numel()}
        | tile_statistics(positions, layer, dtype)
        for layer, name, positions in masks
    ]
    write(format_statistics(statistics))
    rows += statistics
    for layer, name, positions in masks:
        for tokens in options.tokens or [TOKENS]:
            case = Case(layer, tokens, dtype, device, positions, name)
            density = 100 * case.entries / (layer.rows * layer.columns)
            write(f"\n{op.name} {layer}, {tokens} tokens, {options.dtype}, {case.entries} entries ({density:.2g} %)\n")
            measured = measure_case(op, case, options.repeats, options.warm)
            write(format_rows(measured))
            rows += measured
            clear_device(device)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; its exit status, 1 for wrong results."""
    parser = make_parser()
    options = parser.parse_args(arguments)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        rows = run(options, write)
    except ValueError as error:
        parser.error(str(error))
    except GateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json is not None:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
