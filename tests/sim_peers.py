"""Clients, workers and containers of a simulated fanout; see `sim_world.py`.

Their call and worker states are the real modules. What a container does is drawn from the seed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from fanout.client.call_state import CallState
from fanout.client.chunk import Batch, ItemBatch, split
from fanout.protocol import messages as m
from fanout_worker import worker_state as w
from tests.sim_world import APP, Link, World

# --- clients -------------------------------------------------------------------------------------


class SimCall:
    """One call of a client: the real state, and what its user saw."""

    def __init__(self, call: CallState, plan: Plan, count: int, owner: Any) -> None:
        self.call = call
        self.plan = plan
        self.count = count
        self.added = 0
        self.seen: Counter[int] = Counter()
        self.items: dict[int, list[int]] = {}
        self.order: list[int] = []
        self.is_cancelled = False
        self.failure: bytes | None = None
        self.is_told = False
        self.owner = owner

    def pump(self) -> None:
        """Add inputs as far as there is room."""
        while self.added < self.count:
            room, _ = self.call.room()
            if room <= 0:
                return
            count = min(room, self.count - self.added, self.owner.world.random.randint(1, 60))
            start = self.added
            self.call.add([b"%d" % i for i in range(start, start + count)])
            self.added += count
        self.call.seal()

    def take(self) -> None:
        """The user consumes everything that is ready, and checks it."""
        for ready in self.call.take_ready():
            if isinstance(ready, ItemBatch):
                got = self.items.setdefault(ready.index, [])
                for value in split(ready.lengths, ready.payload):
                    number = int(bytes(value))
                    assert number == len(got), f"item {number} after {len(got)} items"
                    got.append(number)
            else:
                self._take_outputs(ready)
            self.call.consume(ready)

    def _take_outputs(self, batch: Batch) -> None:
        values = split(batch.lengths, batch.payload) if not batch.is_repeated else []
        for position, status in enumerate(batch.statuses):
            index = batch.start + position
            self.seen[index] += 1
            self.order.append(index)
            assert self.seen[index] == 1, f"input {index} ended twice"
            if batch.is_repeated:
                self.failure = bytes(batch.payload)
                code = msgpack.unpackb(self.failure)[0] if status == m.Status.FAILURE else "error"
                assert code in self.causes(), f"a call failed without cause: {self.failure!r}"
            elif status == m.Status.VALUE:
                assert bytes(values[position]) == b"=%d" % index, "a value of another input"
            elif status == m.Status.DONE:
                total = msgpack.unpackb(values[position])
                assert len(self.items.get(index, [])) == total, f"generator {index} lost items"
            elif status == m.Status.FAILURE:
                code = msgpack.unpackb(values[position])[0]
                assert code == "crash", f"an input failed without cause: {code}"
                assert self.plan.may_crash, "only what may crash does"
            else:
                assert self.plan.is_flaky, "an error of a function that raises none"

    def causes(self) -> set[str]:
        """How a call may fail as a whole: containers that cannot start; and a nested call also
        when the input that made it is run elsewhere."""
        return {"start"} if self.call.parent is None else {"start", "cancelled"}

    @property
    def is_finished(self) -> bool:
        return self.is_cancelled or (self.call.is_finished and not self.call.has_ready)


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
    #: Items of each generator input.
    item_count: int = 0
    #: Calls this plan from inside, with so many inputs.
    nested: Plan | None = None
    nested_count: int = 0


class SimClient:
    """A client process: a session that reconnects, calls, a user who consumes."""

    role = "client"

    def __init__(self, world: World, number: int, plans: list[Plan]) -> None:
        self.world = world
        self.number = number
        self.session_id = number.to_bytes(16, "big")
        self.plans = plans
        self.link: Link | None = None
        self.calls: dict[bytes, SimCall] = {}
        self.is_gone = False
        self.is_paused = False
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
        self.link.up(m.OpenApp(APP, "sim"))
        for plan in self.plans:
            self.link.up(
                m.DefineFunction(plan.function_id, APP, plan.name, plan.options, [], b"code")
            )
        for call in self.calls.values():
            if not call.is_finished:
                call.call.resume()
            else:
                call.is_told = False
        self.flush()

    def on_lost(self) -> None:
        self.link = None
        self.world.after(0.05 + self.world.random.random(), self.connect)

    def open(self, plan: Plan, count: int, is_ordered: bool, is_durable: bool) -> SimCall:
        call_id = self.world.random.randbytes(16)
        call = CallState(
            call_id,
            plan.function_id,
            is_ordered=is_ordered,
            is_durable=is_durable,
            is_generator=plan.item_count > 0,
        )
        sim = self.calls[call_id] = SimCall(call, plan, count, self)
        self.world.log(f"client {self.number} opens {call_id.hex()[:6]} {plan.name} x{count}")
        self.flush()
        return sim

    def cancel(self, sim: SimCall) -> None:
        sim.is_cancelled = True
        sim.call.cancel()
        self.flush()

    def receive(self, message: m.Message) -> None:
        call_id = getattr(message, "call_id", None)
        sim = self.calls.get(call_id) if call_id is not None else None
        if sim is not None and not sim.is_cancelled:
            sim.call.handle(message)
        if not self.is_paused:
            self.flush()

    def flush(self) -> None:
        for sim in self.calls.values():
            if not sim.is_cancelled and not self.is_paused:
                sim.pump()
                sim.take()
            outgoing, sim.call.outgoing = sim.call.outgoing, []
            if self.link is not None:
                for message in outgoing:
                    self.link.up(message)
                if sim.is_finished and not (sim.is_told or sim.is_cancelled):
                    sim.is_told = True
                    if not sim.call.is_durable:
                        self.link.up(m.CallsFinished([sim.call.call_id]))
        finished = [k for k, sim in self.calls.items() if sim.is_finished and sim.is_cancelled]
        for key in finished:
            del self.calls[key]

    def resume(self) -> None:
        self.is_paused = False
        self.flush()

    def go(self) -> None:
        """The client process dies."""
        self.is_gone = True
        if self.link is not None:
            self.link.cut("client died")


# --- workers -------------------------------------------------------------------------------------


class SimWorker:
    """A worker daemon: the real state, and containers that are played."""

    def __init__(self, world: World, number: int, cpu: float, plans: dict[bytes, Plan]) -> None:
        self.world = world
        self.plans = plans
        self.number = number
        self.cpu = cpu
        self.life = 0
        self.is_dead = True
        self.boot()

    def boot(self) -> None:
        """A new process: nothing of the former one is left."""
        world = self.world
        self.life += 1
        self.is_dead = False
        self.paused_until = 0.0
        self.state = w.WorkerState(
            world.random.randbytes(16), f"w{self.number}", self.cpu, 1 << 14, False
        )
        self.containers: dict[int, SimContainer] = {}
        self.link: Link | None = None
        #: Frames that wait behind a report which was not read yet.
        self.held: deque[m.Message] = deque()
        self.connect()
        self._beat(self.life)

    def kill(self) -> None:
        """SIGKILL, and with the daemon its containers."""
        self.is_dead = True
        self.life += 1
        self.containers.clear()
        if self.link is not None:
            self.link.is_open = False
            self.world.after(self.world.random.random() * 0.1, self.link.close_there)
            self.link = None
        self.world.after(0.2 + self.world.random.random() * 3, self.boot)

    def pause(self, seconds: float) -> None:
        """SIGSTOP of the daemon and its containers."""
        self.paused_until = self.world.now + seconds

    def do(self, what: Callable[[], None]) -> None:
        """Run something of this process, when it runs at all."""
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until, self._in_this_life(lambda: self.do(what)))
            return
        what()

    def _in_this_life(self, what: Callable[[], None]) -> Callable[[], None]:
        """Nothing of a former process happens in the next one."""
        life = self.life

        def then() -> None:
            if life == self.life:
                what()

        return then

    def connect(self) -> None:
        if self.is_dead or self.link is not None:
            return
        lost = self._in_this_life(self.on_lost)
        life = self.life

        def receive(message: m.Message) -> None:
            if life == self.life:
                self.do(self._in_this_life(lambda: self.receive(message)))

        self.link = self.world.scheduler.accept(
            "worker", self.state.worker_id, receive, lambda: self.do(lost)
        )
        if self.link is None:
            self.world.after(0.1 + self.world.random.random(), self.connect)
            return
        self.held.clear()
        self.state.connected(self.world.disk.epoch)
        self.carry_out()
        for container in self.containers.values():
            container.reconnect_nested()

    def on_lost(self) -> None:
        self.link = None
        self.state.disconnected()
        self.carry_out()
        self.world.after(0.1 + self.world.random.random(), self.connect)

    def _beat(self, life: int) -> None:
        if life != self.life:
            return
        if self.link is not None and self.paused_until <= self.world.now:
            self.link.up(m.Heartbeat(1))
        self.world.after(3.0, lambda: self._beat(life))

    def send(self, message: m.Message) -> None:
        if self.link is not None:
            self.link.up(message)

    def _send_behind_clients(self, message: m.Message) -> None:
        """What a container wrote into its memory is read a moment later than what its client says
        on its socket, so the latter may overtake it."""
        is_slow = isinstance(message, m.LeaseOutputs) and self.world.random.random() < 0.2
        if not self.held and not is_slow:
            self.send(message)
            return
        self.held.append(message)
        if len(self.held) > 1:
            return
        self.world.counts["report that a nested call may overtake"] += 1
        link = self.link

        def release() -> None:
            if self.link is link:
                while self.held:
                    self.send(self.held.popleft())

        delay_s = self.world.random.random() * 0.003
        self.world.after(delay_s, self._in_this_life(lambda: self.do(self._in_this_life(release))))

    def receive(self, message: m.Message) -> None:
        if isinstance(message, m.Relay):
            for container in list(self.containers.values()):
                container.relay(message)
        elif not isinstance(message, m.SessionClosed):
            self.state.handle(message)
        self.carry_out()

    def carry_out(self) -> None:
        # Carrying out one may cause more.
        while commands := self.state.take_commands():
            for command in commands:
                self._carry_out(command)

    def _start(self, container_id: int, function_id: bytes) -> None:
        # The other kind is derived from the one in this file.
        from tests.sim_concurrent import SimConcurrentContainer

        is_concurrent = "max_inputs" in self.plans[function_id].options
        kind = SimConcurrentContainer if is_concurrent else SimContainer
        kind(self, container_id, function_id)

    def _carry_out(self, command: w.Command) -> None:
        if isinstance(command, w.Send):
            self._send_behind_clients(command.message)
            return
        if isinstance(command, w.Start):
            self._start(command.container_id, command.definition.function_id)
            return
        container = self.containers.get(
            command.lease.container_id if isinstance(command, w.GiveLease) else command.container_id  # type: ignore[union-attr]
        )
        if container is None:
            return  # it left while the order was on its way through the daemon
        if isinstance(command, w.GiveLease):
            container.give(command.lease)
        elif isinstance(command, w.LowerLimit):
            container.lower(command)
        elif isinstance(command, w.GiveCredit):
            container.credit(command)
        elif isinstance(command, w.Stop):
            container.stop(command.kill)


class SimContainer:
    """A process that runs inputs one after another; what it does is drawn from the seed."""

    def __init__(self, worker: SimWorker, container_id: int, function_id: bytes) -> None:
        self.worker = worker
        self.world = worker.world
        self.container_id = container_id
        self.plan = worker.plans[function_id]
        self.queue: deque[m.Lease] = deque()
        self.stops: dict[int, int] = {}
        self.running: tuple[m.Lease, int] | None = None
        #: What runs in a container for several inputs at a time; see sim_concurrent.py.
        self.live: dict[tuple[int, int], m.Lease] = {}
        self.is_stopping = self.is_ready = self.is_gone = False
        self.is_cancelling = False
        self.upto = 0
        self.item = 0
        self.waits = False
        self.nested: SimCall | None = None
        self.nested_session = b""
        self.was_connected = False
        self.wait_frames = 0
        worker.containers[container_id] = self
        self._later(0.02 + self.world.random.random() * 0.1, self._started)

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        life = self.worker.life

        def then() -> None:
            if life == self.worker.life and not self.is_gone:
                self.worker.do(self._unless_gone(what))

        self.world.after(delay_s, then)

    def _unless_gone(self, what: Callable[[], None]) -> Callable[[], None]:
        life = self.worker.life

        def then() -> None:
            if life == self.worker.life and not self.is_gone:
                what()
                self.worker.carry_out()

        return then

    def _started(self) -> None:
        random = self.world.random
        if random.random() < self.world.rates.get("start failure", 0.0):
            self.world.counts["container that could not start"] += 1
            self._exit("start", [])
            return
        self.is_ready = True
        self.worker.state.container_started(self.container_id, 1, 0.05)
        self._next()

    def _exit(self, reason: str, running: list[tuple[int, int]]) -> None:
        self.is_gone = True
        self._close_nested()
        del self.worker.containers[self.container_id]
        self.worker.state.container_exited(self.container_id, reason, running, {"text": reason})

    # --- orders ----------------------------------------------------------------------------------

    def give(self, lease: m.Lease) -> None:
        self.queue.append(lease)
        self.stops[lease.lease_id] = lease.start + len(lease.lengths) // 4
        self._next()

    def lower(self, command: w.LowerLimit) -> None:
        stop = self.stops.get(command.lease_id)
        if stop is None:
            return
        begun = None
        if self.running is not None and self.running[0].lease_id == command.lease_id:
            begun = self.running[1] + 1
        lease = next(x for x in [*self.queue] if x.lease_id == command.lease_id)
        first = begun if begun is not None else lease.start + self._done(lease)
        stop = min(stop, first + command.keep)
        self.stops[command.lease_id] = stop
        if command.is_cancelled and begun is not None:
            self.is_cancelling = True
            self._later(self.world.random.random() * 0.2, self._cancelled)
        self.worker.state.lease_reclaimed(command.lease_id, stop)
        self._drop_ended()

    def _done(self, lease: m.Lease) -> int:
        held = self.worker.state.leases.get(lease.lease_id)
        return held.done if held is not None else len(lease.lengths) // 4

    def _drop_ended(self) -> None:
        """Leases of which nothing is left to run, and nothing runs, are over."""
        for lease in list(self.queue):
            runs = self.running is not None and self.running[0] is lease
            if not runs and lease.start + self._done(lease) >= self.stops[lease.lease_id]:
                self.queue.remove(lease)
                del self.stops[lease.lease_id]
        self._next()

    def credit(self, command: w.GiveCredit) -> None:
        if self.running is not None and self.running[0].lease_id == command.lease_id:
            self.upto = max(self.upto, command.upto)
            if self.waits:
                self.waits = False
                self._items()

    def stop(self, kill: bool) -> None:
        self.is_stopping = True
        if kill or self.running is None:
            self._exit("stopped", [])

    # --- running ---------------------------------------------------------------------------------

    def _next(self) -> None:
        if not self.is_ready or self.is_gone or self.running is not None:
            return
        if not self.queue:
            if self.is_stopping:
                self._exit("stopped", [])
            return
        lease = self.queue[0]
        index = lease.start + self._done(lease)
        if index >= self.stops[lease.lease_id]:
            self._drop_ended()
            return
        self.running = (lease, index)
        random, rates = self.world.random, self.world.rates
        self.world.counts["input begun"] += 1
        if self.plan.may_crash and random.random() < rates.get("container crash", 0.0):
            self.world.counts["container crashed"] += 1
            self._later(self.plan.input_s, self._crash)
        elif self.plan.item_count:
            self.item, self.upto = lease.skip, max(lease.credit, self.upto * 0)
            self._later(self.plan.input_s, self._items)
        elif self.plan.nested is not None:
            self._call_nested(lease, index)
        else:
            slow = 200 if random.random() < 0.002 else 1
            self._later(self.plan.input_s * slow * random.random() * 2, self._finish_value)

    def _crash(self) -> None:
        assert self.running is not None
        lease, index = self.running
        self._exit("crash", [(lease.lease_id, index)])

    def _cancelled(self) -> None:
        if self.running is not None and self.is_cancelling:
            payload = m.failure_payload("cancelled", "cancelled")
            self._report(m.Status.FAILURE, payload)

    def _finish_value(self) -> None:
        if self.running is None:
            return
        if self.world.random.random() < self.plan.error_rate:
            self.world.counts["user error"] += 1
            self._report(m.Status.ERROR, b"error")
        else:
            self._report(m.Status.VALUE, b"=%d" % self.running[1])

    def _report(self, status: int, payload: bytes) -> None:
        assert self.running is not None
        lease, index = self.running
        self.running = None
        self.is_cancelling = False
        self._close_nested()
        self.worker.state.lease_outputs(
            lease.lease_id,
            index,
            int(self.plan.input_s * 1e6),
            len(payload).to_bytes(4, "little"),
            bytes([status]),
            [],
            payload,
        )
        self._drop_ended()

    def _items(self) -> None:
        """Give items as far as the credit goes."""
        if self.running is None or self.is_cancelling:
            return
        lease, index = self.running
        total = self.plan.item_count
        while self.item < min(self.upto, total):
            count = min(self.world.random.randint(1, 9), self.upto - self.item, total - self.item)
            values = [b"%d" % (self.item + i) for i in range(count)]
            table = b"".join(len(v).to_bytes(4, "little") for v in values)
            self.worker.state.lease_items(
                lease.lease_id, index, self.item, table, [], b"".join(values)
            )
            self.item += count
        if self.item >= total:
            self._report(m.Status.DONE, msgpack.packb(total))
            return
        self.waits = True
        self.world.counts["generator out of credit"] += 1
        self.worker.state.lease_waits(lease.lease_id, self.upto)

    # --- nested calls ----------------------------------------------------------------------------

    def _call_nested(self, lease: m.Lease, index: int) -> None:
        plan = self.plan.nested
        assert plan is not None
        call = CallState(
            self.world.random.randbytes(16), plan.function_id, parent=(lease.lease_id, index)
        )
        self.nested = SimCall(call, plan, self.plan.nested_count, self)
        self.nested_session = self.world.random.randbytes(16)
        self.was_connected = False
        self.world.counts["nested call"] += 1
        self.reconnect_nested()

    def reconnect_nested(self) -> None:
        if self.nested is None or self.worker.link is None:
            return
        if self.was_connected:
            self.nested.call.resume()
        self.was_connected = True
        self.wait_frames = 0
        self.worker.send(m.SessionOpened(self.nested_session, self.container_id))
        definition = self.nested.plan
        self._send_nested(
            m.DefineFunction(
                definition.function_id, APP, definition.name, definition.options, [], b"code"
            )
        )
        self._turn_nested()

    def _send_nested(self, message: m.Message) -> None:
        payload = bytes(getattr(message, "payload", b""))
        self.worker.send(m.Relay(self.nested_session, m.encode_header(message), payload))

    def relay(self, message: m.Relay) -> None:
        if self.nested is None or message.session_id != self.nested_session:
            return
        inner = m.decode(message.header, bytes(message.payload))
        self.wait_frames += type(inner) in m.ENDS_WAIT
        if getattr(inner, "call_id", None) == self.nested.call.call_id:
            self.nested.call.handle(inner)
        self._turn_nested()

    def _turn_nested(self) -> None:
        nested = self.nested
        if nested is None:
            return
        nested.pump()
        nested.take()
        outgoing, nested.call.outgoing = nested.call.outgoing, []
        for message in outgoing:
            self._send_nested(message)
        if not nested.is_finished:
            self._send_nested(m.SessionWaits(self.wait_frames))
            return
        self._later(self.plan.input_s, self._finish_value)
        self._close_nested()

    def _close_nested(self) -> None:
        if self.nested is not None:
            self.nested = None
            self.worker.send(m.SessionClosed(self.nested_session))
