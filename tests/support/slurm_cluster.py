"""A real SLURM of two nodes on this machine, and a run that goes through it: ``python tests/support/slurm_cluster.py``.

The nodes are hosts of ``hosts.py``. ``launch/slurm/train.sbatch`` is submitted as it is, asked to stop in each of the ways
SLURM has, put back into the queue, and ends on one node. Prints what happened and compares the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hosts import Host, missing, network
from launching import ROOT, environment, losses, metrics

CONFIGURATION = """
ClusterName=trial
SlurmctldHost=n1
AuthType=auth/munge
# a job that was requeued waits until its last credential has run out
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n1,n2 CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# what of train.sbatch's own request a cluster of this size cannot give; one GPU a node makes one rank a node
SHAPE = ("--gpus-per-node=1", "--time=10", "--signal=USR1@60")
# dropout is drawn by each rank for itself: without it, other numbers of ranks compute the same
SETTINGS = (
    *("--config", str(ROOT / "ds_configs" / "zero2.json"), "--ds.train_batch_size", "2"),
    *("--data.train", "builtin:sql[:64]", "--data.eval", "builtin:sql[:8]"),
    *("--adapter.rank", "4", "--adapter.density", "0.01", "--adapter.dropout", "0", "--mask.warmup_steps", "3"),
    *("--mask.steps", "3", "--training.warmup_steps", "2", "--training.save_steps", "5"),
)
TIMEOUT = 240.0
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")


class Cluster:
    """A running SLURM; commands are given on its first node."""

    def __init__(self, folder: Path, nodes: list[Host]) -> None:
        self.folder, self.nodes = folder, nodes
        # a copy of the environment of these tests, which sbatch gives to its jobs
        self.environment = environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "ROSA_DS": str(ROOT),
            # DeepSpeed's communication op, which earlier runs on this machine have compiled
            "TORCH_EXTENSIONS_DIR": str(
                Path.home() / f".cache/torch_extensions/py{sysconfig.get_config_var('py_version_nodot')}_cpu"
            ),
        }

    def call(self, *command: str, **variables: str) -> str:
        return self.nodes[0].run(*command, env=self.environment | variables).strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> int:
        """The job's number."""
        path = str(ROOT / "launch" / "slurm" / script)
        output = f"--output={self.folder}/job-%j.log"
        said = self.call(
            "sbatch", "--parsable", f"--chdir={self.folder}", output, *options, path, *arguments, **variables
        )
        return int(said)

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM says of a job, or of ``job_task`` of an array: JobState, Restarts, NodeList, ExitCode ..."""
        said = self.call("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def output(self, number: int | str) -> str:
        path = self.folder / f"job-{self.job(number)['JobId']}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, number: int | str, ready: Callable[[], bool], what: str) -> None:
        """Until ``ready``; AssertionError with the job's output if it ends before, or after a while."""
        end = time.monotonic() + TIMEOUT
        while not ready():
            state = self.job(number)["JobState"]
            assert state in ALIVE, f"{state} before {what}:\n{self.output(number)[-5000:]}"
            assert time.monotonic() < end, (
                f"no {what} in {TIMEOUT:.0f} s, {state}:\n{self.output(number)[-5000:]}\n{self.call('sinfo')}"
            )
            time.sleep(0.1)

    def finish(self, number: int | str, state: str = "COMPLETED") -> None:
        """Until the job has ended, in this state."""
        end = time.monotonic() + TIMEOUT
        while (now := self.job(number)["JobState"]) in ALIVE:
            assert time.monotonic() < end, f"{now} after {TIMEOUT:.0f} s:\n{self.output(number)[-5000:]}"
            time.sleep(0.2)
        assert now == state, f"{now}:\n{self.output(number)[-5000:]}"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """SLURM on two hosts, n1 and n2; ended with all its jobs when the block is left."""
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # to be asked for
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with network(("n1", "n2"), folder / "hosts") as (_, nodes):
        it = Cluster(folder, nodes)
        for node in nodes:
            node.run("mkdir", "/run/munge")
            node.run(
                "munged",
                "--force",
                f"--key-file={key}",
                "--pid-file=/run/munge/pid",
                "--seed-file=/run/munge/seed",
                f"--log-file={folder}/munged-{node.name}.log",
                "--num-threads=1",
            )
        it.call("slurmctld")
        for node in nodes:
            node.run("slurmd", "-N", node.name, env=it.environment)
        end = time.monotonic() + 60
        while it.call("sinfo", "--noheader", "--format=%T %D") != "idle 2":
            assert time.monotonic() < end, it.call("sinfo") + "".join(path.read_text() for path in folder.glob("*.log"))
            time.sleep(0.2)
        yield it


Log = Callable[[str], None]
Stop = Callable[[Cluster, int], None]


def ask_by_scancel(it: Cluster, job: int) -> None:
    it.call("scancel", "--signal=USR1", str(job))


def reach_the_time_limit(it: Cluster, job: int) -> None:
    """Bring the limit so near that ``--signal=USR1@60`` is due. SLURM looks every half a minute, and that much ahead."""
    hours, minutes, seconds = map(int, it.job(job)["RunTime"].split(":"))
    elapsed = 3600 * hours + 60 * minutes + seconds
    it.call("scontrol", "update", f"JobId={job}", f"TimeLimit={(elapsed + 35) // 60 + 1}")


