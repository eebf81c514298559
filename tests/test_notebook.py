"""What a notebook's cell shows, with a real kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.conftest import Cluster

SETUP = """
import pathlib, sys, time
import fanout

app = fanout.App("notebook")

@app.function(cpu=0.1, serialized=True)
def work(folder, x):
    import pathlib, sys, time
    print("out", x)
    print("err", x, file=sys.stderr)
    while not pathlib.Path(folder, "go").exists():
        time.sleep(0.005)
    return x
"""

Message = dict[str, Any]


#: Runs cells in a kernel, in a process of its own, as a kernel's client leaves sockets behind.
DRIVER = """
import json, sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3")
try:
    cells = {}
    for code in json.loads(sys.argv[1]):
        sent, is_idle = client.execute(code), False
        cells[sent] = []
        while not is_idle:
            message = client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            parent = message["parent_header"].get("msg_id")
            if parent in cells:
                cells[parent].append([kind, content])
            is_idle = (parent, kind, content.get("execution_state")) == (sent, "status", "idle")
    print(json.dumps(list(cells.values())))
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def run_cells(cluster: Cluster, *cells: str) -> list[list[tuple[str, Message]]]:
    """Run these cells in a new kernel; gives what came for each as (type, content)."""
    done = cluster.python("-c", DRIVER, json.dumps(cells))
    assert done.returncode == 0, done.stderr
    shown: list[list[tuple[str, Message]]] = json.loads(done.stdout)
    errors = [content for cell in shown for kind, content in cell if kind == "error"]
    assert not errors
    return shown


def text_of(messages: list[tuple[str, Message]], name: str) -> str:
    return "".join(c["text"] for kind, c in messages if kind == "stream" and c["name"] == name)


def test_a_cell_shows_labelled_text_and_bars_that_go_away(cluster: Cluster, tmp_path: Path) -> None:
    # The inputs wait until the bar was displayed, which the kernel itself sees.
    cell = f"""
publisher = type(get_ipython().display_pub)
publish = publisher.publish
def publish_and_go(self, *args, **kwargs):
    if "0/3" in repr(args) + repr(kwargs):
        pathlib.Path({str(tmp_path)!r}, "go").touch()
    return publish(self, *args, **kwargs)
publisher.publish = publish_and_go
with fanout.enable_output(), app.run():
    print("results", list(work.starmap([({str(tmp_path)!r}, x) for x in range(3)])))
"""
    _, messages = run_cells(cluster, SETUP, cell)
    assert "results [0, 1, 2]" in text_of(messages, "stdout")
    assert "work[1] │ out 1\n" in text_of(messages, "stdout")
    assert "work[1] ! err 1\n" in text_of(messages, "stderr")
    displays = [
        content["data"]
        for kind, content in messages
        if kind in ("display_data", "update_display_data")
    ]
    assert any("0/3" in display["text/plain"] for display in displays)
    assert any("0/3" in display["text/html"] for display in displays)
    assert displays[-1]["text/plain"] == ""
    assert not re.sub("<[^>]*>", "", displays[-1]["text/html"]).strip()


def test_text_goes_to_the_cell_that_made_the_call(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    calls = [
        f"with fanout.enable_output(), app.run(): print(work.remote({str(tmp_path)!r}, {x}) == {x})"
        for x in (1, 2)
    ]
    _, *cells = run_cells(cluster, SETUP, *calls)
    for x, messages in enumerate(cells, 1):
        assert sorted(text_of(messages, "stdout").splitlines()) == ["True", f"work │ out {x}"]
        assert text_of(messages, "stderr") == f"work ! err {x}\n"


def test_text_goes_to_the_cell_that_enabled_output_and_not_to_the_one_that_connected(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    begin = "run = app.run(); run.__enter__()"
    call = f"with fanout.enable_output(): print(work.remote({str(tmp_path)!r}, 1) == 1)"
    end = "run.__exit__(None, None, None)"
    _, first, second, last = run_cells(cluster, SETUP, begin, call, end)
    assert sorted(text_of(second, "stdout").splitlines()) == ["True", "work │ out 1"]
    assert text_of(second, "stderr") == "work ! err 1\n"
    assert text_of(first + last, "stdout") == ""
