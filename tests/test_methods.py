"""The protocol between the loop and methods: a method of a user's own is one file and one entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launching import ROOT, losses, metrics, run

COUNTING = '''
import dataclasses, sys, types
sys.path.insert(0, {launch!r})
from rosa_ds import methods
from rosa_ds.checkpoints.checkpoint import MethodState
from rosa_ds.config.methods import METHODS
from rosa_ds.memory.account import Term


class Method(methods.Method):
    """Counts the steps that were applied, and writes down which hooks are called."""

    count = 0

    def say(self, hook, step):
        self.context.record(step=step, event="hook", hook=hook, count=self.count)

    def start(self, context):
        super().start(context)
        self.count = 0

    def restore(self, saved, source):
        self.count = saved.extra["counting"]["count"]
        self.say("restore", saved.step)

    def begin(self, step):
        self.say("begin", step)

    def before_step(self, step):
        self.say("before_step", step.number)

    def after_step(self, step, scale, applied):
        self.count += applied
        self.say("after_step", step.number + 1)

    def restart(self):
        self.say("restart", 0)
        self.count = 0

    def state(self):
        return MethodState({{"extra": {{"counting": {{"count": self.count}}}}}})

    @staticmethod
    def memory_terms(model, plan, settings, ranks, gpu):
        return [Term("counter", 8, "between steps")]


module = types.ModuleType("rosa_ds.methods.counting")
module.Method = Method
sys.modules[module.__name__] = module
robust = METHODS["robust"]
METHODS["robust"] = dataclasses.replace(robust, around_steps=(*robust.around_steps, "counting"))

from rosa_ds.commands.program import run_program
from rosa_ds.commands.train import main
run_program(main)
'''
SETTINGS = (
    *("--config", str(ROOT / "ds_configs" / "zero2.json"), "--data.train", "builtin:sql[:96]"),
    *(
        "--data.eval",
        "builtin:sql[:16]",
        "--adapter.rank",
        "4",
        "--adapter.density",
        "0.01",
        "--mask.warmup_steps",
        "2",
    ),
    *("--training.max_steps", "4", "--training.save_steps", "2", "--training.keep_checkpoints", "9"),
)


@pytest.mark.ranks
def test_another_method_is_one_file_and_one_entry(tmp_path: Path) -> None:
    """Its hooks are called around every step, its state is saved and restored, and the others' losses stay as they are."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(launch=str(ROOT / "launch")))
    run("fork", 2, str(ROOT / "launch" / "train.py"), *SETTINGS, cwd=tmp_path)
    plain = losses(tmp_path / "runs" / "default")
    run("fork", 2, str(script), *SETTINGS, "--training.output_dir", "runs/counted", cwd=tmp_path)
    folder = tmp_path / "runs" / "counted"
    assert losses(folder) == plain

    def hooks() -> list[tuple[str, int]]:
        return [(line["hook"], line["count"]) for line in metrics(folder) if line.get("event") == "hook"]

    # two steps of warm-up and one that collects; then training begins again
    before = [("begin", 0), ("before_step", 0), ("after_step", 1), ("before_step", 1), ("after_step", 2)]
    before += [("before_step", 2), ("after_step", 3), ("restart", 3)]
    after = [(hook, step + done) for step in range(4) for hook, done in (("before_step", 0), ("after_step", 1))]
    assert hooks() == [*before, *after]
    state = json.loads((folder / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["extra"] == {"counting": {"count": 1}}
    assert json.loads((folder / "accounting.json").read_text())["predicted"]["memory"]["counter"] == 8

    resumed = (
        *SETTINGS,
        "--training.output_dir",
        "runs/counted",
        "--resume",
        str(folder / "checkpoints" / "step-000004"),
    )
    run("fork", 2, str(script), *resumed, cwd=tmp_path)
    assert losses(folder) == plain
    found = hooks()
    assert found[found.index(("restore", 1)) + 1 :] == [("begin", 1), *after[2:]]
