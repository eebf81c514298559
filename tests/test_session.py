"""A client's session at a real listener that treats it as tests want it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fanout.client.app_run import AppRun
from fanout.client.session import Session
from tests.transport_kit import Site


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
