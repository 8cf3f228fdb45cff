"""Two hosts on one machine: network namespaces with an address each, joined by a veth pair. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

TIMEOUT = 60
PORT = 29477


class NoHosts(Exception):
    """There can be none here; the message says why."""


@dataclass(frozen=True)
class Host:
    """A network namespace, its address, and the working folder of what runs there."""

    name: str
    address: str
    folder: Path

    def torchrun(self, meet_at: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start one process of two hosts that meet at an address."""
        launcher = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet_at}:{PORT}"]
        # Both have the machine's name, by which they would know the one at whose address they meet.
        launcher += [f"--rdzv-conf=is_host={int(meet_at == self.address)},join_timeout={TIMEOUT // 2}"]
        launcher += [f"--local-addr={self.address}", "--rdzv-id=test"]
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", *launcher, *argv],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "cable"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other and nothing else, with a folder each.

    Raises:
        NoHosts: this user or this machine cannot make them.
    """
    if sys.platform != "linux" or shutil.which("ip") is None:
        raise NoHosts("network namespaces need Linux and iproute2 (`apt-get install iproute2`)")
    hosts = [Host(f"spfde-{os.getpid()}-{n}", f"10.213.77.{n}", folder / f"host{n}") for n in (1, 2)]
    try:
        for host in hosts:
            host.folder.mkdir()
            _ip("netns", "add", host.name)
        first, second = hosts
        cable = ["link", "add", "cable", "netns", first.name, "type", "veth"]
        _ip(*cable, "peer", "name", "cable", "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def run_on(hosts: Sequence[Host], *argv: str) -> list[subprocess.CompletedProcess[str]]:
    """Run one command by torchrun on all of them, to its end."""
    running = [host.torchrun(hosts[0].address, argv) for host in hosts]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, outputs, strict=True)
    ]


def _ip(*words: str) -> None:
    ended = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise NoHosts(f"network namespaces need root and a kernel that has them: ip {' '.join(words)}: {ended.stderr}")
