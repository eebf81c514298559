"""A whole fanout in one thread: the cores that ship, on a virtual network, clock and disk.

Scheduler core, worker state and call state are the real modules; only processes, user functions,
sockets and the disk are played, by this file, from one seeded generator. Frames are encoded and
decoded on every hop. TCP does not lose single frames, so the network's faults are those that
exist: delay, stall, cut and reconnect, half-open. See `simulation.py` for the faults and checks.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from fanout.exceptions import StorageError
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout.protocol.blobs import BlobExchange
from fanout_scheduler.blobs import BlobKeeper
from fanout_scheduler.core.core import Scheduler
from fanout_scheduler.core.events import (
    BlobCompleted,
    BlobRefused,
    Disconnect,
    DropBlob,
    Exit,
    ForgetObject,
    ForgetRecord,
    FrameReceived,
    PeerConnected,
    PeerId,
    PeerLost,
    PeerWritable,
    Record,
    Send,
    SendBlob,
    Store,
    Stored,
    StoreFailed,
    TimePassed,
    WithdrawBlob,
)
from fanout_scheduler.core.object_state import OBJECT_RECORDS, record_key
from tests.sim_blobs import DiskStore, bulk_sender
from tests.sim_promises import Promises
from tests.sim_story import Broken, Story

if TYPE_CHECKING:
    from tests.sim_workers import SimWorker

#: A quiet world is looked for once in so many events.
DONE_EVERY = 32
#: A world with more is going round in circles.
EVENTS_MAX = 1_000_000

APP = b"A" * 16
Receive = Callable[[m.Message], None]


class World:
    """The clock and what is to happen; everything else hangs on it."""

    def __init__(self, seed: int, is_told: bool = False) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 1000.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = 0
        self.event_count = 0
        self.counts: Counter[str] = Counter()
        self.story = Story(is_told)
        self.disk = Disk()
        self.promises = Promises(self)
        self.scheduler = SimScheduler(self)
        #: Who is here.
        self.workers: list[SimWorker] = []
        #: What containers did, by call and index: runs to the end, user errors, crashes.
        self.runs: Counter[tuple[bytes, int]] = Counter()
        self.errors: Counter[tuple[bytes, int]] = Counter()
        self.crashes: Counter[tuple[bytes, int]] = Counter()
        #: Seconds that containers gave to calls.
        self.busy_s: dict[bytes, float] = {}
        #: Faults and chances by name; the storm draws them.
        self.rates: dict[str, float] = {}
        self.delay_s = self.random.choice([0.0001, 0.001, 0.02, 0.1])
        #: All invariants are checked once in so many turns, and in the next one after each fault.
        self.check_every = self.random.choice([1, 5, 20, 20, 80, 80, 80, 80])
        self.check_due = self.check_every

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.heap, (max(when, self.now), self.order, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        self.at(self.now + delay_s, what)

    def note_circumstances(self, fault: str, circumstances: dict[str, bool]) -> None:
        """Count what a fault struck in the midst of."""
        for name, is_so in circumstances.items():
            if is_so:
                self.counts[f"{fault} amid {name}"] += 1

    def restart_scheduler(self) -> None:
        """SIGKILL of the scheduler; the storm says when it comes back."""
        raise NotImplementedError

    def run_until(self, when: float, is_done: Callable[[], bool] = lambda: False) -> None:
        heap, pop = self.heap, heapq.heappop
        since_look = 0
        while heap and heap[0][0] <= when:
            if since_look == 0:
                if is_done():
                    return
                if self.event_count > EVENTS_MAX:
                    raise Broken("there is no end to what happens")
                since_look = DONE_EVERY
            since_look -= 1
            self.event_count += 1
            self.now, _, what = pop(heap)
            what()
        if not is_done():
            self.now = max(self.now, when)

    def log(self, text: str) -> None:
        self.story.say(self.now, text)


def copy(message: m.Message) -> m.Message:
    """What the other side decodes."""
    payload = getattr(message, "payload", b"")
    return m.decode(m.encode_header(message), bytes(payload))


@dataclass
class Disk:
    """What is fsynced survives the scheduler; what is not, does not."""

    records: list[Record] = field(default_factory=list)
    #: What of each call is on it, for whoever checks promises.
    inputs: dict[bytes, IntervalSet] = field(default_factory=dict)
    outputs: dict[bytes, IntervalSet] = field(default_factory=dict)
    opened: set[bytes] = field(default_factory=set)
    sealed: set[bytes] = field(default_factory=set)
    #: Those of queues and dicts, by object and key, in the order in which they were written.
    object_records: dict[tuple[bytes, bytes], Record] = field(default_factory=dict)
    is_full: bool = False
    epoch: int = 0

    def __post_init__(self) -> None:
        self.blobs = DiskStore(self)

    def write(self, record: Record) -> None:
        kept = copy(record) if isinstance(record, m.Message) else record
        if isinstance(record, ForgetObject):
            for key in [key for key in self.object_records if key[0] == record.object_id]:
                del self.object_records[key]
        elif isinstance(record, ForgetRecord):
            self.object_records.pop((record.object_id, record.key), None)
        elif isinstance(record, OBJECT_RECORDS):
            key = record.object_id, record_key(record)
            self.object_records.pop(key, None)
            self.object_records[key] = kept  # type: ignore[assignment]
        else:
            self.records.append(kept)  # type: ignore[arg-type]
            self._note(kept)

    def _note(self, record: Record | m.Message) -> None:
        if isinstance(record, m.Inputs):
            stop = record.start + len(record.lengths) // 4
            self.inputs.setdefault(record.call_id, IntervalSet()).add(record.start, stop)
        elif isinstance(record, m.Outputs):
            stop = record.start + len(record.statuses)
            self.outputs.setdefault(record.call_id, IntervalSet()).add(record.start, stop)
        elif isinstance(record, m.OpenCall):
            self.opened.add(record.call_id)
        elif isinstance(record, m.SealCall):
            self.sealed.add(record.call_id)


class Link:
    """One connection to the scheduler, as both ends see it. Bytes arrive in order or not at all."""

    def __init__(
        self, world: World, name: str, peer_id: PeerId, receive: Receive, lost: Callable[[], None]
    ) -> None:
        self.world = world
        self.name = name
        self.peer_id = peer_id
        self.receive = receive
        self.lost = lost
        self.is_open = True
        #: The scheduler's end; it may live on for a while when the other is gone.
        self.is_open_there = True
        self.is_half_open = False
        self.stalled_until = 0.0
        #: The peer does not read for so long.
        self.unread_until = 0.0
        self.last_up = self.last_down = world.now
        #: The blobs at the scheduler's end.
        self.exchange: BlobExchange = world.scheduler.exchange_of(self)

    def _arrival(self, last: float, free_at: float) -> float:
        world = self.world
        base = max(world.now, free_at)
        return max(last, base + world.random.expovariate(1.0) * world.delay_s)

    def read_slowly(self, seconds: float) -> None:
        """What the scheduler sends is not read for a while; its send buffer fills, and it knows."""
        self.unread_until = self.world.now + seconds
        scheduler = self.world.scheduler
        scheduler.tell(PeerWritable(self.peer_id, False))
        self.world.after(seconds, lambda: scheduler.tell(PeerWritable(self.peer_id, True)))

    def up(self, message: m.Message) -> None:
        """From the peer to the scheduler."""
        if not self.is_open or self.is_half_open:
            return
        self.last_up = self._arrival(self.last_up, self.stalled_until)
        frame = copy(message)
        self.world.at(self.last_up, lambda: self._arrive_up(frame))

    def _arrive_up(self, frame: m.Message) -> None:
        if self.is_open_there:
            self.world.story.frame(self.world.now, self.name, "->", frame)
            self.world.scheduler.tell(FrameReceived(self.peer_id, frame))

    def down(self, message: m.Message) -> None:
        if not self.is_open_there or self.is_half_open:
            return
        self.last_down = self._arrival(self.last_down, max(self.stalled_until, self.unread_until))
        frame = copy(message)
        self.world.at(self.last_down, lambda: self._arrive_down(frame))

    def _arrive_down(self, frame: m.Message) -> None:
        if self.is_open:
            self.world.story.frame(self.world.now, self.name, "<-", frame)
            self.receive(frame)

    def cut(self, why: str) -> None:
        """Both ends notice, each when it does; what was on the wire is gone."""
        world = self.world
        world.log(f"link {self.peer_id} cut: {why}")
        world.after(world.random.random() * 0.2, self.close_here)
        world.after(world.random.random() * 0.2, self.close_there)
        self.is_half_open = True

    def close_here(self) -> None:
        if self.is_open:
            self.is_open = False
            self.lost()

    def close_there(self) -> None:
        if self.is_open_there:
            self.end_there()
            self.world.scheduler.links.pop(self.peer_id, None)
            self.world.scheduler.tell(PeerLost(self.peer_id, "cut"))

    def end_there(self) -> None:
        """The scheduler's end is gone."""
        self.is_open_there = False
        self.exchange.close()


