"""The embedded default: a scheduler and a worker of one's own, on this machine, found or started.

With no `FANOUT_URL` a client uses daemons that belong to the user and the machine. They listen at a
unix socket in the folder that `home.py` describes, which is all they share with clients; they
outlive the client and leave by themselves when idle.

Finding is free of locks. Starting is done under `start.lock`, and a daemon that leaves because it
is idle takes that lock first, so either the client sees the daemon or the daemon the client.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanout import config
from fanout.client.home import (
    MODULES,
    Daemon,
    StartLock,
    answers,
    find_daemon,
    find_starting,
    forget_starting,
    home_folder,
    is_alive,
    make_folder,
    note_starting,
    wait_until,
)
from fanout.client.process import end_daemon, launch, signal_daemon, wait_gone
from fanout.exceptions import ConnectionError, InvalidError
from fanout.protocol.join import JoinString

if TYPE_CHECKING:
    from fanout.protocol import messages as m

START_TIMEOUT_S = 15.0
#: A person waits for `fanout stop`; the daemons' own grace for user code comes first.
LEAVE_TIMEOUT_S = config.KILL_GRACE_S + 5.0
ANSWER_TIMEOUT_S = 10.0
OUTPUT_TAIL_SIZE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stopped:
    """What `stop_cluster` did. `text` says what still runs when `is_stopped` is false."""

    was_running: bool
    is_stopped: bool
    text: str


# --- find or start --------------------------------------------------------------------------------


def ensure_cluster() -> JoinString:
    """The join string of the user's own scheduler, which is started, with a worker, if need be.

    Blocks: a few hundred microseconds when both are there, some hundred milliseconds when they
    must start. Calling it again after a lost connection finds or starts the successor of a
    scheduler that has left.

    Raises:
        ConnectionError: a daemon did not become ready in time; holds the end of what it wrote.
        InvalidError: the state folder cannot be used, or this is a program that a container has
            started; says what to do.
    """
    home = home_folder()
    found = _find(home)
    if found is None:
        _refuse_in_container()
        make_folder(home)
        deadline = time.monotonic() + START_TIMEOUT_S
        with StartLock(home, deadline):
            found = _find(home) or _start_missing(home, deadline)
    return JoinString.parse(found.client_join)


def _refuse_in_container() -> None:
    """Daemons are for all programs of their user, and what a container has started is killed when
    the container ends."""
    if "FANOUT_CONTAINER_MARK" in os.environ:
        raise InvalidError(
            f"a program that a fanout container has started cannot start fanout daemons in "
            f"{home_folder()}, as they would be killed with the container. Set FANOUT_URL to a "
            f"cluster's join string, or have the function itself make the calls"
        )


def ensure_worker() -> None:
    """Start the worker anew if it has died. Costs next to nothing when it is there.

    Raises:
        ConnectionError: it did not become ready in time; holds the end of what it wrote.
        InvalidError: the state folder cannot be used; says what to set.
    """
    if find_daemon(home_folder(), "worker") is None:
        ensure_cluster()


def _find(home: str) -> Daemon | None:
    """The scheduler, if it answers and has its worker."""
    scheduler = find_daemon(home, "scheduler")
    if scheduler is None or find_daemon(home, "worker") is None or not answers(scheduler):
        return None
    return scheduler


def _start_missing(home: str, deadline: float) -> Daemon:
    """Under the lock: have both daemons run. Returns the scheduler."""
    scheduler = _start_what_is_missing(home, deadline)
    while scheduler is None:
        scheduler = _start_what_is_missing(home, deadline)
    return scheduler


def _start_what_is_missing(home: str, deadline: float) -> Daemon | None:
    """As `_start_missing`; None if the scheduler died while its worker started. It may have been
    about to when it was found, and the worker waits for its successor."""
    scheduler = find_daemon(home, "scheduler")
    if scheduler is not None and not answers(scheduler):
        _wait_leaving(home, scheduler, deadline)
        scheduler = None
    worker = find_daemon(home, "worker")
    if scheduler is None:
        if worker is not None and not _has_died(home):
            # The scheduler took its leave, so the worker is leaving too and would not take work.
            end_daemon(worker)
            worker = None
        scheduler = _start_scheduler(home, deadline)
    if worker is None and _start_worker(home, scheduler, deadline) is None:
        return None
    return scheduler


def _wait_leaving(home: str, scheduler: Daemon | None, deadline: float) -> None:
    """A scheduler that leaves stops listening, then withdraws its file, then says goodbye to its
    peers. Its successor cannot start before it is gone, which its lock tells."""
    try:
        if scheduler is not None:
            wait_gone(scheduler, deadline)
        with StartLock(home, deadline, "scheduler.lock"):
            pass
    except (TimeoutError, ConnectionError):
        who = f"pid {scheduler.pid}" if scheduler else f"it holds {home}/scheduler.lock"
        raise ConnectionError(
            f"the fanout scheduler ({who}) is there but does not answer. "
            f"End it with: fanout stop --force"
        ) from None


def _has_died(home: str) -> bool:
    """Whether the last scheduler was killed: one that leaves in good order takes its file along.
    Its worker then waits for the successor, with its containers and what they have finished."""
    return os.path.exists(os.path.join(home, "scheduler.json"))


def _start_scheduler(home: str, deadline: float) -> Daemon:
    idle_timeout_s = config.number_from_env("FANOUT_IDLE_TIMEOUT", config.IDLE_TIMEOUT_S)
    arguments = ["--idle-timeout", str(idle_timeout_s)]
    found = _start(home, "scheduler", arguments, {}, deadline)
    assert found is not None, "it waits for no other"
    return found


def _start_worker(home: str, scheduler: Daemon, deadline: float) -> Daemon | None:
    """None if the scheduler died meanwhile."""
    arguments = []
    if os.environ.get("FANOUT_CPU"):
        arguments = ["--cpu", str(config.number_from_env("FANOUT_CPU", 1.0))]
    variables = {"FANOUT_WORKER_JOIN": scheduler.worker_join}
    return _start(home, "worker", arguments, variables, deadline, scheduler)


def _start(
    home: str,
    kind: str,
    arguments: list[str],
    variables: dict[str, str],
    deadline: float,
    scheduler: Daemon | None = None,
) -> Daemon | None:
    """Start a daemon and wait until it is ready; take one that is on its way already.

    Args:
        scheduler: the one without which it is never ready. None is returned if that died.
    """
    starting = find_starting(home, kind)
    found = _wait_ready(home, starting, deadline, scheduler) if starting is not None else None
    if found is not None:
        return found
    if _is_lost(scheduler):
        return None
    if kind == "scheduler":
        _wait_leaving(home, None, deadline)
    command = [
        sys.executable, "-P", "-m", MODULES[kind], "--home", home, "--embedded", *arguments,
    ]  # fmt: skip
    pid = launch(command, os.path.join(home, f"{kind}.output"), variables)
    note_starting(home, kind, pid)
    found = _wait_ready(home, Daemon(kind, pid), deadline, scheduler)
    if found is None and _is_lost(scheduler):
        return None
    forget_starting(home, kind)
    if found is None:
        raise _start_error(home, kind, "ended while it started")
    return found


def _wait_ready(
    home: str, starting: Daemon, deadline: float, scheduler: Daemon | None
) -> Daemon | None:
    """The daemon when it is ready; None when it ended instead, or its scheduler did."""
    kind = starting.kind

    def is_decided() -> bool:
        is_over = not is_alive(starting.pid, kind) or _is_lost(scheduler)
        return is_over or find_daemon(home, kind) is not None

    try:
        wait_until(is_decided, deadline)
    except TimeoutError:
        raise _start_error(home, kind, f"was not ready after {START_TIMEOUT_S:g} s") from None
    return find_daemon(home, kind)


def _is_lost(scheduler: Daemon | None) -> bool:
    return scheduler is not None and not is_alive(scheduler.pid, scheduler.kind)


def _start_error(home: str, kind: str, what: str) -> ConnectionError:
    tail, name = "", ""
    for name in (f"{kind}.output", f"{kind}.log"):
        tail = _tail_of(os.path.join(home, name))
        if tail:
            break
    wrote = f"The end of {os.path.join(home, name)}:\n{tail}" if tail else "It wrote nothing."
    return ConnectionError(f"the fanout {kind} on this machine {what}. {wrote}")


def _tail_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - OUTPUT_TAIL_SIZE_BYTES))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""


# --- ask and stop ---------------------------------------------------------------------------------


def cluster_status() -> dict[str, Any] | None:
    """What the embedded daemons do: the scheduler's snapshot, plus `home` and the `pid` of each.

    Starts nothing; None when no scheduler runs. Not for use inside a running event loop.

    Raises:
        ConnectionError: a scheduler is there and does not answer.
    """
    home = home_folder()
    scheduler = find_daemon(home, "scheduler")
    if scheduler is None:
        return None
    join = JoinString.parse(scheduler.client_join)
    status = ask_status(join)
    worker = find_daemon(home, "worker")
    return status | {
        "home": home,
        "scheduler_pid": scheduler.pid,
        "worker_pid": worker.pid if worker else None,
        "address": str(join.address),
    }


def ask_status(join: JoinString) -> dict[str, Any]:
    """The snapshot of any scheduler. Not for use inside a running event loop.

    Raises:
        ConnectionError: it cannot be reached, or does not answer.
    """
    from fanout.protocol import messages as m

    status: dict[str, Any] = _ask(join, m.AskStatus(request_id=1), m.StatusInfo).status
    return status


def stop_cluster(force: bool = False) -> Stopped:
    """End the embedded daemons. Not for use inside a running event loop.

    Args:
        force: also when calls are queued or running, and also daemons that do not answer.

    Raises:
        ConnectionError: a daemon does not answer, or does not leave in time; `force` ends it.
    """
    home = home_folder()
    if not os.path.isdir(home):
        return Stopped(was_running=False, is_stopped=True, text="nothing runs")
    # Held to the end: a client that wants daemons meanwhile waits, and then starts fresh ones.
    with StartLock(home, time.monotonic() + START_TIMEOUT_S):
        scheduler = find_daemon(home, "scheduler")
        worker = find_daemon(home, "worker")
        if scheduler is None and worker is None:
            return Stopped(was_running=False, is_stopped=True, text="nothing runs")
        if scheduler is not None:
            refusal = _ask_to_leave(scheduler, force)
            if refusal is not None:
                return Stopped(was_running=True, is_stopped=False, text=refusal)
            _see_off(scheduler, force)
        if worker is not None:
            end_daemon(worker)
            _see_off(worker, force)
    return Stopped(was_running=True, is_stopped=True, text="stopped")


def _ask_to_leave(scheduler: Daemon, force: bool) -> str | None:
    """None when the scheduler leaves, else what it still has to do."""
    from fanout.protocol import messages as m

    request = m.AskShutdown(request_id=1, force=force)
    try:
        answer = _ask(JoinString.parse(scheduler.client_join), request, m.ShutdownInfo)
    except ConnectionError as error:
        if not is_alive(scheduler.pid, scheduler.kind):
            return None
        if not force:
            raise ConnectionError(
                f"the fanout scheduler (pid {scheduler.pid}) does not answer: {error}. "
                f"End it with: fanout stop --force"
            ) from error
        signal_daemon(scheduler, signal.SIGTERM)
        return None
    return None if answer.is_leaving else answer.text


def _see_off(daemon: Daemon, force: bool) -> None:
    """Wait until a daemon that was told to leave has left."""
    for number in (0, signal.SIGKILL) if force else (0,):
        if number:
            signal_daemon(daemon, number)
        try:
            wait_gone(daemon, time.monotonic() + LEAVE_TIMEOUT_S)
        except TimeoutError:
            continue
        return
    raise ConnectionError(
        f"the fanout {daemon.kind} (pid {daemon.pid}) was told to leave and is still there after "
        f"{LEAVE_TIMEOUT_S:g} s. End it with: fanout stop --force"
    )


def _ask(join: JoinString, request: m.Message, answer_kind: type[Any]) -> Any:
    """One question to a scheduler and its answer, on a connection of its own."""
    import asyncio

    from fanout.protocol.transport import Transport, connect

    class Answer:
        """Waits for the one message; all others are somebody else's business."""

        def __init__(self) -> None:
            self.received: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def messages_received(self, messages: list[m.Message]) -> None:
            for message in messages:
                if isinstance(message, answer_kind) and not self.received.done():
                    self.received.set_result(message)

        def connection_lost(self, error: Exception | None) -> None:
            if not self.received.done():
                text = f"the scheduler closed the connection: {error or 'it is leaving'}"
                self.received.set_exception(ConnectionError(text))

        def writable_changed(self, is_writable: bool) -> None:
            pass

    async def exchange() -> Any:
        answer = Answer()

        def handler(transport: Transport) -> Answer:
            return answer

        transport = await connect(
            join,
            role="client",
            session_id=os.urandom(16),
            info={},
            handler=handler,
            timeout_s=ANSWER_TIMEOUT_S,
        )
        try:
            transport.send(request)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer.received
        except TimeoutError as error:
            raise ConnectionError(
                f"the scheduler at {join.address} accepted the connection but gave no "
                f"answer in {ANSWER_TIMEOUT_S:g} s"
            ) from error
        finally:
            answer.received.cancel()
            transport.close()
            await transport.wait_closed()

    return asyncio.run(exchange())
