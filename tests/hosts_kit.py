"""Hosts on one machine: a network, a host name and a view of the files for each.

A host is a set of namespaces, kept alive by one process that does nothing. The hosts hang on a
bridge, each by a pair of virtual network cards. Nothing here has a name outside of the test: when
the processes are gone, so is all of it, also after a test that was killed.

Every host has a folder of its own, and what is in the folders of the others does not exist for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from tests.conftest import TIMEOUT_FACTOR, environment, poll_until

SUBNET = "10.77.0"
_HOLD = "echo ready; exec cat"
_NAMESPACES = ["--net", "--mount", "--uts"]

#: Writes every packet of the network to stdout, until stdin ends.
_SNIFFER = """
import select, socket, sys
everything = 3
network = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(everything))
network.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
sys.stdout.buffer.write(b"listening")
sys.stdout.buffer.flush()
while True:
    readable = select.select([network, sys.stdin], [], [])[0]
    if network in readable:
        sys.stdout.buffer.write(network.recv(1 << 17))
        sys.stdout.buffer.flush()
    elif readable:
        break
"""


def require_namespaces() -> None:
    """Skip the test where namespaces cannot be made; in CI that is a failure."""
    missing = [
        tool for tool in ("ip", "mount", "nsenter", "ss", "unshare") if not shutil.which(tool)
    ]
    if missing:
        reason = f"this test makes hosts of namespaces, and there is no {', '.join(missing)} here"
    else:
        command = ["unshare", *_NAMESPACES, "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = f"this test makes network namespaces, which needs root: {done.stderr.strip()}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Host:
    """One host. `run` and `start` take a command line that runs on it."""

    name: str
    folder: Path
    address: str
    holder: subprocess.Popen[str]
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line, as this machine has to start it."""
        enter = ["nsenter", "--target", str(self.holder.pid), *_NAMESPACES, "--"]
        return [*enter, "env", "-C", str(self.folder), *map(str, arguments)]

    def variables(self, **changes: str) -> dict[str, str]:
        """A home folder of the host's own, and nothing of fanout but `changes`."""
        return environment(HOME=str(self.folder), XDG_STATE_HOME="", **changes)

    def run(
        self, *arguments: str | Path, timeout_s: float = 60.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.variables(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s * TIMEOUT_FACTOR,
            check=False,
        )

    def start(
        self,
        *arguments: str | Path,
        stdout: IO[Any] | int = subprocess.PIPE,
        stderr: IO[Any] | int = subprocess.STDOUT,
        **variables: str,
    ) -> subprocess.Popen[str]:
        """Start a command, which `Network.close` ends."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.variables(**variables),
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.processes.append(process)
        return process

    def start_daemon(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `fanout scheduler` or `fanout worker`; its output is in `log`."""
        with self._log_path.open("w") as log:
            return self.start(sys.executable, "-m", "fanout.cli.main", *arguments, stdout=log)

    @property
    def _log_path(self) -> Path:
        # Beside the folder: the host itself must not see it, and the test must.
        return self.folder.with_name(f"{self.name}.log")

    @property
    def log(self) -> str:
        return self._log_path.read_text() if self._log_path.exists() else ""

    def find_in_log(self, pattern: str) -> str:
        """The first group of a pattern, when the daemon has written it."""
        found = poll_until(
            lambda: re.search(pattern, self.log),
            lambda: f"{pattern!r} in the log of {self.name}: {self.log}",
            30,
        )
        text: str = found.group(1)
        return text


@dataclass
class Carried:
    """Frames that a cable has carried and dropped, from the host and to it."""

    out_count: int
    out_dropped_count: int
    in_count: int
    in_dropped_count: int


class Cable:
    """What connects a host to the switch, and can be made bad: see `tests/cable.py`."""

    def __init__(self, command: list[str], host_card: str, switch_card: str) -> None:
        script = Path(__file__).with_name("cable.py")
        self.process = subprocess.Popen(
            [*command, sys.executable, str(script), host_card, switch_card],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def set(
        self, *, outward: dict[str, Any] | None = None, inward: dict[str, Any] | None = None
    ) -> Carried:
        """What the two directions are from now on; one that is not named is a good one."""
        return self._ask({"out": outward or {}, "in": inward or {}})

    def counts(self) -> Carried:
        """What was carried and dropped so far."""
        return self._ask({})

    def _ask(self, question: dict[str, Any]) -> Carried:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Carried:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the cable has broken"
        answer = json.loads(line)
        return Carried(*answer["out"], *answer["in"])


class Network:
    """Hosts that reach each other, and no other machine.

    Args:
        folder: for the folders of the hosts.
        names: of the hosts.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        self._switch = _hold(["--net"])
        self.hosts: dict[str, Host] = {}
        self.cables: dict[str, Cable] = {}
        self._sniffer: subprocess.Popen[str] | None = None
        try:
            self._on_switch("ip link add bridge0 type bridge", "ip link set bridge0 up")
            for name in names:
                (folder / name).mkdir()
            for number, name in enumerate(names, 1):
                self.hosts[name] = self._add(number, name)
            for host in self.hosts.values():
                for other in names:
                    if other != host.name:
                        self._on_host(host, f"mount -t tmpfs none {folder / other}")
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def lay_cable(self, name: str) -> Cable:
        """Put a cable that can be made bad between a host and the switch; at first it is good."""
        number = list(self.hosts).index(name) + 1
        port, jack, plug = f"port{number}", f"jack{number}", f"plug{number}"
        self._on_switch(
            f"ip link set {port} nomaster",
            f"ip link add {jack} type veth peer name {plug}",
            f"ip link set {plug} master bridge0 up",
            f"ip link set {jack} up",
        )
        script = Path(__file__).with_name("cable.py")
        self._on_switch(f"{sys.executable} {script} --plain {plug}")
        self._on_host(self.hosts[name], f"{sys.executable} {script} --plain eth0")
        cable = self.cables[name] = Cable(self._enter_switch(), port, jack)
        return cable

    def start_sniffer(self) -> None:
        """From now on keep all bytes that travel between hosts."""
        with self._captured_path.open("wb") as captured:
            self._sniffer = subprocess.Popen(
                [*self._enter_switch(), sys.executable, "-c", _SNIFFER],
                stdin=subprocess.PIPE,
                stdout=captured,
                text=True,
            )
        poll_until(lambda: b"listening" in self.captured(), "the sniffer listens")

    @property
    def _captured_path(self) -> Path:
        return self._folder / "captured"

    def captured(self) -> bytes:
        """What travelled since `start_sniffer`, packet headers included."""
        return self._captured_path.read_bytes()

    def close(self) -> None:
        """End all that runs on the hosts, workers and clients before schedulers, and the hosts."""
        processes = [p for host in reversed(self.hosts.values()) for p in host.processes]
        for process in processes:
            _end(process, signal.SIGTERM)
        for cable in self.cables.values():
            _end(cable.process, signal.SIGTERM)
        if self._sniffer is not None:
            _end(self._sniffer, signal.SIGTERM)
        for host in self.hosts.values():
            _end(host.holder, signal.SIGKILL)
        _end(self._switch, signal.SIGKILL)

    def _add(self, number: int, name: str) -> Host:
        address = f"{SUBNET}.{number}"
        holder = _hold(_NAMESPACES)
        host = Host(name, self._folder / name, address, holder)
        try:
            self._on_switch(
                f"ip link add port{number} type veth peer name eth0 netns {holder.pid}",
                f"ip link set port{number} master bridge0 up",
            )
            self._on_host(
                host,
                f"hostname {name}",
                "ip link set lo up",
                f"ip addr add {address}/24 dev eth0",
                "ip link set eth0 up",
                "ip route add default dev eth0",
            )
        except BaseException:
            _end(holder, signal.SIGKILL)
            raise
        return host

    def _enter_switch(self) -> list[str]:
        return ["nsenter", "--target", str(self._switch.pid), "--net", "--"]

    def _on_switch(self, *commands: str) -> None:
        for command in commands:
            _check(*self._enter_switch(), *command.split())

    def _on_host(self, host: Host, *commands: str) -> None:
        for command in commands:
            _check(*host.command(*command.split()))


def _hold(namespaces: list[str]) -> subprocess.Popen[str]:
    """A process that keeps new namespaces alive until its stdin ends."""
    process = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", _HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _check(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _end(process: subprocess.Popen[Any], number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(15 * TIMEOUT_FACTOR)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
