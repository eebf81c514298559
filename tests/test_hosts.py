"""Several hosts: a scheduler and workers started by hand, and what travels between them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout.exceptions import AuthError, ConnectionError, InvalidError
from fanout.protocol.join import Address, JoinString
from tests.conftest import (
    ROOT,
    TIMEOUT_FACTOR,
    HandStarted,
    children_of,
    environment,
    is_alive,
    poll_until,
)
from tests.hosts_kit import Host, Network, require_namespaces

StartCluster = Callable[..., HandStarted]

CLIENT_JOIN = r"FANOUT_URL='(fanout://client[^']+)'"
WORKER_JOIN = r"fanout worker '(fanout://worker[^']+)'"

#: A project as people have them: a script, a module beside it, a package, and an import that only
#: the function makes.
PROJECT = {
    "job.py": """
        import json, os, socket, sys, time
        import fanout
        import helper
        from shapes.circle import Circle

        app = fanout.App("hosts")

        class Seen:
            def __init__(self, circle, token):
                self.number = circle.radius
                self.area = helper.doubled(circle.radius)
                self.host = socket.gethostname()
                self.folder = os.getcwd()
                self.home = os.environ["HOME"]
                self.has_project = os.path.exists(token)

        @app.function()
        def look(circle, pause_s, token):
            from shapes.square import Square
            assert Square(circle.radius).side == circle.radius
            time.sleep(pause_s)
            return Seen(circle, token)

        if __name__ == "__main__":
            count, pause_s, token = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
            circles = (Circle(number) for number in range(count))
            with app.run():
                kwargs = {"pause_s": pause_s, "token": token}
                for seen in look.map(circles, kwargs=kwargs):
                    assert type(seen) is Seen
                    print(json.dumps(vars(seen)), flush=True)
    """,
    "helper.py": "def doubled(x):\n    return 2 * x\n",
    "shapes/__init__.py": "",
    "shapes/circle.py": """
        class Circle:
            def __init__(self, radius):
                self.radius = radius
    """,
    "shapes/square.py": """
        class Square:
            def __init__(self, side):
                self.side = side
    """,
}


def write_project(folder: Path) -> Path:
    for name, text in PROJECT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder / "job.py"


def seen_in(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


# --- hosts with a network between them ------------------------------------------------------------


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    require_namespaces()
    made = Network(tmp_path, "headnode", "laptop", "first", "second")
    try:
        yield made
    finally:
        made.close()


def start_scheduler(host: Host) -> tuple[str, str]:
    """As a person types it. Returns the join strings for clients and for workers."""
    host.start_daemon("scheduler", "--host", "0.0.0.0", "--port", "7337")
    return host.find_in_log(CLIENT_JOIN), host.find_in_log(WORKER_JOIN)


def start_worker(host: Host, join: str) -> None:
    host.start_daemon("worker", join, "--cpu", "1")
    assert host.find_in_log(r"fanout worker (\w+) has joined") == host.name


@pytest.mark.root
@pytest.mark.slow
def test_script_runs_on_hosts_that_have_none_of_its_files(network: Network) -> None:
    client_join, worker_join = start_scheduler(network["headnode"])
    assert f"@{network['headnode'].address}:7337?fp=" in client_join
    network.start_sniffer()
    start_worker(network["first"], worker_join)
    laptop = network["laptop"]
    script = write_project(laptop.folder)

    # The second worker joins when the map is under way, and takes part in it.
    client = laptop.start(sys.executable, script, "120", "0.03", script, FANOUT_URL=client_join)
    assert client.stdout is not None
    head = client.stdout.readline()
    assert head.startswith("{"), head + client.stdout.read()
    start_worker(network["second"], worker_join)
    rest = client.stdout.read()
    assert client.wait() == 0, rest

    seen = seen_in(head + rest)
    assert [(each["number"], each["area"]) for each in seen] == [(n, 2 * n) for n in range(120)]
    assert {each["host"] for each in seen} == {"first", "second"}
    assert not any(each["has_project"] for each in seen)
    for each in seen:
        folder = str(network[each["host"]].folder)
        assert each["home"] == folder
        assert each["folder"].startswith(folder)

    # The arguments name the script, and not one packet tells: all of it was encrypted. One that
    # is sent in the open shows that the sniffer does see the bytes between hosts.
    laptop.run(sys.executable, "-c", f"""
