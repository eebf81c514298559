"""What inputs print that run in one container at the same time."""

from __future__ import annotations

import pytest

from tests.worker_kit import containers, lease_of

HEAD = "import asyncio, os, threading, time\n"


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
async def test_text_of_many_inputs_at_a_time_keeps_its_lines_and_its_input(is_async: bool) -> None:
    pause = "await asyncio.sleep(0)" if is_async else "time.sleep(0)"
    async with containers() as kit:
        container = await kit.start(
            HEAD
            + "async " * is_async
            + f"def f(x):\n  for i in range(30):\n    print('input', x, end=' ')\n    {pause}\n"
            + f"    print('line', i)\n    {pause}\n  print('last', x, end='')\n",
            max_inputs=20,
        )
        container.give(lease_of([(i,) for i in range(20)]))
        await kit.outputs(20)
        for index in range(20):
            own = b"".join(bytes(x.payload) for x in kit.events.logs if x.index == index)
            lines = "".join(f"input {index} line {i}\n" for i in range(30))
            assert own.decode() == f"{lines}last {index}"
            order = kit.events.order
            last = max(i for i, entry in enumerate(order) if entry == ("log", index))
            assert last < order.index(("output", index)), "text came behind its output"


LEAVES_THREAD = (
    HEAD
    + """
import contextvars
def left(path):
    while not os.path.exists(path): time.sleep(0.001)
    print("half", end="")
def f(path):
    if path is None: return print("whole")
    threading.Thread(target=contextvars.copy_context().run, args=(left, path)).start()
"""
)
LEAVES_TASK = (
    LEAVES_THREAD.replace("def ", "async def ")
    .replace("time.sleep", "await asyncio.sleep")
    .replace(
        "    threading.Thread", "    global task\n    task = asyncio.create_task(left(path)) #"
    )
)


@pytest.mark.parametrize("code", [LEAVES_THREAD, LEAVES_TASK], ids=["threads", "tasks"])
async def test_text_that_comes_after_its_inputs_end_waits_for_no_newline(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, max_inputs=20)
        path = kit.folder / "go"
        container.give(lease_of([(str(path),)]))
        await kit.outputs(1)
        path.touch()
        await kit.until(lambda: kit.events.text() == "half", "it came")
        container.give(lease_of([(None,)] * 20, lease_id=2, start=1))
        await kit.outputs(21)
        texts = [(log.index, bytes(log.payload)) for log in kit.events.logs]
        assert texts[0] == (0, b"half")
        assert sorted(texts[1:]) == [(index, b"whole\n") for index in range(1, 21)]
