"""Which error arrives, what it carries, and how its traceback looks where the user is."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout import exceptions
from fanout.protocol import messages as m
from fanout_scheduler.store.database import Database
from fanout_scheduler.store.record import load_key, write_of
from fanout_worker import outcome, resources
from tests import errors_kit as kit
from tests.conftest import Cluster, HandStarted, environment
from tests.engine_fixture import engine as engine
from tests.engine_fixture import wait_until_no_call_is_open

OWN_FOLDER = str(Path(fanout.__file__).parent)


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def names(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


# --- tracebacks -----------------------------------------------------------------------------------

WAYS: dict[str, Callable[[], Any]] = {
    "remote": lambda: kit.fail.remote(0),
    "async function": lambda: kit.fail_async.remote(0),
    "map": lambda: list(kit.fail.map([1, 0])),
    "starmap": lambda: list(kit.fail.starmap([(0,)])),
    "for_each": lambda: kit.fail.for_each([1, 0]),
    "get": lambda: kit.fail.spawn(0).get(),
    "iter": lambda: list(kit.fail.spawn_map([1, 0]).iter()),
    "gather": lambda: fanout.FunctionCall.gather(kit.fail.spawn(1), kit.fail.spawn(0)),
}
AIO_WAYS: dict[str, Callable[[], Awaitable[Any]]] = {
    "remote": lambda: kit.fail.remote.aio(0),
    "map": lambda: kit.fail.map.aio([1, 0]),
    "for_each": lambda: kit.fail.for_each.aio([1, 0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_traceback_goes_from_the_users_line_straight_to_the_remote_one(
    running: None, way: str
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        WAYS[way]()
    function = "fail_async" if way == "async function" else "fail"
    here = "test_the_traceback_goes_from_the_users_line_straight_to_the_remote_one"
    assert names(caught.value) == [here, "<lambda>", function, "divide"]
    text = shown(caught.value)
    assert OWN_FOLDER not in text
    assert "fanout_worker" not in text
    assert "return 1 // x\n           ~~^^~~\n" in text


@pytest.mark.parametrize("way", AIO_WAYS)
async def test_so_it_does_in_asyncio(engine: Cluster, way: str) -> None:
    async with kit.app.run():
        with pytest.raises(ZeroDivisionError) as caught:
            await AIO_WAYS[way]()
        assert names(caught.value) == ["test_so_it_does_in_asyncio", "fail", "divide"]
        with pytest.raises(ZeroDivisionError) as caught:
            async for _ in kit.fail.map.aio([1, 0]):
                pass
        assert names(caught.value) == ["test_so_it_does_in_asyncio", "fail", "divide"]


@pytest.mark.parametrize("function", [kit.fail_after_one, kit.fail_after_one_async])
def test_the_error_of_a_generator_comes_after_its_items(running: None, function: Any) -> None:
    items: list[int] = []
    with pytest.raises(ZeroDivisionError) as caught:
        items.extend(function.remote_gen(0))
    assert items == [0]
    assert names(caught.value)[1:] == [function.name, "divide"]


def test_an_error_from_further_in_shows_the_whole_way(running: None) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        kit.fail_further_in.remote(0)
    assert names(caught.value)[1:] == ["fail_further_in", "fail", "divide"]
    assert OWN_FOLDER not in shown(caught.value)


def test_errors_of_a_group_keep_their_tracebacks_causes_and_notes(running: None) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        kit.fail_as_a_group.remote()
    by_type = {type(member): member for member in caught.value.exceptions}
    assert set(by_type) == {kit.Stubborn, ZeroDivisionError}
    assert names(by_type[ZeroDivisionError])[-1] == "divide"
    stubborn = by_type[kit.Stubborn]
    assert isinstance(stubborn.__cause__, ZeroDivisionError)
    assert stubborn.__cause__.__notes__ == ["a note"]
    assert names(stubborn.__cause__) == ["_fail_with_cause", "divide"]


def test_an_uncaught_error_looks_as_if_the_function_had_run_here(
    engine: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "uncaught.py"
    script.write_text(
        "import fanout\n"
        "app = fanout.App('uncaught')\n"
        "@app.function()\n"
        "def f(x):\n"
        "    return 1 // x\n"
        "if __name__ == '__main__':\n"
        "    with app.run():\n"
        "        f.remote(0)\n"
    )
    done = engine.python(script)
    lines = [line for line in done.stderr.splitlines() if not set(line) <= set(" ^~")]
    assert lines == [
        "Traceback (most recent call last):",
        f'  File "{script}", line 8, in <module>',
        "    f.remote(0)",
        f'  File "{script}", line 5, in f',
        "    return 1 // x",
        "ZeroDivisionError: integer division or modulo by zero",
    ]
    wait_until_no_call_is_open()


def test_sources_that_travelled_have_their_own_path_and_lines_also_when_they_are_gone(
    scheduler_and_workers: Callable[..., HandStarted], tmp_path: Path
) -> None:
    started = scheduler_and_workers(1)
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "part.py").write_text(
        "def divide(x):\n    return 1 // x  # in part\ndef add(x):\n    return 1 + x  # in part\n"
    )
    script = folder / "travels.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, traceback, fanout
        import part
        app = fanout.App("travels")
        @app.function()
        def f(x):
            return part.divide(x) if x == 0 else part.add(x)
        if __name__ == "__main__":
            with app.run():
                try:
                    f.remote(0)
                except ZeroDivisionError:
                    traceback.print_exc(file=sys.stdout)
                os.unlink(part.__file__)
                f.spawn("").get()
        """)
    )
    done = started.python(script)
    assert (
        f'File "{folder}/part.py", line 2, in divide\n    return 1 // x  # in part' in done.stdout
    )
    assert "-sources" not in done.stdout
    assert OWN_FOLDER not in done.stdout + done.stderr
    assert done.stderr.endswith("TypeError: unsupported operand type(s) for +: 'int' and 'str'\n")
    gone = f'File "<{os.uname().nodename}>:part.py", line 4, in add\n    return 1 + x  # in part'
    assert gone in done.stderr


