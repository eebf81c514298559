"""The worker daemon: the shell round `worker_state.WorkerState`.

It keeps one connection to the scheduler, starts and watches containers, and moves frames between
the two. It runs no user code and unpickles nothing. All decisions are in the state; here they are
carried out, at once, in the turn of the event loop that caused them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanout import config
from fanout.exceptions import (
    AuthError,
    ConnectionError,
    ContainerStartError,
    InvalidError,
    StorageError,
    VersionError,
)
from fanout.filesystem import write_private
from fanout.protocol import messages as m
from fanout.protocol.blob_store import FileBlobStore
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import JoinString
from fanout.protocol.tls import CertificateError
from fanout.protocol.transport import Transport, connect
from fanout.remote_errors import encode_error
from fanout_worker import process
from fanout_worker import worker_state as ws
from fanout_worker.container import Container
from fanout_worker.environment import discard_sources
from fanout_worker.host import Host, Settings
from fanout_worker.nested import NestedServer

logger = logging.getLogger("fanout.worker")

RECONNECT_DELAY_MIN_S = 0.1
RECONNECT_DELAY_MAX_S = 2.0
#: An embedded worker leaves when its scheduler has been gone for this long in good order, or for
#: the second time if it was killed (a client may be starting the next one).
SCHEDULER_GONE_S = 5.0
SCHEDULER_KILLED_S = 30.0
#: Between answers of a leaving worker to orders that it does not follow any more.
REFUSE_INTERVAL_S = 0.2
#: What a worker that leaves does not take.
_WORK = (m.Lease, m.StartContainer)


@dataclass(slots=True)
class Options:
    """How a daemon was started; see `__main__.py`."""

    join: JoinString
    home: Path
    name: str
    cpu: float
    memory_mib: int
    is_embedded: bool
    #: The soft limit of open files for containers; 0: the daemon's own.
    descriptors_max: int = 0


class Daemon:
    """One worker. `run` returns when it leaves."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._worker_id = os.urandom(16)
        self.state = ws.WorkerState(
            self._worker_id, options.name, options.cpu, options.memory_mib, options.is_embedded
        )
        # A folder of its own: the embedded scheduler has the same home, and blobs of its own in
        # it. Nothing refers to what an earlier life left here.
        folder = options.home / "worker"
        shutil.rmtree(folder, ignore_errors=True)
        self._store = FileBlobStore(folder / "blobs")
        self._nested = NestedServer(self._find_secret, self._send_soon)
        self._host = Host(
            Settings(
                blob_folder=str(folder / "blobs"),
                sources_folder=str(folder / "sources"),
                socket_path=self._nested.path,
                is_embedded=options.is_embedded,
                kill_grace_s=config.number_from_env("FANOUT_KILL_GRACE", config.KILL_GRACE_S),
                variables=dict(os.environ),
                descriptors_max=options.descriptors_max,
            ),
            self.state,
            self._act,
            is_reaper=True,
        )
        self._containers: dict[int, Container] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: What came while the worker leaves, to be given back.
        self._refused: list[m.Lease | m.StartContainer] = []
        self._refused_at = -REFUSE_INTERVAL_S
        self._transport: Transport | None = None
        self._exchange: BlobExchange | None = None
        self._is_writable = True
        self._is_acting = False
        self._is_leaving = False
        self._was_accepted = False
        self._is_revoked = False
        self._heartbeats = 0
        self._leave = asyncio.Event()
        self._unreachable_since: float | None = None
        #: Since when the worker is not among the scheduler's; people were told.
        self._lost_at: float | None = None
        self._goodbye = ""
        #: Why the scheduler refused it the last time, as people were told.
        self._refusal = ""
        #: Whether people know that it cannot be reached now.
        self._is_absence_told = False
        self._exit_code = 0

    async def run(self) -> int:
        """Serve until told to leave. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_terminate)
        await self._nested.start()
        self._host.guard()
        self._tell_of_groups()
        gc.collect()
        gc.freeze()
        connecting = asyncio.ensure_future(self._stay_connected())
        beating = asyncio.ensure_future(self._beat())
        await self._leave.wait()
        try:
            await self._end_containers()
        finally:
            self._is_leaving = True
            for task in (connecting, beating):
                task.cancel()
            await asyncio.gather(connecting, beating, return_exceptions=True)
            if self._transport is not None:
                self._transport.close(m.Goodbye("leaving", "the worker leaves"))
                await self._transport.wait_closed()
            self._nested.close()
            self._host.close()
            (self._options.home / "worker.json").unlink(missing_ok=True)
        return self._exit_code

    # --- the connection ---

    async def _stay_connected(self) -> None:
        delay_s = RECONNECT_DELAY_MIN_S
        while True:
            try:
                transport = await connect(
                    self._join(),
                    role="worker",
                    session_id=self._worker_id,
                    info=self._info(),
                    handler=self._open,
                )
            except (AuthError, VersionError, InvalidError) as error:
                if self._on_refused(error):
                    return
            except ConnectionError as error:
                self._tell(not self._is_absence_told, "= %s; trying again", error)
                self._is_absence_told = True
            else:
                delay_s = RECONNECT_DELAY_MIN_S
                await transport.wait_closed()
            if self._is_scheduler_gone():
                logger.info("= the scheduler is gone, so the embedded worker leaves")
                self._leave.set()
                return
            # Workers of one scheduler must not come back all at the same moment.
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(RECONNECT_DELAY_MAX_S, 2 * delay_s)

    def _on_refused(self, error: Exception) -> bool:
        """Whether that was the last word. It is not where somebody else has answered, whom another
        certificate gives away, nor where the scheduler may come back in another version, nor for
        an embedded worker, which finds the token of the day in the home."""
        is_final = isinstance(error, AuthError) and not isinstance(error, CertificateError)
        if not self._was_accepted:
            logger.error("the scheduler refuses this worker: %s", error)
            self._exit_code = 1
            self._leave.set()
            return True
        if is_final and not self._options.is_embedded:
            token_id = self._options.join.token_id
            self._end_revoked(f"the token {token_id} is not taken any more: {error}")
            return True
        if str(error) != self._refusal:
            self._refusal = str(error)
            logger.warning("= the scheduler refuses this worker: %s; trying again", error)
        return False

    def _end_revoked(self, text: str) -> None:
        """Its token is void. It would be refused for ever, and what its containers do is done by
        others."""
        logger.error("the scheduler ends this worker: %s", text)
        self._is_revoked = True
        self._exit_code = 1
        self._leave.set()

    def _join(self) -> JoinString:
        """Where the scheduler is. An embedded one may have new tokens by now."""
        record = self._scheduler_record() if self._options.is_embedded else None
        if record is not None:
            try:
                return JoinString.parse(record["worker_join"])
            except (KeyError, InvalidError):
                logger.warning("= scheduler.json holds no join string for a worker")
        return self._options.join

    def _scheduler_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self._options.home / "scheduler.json").read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _is_scheduler_gone(self) -> bool:
        """Whether an embedded worker has lost its scheduler for good."""
        now = self._loop.time()
        if self._unreachable_since is None:
            self._unreachable_since = now
        if not self._options.is_embedded:
            return False
        record = self._scheduler_record()
        if record is None:
            return now - self._unreachable_since > SCHEDULER_GONE_S
        pid = record.get("pid")
        is_alive = type(pid) is int and os.path.exists(f"/proc/{pid}")
        return not is_alive and now - self._unreachable_since > SCHEDULER_KILLED_S

    def _info(self) -> dict[str, Any]:
        return {
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "name": self._options.name,
        }

    def _open(self, transport: Transport) -> Daemon:
        """The handshake is done."""
        welcome = transport.peer
        assert isinstance(welcome, m.Welcome)
        self._transport = transport
        self._unreachable_since = None
        self._is_absence_told = False
        self._goodbye = self._refusal = ""
        self._is_writable = True
        self._exchange = BlobExchange(
            self._store,
            transport.send,
            transport.send_bulk,
            self._blob_completed,
            self._loop.call_later,
            failed=self._blob_failed,
            delivered=self._blob_delivered,
            trusts_peer=True,
        )
        self._nested.connected(welcome.epoch)
        self.state.connected()
        self._act()
        return self

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            if type(message) in m.BLOB_KINDS:
                self._on_blob_message(message)
            elif isinstance(message, m.Goodbye):
                self._on_goodbye(message)
            elif self._leave.is_set() and isinstance(message, _WORK):
                self._refuse(message)
            elif not isinstance(message, m.Heartbeat) and not self._nested.handle(message):
                self.state.handle(message)
                if isinstance(message, m.WorkerAccepted):
                    self._on_accepted()
        self._act()

    def connection_lost(self, error: Exception | None) -> None:
        is_news = self._was_accepted and self._lost_at is None and not self._leave.is_set()
        self._tell(
            is_news,
            "= lost the scheduler at %s: %s; containers go on, and it tries to reach the "
            "scheduler until it is back",
            self._options.join.address,
            error or self._goodbye or "closed in order",
        )
        if self._was_accepted and self._lost_at is None:
            self._lost_at = self._loop.time()
        self._transport = None
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        self._nested.disconnected()
        self.state.disconnected()
        self._is_writable = True
        self._act()

    def writable_changed(self, is_writable: bool) -> None:
        self._is_writable = is_writable
        self._nested.set_writable(is_writable)
        self._act()

    def _refuse(self, message: m.Lease | m.StartContainer) -> None:
        """Give back what a leaving worker does not begin. The scheduler may answer with the same
        order, as to it the worker has room again; hence not more often than at an interval."""
        self._refused.append(message)
        if len(self._refused) == 1:
            due_at = self._refused_at + REFUSE_INTERVAL_S
            self._loop.call_at(max(self._loop.time(), due_at), self._give_back_refused)

    def _give_back_refused(self) -> None:
        self._refused_at = self._loop.time()
        refused, self._refused = self._refused, []
        for message in refused:
            self.state.refuse(message)
        self._act()

    def _on_goodbye(self, message: m.Goodbye) -> None:
        logger.info("= the scheduler says goodbye: %s", message.text)
        self._goodbye = message.text
        if message.code == "auth":
            self._end_revoked(message.text)
        elif message.code == "shutdown" and self._options.is_embedded:
            self._leave.set()

    def _on_blob_message(self, message: m.Message) -> None:
        if isinstance(message, m.BlobOffer):
            # A removal that was decided just before must not hit what is now said to be here.
            self._act()
        if self._exchange is not None:
            self._exchange.handle(message)
        if isinstance(message, m.BlobOffer) and self._store.has(message.blob_id):
            self.state.blob_completed(message.blob_id)

    def _blob_completed(self, blob_id: bytes) -> None:
        self.state.blob_completed(blob_id)
        self._act()

    def _blob_delivered(self, blob_id: bytes) -> None:
        self.state.blob_delivered(blob_id)
        self._act()

    def _blob_failed(self, blob_id: bytes, error: StorageError) -> None:
        """The disk is full: what needs the blob waits here until there is room. Or what came is
        broken, which the scheduler was told."""
        self._tell(True, "= %s", error)

    def _send(self, message: m.Message) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closed:
            transport.queue(message)

    def _send_soon(self, message: m.Message) -> None:
        """For those that speak outside `_act`, which is where what `_send` queues leaves."""
        transport = self._transport
        if transport is not None and not transport.is_closed:
            transport.send(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(config.HEARTBEAT_INTERVAL_S)
            self._heartbeats += 1
            self._send(m.Heartbeat(self._heartbeats))
            self._tell_cpu_times()
            self._act()
            self._host.sweep()

    def _tell_cpu_times(self) -> None:
        """So that the scheduler sees which functions hold cores that they do not use."""
        active = [c for c in self._containers.values() if c.is_active and c.pid]
        if active:
            times = [(c.container_id, process.cpu_time_ms(c.pid)) for c in active]
            self._send(m.CpuTimes(times))

    # --- orders of the state ---

    def _act(self) -> None:
        """Carry out what the state has decided, until it has nothing more to say."""
        if self._is_acting:
            # Something that we do below has told the state more; the loop below sees it.
            return
        self._is_acting = True
        try:
            while commands := self.state.take_commands():
                for command in commands:
                    try:
                        self._carry_out(command)
                    except Exception:
                        # The other commands are not at fault.
                        self._on_failed(command)
        finally:
            self._is_acting = False
        if self._transport is not None:
            self._transport.flush()
        is_paused = self.state.is_congested or not self._is_writable
        # All are told, each time: one that goes on says what it has kept, which may be so much that
        # all must wait again; then the next time makes it true.
        for container in list(self._containers.values()):
            container.set_paused(is_paused)

    def _on_failed(self, command: ws.Command) -> None:
        """A command could not be carried out. Its container goes, so that its leases go back."""
        logger.exception("%s failed", type(command).__name__)
        match command:
            case ws.GiveLease(lease):
                container = self._containers.get(lease.container_id)
            case ws.LowerLimit(container_id=number) | ws.GiveCredit(container_id=number):
                container = self._containers.get(number)
            case _:
                return
        if container is not None:
            container.stop(kill=True)

    def _carry_out(self, command: ws.Command) -> None:
        match command:
            case ws.Send(message):
                self._send(message)
            case ws.GiveLease(lease):
                container = self._containers.get(lease.container_id)
                if container is not None:
                    container.give(lease)
            case ws.Start(container_id, definition):
                self._start(container_id, definition)
            case ws.LowerLimit(container_id, lease_id, keep, is_cancelled):
                container = self._containers.get(container_id)
                if container is not None:
                    container.lower_limit(lease_id, keep, is_cancelled)
            case ws.GiveCredit(container_id, lease_id, upto):
                container = self._containers.get(container_id)
                if container is not None:
                    container.give_credit(lease_id, upto)
            case ws.Stop(container_id, kill):
                container = self._containers.get(container_id)
                if container is not None:
                    container.stop(kill)
            case ws.OfferBlob(blob_id):
                if self._exchange is not None:
                    self._exchange.offer(blob_id)
            case ws.RemoveBlob(blob_id):
                self._store.drop(blob_id)
            case ws.RemoveSources(blob_id):
                self._remove_sources(blob_id)

    def _remove_sources(self, blob_id: bytes) -> None:
        folder = Path(self._host.settings.sources_folder)
        aside = discard_sources(blob_id.hex(), folder)
        if aside is not None:
            self._loop.run_in_executor(None, shutil.rmtree, aside, True)

    def _start(self, container_id: int, definition: m.DefineFunction) -> None:
        try:
            container = Container(self._host, definition, container_id)
        except OSError as error:
            failure = ContainerStartError(f"no container can start: {error}")
            self.state.container_exited(
                container_id, "start", [], {"text": str(failure)}, encode_error(failure)
            )
            return
        self._containers[container_id] = container
        task = asyncio.ensure_future(self._keep(container))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, container: Container) -> None:
        """Start a container, and forget it when it has ended."""
        await container.start()
        await container.wait_ended()
        self._containers.pop(container.container_id, None)

    def _find_secret(self, container_id: int) -> bytes | None:
        container = self._containers.get(container_id)
        return container.secret if container is not None else None

    # --- leaving ---

    def _on_terminate(self) -> None:
        if self._leave.is_set():
            # Asked twice: there is a hurry.
            for container in self._containers.values():
                container.stop(kill=True)
        self._leave.set()

    async def _end_containers(self) -> None:
        """Let what runs come to its end for a while, then kill it. Exit hooks may take longer."""
        deadline = self._loop.time() + self._host.settings.kill_grace_s
        is_hurried = self._transport is None or self._is_revoked or self._options.is_embedded
        for container in list(self._containers.values()):
            container.stop(kill=is_hurried)
        if self._tasks and not is_hurried:
            await asyncio.wait(list(self._tasks), timeout=deadline - self._loop.time())
            for container in list(self._containers.values()):
                if container.is_active:
                    container.stop(kill=True)
            if self._tasks:
                await asyncio.wait(list(self._tasks), timeout=self._host.settings.exit_grace_s)
        for container in list(self._containers.values()):
            container.stop(kill=True)
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=config.KILL_GRACE_S)

    def _on_accepted(self) -> None:
        if not self._was_accepted:
            self._was_accepted = True
            self._write_record()
        options, lost_at = self._options, self._lost_at
        self._lost_at = None
        if options.is_embedded:
            return
        rest = f"with {options.cpu:g} cores and {options.memory_mib} MiB"
        if lost_at is not None:
            rest = f"again after {self._loop.time() - lost_at:.0f} s"
        sys.stdout.write(
            f"fanout worker {options.name} has joined the scheduler at {options.join.address} "
            f"{rest}\n"
        )
        sys.stdout.flush()

    def _tell(self, is_news: bool, text: str, *values: object) -> None:
        """On the log; what is news is seen by the person who started the worker by hand."""
        is_shown = is_news and not self._options.is_embedded
        logger.log(logging.WARNING if is_shown else logging.INFO, text, *values)

    def _tell_of_groups(self) -> None:
        """Of what this worker cannot promise, before anybody relies on it."""
        error = self._host.leftovers.group_error
        if error is not None:
            self._tell(
                True,
                "= containers are in no control group (%s): if this worker is killed, a program of "
                "theirs that left session and parent and cleared its variables may outlive it",
                error,
            )

    def _write_record(self) -> None:
        """Tell who looks into the home that this worker was accepted."""
        record = {
            "pid": os.getpid(),
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "started": time.time(),
            "name": self._options.name,
        }
        path = self._options.home / "worker.json"
        write_private(path, json.dumps(record).encode(), must_last=False)
