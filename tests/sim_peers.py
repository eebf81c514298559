"""Clients of a simulated fanout, and what its functions do; see `sim_world.py`.

The state of each call is the real module. What its user sees is checked here, and so are the books
of credit, against what goes over the wire.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from fanout.client.call_state import CallState
from fanout.client.chunk import CHUNK_COUNT_MAX, Batch, BlobRef, ItemBatch, split
from fanout.client.last_words import LastWords
from fanout.config import CRASH_LIMIT, WINDOW_COUNT_MIN
from fanout.protocol import messages as m
from tests.sim_blobs import ClientBlobs, argument_of, references_of, require_result
from tests.sim_story import Broken
from tests.sim_world import APP, Link, World

#: What a client that is not sure may say again.
REPEATED_KINDS = (m.SubmitCall, m.OpenCall, m.Inputs, m.SealCall, m.Ack)
#: What the scheduler says of a call to its client's state of it; the rest is for people.
CALL_STATE_KINDS = (
    m.Outputs,
    m.Items,
    m.CallOpened,
    m.Window,
    m.CallFailed,
    m.InputsStored,
)


class SimCall:
    """One call of a client: the real state, and what its user saw."""

    def __init__(
        self,
        call: CallState,
        plan: Plan,
        count: int,
        world: World,
        blobs: ClientBlobs | None = None,
    ) -> None:
        self.call = call
        self.blobs = blobs
        self.plan = plan
        self.count = count
        self.world = world
        self.added = 0
        self.seen: Counter[int] = Counter()
        self.items: dict[int, list[int]] = {}
        self.order: list[int] = []
        self.is_cancelled = False
        self.failure: bytes | None = None
        self.is_told = False
        #: The books of credit, as the wire has them: inputs sent for the first time, inputs that
        #: the last `Ack` called consumed, and the window that the scheduler told last.
        self.sent = 0
        self.told = 0
        self.consumed = 0
        self.window = WINDOW_COUNT_MIN

    def pump(self) -> None:
        """Add inputs as far as there is room."""
        while self.added < self.count:
            room, _ = self.call.room()
            if room <= 0:
                return
            most = 60 if self.count < 1000 else CHUNK_COUNT_MAX
            count = min(room, self.count - self.added, self.world.random.randint(1, most))
            start = self.added
            blobs = self._name_blobs(start, count) if self.plan.is_bulky else None
            inputs = [b"%d" % i for i in range(start, start + count)]
            self.added += count
            # Whoever gives inputs may learn only later that they were the last.
            self.call.add(inputs, blobs, is_last=self.added == self.count and self.count % 2 == 0)
        self.call.seal()

    def _name_blobs(self, start: int, count: int) -> list[BlobRef]:
        """Have the blobs of inputs ready. Each input holds those that it names."""
        assert self.blobs is not None
        references = references_of(self.call.call_id, start, count)
        for at, blob_ids in references:
            content = argument_of(self.call.call_id, start + at)
            self.blobs.store.put(blob_ids[0], content)
            self.blobs.pin(blob_ids)
        return references

    def take(self) -> None:
        """The user consumes everything that is ready, and checks it."""
        for ready in self.call.take_ready():
            if isinstance(ready, ItemBatch):
                got = self.items.setdefault(ready.index, [])
                for value in split(ready.lengths, ready.payload):
                    number = int(bytes(value))
                    if number != len(got):
                        self.broken(f"item {number} came after {len(got)} items", ready.index)
                    got.append(number)
            else:
                self.consumed += ready.count
                self._take_outputs(ready)
            self.call.consume(ready)

    def take_outgoing(self) -> list[m.Message]:
        """What is to be sent. The books must agree with it."""
        outgoing, self.call.outgoing = self.call.outgoing, []
        for message in outgoing:
            if isinstance(message, m.Ack):
                self.told = message.consumed_count
                if self.told > self.consumed:
                    self.broken(f"{self.told} inputs are told as consumed of {self.consumed}")
            elif isinstance(message, m.Inputs):
                self._count_sent(message.start, len(message.lengths) // 4)
            elif isinstance(message, m.SubmitCall):
                self._count_sent(0, len(message.lengths) // 4)
        return outgoing

    def _count_sent(self, start: int, count: int) -> None:
        """More than the window may be in flight when it has shrunk, but then nothing is added."""
        fresh = start + count - self.sent
        if fresh <= 0:
            return
        self.sent += fresh
        in_flight = self.sent - self.told
        if in_flight > max(self.window, 1) and not self.call.is_durable:
            text = f"{in_flight} inputs in flight in a window of {self.window}"
            self.broken(text, start)

    def receive(self, message: m.Message) -> None:
        if isinstance(message, m.CallOpened | m.Window):
            self.window = message.window_count
        self.call.handle(message)

    def check_books(self) -> None:
        """An attached call that is over: all credit is back. A last `Ack` says what the state
        itself believes; it goes nowhere."""
        if self.is_cancelled or self.call.is_durable or self.failure is not None:
            return
        self.call.resume()
        self.call.handle(m.CallOpened(self.call.call_id, 1, 1, [(0, self.count)]))
        sent, self.call.outgoing = self.call.outgoing, []
        acks = [message for message in sent if isinstance(message, m.Ack)]
        counts = [ack.consumed_count for ack in acks]
        if set(counts) != {self.count}:
            self.broken(f"{counts} inputs were consumed at the end of {self.count}")
        if any(isinstance(message, m.Inputs) for message in sent):
            self.broken("inputs are kept of a call that is over")
        if self.call.in_flight != (0, 0):
            self.broken(f"{self.call.in_flight} of credit is not back at the end")

    def broken(self, text: str, index: int = -1) -> None:
        name = f"call {self.call.call_id.hex()[:6]} of {self.plan.name}"
        raise Broken(f"{name}: {text}", self.call.call_id, index)

    def _take_outputs(self, batch: Batch) -> None:
        values = split(batch.lengths, batch.payload) if not batch.is_repeated else []
        for position, status in enumerate(batch.statuses):
            index = batch.start + position
            self.seen[index] += 1
            self.order.append(index)
            if self.seen[index] != 1:
                self.broken(f"input {index} ended twice", index)
            if batch.is_repeated:
                self.failure = bytes(batch.payload)
                code = msgpack.unpackb(self.failure)[0] if status == m.Status.FAILURE else "error"
                if code not in self.causes():
                    self.broken(f"failed without cause: {self.failure!r}", index)
            else:
                self.check_output(index, status, bytes(values[position]))
                if status == m.Status.DONE:
                    total = msgpack.unpackb(values[position])
                    if len(self.items.get(index, [])) != total:
                        self.broken(f"generator {index} lost items", index)

    def check_output(self, index: int, status: int, value: bytes) -> None:
        """Whether an input may have ended like this, given what happened in containers."""
        key = self.call.call_id, index
        if status == m.Status.VALUE:
            if value != b"=%d" % index:
                self.broken(f"input {index} has the value of another", index)
        elif status == m.Status.FAILURE:
            code = msgpack.unpackb(value)[0]
            if code != "crash" or self.world.crashes[key] < CRASH_LIMIT:
                text = f"failed with {code!r} after {self.world.crashes[key]} crashes"
                self.broken(text, index)
        elif status == m.Status.ERROR:
            attempts = self.plan.options["retries"][0] + 1 if self.plan.is_flaky else 1 << 30
            if self.world.errors[key] < attempts:
                self.broken(f"failed at attempt {self.world.errors[key]} of {attempts}", index)
        elif status != m.Status.DONE:
            self.broken(f"input {index} ended with status {status}", index)

    def is_failed_whole(self, status: int, value: bytes) -> bool:
        """Whether this says of an input how its call ended as a whole."""
        codes = ("start", "cancelled", "store")
        return status == m.Status.FAILURE and msgpack.unpackb(value)[0] in codes

    def causes(self) -> set[str]:
        """How a call may fail as a whole: containers that cannot start; a nested call also when the
        input that made it is run elsewhere; one with large values also when the disk is full."""
        causes = {"start"}
        if self.call.parent is not None:
            causes.add("cancelled")
        if self.plan.is_bulky and self.world.counts["blob refused by a full disk"]:
            causes.add("store")
        return causes

    @property
    def is_finished(self) -> bool:
        return self.is_cancelled or self.call.is_delivered


@dataclass
class Plan:
    """What a simulated function does."""

    name: str
    function_id: bytes
    options: dict[str, Any]
    input_s: float = 0.001
    error_rate: float = 0.0
    is_flaky: bool = False
    may_crash: bool = False
    #: All its inputs take the same time.
    is_steady: bool = False
    #: Items of each generator input.
    item_count: int = 0
    #: Large values go in and come out.
    is_bulky: bool = False
    #: Calls this plan from inside, with so many inputs.
    nested: Plan | None = None
    nested_count: int = 0


class SimLoop:
    """What `LastWords` needs of an event loop."""

    def __init__(self, world: World) -> None:
        self.world = world

    def call_later(self, delay_s: float, what: Callable[[], None]) -> SimLoop:
        handle = SimLoop(self.world)
        self.world.after(delay_s, lambda: None if handle.is_cancelled else what())
        return handle

    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class SimClient:
    """A client process: a session that reconnects, calls, a user who consumes."""

    role = "client"

    def __init__(self, world: World, number: int, plans: list[Plan]) -> None:
        self.world = world
        self.number = number
        self.session_id = number.to_bytes(16, "big")
        self.plans = plans
        self.link: Link | None = None
        #: Calls that are open, and those that are over.
        self.calls: dict[bytes, SimCall] = {}
        self.ended: dict[bytes, SimCall] = {}
        loop = cast(asyncio.AbstractEventLoop, SimLoop(world))
        self.last_words = LastWords(loop, self._send)
        self.blobs = ClientBlobs(world)
        self.is_gone = False
        self.is_paused = False
        #: It shows its user how calls get on.
        self.is_watching = world.random.random() < 0.5
        #: The last of those frames in this connection that it may say again.
        self.said: deque[Any] = deque(maxlen=8)
        self.connect()

    def connect(self) -> None:
        if self.is_gone or self.link is not None:
            return
        self.link = self.world.scheduler.accept(
            self.role, self.session_id, self.receive, self.on_lost
        )
        if self.link is None:
            self.world.after(0.1 + self.world.random.random(), self.connect)
            return
        self.said.clear()
        self.blobs.connected(self.link.up, self._blobs_changed)
        words = self.last_words.again()
        self.link.up(m.OpenApp(APP, "sim"))
        if self.is_watching:
            self.link.up(m.WatchProgress(True))
        for plan in self.plans:
            self.link.up(
                m.DefineFunction(plan.function_id, APP, plan.name, plan.options, [], b"code")
            )
        for message in words:
            self.link.up(message)
        for call in self.calls.values():
            call.call.resume()
        self.flush_all()

    def _send(self, message: m.Message) -> None:
        if self.link is not None:
            self.link.up(message)

    def on_lost(self) -> None:
        self.link = None
        self.blobs.disconnected()
        # A network may be away for a while, yet not for longer than the grace of a client.
        random = self.world.random
        longest_s = 20.0 if random.random() < 0.2 else 1.0
        self.world.after(0.05 + random.random() * longest_s, self.connect)

    def open(self, plan: Plan, count: int, is_ordered: bool, is_durable: bool) -> SimCall:
        call_id = self.world.random.randbytes(16)
        call = CallState(
            call_id,
            plan.function_id,
            is_ordered=is_ordered,
            is_durable=is_durable,
            is_generator=plan.item_count > 0,
        )
        sim = self.calls[call_id] = SimCall(call, plan, count, self.world, self.blobs)
        self.world.log(f"client {self.number} opens {call_id.hex()[:6]} {plan.name} x{count}")
        self.flush(sim)
        return sim

    def cancel(self, sim: SimCall) -> None:
        sim.is_cancelled = True
        sim.call.cancel()
        self.flush(sim)

    def receive(self, message: m.Message) -> None:
        if type(message) in m.BLOB_KINDS:
            if self.blobs.exchange is not None:
                self.blobs.exchange.handle(message)
            return
        if not isinstance(message, CALL_STATE_KINDS):
            return
        sim = self.calls.get(message.call_id)
        if sim is None:
            self.world.counts["late or odd: frame to a client about a call that is over"] += 1
            return
        self.blobs.add(message, message.call_id)
        self._take_frames(sim)

    def _take_frames(self, sim: SimCall) -> None:
        """Frames of a call that have all that they name."""
        for frame in self.blobs.take(sim.call.call_id):
            if isinstance(frame, m.Outputs):
                for at, blob_ids in frame.blobs:
                    for blob_id in blob_ids:
                        content = self.blobs.store.buffer(blob_id)
                        require_result(sim.call, frame.start + at, content)
                        self.world.counts["large result"] += 1
            sim.receive(frame)
        if not self.is_paused:
            self.flush(sim)

    def _blobs_changed(self) -> None:
        for call_id in list(self.blobs.parked):
            self.world.counts["frame that waited for its blobs"] += 1
            self._take_frames(self.calls[call_id])

    def flush_all(self) -> None:
        for sim in list(self.calls.values()):
            self.flush(sim)

    def flush(self, sim: SimCall) -> None:
        """Add, consume and send what can be; let go of the call when it is over."""
        if not sim.is_cancelled and not self.is_paused:
            sim.pump()
            sim.take()
        for message in sim.take_outgoing():
            if isinstance(message, m.CancelCall):
                self.last_words.keep(message)
            elif isinstance(message, REPEATED_KINDS):
                self.said.append(message)
            self.blobs.offer(message)
            self._send(message)
        self.blobs.unpin(sim.call.released_blobs)
        sim.call.released_blobs.clear()
        if sim.is_finished:
            self.blobs.forget(sim.call.call_id)
            self.world.counts["client: duplicate output or item"] += sim.call.duplicate_count
            sim.check_books()
            del self.calls[sim.call.call_id]
            if not sim.is_cancelled:
                self.ended[sim.call.call_id] = sim
            if sim.call.is_finished and not sim.call.is_durable:
                self.last_words.finish(sim.call.call_id, 0)

    def repeat(self) -> bool:
        """Say something again, of a call that is still open."""
        frames = [frame for frame in self.said if frame.call_id in self.calls]
        if self.link is None or not frames:
            return False
        self.link.up(self.world.random.choice(frames))
        return True

    def terminate(self, sim: SimCall) -> None:
        """Cancel a call, and have the containers killed that run it."""
        self._send(m.TerminateCall(sim.call.call_id))
        self.cancel(sim)

    def resume(self) -> None:
        self.is_paused = False
        self.flush_all()

    def go(self) -> None:
        """The client process dies."""
        self.is_gone = True
        if self.link is not None:
            self.link.cut("client died")
