"""Plan against measurement: ``torchrun --nproc_per_node N tests/support/plan_table.py MODEL OUT [STAGES] [METHODS]``, one short run after another.

Writes ``OUT/ranks-N.json``; ``python tests/support/plan_table.py MODEL OUT table`` makes one table of all of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from rosa_ds import distributed, zero
from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.memory.account import compare
from rosa_ds.training.run import train

WORDS = tuple("the plan says what a run will hold before it starts and the run says what it held".split())  # noqa: SIM905
METHODS, STAGES = "robust,subspace,lora", "0,1,2,3"


def write_rows(path: Path) -> None:
    """Texts of 10 to 17 words."""
    texts = [" ".join((WORDS * 2)[number : number + 10 + number]) for number in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def arguments(model: str, out: Path, stage: int, method: str) -> list[str]:
    config = Path(__file__).resolve().parents[2] / "ds_configs" / f"zero{stage}.json"
    settings = {
        "model.name_or_path": model,
        "model.dtype": "float32",
        "method": method,
        "data.train": str(out / "rows.jsonl"),
        "training.max_steps": "2",
        "training.save_steps": "0",
        "ds.train_batch_size": "4",
        "ds.train_micro_batch_size_per_gpu": "1",
        "training.output_dir": str(out / f"run-{distributed.world_size()}-{stage}-{method}"),
    }
    if method == "robust":
        settings["mask.warmup_steps"] = "0"
    return ["--config", str(config), *(part for name, value in settings.items() for part in (f"--{name}", value))]


def main(given: list[str]) -> None:
    model, out = given[0], Path(given[1])
    if given[2:] == ["table"]:
        sys.stdout.write(table(out))
        return
    stages, methods = (given[2:] + [STAGES, METHODS][len(given) - 2 :])[:2]
    zero.initialize()
    with distributed.together():
        if distributed.is_main():
            out.mkdir(parents=True, exist_ok=True)
            write_rows(out / "rows.jsonl")
    found = {}
    for stage in map(int, stages.split(",")):
        for method in methods.split(","):
            folder = train(parse_command_line(arguments(model, out, stage, method)))
            with distributed.together():
                if distributed.is_main():
                    record = json.loads((folder / "accounting.json").read_text())
                    found[f"{stage}-{method}"] = compare(record)
                    (out / f"ranks-{distributed.world_size()}.json").write_text(json.dumps(found, indent=1))
                    shutil.rmtree(folder)
    distributed.shutdown()


def table(out: Path) -> str:
    """Every term of every run: predicted and measured in MiB, and by how much the prediction is off."""
    lines = [
        "| ranks | stage | method | term | predicted, MiB | measured, MiB | off |",
        "|---|---|---|---|---|---|---|",
    ]
    worst: dict[str, float] = {}
    for path in sorted(out.glob("ranks-*.json"), key=lambda path: int(path.stem[6:])):
        for run, terms in json.loads(path.read_text()).items():
            for term, (predicted, measured) in terms.items():
                off = predicted / measured - 1 if measured else float("inf")
                worst[term] = max(worst.get(term, 0.0), off, -off)
                cells = (path.stem[6:], *run.split("-", 1), term, f"{predicted / 2**20:.3f}", f"{measured / 2**20:.3f}")
                lines.append(f"| {' | '.join(cells)} | {off:+.2%} |")
    summary = ["", "| term | worst |", "|---|---|", *(f"| {term} | {off:.2%} |" for term, off in worst.items())]
    return "\n".join([*lines, *summary]) + "\n"


if __name__ == "__main__":
    run_program(main)
