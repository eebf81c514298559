"""Containers of generators and of async functions; the rest is in `test_container.py`."""

from __future__ import annotations

import pytest

from fanout.exceptions import SerializationError
from fanout.protocol import messages as m
from tests.worker_kit import containers, lease_of, let_pass

# --- generators -----------------------------------------------------------------------------------

GENERATOR = "def f(n):\n  for i in range(n): yield i\n"
ASYNC_GENERATOR = "async def f(n):\n  for i in range(n): yield i\n"


@pytest.mark.parametrize("code", [GENERATOR, ASYNC_GENERATOR])
async def test_a_generator_stops_at_its_credit_and_goes_on_with_more(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, is_generator=True, is_async=code is ASYNC_GENERATOR)
        container.give(lease_of([(5,)], credit=2, lease_id=8))
        await kit.until(lambda: kit.events.waits, "it waits")
        assert kit.events.waits == [(8, 2)]
        assert kit.events.items[0] == [(0, 0), (1, 1)]
        container.give_credit(8, 100)
        await kit.outputs(1)
        assert kit.events.items[0] == [(i, i) for i in range(5)]
        assert kit.events.outputs[0] == (m.Status.DONE, b"\x05")


@pytest.mark.parametrize("code", [GENERATOR, ASYNC_GENERATOR])
async def test_a_generator_that_runs_again_skips_what_is_there_without_credit(code: str) -> None:
    async with containers() as kit:
        container = await kit.start(code, is_generator=True, is_async=code is ASYNC_GENERATOR)
        container.give(lease_of([(6,)], credit=10, skip=4))
        await kit.outputs(1)
        assert kit.events.items[0] == [(4, 4), (5, 5)]
        assert kit.events.outputs[0] == (m.Status.DONE, b"\x06")


@pytest.mark.parametrize("code", [GENERATOR, ASYNC_GENERATOR])
async def test_a_generator_that_waits_for_credit_can_be_cancelled(code: str) -> None:
    body = code.replace("yield i", "\n      try: yield i\n      finally: print('closed')")
    async with containers() as kit:
        container = await kit.start(body, is_generator=True, is_async=code is ASYNC_GENERATOR)
        container.give(lease_of([(6,)], credit=1, lease_id=2))
        await kit.until(lambda: kit.events.waits, "it waits")
        container.lower_limit(2, 0, True)
        await kit.outputs(1)
        assert kit.events.failure(0) == "cancelled"
        assert kit.events.text().endswith("closed\n")
        assert not kit.events.exits


async def test_the_time_a_generator_waits_for_credit_is_not_its_own() -> None:
    async with containers() as kit:
        container = await kit.start(GENERATOR, is_generator=True, timeout=0.3)
        container.give(lease_of([(2,)], credit=1, lease_id=2))
        await kit.until(lambda: kit.events.waits, "it waits")
        await let_pass(0.5)
        container.give_credit(2, 10)
        await kit.outputs(1)
        assert kit.events.outputs[0][0] == m.Status.DONE


async def test_many_items_of_all_sizes_keep_their_numbers() -> None:
    async with containers() as kit:
        container = await kit.start(
            "def f(n):\n  for i in range(n): yield (i, b'z' * (i % 7) * 60_000)\n",
            is_generator=True,
        )
        container.give(lease_of([(300,), (3,)], credit=1 << 30))
        await kit.outputs(2)
        assert [number for number, _ in kit.events.items[0]] == list(range(300))
        assert all(number == value[0] for number, value in kit.events.items[0])


async def test_an_error_in_a_generator_comes_after_its_items() -> None:
    async with containers() as kit:
        container = await kit.start(
            "def f(n):\n  yield 1\n  raise ValueError(n)\n", is_generator=True
        )
        container.give(lease_of([(9,)], credit=10))
        await kit.outputs(1)
        assert kit.events.items[0] == [(0, 1)]
        assert isinstance(kit.events.error(0), ValueError)


