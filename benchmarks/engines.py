"""Who is compared: fanout, the bare chain, and what a user would pick instead.

Each engine runs in a process of its own and stays warm, so that rounds of different engines can be
interleaved. `python -m benchmarks.engines NAME` is that process: it reads one JSON request a line
and answers each with one JSON line (see `serve`). Every engine has two worker processes and runs
the bodies of `functions.py`, one call of the body for each input.

Peers get their best form. Chunk sizes are what was fastest of 64 to 25,000 for no-op maps of
100,000 inputs; the results still come one by one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any, TextIO

from benchmarks.functions import echo, noop

WORKER_COUNT = 2
CHUNK_SIZE = 4096


class Unsupported(Exception):
    """The engine has no such way to run inputs."""


class Engine:
    """One way to run inputs in two worker processes. The base class can do nothing."""

    def __init__(self, stack: ExitStack) -> None:
        """Start it; what must be closed at the end is given to `stack`."""

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        """The results of `noop`, as they come or in order."""
        raise Unsupported

    def call(self, x: int) -> int:
        """One blocking call of `noop`."""
        raise Unsupported

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        """The results of `echo`, in order."""
        raise Unsupported

    # What follows is measured the same way for all; the bare chain has clients of its own.

    def map_s(self, count: int, is_ordered: bool) -> float:
        start = time.perf_counter()
        total = sum(self.map(range(count), count, is_ordered=is_ordered))
        seconds = time.perf_counter() - start
        assert total == count * (count - 1) // 2, total
        return seconds

    def calls_s(self, count: int) -> list[float]:
        return [self._call_s(x) for x in range(count)]

    def _call_s(self, x: int) -> float:
        start = time.perf_counter()
        result = self.call(x)
        seconds = time.perf_counter() - start
        assert result == x
        return seconds

    def echo_s(self, count: int, size_bytes: int) -> float:
        start = time.perf_counter()
        received = sum(map(len, self.echo(payloads(count, size_bytes))))
        seconds = time.perf_counter() - start
        assert received == count * size_bytes
        return seconds


def payloads(count: int, size_bytes: int) -> Iterator[bytes]:
    """Values that all differ, so that nobody gains by recognising one."""
    filler = os.urandom(size_bytes - 8)
    for number in range(count):
        yield number.to_bytes(8, "little") + filler


class Fanout(Engine):
    def __init__(self, stack: ExitStack) -> None:
        from benchmarks import fanout_app

        self.functions = fanout_app
        stack.enter_context(fanout_app.app.run())

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        return self.functions.noop.map(inputs, order_outputs=is_ordered)

    def call(self, x: int) -> int:
        return self.functions.noop.remote(x)

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        return self.functions.echo.map(payloads)

    def consume_s(self, count: int, size_bytes: int, pause_s: float) -> float:
        """Seconds for a lazy map of so many inputs; `size_bytes` 0 means small ints.

        With a pause the consumer is the slow one: it waits that long after every 100 outputs.
        """
        start = time.perf_counter()
        outputs: Iterator[Any]
        if size_bytes:
            outputs = iter(self.functions.echo.map(payloads(count, size_bytes)))
        else:
            outputs = iter(self.functions.noop.map(iter(range(count))))
        received = 0
        while batch := sum(1 for _ in islice(outputs, 100)):
            received += batch
            if pause_s:
                time.sleep(pause_s)
        assert received == count
        return time.perf_counter() - start


class Bare(Engine):
    """The chain of `bare.py`: an ordered map, an echo and single calls are all it can do."""

    def __init__(self, stack: ExitStack) -> None:
        from benchmarks.bare import Chain

        self.chain = stack.enter_context(Chain())

    def map_s(self, count: int, is_ordered: bool) -> float:
        if not is_ordered:
            raise Unsupported
        return self.chain.map_s(count)

    def calls_s(self, count: int) -> list[float]:
        return self.chain.calls_s(count)

    def echo_s(self, count: int, size_bytes: int) -> float:
        return self.chain.echo_s(count, size_bytes)


class BareThreaded(Engine):
    """The chain with executors that hand over to a thread; only single calls, where it shows."""

    def __init__(self, stack: ExitStack) -> None:
        from benchmarks.bare import Chain

        self.chain = stack.enter_context(Chain(is_threaded=True))

    def map_s(self, count: int, is_ordered: bool) -> float:
        raise Unsupported

    def calls_s(self, count: int) -> list[float]:
        return self.chain.calls_s(count)

    def echo_s(self, count: int, size_bytes: int) -> float:
        raise Unsupported


class Executor(Engine):
    """`concurrent.futures`; it has no unordered map that takes chunks."""

    def __init__(self, stack: ExitStack) -> None:
        self.pool = stack.enter_context(ProcessPoolExecutor(WORKER_COUNT))

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        if not is_ordered:
            raise Unsupported
        return self.pool.map(noop, inputs, chunksize=CHUNK_SIZE)

    def call(self, x: int) -> int:
        return self.pool.submit(noop, x).result()

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        return self.pool.map(echo, payloads)


class Pool(Engine):
    def __init__(self, stack: ExitStack) -> None:
        self.pool = stack.enter_context(multiprocessing.Pool(WORKER_COUNT))

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        method = self.pool.imap if is_ordered else self.pool.imap_unordered
        return method(noop, inputs, chunksize=CHUNK_SIZE)

    def call(self, x: int) -> int:
        return self.pool.apply(noop, (x,))

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        return self.pool.imap(echo, payloads)


class Joblib(Engine):
    def __init__(self, stack: ExitStack) -> None:
        import joblib

        self.joblib = joblib

    def _run(self, calls: Iterable[Any], return_as: str) -> Iterable[Any]:
        results: Iterable[Any] = self.joblib.Parallel(WORKER_COUNT, return_as=return_as)(calls)
        return results

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        calls = map(self.joblib.delayed(noop), inputs)
        return self._run(calls, "generator" if is_ordered else "generator_unordered")

    def call(self, x: int) -> int:
        (result,) = self._run([self.joblib.delayed(noop)(x)], "list")
        return int(result)

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        return self._run(map(self.joblib.delayed(echo), payloads), "generator")


class Mpire(Engine):
    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.pools: dict[str, Any] = {}

    def _pool(self, use: str) -> Any:
        """A pool that is kept alive serves one method and one function only."""
        from mpire import WorkerPool

        if use not in self.pools:
            self.pools[use] = self.stack.enter_context(WorkerPool(WORKER_COUNT, keep_alive=True))
        return self.pools[use]

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        name = "imap" if is_ordered else "imap_unordered"
        method: Callable[..., Iterable[int]] = getattr(self._pool(name), name)
        return method(noop, inputs, iterable_len=count, chunk_size=CHUNK_SIZE)

    def call(self, x: int) -> int:
        result: int = self._pool("apply").apply(noop, (x,))
        return result

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        method: Callable[..., Iterable[bytes]] = self._pool("echo").imap
        return method(echo, payloads, chunk_size=1)


class Ray(Engine):
    """An actor pool that is given chunks, which is what its documentation advises."""

    def __init__(self, stack: ExitStack) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray.util.actor_pool import ActorPool

        ray.init(
            num_cpus=WORKER_COUNT,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        stack.callback(ray.shutdown)

        class Actor:
            def noops(self, inputs: Iterable[int]) -> list[int]:
                return [noop(x) for x in inputs]

            def noop(self, x: int) -> int:
                return noop(x)

            def echo(self, data: bytes) -> bytes:
                return echo(data)

        self.ray = ray
        self.actors: list[Any] = [ray.remote(Actor).remote() for _ in range(WORKER_COUNT)]
        self.pool: Any = ActorPool(self.actors)

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        method = self.pool.map if is_ordered else self.pool.map_unordered
        chunks = list(chunks_of(inputs, CHUNK_SIZE))
        for results in method(lambda actor, chunk: actor.noops.remote(chunk), chunks):
            yield from results

    def call(self, x: int) -> int:
        result: int = self.ray.get(self.actors[0].noop.remote(x))
        return result

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        results: Iterable[bytes] = self.pool.map(
            lambda actor, data: actor.echo.remote(data), list(payloads)
        )
        return results


class Dask(Engine):
    """`Client.map` makes a task of each input; `batch_size` is how many travel at a time."""

    def __init__(self, stack: ExitStack) -> None:
        from distributed import Client, LocalCluster

        cluster = LocalCluster(
            n_workers=WORKER_COUNT, threads_per_worker=1, dashboard_address=None, silence_logs=50
        )
        self.client: Any = stack.enter_context(Client(stack.enter_context(cluster)))

    def map(self, inputs: Iterable[int], count: int, *, is_ordered: bool) -> Iterable[int]:
        futures = self.client.map(noop, list(inputs), pure=False, batch_size=1000)
        if is_ordered:
            results: list[int] = self.client.gather(futures)
            yield from results
            return
        from distributed import as_completed

        for batch in as_completed(futures, with_results=True).batches():
            for _future, result in batch:
                yield result

    def call(self, x: int) -> int:
        result: int = self.client.submit(noop, x, pure=False).result()
        return result

    def echo(self, payloads: Iterable[bytes]) -> Iterable[bytes]:
        futures = self.client.map(echo, list(payloads), pure=False)
        results: list[bytes] = self.client.gather(futures)
        return results


def chunks_of(inputs: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(inputs)
    while chunk := list(islice(iterator, size)):
        yield chunk


ENGINES: dict[str, type[Engine]] = {
    "fanout": Fanout,
    "bare": Bare,
    "bare, two threads": BareThreaded,
    "executor": Executor,
    "pool": Pool,
    "joblib": Joblib,
    "mpire": Mpire,
    "ray": Ray,
    "dask": Dask,
}


def answer(engine: Engine, request: dict[str, Any]) -> Any:
    """What one request measures: seconds, or a list of them; None if the engine cannot do it."""
    kind, arguments = request["measure"], request["arguments"]
    methods: dict[str, Callable[..., Any]] = {
        "map": engine.map_s,
        "calls": engine.calls_s,
        "echo": engine.echo_s,
    }
    if isinstance(engine, Fanout):
        methods["consume"] = engine.consume_s
    try:
        return methods[kind](**arguments)
    except Unsupported:
        return None


def serve(name: str, requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests until there are no more, then close the engine."""
    with ExitStack() as stack:
        engine = ENGINES[name](stack)
        print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
        for line in requests:
            result = answer(engine, json.loads(line))
            print(json.dumps({"result": result}), file=answers, flush=True)


def main() -> None:
    # What an engine prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
