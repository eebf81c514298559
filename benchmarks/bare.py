"""What a chain of fanout's shape can do with nothing in it: the floor to compare with.

client > scheduler > daemon > two executors, each a process; sockets, msgpack and pickle and nothing
else. No handshake, no failure handling, no second call, no ordering beyond what the client does.
Inputs travel in batches of at most `BATCH`, each pickled on its own; the scheduler takes batches
apart and makes new ones as credit allows, which is what slicing chunks into leases costs at least.

A frame is a u32 length and the msgpack array ``[start, [pickle, ...]]``, both ways. Every process
decodes and encodes each frame. A single call is a batch of one, made by a thread that waits on a
lock while an event loop in another thread moves the bytes: the least that a blocking call costs.

`python -m benchmarks.bare ROLE ADDRESS...` is one process of it; `Chain` starts them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import msgpack
import uvloop

from benchmarks.functions import noop

BATCH = 256
EXECUTOR_COUNT = 2
#: Batches that an executor has at a time: one that runs and one that waits.
PREFETCH = 2
WINDOW = 16 * BATCH
#: Large values under way in an echo.
ECHO_WINDOW = 8

LENGTH = struct.Struct("<I")
pack: Callable[[Any], bytes] = msgpack.Packer(autoreset=True).pack
unpack: Callable[[bytes], Any] = msgpack.unpackb


def frame_of(start: int, items: list[bytes]) -> bytes:
    body = pack((start, items))
    return LENGTH.pack(len(body)) + body


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """The bodies of the complete frames, and the bytes that are left."""
    bodies, position, size = [], 0, len(data)
    while size - position >= LENGTH.size:
        end = position + LENGTH.size + LENGTH.unpack_from(data, position)[0]
        if end > size:
            break
        bodies.append(data[position + LENGTH.size : end])
        position = end
    return bodies, data[position:]


class Peer(asyncio.Protocol):
    """One connection: cuts frames, gives them to `received`, then calls `turn_over` once."""

    transport: asyncio.Transport

    def __init__(
        self,
        received: Callable[[Peer, int, list[bytes]], None],
        turn_over: Callable[[], None] = lambda: None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.received = received
        self.turn_over = turn_over
        self.lost = lost
        self.rest = b""
        self.in_flight = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.turn_over()

    def data_received(self, data: bytes) -> None:
        bodies, self.rest = cut(self.rest + data if self.rest else data)
        for body in bodies:
            start, items = unpack(body)
            self.received(self, start, items)
        self.turn_over()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost()

    def send(self, start: int, items: list[bytes]) -> None:
        self.transport.write(frame_of(start, items))


def execute(path: str, is_threaded: bool) -> None:
    """An executor: a blocking loop over one socket. If threaded it only reads, and another thread
    runs the inputs."""
    batches: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def run(body: bytes) -> None:
            start, items = unpack(body)
            outputs = [pickle.dumps(noop(*pickle.loads(item)), 5) for item in items]
            sock.sendall(frame_of(start, outputs))

        def run_all() -> None:
            while True:
                run(batches.get())

        if is_threaded:
            threading.Thread(target=run_all, daemon=True).start()
        rest = b""
        while data := sock.recv(1 << 18):
            bodies, rest = cut(rest + data if rest else data)
            for body in bodies:
                if is_threaded:
                    batches.put(body)
                else:
                    run(body)


class Daemon:
    """Hands each batch to an executor that has room."""

    def __init__(self, path: str, port: int) -> None:
        self.path, self.port = path, port
        self.executors: list[Peer] = []
        self.batches: deque[tuple[int, list[bytes]]] = deque()
        self.up: Peer

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_server(self.make_executor, self.path)
        _, self.up = await loop.create_connection(
            lambda: Peer(self.on_batch, self.feed, loop.stop), "127.0.0.1", self.port
        )
        print("ready", flush=True)

    def make_executor(self) -> Peer:
        executor = Peer(self.on_outputs, self.feed)
        self.executors.append(executor)
        return executor

    def on_batch(self, _peer: Peer, start: int, items: list[bytes]) -> None:
        self.batches.append((start, items))

    def on_outputs(self, executor: Peer, start: int, items: list[bytes]) -> None:
        executor.in_flight -= 1
        self.up.send(start, items)

    def feed(self) -> None:
        for executor in self.executors:
            while self.batches and executor.in_flight < PREFETCH:
                executor.in_flight += 1
                executor.send(*self.batches.popleft())


class Scheduler:
    """Queues single inputs and makes batches of them, as far as the daemon has credit."""

    def __init__(self) -> None:
        self.credit = EXECUTOR_COUNT * PREFETCH * BATCH * 2
        self.inputs: deque[tuple[int, bytes]] = deque()
        self.client: Peer
        self.daemon: Peer

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        ports = []
        for make in (self.make_client, self.make_daemon):
            server = await loop.create_server(make, "127.0.0.1", 0)
            ports.append(server.sockets[0].getsockname()[1])
        print(*ports, flush=True)

    def make_client(self) -> Peer:
        self.client = Peer(self.on_inputs, self.feed)
        return self.client

    def make_daemon(self) -> Peer:
        self.daemon = Peer(self.on_outputs, self.feed)
        return self.daemon

    def on_inputs(self, _peer: Peer, start: int, items: list[bytes]) -> None:
        self.inputs.extend(enumerate(items, start))

    def on_outputs(self, _peer: Peer, start: int, items: list[bytes]) -> None:
        self.credit += len(items)
        self.client.send(start, items)

    def feed(self) -> None:
        while self.inputs and self.credit > 0:
            count = min(len(self.inputs), BATCH, self.credit)
            start = self.inputs[0][0]
            self.daemon.send(start, [self.inputs.popleft()[1] for _ in range(count)])
            self.credit -= count


class Chain:
    """All processes of one chain, started by `with`.

    Args:
        is_threaded: each executor hands its inputs to another thread. Most runtimes do that, to
            stay able to answer while user code runs; fanout has shared memory for it.
    """

    def __init__(self, is_threaded: bool = False) -> None:
        self.executor = "threaded-executor" if is_threaded else "executor"

    def __enter__(self) -> Chain:
        self.folder = tempfile.TemporaryDirectory()
        self.processes: list[subprocess.Popen[str]] = []
        path = os.path.join(self.folder.name, "daemon")
        client_port, daemon_port = self._start("scheduler").split()
        self._start("daemon", path, daemon_port)
        for _ in range(EXECUTOR_COUNT):
            self._start(self.executor, path, is_silent=True)
        self.port = int(client_port)
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        self.folder.cleanup()

    def _start(self, *arguments: str, is_silent: bool = False) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if is_silent else subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        if process.stdout is None:
            return ""
        return process.stdout.readline()

    # --- the two clients ---

    def map_s(self, count: int) -> float:
        """Seconds for an ordered map over `range(count)`, consumed by `async for`."""
        expected = count * (count - 1) // 2
        return uvloop.run(self._map_s(iter(range(count)), count, BATCH, WINDOW, int, expected))

    def echo_s(self, count: int, size_bytes: int) -> float:
        """Seconds to have `count` values of this size sent back, each in a frame of its own."""
        values = (bytes([n % 256]) * size_bytes for n in range(count))
        return uvloop.run(self._map_s(values, count, 1, ECHO_WINDOW, len, count * size_bytes))

    async def _map_s(
        self,
        inputs: Iterator[Any],
        count: int,
        batch: int,
        window: int,
        measure: Callable[[Any], int],
        expected: int,
    ) -> float:
        ready: dict[int, list[bytes]] = {}
        wake = asyncio.Event()

        def on_outputs(_peer: Peer, start: int, items: list[bytes]) -> None:
            ready[start] = items
            wake.set()

        loop = asyncio.get_running_loop()
        _, peer = await loop.create_connection(lambda: Peer(on_outputs), "127.0.0.1", self.port)
        start, total = time.perf_counter(), 0
        async for value in ordered_map(peer, ready, wake, inputs, count, batch, window):
            total += measure(value)
        seconds = time.perf_counter() - start
        assert total == expected
        peer.transport.close()
        return seconds

    def calls_s(self, count: int) -> list[float]:
        """Seconds of each of `count` blocking calls, one after another."""
        return list(self._calls_s(count))

    def _calls_s(self, count: int) -> Iterator[float]:
        loop = uvloop.new_event_loop()
        lock = threading.Lock()
        received: list[bytes] = []

        def on_outputs(_peer: Peer, _start: int, items: list[bytes]) -> None:
            received.append(items[0])
            lock.release()

        _, peer = loop.run_until_complete(
            loop.create_connection(lambda: Peer(on_outputs), "127.0.0.1", self.port)
        )
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        for number in range(count):
            start = time.perf_counter()
            lock.acquire()
            loop.call_soon_threadsafe(peer.send, number, [pickle.dumps((number,), 5)])
            lock.acquire()
            lock.release()
            value = pickle.loads(received.pop())
            yield time.perf_counter() - start
            assert value == number
        loop.call_soon_threadsafe(peer.transport.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def ordered_map(
    peer: Peer,
    ready: dict[int, list[bytes]],
    wake: asyncio.Event,
    inputs: Iterator[Any],
    count: int,
    batch: int,
    window: int,
) -> AsyncIterator[Any]:
    sent = consumed = 0
    while consumed < count:
        while sent < count and sent - consumed < window:
            size = min(batch, count - sent)
            peer.send(sent, [pickle.dumps((next(inputs),), 5) for _ in range(size)])
            sent += size
        outputs = ready.pop(consumed, None)
        if outputs is None:
            wake.clear()
            await wake.wait()
            continue
        consumed += len(outputs)
        for output in outputs:
            yield pickle.loads(output)


def main() -> None:
    role, *arguments = sys.argv[1:]
    if role.endswith("executor"):
        with contextlib.suppress(ConnectionError):
            execute(arguments[0], is_threaded=role == "threaded-executor")
        return
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    part = Scheduler() if role == "scheduler" else Daemon(arguments[0], int(arguments[1]))
    # The scheduler leaves when whoever started it is gone, and everything behind it follows.
    loop.add_reader(sys.stdin.fileno(), loop.stop)
    loop.run_until_complete(part.run())
    loop.run_forever()


if __name__ == "__main__":
    main()
