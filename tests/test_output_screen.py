"""The screen by itself, and where there is none."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import termios
import textwrap
import threading
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console

from fanout.output.screen import Screen, console_on
from fanout.output.streams import LocalStream
from tests.conftest import Cluster

#: Says which modules that draw were loaded.
REDIRECTED = """
    import sys
    import fanout

    app = fanout.App("redirected")

    @app.function()
    def say():
        print("said")

    if __name__ == "__main__":
        with fanout.enable_output(), app.run():
            say.remote()
        print("none:", [name for name in sys.modules if name.partition(".")[0] == "rich"])
"""


def test_a_forked_child_waits_for_no_lock_of_its_parent() -> None:
    stream = io.TextIOWrapper(io.BytesIO())
    screen = Screen(stream, console_on(stream), before_local=lambda: "")
    local = LocalStream(screen, stream, clock=lambda: 0.0)
    held, over = threading.Event(), threading.Event()

    def hold(lock: Any) -> None:
        with lock:
            held.set()
            over.wait()

    holder = threading.Thread(target=hold, args=(screen.lock,))
    holder.start()
    held.wait()
    # As in the child, where the thread that draws is not: the lock is never released.
    screen.abandon()
    writer = threading.Thread(target=local.write, args=("child\n",))
    writer.start()
    writer.join(10)
    is_waiting = writer.is_alive()
    over.set()
    holder.join()
    writer.join()
    assert not is_waiting


def test_a_character_that_cannot_be_encoded_takes_no_more_columns() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace")
    console = Console(file=stream, force_terminal=True, color_system=None)
    screen = Screen(stream, console, before_local=lambda: "")
    screen.draw("", [[("é" * 70, "")]], 0)
    assert written.getvalue() == b"?" * 70


def test_a_window_made_narrow_keeps_nothing_of_what_was_drawn_wider() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as drawn:
        console = Console(file=stream, force_terminal=True, color_system=None)
        screen = Screen(stream, console, before_local=lambda: "")
        # What the terminal shows when it has wrapped the wide line again.
        narrow = pyte.Screen(40, 10)
        shown = pyte.ByteStream(narrow)
        termios.tcsetwinsize(theirs, (10, 80))
        screen.draw("", [[("f", "bold"), ("x" * 75, "")], [("g" * 60, "")]], 0)
        shown.feed(drawn.read(1 << 16))
        assert "".join(narrow.display).count("x") == 75
        termios.tcsetwinsize(theirs, (10, 40))
        screen.draw("printed\n", [[("h", "")]], 0)
        shown.feed(drawn.read(1 << 16))
    assert [line.rstrip() for line in narrow.display if line.strip()] == ["printed", "h"]


@pytest.mark.parametrize("how", [{}, {"FORCE_COLOR": "1"}], ids=["plain", "force-color"])
def test_redirected_output_has_no_colours_and_loads_nothing_that_draws(
    cluster: Cluster, tmp_path: Path, how: dict[str, str]
) -> None:
    path = tmp_path / "redirected.py"
    path.write_text(textwrap.dedent(REDIRECTED))
    done = subprocess.run(
        [sys.executable, path], env={**cluster.variables, **how}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == "said\nnone: []\n"
