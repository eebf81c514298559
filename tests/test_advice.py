"""What a person reads whose function holds cores that it does not use, and how that is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from fanout_worker import process
from tests.conftest import HandStarted, poll_until

SCRIPT = """
    import logging, time, fanout
    app = fanout.App("services")
    heard = []
    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())
    logging.getLogger("fanout").addHandler(Listener())
    @app.function()
    def ask_service(x):
        time.sleep(1.5)
    @app.function(cpu=0.1)
    def ask_politely(x):
        time.sleep(0.1)
    if __name__ == "__main__":
        with app.run():
            ask_politely.remote(0)
            for _ in ask_service.map(range(10_000)):
                if heard:
                    break
        print(*heard, sep="\\n")
"""


def test_a_function_that_waits_for_a_service_is_told_how_to_run_more_of_it(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path
) -> None:
    started = scheduler_and_workers(1, cpu=16)
    script = tmp_path / "services.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = started.python(script)
    assert run.returncode == 0, run.stderr
    [told] = run.stdout.splitlines()
    assert told.startswith("ask_service computes for at most "), told
    assert "with cpu=0.05 20 of them" in told


def test_processor_time_is_that_of_a_process_and_all_below_it() -> None:
    """A function that waits for a program which it started does not wait: the program computes."""
    burn = "while True: pass"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f"{sys.executable} -c '{burn}' & wait"], start_new_session=True
    )
    try:
        poll_until(lambda: process.cpu_time_ms(shell.pid) > 200, "the child's time counts")
        with open(f"/proc/{shell.pid}/stat") as file:
            own = file.read().rpartition(")")[2].split()[11:13]
        assert sum(map(int, own)) < 10, "it is the child's"
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    assert process.cpu_time_ms(shell.pid) == 0, "it is gone"
