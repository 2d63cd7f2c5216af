"""Evaluate a run or a model: ``rosa-ds eval MODEL_OR_RUN_DIR --data FILE --metric exact_match --output FILE.json``.

Under ``torchrun --nproc_per_node N -m rosa_ds.commands.eval`` the rows are divided over the ranks; each has the whole model.
lm-eval's tasks: ``--harness``.
"""

from __future__ import annotations

from rosa_ds import distributed
from rosa_ds.commands.program import run_program


def main(arguments: list[str]) -> None:
    distributed.leave_hub_to_first_rank()
    from rosa_ds.evaluation.options import parse

    options = parse(arguments, __doc__ or "")
    from rosa_ds.evaluation.program import evaluate

    evaluate(options)


if __name__ == "__main__":
    run_program(main)
