"""A client's session: how it comes back when its connections are lost, or refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fanout.client import local
from fanout.client import loop as client_loop
from fanout.client.app_run import AppRun
from fanout.client.session import Session
from fanout.exceptions import ConnectionError
from fanout.protocol import messages as m
from fanout.protocol.wire import Transport
from tests import behaviour_kit as kit
from tests.conftest import TIMEOUT_FACTOR, HandStarted, poll_until
from tests.transport_kit import TIMEOUT_S, Recorder, Site


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    made = Site()
    await made.listen()
    monkeypatch.setenv("FANOUT_URL", str(made.join_of("client")))
    try:
        yield made
    finally:
        await made.close()


async def test_a_connection_lost_before_the_apps_are_open_is_made_again(site: Site) -> None:
    loop = asyncio.get_running_loop()
    owner, session = Session(loop), Session(loop)
    run = AppRun("app", b"a" * 16)
    await owner.open_app(run)
    session.use_app(run)
    await session.connect()
    try:
        # As after a restart: the session is to wait until the owner has opened the app.
        run.opened_epoch = -1
        site.accepted[1].transport.abort()
        third = await site.until_accepted(3)
        third.transport.abort()
        await third.transport.wait_closed()
        run.opened_epoch = 3
        await site.until_accepted(4)
    finally:
        await session.close_all()
        await owner.close_all()


async def test_who_is_turned_away_again_and_again_asks_less_and_less_often(site: Site) -> None:
    session = Session(asyncio.get_running_loop())
    await session.connect()
    begin_s = time.monotonic()
    try:
        for count in range(1, 6):
            (await site.until_accepted(count)).transport.close()
        await site.until_accepted(6)
        assert time.monotonic() - begin_s > 0.05 + 0.1 + 0.2 + 0.4 + 0.8
    finally:
        await session.close_all()


async def test_who_finds_no_room_after_a_cut_tries_again_and_loses_nothing(site: Site) -> None:
    session = Session(asyncio.get_running_loop())
    await session.connect()
    question = m.AskStatus(session.next_request())
    answer = session.post(question)
    try:
        site.refusal = ConnectionError("40 connections, and no room for more")
        site.accepted[0].transport.abort()
        await site.until(lambda: site.refused_count == 2)
        site.refusal = None
        again = await site.until_accepted(2)
        await again.until(lambda: question in again.messages)
        assert not answer.done()
    finally:
        await session.close_all()


async def test_a_first_connection_that_finds_no_room_says_so(site: Site) -> None:
    site.refusal = ConnectionError("40 connections, and no room for more")
    with pytest.raises(ConnectionError, match="40 connections, and no room") as caught:
        await Session(asyncio.get_running_loop()).connect()
    assert type(caught.value) is ConnectionError


class LeavingSite(Site):
    """As a scheduler that is just leaving: its first peer reads the Goodbye with the Welcome."""

    def _accept(self, own: Transport, hello: m.Hello, role: str) -> Recorder:
        recorder = super()._accept(own, hello, role)
        if len(self.accepted) == 1:
            own.close(m.Goodbye("shutdown", "the scheduler leaves: idle"))
        return recorder


async def test_a_first_connection_that_ends_at_once_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FANOUT_URL", raising=False)
    site = LeavingSite()
    await site.listen()
    monkeypatch.setattr(local, "ensure_cluster", lambda: site.join_of("client"))
    session = Session(asyncio.get_running_loop())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await session.connect()
        assert session.is_connected
        assert len(site.accepted) == 2
    finally:
        await session.close_all()
        await site.close()


def test_a_container_makes_calls_again_although_its_client_is_later_than_its_worker(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path
) -> None:
    cluster = scheduler_and_workers(1, cpu=1)
    cluster.variables["FANOUT_LOG"] = "info"
    (tmp_path / "cores").mkdir()
    with kit.app.run():
        results = kit.trunk.map(range(20), kwargs={"folder": str(tmp_path / "cores")})
        got = [next(results)]
        may_go_on = threading.Event()
        # The client comes back from the restart after the worker and its container.
        client_loop.background_loop().call_soon_threadsafe(may_go_on.wait)
        try:
            assert cluster.scheduler is not None
            cluster.scheduler.kill()
            cluster.scheduler.wait()
            cluster.start_scheduler()
            poll_until(
                lambda: "(nested) connected" in cluster.log("scheduler"),
                lambda: f"the container has asked; {cluster.log('scheduler')}",
            )
        finally:
            may_go_on.set()
        rest: list[int] = []
        thread = threading.Thread(target=lambda: rest.extend(results), daemon=True)
        thread.start()
        thread.join(30 * TIMEOUT_FACTOR)
        assert got + rest == [2 * (x + 2) for x in range(20)]
