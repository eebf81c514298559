"""What a worker holds and owes, decided without any I/O; the simulator runs this module too.

`WorkerState` is told three kinds of facts: messages of the scheduler (`handle`), what happened to
the connection (`connected`, `disconnected`), and what containers did (`container_*`, `lease_*`).
It answers with commands, which `take_commands` hands over in order: messages to send, and orders
to containers.

A lease goes through these states::

    parked   its blobs are not here; the container knows nothing of it
    given    it was handed to the container, which runs its inputs in order
    ended    all its inputs below `stop` are reported; it is forgotten

`stop` only falls, by `Reclaim` or `CancelLease`: the order goes to the container's shell, which
asks the container's memory how far it is and says so by `lease_reclaimed`.

A container::

    waiting   its function's blobs are not here
    starting  its process is being made, and the user's code loaded
    ready     it takes leases (the scheduler sends the first ones earlier)
    stopping  told to leave
    gone      its exit is reported

Reports (outputs, items, exits) have to arrive. One that names blobs is held back until they are
delivered (`blob_delivered`), and with it what follows it in its lease; so whoever gets a report
has its blobs. Then it is numbered and sent, and stays in `_unacknowledged`, in order, until
`OutputsAck`; after a reconnect those are sent again behind `WorkerReady`. An exit has no sequence
number of its own, so it stays until a later report was acknowledged; a scheduler that knows it
already ignores it. When too much is unacknowledged, `is_congested` says that containers should
not be read any more: they then wait, before their next input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanout.protocol import messages as m
from fanout_worker.commands import Command as Command
from fanout_worker.commands import GiveCredit as GiveCredit
from fanout_worker.commands import GiveLease as GiveLease
from fanout_worker.commands import LowerLimit as LowerLimit
from fanout_worker.commands import OfferBlob as OfferBlob
from fanout_worker.commands import RemoveBlob as RemoveBlob
from fanout_worker.commands import RemoveSources as RemoveSources
from fanout_worker.commands import Send as Send
from fanout_worker.commands import Start as Start
from fanout_worker.commands import Stop as Stop

#: Reports that may be unacknowledged before the worker stops reading its containers.
UNACKNOWLEDGED_SIZE_BYTES_MAX = 64 << 20
UNACKNOWLEDGED_COUNT_MAX = 16 << 10

#: What a report costs beside its payload, so that many tiny ones count too.
_REPORT_SIZE_BYTES = 256


_NO_BLOBS: frozenset[bytes] = frozenset()


@dataclass(slots=True)
class Lease:
    """One lease that is parked or given."""

    lease_id: int
    container_id: int
    call_id: bytes
    start: int
    stop: int
    blobs: frozenset[bytes]
    #: How many of its inputs are reported. They are reported in order.
    done: int = 0
    #: Blobs that are not here yet, while it is parked.
    missing: set[bytes] = field(default_factory=set)
    #: The message itself, while it is parked.
    message: m.Lease | None = None
    #: Its generator waits for items from this number on to be allowed.
    waits_upto: int | None = None


@dataclass(slots=True)
class Container:
    container_id: int
    function_id: bytes
    #: Blobs of its function that are not here yet; it is started when there are none.
    missing: set[bytes]
    #: All blobs of its function.
    blobs: tuple[bytes, ...] = ()
    leases: dict[int, Lease] = field(default_factory=dict)
    #: Its code is loaded; until then the blobs of that are needed.
    is_started: bool = False
    is_stopping: bool = False


@dataclass(slots=True)
class _Report:
    #: It is safe when a report with this sequence number is acknowledged; 0 until it is sent.
    sequence: int
    message: m.LeaseOutputs | m.LeaseItems | m.ContainerExited
    size_bytes: int
    blobs: tuple[bytes, ...]
    is_numbered: bool
    #: Reports of one lease keep their order, and an exit comes behind those of its container.
    container_id: int
    #: -1 for an exit.
    lease_id: int


class WorkerState:
    """The worker's share of every conversation with the scheduler.

    Args:
        worker_id: 16 random bytes, the same for the daemon's life.
        name: for people.
        cpu: cores to give out.
        memory_mib: memory to give out.
        is_embedded: the worker belongs to the client's own machine and interpreter.
    """

    def __init__(
        self, worker_id: bytes, name: str, cpu: float, memory_mib: int, is_embedded: bool
    ) -> None:
        self.worker_id = worker_id
        self.name = name
        self.cpu = cpu
        self.memory_mib = memory_mib
        self.is_embedded = is_embedded
        self.is_connected = False
        self.containers: dict[int, Container] = {}
        self.leases: dict[int, Lease] = {}
        self.functions: dict[bytes, m.DefineFunction] = {}
        #: Late, duplicate and unknown messages, by what they were.
        self.oddities: dict[str, int] = {}
        self._commands: list[Command] = []
        self._sequence = 0
        self._unacknowledged: deque[_Report] = deque()
        #: Reports whose blobs are on their way, and those behind them, in order.
        self._held_back: list[_Report] = []
        #: Blobs of outputs that the scheduler has, as far as this connection tells.
        self._delivered: set[bytes] = set()
        self._unacknowledged_bytes = 0
        #: Exits do not count: they cannot be acknowledged alone, so they must stop nothing.
        self._numbered_count = 0
        #: Blobs that are whole here, and those of them that the scheduler believes to be here.
        self._held: set[bytes] = set()
        self._sent_here: set[bytes] = set()
        self._handlers: dict[type[m.Message], Any] = {
            m.WorkerAccepted: self._on_accepted,
            m.DefineFunction: self._on_define_function,
            m.DropFunction: self._on_drop_function,
            m.StartContainer: self._on_start_container,
            m.StopContainer: self._on_stop_container,
            m.Lease: self._on_lease,
            m.Reclaim: self._on_reclaim,
            m.CancelLease: self._on_cancel_lease,
            m.LeaseCredit: self._on_lease_credit,
            m.OutputsAck: self._on_outputs_ack,
            m.BlobDrop: self._on_blob_drop,
        }

    # --- for the shell ---

    def take_commands(self) -> list[Command]:
        """What is to be done, in order; each command is handed over once."""
        commands, self._commands = self._commands, []
        return commands

    @property
    def is_congested(self) -> bool:
        """Too much is unacknowledged: read no container until some of it is."""
        return (
            self._unacknowledged_bytes > UNACKNOWLEDGED_SIZE_BYTES_MAX
            or self._numbered_count > UNACKNOWLEDGED_COUNT_MAX
        )

    @property
    def unacknowledged_count(self) -> int:
        return len(self._unacknowledged)

    def connected(self) -> None:
        """The handshake is done."""
        self.is_connected = True
        # To the scheduler this is a new worker: it will not say of anything that it sent here over
        # an earlier connection that it is needed no longer, and sends again what is.
        forgotten, self._sent_here = self._sent_here, set()
        for blob_id in forgotten:
            self._remove_if_unused(blob_id)
        ready = m.WorkerReady(
            worker_id=self.worker_id,
            name=self.name,
            cpu=self.cpu,
            memory=self.memory_mib,
            is_embedded=self.is_embedded,
            containers=[
                [c.container_id, c.function_id]
                for c in self.containers.values()
                if not c.is_stopping and not c.missing
            ],
            leases=list(self.leases),
        )
        self._send(ready)
        # What has to be sent again goes the way of what is new, with the numbers it has.
        self._delivered.clear()
        again = [*self._unacknowledged, *self._held_back]
        self._unacknowledged.clear()
        self._held_back = again
        for report in again:
            for blob_id in report.blobs:
                self._commands.append(OfferBlob(blob_id))
        self._send_held_back()
        for lease in self.leases.values():
            if lease.waits_upto is not None:
                self._send(m.LeaseWaits(lease.lease_id, lease.waits_upto))

    def disconnected(self) -> None:
        """The scheduler is out of reach. Containers and leases go on."""
        self.is_connected = False
        # Offers that were under way are void; the scheduler offers what a lease needs again.
        for lease in list(self.leases.values()):
            if lease.message is not None:
                self._forget_lease(lease)
        for container in list(self.containers.values()):
            if container.missing:
                del self.containers[container.container_id]

    def handle(self, message: m.Message) -> None:
        """A message of the scheduler, other than those about transfers of blobs and sessions."""
        handler = self._handlers.get(type(message))
        if handler is None:
            self._note(f"unexpected {type(message).__name__}")
        else:
            handler(message)

    def blob_completed(self, blob_id: bytes) -> None:
        """The scheduler has seen to it that this blob is here."""
        self._held.add(blob_id)
        self._sent_here.add(blob_id)
        # A container that cannot start after all leaves the dictionary.
        for container in list(self.containers.values()):
            if blob_id in container.missing:
                container.missing.discard(blob_id)
                if not container.missing:
                    self._start(container)
        for container in list(self.containers.values()):
            # In order of leases, as an earlier one may wait for the same blob.
            for lease in list(container.leases.values()):
                if blob_id in lease.missing:
                    lease.missing.discard(blob_id)
            self._give_parked(container)

    # --- facts from containers ---

    def container_started(self, container_id: int, pid: int, start_time_s: float) -> None:
        """The user's code is loaded."""
        container = self.containers.get(container_id)
        if container is not None:
            container.is_started = True
            for blob_id in container.blobs:
                self._remove_if_unused(blob_id)
        self._send(m.ContainerStarted(container_id, pid, start_time_s))

    def container_exited(
        self,
        container_id: int,
        reason: str,
        running: list[tuple[int, int]],
        details: dict[str, Any],
        payload: bytes = b"",
    ) -> None:
        """A container is gone; all that it had finished was told before."""
        container = self.containers.pop(container_id, None)
        if container is None:
            self._note("exit of an unknown container")
            return
        for lease in list(container.leases.values()):
            self._forget_lease(lease)
        self._report(
            m.ContainerExited(container_id, reason, running, details, payload),
            container_id,
            is_numbered=False,
        )
        self._remove_unused_sources(container.blobs)
        for blob_id in container.blobs:
            self._remove_if_unused(blob_id)

    def refuse(self, message: m.Lease | m.StartContainer) -> None:
        """Give back at once what the scheduler ordered of a worker that is leaving."""
        if isinstance(message, m.Lease):
            self._send(m.Reclaimed(message.lease_id, message.start))
            return
        details = {"text": "the worker is leaving"}
        exited = m.ContainerExited(message.container_id, "stopped", [], details, b"")
        self._report(exited, message.container_id, is_numbered=False)

    def lease_outputs(
        self,
        lease_id: int,
        start: int,
        busy_us: int,
        lengths: bytes,
        statuses: bytes,
        blobs: list[tuple[int, list[bytes]]],
        payload: bytes,
    ) -> None:
        """Outputs of consecutive inputs of a lease, the arguments being fields of
        `LeaseOutputs`."""
        lease = self.leases.get(lease_id)
        if lease is None:
            self._note("outputs of an unknown lease")
            return
        self._report(
            m.LeaseOutputs(
                0, lease_id, lease.call_id, start, busy_us, lengths, statuses,
                blobs, payload,
            ),
            lease.container_id,
            blobs=blobs,
        )  # fmt: skip
        lease.done += len(statuses)
        lease.waits_upto = None
        self._end_if_done(lease)

    def lease_items(
        self,
        lease_id: int,
        index: int,
        number: int,
        lengths: bytes,
        blobs: list[tuple[int, list[bytes]]],
        payload: bytes,
    ) -> None:
        """Items of the generator that runs under a lease; fields of `LeaseItems`."""
        lease = self.leases.get(lease_id)
        if lease is None:
            self._note("items of an unknown lease")
            return
        lease.waits_upto = None
        self._report(
            m.LeaseItems(0, lease_id, lease.call_id, index, number, lengths, blobs, payload),
            lease.container_id,
            blobs=blobs,
        )

    def lease_waits(self, lease_id: int, upto: int) -> None:
        """The generator that runs under a lease has used its credit."""
        lease = self.leases.get(lease_id)
        if lease is None:
            self._note("wait of an unknown lease")
            return
        lease.waits_upto = upto
        self._send(m.LeaseWaits(lease_id, upto))

    def lease_reclaimed(self, lease_id: int, stop: int) -> None:
        """`LowerLimit` is done: no input at or above `stop` was begun, or will be."""
        lease = self.leases.get(lease_id)
        if lease is None:
            # It ended while the limit was being lowered; its last report has said so.
            return
        lease.stop = min(lease.stop, stop)
        self._send(m.Reclaimed(lease_id, lease.stop))
        self._end_if_done(lease)

    def log(self, message: m.ContainerLog) -> None:
        """Text of a container. It is not worth keeping while nobody can take it."""
        self._send(message)

    # --- messages of the scheduler ---

    def _on_accepted(self, message: m.WorkerAccepted) -> None:
        keep = {container_id for container_id in message.keep if type(container_id) is int}
        for container in self.containers.values():
            if container.container_id not in keep:
                container.is_stopping = True
                self._commands.append(Stop(container.container_id, True))

    def _on_define_function(self, message: m.DefineFunction) -> None:
        self.functions[message.function_id] = message

    def _on_drop_function(self, message: m.DropFunction) -> None:
        function = self.functions.pop(message.function_id, None)
        if function is not None:
            self._remove_unused_sources(function.blobs)

    def _on_start_container(self, message: m.StartContainer) -> None:
        if message.container_id in self.containers:
            self._note("start of a known container")
            return
        definition = self.functions.get(message.function_id)
        missing = set(definition.blobs) - self._held if definition is not None else set()
        container = Container(message.container_id, message.function_id, missing)
        container.blobs = tuple(definition.blobs) if definition is not None else ()
        self.containers[message.container_id] = container
        if definition is None:
            self._note("start of an unknown function")
            text = "the worker was not told what this function is"
            self.container_exited(message.container_id, "start", [], {"text": text})
        elif not missing:
            self._start(container)

    def _start(self, container: Container) -> None:
        definition = self.functions.get(container.function_id)
        if definition is None:
            text = "the function was dropped before its container could start"
            self.container_exited(container.container_id, "start", [], {"text": text})
            return
        self._commands.append(Start(container.container_id, definition))
        self._give_parked(container)

    def _on_stop_container(self, message: m.StopContainer) -> None:
        container = self.containers.get(message.container_id)
        if container is None:
            self._note("stop of an unknown container")
            return
        container.is_stopping = True
        if container.missing:
            self.container_exited(container.container_id, "stopped", [], {})
            return
        self._commands.append(Stop(message.container_id, message.kill))

    def _on_lease(self, message: m.Lease) -> None:
        container = self.containers.get(message.container_id)
        if container is None:
            # Its exit is on the way to the scheduler, and gives the lease back.
            self._note("lease for an unknown container")
            return
        if message.lease_id in self.leases:
            self._note("duplicate lease")
            return
        blobs = _NO_BLOBS
        if message.blobs:
            blobs = frozenset(blob_id for _, blob_ids in message.blobs for blob_id in blob_ids)
        lease = Lease(
            lease_id=message.lease_id,
            container_id=message.container_id,
            call_id=message.call_id,
            start=message.start,
            stop=message.start + len(message.lengths) // 4,
            blobs=blobs,
            missing=set(blobs - self._held) if blobs else set(),
            message=message,
        )
        self.leases[lease.lease_id] = container.leases[lease.lease_id] = lease
        self._give_parked(container)

    def _give_parked(self, container: Container) -> None:
        """Hand over the leases that have all they need, in order, up to one that has not; none
        before the container is started, which its function's blobs may delay."""
        if container.missing:
            return
        for lease in container.leases.values():
            if lease.message is None:
                continue
            if lease.missing:
                return
            message, lease.message = lease.message, None
            self._commands.append(GiveLease(message))

    def _on_reclaim(self, message: m.Reclaim) -> None:
        self._lower(message.lease_id, message.keep, is_cancelled=False)

    def _on_cancel_lease(self, message: m.CancelLease) -> None:
        self._lower(message.lease_id, 0, is_cancelled=True)

    def _lower(self, lease_id: int, keep: int, is_cancelled: bool) -> None:
        lease = self.leases.get(lease_id)
        if lease is None:
            # All that it did was reported, so nothing more will be: none of it is kept, but for
            # what is reported when its blobs have arrived.
            self._note("reclaim of an unknown lease")
            self._send(m.Reclaimed(lease_id, self._end_of_held_back(lease_id)))
        elif lease.message is None:
            self._commands.append(LowerLimit(lease.container_id, lease_id, keep, is_cancelled))
        else:
            self._lower_parked(lease, lease.message, keep)

    def _end_of_held_back(self, lease_id: int) -> int:
        """Behind the last input of a lease whose report waits for its blobs; 0 if none does."""
        waiting = [held.message for held in self._held_back if held.lease_id == lease_id]
        outputs = [message for message in waiting if isinstance(message, m.LeaseOutputs)]
        return outputs[-1].start + len(outputs[-1].statuses) if outputs else 0

    def _lower_parked(self, lease: Lease, message: m.Lease, keep: int) -> None:
        """The container knows nothing of the lease: cut it here."""
        stop = min(lease.stop, lease.start + keep)
        lease.stop = stop
        if stop > lease.start:
            count = stop - lease.start
            message.lengths = message.lengths[: 4 * count]
            size = sum(memoryview(message.lengths).cast("I"))
            message.payload = memoryview(message.payload)[:size]
            message.blobs = [(at, ids) for at, ids in message.blobs if at < count]
        self._send(m.Reclaimed(lease.lease_id, stop))
        self._end_if_done(lease)

    def _on_lease_credit(self, message: m.LeaseCredit) -> None:
        lease = self.leases.get(message.lease_id)
        if lease is None:
            self._note("credit for an unknown lease")
            return
        if lease.message is not None:
            lease.message.credit = max(lease.message.credit, message.upto)
            return
        if lease.waits_upto is not None and message.upto > lease.waits_upto:
            lease.waits_upto = None
        self._commands.append(GiveCredit(lease.container_id, lease.lease_id, message.upto))

    def _on_outputs_ack(self, message: m.OutputsAck) -> None:
        unacknowledged = self._unacknowledged
        while unacknowledged and unacknowledged[0].sequence <= message.sequence:
            report = unacknowledged.popleft()
            self._unacknowledged_bytes -= report.size_bytes
            self._numbered_count -= report.is_numbered
            for blob_id in report.blobs:
                self._remove_if_unused(blob_id)

    def _on_blob_drop(self, message: m.BlobDrop) -> None:
        self._sent_here.discard(message.blob_id)
        self._remove_if_unused(message.blob_id)

    # --- the rest ---

    def _note(self, oddity: str) -> None:
        self.oddities[oddity] = self.oddities.get(oddity, 0) + 1

    def _send(self, message: m.Message) -> None:
        if self.is_connected:
            self._commands.append(Send(message))

    def _report(
        self,
        message: m.LeaseOutputs | m.LeaseItems | m.ContainerExited,
        container_id: int,
        blobs: Sequence[tuple[int, list[bytes]]] = (),
        is_numbered: bool = True,
    ) -> None:
        blob_ids: tuple[bytes, ...] = ()
        if blobs:
            blob_ids = tuple(blob_id for _, ids in blobs for blob_id in ids)
            self._held.update(blob_ids)
        size_bytes = len(message.payload) + _REPORT_SIZE_BYTES
        lease_id = message.lease_id if not isinstance(message, m.ContainerExited) else -1
        report = _Report(0, message, size_bytes, blob_ids, is_numbered, container_id, lease_id)
        self._unacknowledged_bytes += size_bytes
        self._numbered_count += is_numbered
        if self.is_connected:
            for blob_id in blob_ids:
                self._commands.append(OfferBlob(blob_id))
        if self._must_wait(report):
            self._held_back.append(report)
        else:
            self._send_report(report)

    def blob_delivered(self, blob_id: bytes) -> None:
        """The scheduler has this blob: reports that waited for it may go."""
        self._delivered.add(blob_id)
        self._send_held_back()

    def _must_wait(self, report: _Report) -> bool:
        if report.blobs and any(blob_id not in self._delivered for blob_id in report.blobs):
            return True
        if not self._held_back:
            return False
        if report.lease_id < 0:
            return any(held.container_id == report.container_id for held in self._held_back)
        return any(held.lease_id == report.lease_id for held in self._held_back)

    def _send_held_back(self) -> None:
        waiting, self._held_back = self._held_back, []
        for report in waiting:
            if self._must_wait(report):
                self._held_back.append(report)
            else:
                self._send_report(report)

    def _send_report(self, report: _Report) -> None:
        """Number it and send it. One that was numbered in an earlier connection gets a new number:
        numbers only grow in the order of sending."""
        if report.is_numbered:
            self._sequence += 1
            report.message.sequence = self._sequence  # type: ignore[union-attr]
            report.sequence = self._sequence
        else:
            report.sequence = self._sequence + 1
        self._unacknowledged.append(report)
        self._send(report.message)

    def _end_if_done(self, lease: Lease) -> None:
        if lease.start + lease.done >= lease.stop:
            self._forget_lease(lease)

    def _forget_lease(self, lease: Lease) -> None:
        self.leases.pop(lease.lease_id, None)
        container = self.containers.get(lease.container_id)
        if container is not None:
            container.leases.pop(lease.lease_id, None)
            if lease.message is not None:
                self._give_parked(container)
        for blob_id in lease.blobs:
            self._remove_if_unused(blob_id)

    def _remove_unused_sources(self, blobs: Iterable[bytes]) -> None:
        for blob_id in blobs:
            is_used = any(blob_id in f.blobs for f in self.functions.values()) or any(
                blob_id in container.blobs for container in self.containers.values()
            )
            if not is_used:
                self._commands.append(RemoveSources(blob_id))

    def _remove_if_unused(self, blob_id: bytes) -> None:
        """Delete a blob that the scheduler does not believe to be here and nothing here needs."""
        if blob_id in self._sent_here or blob_id not in self._held:
            return
        if any(blob_id in lease.blobs for lease in self.leases.values()):
            return
        if any(blob_id in c.blobs and not c.is_started for c in self.containers.values()):
            return
        if any(blob_id in r.blobs for r in (*self._unacknowledged, *self._held_back)):
            return
        self._delivered.discard(blob_id)
        self._held.discard(blob_id)
        self._commands.append(RemoveBlob(blob_id))
