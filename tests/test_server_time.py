"""The scheduler and time: its clock, the time it did not run, and how it waits."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from fanout.protocol.join import Address
from fanout_scheduler.clock import GAP_S, TICK_INTERVAL_S, Clock
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import Command
from fanout_scheduler.home import Home
from fanout_scheduler.server import Options, SchedulerServer
from tests.server_kit import Daemon, dial, dial_worker


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home")
    yield made
    if made.process is not None:
        made.end(signal.SIGKILL)


class Hand:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_the_clock_runs_with_time() -> None:
    hand = Hand()
    clock = Clock(hand)
    for _ in range(100):
        hand.time += TICK_INTERVAL_S
        assert clock.now() == hand.time


def test_a_gap_is_left_out_and_no_deadline_comes_in_it() -> None:
    hand = Hand()
    clock = Clock(hand)
    before = clock.now()
    hand.time += 3600
    assert clock.now() == before
    hand.time += 0.25
    assert clock.now() == before + 0.25
    assert clock.skipped_s == 3600


def test_a_busy_moment_is_no_gap() -> None:
    hand = Hand()
    clock = Clock(hand)
    hand.time += TICK_INTERVAL_S + GAP_S
    assert clock.now() == hand.time


@pytest.mark.slow
async def test_a_worker_is_not_lost_because_the_scheduler_was_stopped(daemon: Daemon) -> None:
    client = await dial(daemon.start().address)
    worker = await dial_worker(daemon.address)
    daemon.kill(signal.SIGSTOP)
    # Longer than a worker may be silent; nothing can be waited for but time itself.
    await asyncio.sleep(16)
    daemon.kill(signal.SIGCONT)
    status = await client.ask_status()
    assert [entry["name"] for entry in status["workers"]] == ["w1"]
    await client.close()
    await worker.close()


class CountingCore(Scheduler):
    """A core that counts its turns."""

    turn_count = 0

    def decide(self, now: float) -> list[Command]:
        self.turn_count += 1
        return super().decide(now)


def test_waiting_for_a_deadline_takes_no_turns(tmp_path: Path) -> None:
    """The timers of uvloop count in milliseconds; the deadlines here do not."""
    steps = 50

    async def main() -> int:
        server = SchedulerServer(
            Home(tmp_path / "home"), Options(Address("127.0.0.1"), None, "127.0.0.1")
        )
        server.core = core = CountingCore(server.epoch)
        core.restore([], server.clock.now())
        last = asyncio.Event()
        ready = asyncio.Event()
        task = asyncio.create_task(server.run(lambda address: ready.set()))
        await ready.wait()
        begin = server.clock.now()
        for step in range(1, steps + 1):
            core.state.at(begin + step * 0.0067, "look", None)
        asyncio.get_running_loop().call_later(steps * 0.0067 + 0.05, last.set)
        before = core.turn_count
        server.schedule_turn()
        await last.wait()
        count = core.turn_count - before
        server.leave("the test is over")
        await task
        return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) <= 2 * steps
