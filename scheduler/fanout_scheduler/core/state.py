"""What the scheduler knows: apps, functions, calls, leases, containers, workers, sessions.

Plain data with the few operations that keep one object consistent in itself. Rules that span
objects live in the modules beside this one; `check.py` states them as invariants.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from fanout.config import SCALEDOWN_WINDOW_S, SPAWNED_SIZE_BYTES_MAX, TIMEOUT_S, WINDOW_COUNT_MIN
from fanout.intervals import IntervalSet
from fanout.protocol import messages as m
from fanout_scheduler.core.capacity import NOT_FILED, Filed, FreeCores
from fanout_scheduler.core.chunk import Chunk
from fanout_scheduler.core.events import Command, PeerId, Send
from fanout_scheduler.core.kept import KeptOutputs
from fanout_scheduler.core.object_state import Objects


@dataclass(slots=True)
class App:
    app_id: bytes
    name: str
    #: The client sessions whose run this is, by id. It ends with the last of them.
    openers: dict[bytes, Session] = field(default_factory=dict)
    functions: dict[bytes, Function] = field(default_factory=dict)
    calls: dict[bytes, Call] = field(default_factory=dict)
    #: The run is over; the app goes when its spawned calls have ended.
    is_closing: bool = False
    is_stored: bool = False
    #: Blobs that its stored definitions name; kept until the store forgets the app.
    stored_blobs: list[bytes] = field(default_factory=list)
    #: How many of its calls are not over.
    open_count: int = 0


@dataclass(slots=True)
class Method:
    """What a call names: a function has one, without a name, and a class several, which share its
    containers."""

    name: str
    is_generator: bool
    #: Seconds an input takes, and bytes its output has: moving averages. None: not measured.
    input_s: float | None = None
    output_bytes: float = 0.0


@dataclass(slots=True)
class Function:
    """A definition (of a function, or of a class) with who runs it."""

    definition: m.DefineFunction
    app: App
    number: int
    cpu: float
    memory_mib: int
    max_containers: int | None
    min_containers: int
    buffer_containers: int
    scaledown_window_s: float
    timeout_s: float
    methods: dict[str, Method]
    #: Inputs that a container may have at a time, and how many it should have before another
    #: container is started. Both are 1 unless the function is concurrent or batched.
    slots: int
    #: Every input that a container has is begun at once, so it gets no more than it may run.
    is_concurrent: bool
    target: int
    is_batched: bool
    #: Each container runs one input and leaves.
    is_single_use: bool
    #: (max_retries, initial_delay_s, backoff_coefficient, max_delay_s) or None.
    retries: tuple[int, float, float, float] | None
    containers: dict[int, Container] = field(default_factory=dict)
    #: See capacity.py. Containers that have room for an input, by how many they have and by id;
    #: those that may have a second lease; leases of which a part could be taken back.
    rooms: dict[int, dict[int, Container]] = field(default_factory=dict)
    singles: dict[int, Container] = field(default_factory=dict)
    tails: dict[int, Lease] = field(default_factory=dict)
    #: Containers that are not leaving, and those of them that have a lease.
    living_count: int = 0
    busy_count: int = 0
    #: Its calls that are known, over or not.
    call_count: int = 0
    #: Calls that have inputs to lease, as a heap of (-depth, service time, number, call).
    ready: list[tuple[int, float, int, Call]] = field(default_factory=list)
    #: What the first of them waits for, "" if it had what it needs when that was looked at last.
    waits_for: str = ""
    #: Containers in a row that died before they were ready.
    start_failures: int = 0
    #: The last container could not start: none is started without an input that needs it.
    is_broken: bool = False
    is_stored: bool = False
    #: Blobs of its definition are still on their way.
    lacks_blobs: bool = False
    #: Since when there has been no room for its next input; see reservation.py.
    held_since: float | None = None
    #: When one of those who hold the places that it lacks was last seen to get on, and whether
    #: somebody was told that a generator of it runs twice; see eviction.py.
    moved_at: float = -math.inf
    is_eviction_told: bool = False
    #: Somebody was told that it mostly waits, and when it is looked at next; see advice.py.
    is_advised: bool = False
    advise_at: float = 0.0

    @property
    def function_id(self) -> bytes:
        return self.definition.function_id


def make_function(definition: m.DefineFunction, app: App, number: int) -> Function:
    """A function from the options of its definition; unknown options are left to containers."""
    options = definition.options
    retries = options.get("retries")
    cpu = options.get("cpu")
    batch = options.get("batch")
    batch_size = int(batch[0]) if batch else 1
    max_inputs = int(options.get("max_inputs") or 1)
    target_inputs = int(options.get("target_inputs") or max_inputs)
    return Function(
        definition=definition,
        app=app,
        number=number,
        cpu=1.0 if cpu is None else float(cpu),
        memory_mib=int(options.get("memory") or 0),
        max_containers=options.get("max_containers"),
        min_containers=int(options.get("min_containers") or 0),
        buffer_containers=int(options.get("buffer_containers") or 0),
        scaledown_window_s=float(options.get("scaledown_window", SCALEDOWN_WINDOW_S)),
        timeout_s=float(options.get("timeout") or TIMEOUT_S),
        methods=_methods_of(options),
        slots=max_inputs * batch_size,
        is_concurrent=max_inputs > 1 or batch is not None or bool(options.get("is_mixed")),
        target=target_inputs * batch_size,
        is_batched=batch is not None,
        is_single_use=bool(options.get("single_use")),
        retries=None if retries is None else (int(retries[0]), *map(float, retries[1:4])),  # type: ignore[arg-type]
    )


def _methods_of(options: dict[str, Any]) -> dict[str, Method]:
    methods = options.get("methods")
    if methods is None:
        return {"": Method("", bool(options.get("is_generator")))}
    return {name: Method(name, bool(shape["is_generator"])) for name, shape in methods.items()}


@dataclass(slots=True)
class GeneratorState:
    """The stream of one generator input: what is with the scheduler and what may come."""

    #: Items below this number have arrived here, in order.
    next_number: int = 0
    credit: int = 0
    #: `Items` frames that the client has not confirmed.
    unconfirmed: deque[m.Items] = field(default_factory=deque)


@dataclass(slots=True)
class Call:
    """One use of a function. Each received input is in exactly one of: `parked`, `queued`, a
    lease's `open`, `backing_off`, `finished`."""

    call_id: bytes
    function: Function
    number: int
    session: Session | None
    is_durable: bool
    parent: tuple[int, int] | None
    depth: int
    #: Containers that wait, directly or not, for this call.
    ancestors: tuple[Container, ...]
    method: Method
    #: Its outputs are consumed in the order of its inputs.
    is_ordered: bool = True
    #: Inputs received; of a durable call, only what is stored counts.
    received: IntervalSet = field(default_factory=IntervalSet)
    #: Received, and their blobs are not all here.
    parked: IntervalSet = field(default_factory=IntervalSet)
    queued: IntervalSet = field(default_factory=IntervalSet)
    backing_off: IntervalSet = field(default_factory=IntervalSet)
    #: Inputs that ran beside others when their container died. Each runs alone the next time, so
    #: that the one to blame is found.
    suspects: IntervalSet = field(default_factory=IntervalSet)
    #: Inputs whose output is here (of a durable call: stored), whether or not acknowledged.
    finished: IntervalSet = field(default_factory=IntervalSet)
    #: Outputs of a durable call that are on their way to disk.
    storing: IntervalSet = field(default_factory=IntervalSet)
    #: The same ranges in order, as (start, stop, first store sequence).
    output_stores: list[tuple[int, int, int]] = field(default_factory=list)
    leases: dict[int, Lease] = field(default_factory=dict)
    #: Leases that ended with their container or its worker, or to make room, and whose they were:
    #: what that worker reports late is still good. Nobody else can report under them.
    void: dict[int, bytes] = field(default_factory=dict)
    #: It may have begun in an earlier life of the scheduler, whose leases are not known any more.
    is_from_before: bool = False
    chunk_starts: list[int] = field(default_factory=list)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    #: Failed attempts and crashes of the inputs that had any.
    attempts: dict[int, int] = field(default_factory=dict)
    crashes: dict[int, int] = field(default_factory=dict)
    generators: dict[int, GeneratorState] = field(default_factory=dict)
    #: Outputs the client has not acknowledged; of a durable call all of them.
    outputs: KeptOutputs = field(default_factory=KeptOutputs)
    acknowledged: IntervalSet = field(default_factory=IntervalSet)
    sealed_count: int | None = None
    #: How the rest of the call ended, when it failed or was cancelled as a whole.
    failure: m.CallFailed | None = None
    #: Of a durable call: its failure may be told, as it is on disk, or the call was never promised.
    is_failure_kept: bool = False
    #: Writes of it that are under way.
    pending_count: int = 0
    #: What is done for it once blobs are here.
    blob_waits: set[BlobWait] = field(default_factory=set)
    is_over: bool = False
    is_cancelled: bool = False
    #: When a durable call ended, in seconds since 1970: its results expire from then on.
    ended_at: float | None = None
    consumed_count: int = 0
    consumed_bytes: int = 0
    output_bytes: int = 0
    #: Of `output_bytes`, those of outputs below the lowest unfinished input; and those above it, as
    #: a heap of (start, bytes).
    head_bytes: int = 0
    ahead: list[tuple[int, int]] = field(default_factory=list)
    leased_count: int = 0
    window_count: int = WINDOW_COUNT_MIN
    #: Container-seconds given to this call: what fairness compares.
    service_s: float = 0.0
    is_ready: bool = False
    waits_for: str = ""
    #: Since when all who hold the place it needs wait, maybe for it; see eviction.py.
    blocked_since: float | None = None
    #: Since when no worker could run it, and whether its client knows.
    stranded_since: float | None = None
    is_told: bool = False
    fetches: dict[tuple[PeerId, int], Fetch] = field(default_factory=dict)
    #: Its place in a call graph, if it has one.
    node: Node | None = None

    def add_chunk(self, chunk: Chunk) -> None:
        insort(self.chunk_starts, chunk.start)
        self.chunks[chunk.start] = chunk

    def chunk_of(self, index: int) -> Chunk:
        """The chunk that holds an input without output."""
        return self.chunks[self.chunk_starts[bisect_right(self.chunk_starts, index) - 1]]

    def settle(self, start: int, stop: int) -> list[Chunk]:
        """Inputs `start` to `stop` have their output: drop the chunks that are thereby done, and
        return these."""
        done: list[Chunk] = []
        while start < stop:
            chunk = self.chunk_of(start)
            end = min(stop, chunk.stop)
            chunk.open_count -= end - start
            if chunk.open_count == 0:
                del self.chunks[chunk.start]
                self.chunk_starts.remove(chunk.start)
                done.append(chunk)
            start = end
        return done

    @property
    def told_failure(self) -> m.CallFailed | None:
        """How it ended as a whole, as far as that may be told."""
        return self.failure if self.is_failure_kept or not self.is_durable else None

    @property
    def unconsumed_bytes(self) -> int:
        return self.output_bytes - self.consumed_bytes

    @property
    def lowest_unfinished(self) -> int:
        """The lowest input without an output, of those that were received or the next one."""
        first = self.received.first
        start, stop = next(iter(self.finished), (first, first))
        return stop if start <= first else first

    def count_outputs(self, start: int, size_bytes: int) -> None:
        """Outputs from `start` on are finished."""
        self.output_bytes += size_bytes
        lowest = self.lowest_unfinished
        if start < lowest and not self.ahead:
            self.head_bytes += size_bytes
            return
        heappush(self.ahead, (start, size_bytes))
        while self.ahead and self.ahead[0][0] < lowest:
            self.head_bytes += heappop(self.ahead)[1]

    @property
    def has_all_inputs(self) -> bool:
        return self.sealed_count is not None and (
            not self.is_durable or self.received.count >= self.sealed_count
        )

    @property
    def is_done(self) -> bool:
        """Every input has its output here (and on disk, where durable)."""
        return self.has_all_inputs and self.finished.count == self.received.count


