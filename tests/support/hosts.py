"""Several hosts on one machine: namespaces of Linux, each with a name, an address, processes and shared memory of its own.

They share the file system, as the hosts of a cluster do. All are joined by a switch in a namespace of its own, so nothing
outside changes, and a host's end of the cable can be pulled. A host ends with all its processes when its standard input is
closed, thus also when the process that made it dies in any way.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

NETWORK = "10.77.0"
UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child=KILL", "--mount-proc")
INIT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind {files}/hosts /etc/hosts
ip link set lo up
echo ready
cat >/dev/null
"""


def missing(*programs: str) -> str | None:
    """Why this machine cannot play several hosts that have these programs, or ``None`` if it can."""
    if os.geteuid() != 0:
        return "network namespaces and SLURM's daemons need root"
    for program in ("unshare", "nsenter", "ip", *programs):
        if shutil.which(program) is None:
            return f"{program} is not installed: .ci/run installs it with apt-get where it can"
    probe = subprocess.run([*UNSHARE, "sh", "-c", "ip link add br0 type bridge"], capture_output=True, text=True)
    return f"namespaces are not permitted here: {probe.stderr.strip()}" if probe.returncode else None


class Host:
    """One host. ``with`` brings it up and takes it down."""

    def __init__(self, name: str, address: str | None, folder: Path, hosts_file: str) -> None:
        self.name, self.address = name, address
        self.files = folder / name
        self.files.mkdir(parents=True, exist_ok=True)
        (self.files / "hosts").write_text(hosts_file)
        self._init: subprocess.Popen[str] | None = None
        self.pid = 0

    def __enter__(self) -> Host:
        script = INIT.format(name=self.name, files=shlex.quote(str(self.files)))
        self._init = subprocess.Popen(
            [*UNSHARE, "bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "ready\n", f"host {self.name} does not come up"
        outer = self._init.pid
        self.pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._init is not None
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        self._init.stdin.close()
        self._init.stdout.close()
        try:
            self._init.wait(timeout=20)
        finally:
            self._init.kill()  # with --kill-child: whatever is left of the host

    def command(self, *arguments: str) -> list[str]:
        """A command line of this machine that runs ``arguments`` on the host."""
        inside = ("--net", "--uts", "--ipc", "--pid", "--mount", "--wdns=" + os.getcwd())
        return ["nsenter", f"--target={self.pid}", *inside, *arguments]

    def run(self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
        """Run to the end, return standard output; AssertionError with all output on another status than 0."""
        done = subprocess.run(self.command(*arguments), env=env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{self.name}: {shlex.join(arguments)}: {done.stderr}{done.stdout}"
        return done.stdout

    def start(
        self, *arguments: str, output: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program that writes to ``output``; it ends with the host at the latest."""
        entered = self.command(*(("env", f"--chdir={cwd}") if cwd else ()), *arguments)
        with output.open("ab") as stream:
            return subprocess.Popen(entered, env=env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)


class Switch(Host):
    """What the hosts' cables lead to."""

    def plug(self, host: Host) -> None:
        outer = f"--target={self.pid}"
        cable = ("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        subprocess.run(["nsenter", outer, "--net", "ip", *cable], check=True)  # sees this machine's process ids
        self.run("ip", "link", "set", host.name, "master", "br0", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")

    def pull(self, host: Host) -> None:
        """Pull the cable: nothing reaches the host or leaves it any more, and no one is told."""
        self.run("ip", "link", "set", host.name, "down")


@contextlib.contextmanager
def network(names: Sequence[str], folder: Path, own_name_is_local: bool = False) -> Iterator[tuple[Switch, list[Host]]]:
    """A switch and hosts that reach each other by name.

    Args:
        own_name_is_local: each host finds its own name at 127.0.1.1, as Debian's installer has it.
    """
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
    with contextlib.ExitStack() as stack:
        switch = Switch("switch", None, folder, "127.0.0.1 localhost\n")
        stack.enter_context(switch)
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "link", "set", "br0", "up")
        hosts = []
        for name, address in addresses.items():
            known = {other: "127.0.1.1" if own_name_is_local and other == name else addresses[other] for other in names}
            lines = ["127.0.0.1 localhost", *(f"{where} {other}" for other, where in known.items())]
            host = Host(name, address, folder, "\n".join(lines) + "\n")
            hosts.append(stack.enter_context(host))
            switch.plug(host)
        for host in hosts:
            for other in hosts:
                assert other.address is not None
                wait_for_reply(host, other.address)
        yield switch, hosts


def wait_for_reply(host: Host, address: str, seconds: float = 20) -> None:
    """Until a host's first packets get through: a fresh bridge port takes a moment."""
    probe = f"import socket; socket.create_connection(('{address}', 9), timeout=1)"
    end = time.monotonic() + seconds
    while True:
        said = subprocess.run(host.command("python3", "-c", probe), capture_output=True, text=True, timeout=20).stderr
        if "ConnectionRefusedError" in said:
            return  # somebody is there, and nothing listens
        assert time.monotonic() < end, f"{host.name} does not reach {address}: {said}"
        time.sleep(0.2)