# --- types ----------------------------------------------------------------------------------------


def test_errors_of_odd_classes_keep_their_type(running: None) -> None:
    kinds = ["keyword", "attribute", "local", "huge", "recursion", "exit"]
    keyword, attribute, local, huge, recursion, left = kit.fail_oddly.map(
        kinds, return_exceptions=True
    )
    assert isinstance(keyword, kit.Stubborn)
    assert (str(keyword), keyword.code) == ("failed with 3", 3)
    assert isinstance(attribute, kit.Stubborn)
    assert "door: could not travel" in shown(attribute)
    assert type(local).__name__ == "Local"
    assert isinstance(huge, ValueError)
    assert len(str(huge)) < 1 << 20
    assert isinstance(recursion, RecursionError)
    assert "[Previous line repeated" in shown(recursion)
    assert isinstance(left, SystemExit)
    assert left.code == 7


def test_a_remote_interrupt_is_not_taken_for_one_here(running: None) -> None:
    with pytest.raises(exceptions.SteeringError, match="raised KeyboardInterrupt: from afar") as c:
        kit.fail_oddly.remote("interrupt")
    assert isinstance(c.value.__cause__, KeyboardInterrupt)
    assert isinstance(c.value, RuntimeError)
    assert kit.fail.remote(1) == 1


