"""A run on two hosts, one of which is cut off in the middle: ``python tests/support/two_hosts.py``.

The hosts are those of ``hosts.py``, with ssh between them, a hostfile and the ``deepspeed`` launcher, one rank each. The run has
to end by itself with a reason, and to go on, on the host that is left, to the losses of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hosts import Host, Switch, missing, network
from launching import ROOT, TRAIN, environment, losses, metrics

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
STALL_SECONDS = 10
SETTINGS = (
    *("--config", str(ROOT / "ds_configs" / "zero2.json"), "--ds.train_batch_size", "2"),
    *("--data.train", "builtin:sql[:64]", "--data.eval", "builtin:sql[:8]"),
    # dropout is drawn by each rank for itself: without it, other numbers of ranks compute the same
    *("--adapter.rank", "4", "--adapter.density", "0.01", "--adapter.dropout", "0", "--mask.score", "random"),
    *("--training.warmup_steps", "2", "--training.save_steps", "5"),
    *("--training.stall_minutes", str(STALL_SECONDS / 60)),
)
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
"""
SSH = """
IdentityFile {folder}/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""
# as the README has it: ssh to a host that is cut off ends after a while, and does not wait for it for ever
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
TIMEOUT = 200.0


@contextlib.contextmanager
def hosts_with_ssh(folder: Path) -> Iterator[tuple[Switch, Host, Host]]:
    """Two hosts, ``alpha`` and ``beta``, that let each other in without a password."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    with network(("alpha", "beta"), folder, own_name_is_local=True) as (switch, (alpha, beta)):
        for host in (alpha, beta):
            host.run("mkdir", "/run/sshd")
            host.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config")
            host.run("/usr/sbin/sshd", "-f", str(folder / "sshd_config"), "-E", str(folder / f"sshd-{host.name}.log"))
        for host, other in ((alpha, beta), (beta, alpha), (alpha, alpha)):
            assert host.run("ssh", other.name, "hostname").strip() == other.name
        yield switch, alpha, beta


def launch(host: Host, folder: Path, hosts: tuple[str, ...], *arguments: str) -> subprocess.Popen[bytes]:
    """``deepspeed`` with a hostfile, as a user on this host would start it; it writes to ``folder/output``."""
    folder.mkdir(exist_ok=True)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in hosts))
    env = environment() | {"PDSH_SSH_ARGS_APPEND": KEEP_ALIVE}
    # what the launcher does not hand to other hosts by itself; another ninja than before compiles DeepSpeed's ops again
    (folder / ".deepspeed_env").write_text(f"OMP_NUM_THREADS=1\nPATH={env['PATH']}\n")
    launcher = (str(Path(sys.executable).parent / "deepspeed"), "--hostfile", "hostfile", TRAIN)
    return host.start(*launcher, *SETTINGS, *arguments, output=folder / "output", env=env, cwd=folder)


def wait(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool], what: str) -> None:
    """Until ``ready``, while the launcher runs; AssertionError with its output otherwise."""
    end = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, f"ended before {what}:\n{(folder / 'output').read_text()[-6000:]}"
        assert time.monotonic() < end, f"no {what} in {TIMEOUT:.0f} s:\n{(folder / 'output').read_text()[-6000:]}"
        time.sleep(0.05)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.wait(timeout=TIMEOUT)
    assert process.returncode == 0, (folder / "output").read_text()[-6000:]


def has_done(run: Path, step: int) -> bool:
    return any(line["step"] >= step and "phase" in line for line in metrics(run))


def ranks_on(host: Host) -> list[str]:
    """Command lines of the run's processes on a host."""
    return [line for line in host.run("ps", "-e", "-o", "args=").splitlines() if TRAIN in line and "ps -e" not in line]


def scenario(folder: Path, steps: int, log: Callable[[str], None]) -> None:
    """Undisturbed run, cut-off run, resumed run; AssertionError if anything is not as it should be."""
    more = ("--training.max_steps", str(steps))
    undisturbed, cut = folder / "undisturbed", folder / "cut"
    run = cut / "runs" / "default"
    with hosts_with_ssh(folder) as (switch, alpha, beta):
        log(f"alpha is {alpha.address}, beta {beta.address}; each finds its own name at 127.0.1.1")
        undisturbed.mkdir()
        alone = (sys.executable, TRAIN, *SETTINGS, *more)
        finish(alpha.start(*alone, output=undisturbed / "output", env=environment(), cwd=undisturbed), undisturbed)
        expected = losses(undisturbed / "runs" / "default")
        log(f"a run on alpha alone, undisturbed: {len(expected)} losses, the last {expected[-1]}")

        process = launch(alpha, cut, ("alpha", "beta"), *more)
        wait(process, cut, functools.partial(has_done, run, steps // 2), f"step {steps // 2}")
        switch.pull(beta)
        pulled = time.monotonic()
        log(f"beta's cable is pulled after step {metrics(run)[-1]['step']} of {steps}")
        process.wait(timeout=TIMEOUT)
        ended = time.monotonic() - pulled
        log(
            f"the launcher ended {ended:.0f} s later with status {process.returncode} (training.stall_minutes: {STALL_SECONDS} s)"
        )
        output = (cut / "output").read_text()
        reasons = [line for line in output.splitlines() if "no progress for" in line]
        assert process.returncode != 0
        assert reasons, output[-6000:]
        for line in reasons:
            log(f"alpha said: {line}")
        assert "no progress for 10 s: rank 1 on beta (no sign of life) at '" in reasons[0], reasons[0]
        while left := ranks_on(beta):
            assert time.monotonic() - pulled < TIMEOUT, f"still on beta, which nobody reaches: {left}"
            time.sleep(0.2)
        assert not ranks_on(alpha)
        log(
            f"no process of the run is left on either host {time.monotonic() - pulled:.0f} s after the cable was pulled"
        )

        finish(launch(alpha, cut, ("alpha",), *more, "--resume"), cut)
        found = losses(run)
        resumed = next(line for line in (cut / "output").read_text().splitlines() if "resuming from" in line)
        log(f"alpha alone: {resumed}")
        assert [line[:2] for line in found] == [line[:2] for line in expected]
        difference = max(abs(a[2] - b[2]) / abs(b[2]) for a, b in zip(found, expected, strict=True))
        log(
            f"all {len(found)} losses, the last {found[-1]}: largest relative difference to the undisturbed run {difference:.1e}"
        )
        assert difference < 1e-5
        assert ended < STALL_SECONDS + 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    begun = time.monotonic()

    def log(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - begun:6.1f} s  {text}\n")
        sys.stdout.flush()

    if reason := missing(*PROGRAMS):
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name:
        scenario(Path(name), options.steps, log)


if __name__ == "__main__":
    main()
