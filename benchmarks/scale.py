"""Past this machine: what Llama models of 7, 70 and 405 billion parameters need on 8 to 1,024 GPUs, by arithmetic.

``python benchmarks/scale.py OUT_DIR [--length 2048] [settings of rosa-ds train]`` writes tables and a plot. The terms are those of
every run's account, which is held to what real ranks show.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import CommandLine, parse_command_line
from rosa_ds.memory.account import ACTIVATIONS, BUCKETS, GATHERED, WORKING
from rosa_ds.methods.sparse import COLLECTED, COLLECTING, PLANS
from rosa_ds.methods.subspace import DRAWING, WORKSPACE
from rosa_ds.models.no_numbers import Shape
from rosa_ds.planning.search import GIB, Choice, Machine, Planner
from rosa_ds.utils.files import write_json

logger = logging.getLogger("rosa_ds.benchmarks.scale")
RANKS = tuple(8 * 2**power for power in range(8))
# Published sizes: Llama 2 (arXiv 2307.09288), Llama 3.1 (arXiv 2407.21783), table 3.
_SIZES: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70B": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "405B": {
        "vocab_size": 128_256,
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
}
_GROUPS = {
    "base": ("base",),
    "adapters, optimizer, gradients": ("A", "B", "values", "positions", "optimizer", "gradients", "base residual"),
    "plans of masks": (PLANS,),
    "gradient buckets": (BUCKETS,),
    "gathered at once": (GATHERED,),
    "activations": (ACTIVATIONS, WORKING),
    "collect": (COLLECTED, COLLECTING),
    "draw": (DRAWING, WORKSPACE),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for scale.json, scale.md and scale.png")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row; default: 2048")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of one (10^9 bytes); default: 80")
    parser.add_argument("--reserve", type=float, default=4, help="GiB of it for CUDA, NCCL, fragments; default: 4")
    parser.add_argument("--tflops", type=float, default=300, help="that a GPU reaches; default: 300")
    parser.add_argument("--bandwidth", type=float, default=50, help="GB/s that a GPU sends; default: 50")
    options, settings = parser.parse_known_args(arguments)
    machine = Machine(
        RANKS[0],
        options.gpu_memory * 1e9,
        options.reserve * GIB,
        options.tflops * 1e12,
        options.bandwidth * 1e9,
    )
    simulate(parse_command_line(settings), machine, options.length, options.out)


def simulate(command: CommandLine, machine: Machine, length: int, folder: Path) -> list[Point]:
    """All sizes; writes ``scale.json``, ``scale.md`` and ``scale.png``. Raises: ValueError as :class:`Planner`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for size in _SIZES:
        planner = Planner(command.config, command.deepspeed, llama(size))
        logger.info("%s: %s", size, planner.report)
        found += points(planner, size, machine, length)
    text = scale_table(found)
    logger.info("GiB of a rank, stage 3, recomputing, rows of %d tokens:\n%s", length, text)
    write_json(folder / "scale.json", [dataclasses.asdict(point) | {"bound": point.bound} for point in found])
    (folder / "scale.md").write_text(text + "\n")
    _plot(found, machine, folder / "scale.png")
    return found


def llama(size: str) -> LlamaConfig:
    """The config of ``7B``, ``70B`` or ``405B``."""
    return LlamaConfig(**_SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False)


@dataclasses.dataclass(frozen=True)
class Point:
    """One size on one number of ranks: GiB of a rank by group, its bottleneck, and a step's seconds."""

    size: str
    ranks: int
    stage: int
    micro_batch: int
    fits: bool
    peak: float
    groups: dict[str, float]
    largest: str
    compute: float
    send: float

    @property
    def bound(self) -> str:
        """What a larger run would have to relieve first."""
        if not self.fits:
            return f"memory: {self.largest}"
        return "network" if self.send > self.compute else "arithmetic"


def _point(size: str, ranks: int, choice: Choice) -> Point:
    memory = choice.account.memory
    groups = {group: sum(memory.get(name, 0) for name in names) / GIB for group, names in _GROUPS.items()}
    steady = {group: held for group, held in groups.items() if group not in ("collect", "draw")}
    largest = max(steady, key=lambda group: steady[group])
    rounded = {group: round(held, 3) for group, held in groups.items()}
    return Point(
        size,
        ranks,
        choice.stage,
        choice.micro_batch,
        choice.fits,
        round(choice.peak / GIB, 3),
        rounded,
        largest,
        choice.compute,
        choice.send,
    )


def points(planner: Planner, size: str, machine: Machine, length: int) -> list[Point]:
    """Stage 3 with checkpointing at every number of ranks, with the largest of a few micro-batches that fits."""
    found = []
    for ranks in RANKS:
        here = dataclasses.replace(machine, gpus=ranks)
        tried = (planner.choice(here, 3, Shape(rows, length, length), True, 1) for rows in (16, 8, 4, 2, 1))
        choice = next(choice for choice in tried if choice.fits or choice.micro_batch == 1)
        found.append(_point(size, ranks, choice))
    return found


def scale_table(found: list[Point]) -> str:
    """One line a point."""
    names = list(_GROUPS)
    lines = [
        "| model | ranks | rows | " + " | ".join(names) + " | peak, GiB | compute, s | send, s | bound by |",
        "|" + "---|" * (len(names) + 7),
    ]
    for p in found:
        cells = [p.size, str(p.ranks), str(p.micro_batch), *(f"{p.groups[name]:.2f}" for name in names)]
        cells += [f"{p.peak:.1f}{'' if p.fits else ' (too much)'}", f"{p.compute:.2f}", f"{p.send:.2f}", p.bound]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(found: list[Point], machine: Machine, path: Path) -> None:
    """Above, bytes of a rank by group; below, the two sides of a step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("scale.py draws a plot: pip install 'rosa-ds[plots]'") from None
    sizes = list(dict.fromkeys(point.size for point in found))
    figure = Figure(figsize=(5 * len(sizes), 8))
    axes: Any = figure.subplots(2, len(sizes), squeeze=False)
    shown = [name for name in _GROUPS if any(point.groups[name] > 0 for point in found) and name != "collect"]
    for column, size in enumerate(sizes):
        mine = [point for point in found if point.size == size]
        labels = [str(point.ranks) for point in mine]
        bottom = [0.0] * len(mine)
        above, below = axes[0][column], axes[1][column]
        for name in shown:
            heights = [point.groups[name] for point in mine]
            above.bar(labels, heights, bottom=bottom, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        above.axhline((machine.memory - machine.reserve) / GIB, color="black", linestyle="--", linewidth=1)
        above.set(title=f"{size}, GiB of a rank", xlabel="ranks")
        below.plot(labels, [point.compute / point.micro_batch for point in mine], marker="o", label="compute")
        below.plot(labels, [point.send / point.micro_batch for point in mine], marker="s", label="send")
        below.set(title=f"{size}, seconds of a row", xlabel="ranks")
        below.set_yscale("log")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_program(main)
