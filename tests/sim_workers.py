"""Workers and containers of a simulated fanout; see `sim_world.py`.

The worker's state is the real module. What a container does is drawn from the seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgpack

from fanout.client.call_state import CallState
from fanout.config import WORKER_DEADLINE_S
from fanout.exceptions import StorageError
from fanout.protocol import messages as m
from fanout.protocol.blob_store import blob_id_of
from fanout.protocol.blobs import BlobExchange
from fanout_worker import worker_state as w
from tests import sim_blobs
from tests.sim_peers import CALL_STATE_KINDS, Plan, SimCall
from tests.sim_story import Broken
from tests.sim_world import APP, Link, World

#: How many inputs print something.
LOG_CHANCE = 0.02
#: A worker that was told that a lease is void has been so within this time.
FENCE_S = 5.0


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
        #: What came while it was stopped.
        self.backlog: deque[Callable[[], None]] = deque()
        self.state = w.WorkerState(
            world.random.randbytes(16), f"w{self.number}", self.cpu, 1 << 14, False
        )
        self.containers: dict[int, SimContainer] = {}
        self.is_full = False
        self.store = sim_blobs.DiskStore(self)
        self.exchange: BlobExchange | None = None
        #: Leases that it was told to stop.
        self.fenced: set[int] = set()
        self.link: Link | None = None
        #: Frames that wait behind a report which was not read yet.
        self.held: deque[m.Message] = deque()
        self.connect()
        self._beat(self.life)

    def fill_disk(self, seconds: float) -> None:
        """There is no room for blobs for a while."""
        self.is_full = True
        self.world.after(seconds, self.free_disk)

    def free_disk(self) -> None:
        self.is_full = False

    def harvest(self) -> None:
        """What this process counted as late or odd."""
        for name, count in self.state.oddities.items():
            self.world.counts["worker: " + name] += count
        self.state.oddities.clear()

    def kill(self) -> None:
        """SIGKILL, and with the daemon its containers."""
        self.harvest()
        self.is_dead = True
        self.life += 1
        running = [c for c in self.containers.values() if c.running is not None or c.live]
        circumstances = {
            "an unacknowledged report": self.state.unacknowledged_count > 0,
            "a generator": any(c.plan.item_count for c in running),
            "a nested call": any(c.nested is not None for c in running),
        }
        self.world.note_circumstances("worker killed", circumstances)
        self.containers.clear()
        if self.link is not None:
            self.link.is_open = False
            self.world.after(self.world.random.random() * 0.1, self.link.close_there)
            self.link = None
        self.world.after(0.2 + self.world.random.random() * 3, self.boot)

    def lose_idle_containers(self) -> None:
        """Some that run nothing die, perhaps just as they are told to leave."""
        for container in list(self.containers.values()):
            is_idle = container.running is None and not container.live and container.is_ready
            if is_idle and self.world.random.random() < 0.1:
                self.world.counts["idle container died"] += 1
                container.die()
        self.carry_out()

    def pause(self, seconds: float) -> None:
        """SIGSTOP of the daemon and its containers."""
        if seconds > WORKER_DEADLINE_S and any(self.state.leases):
            self.world.counts["worker stopped past its deadline with leases"] += 1
        self.paused_until = max(self.paused_until, self.world.now + seconds)

    def do(self, what: Callable[[], None]) -> None:
        """Run something of this process, when it runs at all; in the order in which it came."""
        if self.paused_until > self.world.now or self.backlog:
            self.backlog.append(what)
            if len(self.backlog) == 1:
                self.world.at(self.paused_until, self._in_this_life(self._catch_up))
            return
        what()

    def _catch_up(self) -> None:
        if self.paused_until > self.world.now:
            self.world.at(self.paused_until, self._in_this_life(self._catch_up))
            return
        backlog, self.backlog = self.backlog, deque()
        for what in backlog:
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
        self.exchange = self._exchange_of(self.link)
        self.state.connected()
        self.carry_out()
        for container in self.containers.values():
            container.reconnect_nested()

    def _exchange_of(self, link: Link) -> BlobExchange:
        def completed(blob_id: bytes) -> None:
            self.state.blob_completed(blob_id)
            self.carry_out()

        def delivered(blob_id: bytes) -> None:
            self.state.blob_delivered(blob_id)
            self.carry_out()

        def later(delay_s: float, what: Callable[[], None]) -> None:
            self.world.after(delay_s, self._in_this_life(lambda: self.do(what)))

        def failed(blob_id: bytes, error: StorageError) -> None:
            self.world.counts["blob refused by a worker's full disk"] += 1

        return BlobExchange(
            self.store,
            link.up,
            sim_blobs.bulk_sender(self.world, link.up),
            completed,
            later,
            failed=failed,
            delivered=delivered,
            trusts_peer=True,
        )

    def _take_blob_frame(self, message: m.Message) -> None:
        if isinstance(message, m.BlobOffer):
            # A removal that was decided just before must not hit what is now said to be here.
            self.carry_out()
        if self.exchange is not None:
            self.exchange.handle(message)
        if isinstance(message, m.BlobOffer) and self.store.has(message.blob_id):
            self.state.blob_completed(message.blob_id)

    def on_lost(self) -> None:
        self.link = None
        if self.exchange is not None:
            self.exchange.close()
            self.exchange = None
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
        elif type(message) in m.BLOB_KINDS:
            self._take_blob_frame(message)
        elif not isinstance(message, m.SessionClosed):
            if isinstance(message, m.WorkerAccepted):
                self._expect_fence()
            elif isinstance(message, m.CancelLease):
                self.fenced.add(message.lease_id)
            self.state.handle(message)
        self.carry_out()

    def _expect_fence(self) -> None:
        """The scheduler that has just accepted this worker knows which of its leases are void, and
        is to say so."""
        current = self.world.scheduler.core.state.leases
        void = {lease_id for lease_id in self.state.leases if lease_id not in current}
        self.world.counts["void lease of a worker that is back"] += len(void)
        link = self.link
        assert link is not None

        def check() -> None:
            is_quiet = max(link.stalled_until, link.unread_until) + FENCE_S < self.world.now
            if self.link is not link or link.is_half_open or not is_quiet:
                return
            for lease_id in void - self.fenced:
                lease = self.state.leases.get(lease_id)
                if lease is not None:
                    raise Broken("a void lease goes on", lease.call_id, lease.start + lease.done)

        self.world.after(FENCE_S, self._in_this_life(lambda: self.do(self._in_this_life(check))))

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
        if isinstance(command, w.OfferBlob):
            if self.exchange is not None:
                self.exchange.offer(command.blob_id)
            return
        if isinstance(command, w.RemoveBlob):
            self.store.drop(command.blob_id)
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

    def die(self) -> None:
        self._exit("crash", [])

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
        if self.world.random.random() < LOG_CHANCE:
            text = b"a line of text\n"
            log = m.ContainerLog(self.container_id, lease.call_id, index, m.Source.STDOUT, text)
            self.worker.state.log(log)
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
            factor = 1.0
            if not self.plan.is_steady:
                factor = random.random() * (400 if random.random() < 0.002 else 2)
            self._later(self.plan.input_s * factor, self._finish_value)

    def _crash(self) -> None:
        assert self.running is not None
        lease, index = self.running
        self.world.crashes[lease.call_id, index] += 1
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
            lease, index = self.running
            self.world.errors[lease.call_id, index] += 1
            self._report(m.Status.ERROR, b"error")
        elif self.plan.is_bulky:
            self._report_result(*self.running)
        else:
            self._report(m.Status.VALUE, b"=%d" % self.running[1])

    def _report_result(self, lease: m.Lease, index: int) -> None:
        """The blobs of the input are here, as they were sent; the result has one of its own."""
        store = self.worker.store
        for at, blob_ids in lease.blobs:
            if lease.start + at == index:
                content = sim_blobs.argument_of(lease.call_id, index)
                if [store.buffer(blob_id) for blob_id in blob_ids] != [content]:
                    raise Broken("an input has another argument", lease.call_id, index)
        content = sim_blobs.result_of(self.world, lease.call_id, index)
        blob_id = blob_id_of(content)
        store.put(blob_id, content)
        self._report(m.Status.VALUE, b"=%d" % index, [(0, [blob_id])])

    def ran(self, call_id: bytes, index: int, busy_s: float) -> None:
        """An input ran to its end. It may have done so before, elsewhere."""
        self.world.runs[call_id, index] += 1
        self.world.counts["input run to its end twice"] += self.world.runs[call_id, index] > 1
        self.world.busy_s[call_id] = self.world.busy_s.get(call_id, 0.0) + busy_s

    def _report(
        self, status: int, payload: bytes, blobs: Sequence[tuple[int, list[bytes]]] = ()
    ) -> None:
        assert self.running is not None
        lease, index = self.running
        if status in (m.Status.VALUE, m.Status.DONE):
            self.ran(lease.call_id, index, self.plan.input_s)
        self.running = None
        self.is_cancelling = False
        self._close_nested()
        self.worker.state.lease_outputs(
            lease.lease_id,
            index,
            int(self.plan.input_s * 1e6),
            len(payload).to_bytes(4, "little"),
            bytes([status]),
            list(blobs),
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
            self._babble(lease, index)
            self._give_items(lease, index, self.item, self.item + count)
            self.item += count
        if self.item >= total:
            self._report(m.Status.DONE, msgpack.packb(total))
            return
        self.waits = True
        self.world.counts["generator out of credit"] += 1
        self.worker.state.lease_waits(lease.lease_id, self.upto)

    def _give_items(self, lease: m.Lease, index: int, start: int, stop: int) -> None:
        values = [b"%d" % number for number in range(start, stop)]
        table = b"".join(len(v).to_bytes(4, "little") for v in values)
        self.worker.state.lease_items(lease.lease_id, index, start, table, [], b"".join(values))

    def _babble(self, lease: m.Lease, index: int) -> None:
        """Say items again, or some that are not their turn; nothing may come of it."""
        random = self.world.random
        if random.random() >= self.world.rates.get("container babbles", 0.0):
            return
        self.world.counts["container babbles"] += 1
        if self.item and random.random() < 0.5:
            self._give_items(lease, index, max(0, self.item - 3), self.item)
        else:
            self._give_items(lease, index, self.item + 2, self.item + 3)

    # --- nested calls ----------------------------------------------------------------------------

    def _call_nested(self, lease: m.Lease, index: int) -> None:
        plan = self.plan.nested
        assert plan is not None
        call = CallState(
            self.world.random.randbytes(16), plan.function_id, parent=(lease.lease_id, index)
        )
        self.nested = SimCall(call, plan, self.plan.nested_count, self.world)
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
        if isinstance(inner, CALL_STATE_KINDS) and inner.call_id == self.nested.call.call_id:
            self.nested.receive(inner)
        self._turn_nested()

    def _turn_nested(self) -> None:
        nested = self.nested
        if nested is None:
            return
        nested.pump()
        nested.take()
        for message in nested.take_outgoing():
            self._send_nested(message)
        if not nested.is_finished:
            self._send_nested(m.SessionWaits(self.wait_frames))
            return
        nested.check_books()
        self.world.counts["client: duplicate output or item"] += nested.call.duplicate_count
        self._later(self.plan.input_s, self._finish_value)
        self._close_nested()

    def _close_nested(self) -> None:
        if self.nested is not None:
            self.nested = None
            self.worker.send(m.SessionClosed(self.nested_session))