#: Its third item is large and can be written nowhere, if it gives so many.
UNWRITABLE = """
import numpy, os
from fanout import context

def f(n):
    folder = context.container.blob_folder
    try:
        for i in range(n):
            if i == 2: os.rename(folder, folder + ".away")
            yield i if i < 2 else numpy.zeros(3_000_000)
    finally:
        if n > 2: os.rename(folder + ".away", folder)
        print("closed")
"""


@pytest.mark.parametrize("max_inputs", [1, 2])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_item_that_cannot_leave_is_the_error_of_its_generator(
    is_async: bool, max_inputs: int
) -> None:
    code = UNWRITABLE.replace("def f", "async def f") if is_async else UNWRITABLE
    async with containers() as kit:
        container = await kit.start(
            code, is_generator=True, is_async=is_async, max_inputs=max_inputs
        )
        container.give(lease_of([(4,)], credit=10))
        await kit.outputs(1)
        error = kit.events.error(0)
        assert isinstance(error, SerializationError)
        assert "could not be written" in str(error)
        assert kit.events.items[0] == [(0, 0), (1, 1)]
        assert kit.events.text() == "closed\n"
        container.give(lease_of([(2,)], credit=10, lease_id=2, start=1))
        await kit.outputs(2)
        assert kit.events.items[1] == [(0, 0), (1, 1)]
        assert not kit.events.exits


@pytest.mark.parametrize(
    ("max_inputs", "frame"),
    [(1, "ch.OUTPUT, 0, 0, 1, 0, 0, 1, 0, []"), (2, "ch.OUTPUTS, [[1, 1, 0, 0, 1, 0, 0, []]]")],
)
async def test_a_container_that_gives_an_error_as_an_item_is_not_believed(
    max_inputs: int, frame: str
) -> None:
    async with containers() as kit:
        container = await kit.start(
            "import gc, time\nfrom fanout_worker.runtime.runner import Channel\n"
            "from fanout_worker import channel as ch\n"
            "def f(x):\n  c = [o for o in gc.get_objects() if isinstance(o, Channel)][0]\n"
            f"  c.send_frame({frame})\n  time.sleep(60)\n  yield 1\n",
            is_generator=True,
            max_inputs=max_inputs,
        )
        container.give(lease_of([(0,)], credit=1))
        await kit.until(lambda: kit.events.exits, "the container is gone")
        assert kit.events.exits[1][:2] == ("crash", [(1, 0)])
        assert "nonsense" in kit.events.exits[1][2]["text"]
        assert not kit.events.items


# --- async functions ------------------------------------------------------------------------------


async def test_async_functions_share_one_loop_across_inputs() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import asyncio
            loops = set()
            async def f(x):
                loops.add(id(asyncio.get_running_loop()))
                await asyncio.sleep(0)
                return x, len(loops)
            """,
            is_async=True,
        )
        container.give(lease_of([(i,) for i in range(50)]))
        await kit.outputs(50)
        assert [kit.events.value(i) for i in range(50)] == [(i, 1) for i in range(50)]


async def test_async_code_is_stopped_by_a_cancelled_error_inside_it() -> None:
    async with containers() as kit:
        container = await kit.start(
            """
            import asyncio
            async def f(x):
                try:
                    await asyncio.sleep(100 * x)
                except asyncio.CancelledError:
                    print("cleaned up")
                    raise
                return x
            """,
            is_async=True,
            timeout=0.2,
        )
        container.give(lease_of([(0,), (1,), (0,)]))
        await kit.outputs(3)
        assert kit.events.failure(1) == "timeout"
        assert kit.events.value(2) == 0
        assert "cleaned up" in kit.events.text()


async def test_async_code_may_raise_anything() -> None:
    async with containers() as kit:
        container = await kit.start(
            "async def f(x):\n  if x: raise SystemExit(1)\n  return x\n", is_async=True
        )
        container.give(lease_of([(1,), (0,)]))
        await kit.outputs(2)
        assert isinstance(kit.events.error(0), SystemExit)
        assert kit.events.value(1) == 0