def test_a_type_that_only_the_container_has_arrives_as_text(
    engine: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "only_there.py"
    script.write_text(
        textwrap.dedent("""
        import fanout
        app = fanout.App("only there")
        if not fanout.is_local():
            class Own(Exception):
                pass
        @app.function()
        def f(x):
            raise Own("what it says")
        if __name__ == "__main__":
            with app.run():
                try:
                    f.remote(0)
                except fanout.exception.ExecutionError as error:
                    assert isinstance(error, fanout.exception.RemoteError)
                    print(error.type_name, "/", error.text)
                    print(error)
        """)
    )
    done = engine.python(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("only_there.Own / what it says\nonly_there.Own: what it says\n")
    assert f'File "{script}", line 9, in f\n    raise Own("what it says")' in done.stdout
    wait_until_no_call_is_open()


# --- what ends an input from outside --------------------------------------------------------------


def test_a_crash_tells_all_that_is_known_of_it(running: None) -> None:
    results: list[Any] = list(kit.die.map(["kill", "exit"], return_exceptions=True))
    killed, left = results
    for error, sort in ((killed, ("SIGKILL", None, 0)), (left, (None, 7, 1))):
        assert isinstance(error, exceptions.ContainerCrashedError)
        assert (error.signal, error.exit_code, error.input_index) == sort
        assert error.crash_count == 3
        assert re.fullmatch("fc-[0-9a-f]{32}", error.call_id or "")
        assert error.peak_memory_mib is not None
        assert error.peak_memory_mib > 0
        assert f"peak memory was {error.peak_memory_mib} MiB" in str(error)
    assert "Nothing in fanout killed it" in str(killed)
    assert killed.memory_limit_mib == resources.memory_mib()


def test_a_timeout_tells_its_limit_and_its_input(running: None) -> None:
    with pytest.raises(exceptions.FunctionTimeoutError) as caught:
        kit.hang.remote()
    error = caught.value
    assert (error.timeout, error.input_index) == (0.3, 0)
    assert (error.call_id or "").startswith("fc-")
    assert isinstance(error, exceptions.TimeoutError)
    assert not isinstance(error, TimeoutError)


def test_a_cancelled_call_says_so_for_each_input(running: None) -> None:
    call = kit.wait.spawn_map(range(3))
    call.cancel()
    for index in range(3):
        with pytest.raises(exceptions.InputCancelledError) as caught:
            call.get(index=index)
        assert (caught.value.call_id, caught.value.input_index) == (call.object_id, index)
        assert isinstance(caught.value, exceptions.RemoteError)


def test_code_that_cannot_be_loaded_is_told_once_to_every_input(
    engine: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "cannot_load.py"
    script.write_text(
        textwrap.dedent("""
        import fanout, os, sys, traceback
        app = fanout.App("cannot load")
        if not fanout.is_local():
            with open(os.path.join(os.path.dirname(__file__), "loads"), "a") as file:
                file.write("x")
            raise LookupError("not in here", 3)
        @app.function(retries=5)
        def f(x): return x
        if __name__ == "__main__":
            with app.run():
                got = list(f.map(range(10_000), return_exceptions=True))
                print(len(got), {(type(error), error.args) for error in got})
                print(len({id(error) for error in got}))
                print([frame.name for frame in traceback.extract_tb(got[-1].__traceback__)])
                try:
                    list(f.map(range(10_000)))
                except LookupError as error:
                    print(error.args)
                print(open(os.path.join(os.path.dirname(__file__), "loads")).read())
        """)
    )
    done = engine.python(script)
    assert (done.returncode, done.stderr) == (0, "")
    count, separate, frames, args, loads = done.stdout.splitlines()
    assert count == "10000 {(<class 'LookupError'>, ('not in here', 3))}"
    assert (separate, frames, args) == ("10000", "['<module>']", "('not in here', 3)")
    assert len(loads) <= 4, "two calls, and at most one container for each core"
    wait_until_no_call_is_open()


def test_a_process_that_dies_while_it_loads_tells_how(engine: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "dies_loading.py"
    script.write_text(
        textwrap.dedent("""
        import fanout, os
        app = fanout.App("dies loading")
        if not fanout.is_local():
            os._exit(3)
        @app.function()
        def f(x): return x
        if __name__ == "__main__":
            with app.run():
                for error in f.map(range(3), return_exceptions=True):
                    print(type(error).__name__, error.exit_code, error.signal, error.input_index)
        """)
    )
    done = engine.python(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"ContainerStartError 3 None {n}\n" for n in range(3))
    wait_until_no_call_is_open()


def test_a_function_that_has_caught_too_much_data_cannot_travel(running: None) -> None:
    caught_data = os.urandom(17 << 20)
    app = fanout.App("caught too much")
    function = app.function(serialized=True)(lambda: len(caught_data))
    with (
        app.run(),
        pytest.raises(exceptions.RequestSizeError, match="over the limit of 16 MiB") as c,
    ):
        function.remote()
    assert isinstance(c.value, exceptions.InvalidError)
    assert names(c.value) == ["test_a_function_that_has_caught_too_much_data_cannot_travel"]


def test_results_that_expired_are_told_from_those_that_never_were(
    scheduler_and_workers: Callable[..., HandStarted],
) -> None:
    started = scheduler_and_workers(0)
    assert started.scheduler is not None
    started.scheduler.send_signal(signal.SIGTERM)
    started.scheduler.wait(20)
    expired, never = b"e" * 16, b"n" * 16
    home = started.scheduler_home
    (key,) = home.glob("*.key")
    database = Database(home / "scheduler.db", load_key(key))
    database.write([write_of(m.CallExpired(expired, 1e9))])
    database.close()
    started.start_scheduler()
    call: fanout.FunctionCall[int] = fanout.FunctionCall.from_id("fc-" + expired.hex())
    for use in (call.get, call.num_inputs, lambda: list(call.iter())):
        with pytest.raises(exceptions.OutputExpiredError, match="7 days"):
            use()
    with pytest.raises(exceptions.NotFoundError):
        fanout.FunctionCall.from_id("fc-" + never.hex()).get()


# --- memory ---------------------------------------------------------------------------------------


def killed(**known: Any) -> str:
    details = {"peak_memory_mib": 100, "memory_limit_mib": 1000, "memory_mib": 0} | known
    return outcome.kill_reason(details)


def test_a_kill_for_want_of_memory_says_the_limit_and_what_was_asked_for() -> None:
    text = killed(is_out_of_memory=True, memory_mib=64)
    assert "this worker may use 1000 MiB" in text
    assert "for want of memory" in text
    assert "memory=64" in text
    near = killed(peak_memory_mib=990)
    assert "may use 1000 MiB" in near
    assert "The kernel killed it" not in near, "it is not known"


def test_a_kill_without_a_known_reason_says_what_is_known() -> None:
    assert "was the host out of memory?" in killed()
    assert "killed nothing for want of memory" in killed(is_out_of_memory=False)


def test_the_kernels_count_of_kills_is_that_of_the_cgroup_or_else_of_the_host(
    tmp_path: Path,
) -> None:
    vmstat = tmp_path / "vmstat"
    assert resources.oom_kill_count(tmp_path, vmstat) is None
    vmstat.write_text("nr_free_pages 9\noom_kill 4\n")
    assert resources.oom_kill_count(tmp_path, vmstat) == 4
    assert isinstance(resources.oom_kill_count(), int)


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 300 MiB below our own."""
    parent = next(resources._folders(Path("/sys/fs/cgroup"), "memory"))
    folder = parent / f"fanout-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (folder / name).exists():
                (folder / name).write_text(str(300 << 20))
                break
        else:
            pytest.skip("the memory controller is not switched on for cgroups below ours")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.root
def test_a_container_that_the_kernel_kills_for_want_of_memory_says_so(
    small_cgroup: Path, scheduler_and_workers: Callable[..., HandStarted]
) -> None:
    started = scheduler_and_workers(1)
    (small_cgroup / "cgroup.procs").write_text(str(started.workers["w1"].pid))
    with kit.app.run():
        assert kit.take_memory.remote(10) == 10
        with pytest.raises(exceptions.ContainerCrashedError) as caught:
            kit.take_memory.remote(2000)
    error = caught.value
    assert (error.signal, error.is_out_of_memory, error.memory_mib) == ("SIGKILL", True, 64)
    assert error.memory_limit_mib == 300
    assert "The kernel killed it for want of memory" in str(error)
    started.stop()


# --- the tree -------------------------------------------------------------------------------------

MODAL_NAMES = [
    "AlreadyExistsError", "AsyncUsageWarning", "AuthError", "ClientClosed", "ConflictError",
    "ConnectionError", "DeprecationError", "DeserializationError", "Error", "ExecutionError",
    "FunctionTimeoutError", "InputCancellation", "InternalAPIWarning", "InternalError",
    "InternalFailure", "InvalidError", "NotFoundError", "OutputExpiredError",
    "PermissionDeniedError", "RemoteError", "RequestSizeError", "ResourceExhaustedError",
    "SerializationError", "ServerWarning", "ServiceError", "TimeoutError", "VersionError",
]  # fmt: skip


def test_the_names_of_modal_are_there_and_mean_the_same_sort_of_thing() -> None:
    for name in MODAL_NAMES:
        kind = getattr(exceptions, name)
        assert issubclass(kind, BaseException)
        if name.endswith("Warning") or name == "DeprecationError":
            assert issubclass(kind, UserWarning)
        elif name == "InputCancellation":
            assert not issubclass(kind, Exception)
        else:
            assert issubclass(kind, exceptions.Error)
    assert not issubclass(exceptions.TimeoutError, TimeoutError)
    assert issubclass(exceptions.ConflictError, exceptions.InvalidError)


def test_both_names_of_the_module_are_one_module(engine: Cluster) -> None:
    code = (
        "import fanout.exception; from fanout.exception import NotFoundError as a\n"
        "from fanout.exceptions import NotFoundError as b\n"
        "import fanout; print(a is b, fanout.exception is fanout.exceptions)"
    )
    assert engine.python("-c", code).stdout == "True True\n"
    assert importlib.import_module("fanout.exception") is exceptions


def test_a_name_that_means_nothing_here_says_why() -> None:
    with pytest.raises(AttributeError, match="it has no sandboxes"):
        exceptions.SandboxTimeoutError  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        exceptions.Nonsense  # type: ignore[attr-defined]
    assert not any(hasattr(exceptions, name) for name in exceptions._ABSENT)


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn: set[tuple[str, str]] = set()
    above: list[tuple[int, str]] = []
    lines = (exceptions.__doc__ or "").split("::")[1].splitlines()
    for line in lines[: next(i for i, line in enumerate(lines) if "InternalFailure" in line)]:
        found = re.match(r"([ |+-]+)(\w+)((?:  \w+Warning)*)(?:  |$| \()", line)
        if found is None or len(found[1]) > 20:
            continue
        depth = len(found[1])
        above = [(d, name) for d, name in above if d < depth]
        for name in (found[2], *found[3].split()):
            drawn.add((name, above[-1][1] if above else ""))
        above.append((depth, found[2]))
    kinds = [
        kind
        for name, kind in vars(exceptions).items()
        if isinstance(kind, type) and issubclass(kind, BaseException) and name[0] != "_"
    ]
    assert {name for name, _ in drawn} == {kind.__name__ for kind in kinds} | {"UserWarning"}
    for name, parent in drawn:
        if parent not in ("", "UserWarning"):
            assert issubclass(getattr(exceptions, name), getattr(exceptions, parent)), name
            assert name != parent


def test_errors_are_reachable_without_loading_the_client() -> None:
    variables = environment()
    code = "import fanout.exceptions, sys; print('fanout.client.session' in sys.modules)"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    assert done.stdout == b"False\n"
