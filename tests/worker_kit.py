"""Containers for tests: real processes, driven through the parent side that the daemon uses."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack

from fanout.definition import Definition, Environment, Target, pack_definition
from fanout.options import Options
from fanout.protocol import messages as m
from fanout.remote_errors import decode_error
from fanout.serialization import decode_value, encode_args
from fanout_worker.container import Container
from fanout_worker.host import Host, Settings
from tests.conftest import TIMEOUT_FACTOR

APP = b"a" * 16
FUNCTION = b"f" * 16
CALL = b"c" * 16


def lengths_of(parts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(part)) for part in parts)


def lease_of(
    inputs: list[tuple[Any, ...]],
    *,
    container_id: int = 1,
    lease_id: int = 1,
    start: int = 0,
    skip: int = 0,
    credit: int = 0,
    method: str = "",
    call_id: bytes = CALL,
) -> m.Lease:
    """A lease of inputs that need no blobs."""
    parts = [encode_args(args, None)[0] for args in inputs]
    return m.Lease(
        container_id,
        lease_id,
        call_id,
        start,
        lengths_of(parts),
        [],
        skip,
        credit,
        method,
        b"".join(parts),
    )


def shapes(**kinds: str) -> dict[str, dict[str, bool]]:
    """The option `methods`: for each one "sync", "async", "generator" or "async generator"."""
    return {
        name: {"is_generator": kind.endswith("generator"), "is_async": kind.startswith("async")}
        for name, kind in kinds.items()
    }


async def let_pass(seconds: float) -> None:
    """Let time pass, where it is time itself that a test is about; 0 is one turn of the loop."""
    loop = asyncio.get_running_loop()
    passed = loop.create_future()
    loop.call_later(seconds, passed.set_result, None)
    await passed


class Events:
    """What containers told, in order; outputs taken apart."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[int, bytes]] = {}
        self.output_blobs: dict[int, list[bytes]] = {}
        self.items: dict[int, list[Any]] = {}
        self.waits: list[tuple[int, int]] = []
        self.reclaimed: list[tuple[int, int]] = []
        self.started: list[int] = []
        self.exits: dict[int, tuple[str, list[tuple[int, int]], dict[str, Any], bytes]] = {}
        self.logs: list[m.ContainerLog] = []
        #: ("log" | "output", index), to see what came first.
        self.order: list[tuple[str, int]] = []

    def value(self, index: int) -> Any:
        status, data = self.outputs[index]
        assert status == m.Status.VALUE, self.shown(index)
        return decode_value(data, [])

    def error(self, index: int) -> BaseException:
        status, data = self.outputs[index]
        assert status == m.Status.ERROR, self.shown(index)
        return decode_error(data)

    def failure(self, index: int) -> str:
        """The code of a `Status.FAILURE`."""
        status, data = self.outputs[index]
        assert status == m.Status.FAILURE, self.shown(index)
        code: str = msgpack.unpackb(data)[0]
        return code

    def shown(self, index: int) -> str:
        status, data = self.outputs[index]
        return f"output {index} has status {status}: {data!r}"

    def text(self, source: int | None = None) -> str:
        parts = [bytes(x.payload) for x in self.logs if source is None or x.source == source]
        return b"".join(parts).decode()

    # --- called by containers ---

    def container_started(self, container_id: int, pid: int, start_time_s: float) -> None:
        self.started.append(container_id)

    def container_exited(
        self,
        container_id: int,
        reason: str,
        running: list[tuple[int, int]],
        details: dict[str, Any],
        payload: bytes = b"",
    ) -> None:
        self.exits[container_id] = (reason, running, details, payload)

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
        position = 0
        for at, length in enumerate(memoryview(lengths).cast("I")):
            assert start + at not in self.outputs, f"two outputs of input {start + at}"
            self.outputs[start + at] = (statuses[at], payload[position : position + length])
            self.order.append(("output", start + at))
            position += length
        for at, ids in blobs:
            self.output_blobs[start + at] = ids

    def lease_items(
        self,
        lease_id: int,
        index: int,
        number: int,
        lengths: bytes,
        blobs: list[tuple[int, list[bytes]]],
        payload: bytes,
    ) -> None:
        position = 0
        got = self.items.setdefault(index, [])
        for at, length in enumerate(memoryview(lengths).cast("I")):
            value = decode_value(payload[position : position + length], [])
            got.append((number + at, value))
            position += length

    def lease_waits(self, lease_id: int, upto: int) -> None:
        self.waits.append((lease_id, upto))

    def lease_reclaimed(self, lease_id: int, stop: int) -> None:
        self.reclaimed.append((lease_id, stop))

    def log(self, message: m.ContainerLog) -> None:
        self.logs.append(message)
        self.order.append(("log", message.index))


