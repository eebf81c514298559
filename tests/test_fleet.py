"""Much at a time, with real processes: connections, open calls, spawned inputs.

`FANOUT_TEST_FULL=1` makes the counts those that fanout is to bear.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanout.exceptions import AuthError
from fanout.protocol import messages as m
from tests.server_kit import Daemon, Wire, define, dial, submit

IS_FULL = os.environ.get("FANOUT_TEST_FULL") == "1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "scheduler"
    home.mkdir(mode=0o700)
    return home


def started(home: Path, **options: object) -> Iterator[Daemon]:
    daemon = Daemon(home, **options).start()  # type: ignore[arg-type]
    try:
        yield daemon
    finally:
        daemon.end()


async def dial_many(address: dict[str, object], count: int) -> list[Wire]:
    """So many clients, a few at a time."""
    wires: list[Wire] = []
    for _ in range(0, count, 20):
        wires += await asyncio.gather(*[dial(address) for _ in range(20)])
    return wires


async def close_all(wires: list[Wire]) -> None:
    for wire in wires:
        wire.transport.abort()
    await asyncio.gather(*[wire.transport.wait_closed() for wire in wires])


# --- connections ----------------------------------------------------------------------------------


@pytest.fixture
def daemon_with_few_files(folder: Path) -> Iterator[Daemon]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield from started(folder, descriptors=(64, hard))


async def test_a_low_soft_limit_of_open_files_does_not_keep_workers_out(
    daemon_with_few_files: Daemon,
) -> None:
    wires = await dial_many(daemon_with_few_files.address, 120)
    status = await wires[-1].ask_status()
    assert status["sessions"] == 120
    await close_all(wires)


@pytest.fixture
def daemon_for_forty(folder: Path) -> Iterator[Daemon]:
    yield from started(folder, descriptors=(360, 360))


async def test_whom_open_files_leave_no_room_for_is_told_so_and_nobody_else_suffers(
    daemon_for_forty: Daemon,
) -> None:
    wires = await dial_many(daemon_for_forty.address, 40)
    with pytest.raises(AuthError, match=r"40 connections.*ulimit -n"):
        await dial(daemon_for_forty.address)
    wires[0].send(*define(), *submit(is_durable=True))
    assert (await wires[0].take(m.InputsStored)).stored == [[0, 1]]
    await close_all([wires.pop()])
    await wires[0].until_status(lambda status: status["sessions"] == 39)
    wires.append(await dial(daemon_for_forty.address))
    await close_all(wires)
