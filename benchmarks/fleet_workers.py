"""Some of the workers of `fleet.py`, as one process: real connections, made-up containers."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections import deque
from dataclasses import dataclass, field

import uvloop

from fanout.config import HEARTBEAT_INTERVAL_S
from fanout.protocol import messages as m
from fanout.protocol.blob_store import MemoryBlobStore
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import JoinString
from fanout.protocol.transport import Transport, connect
from fanout_worker import worker_state as ws

#: Dialled at a time by one process; the scheduler keeps 256 strangers at most.
DIAL_COUNT = 16
MEMORY_MIB = 64 << 10
VALUE = pickle.dumps(None, 5)
LENGTH = len(VALUE).to_bytes(4, "little")


@dataclass
class FakeContainer:
    """Runs its leases one after the other; an input takes its time and gives None."""

    worker: FakeWorker
    container_id: int
    leases: deque[m.Lease] = field(default_factory=deque)
    #: Of the first lease: when it began, and how many of its inputs are left to it.
    began_at: float = 0.0
    count: int = 0
    timer: asyncio.TimerHandle | None = None

    def give(self, lease: m.Lease) -> None:
        self.leases.append(lease)
        if len(self.leases) == 1:
            self._begin()

    def _begin(self) -> None:
        self.began_at = self.worker.loop.time()
        self._wait_for(len(self.leases[0].lengths) // 4)

    def _wait_for(self, count: int) -> None:
        """The first lease ends when so many of its inputs have run."""
        self.count = count
        if self.timer is not None:
            self.timer.cancel()
        if self.worker.input_s:
            end = self.began_at + count * self.worker.input_s
            self.timer = self.worker.loop.call_at(end, self._end)
        else:
            self.worker.loop.call_soon(self._end)

    def _end(self) -> None:
        lease, count = self.leases.popleft(), self.count
        busy_us = int(count * self.worker.input_s * 1e6)
        if count:
            self.worker.state.lease_outputs(
                lease.lease_id, lease.start, busy_us, LENGTH * count, bytes(count), [],
                VALUE * count,
            )  # fmt: skip
        if self.leases:
            self._begin()
        self.worker.act()

    def lower_limit(self, lease_id: int, keep: int) -> None:
        """Give back what has not begun."""
        for position, lease in enumerate(self.leases):
            if lease.lease_id != lease_id:
                continue
            if position:
                kept = min(keep, len(lease.lengths) // 4)
                lease.lengths = lease.lengths[: 4 * kept]
                if not kept:
                    self.leases.remove(lease)
            else:
                begun = self.count
                if self.worker.input_s:
                    passed_s = self.worker.loop.time() - self.began_at
                    begun = int(passed_s / self.worker.input_s) + 1
                kept = min(self.count, max(begun, keep))
                if kept < self.count:
                    self._wait_for(kept)
            self.worker.state.lease_reclaimed(lease_id, lease.start + kept)
            return


class FakeWorker:
    """What the worker daemon does round its state, with made-up containers."""

    def __init__(self, join: JoinString, number: int, cpu: int, input_s: float) -> None:
        self.join = join
        self.loop = asyncio.get_running_loop()
        self.input_s = input_s
        self.worker_id = os.urandom(16)
        name = f"worker-{os.getpid()}-{number}"
        self.state = ws.WorkerState(self.worker_id, name, float(cpu), MEMORY_MIB, False)
        self.containers: dict[int, FakeContainer] = {}
        self.store = MemoryBlobStore()
        self.transport: Transport | None = None
        self.is_acting = False
        self.heartbeats = 0
        self.lost = self.loop.create_future()

    async def connect(self) -> None:
        await connect(
            self.join,
            role="worker",
            session_id=self.worker_id,
            info={"pid": os.getpid()},
            handler=self._open,
        )
        self._beat()

    def _open(self, transport: Transport) -> FakeWorker:
        welcome = transport.peer
        assert isinstance(welcome, m.Welcome)
        self.transport = transport
        self.exchange = BlobExchange(
            self.store,
            transport.send,
            transport.send_bulk,
            self.state.blob_completed,
            asyncio.get_running_loop().call_later,
        )
        self.state.connected()
        self.act()
        return self

    def _beat(self) -> None:
        if self.transport is not None:
            self.heartbeats += 1
            self.transport.send(m.Heartbeat(self.heartbeats))
            self.loop.call_later(HEARTBEAT_INTERVAL_S, self._beat)

    # --- called by the transport ---

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            if isinstance(message, m.Heartbeat | m.Goodbye) or self.exchange.handle(message):
                continue
            self.state.handle(message)
        self.act()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.exchange.close()
        if not self.lost.done():
            self.lost.set_result(error)

    def writable_changed(self, is_writable: bool) -> None:
        pass

    # --- orders of the state ---

    def act(self) -> None:
        if self.is_acting:
            return
        self.is_acting = True
        while commands := self.state.take_commands():
            for command in commands:
                self._carry_out(command)
        self.is_acting = False
        if self.transport is not None:
            self.transport.flush()

    def _carry_out(self, command: ws.Command) -> None:
        match command:
            case ws.Send(message):
                if self.transport is not None:
                    self.transport.queue(message)
            case ws.Start(container_id, _):
                self.containers[container_id] = FakeContainer(self, container_id)
                self.state.container_started(container_id, os.getpid(), 0.01)
            case ws.GiveLease(lease):
                self.containers[lease.container_id].give(lease)
            case ws.LowerLimit(container_id, lease_id, keep, _):
                self.containers[container_id].lower_limit(lease_id, keep)
            case ws.Stop(container_id, _):
                if self.containers.pop(container_id, None) is not None:
                    self.state.container_exited(container_id, "stopped", [], {})


async def run(join: JoinString, count: int, cpu: int, input_s: float) -> None:
    """Connect all, and stay until a signal or the loss of a connection."""
    loop = asyncio.get_running_loop()
    left = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, left.set)
    workers = [FakeWorker(join, number, cpu, input_s) for number in range(count)]
    for first in range(0, count, DIAL_COUNT):
        await asyncio.gather(*[x.connect() for x in workers[first : first + DIAL_COUNT]])
    leaving = asyncio.ensure_future(left.wait())
    await asyncio.wait(
        [leaving, *(worker.lost for worker in workers)], return_when=asyncio.FIRST_COMPLETED
    )
    for worker in workers:
        if worker.transport is not None:
            worker.transport.abort()
    if not leaving.done():
        leaving.cancel()
        errors = {str(worker.lost.result()) for worker in workers if worker.lost.done()}
        raise ConnectionError(f"connections were lost: {sorted(errors)}")


def main() -> None:
    join, count, cpu, input_s = sys.argv[1:5]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(JoinString.parse(join), int(count), int(cpu), float(input_s)))


if __name__ == "__main__":
    main()
