"""The command line, as a person types it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout.cli.cluster import status_lines
from fanout.cli.failure import show_traceback
from fanout.cli.flag import UsageError
from fanout.cli.reference import parse_reference
from fanout.client.home import find_daemon, home_folder, wait_until
from fanout.client.local import ensure_cluster, stop_cluster
from fanout.protocol import messages as m
from tests.object_kit import ObjectBench

PATIENCE_S = 30.0 * float(os.environ.get("FANOUT_TEST_TIMEOUT_FACTOR", "1"))


@pytest.fixture
def fanout_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of the test's own, with no daemon left in it at the end."""
    monkeypatch.setenv("FANOUT_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("FANOUT_URL", raising=False)
    monkeypatch.setenv("FANOUT_CPU", "2")
    yield tmp_path / "state"
    monkeypatch.delenv("FANOUT_URL", raising=False)
    stop_cluster(force=True)


def environment() -> dict[str, str]:
    """Variables of a command in a process of its own, which finds fanout where this one does."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return os.environ | {"PYTHONPATH": path}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fanout.cli.main", *arguments]


def fanout(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line with its output captured, as in ``$(fanout ...)``."""
    return subprocess.run(
        command(*arguments),
        env=environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


# --- tracebacks ----------------------------------------------------------------------------------


def test_traceback_begins_at_the_users_file(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> bool:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    try:
        # A frame of fanout's own lies between this test and the user's function.
        call_through_fanout(main)
    except ValueError as error:
        show_traceback(error)
    shown = capsys.readouterr().err
    assert "ValueError: outer" in shown
    assert "KeyError: 'inner'" in shown
    assert __file__ in shown
    assert f"{os.sep}fanout{os.sep}client{os.sep}home.py" not in shown


def call_through_fanout(function: Callable[[], bool]) -> None:
    wait_until(function, time.monotonic())


def test_error_of_fanout_alone_keeps_its_frames(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference("missing.py", is_module=False)
    assert caught.value.__traceback__ is not None
    show_traceback(caught.value.with_traceback(caught.value.__traceback__.tb_next))
    assert "reference.py" in capsys.readouterr().err


# --- what status shows ---------------------------------------------------------------------------

SNAPSHOT: dict[str, Any] = {
    "epoch": 3,
    "uptime_s": 7500.0,
    "address": "127.0.0.1:4711",
    "workers": [
        {
            "name": "gpu-1", "cpu": 16.0, "cpu_free": 2.5, "memory": 64000,
            "containers": 2, "is_connected": False, "reserved_for": "",
        },
        {
            "name": "gpu-2", "cpu": 16.0, "cpu_free": 2.5, "memory": 64000,
            "containers": 2, "is_connected": True, "reserved_for": "train",
        },
    ],
    "containers": [
        {"id": "ct-9", "function": "classify", "worker": "gpu-1", "state": "waiting",
         "leases": 1, "waits": "its own calls"}
    ],
    "functions": [{"name": "classify", "app": "reviews", "containers": 2, "max_containers": None}],
    "call_count": 301,
    "calls": [
        {"id": "fc-1", "function": "classify", "state": "open", "inputs": 10, "queued": 4,
         "running": 1, "done": 5, "durable": True, "waiting_for": "a core"}
    ],
}  # fmt: skip


def test_status_names_what_each_call_and_container_waits_for() -> None:
    text = "\n".join(status_lines(SNAPSHOT))
    assert "up 2 h 5 min" in text
    assert "2.5 of 16" in text
    assert "lost" in text
    assert "kept free for train" in text
    assert "its own calls" in text, "the container waits"
    assert "a core" in text
    assert "spawned" in text
    assert "and 300 more" in text


def test_status_shows_what_a_scheduler_says_of_each_wait() -> None:
    bench = ObjectBench()
    worker = bench.worker(cpu=1)
    client = bench.client(f={"retries": [1, 50.0, 1.0, 60.0]}, g={"is_generator": True})
    bench.make(client)
    bench.open(client, count=1)
    lease = bench.started_lease(worker)
    nested = bench.connect("nested", worker=worker, container_id=lease.container_id)

    def shown() -> str:
        return "\n".join(status_lines(bench.core.snapshot()))

    bench.frame(nested, m.SessionWaits(0))
    assert "its own calls" in shown()
    bench.get(nested)
    assert "queue 'q'" in shown()
    bench.open(client, "g", call=2, count=2)
    other = bench.started_lease(worker)
    assert "a free core" in shown()
    bench.put(client, b"a")
    bench.write()
    assert "its core" in shown()
    bench.frame(worker, m.LeaseWaits(other.lease_id, 4))
    assert "its consumer" in shown()
    bench.finish(worker, lease, status=m.Status.ERROR)
    assert "the delay before inputs that failed run again" in shown()


def test_status_columns_are_aligned_and_end_without_blanks() -> None:
    lines = status_lines(SNAPSHOT)
    head, row = next((a, b) for a, b in zip(lines, lines[1:], strict=False) if "QUEUED" in a)
    assert row.index("fc-1") == head.index("ID")
    assert row.index("a core") == head.index("WAITS FOR")
    assert all(line == line.rstrip() for line in lines)


def test_status_of_an_empty_scheduler_says_none() -> None:
    assert "workers: none" in status_lines({"epoch": 1, "uptime_s": 1.0})


# --- without any scheduler -----------------------------------------------------------------------


def test_status_and_stop_with_nothing_running_start_nothing(fanout_home: Path) -> None:
    shown = fanout("status")
    assert shown.returncode == 1
    assert "no scheduler runs on this machine" in shown.stderr
    assert "Traceback" not in shown.stderr
    stopped = fanout("stop")
    assert stopped.returncode == 0
    assert "nothing runs" in stopped.stdout
    assert not fanout_home.exists()


def test_unreachable_scheduler_is_a_sentence_and_not_a_traceback(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "A" * 43
    monkeypatch.setenv("FANOUT_URL", f"fanout://client.abc:{secret}@127.0.0.1:1")
    shown = fanout("status")
    assert shown.returncode == 1
    assert "127.0.0.1:1" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert secret not in shown.stderr


def test_url_that_is_none_is_a_usage_error(
    fanout_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_URL", "http://example")
    shown = fanout("status")
    assert shown.returncode == 2
    assert "not a join string" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_worker_refuses_the_join_string_of_clients(fanout_home: Path) -> None:
    shown = fanout("worker", f"fanout://client.abc:{'A' * 43}@127.0.0.1:1")
    assert shown.returncode == 2
    assert "join string for a client" in shown.stderr


def test_version_and_help() -> None:
    version = fanout("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("fanout ")
    shown = fanout("--help")
    assert shown.returncode == 0
    for name in ("run", "scheduler", "worker", "status", "stop"):
        assert name in shown.stdout
    assert "FILE[::NAME]" in fanout("run", "--help").stdout


def test_unknown_command_exits_with_two() -> None:
    assert fanout("rnu").returncode == 2


def test_run_does_not_load_typer(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['fanout', 'run', 'missing.py']\n"
        "from fanout.cli.main import main\n"
        "try: main()\n"
        "finally: print([n for n in ('typer', 'rich', 'uvloop', 'asyncio') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.strip() in ("[]", "['asyncio']")


# --- scheduler and worker by hand ----------------------------------------------------------------


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that the test starts; ended with it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        process.communicate(timeout=PATIENCE_S)


def start(
    processes: list[subprocess.Popen[str]], *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command(*arguments),
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes.append(process)
    return process


def join_strings_of(process: subprocess.Popen[str]) -> dict[str, str]:
    """The two join strings from what a scheduler prints."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        for role in ("client", "worker"):
            start_index = line.find(f"fanout://{role}.")
            if start_index >= 0:
                found[role] = line[start_index:].strip().strip("'\"")
        if len(found) == 2:
            return found
    raise AssertionError("the scheduler ended before it printed both join strings")


def test_scheduler_and_worker_by_hand_are_shown_by_status(
    fanout_home: Path,
    started: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joins = join_strings_of(start(started, "scheduler", "--port", "0"))
    worker = start(started, "worker", joins["worker"], "--name", "other-host", "--cpu", "0.5")
    monkeypatch.setenv("FANOUT_URL", joins["client"])
    shown: dict[str, Any] = {}

    def has_worker() -> bool:
        done = fanout("status", "--json")
        assert done.returncode == 0, done.stderr
        shown.update(json.loads(done.stdout))
        return bool(shown["workers"])

    wait_until(has_worker, time.monotonic() + PATIENCE_S)
    assert shown["workers"][0]["name"] == "other-host"
    assert shown["workers"][0]["cpu"] == 0.5
    assert "other-host" in fanout("status").stdout
    command_line = Path(f"/proc/{worker.pid}/cmdline").read_text()
    assert "fanout://" not in command_line, "the secret is visible to every user of the host"
    assert find_daemon(home_folder(), "scheduler") is None, "it is not the embedded one"


# --- run -----------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import fanout

    app = fanout.App("demo")

    class Point:
        def __init__(self, x):
            self.x = x

    @app.function()
    def double(n: int = 21):
        print(f"doubling {n}")
        return Point(2 * n)

    @app.function()
    def fail(n: int):
        raise ValueError(f"no {n}")

    @app.function()
    def count(n: int):
        yield from range(n)

    @app.local_entrypoint()
    def main(n: int = 4, shout: bool = False):
        result = double.remote(n)
        assert type(result) is Point, "the class is the same on both sides"
        print("result", result.x, "SHOUT" if shout else "quiet", __name__, sys.argv[0])

    if __name__ == "__main__":
        raise AssertionError("a guarded main is not what `fanout run` runs")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write(tmp_path / "demo_script.py", SCRIPT)


def test_run_calls_the_entrypoint_and_shows_what_containers_print(
    fanout_home: Path, script: Path
) -> None:
    done = fanout("run", str(script), "--n", "5", "--shout")
    assert done.returncode == 0, done.stderr
    assert f"result 10 SHOUT demo_script {script}" in done.stdout
    assert "doubling 5" in done.stdout + done.stderr


def test_quiet_run_hides_what_containers_print(fanout_home: Path, script: Path) -> None:
    done = fanout("run", "-q", str(script))
    assert done.returncode == 0, done.stderr
    assert "result 8 quiet" in done.stdout
    assert "doubling" not in done.stdout + done.stderr


def test_run_of_a_function_takes_its_flags(fanout_home: Path, script: Path) -> None:
    done = fanout("run", f"{script}::double", "--n", "6")
    assert done.returncode == 0, done.stderr
    assert "doubling 6" in done.stdout + done.stderr


def test_run_of_a_module(fanout_home: Path, script: Path) -> None:
    done = fanout("run", "-m", "demo_script::main", "--n", "7", cwd=script.parent)
    assert done.returncode == 0, done.stderr
    assert "result 14" in done.stdout


def test_error_of_a_function_shows_the_users_frames_and_exits_with_one(
    fanout_home: Path, script: Path
) -> None:
    done = fanout("run", f"{script}::fail", "--n", "1")
    assert done.returncode == 1
    assert "ValueError: no 1" in done.stderr
    assert "in fail" in done.stderr
    assert f"{os.sep}fanout{os.sep}cli" not in done.stderr
    assert f"{os.sep}fanout_worker{os.sep}" not in done.stderr


def test_error_while_importing_begins_at_the_users_file(fanout_home: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken_script.py", "x = 1\nraise LookupError('at import')\n")
    done = fanout("run", str(broken))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert str(broken) in lines[1]
    assert lines[-1] == "LookupError: at import"


def test_syntax_error_names_the_file_and_the_line(fanout_home: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken_script.py", "def f(:\n")
    done = fanout("run", str(broken))
    assert done.returncode == 1
    assert f'File "{broken}", line 1' in done.stderr
    assert "importlib" not in done.stderr


def test_exit_code_of_the_users_code_is_kept(fanout_home: Path, tmp_path: Path) -> None:
    leaving = write(tmp_path / "leaving_script.py", "import sys\nsys.exit(7)\n")
    assert fanout("run", str(leaving)).returncode == 7


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        ("::missing", "::double"),
        ("::count", "generator function"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(
    fanout_home: Path, script: Path, suffix: str, part: str
) -> None:
    done = fanout("run", f"{script}{suffix}", "--n", "1")
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_ambiguous_script_lists_what_can_be_run(fanout_home: Path, tmp_path: Path) -> None:
    text = """
        import fanout
        app = fanout.App("two")
        @app.function()
        def one(): ...
        @app.function()
        def two(): ...
    """
    done = fanout("run", str(write(tmp_path / "two_script.py", text)))
    assert done.returncode == 2
    assert "two_script.py::one" in done.stderr
    assert "two_script.py::two" in done.stderr


def test_script_without_an_app_is_a_usage_error(fanout_home: Path, tmp_path: Path) -> None:
    done = fanout("run", str(write(tmp_path / "empty_script.py", "x = 1\n")))
    assert done.returncode == 2
    assert "nothing to run" in done.stderr


def test_script_named_like_a_library_module_is_refused(fanout_home: Path, tmp_path: Path) -> None:
    done = fanout("run", str(write(tmp_path / "json.py", "x = 1\n")))
    assert done.returncode == 2
    assert "Rename the script" in done.stderr


def test_state_folder_that_cannot_be_made_is_a_sentence(
    fanout_home: Path, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANOUT_HOME", str(script / "below a file"))
    done = fanout("run", str(script))
    assert done.returncode == 1
    assert "Set FANOUT_HOME" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("FANOUT_HOME", str(fanout_home))


def test_async_entrypoint_is_awaited(fanout_home: Path, tmp_path: Path) -> None:
    text = """
        import fanout
        app = fanout.App("asynchronous")

        @app.function()
        def double(n):
            return 2 * n

        @app.local_entrypoint()
        async def main():
            print("result", await double.remote.aio(8))
    """
    done = fanout("run", str(write(tmp_path / "async_script.py", text)))
    assert done.returncode == 0, done.stderr
    assert "result 16" in done.stdout


WAITING = """
    import pathlib, time
    import fanout
    app = fanout.App("waiting")

    @app.function()
    def wait(folder):
        pathlib.Path(folder, "running").touch()
        time.sleep(600)

    @app.local_entrypoint()
    def main(folder: str):
        wait.remote(folder)
"""


def test_interrupted_run_says_one_sentence_and_exits_with_130(
    fanout_home: Path, tmp_path: Path
) -> None:
    script = write(tmp_path / "waiting_script.py", WAITING)
    # In a terminal of its own, where Ctrl-C is a character that is typed.
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("run", str(script), "--folder", str(tmp_path)),
        env=environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        wait_until((tmp_path / "running").exists, time.monotonic() + PATIENCE_S)
        os.write(ours, b"\x03")
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        os.close(ours)
        process.kill()
    assert process.returncode == 130
    assert len(errors.strip().splitlines()) == 1
    assert "interrupted" in errors


def _take_terminal() -> None:
    """Make descriptor 0 the controlling terminal, so that it delivers SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_stop_refuses_while_a_call_runs_and_says_which(fanout_home: Path, tmp_path: Path) -> None:
    script = write(tmp_path / "waiting_script.py", WAITING)
    process = subprocess.Popen(
        command("run", str(script), "--folder", str(tmp_path)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until((tmp_path / "running").exists, time.monotonic() + PATIENCE_S)
        refused = fanout("stop")
        assert refused.returncode == 1
        assert "--force" in refused.stderr
        assert "wait" in refused.stderr
        shown = fanout("status")
        assert "waiting" in shown.stdout
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
        assert fanout("stop", "--force").returncode == 0
    finally:
        process.kill()
        process.communicate()
    assert fanout("status").returncode == 1


def test_run_reuses_the_daemons_of_an_earlier_client(fanout_home: Path, script: Path) -> None:
    ensure_cluster()
    before = find_daemon(home_folder(), "scheduler")
    assert fanout("run", "-q", str(script)).returncode == 0
    assert find_daemon(home_folder(), "scheduler") == before
