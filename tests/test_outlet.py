"""Frames that threads write themselves, beside those of the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fanout.protocol import messages as m
from fanout.protocol.outlet import FRAME_SIZE_BYTES_MAX
from tests.transport_kit import Recorder, Site, ignore
from tests.transport_kit import event_loop_policy as event_loop_policy
from tests.transport_kit import site as site

# The hook that replaces this fixture exists only in later versions than the oldest one we allow.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

THREAD_COUNT = 4
FRAME_COUNT = 1500


@pytest.fixture
async def unix_site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site()
    made.react = ignore
    await made.listen(path=str(tmp_path / "socket"))
    try:
        yield made
    finally:
        await made.close()


async def dial(site: Site) -> tuple[Recorder, Recorder]:
    """A connection with an outlet, and its other end."""
    ours = await site.dial()
    ours.transport.open_outlet()
    return ours, await site.until_accepted(1)


def report(size_bytes: int) -> m.LeaseOutputs:
    lengths = size_bytes.to_bytes(4, "little")
    return m.LeaseOutputs(1, 2, b"c" * 16, 0, 0, lengths, b"\0", [], bytes(size_bytes))


def numbers_of(recorder: Recorder) -> list[int]:
    return [each.sequence for each in recorder.messages if isinstance(each, m.Heartbeat)]


def sent_by_thread(ours: Recorder, message: m.Message) -> bool:
    """What `send_outside` says in another thread; the loop stands still meanwhile."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(ours.transport.send_outside(message)))
    thread.start()
    thread.join()
    return answers[0]


async def test_threads_and_the_loop_write_whole_frames(unix_site: Site) -> None:
    ours, theirs = await dial(unix_site)
    transport, loop = ours.transport, asyncio.get_running_loop()
    left_to_loop = []

    def send(first: int) -> None:
        for number in range(first, first + FRAME_COUNT):
            message = m.Heartbeat(number)
            if not transport.send_outside(message):
                left_to_loop.append(number)
                loop.call_soon_threadsafe(transport.send, message)

    threads = [threading.Thread(target=send, args=(10_000 * n,)) for n in range(THREAD_COUNT)]
    for thread in threads:
        thread.start()
    large_count = 0
    while any(thread.is_alive() for thread in threads):
        if transport.is_writable:
            transport.send(report(300_000))
            large_count += 1
        await asyncio.sleep(0)
    expected = {10_000 * n + i for n in range(THREAD_COUNT) for i in range(FRAME_COUNT)}
    total = len(expected) + large_count
    await theirs.until(lambda: len(theirs.messages) >= total)
    got = numbers_of(theirs)
    assert sorted(got) == sorted(expected)
    assert len(theirs.messages) == total
    assert 0 < len(left_to_loop) < len(expected), "both ways were used"
    by_threads = [number for number in got if number not in set(left_to_loop)]
    for n in range(THREAD_COUNT):
        mine = [number for number in by_threads if number // 10_000 == n]
        assert mine == sorted(mine), "what one thread wrote itself keeps its order"


async def test_a_thread_does_not_get_before_what_waits(unix_site: Site) -> None:
    ours, theirs = await dial(unix_site)
    ours.transport.queue(m.Heartbeat(1))
    assert not sent_by_thread(ours, m.Heartbeat(2))
    ours.transport.flush()
    await theirs.until(lambda: len(theirs.messages) == 1)
    assert sent_by_thread(ours, m.Heartbeat(2))
    await theirs.until(lambda: len(theirs.messages) == 2)
    assert numbers_of(theirs) == [1, 2]


async def test_what_does_not_fit_any_more_is_left_to_the_loop(unix_site: Site) -> None:
    ours, theirs = await dial(unix_site)
    theirs.transport.pause_reading()
    sent_count = 0
    while ours.transport.send_outside(m.Heartbeat(sent_count)):
        sent_count += 1
    ours.transport.send(m.Heartbeat(sent_count))
    assert not ours.transport.send_outside(m.Heartbeat(0))
    theirs.transport.resume_reading()
    await theirs.until(lambda: len(theirs.messages) == sent_count + 1)
    assert numbers_of(theirs) == list(range(sent_count + 1))


async def test_large_frames_are_left_to_the_loop(unix_site: Site) -> None:
    ours, theirs = await dial(unix_site)
    assert not ours.transport.send_outside(report(FRAME_SIZE_BYTES_MAX))
    assert ours.transport.send_outside(report(FRAME_SIZE_BYTES_MAX // 2))
    await theirs.until(lambda: len(theirs.messages) == 1)


async def test_only_a_unix_socket_has_an_outlet(site: Site) -> None:
    ours = await site.dial()
    ours.transport.open_outlet()
    assert not ours.transport.send_outside(m.Heartbeat(1))


async def test_a_connection_that_is_gone_takes_nothing_and_leaves_no_descriptor(
    unix_site: Site,
) -> None:
    count = len(os.listdir("/proc/self/fd"))
    ours, theirs = await dial(unix_site)
    assert ours.transport.send_outside(m.Heartbeat(1))
    ours.transport.close()
    assert not ours.transport.send_outside(m.Heartbeat(2))
    await theirs.until_lost()
    await ours.transport.wait_closed()
    assert not ours.transport.send_outside(m.Heartbeat(3))
    assert numbers_of(theirs) == [1]
    assert len(os.listdir("/proc/self/fd")) == count


async def test_a_thread_that_meets_the_end_of_the_peer_is_told_so(unix_site: Site) -> None:
    ours, theirs = await dial(unix_site)
    theirs.transport.abort()
    await theirs.transport.wait_closed()
    assert not ours.transport.send_outside(m.Heartbeat(1))
    await ours.until_lost()
