"""Large results travel beside the reports that name them: one end is killed in mid-transfer.

Each run of an input gives other bytes, so a result that is made of two runs would show.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import restart_kit as kit
from tests.conftest import TIMEOUT_FACTOR, HandStarted, poll_until

Start = Callable[..., HandStarted]

SIZE_BYTES = 3 << 20
COUNT = 40
#: Results that the user has when somebody is killed.
TAKEN_COUNT = 5
LOOK_INTERVAL_S = 0.001
END_TIMEOUT_S = 20.0


def blobs(cluster: HandStarted, name: str) -> Path:
    """Where a daemon keeps what is large."""
    home = cluster.home(name)
    return (home if name == "scheduler" else home / "worker") / "blobs"


def drafts(cluster: HandStarted, name: str) -> list[Path]:
    """What is there in part."""
    return list(blobs(cluster, name).glob("*.part"))


def is_half_sent(cluster: HandStarted, worker: str) -> bool:
    """Whether the scheduler has a result of the worker in part."""
    names = {path.name.partition(".")[0] for path in drafts(cluster, "scheduler")}
    return any((blobs(cluster, worker) / name).exists() for name in names)


def kill_in_mid_transfer(cluster: HandStarted, victim: str) -> None:
    """Kill the scheduler, or the worker w1, while a result is on its way from w1 to it."""
    process = cluster.scheduler if victim == "scheduler" else cluster.workers[victim]
    assert process is not None

    def is_stopped_in_time() -> bool:
        if not is_half_sent(cluster, "w1"):
            return False
        process.send_signal(signal.SIGSTOP)
        if is_half_sent(cluster, "w1"):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    poll_until(is_stopped_in_time, "a result is half sent", interval_s=LOOK_INTERVAL_S)
    process.kill()
    process.wait()


def outlive(
    cluster: HandStarted, results: Iterator[bytes], victim: str, go_on: Callable[[], object]
) -> list[int]:
    """Take all results, each of which must be whole; after the first ones the victim is killed.

    Returns:
        their numbers.
    """
    got: list[int] = []
    errors: list[BaseException] = []

    def take() -> None:
        try:
            for data in results:
                number = kit.unseal(data, SIZE_BYTES)
                got.append(number)
        except BaseException as error:
            errors.append(error)

    # The results are taken all the while, because a generator makes none that nobody waits for.
    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    poll_until(lambda: len(got) >= TAKEN_COUNT or errors, "the first results come")
    assert not errors, errors
    kill_in_mid_transfer(cluster, victim)
    assert len(got) < COUNT, "it was killed in mid-work"
    go_on()
    taking.join(END_TIMEOUT_S * TIMEOUT_FACTOR)
    assert not errors, errors
    assert not taking.is_alive(), f"no more come after {got}"
    return got


def require_nothing_is_left(cluster: HandStarted, workers: list[str]) -> None:
    """No call is open, nothing is anywhere in part, and these workers keep no result."""

    def left() -> list[Path]:
        begun = [path for name in ("scheduler", *workers) for path in drafts(cluster, name)]
        kept = [path for name in workers for path in blobs(cluster, name).iterdir()]
        return begun + [path for path in kept if path.stat().st_size >= SIZE_BYTES]

    poll_until(lambda: cluster.open_call_count() == 0, "the call ends at the scheduler too")
    poll_until(lambda: not left(), lambda: f"no blob is left: {left()}")


@pytest.mark.slow
def test_large_results_come_once_and_whole_when_the_scheduler_is_killed(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(2, cpu=1)
    with kit.app.run():
        results = kit.sealed.map(range(COUNT), kwargs={"size": SIZE_BYTES})
        assert outlive(cluster, results, "scheduler", cluster.start_scheduler) == [*range(COUNT)]
        require_nothing_is_left(cluster, ["w1", "w2"])


@pytest.mark.slow
def test_large_results_come_once_and_whole_when_a_worker_is_killed(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(2, cpu=1)
    with kit.app.run():
        results = kit.sealed.map(range(COUNT), kwargs={"size": SIZE_BYTES})
        assert outlive(cluster, results, "w1", lambda: None) == [*range(COUNT)]
        require_nothing_is_left(cluster, ["w2"])


@pytest.mark.slow
def test_large_items_come_once_and_whole_when_the_scheduler_is_killed(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    with kit.app.run():
        items = kit.sealed_items.remote_gen(COUNT, SIZE_BYTES)
        assert outlive(cluster, items, "scheduler", cluster.start_scheduler) == [*range(COUNT)]
        require_nothing_is_left(cluster, ["w1"])


@pytest.mark.slow
def test_large_items_come_once_and_whole_when_their_worker_is_killed(
    scheduler_and_workers: Start,
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)

    def replace() -> None:
        cluster.start_worker("w2", cpu=1)

    with kit.app.run():
        items = kit.sealed_items.remote_gen(COUNT, SIZE_BYTES)
        assert outlive(cluster, items, "w1", replace) == [*range(COUNT)]
        require_nothing_is_left(cluster, ["w2"])