class SimScheduler:
    """The shell round the real core: turns, links, the store, restarts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.links: dict[PeerId, Any] = {}
        self.peer_count = 0
        self.is_up = False
        self.life = 0
        self.core = Scheduler(0)

    def start(self) -> None:
        disk = self.world.disk
        disk.epoch += 1
        self.life += 1
        self.core = Scheduler(disk.epoch)
        self.keeper = BlobKeeper(disk.blobs)
        records = [*disk.records, *disk.object_records.values()]
        self.core.restore(records, self.world.now, 0.0, self.keeper.sizes())
        self.keeper.clean(self.core.state.present_blobs)
        self.core.check()
        self.world.promises.on_new_life(self.core)
        self.turn_count = 0
        self.inbox: list[Any] = []
        #: What the core is told in this turn.
        self.events: list[Any] = []
        self.has_turn = False
        self.stopped_until = 0.0
        self.clock_offset = 0.0
        self.stores: deque[Store] = deque()
        self.is_writing = False
        self.is_up = True
        self._turn_soon(0.0)

    def kill(self) -> None:
        """SIGKILL: memory is gone, also stores that were not on disk."""
        self.is_up = False
        self.harvest()
        world = self.world
        state = self.core.state
        circumstances = {
            "a write": bool(state.pending_stores),
            "a retry backing off": any(call.backing_off for call in state.calls.values()),
            "a generator": any(lease.call.method.is_generator for lease in state.leases.values()),
            "a nested call": any(call.depth for call in state.calls.values()),
            "a lost client in its grace": any(s.peer_id is None for s in state.sessions.values()),
        }
        world.note_circumstances("scheduler killed", circumstances)
        links, self.links = self.links, {}
        for link in links.values():
            link.end_there()
            self.world.after(self.world.random.random() * 0.05, link.close_here)

    def harvest(self) -> None:
        """What this life of the scheduler counted as late or odd."""
        for name, count in self.core.state.counts.items():
            self.world.counts["scheduler: " + name] += count
        self.core.state.counts.clear()

    def stop(self, seconds: float) -> None:
        """SIGSTOP for a while: nothing is read, and the gap is not held against anybody."""
        self.stopped_until = self.world.now + seconds

    def accept(self, role: str, session_id: bytes, receive: Receive, lost: Any) -> Link | None:
        if not self.is_up:
            return None
        self.peer_count += 1
        name = f"{role} {self.peer_count}"
        link = Link(self.world, name, PeerId(self.peer_count), receive, lost)
        self.links[link.peer_id] = link
        self.tell(PeerConnected(link.peer_id, role, session_id, {}))
        return link

    def accept_nested(self, worker_link: Link, session_id: bytes, container_id: int) -> PeerId:
        self.peer_count += 1
        peer_id = PeerId(self.peer_count)
        self.links[peer_id] = NestedLink(worker_link, peer_id, session_id)
        info = {"worker": worker_link.peer_id, "container_id": container_id}
        self.tell(PeerConnected(peer_id, "nested", session_id, info))
        return peer_id

    def tell(self, event: Any) -> None:
        if not self.is_up:
            return
        if isinstance(event, FrameReceived) and self._unwrap(event):
            return
        self.inbox.append(event)
        self._turn_soon(0.0)

    def _unwrap(self, event: FrameReceived) -> bool:
        """Frames of nested clients come inside their worker's."""
        message = event.message
        link = self.links.get(event.peer_id)
        if link is None or isinstance(link, NestedLink):
            return False
        nested = link.__dict__.setdefault("nested", {})
        if isinstance(message, m.SessionOpened):
            nested[message.session_id] = self.accept_nested(
                link, message.session_id, message.container_id
            )
            return True
        if isinstance(message, m.SessionClosed):
            peer_id = nested.pop(message.session_id, None)
            if peer_id is not None:
                self.links.pop(peer_id, None)
                self.tell(PeerLost(peer_id, "closed"))
            return True
        if isinstance(message, m.Relay):
            peer_id = nested.get(message.session_id)
            if peer_id is not None:
                inner = m.decode(message.header, bytes(message.payload))
                self.inbox.append(FrameReceived(peer_id, inner))
                self._turn_soon(0.0)
            return True
        return False

    def _turn_soon(self, delay_s: float) -> None:
        if self.has_turn:
            return
        self.has_turn = True
        life = self.life
        random = self.world.random
        when = max(self.world.now + delay_s + random.random() * 0.0005, self.stopped_until)
        self.world.at(when, lambda: self._turn(life))

    def _turn(self, life: int) -> None:
        if life != self.life or not self.is_up:
            return
        self.has_turn = False
        world = self.world
        if self.stopped_until > world.now:
            self._turn_soon(0.0)
            return
        if self.stopped_until:
            self.clock_offset += max(0.0, self.gap_s)
            self.stopped_until = self.gap_s = 0.0
        now = world.now - self.clock_offset
        inbox, self.inbox = self.inbox, []
        core, promises = self.core, world.promises
        self.events = []
        for event in inbox:
            if type(event) is FrameReceived and type(event.message) in m.BLOB_KINDS:
                self._take_blob_frame(event, now)
            else:
                self.events.append(event)
        for event in [*self._revived(), *self.events]:
            promises.before(event, now)
            core.handle(event, now)
        deadline = self.core.next_deadline()
        if deadline is not None and deadline <= now:
            core.handle(TimePassed(), now)
        commands = core.decide(now)
        self.turn_count += 1
        if self.turn_count >= world.check_due:
            self.turn_count = 0
            world.check_due = world.check_every
            core.check()
            promises.on_decided(core.state)
        for command in commands:
            promises.on_command(command, now)
            self._carry_out(command, now)
        for event in self._revived():
            self.tell(event)
        self.keeper.expire(now)
        deadline = self.core.next_deadline()
        if deadline is not None:
            self._wake_at(deadline + self.clock_offset)

    gap_s = 0.0
    wake_time = 0.0

    def _wake_at(self, when: float) -> None:
        world = self.world
        if world.now < self.wake_time <= when:
            return
        self.wake_time = when
        life = self.life

        def wake() -> None:
            if life == self.life and self.wake_time == when:
                self._turn_soon(0.0)

        world.at(when, wake)

    def _carry_out(self, command: Any, now: float) -> None:
        if isinstance(command, Send):
            link = self.links.get(command.peer_id)
            if link is not None:
                link.down(command.message)
        elif isinstance(command, SendBlob):
            link = self.links.get(command.peer_id)
            if link is not None:
                link.exchange.offer(command.blob_id)
        elif isinstance(command, WithdrawBlob):
            link = self.links.get(command.peer_id)
            if link is not None:
                link.exchange.withdraw(command.blob_id)
        elif isinstance(command, DropBlob):
            self.keeper.drop(command.blob_id, now)
        elif isinstance(command, Store):
            self.stores.append(command)
            self._write()
        elif isinstance(command, Disconnect):
            link = self.links.pop(command.peer_id, None)
            if link is not None:
                link.end_there()
                self.world.after(self.world.delay_s, link.close_here)
        else:
            assert not isinstance(command, Exit), "nobody asked it to leave"

    # --- blobs -----------------------------------------------------------------------------------

    def exchange_of(self, link: Link) -> BlobExchange:
        """The blobs of one connection, to and from the disk."""
        world, store = self.world, self.world.disk.blobs

        def completed(blob_id: bytes) -> None:
            self.keeper.keep(blob_id)
            self.events.append(BlobCompleted(blob_id, store.size(blob_id), link.peer_id))

        def failed(blob_id: bytes, error: StorageError) -> None:
            world.counts["blob refused by a full disk"] += 1
            self.events.append(BlobRefused(blob_id, str(error)))

        def doubted(blob_id: bytes) -> None:
            raise Broken(f"blob {blob_id.hex()} arrived with another content")

        return BlobExchange(
            store,
            link.down,
            bulk_sender(world, link.down),
            completed,
            world.after,
            is_needed=lambda blob_id: self.core.has_blob(blob_id),
            failed=failed,
            doubted=doubted,
        )

    def _take_blob_frame(self, event: FrameReceived, now: float) -> None:
        link = self.links.get(event.peer_id)
        if link is None:
            return
        if isinstance(event.message, m.BlobOffer):
            self.keeper.keep_offered(event.message.blob_id, now)
        link.exchange.handle(event.message)
        if isinstance(event.message, m.BlobOffer) and link.name.startswith("worker"):
            blob_id = event.message.blob_id
            if self.keeper.store.has(blob_id):
                self.keeper.keep(blob_id)
                size = self.keeper.store.size(blob_id)
                self.events.append(BlobCompleted(blob_id, size, link.peer_id))

    def _revived(self) -> list[BlobCompleted]:
        """The news of dropped blobs that the frames of this turn name; they are kept again."""
        revived = []
        for event in self.events:
            if type(event) is FrameReceived:
                revived += self.keeper.revive(event.message)
        self.world.counts["dropped blob named again"] += len(revived)
        return [BlobCompleted(blob_id, self.keeper.store.size(blob_id)) for blob_id in revived]

    # --- the disk --------------------------------------------------------------------------------

    def _write(self) -> None:
        if self.is_writing or not self.stores:
            return
        self.is_writing = True
        life = self.life
        batch = list(self.stores)
        self.stores.clear()
        self.world.after(self.world.random.random() * 0.005, lambda: self._written(life, batch))

    def _written(self, life: int, batch: list[Store]) -> None:
        """A commit. The scheduler may die before it learns of it."""
        world = self.world
        if life != self.life or not self.is_up:
            return
        self.is_writing = False
        last = 0
        for store in batch:
            if world.disk.is_full:
                world.counts["write refused by a full disk"] += 1
                self.tell(StoreFailed(store.sequence, "database or disk is full"))
                continue
            for record in store.records:
                world.disk.write(record)
            last = store.sequence
        if last and world.random.random() < world.rates.get("kill at commit", 0.0):
            world.counts["scheduler killed between commit and acknowledgement"] += 1
            world.restart_scheduler()
            return
        if last and self.links and world.random.random() < world.rates.get("cut at commit", 0.0):
            world.counts["link cut between commit and acknowledgement"] += 1
            link = world.random.choice(list(self.links.values()))
            getattr(link, "worker_link", link).cut("at a commit")
        if last:
            self.tell(Stored(last))
        self._write()


class NestedLink:
    """A nested client's frames, wrapped into those of its worker."""

    def __init__(self, worker_link: Link, peer_id: PeerId, session_id: bytes) -> None:
        self.worker_link = worker_link
        self.peer_id = peer_id
        self.session_id = session_id
        self.is_open_there = True

    def down(self, message: m.Message) -> None:
        payload = getattr(message, "payload", b"")
        header = m.encode_header(message)
        self.worker_link.down(m.Relay(self.session_id, header, bytes(payload)))

    def end_there(self) -> None:
        """The scheduler's end is gone."""
        self.is_open_there = False

    def close_here(self) -> None:
        """The worker's own link says it."""
