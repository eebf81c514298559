"""The worker daemon as a process, against a scheduler that follows a test's script.

The scripted scheduler is a peer on a real socket: it says exactly what a test wants said, which the
real one would only say in the course of things.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fanout.definition import Definition, Environment, Target, pack_definition
from fanout.options import Options
from fanout.protocol import messages as m
from fanout.protocol.blob_store import MemoryBlobStore, blob_id_of
from fanout.protocol.blobs import BlobExchange
from fanout.protocol.join import Address, JoinString, Token
from fanout.protocol.transport import Server, Transport, connect_container, serve
from fanout.serialization import decode_value, encode_args
from fanout_worker import resources
from tests.conftest import TIMEOUT_FACTOR, children_of, environment, is_alive, poll_until
from tests.worker_kit import APP, CALL, FUNCTION, lease_of, lengths_of

M = TypeVar("M", bound=m.Message)


class Scheduler:
    """Accepts one worker after another, keeps what it says, and says what it is told to."""

    def __init__(self) -> None:
        self.token = Token("t1", "worker", os.urandom(32))
        self.epoch = 1
        self.transport: Transport | None = None
        self.received: list[m.Message] = []
        self.lost = 0
        #: Asked twice of each that is let in.
        self.hello_count = 0
        self.is_adopting = True
        self.store = MemoryBlobStore()
        self.exchange: BlobExchange | None = None
        self.server: Server | None = None
        self._changed = asyncio.Event()

    async def listen(self, port: int = 0) -> None:
        self.server = await serve(
            Address("127.0.0.1", port),
            tokens=self._find,
            welcome=lambda hello, role: m.Welcome(self.epoch, {}),
            handler=self._open,
            tls=None,
        )

    def _find(self, token_id: str) -> Token | None:
        self.hello_count += 1
        self._changed.set()
        return self.token if token_id == "t1" else None

    @property
    def join(self) -> str:
        assert self.server is not None
        return str(
            JoinString(Address("127.0.0.1", self.server.port), "worker", "t1", self.token.secret)
        )

    def _open(self, transport: Transport, hello: m.Hello, role: str) -> Scheduler:
        self.transport = transport
        self.exchange = BlobExchange(
            self.store,
            transport.send,
            transport.send_bulk,
            lambda blob_id: None,
            asyncio.get_running_loop().call_later,
        )
        return self

    def messages_received(self, messages: list[m.Message]) -> None:
        for message in messages:
            assert self.exchange is not None
            self.received.append(message)
            if isinstance(message, m.WorkerReady) and self.is_adopting:
                self.say(m.WorkerAccepted([pair[0] for pair in message.containers]))
            self.exchange.handle(message)
        self._changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost += 1
        self.transport = None
        self._changed.set()

    def writable_changed(self, is_writable: bool) -> None: ...

    def say(self, *messages: m.Message) -> None:
        assert self.transport is not None, "no worker is connected"
        for message in messages:
            self.transport.send(message)

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.received if isinstance(message, kind)]

    async def until(
        self, predicate: Callable[[], Any], describe: str, timeout_s: float = 10.0
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s * TIMEOUT_FACTOR):
                while not predicate():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not in time: {describe}; got {self.received[-5:]}") from None

    async def hears(self, kind: type[M], count: int = 1) -> M:
        """The last message of this kind when there are `count`."""
        await self.until(lambda: len(self.all(kind)) >= count, f"{count} {kind.__name__}")
        return self.all(kind)[-1]

    async def outputs(self, count: int) -> dict[int, tuple[int, bytes]]:
        """Outputs by index, when there are that many."""

        def total() -> int:
            return sum(len(frame.statuses) for frame in self.all(m.LeaseOutputs))

        await self.until(lambda: total() >= count, f"{count} outputs")
        outputs: dict[int, tuple[int, bytes]] = {}
        for frame in self.all(m.LeaseOutputs):
            position = 0
            for at, length in enumerate(memoryview(frame.lengths).cast("I")):
                data = bytes(frame.payload[position : position + length])
                outputs[frame.start + at] = (frame.statuses[at], data)
                position += length
        return outputs

    def drop(self) -> None:
        """Lose the connection without a word."""
        assert self.transport is not None
        self.transport.abort()

    async def close(self) -> None:
        assert self.server is not None
        self.server.close()
        await self.server.wait_closed()


class Worker:
    """The daemon's process."""

    def __init__(self, process: asyncio.subprocess.Process, home: Path) -> None:
        self.process = process
        self.home = home

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return (self.home / "log").read_text()


