"""Blobs: large buffers that travel beside the frames that name them.

A blob's id is the SHA-256 of its content, so it is sent to a place once however many inputs use
it, and whoever receives it can tell whether it is whole. One transfer::

    sender                       receiver
      | -- BlobOffer(id, size) ----> |   has it?  BlobHeld, and that is all
      | <------------- BlobWanted -- |   no: wants it, a few at a time
      | -- BlobPart, BlobPart ... -> |   64 KiB each, in order, between other frames
      | <------------- BlobCredit -- |   so much more may be under way
      | <--------------- BlobHeld -- |   all is here and the digest right

A receiver whose disk takes no more says `BlobRefused` in the place of the last line, and leaves
out what is still on its way; the sender may offer the blob again later. A worker or client that
gets another content than the id promises says so in the same way, because it is a disk of the
scheduler that has changed it; a scheduler that gets one breaks the connection off.

`BlobExchange` does this for one connection, in both directions; it is sans-IO but for the store
that it writes to (`blob_store.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator

from fanout.exceptions import ProtocolError, StorageError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import BlobStore, BlobWriter

#: Blobs that one connection receives at the same time. A receiver wants no more before one of
#: these is whole, which bounds its open files whatever the sender offers.
INCOMING_COUNT_MAX = 4
#: After so many seconds a sender offers again what the receiver had no room for; then after twice
#: as long each time, at most the longest.
REFUSED_RETRY_S = 1.0
REFUSED_RETRY_S_MAX = 8.0
#: What a refusal says at most.
_REASON_SIZE_MAX = 1000
#: Offers that wait for their turn. A call's credit keeps honest senders far below.
WAITING_COUNT_MAX = 64 << 10


class _Incoming:
    """A blob that the peer streams to us."""

    __slots__ = ("digest", "offset", "size", "upto", "writer")

    def __init__(self, size: int) -> None:
        self.size = size
        self.offset = 0
        #: What the peer may send.
        self.upto = m.BLOB_CREDIT_BYTES
        self.digest = hashlib.sha256()
        self.writer: BlobWriter | None = None


class _Outgoing:
    """A blob that we stream to the peer, until its last part has left."""

    __slots__ = ("content", "is_active", "offset", "upto")

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.offset = 0
        #: What may be sent.
        self.upto = m.BLOB_CREDIT_BYTES
        #: An iterator over its parts is with the transport.
        self.is_active = False


class BlobExchange:
    """The blobs of one connection (or relayed session), to and from a store that others share.

    Args:
        store: where offered blobs are taken from and received ones go.
        send: sends a message.
        send_bulk: sends what an iterator gives, behind and between other messages.
        completed: told the id of each blob that arrived whole over this connection, or in another
            way while the peer's offer of it waited.
        later: calls a function after so many seconds, as `loop.call_later` does.
        is_needed: whether a blob that the peer could not keep is worth another offer; whether it
            is in the store, unless told otherwise.
        failed: told the id of each blob of the peer that the store could not take, and why. The
            peer is told too.
        refused: told the id of each offered blob that the peer could not keep, and why.
        doubted: told the id of each blob that was sent and that the peer found to be broken.
        trusts_peer: what comes broken is told to the peer; otherwise it breaks a rule.
        delivered: told the id of each offered blob once the peer has it, whole.
    """

    def __init__(
        self,
        store: BlobStore,
        send: Callable[[m.Message], None],
        send_bulk: Callable[[Iterator[m.Message]], None],
        completed: Callable[[bytes], None],
        later: Callable[[float, Callable[[], None]], object],
        *,
        is_needed: Callable[[bytes], bool] | None = None,
        failed: Callable[[bytes, StorageError], None] = lambda blob_id, error: None,
        refused: Callable[[bytes, str], None] = lambda blob_id, text: None,
        delivered: Callable[[bytes], None] = lambda blob_id: None,
        doubted: Callable[[bytes], None] = lambda blob_id: None,
        trusts_peer: bool = False,
    ) -> None:
        self._store = store
        self._send = send
        self._send_bulk = send_bulk
        self._completed = completed
        self._failed = failed
        self._later = later
        self._is_needed = is_needed or store.has
        self._refused = refused
        self._delivered = delivered
        self._doubted = doubted
        self._trusts_peer = trusts_peer
        #: Offered, not yet answered. The content is held, so that a drop in between does no harm.
        self._offered: dict[bytes, memoryview] = {}
        #: Being streamed. Offering one of these or of those above again changes nothing.
        self._streaming: dict[bytes, _Outgoing] = {}
        #: All sent, not yet answered. Such a one may be offered again: its answer comes first.
        self._sent: set[bytes] = set()
        #: The peer is to forget these as soon as nothing of them is on its way.
        self._withdrawn: set[bytes] = set()
        #: Blobs that the peer had no room for, and how often; those that are to be offered again.
        self._refusals: Counter[bytes] = Counter()
        self._offered_later: set[bytes] = set()
        self._incoming: dict[bytes, _Incoming] = {}
        #: Offers of the peer that wait for one of `_incoming` to end: id to size.
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._waiting_ids: set[bytes] = set()
        #: Blobs that we refused, of which parts may still come; the oldest go first.
        self._unkept: dict[bytes, None] = {}
        self._is_closed = False

    def offer(self, blob_id: bytes) -> None:
        """Let the peer have this blob, if it has not.

        Harmless to repeat: while a transfer is under way nothing happens, and after one the peer
        is asked again (in case it has dropped the blob) and answers that it holds it.

        Raises:
            KeyError: the blob is not in the store.
        """
        self._withdrawn.discard(blob_id)
        if self._is_closed or blob_id in self._offered or blob_id in self._streaming:
            return
        content = self._store.buffer(blob_id)
        self._offered[blob_id] = content
        self._send(m.BlobOffer(blob_id, len(content)))

    def withdraw(self, blob_id: bytes) -> None:
        """Have the peer, a worker, forget a blob that it was offered. One that is on its way there
        is not held up, and forgotten when it has arrived; another offer until then undoes that."""
        self._withdrawn.add(blob_id)
        self._offered_later.discard(blob_id)
        self._drop_if_withdrawn(blob_id)

    def handle(self, message: m.Message) -> bool:
        """Take a message of the peer. False if it is not about a transfer.

        Raises:
            ProtocolError: a part that is not wanted, at the wrong offset, over the announced
                size, or of a blob whose digest is wrong; or an answer to no offer.
        """
        if isinstance(message, m.BlobPart):
            self._on_part(message)
        elif isinstance(message, m.BlobOffer):
            self._on_offer(message)
        elif isinstance(message, m.BlobWanted):
            self._on_wanted(message.blob_id)
        elif isinstance(message, m.BlobCredit):
            self._on_credit(message)
        elif isinstance(message, m.BlobHeld):
            self._on_held(message.blob_id)
        elif isinstance(message, m.BlobRefused):
            self._on_refused(message)
        else:
            return False
        return True

    def close(self) -> None:
        """The connection is gone: drop what arrived in part, stop what is streamed."""
        self._is_closed = True
        for incoming in self._incoming.values():
            if incoming.writer is not None:
                incoming.writer.abort()
        self._incoming.clear()
        self._waiting.clear()
        self._waiting_ids.clear()
        self._unkept.clear()
        self._offered.clear()
        self._streaming.clear()
        self._sent.clear()
        self._withdrawn.clear()
        self._refusals.clear()
        self._offered_later.clear()

    # --- sending ---

    def _take_offered(self, blob_id: bytes, name: str) -> memoryview:
        content = self._offered.pop(blob_id, None)
        if content is None:
            raise ProtocolError(f"{name} for {_shown(blob_id)}, which was not offered")
        return content

    def _on_wanted(self, blob_id: bytes) -> None:
        content = self._take_offered(blob_id, "BlobWanted")
        self._streaming[blob_id] = _Outgoing(content)
        self._stream(blob_id)

    def _on_held(self, blob_id: bytes) -> None:
        if blob_id in self._sent:
            self._sent.discard(blob_id)
        else:
            self._take_offered(blob_id, "BlobHeld")
        self._refusals.pop(blob_id, None)
        self._delivered(blob_id)
        self._drop_if_withdrawn(blob_id)

    def _on_refused(self, refused: m.BlobRefused) -> None:
        blob_id = refused.blob_id
        if self._streaming.pop(blob_id, None) is None:
            if blob_id not in self._sent:
                raise ProtocolError(f"BlobRefused for {_shown(blob_id)}, which was not sent")
            self._sent.discard(blob_id)
        is_withdrawn = blob_id in self._withdrawn
        self._drop_if_withdrawn(blob_id)
        if is_withdrawn:
            self._refusals.pop(blob_id, None)
        elif refused.is_broken:
            self._doubted(blob_id)
        else:
            self._refused(blob_id, refused.text)
            self.offer_later(blob_id)

    def _drop_if_withdrawn(self, blob_id: bytes) -> None:
        is_under_way = any(blob_id in of for of in (self._offered, self._streaming, self._sent))
        if blob_id in self._withdrawn and not is_under_way and not self._is_closed:
            self._withdrawn.discard(blob_id)
            self._send(m.BlobDrop(blob_id))

    def offer_later(self, blob_id: bytes) -> None:
        """Offer a blob after a while, if it is needed then; each time later."""

        def offer() -> None:
            if blob_id in self._offered_later:
                self._offered_later.discard(blob_id)
                if self._is_needed(blob_id):
                    self.offer(blob_id)
                else:
                    self._refusals.pop(blob_id, None)

        self._offered_later.add(blob_id)
        delay_s = min(REFUSED_RETRY_S * 2 ** self._refusals[blob_id], REFUSED_RETRY_S_MAX)
        self._refusals[blob_id] += 1
        self._later(delay_s, offer)

    def _on_credit(self, credit: m.BlobCredit) -> None:
        outgoing = self._streaming.get(credit.blob_id)
        # For a blob that is all sent it comes too late, which is in order.
        if outgoing is not None and credit.upto > outgoing.upto:
            outgoing.upto = credit.upto
            self._stream(credit.blob_id)

    def _stream(self, blob_id: bytes) -> None:
        """Send what the credit allows, unless that is under way."""
        outgoing = self._streaming[blob_id]
        if not outgoing.is_active:
            outgoing.is_active = True
            self._send_bulk(self._parts(blob_id, outgoing))

    def _parts(self, blob_id: bytes, outgoing: _Outgoing) -> Iterator[m.Message]:
        content = outgoing.content
        size = len(content)
        while outgoing.offset < outgoing.upto:
            if self._streaming.get(blob_id) is not outgoing:
                # The connection is closed, or the peer refused the rest.
                return
            offset = outgoing.offset
            stop = outgoing.offset = offset + m.BLOB_PART_SIZE_BYTES
            if stop >= size:
                # With the last part on its way, another offer comes behind it and is in order.
                del self._streaming[blob_id]
                self._sent.add(blob_id)
            yield m.BlobPart(blob_id, offset, content[offset:stop])
            # An empty blob has one part too: the last part is what completes it.
            if stop >= size:
                return
        outgoing.is_active = False

    # --- receiving ---

    def _on_offer(self, offer: m.BlobOffer) -> None:
        blob_id = offer.blob_id
        if self._is_closed or blob_id in self._incoming or blob_id in self._waiting_ids:
            return
        self._unkept.pop(blob_id, None)
        if self._store.has(blob_id):
            self._send(m.BlobHeld(blob_id))
        elif len(self._incoming) < INCOMING_COUNT_MAX:
            self._want(blob_id, offer.size)
        elif len(self._waiting) < WAITING_COUNT_MAX:
            self._waiting.append((blob_id, offer.size))
            self._waiting_ids.add(blob_id)
        else:
            raise ProtocolError(f"more than {WAITING_COUNT_MAX} blobs offered at once")

    def _want(self, blob_id: bytes, size: int) -> None:
        self._incoming[blob_id] = _Incoming(size)
        self._send(m.BlobWanted(blob_id))

    def _on_part(self, part: m.BlobPart) -> None:
        if self._is_closed:
            return
        blob_id = part.blob_id
        incoming = self._incoming.get(blob_id)
        if incoming is None:
            if blob_id in self._unkept:
                return
            raise ProtocolError(f"a part of {_shown(blob_id)}, which was not wanted")
        if part.offset != incoming.offset:
            raise ProtocolError(
                f"a part of {_shown(blob_id)} at {part.offset} instead of {incoming.offset}"
            )
        stop = incoming.offset + len(part.payload)
        if stop > incoming.upto:
            raise ProtocolError(
                f"a part of {_shown(blob_id)} up to {stop}; the credit is {incoming.upto}"
            )
        if stop > incoming.size or (stop == part.offset and incoming.size):
            raise ProtocolError(
                f"a part of {_shown(blob_id)} up to {stop} after {part.offset}; it was announced "
                f"with {incoming.size} bytes"
            )
        try:
            if incoming.writer is None:
                # Not before its first byte: an offer alone must not make a file.
                incoming.writer = self._store.open_writer(blob_id, incoming.size)
            incoming.writer.write(part.payload)
            incoming.digest.update(part.payload)
            incoming.offset = stop
            if stop == incoming.size:
                self._complete(blob_id, incoming)
                return
        except StorageError as error:
            self._refuse(blob_id, incoming, error)
            return
        if incoming.upto < incoming.size and incoming.upto - stop <= m.BLOB_CREDIT_BYTES // 2:
            incoming.upto = stop + m.BLOB_CREDIT_BYTES
            self._send(m.BlobCredit(blob_id, incoming.upto))

    def _complete(self, blob_id: bytes, incoming: _Incoming) -> None:
        assert incoming.writer is not None
        if incoming.digest.digest() != blob_id:
            text = f"the content of {_shown(blob_id)} has another digest"
            if not self._trusts_peer:
                raise ProtocolError(text)
            self._refuse(blob_id, incoming, StorageError(text), is_broken=True)
            return
        incoming.writer.finish()
        del self._incoming[blob_id]
        self._send(m.BlobHeld(blob_id))
        self._want_waiting()
        self._completed(blob_id)

    def _refuse(
        self, blob_id: bytes, incoming: _Incoming, error: StorageError, is_broken: bool = False
    ) -> None:
        del self._incoming[blob_id]
        if incoming.writer is not None:
            incoming.writer.abort()
        if incoming.offset < incoming.size:
            self._unkept[blob_id] = None
            if len(self._unkept) > WAITING_COUNT_MAX:
                del self._unkept[next(iter(self._unkept))]
        self._send(m.BlobRefused(blob_id, is_broken, str(error)[:_REASON_SIZE_MAX]))
        self._want_waiting()
        self._failed(blob_id, error)

    def _want_waiting(self) -> None:
        """Go on with the offers that wait. What came over another connection meanwhile is held."""
        while self._waiting and len(self._incoming) < INCOMING_COUNT_MAX:
            blob_id, size = self._waiting.popleft()
            self._waiting_ids.discard(blob_id)
            if self._store.has(blob_id):
                self._send(m.BlobHeld(blob_id))
                self._completed(blob_id)
            else:
                self._want(blob_id, size)


def _shown(blob_id: bytes) -> str:
    return f"blob {blob_id[:6].hex()}..."
