"""Kill ranks of a run at random moments and resume it, again and again: ``python tests/support/faults.py --kills 30``.

With ``--method subspace`` the run draws before every other step, and some kills fall into a draw or right after one.

Every resumed run must end with the losses of the uninterrupted one, bit for bit. Prints where the kills fell.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from launching import ROOT, TRAIN, command, environment, kill, losses, metrics

STEPS = (
    *("--config", str(ROOT / "ds_configs" / "zero2.json"), "--data.train", "builtin:sql[:96]"),
    *(
        "--data.eval",
        "builtin:sql[:16]",
        "--adapter.rank",
        "4",
        "--adapter.density",
        "0.01",
        "--adapter.dropout",
        "0.1",
    ),
    *("--training.warmup_steps", "2", "--mask.warmup_steps", "3", "--mask.steps", "3", "--training.max_steps", "6"),
    *("--training.save_steps", "1", "--training.eval_steps", "4"),
)
DRAW_EVERY = 2
DRAW_STEPS = (2, 4)  # of 6; the first, before any checkpoint, is not counted
DRAWS = ("--draw.every", f"{DRAW_EVERY} steps")
TIMEOUT = 300.0


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A run on two ranks that writes its output to ``folder/output``."""
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            command("torchrun", 2, (TRAIN, *STEPS, *more)),
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the ranks: what the launcher started directly."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    return [pid for pid, parent in pairs if parent == launcher.pid]


def draws_now(run: Path) -> bool:
    """Is a draw the next thing that a run which draws will say it has done? It saves after each step."""
    last = metrics(run)[-1:]
    return bool(last) and last[0].get("event") == "save" and last[0]["step"] in DRAW_STEPS


def moment(run: Path, draws: bool) -> str:
    """What the run is doing, by what it has left so far."""
    if list((run / "checkpoints").glob(".step-*")):
        return "saving"
    lines = metrics(run)
    if draws and draws_now(run):
        return "in a draw"
    if lines and lines[-1].get("event") == "draw":
        return "right after a draw"
    steps = [line["phase"] for line in lines if "phase" in line]
    return f"after a {steps[-1]} step" if steps else "before the first step"


def kill_once(folder: Path, run: Path, chance: random.Random, more: tuple[str, ...], at: str | None) -> str | None:
    """Start or resume, kill one rank at a random moment, wait for the launcher; where it fell, or None if it was over.

    Args:
        at: ``save`` or ``draw``: wait for one.
    """
    process = start(folder, *more)
    try:
        begun, done = time.monotonic(), len(metrics(run))
        wait = chance.uniform(0.0, 7.0)
        while process.poll() is None and len(metrics(run)) <= done and time.monotonic() - begun < TIMEOUT:
            time.sleep(0.02)  # until this attempt has got further than the last
        end = time.monotonic() + wait
        while process.poll() is None and time.monotonic() < end:
            if at == "save" and list((run / "checkpoints").glob(".step-*.partial")):
                break
            if at == "draw" and draws_now(run):
                time.sleep(chance.uniform(0.0, 0.3))
                break
            time.sleep(0.001)
        ranks = ranks_of(process)
        if process.poll() is not None or not ranks:
            return None
        where = moment(run, draws=DRAWS[0] in more)
        os.kill(chance.choice(ranks), signal.SIGKILL)
        process.wait(timeout=TIMEOUT)
        return where
    finally:
        if process.poll() is None:
            kill(process)


def finish(folder: Path, *more: str) -> None:
    process = start(folder, *more, "--resume")
    try:
        if process.wait(timeout=TIMEOUT) != 0:
            raise AssertionError((folder / "output").read_text()[-4000:])
    finally:
        if process.poll() is None:
            kill(process)


def straight_losses(folder: Path, *more: str) -> list[tuple[int, str, float]]:
    process = start(folder, *more)
    if process.wait(timeout=TIMEOUT) != 0:
        raise AssertionError((folder / "output").read_text()[-4000:])
    return losses(folder / "runs" / "default")


def trial(
    folder: Path, expected: list[tuple[int, str, float]], kills: int, chance: random.Random, more: tuple[str, ...] = ()
) -> Counter[str]:
    """Kill one run ``kills`` times on its way, then let it end. Raises AssertionError unless its losses are right."""
    run, fell = folder / "runs" / "default", Counter[str]()
    for _ in range(kills):
        resumable = bool(list((run / "checkpoints").glob("step-*"))) if run.exists() else False
        wanted = chance.choices(("save", "draw", None), (4, 4 if DRAWS[0] in more else 0, 6))[0]
        where = kill_once(folder, run, chance, (*more, *(["--resume"] if resumable else [])), wanted)
        if where is None:
            break
        fell[where] += 1
    if list((run / "checkpoints").glob("step-*")):
        finish(folder, *more)
    else:
        straight_losses(folder, *more)
    found = losses(run)
    assert found == expected, f"{found}\nis not\n{expected}\nin {folder}"
    return fell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("robust", "subspace"), default="robust")
    options = parser.parse_args()
    more = ("--method", options.method, *(DRAWS if options.method == "subspace" else ()))
    chance, fell = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "straight").mkdir()
        expected = straight_losses(folder / "straight", *more)
        trials = 0
        while fell.total() < options.kills:
            trials += 1
            (folder / f"{trials}").mkdir()
            fell += trial(folder / f"{trials}", expected, min(4, options.kills - fell.total()), chance, more)
            sys.stdout.write(f"{trials} runs, {fell.total()} kills: {dict(fell)}\n")
            sys.stdout.flush()
    sys.stdout.write(f"all {trials} runs ended with the uninterrupted run's {len(expected)} losses, bit for bit\n")


if __name__ == "__main__":
    main()