@dataclass(slots=True)
class Node:
    """A call in the call graph of a spawned one; see graph.py. It outlives the call."""

    call_id: bytes
    function: str
    module: str
    #: None once the call is forgotten.
    call: Call | None
    parent: Node | None = None
    #: Of the input of `parent` that made it.
    index: int = 0
    #: The calls that its inputs made, by their indexes.
    children: dict[int, list[Node]] = field(default_factory=dict)
    #: Inputs that ended badly, with a word for how.
    failures: dict[int, str] = field(default_factory=dict)
    #: Something of it is not known any more.
    is_cut: bool = False
    #: What the call had when it was forgotten, and how its unfinished inputs ended.
    input_count: int = 0
    finished: IntervalSet = field(default_factory=IntervalSet)
    rest: str = ""


@dataclass(slots=True)
class Fetch:
    """A client reads outputs of a durable call: these are still owed to it."""

    call: Call
    session: Session
    peer_id: PeerId
    request_id: int
    owed: IntervalSet


@dataclass(slots=True)
class Lease:
    """The right of one container to run inputs of one call, from one chunk."""

    lease_id: int
    call: Call
    container: Container
    start: int
    stop: int
    #: Inputs neither reported nor given back.
    open: IntervalSet
    #: When an output or item of it last arrived; at first the grant.
    heard_at: float
    is_reclaiming: bool = False
    is_cancelled: bool = False
    #: A reclaim that freed nothing is not repeated before this time.
    reclaim_after: float = 0.0
    #: Where it ended when it was granted; `stop` moves when a tail is taken back.
    end: int = 0
    granted_at: float = 0.0
    #: How long its inputs have run, as far as they are reported and it can be.
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        self.end = self.stop
        self.granted_at = self.heard_at


