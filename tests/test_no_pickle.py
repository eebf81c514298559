"""The scheduler never unpickles: with no pickle in its interpreter it does all that it does."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fanout
from fanout_scheduler.__main__ import LimitedFileHandler
from tests import behaviour_kit as kit
from tests.conftest import HandStarted, environment, poll_until

Start = Callable[..., HandStarted]

#: Importing any of these fails from here on, also in modules of others.
WITHOUT_PICKLE = """
import sys
for name in ("pickle", "_pickle", "cloudpickle", "shelve", "dill"):
    assert name not in sys.modules, name
    sys.modules[name] = None
from fanout_scheduler.__main__ import main
sys.exit(main())
"""


def run_everything(cluster: HandStarted, folder: Path, name: str) -> None:
    """In a process, because the client of a scheduler that fails would try for ever."""
    code = "import sys, pathlib; from tests import varied_kit\n"
    code += "varied_kit.run_everything(pathlib.Path(sys.argv[1]), sys.argv[2])"
    done = cluster.python("-c", code, folder, name, timeout_s=60)
    assert done.returncode == 0, done.stderr


def test_a_scheduler_without_pickle_serves_calls_of_every_kind(
    scheduler_and_workers: Start, tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(0)
    cluster.stop()
    cluster.entry = ["-c", WITHOUT_PICKLE]
    cluster.start_scheduler()
    cluster.start_worker("w1", cpu=2)
    run_everything(cluster, tmp_path, "one")

    # What was spawned and put comes back from the disk, too.
    with kit.app.run():
        call = kit.second_waits.spawn(1, str(tmp_path))
        poll_until(lambda: call.object_id, "the call is stored")
        assert cluster.scheduler is not None
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        scheduler = cluster.start_scheduler()
        (tmp_path / "seen").touch()
        assert call.get(timeout=30) == 1
        assert fanout.Queue.from_name("one-queue").get() == "left behind"
        assert fanout.Dict.from_name("one-dict")["key"] == ("value", 1)
    run_everything(cluster, tmp_path, "two")
    assert "pickle" not in Path(f"/proc/{scheduler.pid}/maps").read_text()
    assert "Error" not in cluster.log("scheduler")


def test_an_embedded_scheduler_starts_without_pickle(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICKLE, "--embedded", "--idle-timeout", "0.1"]
        + ["--home", str(tmp_path / "home")],
        env=environment(FANOUT_LOG="info"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "leaving: idle" in (tmp_path / "home" / "scheduler.log").read_text()


def test_the_log_of_an_embedded_scheduler_is_limited(tmp_path: Path) -> None:
    handler = LimitedFileHandler(tmp_path / "log", size_bytes_max=1000)
    for number in range(100):
        record = logging.makeLogRecord({"msg": f"{number} " + "x" * 100})
        handler.emit(record)
    handler.close()
    old, new = ((tmp_path / name).read_text() for name in ("log.1", "log"))
    assert 900 < len(old) < 1300
    assert len(new) < 1300
    assert (old + new).splitlines()[-1].startswith("99 ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