@asynccontextmanager
async def daemon(
    home: Path, *arguments: str, is_accepting: bool = True, **variables: str
) -> AsyncIterator[tuple[Scheduler, Worker]]:
    """A scheduler and a worker that it has accepted, or that has only asked."""
    scheduler = Scheduler()
    scheduler.is_adopting = is_accepting
    await scheduler.listen()
    os.makedirs(home, exist_ok=True)
    with (home / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fanout_worker", "--home", str(home), *arguments,
            env=environment(
                **{"FANOUT_WORKER_JOIN": scheduler.join, "FANOUT_KILL_GRACE": "1", **variables}
            ),
            stdout=log, stderr=log,
        )  # fmt: skip
    worker = Worker(process, home)
    try:
        await scheduler.hears(m.WorkerReady)
        yield scheduler, worker
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        try:
            async with asyncio.timeout(20 * TIMEOUT_FACTOR):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await scheduler.close()
    assert "Traceback" not in worker.log(), worker.log()


def definition(folder: Path, code: str, **options: Any) -> m.DefineFunction:
    (folder / "user_code.py").write_text(code)
    environment_ = Environment(
        sys.executable,
        "3.11",
        [str(folder), *filter(None, sys.path)],
        str(folder),
        dict(os.environ),
    )
    if "methods" in options:
        options = {**Options().as_data(), **options}
    packed = pack_definition(Definition(environment_, Target("user_code", "f"), "app", "f"))
    return m.DefineFunction(FUNCTION, APP, "f", options, [], packed)


def for_any_host(folder: Path, code: str) -> m.DefineFunction:
    """Like `definition`, for a worker that is not embedded."""
    source = definition(folder, code)
    source.payload = pack_definition(
        Definition(
            Environment(sys.executable, "", [], "", {}),
            Target("user_code", "f", relative_file=str(folder / "user_code.py"), file="x"),
        )
    )
    return source


async def ready(scheduler: Scheduler, message: m.DefineFunction) -> None:
    scheduler.say(message, m.StartContainer(1, FUNCTION))
    await scheduler.hears(m.ContainerStarted)