import socket
socket.socket(type=socket.SOCK_DGRAM).sendto(b"in the open", ({network["headnode"].address!r}, 9))
""")  # fmt: skip
    poll_until(lambda: b"in the open" in network.captured(), "the sniffer sees plain bytes")
    captured = network.captured()
    assert str(script).encode() not in captured
    assert b"shapes" not in captured
    assert JoinString.parse(client_join).token_id.encode() not in captured
    assert captured.count(b"\x16\x03\x01") >= 3, "three dialled, and each began with TLS"

    # The same script without FANOUT_URL runs on the laptop alone.
    try:
        alone = laptop.run(sys.executable, script, "3", "0", script, FANOUT_CPU="1")
        assert alone.returncode == 0, alone.stderr
        assert [(each["host"], each["has_project"]) for each in seen_in(alone.stdout)] == [
            ("laptop", True)
        ] * 3
    finally:
        stopped = laptop.run(sys.executable, "-m", "fanout.cli.main", "stop", "--force")
    assert stopped.returncode == 0, stopped.stderr


@pytest.mark.root
@pytest.mark.slow
def test_only_the_certificate_of_the_join_string_is_talked_to(network: Network) -> None:
    client_join, _ = start_scheduler(network["headnode"])
    laptop = network["laptop"]

    def status(url: str) -> str:
        done = laptop.run(sys.executable, "-m", "fanout.cli.main", "status", FANOUT_URL=url)
        return done.stdout if done.returncode == 0 else done.stderr

    assert "epoch 1" in status(client_join)
    address, _, fingerprint = client_join.rpartition("=")
    assert "has another certificate" in status(f"{address}={'0' * len(fingerprint)}")
    plain = client_join.partition("?")[0]
    refusal = status(plain)
    assert f"{network['headnode'].address}:7337" in refusal
    assert "epoch" not in refusal

    # Who speaks plain text gets an alert of TLS, and not a byte of fanout's protocol.
    answer = laptop.run(sys.executable, "-c", f"""
import socket, sys
connection = socket.create_connection(({network["headnode"].address!r}, 7337))
connection.sendall(b"\\0" * 64)
sys.stdout.write(connection.recv(1 << 16).hex())
""")  # fmt: skip
    assert answer.stdout == "" or answer.stdout.startswith("15"), answer


# --- the same over loopback -----------------------------------------------------------------------


@pytest.mark.slow
def test_workers_started_by_hand_run_a_script_from_their_own_homes(
    scheduler_and_workers: StartCluster, tmp_path: Path
) -> None:
    started = scheduler_and_workers(2, cpu=1)
    script = write_project(tmp_path / "project")
    done = started.python(script, "60", "0.02", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = seen_in(done.stdout)
    assert [each["number"] for each in seen] == list(range(60))
    homes = {str(started.folder / name / "worker" / "sources") for name in ("w1", "w2")}
    assert {os.path.dirname(each["folder"]) for each in seen} == homes


def connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("FANOUT_URL", url)
    with fanout.App("connects").run():
        pass


def test_client_that_may_not_join_is_told_why(
    scheduler_and_workers: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = scheduler_and_workers(0)
    right = JoinString.parse(started.client_join)
    connect(monkeypatch, str(right))
    unknown = started.client_join.replace("client.", "client.0")
    with pytest.raises(AuthError, match="its token was withdrawn; get a new one from `fanout sche"):
        connect(monkeypatch, unknown)
    other = JoinString(right.address, "client", right.token_id, b"?" * 32)
    with pytest.raises(AuthError, match="cannot prove that it knows the secret") as caught:
        connect(monkeypatch, str(other))
    assert "Pz8_Pz8" not in str(caught.value), "the secret is in the text"
    with pytest.raises(InvalidError, match=r"is for a worker; a client needs the one that `fanout"):
        connect(monkeypatch, started.state["worker_join"])


def test_scheduler_that_is_not_there_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        url = str(JoinString(Address("127.0.0.1", port), "client", "t", b"?" * 32))
        with pytest.raises(ConnectionError) as caught:
            connect(monkeypatch, url)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "`fanout scheduler` starts one" in str(caught.value)


OTHER_VERSION = """
import sys
from fanout.protocol import messages
messages.PROTOCOL_VERSION = 99
import fanout
try:
    with fanout.App("later").run():
        pass
