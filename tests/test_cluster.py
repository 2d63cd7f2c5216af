"""Runs on several hosts: under a real SLURM, and with the deepspeed launcher over ssh."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hosts
import slurm_cluster
import two_hosts
from launching import ROOT, losses
from slurm_cluster import Cluster

pytestmark = pytest.mark.ranks
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := hosts.missing(*slurm_cluster.PROGRAMS):
        pytest.skip(f"no SLURM: {reason}")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as it:
        yield it


@pytest.mark.timeout(900)
def test_slurm_stops_requeues_and_resumes_on_the_node_that_is_left(slurm: Cluster, tmp_path: Path) -> None:
    """``python tests/support/slurm_cluster.py`` also reaches a time limit, which SLURM takes half a minute to notice."""
    steps = 20
    expected = slurm_cluster.straight(slurm, tmp_path / "straight", steps)
    stops = [("scancel --signal=USR1", 5), ("scontrol requeue", 12)]
    said: list[str] = []
    saved = slurm_cluster.interrupted(slurm, tmp_path / "stopped", steps, stops, said.append)
    found = losses(tmp_path / "stopped")
    on_two_nodes = [line for line in expected if line[0] <= saved[-1]]
    assert 12 <= saved[-1] < len(expected)
    assert found[: len(on_two_nodes)] == on_two_nodes, said
    assert slurm_cluster.largest_difference(found, expected) < 1e-5, said
    assert (tmp_path / "stopped" / "adapter" / "rosa_adapter.json").is_file()

    out = tmp_path / "out"
    job = slurm.submit("export.sbatch", str(tmp_path / "stopped"), str(out), options=("--cpus-per-task=2",))
    slurm.finish(job)
    assert (out / "model.safetensors").is_file()


def test_slurm_requeues_one_run_of_a_sweep_and_lets_a_cancelled_one_be(slurm: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--adapter.alpha 2\n--adapter.alpha 3 --draw.every '5000 steps' --training.max_steps 5000\n")
    options = (*slurm_cluster.SHAPE, "--cpus-per-gpu=2", "--array=1-2")
    common = (*slurm_cluster.SETTINGS, "--mask.score", "random", "--training.max_steps", "2")
    job = slurm.submit("array.sbatch", str(sweep), *common, options=options, RUNS_DIR=str(tmp_path))
    first, second = f"{job}_1", f"{job}_2"
    slurm.wait(second, functools.partial(slurm_cluster.has_done, tmp_path / "2", 2), "second step")
    slurm.call("scancel", "--signal=USR1", second)
    slurm.wait(second, functools.partial(slurm_cluster.is_requeued, slurm, second, 1, tmp_path / "2"), "requeue")
    mark = json.loads((tmp_path / "2" / "interrupted.json").read_text())
    slurm.wait(second, functools.partial(slurm_cluster.has_done, tmp_path / "2", mark["step"] + 1), "resumed step")
    slurm.call("scancel", second)
    slurm.finish(second, "CANCELLED")
    slurm.finish(first)
    assert (mark["signal"], slurm.job(second)["Restarts"], slurm.job(first)["Restarts"]) == ("SIGUSR1", "1", "0")
    assert json.loads((tmp_path / "2" / "interrupted.json").read_text())["signal"] == "SIGTERM"
    assert slurm_cluster.steps_done(tmp_path / "1") == 2
    settings = [json.loads((tmp_path / line / "config.json").read_text()) for line in ("1", "2")]
    assert [each["adapter"]["alpha"] for each in settings] == [2, 3]
    assert settings[1]["draw"]["every"] == "5000 steps"


def test_two_hosts_one_of_which_is_cut_off(tmp_path: Path) -> None:
    if reason := hosts.missing(*two_hosts.PROGRAMS):
        pytest.skip(f"no hosts with ssh: {reason}")
    two_hosts.scenario(tmp_path, 16, lambda line: None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert os.access(script, os.R_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_line_of_a_sweep_that_is_broken(tmp_path: Path) -> None:
    """A quote that is not closed: no run with the words before it."""
    (tmp_path / "sweep.txt").write_text('--adapter.rank 8 --data.separator "a\n')
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    (tmp_path / "launch" / "slurm" / "train.sbatch").write_text("echo trained\n")
    script = next(path for path in SCRIPTS if path.name == "array.sbatch")
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "ROSA_DS": str(tmp_path)}
    command = ["bash", str(script), str(tmp_path / "sweep.txt")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "trained" not in done.stdout
    assert "error: line 1 of" in done.stderr
    (tmp_path / "sweep.txt").write_text("--adapter.rank 8 --data.separator 'a b'\n")
    assert "trained" in subprocess.run(command, env=os.environ | variables, capture_output=True, text=True).stdout


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    if reason := hosts.missing():
        pytest.skip(reason)
    before = {path.name for path in Path("/sys/class/net").iterdir()}
    with hosts.network(("one", "two"), tmp_path) as (switch, (one, two)):
        assert one.run("hostname").strip() == "one"
        sleeper = two.start("sleep", "1000", output=tmp_path / "output")
        assert {path.name for path in Path("/sys/class/net").iterdir()} == before
        switch.pull(two)
        with pytest.raises(AssertionError, match="one does not reach 10.77.0.2"):
            hosts.wait_for_reply(one, "10.77.0.2", seconds=0.1)
        assert sleeper.poll() is None
    assert sleeper.wait(timeout=20) != 0
