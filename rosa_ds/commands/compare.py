"""Compare methods: ``rosa-ds compare STUDY.json --output OUT [--jobs N] [--only PATTERN] [--report-only]``.

Does every run of the study that is not finished, and writes report.md, results.json and plots.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import shlex
import sys
from pathlib import Path

from rosa_ds.commands.program import run_program


def check_evaluations(study: Path) -> None:
    """Raise ValueError for an evaluation that ``rosa-ds eval`` would refuse, or cannot do for the task of the variants."""
    from rosa_ds.comparing.study import read_study
    from rosa_ds.evaluation.options import parse
    from rosa_ds.evaluation.scores import CLASSIFIED

    read = read_study(study)
    tasks = {(read.settings | own).get("model.task", "causal-lm") for own in read.variants.values()}
    for entry in read.evaluate:
        where, said = f"study {study}: evaluate {entry.title}", io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                parse(["tiny", *entry.arguments()])
            except SystemExit:
                raise ValueError(f"{where}: {said.getvalue().strip()}") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        wrong = [m for m in entry.metric if any((m in CLASSIFIED) != (task == "classification") for task in tasks)]
        if wrong:
            raise ValueError(f"{where}: metric {wrong[0]} is not one of model.task {' and '.join(sorted(tasks))}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="rosa-ds compare", description=__doc__)
    parser.add_argument("study", type=Path, help="JSON file; the project's folder studies has examples")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study; what is finished in it stays")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--only", metavar="PATTERN", help="these runs alone, e.g. lora, 'robust*' or '*/final-seed1'")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the report of what there is")
    options = parser.parse_args(arguments)
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"rosa-ds compare needs {' and '.join(missing)}: pip install 'rosa-ds[compare]'")
    if options.jobs < 1:
        raise ValueError(f"--jobs is 1 or more, given {options.jobs}")
    from rosa_ds.checkpoints.folder_lock import hold_folder
    from rosa_ds.comparing.run_study import Options, run_study
    from rosa_ds.comparing.runner import Programs

    if not options.report_only:
        hold_folder(options.output, "--output")
    check_evaluations(options.study)
    programs = Programs(*([sys.executable, "-m", f"rosa_ds.commands.{name}"] for name in ("train", "eval")))
    command = shlex.join(["rosa-ds", "compare", *arguments])
    run_study(Options(**vars(options), command=command), programs)


if __name__ == "__main__":
    run_program(main)