def requeue(it: Cluster, job: int) -> None:
    """What a preemption does, too: SIGTERM, and SLURM itself puts the job back."""
    it.call("scontrol", "requeue", str(job))


STOPS: dict[str, Stop] = {
    "scancel --signal=USR1": ask_by_scancel,
    "time limit": reach_the_time_limit,
    "scontrol requeue": requeue,
}


def submit_run(it: Cluster, run: Path, steps: int) -> int:
    """A job that trains into ``run``; its number."""
    return it.submit("train.sbatch", *SETTINGS, "--training.max_steps", str(steps), options=SHAPE, RUN_DIR=str(run))


def straight(it: Cluster, run: Path, steps: int) -> list[tuple[int, str, float]]:
    """The losses of a run that nobody interrupts."""
    job = submit_run(it, run, steps)
    it.finish(job)
    return losses(run)


def interrupted(it: Cluster, run: Path, steps: int, stops: list[tuple[str, int]], log: Log) -> list[int]:
    """A run that is stopped in each of these ways once it has done so many steps, and ends on one node.

    Returns: the steps after which it was stopped; AssertionError if anything is not as it should be.
    """
    job = submit_run(it, run, steps)
    log(f"job {job} submitted: {steps} steps to train")
    saved: list[int] = []
    for attempt, (way, step) in enumerate([*stops, ("", 0)], start=1):
        it.wait(job, functools.partial(has_begun, it, job, attempt), f"attempt {attempt}")
        nodes = it.job(job)["NodeList"]
        log(f"job {job}, attempt {attempt}, runs on {nodes}")
        assert nodes == ("n[1-2]" if way else "n1")
        if not way:
            break
        it.wait(job, functools.partial(has_done, run, step), f"step {step}")
        log(f"job {job}: {way} after step {steps_done(run)} or during the next")
        if attempt == len(stops):
            it.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=maintenance")
            log("node n2 is drained: it takes no more work")
        STOPS[way](it, job)
        it.wait(job, functools.partial(is_requeued, it, job, attempt, run), "requeue")
        it.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
        mark = json.loads((run / "interrupted.json").read_text())
        log(
            f"job {job}: {mark['signal'] or 'the other rank got the signal'}; saved after step {mark['step']}, back in the queue"
        )
        saved.append(mark["step"])
    it.finish(job)
    it.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    log(f"job {job} {it.job(job)['JobState']}")
    output = it.output(job)
    for step in saved:
        assert f"checkpoints/step-{step:06d}, step {step} " in output, f"not resumed from step {step}:\n{output}"
    assert not (run / "interrupted.json").exists()
    return saved


def has_begun(it: Cluster, job: int, attempt: int) -> bool:
    return f"attempt {attempt}: " in it.output(job)


def has_done(run: Path, step: int) -> bool:
    return steps_done(run) >= step


def is_requeued(it: Cluster, job: int, times: int, run: Path) -> bool:
    """And has the attempt before ended? SLURM says the first while ranks still save."""
    return int(it.job(job)["Restarts"]) == times and (run / "interrupted.json").exists()


def steps_done(run: Path) -> int:
    return max((line["step"] for line in metrics(run) if "phase" in line), default=0)


def largest_difference(found: list[tuple[int, str, float]], expected: list[tuple[int, str, float]]) -> float:
    """Of two runs' losses, relative."""
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    return max(abs(a[2] - b[2]) / abs(b[2]) for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    said = "after those that look for the mask; they must last two minutes, or no time limit is reached"
    parser.add_argument("--steps", type=int, default=1000, help=said)
    options = parser.parse_args()
    begun = time.monotonic()

    def log(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - begun:6.1f} s  {text}\n")
        sys.stdout.flush()

    if reason := missing(*PROGRAMS):
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name, cluster(Path(name)) as it:
        log(
            "SLURM " + it.call("sinfo", "--noheader", "--format=%D nodes %T, %N") + ", " + it.call("sinfo", "--version")
        )
        expected = straight(it, Path(name) / "straight", options.steps)
        log(f"job 1 ran through on 2 nodes: {len(expected)} losses, the last {expected[-1]}")
        stops = [("scancel --signal=USR1", 5), ("time limit", 12), ("scontrol requeue", options.steps * 3 // 4)]
        run = Path(name) / "stopped"
        saved = interrupted(it, run, options.steps, stops, log)
        found = losses(run)
        log(f"last losses {found[-1]}")
        same = [line for line in expected if line[0] <= saved[-1]]
        assert found[: len(same)] == same, "not bit for bit on 2 nodes"
        log(f"{len(same)} losses up to step {saved[-1]}, on 2 nodes: those of the straight run, bit for bit")
        log(
            f"all {len(found)}, the last on 1 node: largest relative difference {largest_difference(found, expected):.1e}"
        )
        out = Path(name) / "out"
        job = it.submit("export.sbatch", str(run), str(out), "--verify", options=("--cpus-per-task=2",))
        it.finish(job)
        log(f"job {job}, export.sbatch: " + it.output(job).strip().splitlines()[-1])
        log("the jobs' own log:")
        for line in it.output(2).splitlines():
            if any(
                word in line
                for word in ("attempt", "requeue", "queue", "resuming", "interrupted", "saved", "done:", "ended with")
            ):
                sys.stdout.write(f"          {line}\n")


if __name__ == "__main__":
    main()