@dataclass(slots=True)
class Container:
    container_id: int
    function: Function
    worker: Worker
    number: int
    #: starting, ready, stopping; see the table in scheduler/README.md.
    state: str
    #: At most two, of which the first one runs; of a concurrent function all of them run.
    leases: dict[int, Lease] = field(default_factory=dict)
    #: Inputs of its leases that are neither reported nor given back.
    open_count: int = 0
    #: It runs a suspect, which gets no company.
    is_exclusive: bool = False
    #: It has had a lease.
    is_used: bool = False
    #: It was told to leave at once.
    is_killed: bool = False
    holds_core: bool = False
    #: Its inputs wait: for nested calls, or for credit.
    is_waiting: bool = False
    #: The nested client that said so; None where a generator waits for credit.
    waiting_peer: PeerId | None = None
    #: Frames that end the wait, kept until the core is there.
    deferred: list[Send] = field(default_factory=list)
    idle_since: float = 0.0
    #: How long its inputs have run, as far as they are reported, and the processor time that it
    #: has used since it was started, once its worker has said so; see advice.py.
    busy_s: float = 0.0
    cpu_s: float | None = None
    #: When it is looked at next whether it has been idle for long enough.
    idle_due_at: float | None = None
    nested_peers: dict[PeerId, Peer] = field(default_factory=dict)
    #: What its function knows of it; see capacity.py.
    filed: Filed = NOT_FILED

    @property
    def is_idle(self) -> bool:
        return not self.leases and self.state != "stopping"

    def has_room(self, limit: int) -> bool:
        """Whether it may have another input, as long as it has less than `limit`."""
        if self.state == "stopping" or self.is_exclusive:
            return False
        return self.open_count < limit and not (self.is_used and self.function.is_single_use)