class Kit:
    """A host with containers whose code is given as text."""

    def __init__(self, folder: Path, kill_grace_s: float, exit_grace_s: float) -> None:
        self.folder = folder
        self.events = Events()
        self._changed = asyncio.Event()
        self.host = Host(
            Settings(
                blob_folder=str(folder / "blobs"),
                sources_folder=str(folder / "sources"),
                socket_path="",
                is_embedded=True,
                kill_grace_s=kill_grace_s,
                variables={},
                exit_grace_s=exit_grace_s,
            ),
            self.events,
            self._changed.set,
        )
        (folder / "blobs").mkdir()
        self.containers: list[Container] = []

    def define(
        self,
        code: str,
        qualname: str = "f",
        target: Target | None = None,
        variables: dict[str, str] | None = None,
        sources: str = "",
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> m.DefineFunction:
        """The definition of a function or class in a module with this code."""
        name = f"user_code_{len(list(self.folder.glob('*.py')))}"
        (self.folder / f"{name}.py").write_text(textwrap.dedent(code))
        path = [str(self.folder), *(part for part in sys.path if part)]
        environment = Environment(
            python=sys.executable,
            python_version=f"3.{sys.version_info[1]}",
            path=path,
            cwd=str(self.folder),
            variables={**os.environ, **(variables or {})},
            sources=sources,
        )
        target = target or Target(name, qualname)
        if "methods" in options:
            options = {**Options().as_data(), **options}
        definition = Definition(environment, target, "app", qualname, extra or {})
        return m.DefineFunction(FUNCTION, APP, qualname, options, [], pack_definition(definition))

    async def start(
        self, code: str, qualname: str = "f", container_id: int = 1, **options: Any
    ) -> Container:
        """A container that is ready."""
        container = await self.launch(self.define(code, qualname, **options), container_id)
        await self.until(
            lambda: container_id in self.events.started or container_id in self.events.exits,
            "the container is ready",
        )
        assert container_id in self.events.started, self.events.exits[container_id]
        return container

    async def launch(self, message: m.DefineFunction, container_id: int = 1) -> Container:
        """A container that may fail to start."""
        container = Container(self.host, message, container_id)
        self.containers.append(container)
        await container.start()
        return container

    async def until(
        self, predicate: Callable[[], Any], describe: str, timeout_s: float = 10.0
    ) -> None:
        """Wait until something that containers told makes this true."""
        try:
            async with asyncio.timeout(timeout_s * TIMEOUT_FACTOR):
                while not predicate():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"not within {timeout_s:g} s: {describe}; outputs {sorted(self.events.outputs)}, "
                f"exits {self.events.exits}, text {self.events.text()!r}"
            ) from None

    async def outputs(self, count: int, timeout_s: float = 10.0) -> None:
        await self.until(lambda: len(self.events.outputs) >= count, f"{count} outputs", timeout_s)

    async def close(self) -> None:
        for container in self.containers:
            container.stop(kill=True)
        for container in self.containers:
            await container.wait_ended()
        self.host.close()
        await asyncio.get_running_loop().shutdown_default_executor()


@asynccontextmanager
async def containers(kill_grace_s: float = 5.0, exit_grace_s: float = 10.0) -> AsyncIterator[Kit]:
    """`async with containers() as kit`: everything that was started is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fanout-test-"))
    kit = Kit(folder, kill_grace_s, exit_grace_s)
    try:
        yield kit
    finally:
        await kit.close()
        shutil.rmtree(folder)
