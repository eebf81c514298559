"""A worker acts for what it was given, and for nothing else.

One worker (`mine`) holds a lease and sends every frame that a worker may send, naming leases,
calls, containers, sessions and blobs of another worker (`theirs`). Both have an input of the same
call, so what one worker learns of the other's work is as much as it can ever be. Whatever is sent,
nobody else may hear of it, and the other worker's work ends as if nothing had been.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fanout.exceptions import ProtocolError
from fanout.protocol import messages as m
from fanout_scheduler.relay import wrap
from tests.server_kit import APP, CALL, FUNCTION, Daemon, Wire, dial, dial_worker

GENERATOR, STREAM = b"g" * 16, b"s" * 16
THEIR_SESSION, MY_SESSION = b"t" * 16, b"y" * 16
CLIENT_SESSION = b"k" * 16
CONTENT = os.urandom(1000)
BLOB = hashlib.sha256(CONTENT).digest()
#: Of a blob that the scheduler has not.
OTHER_BLOB = hashlib.sha256(b"other").digest()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "home")
    yield made
    if made.process is not None:
        made.end(signal.SIGKILL)


def _lengths(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") for value in values)


@dataclass
class Scene:
    client: Wire
    theirs: Wire
    mine: Wire
    #: Input 0 of the call is with them, input 1 with me; the stream is with them.
    their_lease: m.Lease
    my_lease: m.Lease
    stream: m.Lease

    async def settle(self) -> None:
        """Until the scheduler has dealt with all that I sent: it answered, or threw me out."""
        self.mine.send(wrap(MY_SESSION, m.AskCall(77, bytes(16))))

        def is_settled() -> bool:
            answers = [
                m.decode(relay.header, bytes(relay.payload))
                for relay in self.mine.received
                if isinstance(relay, m.Relay) and relay.session_id == MY_SESSION
            ]
            return bool(self.mine.lost) or any(
                isinstance(answer, m.CallInfo) and answer.request_id == 77 for answer in answers
            )

        await self.mine.until(is_settled, "answer to the attacker")

    async def close(self) -> None:
        for wire in (self.client, self.theirs, self.mine):
            await wire.close()


async def make_scene(daemon: Daemon) -> Scene:
    client = await dial(daemon.start().address, session=CLIENT_SESSION)
    theirs = await dial_worker(daemon.address, 1, cpu=2.0)
    client.blobs.put(BLOB, CONTENT)
    client.exchange.offer(BLOB)
    client.send(
        m.OpenApp(APP, "app"),
        m.DefineFunction(GENERATOR, APP, "g", {"is_generator": True}, [BLOB], b"code"),
        m.OpenCall(STREAM, GENERATOR, False, True, None),
        m.Inputs(STREAM, 0, _lengths(b"s"), [], b"s"),
        m.SealCall(STREAM, 1),
    )
    stream = await theirs.take(m.Lease)
    theirs.send(m.ContainerStarted(stream.container_id, 1, 0.1))
    client.send(
        m.DefineFunction(FUNCTION, APP, "f", {}, [], b"code"),
        m.OpenCall(CALL, FUNCTION, False, True, None),
        m.Inputs(CALL, 0, _lengths(b"a", b"b"), [], b"ab"),
        m.SealCall(CALL, 2),
    )
    their_lease = await theirs.take(m.Lease)
    mine = await dial_worker(daemon.address, 2, cpu=1.0)
    my_lease = await mine.take(m.Lease)
    assert (their_lease.call_id, their_lease.start) == (my_lease.call_id, 0) == (CALL, 0)
    assert my_lease.start == 1
    theirs.send(m.SessionOpened(THEIR_SESSION, their_lease.container_id))
    theirs.send(wrap(THEIR_SESSION, m.AskCall(1, CALL)))
    await theirs.take(m.Relay)
    mine.send(m.ContainerStarted(my_lease.container_id, 1, 0.1))
    mine.send(m.SessionOpened(MY_SESSION, my_lease.container_id))
    return Scene(client, theirs, mine, their_lease, my_lease, stream)


# --- what a worker may try, by the kind of frame --------------------------------------------------


def _outputs(s: Scene) -> list[m.Message]:
    def report(lease_id: int, start: int, status: m.Status = m.Status.VALUE) -> m.Message:
        lengths = _lengths(b"forged")
        return m.LeaseOutputs(
            1, lease_id, CALL, start, 5, lengths, bytes([status]), [], b"forged"
        )  # fmt: skip

    epoch = s.my_lease.lease_id >> m.EPOCH_SHIFT
    leases = [
        s.their_lease.lease_id,
        s.my_lease.lease_id,
        s.my_lease.lease_id + 1000,
        (epoch - 1 << m.EPOCH_SHIFT) | 5,
        (epoch + 1 << m.EPOCH_SHIFT) | 5,
    ]
    statuses = (m.Status.VALUE, m.Status.ERROR, m.Status.FAILURE, m.Status.DONE)
    forged = [report(lease_id, 0, status) for lease_id in leases for status in statuses]
    stream = m.LeaseOutputs(
        9, s.stream.lease_id, STREAM, 0, 5, _lengths(b"\0"), bytes([m.Status.DONE]), [], b"\0"
    )
    return [*forged, stream]


def _items(s: Scene) -> list[m.Message]:
    lengths = _lengths(b"forged")
    return [
        m.LeaseItems(1, s.stream.lease_id, STREAM, 0, 0, lengths, [], b"forged"),
        m.LeaseItems(2, s.my_lease.lease_id, CALL, 0, 0, lengths, [], b"forged"),
        m.LeaseItems(3, s.my_lease.lease_id, STREAM, 0, 0, lengths, [], b"forged"),
    ]


def _ready(s: Scene) -> list[m.Message]:
    """To be another worker as well, with their containers and the next one that they will get."""
    numbers = [s.their_lease.container_id, s.stream.container_id, s.my_lease.lease_id + 2]
    containers = [[number, FUNCTION] for number in numbers]
    leases = [s.their_lease.lease_id, s.stream.lease_id]
    return [m.WorkerReady(b"3" * 16, "w3", 8.0, 1000, True, containers, leases)]


def _exits(s: Scene) -> list[m.Message]:
    running = [(s.their_lease.lease_id, 0)]
    return [
        m.ContainerExited(container_id, reason, running, {}, b"forged")
        for container_id in (s.their_lease.container_id, s.stream.container_id)
        for reason in ("crash", "start", "stopped", "timeout", "cancelled")
    ]


def _logs(s: Scene) -> list[m.Message]:
    return [
        m.ContainerLog(s.their_lease.container_id, CALL, 0, 1, b"forged\n"),
        m.ContainerLog(s.stream.container_id, STREAM, 0, 1, b"forged\n"),
        m.ContainerLog(s.stream.container_id, b"", 0, 1, b"forged\n"),
        m.ContainerLog(s.my_lease.container_id, STREAM, 0, 1, b"forged\n"),
        m.ContainerLog(999, STREAM, 0, 1, b"forged\n"),
    ]


def _sessions(s: Scene) -> list[m.Message]:
    """To speak as a container of theirs; to take over their session, and the client's."""
    forged: list[m.Message] = [m.SessionOpened(b"1" * 16, s.their_lease.container_id)]
    forged += [
        m.SessionOpened(session_id, s.my_lease.container_id)
        for session_id in (THEIR_SESSION, CLIENT_SESSION)
    ]
    for session_id in (b"1" * 16, THEIR_SESSION, CLIENT_SESSION):
        forged += [wrap(session_id, m.CancelCall(CALL)), wrap(session_id, m.CancelCall(STREAM))]
    return forged


