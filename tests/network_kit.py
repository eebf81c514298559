"""Clusters on hosts with bad networks between them, and stories of them told at the same time.

On a bad network there is much to wait for and little to do, so the stories of a file run beside
each other, each on a network of its own, and each test then tells how its story ended.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TIMEOUT_FACTOR, poll_until
from tests.hosts_kit import Host, Network, require_namespaces

IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"
SCRIPT = Path(__file__).parent / "scripts" / "network.py"
POLL_INTERVAL_S = 0.05
CLIENT_JOIN = r"FANOUT_URL='(fanout://client[^']+)'"
WORKER_JOIN = r"fanout worker '(fanout://worker[^']+)'"


def record(text: str) -> None:
    """A figure for people; `pytest -rP` shows it."""
    sys.stdout.write(f"{text}\n")


def let_pass(seconds: float) -> None:
    """Time passes, and nothing that could be waited for happens."""
    time.sleep(seconds)


def until(predicate: Callable[[], Any], what: str | Callable[[], str], timeout_s: float) -> Any:
    """`poll_until` for long waits: it looks less often."""
    return poll_until(predicate, what, timeout_s, POLL_INTERVAL_S)


class Client:
    """`scripts/network.py` on a host, and what it has printed."""

    def __init__(self, host: Host, join: str, *arguments: str) -> None:
        self.name = f"{host.name}-{'-'.join(arguments[:1])}-{len(host.processes)}"
        self._path = host.folder.with_name(f"{self.name}.out")
        self._error_path = self._path.with_suffix(".err")
        with self._path.open("w") as output, self._error_path.open("w") as errors:
            # The script is read from the checkout, which all hosts see.
            self.process = host.start(
                sys.executable,
                SCRIPT,
                *arguments,
                stdout=output,
                stderr=errors,
                FANOUT_URL=join,
            )

    @property
    def errors(self) -> str:
        return self._error_path.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines that are complete."""
        return [json.loads(line) for line in self._path.read_text().split("\n")[:-1]]

    def of(self, key: str, value: Any = None) -> list[dict[str, Any]]:
        """The lines that have this key, with this value if one is given."""
        found = [line for line in self.lines if key in line]
        return [line for line in found if value is None or line[key] == value]

    def until(self, key: str, count: int = 1, timeout_s: float = 20.0) -> list[dict[str, Any]]:
        """The lines with this key, when there are so many."""

        def enough() -> list[dict[str, Any]]:
            found = self.of(key)
            if len(found) < count and self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}: {self}")
            return found if len(found) >= count else []

        lines: list[dict[str, Any]] = until(
            enough, lambda: f"{count} lines with {key!r} of {self}", timeout_s
        )
        return lines

    def until_done(self, timeout_s: float = 20.0) -> None:
        self.until("done", 1, timeout_s)
        assert self.process.wait(20 * TIMEOUT_FACTOR) == 0, str(self)

    def go_on(self) -> None:
        """Give it the line that it waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        # What was started is `nsenter`, which has become `env`, which has become the script.
        self.process.send_signal(number)

    def __str__(self) -> str:
        tail = self.lines[-5:]
        return f"{self.name}: {len(self.lines)} lines, {tail}, errors: {self.errors[-2000:]}"


class Cluster:
    """A scheduler on the host "head"; workers and clients are started on the others."""

    def __init__(self, folder: Path, *names: str) -> None:
        folder.mkdir()
        self.network = Network(folder, "head", *names)
        try:
            head = self.network["head"]
            head.start_daemon("scheduler", "--host", "0.0.0.0", "--port", "7337")
            self.client_join = head.find_in_log(CLIENT_JOIN)
            self.worker_join = head.find_in_log(WORKER_JOIN)
        except BaseException:
            self.network.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.network[name]

    def start_worker(self, name: str, cpu: float) -> subprocess.Popen[str]:
        host = self.network[name]
        process = host.start_daemon("worker", self.worker_join, "--cpu", str(cpu))
        host.find_in_log(r"(has joined the scheduler)")
        return process

    def client(self, name: str, *arguments: str) -> Client:
        return Client(self.network[name], self.client_join, *arguments)

    def status(self) -> dict[str, Any]:
        """As `fanout status` on the scheduler's own host has it."""
        command = [sys.executable, "-m", "fanout.cli.main", "status", "--json"]
        done = self.network["head"].run(*command, FANOUT_URL=self.client_join)
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def worker_names(self) -> set[str]:
        return {worker["name"] for worker in self.status()["workers"]}


def notes(host: Host, name: str) -> list[list[str]]:
    """What inputs have noted on a host, by words."""
    path = host.folder / name
    if not path.exists():
        return []
    return [line.split() for line in path.read_text().split("\n")[:-1]]


def until_notes(
    host: Host, name: str, count: int, describe: str = "", timeout_s: float = 20.0
) -> list[list[str]]:
    """The first notes of a host, when there are so many."""
    until(
        lambda: len(notes(host, name)) >= count,
        lambda: f"{count} times {name!r} on {host.name}: {notes(host, name)} {describe} {host.log}",
        timeout_s,
    )
    return notes(host, name)[:count]


def release(host: Host) -> None:
    """Let the inputs that are held on this host end, and all later ones at once."""
    (host.folder / "release").touch()


# --- stories --------------------------------------------------------------------------------------

Story = Callable[[Path, ExitStack], None]


class Stories:
    """The stories of a module, by the names of their tests."""

    def __init__(self) -> None:
        self.told: dict[str, Story] = {}

    def test(self, story: Story) -> Callable[[dict[str, str]], None]:
        """The decorator: a test that reports of its story."""
        name = story.__name__
        self.told[name] = story

        def report(endings: dict[str, str]) -> None:
            assert not endings[name], endings[name]

        functools.update_wrapper(report, story)
        del report.__wrapped__  # type: ignore[attr-defined]
        return pytest.mark.root(pytest.mark.slow(report))

    def run(self, request: pytest.FixtureRequest, folder: Path) -> dict[str, str]:
        """Run those stories of which a test was chosen; how each ended, "" if well."""
        require_namespaces()
        module = request.node
        chosen = [
            item.originalname
            for item in request.session.items
            if isinstance(item, pytest.Function) and item.getparent(pytest.Module) is module
        ]
        told = [name for name in chosen if name in self.told]
        with ThreadPoolExecutor(max(1, len(told))) as pool:
            running = {
                name: pool.submit(_tell, self.told[name], folder / name[-40:]) for name in told
            }
        return {name: _ending(future) for name, future in running.items()}


def _tell(story: Story, folder: Path) -> None:
    begun = time.monotonic()
    with ExitStack() as stack:
        story(folder, stack)
        record(f"{story.__name__}: {time.monotonic() - begun:.1f} s")


def _ending(future: Future[None]) -> str:
    error = future.exception()
    return "" if error is None else "".join(traceback.format_exception(error))