async def test_a_daemon_runs_leases_and_numbers_its_reports(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        await ready(scheduler, definition(tmp_path, "def f(x): return x + 1\n"))
        scheduler.say(lease_of([(i,) for i in range(2000)]))
        outputs = await scheduler.outputs(2000)
        assert decode_value(outputs[1999][1], []) == 2000
        sequences = [frame.sequence for frame in scheduler.all(m.LeaseOutputs)]
        assert sequences == list(range(1, len(sequences) + 1))
        assert len(sequences) < 500, "quick outputs are to be reported together"


async def test_it_says_that_it_is_ready_only_when_it_was_accepted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with daemon(home, "--name", "here", "--cpu", "3", "--memory", "77") as (
        scheduler,
        worker,
    ):
        poll_until((home / "worker.json").exists, "worker.json is there")
        record = json.loads((home / "worker.json").read_text())
        assert (record["pid"], record["name"]) == (worker.pid, "here")
        told = scheduler.all(m.WorkerReady)[0]
        assert (told.name, told.cpu, told.memory, told.is_embedded) == ("here", 3, 77, False)
    assert not (home / "worker.json").exists()


async def test_it_does_not_say_again_when_it_joins_for_the_first_time(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", is_accepting=False) as (scheduler, worker):
        scheduler.is_adopting = True
        scheduler.drop()
        await scheduler.hears(m.WorkerReady, 2)
        poll_until(lambda: "has joined the scheduler" in worker.log(), "it says so")
        assert " again after " not in worker.log()


async def test_containers_and_reports_survive_a_lost_connection(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        gate = tmp_path / "gate"
        code = f"import os\ndef f(x):\n  while x and not os.path.exists({str(gate)!r}): pass\n"
        await ready(scheduler, definition(tmp_path, code))
        scheduler.say(lease_of([(0,), (1,), (0,)], lease_id=5))
        await scheduler.outputs(1)
        scheduler.drop()
        gate.touch()
        told = await scheduler.hears(m.WorkerReady, 2)
        assert told.containers == [[1, FUNCTION]]
        await scheduler.until(
            lambda: (
                {0, 1, 2} <= {frame.start for frame in scheduler.all(m.LeaseOutputs)}
                or sum(len(frame.statuses) for frame in scheduler.all(m.LeaseOutputs)) >= 4
            ),
            "the first report again and the later ones",
        )
        first = scheduler.all(m.LeaseOutputs)
        assert [frame.start for frame in first[:2]] == [0, 0], "sent again"
        assert len(scheduler.all(m.ContainerStarted)) == 1


async def test_a_container_that_is_not_kept_is_killed(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        await ready(scheduler, definition(tmp_path, "def f(x): pass\n"))
        pid = scheduler.all(m.ContainerStarted)[0].pid
        scheduler.is_adopting = False
        scheduler.drop()
        await scheduler.hears(m.WorkerReady, 2)
        scheduler.say(m.WorkerAccepted([]))
        await scheduler.hears(m.ContainerExited)
        assert not is_alive(pid)


async def test_a_worker_comes_back_when_the_scheduler_was_away_for_a_while(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home") as (scheduler, _):
        assert scheduler.server is not None
        port = scheduler.server.port
        await scheduler.close()
        scheduler.epoch = 2
        await scheduler.listen(port)
        await scheduler.hears(m.WorkerReady, 2)


async def test_a_lease_waits_for_its_blob_and_a_large_output_comes_back_as_one(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        await ready(scheduler, definition(tmp_path, "def f(x): return x\n"))
        data, buffers = encode_args((bytearray(b"7" * (3 << 20)),), None)
        ids = [blob_id_of(buffer) for buffer in buffers]
        assert len(ids) == 1
        scheduler.say(m.Lease(1, 1, CALL, 0, lengths_of([data]), [(0, ids)], 0, 0, "", data))
        scheduler.store.put(ids[0], buffers[0])
        assert scheduler.exchange is not None
        scheduler.exchange.offer(ids[0])
        await scheduler.outputs(1)
        (report,) = scheduler.all(m.LeaseOutputs)
        ((_, output_ids),) = report.blobs
        await scheduler.until(
            lambda: all(map(scheduler.store.has, output_ids)), "the output's blob arrived"
        )
        held = [scheduler.store.buffer(blob_id) for blob_id in output_ids]
        assert decode_value(report.payload, held) == b"7" * (3 << 20)


async def test_a_nested_client_speaks_through_the_daemon(tmp_path: Path) -> None:
    """The user's code tells where it would connect; the test then does so in its place."""
    code = (
        "from fanout import context\n"
        "def f(x):\n"
        "  here = context.container\n"
        "  return here.socket_path, here.secret, here.container_id\n"
    )
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        await ready(scheduler, definition(tmp_path, code))
        scheduler.say(lease_of([(0,)]))
        path, secret, container_id = decode_value((await scheduler.outputs(1))[0][1], [])
        got: list[m.Message] = []
        news = asyncio.Event()

        class Client:
            def messages_received(self, messages: list[m.Message]) -> None:
                got.extend(messages)
                news.set()

            def connection_lost(self, error: Exception | None) -> None: ...

            def writable_changed(self, is_writable: bool) -> None: ...

        hello = m.Hello(m.PROTOCOL_VERSION, "container", str(container_id), b"s" * 16, secret, {})
        transport = await connect_container(
            path, hello=hello, allowed=m.TO_CLIENT, handler=lambda _: Client()
        )
        opened = await scheduler.hears(m.SessionOpened)
        assert (opened.session_id, opened.container_id) == (b"s" * 16, 1)
        transport.send(m.AskCall(4, b"c" * 16))
        relay = await scheduler.hears(m.Relay)
        assert m.decode(relay.header, b"") == m.AskCall(4, b"c" * 16)
        answer = m.encode_header(m.StatusInfo(4, {"x": 1}))
        scheduler.say(m.Relay(b"s" * 16, answer, b""))
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            await news.wait()
        assert got == [m.StatusInfo(4, {"x": 1})]
        transport.close()
        await transport.wait_closed()
        assert (await scheduler.hears(m.SessionClosed)).session_id == b"s" * 16


async def test_a_stranger_at_the_socket_is_turned_away(tmp_path: Path) -> None:
    code = "from fanout import context\ndef f(x): return context.container.socket_path\n"
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, _):
        await ready(scheduler, definition(tmp_path, code))
        scheduler.say(lease_of([(0,)]))
        path = decode_value((await scheduler.outputs(1))[0][1], [])
        hello = m.Hello(m.PROTOCOL_VERSION, "container", "1", b"s" * 16, b"?" * 32, {})
        for number in ("1", "1" * 21, "\u0661", "-1", ""):
            hello.token_id = number
            with pytest.raises(ConnectionError):
                await connect_container(
                    path, hello=hello, allowed=m.TO_CLIENT, handler=lambda _: scheduler
                )
        assert not scheduler.all(m.SessionOpened)


async def test_a_killed_daemon_leaves_nothing_behind(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded", TMPDIR=str(tmp_path)) as (scheduler, worker):
        await ready(scheduler, definition(tmp_path, "import time\ndef f(x): time.sleep(1000)\n"))
        scheduler.say(lease_of([(0,)]))
        pid = scheduler.all(m.ContainerStarted)[0].pid
        everybody = {pid, *children_of(worker.pid)}
        assert len(everybody) >= 3, "container, template, guardian"
        worker.process.kill()
        await worker.process.wait()
        poll_until(lambda: not any(map(is_alive, everybody)), f"{everybody} are gone")
        poll_until(lambda: not list(tmp_path.glob("fanout-*")), "the socket's folder is gone")


async def test_a_terminated_daemon_lets_what_runs_finish(tmp_path: Path) -> None:
    code = "import time\ndef f(x):\n  print('runs')\n  time.sleep(0.3)\n  return 'done'\n"
    source = definition(tmp_path, code)
    async with daemon(tmp_path / "home") as (scheduler, worker):
        # Not embedded: the code comes by value of the path instead of as a zip.
        source.payload = pack_definition(
            Definition(
                Environment(sys.executable, "", [], "", {}),
                Target("user_code", "f", relative_file=str(tmp_path / "user_code.py"), file="x"),
            )
        )
        await ready(scheduler, source)
        scheduler.say(lease_of([(0,)]))
        await scheduler.hears(m.ContainerLog)
        worker.process.terminate()
        assert decode_value((await scheduler.outputs(1))[0][1], []) == "done"
        assert await worker.process.wait() == 0
        assert (await scheduler.hears(m.Goodbye)).code == "leaving"


async def test_a_worker_that_leaves_gives_back_what_comes_too_late(tmp_path: Path) -> None:
    code = "import os\ndef f(path):\n  print('runs')\n  while not os.path.exists(path): pass\n"
    source = definition(tmp_path, code)
    async with daemon(tmp_path / "home", FANOUT_KILL_GRACE="10") as (scheduler, worker):
        source.payload = pack_definition(
            Definition(
                Environment(sys.executable, "", [], "", {}),
                Target("user_code", "f", relative_file=str(tmp_path / "user_code.py"), file="x"),
            )
        )
        await ready(scheduler, source)
        scheduler.say(m.StartContainer(3, FUNCTION))
        await scheduler.hears(m.ContainerStarted, 2)
        scheduler.say(lease_of([(str(tmp_path / "go"),)]))
        await scheduler.hears(m.ContainerLog)
        worker.process.terminate()
        assert (await scheduler.hears(m.ContainerExited)).container_id == 3, "the idle one leaves"
        scheduler.say(lease_of([("",)], lease_id=2, start=50), m.StartContainer(2, FUNCTION))
        assert await scheduler.hears(m.Reclaimed) == m.Reclaimed(2, 50)
        exited = await scheduler.hears(m.ContainerExited, 2)
        assert (exited.container_id, exited.reason) == (2, "stopped")
        (tmp_path / "go").touch()
        assert len(await scheduler.outputs(1)) == 1
        assert await worker.process.wait() == 0


async def test_a_worker_that_leaves_lets_exit_hooks_take_longer_than_code_that_runs(
    tmp_path: Path,
) -> None:
    code = (
        "import pathlib, time\nfrom fanout.partial import exit, method\nclass f:\n"
        "  @method()\n  def g(self): print('runs'); time.sleep(1000)\n"
        "  @exit()\n  def leave(self):\n    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'left')!r}).touch()\n"
    )
    methods = {"g": {"is_generator": False, "is_async": False}}
    source = definition(tmp_path, code, methods=methods)
    async with daemon(tmp_path / "home", FANOUT_KILL_GRACE="0.3") as (scheduler, worker):
        source.payload = pack_definition(
            Definition(
                Environment(sys.executable, "", [], "", {}),
                Target("user_code", "f", relative_file=str(tmp_path / "user_code.py"), file="x"),
            )
        )
        await ready(scheduler, source)
        scheduler.say(m.StartContainer(3, FUNCTION))
        await scheduler.hears(m.ContainerStarted, 2)
        scheduler.say(lease_of([()], container_id=3, method="g"))
        await scheduler.hears(m.ContainerLog)
        worker.process.terminate()
        assert (await scheduler.hears(m.ContainerExited)).container_id == 3, "what runs is killed"
        assert not (tmp_path / "left").exists()
        assert (await scheduler.hears(m.ContainerExited, 2)).details["exit_code"] == 0
        assert (tmp_path / "left").exists()
        assert await worker.process.wait() == 0


async def test_containers_get_the_limit_of_open_files_that_the_worker_was_started_with(
    tmp_path: Path,
) -> None:
    code = "import resource\ndef f(x): return resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        async with daemon(tmp_path / "home", "--embedded") as (scheduler, worker):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await ready(scheduler, definition(tmp_path, code))
            scheduler.say(lease_of([(0,)]))
            assert decode_value((await scheduler.outputs(1))[0][1], []) == (lower, hard)
            assert resource.prlimit(worker.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_an_embedded_worker_leaves_with_its_scheduler(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, worker):
        scheduler.say(m.Goodbye("shutdown", "the scheduler is stopped"))
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            assert await worker.process.wait() == 0


async def test_the_join_string_does_not_reach_user_code(tmp_path: Path) -> None:
    code = "import os\ndef f(x): return dict(os.environ)\n"
    async with daemon(tmp_path / "home") as (scheduler, _):
        await ready(scheduler, for_any_host(tmp_path, code))
        scheduler.say(lease_of([(0,)]))
        variables = decode_value((await scheduler.outputs(1))[0][1], [])
        assert "FANOUT_WORKER_JOIN" not in variables
        assert "PATH" in variables


async def test_a_refused_worker_says_so_and_leaves(tmp_path: Path) -> None:
    scheduler = Scheduler()
    await scheduler.listen()
    join = scheduler.join
    scheduler.token = Token("t1", "worker", os.urandom(32))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fanout_worker", "--home", str(tmp_path / "home"),
        env=environment(FANOUT_WORKER_JOIN=join), stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, text = await process.communicate()
    await scheduler.close()
    assert process.returncode == 1
    assert b"refuses this worker" in text


async def test_a_worker_whose_token_was_revoked_while_it_was_away_ends(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home") as (scheduler, worker):
        await ready(scheduler, for_any_host(tmp_path, "def f(x): return x\n"))
        children = children_of(worker.pid)
        scheduler.token = Token("t1", "worker", os.urandom(32))
        scheduler.drop()
        async with asyncio.timeout(10 * TIMEOUT_FACTOR):
            assert await worker.process.wait() == 1
        assert not any(map(is_alive, children))
        assert worker.log().count("the scheduler ends this worker: the token t1 is not taken") == 1
        assert "its token was withdrawn" in worker.log()


async def test_an_embedded_worker_that_is_refused_goes_on_and_says_so_once(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", "--embedded") as (scheduler, worker):
        good, scheduler.token = scheduler.token, Token("t1", "worker", os.urandom(32))
        scheduler.drop()
        await scheduler.until(lambda: scheduler.hello_count >= 4, "it tries again")
        scheduler.token = good
        await scheduler.hears(m.WorkerReady, 2)
        assert worker.log().count("= the scheduler refuses this worker") == 1


def test_the_resources_are_what_this_process_may_use(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert 0 < resources.cpu_count() <= cores
    assert resources.memory_mib() > 0
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in own:
        folder = tmp_path / path.lstrip("/") if controllers == "" else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cpu.max").write_text("50000 100000")
            (folder / "memory.max").write_text(str(64 << 20))
            assert resources.cpu_count(tmp_path) == 0.5
            assert resources.memory_mib(tmp_path) == 64
