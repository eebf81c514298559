"""Between a session and the connection that it uses at the moment."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fanout.exceptions import InternalError, ProtocolError
from fanout.protocol import messages as m
from fanout.protocol import transport as wire

if TYPE_CHECKING:
    from fanout.client.session import Session

logger = logging.getLogger("fanout.client")


class SessionHandler:
    """Takes what a transport delivers, as long as the session uses that transport."""

    def __init__(self, session: Session, transport: wire.Transport) -> None:
        self._session = session
        self._transport = transport

    def messages_received(self, messages: list[m.Message]) -> None:
        if self._session.transport is not self._transport:
            return
        try:
            self._session.receive(messages)
        except ProtocolError as error:
            logger.error("the scheduler broke the protocol: %s", error)
            self._session.fail_all(InternalError(f"the scheduler broke the protocol: {error}"))
            raise

    def connection_lost(self, error: Exception | None) -> None:
        self._session.lose(self._transport, error)

    def writable_changed(self, is_writable: bool) -> None:
        """The credit of calls bounds what is in flight."""
