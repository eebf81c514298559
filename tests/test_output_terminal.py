"""What a person sees of a run, on a terminal and where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fanout.output.watcher import PENDING_BYTES_MAX, Watcher
from fanout.protocol import messages as m
from tests.conftest import Cluster, poll_until
from tests.terminal_kit import INTERRUPT, Terminal, fanout_run

BAR = ("━", "─")
COLOURS = re.compile(rb"\x1b\[([0-9;]*)m")
#: What is no colour: a reset, bold, dim.
STYLES = {b"", b"0", b"1", b"2"}

SCRIPT = """
    import asyncio, json, pathlib, sys, time
    import fanout

    app = fanout.App("shown")
    FOLDER = pathlib.Path(__file__).parent

    def wait_for(name):
        while not (FOLDER / name).exists():
            time.sleep(0.005)

    @app.function(cpu=0.1)
    def work(x):
        print(json.dumps({"x": x}))
        print(f"warning {x}", file=sys.stderr)
        wait_for("go")
        if x == 1:
            raise ValueError("one")
        return x

    @app.function(cpu=0.1)
    def train(x):
        from tqdm import tqdm
        for step in tqdm(range(1000), desc="outer", mininterval=0):
            for _ in tqdm(range(3), desc="inner", leave=False, mininterval=0):
                pass
            if step == 499:
                (FOLDER / "halfway").touch()
                wait_for("go")
        return x

    @app.function(cpu=0.1)
    def some(x):
        if x == 1:
            raise ValueError("one")
        if x > 1:
            wait_for("go")

    @app.local_entrypoint()
    def fails_in_part():
        list(some.map(range(4), return_exceptions=True))

    @app.function()
    def outer(x):
        return inner.remote(x)

    @app.function()
    def inner(x):
        print("deep down")
        wait_for("go")
        return x

    @app.function()
    def flood(count):
        for number in range(count):
            print(f"line {number}")
        return count

    @app.function(cpu=0.1)
    def stay(x):
        (FOLDER / f"stays-{x}").touch()
        wait_for("never")

    @app.local_entrypoint()
    def many():
        print("before:", end=" ", flush=True)
        results = list(work.map(range(4), return_exceptions=True))
        print("results", results)

    @app.local_entrypoint()
    def interleaved():
        for number in range(50):
            sys.stderr.write(f"\\rpreparing {number} of 50")
        for result in work.map([0, 2, 3]):
            sys.stderr.write(f"\\rown progress {result}")
            sys.stderr.flush()
        print()
        print("done")

    @app.local_entrypoint()
    def bars():
        print("trained", train.remote(1))

    @app.local_entrypoint()
    def three_bars():
        print("trained", list(train.map(range(3))))

    @app.function()
    def returns():
        print("50 %\\r100 %\\r\\n\\x1b[2Jno newline", end="")

    @app.local_entrypoint()
    def nested():
        print("result", outer.remote(1))

    @app.local_entrypoint()
    def fails():
        list(work.map(range(4)))

    @app.local_entrypoint()
    async def floods():
        await flood.remote.aio(12000)
        (FOLDER / "result").touch()

    @app.function()
    def quick(x):
        print("in", x)
        return x

    @app.local_entrypoint()
    def ordered():
        for x in range(30):
            print("out", quick.remote(x))

    @app.local_entrypoint()
    def forks():
        import logging, os
        logger = logging.getLogger("child")
        logger.addHandler(logging.StreamHandler(sys.stderr))
        calls = iter(work.map([0, 2, 3]))
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                print("child prints")
                logger.warning("child logs")
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        (FOLDER / "go").touch()
        print("forked", list(calls))

    @app.function()
    def flood_both(count):
        for number in range(count):
            print(f"line {number}", file=sys.stderr)
        print("last line")

    @app.local_entrypoint()
    async def floods_both():
        await flood_both.remote.aio(12000)
        await flood_both.remote.aio(1)
        (FOLDER / "result").touch()

    @app.local_entrypoint()
    def stays(spawned: int = 0, stuck: bool = False):
        for number in range(spawned):
            print("spawned", stay.spawn(100 + number).object_id)
        try:
            list(stay.map(range(2)))
        finally:
            (FOLDER / "finally").touch()
            if stuck:
                wait_for("never")

    @app.local_entrypoint()
    async def stays_async():
        async for _ in stay.map.aio(range(2)):
            pass

    if __name__ == "__main__":
        with app.run():
            print("result", work.remote(7))