def _relays(s: Scene) -> list[m.Message]:
    """To act in their session; in my own, on calls that are the client's."""
    whole = m.OpenCall(CALL, FUNCTION, False, True, None, is_resumed=True)
    forged = [
        wrap(session_id, message)
        for session_id in (THEIR_SESSION, CLIENT_SESSION, MY_SESSION)
        for message in (
            whole,
            m.OpenCall(STREAM, GENERATOR, False, True, None, is_resumed=True),
            m.CancelCall(CALL),
            m.TerminateCall(STREAM),
            m.Ack(CALL, [(0, 2)], 2, 0),
            m.CallsFinished([CALL, STREAM]),
            m.ItemCredit(STREAM, 0, 1000, 1000),
            m.Inputs(CALL, 2, _lengths(b"c"), [], b"c"),
            m.SealCall(CALL, 1),
            m.SessionRuns(),
        )
    ]
    return [*forged, m.Relay(THEIR_SESSION, b"\xc1", b"")]


Forge = Callable[[Scene], list[m.Message]]

#: Each kind that a worker may send. Those that name nothing that could be somebody else's are
#: here too: what they do must stay with the sender.
FORGERIES: dict[type[m.Message], Forge] = {
    m.Goodbye: lambda s: [m.Goodbye("auth", "forged")],
    m.Heartbeat: lambda s: [m.Heartbeat(1)],
    m.WorkerReady: _ready,
    m.ContainerStarted: lambda s: [m.ContainerStarted(s.their_lease.container_id, 1, 0.1)],
    m.ContainerExited: _exits,
    m.LeaseOutputs: _outputs,
    m.LeaseItems: _items,
    m.Reclaimed: lambda s: [
        m.Reclaimed(s.their_lease.lease_id, 0),
        m.Reclaimed(s.stream.lease_id, 0),
    ],
    m.LeaseWaits: lambda s: [
        m.LeaseWaits(s.stream.lease_id, 1 << 30),
        m.LeaseWaits(s.their_lease.lease_id, 9),
    ],
    m.ContainerLog: _logs,
    m.CpuTimes: lambda s: [
        m.CpuTimes([(s.their_lease.container_id, 1 << 40), (s.stream.container_id, 1), (999, 1)])
    ],
    m.SessionOpened: _sessions,
    m.SessionClosed: lambda s: [m.SessionClosed(THEIR_SESSION), m.SessionClosed(CLIENT_SESSION)],
    m.Relay: _relays,
    # A blob that was not offered to me; a content that is not the one of its name; parts unasked.
    m.BlobWanted: lambda s: [m.BlobWanted(BLOB)],
    m.BlobHeld: lambda s: [m.BlobHeld(BLOB)],
    m.BlobRefused: lambda s: [
        m.BlobRefused(BLOB, False, "forged"),
        m.BlobRefused(BLOB, True, "forged"),
    ],
    m.BlobCredit: lambda s: [m.BlobCredit(BLOB, 1 << 20), m.BlobCredit(OTHER_BLOB, 1 << 20)],
    m.BlobOffer: lambda s: [
        m.BlobOffer(BLOB, 5),
        m.BlobOffer(OTHER_BLOB, 6),
        m.BlobPart(OTHER_BLOB, 0, b"forged"),
    ],
    m.BlobPart: lambda s: [m.BlobPart(BLOB, 0, b"forged")],
}