@dataclass(slots=True)
class Worker:
    worker_id: bytes
    peer_id: PeerId
    number: int
    name: str
    cpu: float
    cpu_free: float
    memory_mib: int
    memory_free_mib: int
    is_embedded: bool
    heard_at: float
    containers: dict[int, Container] = field(default_factory=dict)
    #: Those of them that are idle, and those that are told to leave; see capacity.py.
    idle: dict[int, Container] = field(default_factory=dict)
    leaving: dict[int, Container] = field(default_factory=dict)
    functions: set[bytes] = field(default_factory=set)
    #: Function ids by container id, of containers from before the scheduler's restart whose
    #: client has not come back yet.
    unclaimed: dict[int, bytes] = field(default_factory=dict)
    #: Blobs that were sent there, and those that it has brought for reports which are to come.
    blobs: set[bytes] = field(default_factory=set)
    claims: set[bytes] = field(default_factory=set)
    #: Reports not yet acknowledged, as (sequence, store sequence it waits for or 0).
    unsafe: deque[tuple[int, int]] = field(default_factory=deque)
    acknowledged: int = 0
    #: When its reports are acknowledged at the latest.
    acknowledge_at: float = 0.0
    #: Its containers that are in `State.resuming`.
    resuming_count: int = 0
    #: The free cores that its entry in `State.free_cores` says, and the number of that entry.
    cpu_filed: float = -math.inf
    cpu_entry: int = 0
    is_lost: bool = False