except fanout.exceptions.VersionError as error:
    sys.stdout.write(str(error))
"""


def test_other_protocol_version_is_named_on_both_sides(scheduler_and_workers: StartCluster) -> None:
    done = scheduler_and_workers(0).python("-c", OTHER_VERSION)
    assert "99" in done.stdout, done.stderr
    assert "install the same version of fanout on both" in done.stdout


KEEPS_CALLING = """
import os, sys
import fanout
app = fanout.App("long")

@app.function()
def pid():
    return os.getpid()

if __name__ == "__main__":
    with app.run():
        print(pid.remote(), flush=True)
        for line in sys.stdin:
            print(pid.remote(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_worker_keeps_its_warm_container_over_a_restart_of_the_scheduler(
    scheduler_and_workers: StartCluster, tmp_path: Path, number: signal.Signals
) -> None:
    started = scheduler_and_workers(1, cpu=1)
    script = tmp_path / "long.py"
    script.write_text(KEEPS_CALLING)
    client = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(FANOUT_URL=started.client_join),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    with client.stdin, client.stdout:
        try:
            before = int(client.stdout.readline())
            scheduler = started.scheduler
            assert scheduler is not None
            scheduler.send_signal(number)
            scheduler.wait()
            started.start_scheduler()
            client.stdin.write("again\n")
            client.stdin.flush()
            assert int(client.stdout.readline()) == before
            client.stdin.close()
            assert client.wait(10 * TIMEOUT_FACTOR) == 0
            poll_until(lambda: not is_alive(before), "the container left when its app ended")
        finally:
            client.kill()
            client.wait()


@pytest.mark.slow
def test_worker_that_leaves_takes_containers_along_that_nobody_claimed_after_a_restart(
    scheduler_and_workers: StartCluster, tmp_path: Path
) -> None:
    started = scheduler_and_workers(1, cpu=1)
    script = tmp_path / "long.py"
    script.write_text(KEEPS_CALLING)
    worker = started.workers["w1"]
    before = children_of(worker.pid)
    client = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(FANOUT_URL=started.client_join),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    with client.stdin, client.stdout:
        container = int(client.stdout.readline())
        scheduler = started.scheduler
        assert scheduler is not None
        scheduler.kill()
        scheduler.wait()
        client.kill()
        client.wait()
    started.start_scheduler()
    worker.terminate()
    assert worker.wait(15 * TIMEOUT_FACTOR) == 0
    assert not is_alive(container)
    assert not any(map(is_alive, before))


SPAWNS = """
import sys, time
import fanout
app = fanout.App("spawns")

@app.function()
def slow(number):
    from helper import doubled
    time.sleep(0.1)
    return doubled(number)

if __name__ == "__main__":
    with app.run():
        sys.stdout.write(slow.spawn_map(range(12)).object_id)
"""
COLLECTS = """
import json, sys
import fanout
sys.stdout.write(json.dumps(list(fanout.FunctionCall.from_id(sys.argv[1]).iter())))
"""


@pytest.mark.slow
def test_spawned_call_outlives_client_worker_and_scheduler_with_its_sources(
    scheduler_and_workers: StartCluster, tmp_path: Path
) -> None:
    started = scheduler_and_workers(1, cpu=1)
    write_project(tmp_path / "project")
    script = tmp_path / "project" / "spawns.py"
    script.write_text(SPAWNS)
    spawned = started.python(script)
    assert spawned.returncode == 0, spawned.stderr
    for process in (started.scheduler, started.workers["w1"]):
        assert process is not None
        process.kill()
        process.wait()
    # What the next worker needs of the script is with the scheduler alone.
    shutil.rmtree(tmp_path / "project")
    started.start_scheduler()
    started.start_worker("w2", cpu=2)
    collected = started.python("-c", COLLECTS, spawned.stdout)
    assert collected.returncode == 0, collected.stderr
    assert json.loads(collected.stdout) == [2 * number for number in range(12)]


# --- what a worker in the foreground tells --------------------------------------------------------


def run_worker(join: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fanout.cli.main", "worker", join, "--home", str(home)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30 * TIMEOUT_FACTOR,
        check=False,
    )


def test_worker_that_may_not_join_ends_and_says_why(
    scheduler_and_workers: StartCluster, tmp_path: Path
) -> None:
    started = scheduler_and_workers(0)
    refused = run_worker(started.state["worker_join"].replace("worker.", "worker.0"), tmp_path)
    assert refused.returncode == 1
    assert "the scheduler refuses this worker" in refused.stderr
    wrong_role = run_worker(started.client_join, tmp_path)
    assert wrong_role.returncode != 0
    assert "a worker needs the one that `fanout scheduler` prints for workers" in wrong_role.stderr


def test_second_worker_of_a_home_is_refused_and_the_first_goes_on(
    scheduler_and_workers: StartCluster,
) -> None:
    started = scheduler_and_workers(1, cpu=1)
    home = started.folder / "w1"
    before = sorted(home.rglob("*"))
    refused = run_worker(started.state["worker_join"], home)
    assert refused.returncode == 2
    assert f"another worker (pid {started.workers['w1'].pid})" in refused.stderr
    assert "--name" in refused.stderr
    assert sorted(home.rglob("*")) == before


def test_worker_that_cannot_reach_its_scheduler_says_so_and_joins_when_it_is_there(
    scheduler_and_workers: StartCluster,
) -> None:
    started = scheduler_and_workers(0)
    assert started.scheduler is not None
    join = started.state["worker_join"]
    started.scheduler.terminate()
    started.scheduler.wait()
    log = started.folder / "early.log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "fanout_worker", "--home", str(started.folder / "early")],
            env=environment(FANOUT_WORKER_JOIN=join),
            stdout=output,
            stderr=output,
        )
    started.processes.append(worker)
    poll_until(lambda: f"127.0.0.1:{started.port}" in log.read_text(), "it tells the address")
    assert "trying again" in log.read_text()
    started.start_scheduler()
    poll_until(lambda: "has joined the scheduler" in log.read_text(), "it has joined")


@pytest.mark.slow
def test_people_are_told_that_the_scheduler_is_away_and_that_it_is_back(
    scheduler_and_workers: StartCluster, tmp_path: Path
) -> None:
    started = scheduler_and_workers(1, cpu=1)
    script = tmp_path / "long.py"
    script.write_text(KEEPS_CALLING)
    errors = tmp_path / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment(FANOUT_URL=started.client_join),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as client,
    ):
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdout.readline()
            scheduler = started.scheduler
            assert scheduler is not None
            scheduler.kill()
            scheduler.wait()
            address = f"127.0.0.1:{started.port}"
            refused = f"cannot reach the scheduler at {address}: Connection refused"
            poll_until(lambda: refused in started.log("w1"), lambda: started.log("w1"))
            log = started.log("w1")
            assert f"lost the scheduler at {address}: " in log
            assert "containers go on, and it tries to reach the scheduler until it is back" in log
            poll_until(errors.read_text, "the client tells that the scheduler is away")
            away = errors.read_text()
            assert (
                f"the scheduler has been away for 5 s (cannot reach the scheduler at {address}: "
                in away
            )
            assert "calls wait for it and go on when it is back" in away
            started.start_scheduler()
            back = rf"has joined the scheduler at {address} again after \d+ s"
            poll_until(lambda: re.search(back, started.log("w1")), lambda: started.log("w1"))
            poll_until(
                lambda: re.search(r"the scheduler is back after \d+ s", errors.read_text()),
                errors.read_text,
            )
            client.stdin.close()
            assert client.wait(10 * TIMEOUT_FACTOR) == 0
        finally:
            client.kill()
            client.wait()
    assert started.log("w1").count("cannot reach the scheduler") == 1, "told once"
    assert errors.read_text().count("\n") == 2, errors.read_text()