"""

Run = Callable[..., Terminal]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "shown_script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def run(cluster: Cluster, script: Path, name: str, *arguments: str, **options: object) -> Terminal:
    variables = cluster.variables | options.pop("variables", {})  # type: ignore[operator]
    command = fanout_run(*arguments, f"{script}::{name}")
    return Terminal(command, variables, cwd=script.parent, **options)  # type: ignore[arg-type]


def go(script: Path) -> None:
    """Let the functions of the script get on."""
    (script.parent / "go").touch()


def appears(script: Path, name: str) -> None:
    poll_until((script.parent / name).exists, f"{name} was made", timeout_s=30)


# --- a terminal ----------------------------------------------------------------------------------


def test_a_map_has_a_bar_and_its_text_has_labels(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "many") as terminal:
        terminal.sees("work[2] │", '{"x": 2}')
        terminal.sees("work[3] !", "warning 3")
        terminal.sees("work  ────", "0/4", "4 running")
        assert "before:" in terminal.lines
        go(script)
        assert terminal.ends() == 0
    assert terminal.lines[-1].startswith("before: results [0, ValueError('one'), 2, 3]")
    assert not any(glyph in line for line in terminal.all_lines for glyph in BAR)
    labelled = [line for line in terminal.all_lines if line.startswith("work[")]
    assert len(labelled) == 8, "each line once"


def test_failed_inputs_are_counted(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "fails_in_part") as terminal:
        terminal.sees("some", "2/4", "1 failed")
        go(script)
        assert terminal.ends() == 0


def test_what_the_script_prints_stays_whole_above_the_bars(cluster: Cluster, script: Path) -> None:
    # The daemons run already, so that nothing is drawn before the script prints.
    assert cluster.fanout("run", "-q", f"{script}::ordered").returncode == 0
    with run(cluster, script, "interleaved") as terminal:
        terminal.sees("work", "0/3")
        go(script)
        assert terminal.ends() == 0
    own = [line for line in terminal.all_lines if "own progress" in line]
    assert own == ["own progress 3"], "a line that is rewritten is one line"
    assert not any("preparing" in line for line in terminal.all_lines)
    assert terminal.lines[-1] == "done"


def test_bars_in_a_container_are_one_line_each(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "bars") as terminal:
        terminal.sees("train !", "outer:  50%|")
        terminal.sees("train", "running")
        go(script)
        assert terminal.ends() == 0
    bars = [line for line in terminal.all_lines if "train !" in line]
    assert len(bars) == 1
    assert "outer: 100%|" in bars[0]
    assert terminal.lines[-1] == "trained 1"
    assert len(terminal.raw) < 50_000, "4000 updates are not written one by one"


def test_text_of_a_nested_call_has_its_functions_name(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "nested") as terminal:
        terminal.sees("inner │ deep down")
        terminal.sees("inner", "0/1", "nested", "1 running")
        go(script)
        assert terminal.ends() == 0
    assert terminal.lines[-1] == "result 1"


def test_text_comes_above_the_result_that_it_led_to(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "ordered") as terminal:
        assert terminal.ends() == 0
    lines = [line.split("│")[-1].strip() for line in terminal.all_lines]
    assert lines == [text for x in range(30) for text in (f"in {x}", f"out {x}")]


def test_a_process_that_the_script_forks_prints_and_logs(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "forks", variables={"PYTHONWARNINGS": "ignore"}) as terminal:
        assert terminal.ends() == 0
    text = "\n".join(terminal.all_lines)
    assert text.count("child prints") == 20
    assert text.count("child logs") == 20
    assert terminal.lines[-1] == "forked [0, 2, 3]"


def test_a_terminal_of_few_rows_is_not_overrun(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "three_bars", rows=3) as terminal:
        terminal.sees("train", "0/3", "3 running")
        appears(script, "halfway")
        terminal.sees("outer:  50%|")
        go(script)
        assert terminal.ends() == 0
    bars = [line for line in terminal.all_lines if line.startswith("train[")]
    assert len(bars) == 3
    assert all("outer: 100%|" in bar for bar in bars)
    assert "0/3" not in "".join(terminal.all_lines)


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_gets_lines_that_fit(
    cluster: Cluster, script: Path, columns: int
) -> None:
    with run(cluster, script, "many", columns=columns) as terminal:
        terminal.sees("work", "0/4")
        bar_lines = [line for line in terminal.lines if "0/4" in line]
        go(script)
        assert terminal.ends() == 0
    assert len(bar_lines) == 1
    text = "".join(terminal.all_lines)
    assert "0/4" not in text, "nothing of the bar is left"
    assert "results[0,ValueError('one'),2,3]" in text.replace(" ", "")


def test_no_color_means_no_colours(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "many", variables={"NO_COLOR": "1"}) as terminal:
        terminal.sees("work", "0/4")
        terminal.sees("work[3] !", "warning 3")
        terminal.sees("work  ────")
        go(script)
        assert terminal.ends() == 0
    assert {c for text in COLOURS.findall(terminal.raw) for c in text.split(b";")} <= STYLES


def test_colours_tell_stdout_from_stderr(cluster: Cluster, script: Path) -> None:
    go(script)
    with run(cluster, script, "many") as terminal:
        assert terminal.ends() == 0
    assert b"\x1b[36mwork[2]" in terminal.raw
    assert b"\x1b[31mwork[2]" in terminal.raw


def test_a_dumb_terminal_gets_labelled_lines_and_no_escapes(cluster: Cluster, script: Path) -> None:
    go(script)
    with run(cluster, script, "many", variables={"TERM": "dumb"}) as terminal:
        assert terminal.ends() == 0
    assert b"\x1b" not in terminal.raw
    assert any("work[2] |" in line for line in terminal.lines)
    assert any("work[2] ! warning 2" in line for line in terminal.lines)


def test_the_width_is_that_of_the_window_whatever_the_environment_says(
    cluster: Cluster, script: Path
) -> None:
    with run(cluster, script, "many", columns=40, variables={"COLUMNS": "200"}) as terminal:
        terminal.sees("work", "0/4")
        go(script)
        assert terminal.ends() == 0
    assert "0/4" not in "".join(terminal.all_lines), "nothing of the bar is left"


def test_a_terminal_without_unicode_gets_plain_characters(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "many", variables={"PYTHONIOENCODING": "ascii"}) as terminal:
        terminal.sees("work  ....", "0/4")
        terminal.sees("work[3] |", '{"x": 3}')
        go(script)
        assert terminal.ends() == 0
    assert terminal.raw.isascii()


def test_quiet_shows_neither_text_nor_bars(cluster: Cluster, script: Path) -> None:
    go(script)
    with run(cluster, script, "many", "--quiet") as terminal:
        assert terminal.ends() == 0
    assert terminal.lines == ["before: results [0, ValueError('one'), 2, 3]"]


def test_without_enable_output_nothing_is_shown(cluster: Cluster, script: Path) -> None:
    go(script)
    command = [fanout_run()[0], str(script)]
    with Terminal(command, cluster.variables) as terminal:
        assert terminal.ends() == 0
    assert terminal.lines == ["result 7"]


def test_an_error_is_a_traceback_below_what_was_printed(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "fails", columns=200) as terminal:
        terminal.sees("work", "0/4")
        go(script)
        assert terminal.ends() == 1
    assert terminal.lines[-1] == "ValueError: one"
    text = "\n".join(terminal.all_lines)
    assert "in fails" in text
    assert "fanout/cli" not in text
    assert not any(glyph in text for glyph in BAR)


def test_a_scheduler_that_does_not_answer_is_waited_for_visibly(
    cluster: Cluster, script: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"fanout://client.abc:{'A' * 43}@127.0.0.1:{server.getsockname()[1]}"
        with run(cluster, script, "many", variables={"FANOUT_URL": url}) as terminal:
            terminal.sees("connecting to the scheduler")
            terminal.type(INTERRUPT)
            assert terminal.ends() == 130
    assert terminal.lines[-1] == "fanout: interrupted before anything ran"
    assert "connecting" not in str(terminal)


def test_a_terminal_that_takes_nothing_holds_up_no_call(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "floods") as terminal:
        # Nobody reads what the terminal is sent, until the result is there.
        appears(script, "result")
        assert terminal.ends() == 0
    assert "flood │ line 11999" in terminal.lines


def test_text_that_a_slow_terminal_cannot_take_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = os.openpty()
    taken: list[bytes] = []

    def take() -> None:
        # Closing the other end is the end of file here.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 1 << 16):
                taken.append(data)

    reader = threading.Thread(target=take)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", stream)
        watcher = Watcher(show_progress=True)
        text = b"x" * 99 + b"\n"
        piece = m.Log(b"c" * 16, 0, 1, m.Source.STDERR, text * 600)
        count = 2 * PENDING_BYTES_MAX // len(piece.payload)
        for _ in range(count):
            # Nobody reads the terminal, and nobody is held up by that.
            watcher.receive(piece)
        reader.start()
        watcher.stop()
    reader.join()
    os.close(ours)
    shown = b"".join(taken).decode()
    (lost,) = re.findall(r"fanout: ([\d,]+) bytes were not shown, the terminal is too slow", shown)
    assert shown.count("x" * 99) * len(text) + int(lost.replace(",", "")) == count * len(text) * 600


def test_redirected_text_does_not_wait_for_a_slow_terminal(
    cluster: Cluster, script: Path, tmp_path: Path
) -> None:
    with (
        (tmp_path / "out.txt").open("wb") as out,
        run(cluster, script, "floods_both", stdout=out) as terminal,
    ):
        appears(script, "result")
        assert b"last line" in (tmp_path / "out.txt").read_bytes()
        assert terminal.ends() == 0


# --- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_cancels_and_says_what_goes_on(cluster: Cluster, script: Path) -> None:
    command = fanout_run(f"{script}::stays", "--spawned", "7")
    with Terminal(command, cluster.variables, columns=400) as terminal:
        terminal.sees("stay", "0/2")
        terminal.type(INTERRUPT)
        assert terminal.ends() == 130
    ids = [line.split()[1] for line in terminal.all_lines if line.startswith("spawned ")]
    last = terminal.lines[-1]
    assert last.startswith("fanout: interrupted: the calls of app 'shown' are cancelled")
    assert "spawned ones go on" in last
    assert [found for found in ids if found in last] == ids[-5:]
    assert "and 2 more" in last
    assert "Traceback" not in str(terminal)
    assert (script.parent / "finally").exists(), "the script's own end was run"
    status = json.loads(cluster.fanout("status", "--json").stdout)
    assert {call["durable"] for call in status["calls"]} == {True}


def test_second_ctrl_c_is_out_at_once(cluster: Cluster, script: Path) -> None:
    command = fanout_run(f"{script}::stays", "--stuck")
    with Terminal(command, cluster.variables) as terminal:
        terminal.sees("stay", "0/2")
        terminal.type(INTERRUPT)
        appears(script, "finally")
        terminal.type(INTERRUPT)
        assert terminal.ends() == 130
    assert b"\x1b[?25l" not in terminal.raw, "no hidden cursor is left behind"
    assert "fanout: left at once: the calls of app 'shown' are cancelled within" in str(terminal)
    assert "Traceback" not in str(terminal)


def test_ctrl_c_ends_an_async_entrypoint(cluster: Cluster, script: Path) -> None:
    with run(cluster, script, "stays_async") as terminal:
        terminal.sees("stay", "0/2")
        terminal.type(INTERRUPT)
        assert terminal.ends() == 130
    assert terminal.lines[-1] == "fanout: interrupted: the calls of app 'shown' are cancelled"
    assert "Traceback" not in str(terminal)


# --- where there is no terminal ------------------------------------------------------------------


def test_a_redirected_stdout_holds_what_was_printed_and_nothing_else(
    cluster: Cluster, script: Path, tmp_path: Path
) -> None:
    with (
        (tmp_path / "out.txt").open("wb") as out,
        run(cluster, script, "many", stdout=out) as terminal,
    ):
        terminal.sees("work", "0/4")
        terminal.sees("work[3] !", "warning 3")
        go(script)
        assert terminal.ends() == 0
    *texts, result = (tmp_path / "out.txt").read_text().splitlines()
    # The script's own text without a newline stands where it was printed.
    joined = "\n".join(texts).removeprefix("before: ").replace("before: ", "")
    assert sorted(json.loads(line)["x"] for line in joined.splitlines()) == [0, 1, 2, 3]
    assert result.endswith("results [0, ValueError('one'), 2, 3]")
    assert '{"x"' not in str(terminal)


def test_a_redirected_stderr_holds_lines_and_no_bars(
    cluster: Cluster, script: Path, tmp_path: Path
) -> None:
    with (
        (tmp_path / "err.txt").open("wb") as err,
        run(cluster, script, "many", stderr=err) as terminal,
    ):
        terminal.sees("work", "0/4")
        go(script)
        assert terminal.ends() == 0
    lines = (tmp_path / "err.txt").read_text().splitlines()
    assert sorted(lines) == [f"warning {x}" for x in range(4)]


def test_without_any_terminal_lines_are_bare_and_bars_are_their_last_state(
    cluster: Cluster, script: Path
) -> None:
    go(script)
    done = cluster.fanout("run", f"{script}::bars")
    assert done.returncode == 0
    assert done.stdout == "trained 1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("outer: 100%|")


def test_a_redirected_stdout_is_passed_on_byte_for_byte(cluster: Cluster, script: Path) -> None:
    command = fanout_run(f"{script}::returns")
    done = subprocess.run(command, env=cluster.variables, capture_output=True)
    assert done.stdout == b"50 %\r100 %\r\n\x1b[2Jno newline\n"


def test_a_long_map_writes_a_line_now_and_then(cluster: Cluster, script: Path) -> None:
    code = (
        "import sys; from fanout.output import board; board.PLAIN_INTERVAL_S = 0.2\n"
        "from fanout.cli.run import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{script}::many"],
        env=cluster.variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr as lines:
        assert any(line.startswith("fanout: work: 0/4") for line in lines)
        go(script)
        lines.read()
    assert process.wait() == 0


def test_text_comes_before_the_result_that_it_led_to(cluster: Cluster, script: Path) -> None:
    go(script)
    command = fanout_run(f"{script}::nested")
    done = subprocess.run(command, env=cluster.variables, capture_output=True, text=True)
    assert done.stdout == "deep down\nresult 1\n"
