"""``rosa-ds doctor --gpu OUT`` on the CPU: stages that hang or crash, the files it leaves, and what its stages compute."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rosa_ds.commands.dispatch import dispatch
from rosa_ds.models.quantized import Form
from rosa_ds.planning.gpu_check import determinism, kernels, quantised, roofline, runner
from rosa_ds.planning.gpu_check.layer import Layer
from rosa_ds.planning.gpu_check.report import TEXT, Report, read_records
from rosa_ds.planning.gpu_check.stage import Check, Stage
from rosa_ds.planning.gpu_check.stages import STAGES

SUPPORT = Path(__file__).parent / "support"
CPU = torch.device("cpu")


def planted(name: str, seconds: float = 100.0) -> Stage:
    return Stage(name, f"gpu_check_stages:{name}", seconds, f"a stage that {name}")


@pytest.fixture(autouse=True)
def _stages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]))


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    return False


def wait_until_gone(pids: list[int]) -> None:
    """A signal is delivered some time after it is sent."""
    end = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < end, "a stage goes on after its end"
        time.sleep(0.1)


def test_every_end_of_a_stage_is_recorded(tmp_path: Path) -> None:
    stages = [planted("crashes"), planted("lacks")]
    ends = {end["stage"]: end for end in runner.check(tmp_path / "out", stages)}
    assert ends["crashes"]["outcome"] == "failed"
    assert ends["crashes"]["last lines"][-1] == "RuntimeError: the cause is on the last line"
    assert (ends["lacks"]["outcome"], ends["lacks"]["why"]) == ("not run", "needs something that is not here")
    records = read_records(tmp_path / "out")
    assert [(r["stage"], r["event"]) for r in records[:3]] == [("crashes", e) for e in ("begun", "found", "ended")]
    text = (tmp_path / "out" / TEXT).read_text()
    for said in ("crashes ended: outcome failed", "number 0.3333, nothing none\n", "      two\n"):
        assert said in text, text
    with pytest.raises(ValueError, match="results of an earlier check: give --gpu another folder"):
        runner.check(tmp_path / "out", stages)


def test_a_stage_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    (end,) = runner.check(tmp_path, [planted("hangs", seconds=5.0)])
    assert (end["outcome"], end["why"]) == ("killed", "not done at its deadline of 5 s")
    assert end["seconds"] < 15
    assert [record.get("before") for record in read_records(tmp_path) if record["event"] == "found"] == ["it hangs"]
    wait_until_gone([int(end["last lines"][-1].split()[-1])])


def test_no_stage_begins_when_the_time_of_all_is_over(tmp_path: Path) -> None:
    (end,) = runner.check(tmp_path, [planted("lacks")], total=0.5)
    assert (end["outcome"], end["why"]) == ("not run", "no time is left of the whole check")


def test_the_files_are_whole_when_the_check_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib\nfrom rosa_ds.planning.gpu_check import runner, stage\n"
        "runner.check(pathlib.Path('out'), [stage.Stage('hangs', 'gpu_check_stages:hangs', 100.0, '')])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    file, end = tmp_path / "out" / "results.jsonl", time.monotonic() + 60
    while not (file.exists() and "it hangs" in file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = [int(pid) for pid, parent in map(str.split, listing.splitlines()) if int(parent) == process.pid]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with file.open("a") as stream:
        stream.write('{"stage": "hangs", "ev')  # as if killed while it writes
    assert [record["event"] for record in read_records(tmp_path / "out")] == ["begun", "found"]
    assert "before it hangs" in (tmp_path / "out" / TEXT).read_text()
    wait_until_gone(children)


def test_stages_are_chosen_by_name() -> None:
    assert [stage.name for stage in runner.choose_stages("steps, kernels")] == ["kernels", "steps"]
    assert runner.choose_stages(None) == list(STAGES)
    assert sum(stage.seconds for stage in STAGES) <= runner.TOTAL_SECONDS == 600
    with pytest.raises(ValueError, match="no stage 'kernel'. Did you mean kernels. Give some of environment, kernels,"):
        runner.choose_stages("kernel")
    with pytest.raises(ValueError, match="--stages chooses stages of --gpu OUT"):
        dispatch(["doctor", "--stages", "kernels"])


def test_the_command_with_one_stage(tmp_path: Path) -> None:
    dispatch(["doctor", "--gpu", str(tmp_path / "out"), "--stages", "determinism,graph"])
    records = read_records(tmp_path / "out")
    assert [r["outcome"] for r in records if r["event"] == "ended"] == ["done", "not run"]
    assert records[-1]["why"] == "needs a GPU"
    found = [record for record in records if record["event"] == "found"]
    assert len(found) == 6
    assert all(record["unlike"] == [] and record["on"].startswith("CPU") for record in found)


def test_other_bits_are_seen() -> None:
    numbers = iter(range(100))
    same = torch.ones(3)
    assert determinism.differing(lambda: {"same": same, "other": same * (next(numbers) // 5)}, times=6) == ["other"]
    assert determinism.differing(lambda: {"same": same}) == []


def test_quantised_numbers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    form = Form("nf4", True, (64, 80), torch.float32)
    same = quantised.differences(form, CPU)
    assert (same["packed bytes that differ"], same["numbers that differ, of the same bits"]) == (0, 0)
    pack, calls = Form.pack, iter((1.0, 1.5))
    monkeypatch.setattr(Form, "pack", lambda self, weight: pack(self, weight.sin() * next(calls) + 0.01))
    assert quantised.differences(form, CPU)["packed bytes that differ"] > 0


def test_work_is_counted() -> None:
    """By the definition: T = 3, N = 5, M = 7, R = 16, Z = 2, numbers of 4 bytes."""
    layer = Layer.make(3, 5, 7, torch.float32, CPU, density=2 / 35)
    assert layer.sizes == (3, 5, 7, 16, 2)
    work = {each.name: (each.bytes, each.flops) for each in roofline.kernel_work(layer)}
    assert work["sddmm"] == (4 * (3 * 5 + 3 * 7 + 2 + 2), 2 * 3 * 2)
    assert work["spmm"] == (4 * (3 * 7 + 2 * 3 * 5 + 2 + 2), 2 * 3 * 2)
    assert work["forward and backward"][1] == 2 * (2 * 3 * 5 * 7) + 3 * (2 * 3 * 16 * (5 + 7)) + 2 * 3 * 2
    assert roofline.Rates(10.0, 100.0).least(50, 200) == 5.0
    assert roofline.Rates(10.0, 100.0).least(5, 200) == 2.0


def test_without_a_checkout_one_product_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TESTS", tmp_path / "none.py")
    kernels.test(Check(planted("kernels"), Report(tmp_path, 0.0), tmp_path))
    (record,) = read_records(tmp_path)
    assert record["tests"].startswith("not run: needs a checkout")
    assert "relative error" in record["kernel tried"]


@pytest.mark.nightly
def test_the_whole_command(tmp_path: Path) -> None:
    """About two minutes on a free core; deadlines here allow for a busy machine."""
    generous = [dataclasses.replace(stage, seconds=200) for stage in STAGES]
    ends = {end["stage"]: end["outcome"] for end in runner.check(tmp_path, generous, total=550)}
    assert ends == {stage.name: "not run" if stage.gpu else "done" for stage in STAGES}
    found = [record for record in read_records(tmp_path) if record["event"] == "found"]
    resumed = next(record for record in found if record["stage"] == "resume")
    assert resumed["same_losses"]
    assert resumed["same_files"]
    ranks = next(record for record in found if record["stage"] == "ranks")
    assert ranks["largest_relative_difference"] < 1e-5
    steps = [record for record in found if record["stage"] == "steps"]
    assert {"peft-lora", "lora"} < {record["candidate"] for record in steps}