@dataclass(slots=True)
class Reservation:
    """What becomes free on the worker is kept for the function; see reservation.py."""

    function: Function
    worker: Worker
    #: When a generator was last stopped there for the function's sake; see eviction.py.
    evicted_at: float = -math.inf


@dataclass(slots=True)
class Session:
    """One client process; its attached calls hang on it."""

    session_id: bytes
    peer_id: PeerId | None
    lost_at: float = 0.0
    #: Text of containers that it did not take, and was not told of yet.
    lost_text_bytes: int = 0
    lost_text: m.Log | None = None
    #: Of a nested client: the container that makes the calls.
    container: Container | None = None
    calls: dict[bytes, Call] = field(default_factory=dict)
    apps: dict[bytes, App] = field(default_factory=dict)
    #: Its requests for outputs of spawned calls that are not answered in full.
    fetches: dict[int, Fetch] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class BlobWait:
    """Something that is done once all these blobs are here, or given up."""

    missing: set[bytes]
    then: Callable[[], object]
    failed: Callable[[str], None]
    #: For which it is done, if it is for a call.
    call: Call | None


@dataclass(slots=True)
class Peer:
    peer_id: PeerId
    role: str
    session_id: bytes
    info: dict[str, Any]
    session: Session | None = None
    worker: Worker | None = None
    #: Frames of the kinds in ENDS_WAIT sent to it; see `SessionWaits`.
    wait_frames: int = 0
    is_writable: bool = True
    #: It shows its user how calls get on; see progress.py.
    watch: Watch | None = None


