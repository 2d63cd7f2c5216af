"""Runs that are stopped, poisoned or killed, and what is left of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import faults
from launching import ROOT, TRAIN, kill, losses, metrics, run, start
from rosa_ds.training.interrupt import Interruption

pytestmark = pytest.mark.ranks
TIMEOUT = 200


def wait_until(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, "the run ended too soon"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, float]]:
    return faults.straight_losses(tmp_path_factory.mktemp("straight"))


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(
    tmp_path: Path, expected: list[tuple[int, str, float]]
) -> None:
    """In warm-up, while gradients are collected, while a checkpoint is written, and in the last evaluation."""
    folder = tmp_path / "runs" / "default"
    checkpoints = folder / "checkpoints"

    def reached(step: int) -> Callable[[], bool]:
        return lambda: any(line["step"] >= step and "phase" in line for line in metrics(folder))

    stops: list[tuple[Callable[[], bool], signal.Signals]] = [
        (reached(1), signal.SIGTERM),
        (reached(4), signal.SIGUSR1),
        (lambda: reached(6)() and bool(list(checkpoints.glob(".step-*.partial"))), signal.SIGTERM),
        (reached(12), signal.SIGINT),
    ]
    for number, (ready, chosen) in enumerate(stops):
        process = faults.start(tmp_path, *(["--resume"] if number else []))
        try:
            wait_until(process, ready)
            os.kill(faults.ranks_of(process)[number % 2], chosen)
            asked = time.monotonic()
            assert process.wait(timeout=TIMEOUT) != 0
        finally:
            if process.poll() is None:
                kill(process)
        assert time.monotonic() - asked < 30
        mark = json.loads((folder / "interrupted.json").read_text())
        assert (checkpoints / "latest").read_text() == f"step-{mark['step']:06d}\n"
        assert f"after step {mark['step']}: the state is saved" in (tmp_path / "output").read_text()
        said = (tmp_path / "output").read_text()  # no traceback but torchrun's own, which may lie in the clone, too
        assert not any(f'File "{ROOT / part}' in said for part in ("rosa_ds", "kernels", "launch"))
    faults.finish(tmp_path)
    assert losses(folder) == expected
    assert not (folder / "interrupted.json").exists()
    assert (folder / "adapter" / "rosa_adapter.json").is_file()


def test_one_process_ends_with_the_status_for_requeueing(tmp_path: Path) -> None:
    process = start("python", 1, TRAIN, *faults.STEPS, cwd=tmp_path)
    wait_until(process, lambda: bool(metrics(tmp_path / "runs" / "default")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, output


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """But not one that a launcher passes on at once, nor any that a script's ``&`` has switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may have been started with ``&``
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interruption.received == "SIGINT"
            monkeypatch.setattr(Interruption, "AGAIN_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert capfd.readouterr().err.count("saving after this step") == 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, expected: list[tuple[int, str, float]]) -> None:
    """Two kills; ``python tests/support/faults.py`` does many."""
    faults.trial(tmp_path, expected, 2, random.Random(int(time.time())))


def test_a_user_asks_for_a_checkpoint_and_nobody_else_gets_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "default"
    endless = ("--mask.score", "random", "--training.max_steps", "5000", "--training.save_steps", "0")
    process = faults.start(tmp_path, *endless)
    try:
        wait_until(process, lambda: bool(metrics(folder)))
        (folder / "save").touch()
        second = run("fork", 1, TRAIN, *faults.STEPS, cwd=tmp_path, status=1)
        wait_until(process, lambda: any(line.get("event") == "save" for line in metrics(folder)))
        os.kill(faults.ranks_of(process)[0], signal.SIGTERM)
        process.wait(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            kill(process)
    assert "runs/default: a run is writing there (process " in second
    saved = [line["step"] for line in metrics(folder) if line.get("event") == "save"]
    assert len(saved) == 2
    assert 0 < saved[0] < saved[1] == json.loads((folder / "interrupted.json").read_text())["step"]
    assert not (folder / "save").exists()


def test_a_forked_process_ends_at_once() -> None:
    """As it would without the handlers, which are those of the run: processes that tokenise are ended with a signal."""
    with Interruption() as interruption:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b"here")
            time.sleep(10)
            os._exit(0)
        assert os.read(reader, 4) == b"here"
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not interruption.requested


POISON = """
import os
from rosa_ds.commands.train import main
from rosa_ds.commands.program import run_program
from rosa_ds.training import loop

calls = 0
real = loop.token_loss_sum

def poisoned(*arguments):
    global calls
    calls += 1
    bad = os.environ["RANK"] == "0" and str(calls) in os.environ["BAD_STEPS"].split(",")
    return real(*arguments) * (float("nan") if bad else 1.0)

loop.token_loss_sum = poisoned
run_program(main)
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_without_a_finite_loss_changes_nothing(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    arguments = ("--config", str(ROOT / "ds_configs" / f"zero{stage}.json"), *faults.STEPS[2:])
    more = ("--mask.score", "random", "--training.keep_checkpoints", "9")
    monkeypatch.setenv("BAD_STEPS", "3")
    output = run("fork", 2, str(script), *arguments, *more, cwd=tmp_path)
    assert "step 3 is left out: its loss is nan" in output
    folder = tmp_path / "runs" / "default"
    before, after, later = (
        {
            name: tensor
            for path in (folder / "checkpoints" / f"step-00000{step}").glob("trained-*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for step in (2, 3, 4)
    )
    assert all((before[name] == tensor).all() for name, tensor in after.items())
    assert any((before[name] != tensor).any() for name, tensor in later.items())
    assert [line["loss"] is None for line in metrics(folder) if "phase" in line] == [False] * 2 + [True] + [False] * 3
    if stage != 2:
        return
    monkeypatch.setenv("BAD_STEPS", "3,4,5")
    output = run("fork", 2, str(script), *arguments, *more, "--training.max_bad_steps", "2", cwd=tmp_path, status=1)
    assert "3 steps in a row left out" in output
    assert "the last good checkpoint is runs/default/checkpoints/step-000004" in output