#: Of these the fault is certain, and the sender is thrown out with a reason.
REFUSED = {
    m.WorkerReady: "a connection is for one worker",
    m.BlobWanted: "which was not offered",
    m.BlobHeld: "which was not offered",
    m.BlobRefused: "which was not sent",
    m.BlobOffer: "has another digest",
    m.BlobPart: "which was not wanted",
}


def test_every_kind_that_a_worker_may_send_is_tried() -> None:
    assert set(FORGERIES) == m.FROM_WORKER


def _of_others(status: dict[str, Any], scene: Scene) -> dict[str, Any]:
    """What a person sees of the scheduler, without what belongs to me."""
    mine = f"ct-{scene.my_lease.container_id:x}"
    return {
        "containers": [c for c in status["containers"] if c["id"] != mine],
        "workers": [w for w in status["workers"] if w["name"] == "w1"],
        "calls": [
            {key: call[key] for key in ("id", "inputs", "done", "state")}
            for call in status["calls"]
        ],
    }


@pytest.mark.parametrize("kind", list(FORGERIES))
async def test_a_worker_changes_nothing_that_is_not_its_own(
    daemon: Daemon, kind: type[m.Message]
) -> None:
    scene = await make_scene(daemon)
    client, theirs, mine = scene.client, scene.theirs, scene.mine
    await scene.settle()
    mine.received.clear()
    # From here on it is no honest peer: nothing that it gets is answered.
    mine.takes_blobs = False
    before = _of_others(await client.ask_status(), scene)
    client.received.clear()
    theirs.received.clear()

    forged = FORGERIES[kind](scene)
    assert any(type(message) is kind for message in forged)
    mine.send(*forged)
    if kind is m.Goodbye:
        await mine.until_lost()
    else:
        await scene.settle()
    if kind in REFUSED:
        error = await mine.until_lost()
        assert isinstance(error, ProtocolError)
        assert REFUSED[kind] in str(error)
    assert not [x for x in mine.received if type(x) in (m.BlobPart, m.Lease)]

    # Nobody hears of it, and what a person sees of the others is as it was. What I held is
    # theirs now if I am gone.
    after = _of_others(await client.ask_status(), scene)
    assert after == before
    assert client.received == []
    assert [x for x in theirs.received if type(x) is not m.OutputsAck] == []

    # The other worker's session is alive, and its work ends with what it says.
    theirs.send(wrap(THEIR_SESSION, m.AskCall(2, CALL)))
    relay = await theirs.take(m.Relay)
    assert type(m.decode(relay.header, bytes(relay.payload))) is m.CallInfo
    lease, stream = scene.their_lease, scene.stream
    theirs.send(
        m.ContainerStarted(lease.container_id, 1, 0.1),
        m.LeaseItems(1, stream.lease_id, STREAM, 0, 0, _lengths(b"item"), [], b"item"),
        m.LeaseOutputs(2, lease.lease_id, CALL, 0, 5, _lengths(b"true"), b"\0", [], b"true"),
    )
    assert bytes((await client.take(m.Items)).payload) == b"item"
    output = await client.take(m.Outputs)
    assert (output.start, bytes(output.payload)) == (0, b"true")
    await scene.close()