@dataclass(slots=True)
class Watch:
    """What a client that watches was told last."""

    peer: Peer
    #: A look at its calls is due.
    is_armed: bool = False
    calls: dict[bytes, m.CallProgress] = field(default_factory=dict)
    functions: dict[bytes, m.FunctionProgress] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """All maps, the deadlines and the commands of this turn."""

    epoch: int
    now: float = 0.0
    apps: dict[bytes, App] = field(default_factory=dict)
    functions: dict[bytes, Function] = field(default_factory=dict)
    calls: dict[bytes, Call] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    containers: dict[int, Container] = field(default_factory=dict)
    workers: dict[bytes, Worker] = field(default_factory=dict)
    #: The containers that workers had when they were lost, those that were lost first in front.
    lost_containers: dict[bytes, frozenset[int]] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    peers: dict[PeerId, Peer] = field(default_factory=dict)
    #: Queues and dicts; see objects.py.
    objects: Objects = field(default_factory=Objects)
    #: Functions that have ready calls, in the order in which they got them.
    ready_functions: dict[bytes, Function] = field(default_factory=dict)
    #: Functions that have containers without inputs that need them; see scaling.py.
    scaled: dict[bytes, Function] = field(default_factory=dict)
    #: Functions that have leases of which a part could be taken back.
    tailed: dict[bytes, Function] = field(default_factory=dict)
    free_cores: FreeCores = field(default_factory=FreeCores)
    #: Containers that have deferred frames and no core.
    resuming: dict[int, Container] = field(default_factory=dict)
    #: (when, order, kind, what); entries may be stale, the kinds check.
    deadlines: list[tuple[float, int, str, Any]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    #: When the results of calls expired, the oldest first: seconds since 1970.
    expired: dict[bytes, float] = field(default_factory=dict)
    #: What was given to the store and is not on disk yet, by sequence; see durable.py.
    pending_stores: dict[int, Any] = field(default_factory=dict)
    #: Memory of spawned calls, of their inputs on the way to disk, and how much it may be in all.
    spawned_bytes: int = 0
    arriving_bytes: int = 0
    spawned_bytes_max: int = SPAWNED_SIZE_BYTES_MAX
    #: First sequences of what is not on disk, also while it waits to be tried again.
    unsafe_stores: set[int] = field(default_factory=set)
    #: How many frames that are kept refer to each blob, and the sizes of those that are here whole.
    blob_references: dict[bytes, int] = field(default_factory=dict)
    present_blobs: dict[bytes, int] = field(default_factory=dict)
    #: What is to be done when a blob is here, by blob; see blobs.py.
    blob_waiters: dict[bytes, list[BlobWait]] = field(default_factory=dict)
    #: What is kept of nested calls that are over, the oldest first; see graph.py.
    ended_nodes: deque[Node] = field(default_factory=deque)
    #: Workers that have reports to be acknowledged before long, those that are due first in front;
    #: those that have so many that it is to be now; those whose oldest report is not on disk yet.
    acknowledging: dict[bytes, Worker] = field(default_factory=dict)
    acknowledging_now: dict[bytes, Worker] = field(default_factory=dict)
    storing_workers: dict[bytes, Worker] = field(default_factory=dict)
    #: Only one function at a time has a worker kept free.
    reservation: Reservation | None = None
    #: Tails are not looked at again before this time.
    reclaim_after: float = 0.0
    next_look: float = 0.0
    #: What to add to `now` for the time since 1970.
    wall_offset_s: float = 0.0
    started_at: float = 0.0
    store_sequence: int = 0
    counter: int = 0
    service_clock_s: float = 0.0
    #: How often each unusual thing happened: late, duplicate and unknown messages.
    counts: dict[str, int] = field(default_factory=dict)

    def next_number(self) -> int:
        self.counter += 1
        return self.counter

    def next_id(self) -> int:
        """An id that no other life of the scheduler has given."""
        return self.epoch << m.EPOCH_SHIFT | self.next_number()

    def note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def at(self, when: float, kind: str, what: Any) -> None:
        """Have `kind` looked at when the time comes."""
        heappush(self.deadlines, (when, self.next_number(), kind, what))

    def look(self, when: float) -> None:
        """Decide again at this time, at the latest. One deadline serves all who ask."""
        if self.now < self.next_look <= when:
            return
        self.next_look = when
        self.at(when, "look", None)

    def send(self, peer_id: PeerId, message: m.Message) -> None:
        """Order a frame to be sent. To a container that waits, one that would end the wait is kept
        until the container has its core again."""
        peer = self.peers.get(peer_id)
        if peer is None:
            return
        if type(message) in m.ENDS_WAIT:
            peer.wait_frames += 1
            container = peer.session.container if peer.session is not None else None
            if container is not None and container.is_waiting:
                self.defer(container, Send(peer_id, message))
                return
        self.commands.append(Send(peer_id, message))

    def defer(self, container: Container, command: Send) -> None:
        container.deferred.append(command)
        if container.container_id not in self.resuming:
            self.resuming[container.container_id] = container
            container.worker.resuming_count += 1

    def stop_resuming(self, container: Container) -> None:
        if self.resuming.pop(container.container_id, None) is not None:
            container.worker.resuming_count -= 1
