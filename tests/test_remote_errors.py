"""Errors to bytes and back: type, state, traceback, causes, groups, and whatever classes do."""

from __future__ import annotations

import asyncio
import importlib.util
import linecache
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout import exceptions, remote_errors, tracebacks
from fanout.protocol.messages import FAILURE_CODES, failure_payload
from fanout.remote_errors import decode_error, decode_failure, encode_error
from fanout.serialization import decode_value
from tests.conftest import environment

ERROR_SIZE_BYTES_MAX = 3 << 20


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travelled(error: BaseException) -> BaseException:
    data = encode_error(error)
    assert len(data) < ERROR_SIZE_BYTES_MAX
    return decode_error(data)


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def names(trace: TracebackType | None) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(trace)]


# --- type and state -------------------------------------------------------------------------------


class TwoArguments(Exception):
    """Asks for more than it hands on, so that its pickle fails on the other side."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two


class SaysItTwice(Exception):
    """Its pickle works, and makes it say "failed with failed with 3"."""

    def __init__(self, code: Any) -> None:
        super().__init__(f"failed with {code}")


class KeywordOnly(OSError):
    def __init__(self, *, path: str) -> None:
        super().__init__(2, "no such thing", path)


class NeverInitialised(ValueError):
    def __init__(self, lock: Any) -> None:
        self.kept = 3


class Refuses(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("refuses")

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("refuses")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_comes_back_as_its_own_type_with_a_real_traceback() -> None:
    error = travelled(raised(KeyError("three")))
    assert type(error) is KeyError
    assert error.args == ("three",)
    assert names(error.__traceback__) == ["raised"]
    assert "raise error" in shown(error)


@pytest.mark.parametrize(
    "error",
    [
        TwoArguments("one", "two"),
        SaysItTwice(3),
        KeywordOnly(path="/x"),
        FileNotFoundError(2, "gone", "/x", None, "/y"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        SyntaxError("bad", ("f.py", 3, 4, "x = =\n", 3, 5)),
        SystemExit(7),
        ImportError("no", name="n", path="p"),
        StopIteration(4),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_constructor_asks_for_the_error_comes_back_as_it_was(
    error: BaseException,
) -> None:
    back = travelled(raised(error))
    assert type(back) is type(error)
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))
    for name in ("errno", "filename", "filename2", "code", "name", "value", "lineno", "object"):
        assert getattr(back, name, None) == getattr(error, name, None)


def test_an_error_that_never_called_its_base_comes_back() -> None:
    back = travelled(NeverInitialised("arguments"))
    assert type(back) is NeverInitialised
    assert (back.args, back.kept) == (("arguments",), 3)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_exceptions_that_are_no_errors_travel_too(error: BaseException) -> None:
    assert type(travelled(error)) is type(error)


def test_what_cannot_be_pickled_of_an_error_is_a_text_about_it() -> None:
    error = TwoArguments("one", "two")
    error.door = threading.Lock()  # type: ignore[attr-defined]
    error.code = 3  # type: ignore[attr-defined]
    back = travelled(raised(error))
    assert isinstance(back, TwoArguments)
    assert (str(back), back.two, vars(back)["code"]) == ("one and two", "two", 3)
    assert "lock" in vars(back)["door"]
    assert "door: could not travel" in shown(back)
    in_args = travelled(ValueError("x", threading.Lock()))
    assert type(in_args) is ValueError
    assert in_args.args[0] == "x"
    assert "argument 1: could not travel" in shown(in_args)


@pytest.mark.parametrize("size", [1 << 20, 64 << 20])
def test_a_huge_message_loses_its_middle_and_not_its_type(size: int) -> None:
    error = ValueError("begin" + "x" * size + "end")
    error.rest = b"y" * size  # type: ignore[attr-defined]
    back = travelled(error)
    assert type(back) is ValueError
    assert str(back).startswith("begin")
    assert str(back).endswith("end")
    assert len(encode_error(error)) < 1 << 20


def test_an_error_of_a_class_that_refuses_everything_arrives_as_text() -> None:
    back = travelled(raised(Refuses("what it says")))
    assert type(back) is exceptions.UnknownExceptionError
    assert isinstance(back, exceptions.RemoteError)
    assert isinstance(back, exceptions.ExecutionError)
    assert f"{__name__}.Refuses: what it says" in str(back)
    assert "in raised" in str(back)


FAILS = """
class Own(Exception):
    pass

def fail(depth):
    if depth == 0:
        raise Own("what it says")
    fail(depth - 1)

def fail_plainly(x):
    return (1 +
            x["missing"])
"""


@pytest.fixture
def only_there(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that is here while errors are packed, and not any more after `take_away`."""
    path = tmp_path / "only_there.py"
    path.write_text(FAILS)
    spec = importlib.util.spec_from_file_location("only_there", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["only_there"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("only_there", None)


def take_away(module: ModuleType) -> None:
    """The file, the module, and what is remembered of both."""
    assert module.__file__ is not None
    os.unlink(module.__file__)
    del sys.modules[module.__name__]
    linecache.clearcache()
    tracebacks._code_of.cache_clear()


def test_a_type_that_is_not_here_arrives_as_text_with_the_traceback(
    only_there: ModuleType,
) -> None:
    try:
        only_there.fail(2)
    except Exception as error:
        error.add_note("a note")
        data = encode_error(error)
    take_away(only_there)
    back = decode_error(data)
    assert isinstance(back, exceptions.UnknownExceptionError)
    assert (back.type_name, back.text) == ("only_there.Own", "what it says")
    assert "No module named 'only_there'" in str(back)
    assert 'raise Own("what it says")' in str(back)
    assert back.traceback_text is not None
    assert back.traceback_text.endswith("only_there.Own: what it says\na note")


# --- tracebacks -----------------------------------------------------------------------------------


def test_lines_of_a_file_that_is_not_here_are_shown_with_marks(
    only_there: ModuleType,
) -> None:
    try:
        only_there.fail_plainly({})
    except KeyError as error:
        data = encode_error(error)
    take_away(only_there)
    text = shown(decode_error(data))
    assert f'File "<{os.uname().nodename}>:{only_there.__file__}", line 12, in fail_plainly' in text
    assert 'x["missing"])' in text
    assert "^^^" in text


def test_lines_of_a_file_that_is_another_one_here_are_those_of_the_remote_one(
    only_there: ModuleType,
) -> None:
    try:
        only_there.fail(0)
    except Exception as error:
        data = encode_error(error)
    assert only_there.__file__ is not None
    Path(only_there.__file__).write_text("# another line\n" * 50)
    linecache.clearcache()
    tracebacks._code_of.cache_clear()
    text = shown(decode_error(data))
    assert "another line" not in text
    assert 'raise Own("what it says")' in text


def test_a_hook_for_uncaught_errors_of_the_users_own_stays(
    only_there: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*_: Any) -> None:
        raise AssertionError("never called")

    try:
        only_there.fail(0)
    except Exception as error:
        data = encode_error(error)
    take_away(only_there)
    monkeypatch.setattr(sys, "excepthook", own)
    decode_error(data)
    assert sys.excepthook is own


def test_a_file_that_is_here_keeps_its_name() -> None:
    frame = traceback.extract_tb(travelled(raised(ValueError())).__traceback__)[-1]
    assert frame.filename == __file__


def recurse(depth: int) -> int:
    return recurse(depth - 1) if depth else 1 // depth


def ping(depth: int) -> int:
    return pong(depth - 1)


def pong(depth: int) -> int:
    return ping(depth - 1) if depth else 1 // depth


def test_a_deep_recursion_is_shown_as_python_shows_it() -> None:
    try:
        recurse(900)
    except ZeroDivisionError as error:
        expected = shown(error)
        data = encode_error(error)
    assert len(data) < 10_000
    assert shown(decode_error(data)) == expected
    assert "[Previous line repeated 8" in expected


@pytest.mark.parametrize("function", [recurse, ping])
def test_a_recursion_error_is_bounded(function: Callable[[int], int]) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    try:
        function(-1)
    except RecursionError as error:
        data = encode_error(error)
    finally:
        sys.setrecursionlimit(limit)
    assert len(data) < 20_000
    back = decode_error(data)
    assert type(back) is RecursionError
    assert len(names(back.__traceback__)) == tracebacks.FRAMES_MAX + 1
    assert "frames left out>" in shown(back)


def test_frames_of_fanout_are_not_in_the_remote_traceback() -> None:
    try:
        decode_value(b"garbage", [])
    except exceptions.DeserializationError as error:
        back = travelled(error)
    assert names(back.__traceback__) == ["test_frames_of_fanout_are_not_in_the_remote_traceback"]
    assert "fanout/serialization.py" not in shown(back)


@pytest.mark.parametrize(("packing", "showing"), [("1", ""), ("", "1"), ("1", "1")])
def test_lines_are_right_where_an_interpreter_knows_no_columns(
    only_there: ModuleType, packing: str, showing: str
) -> None:
    folder = Path(only_there.__file__ or "").parent
    pack = (
        "import sys, fanout.remote_errors as r\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import only_there\n"
        "try: only_there.fail_plainly({})\n"
        "except KeyError as error: sys.stdout.buffer.write(r.encode_error(error))"
    )
    show = (
        "import sys, fanout.remote_errors as r, traceback\n"
        "traceback.print_exception(r.decode_error(sys.stdin.buffer.read()), file=sys.stdout)"
    )
    data = b""
    for code, flag in ((pack, packing), (show, showing)):
        variables = environment(PYTHONNODEBUGRANGES=flag)
        command = [sys.executable, "-c", code, str(folder)]
        data = subprocess.run(
            command, env=variables, input=data, capture_output=True, check=True
        ).stdout
    lines = data.decode().splitlines()
    assert [line for line in lines if set(line) - set(" ~^")][-3:] == [
        f'  File "{only_there.__file__}", line 12, in fail_plainly',
        '    x["missing"])',
        "KeyError: 'missing'",
    ]


def test_rebuilt_frames_hold_on_to_nothing() -> None:
    trace = travelled(raised(ValueError())).__traceback__
    assert trace is not None
    assert trace.tb_frame.f_back is None
    assert trace.tb_frame.f_locals == {}
    traceback.clear_frames(trace)
    assert names(trace) == ["raised"]


def test_an_error_can_travel_twice() -> None:
    once = travelled(raised(TwoArguments("one", "two")))
    twice = travelled(once)
    assert shown(twice) == shown(once)


# --- causes, notes, groups ------------------------------------------------------------------------


def failing_with_cause() -> None:
    try:
        recurse(1)
    except ZeroDivisionError as error:
        raise TwoArguments("one", "two") from error


def test_cause_and_context_keep_type_and_traceback() -> None:
    try:
        failing_with_cause()
    except TwoArguments as error:
        error.add_note("a note")
        expected, back = shown(error), travelled(error)
    assert shown(back) == expected
    assert isinstance(back.__cause__, ZeroDivisionError)
    assert back.__cause__ is back.__context__
    assert names(back.__cause__.__traceback__) == ["failing_with_cause", "recurse", "recurse"]


def test_a_context_that_was_suppressed_stays_so() -> None:
    try:
        try:
            recurse(0)
        except ZeroDivisionError:
            raise KeyError("outer") from None
    except KeyError as error:
        back = travelled(error)
    assert back.__suppress_context__
    assert isinstance(back.__context__, ZeroDivisionError)
    assert "ZeroDivisionError" not in shown(back)


def test_a_context_without_a_cause_is_shown() -> None:
    try:
        try:
            recurse(0)
        except ZeroDivisionError:
            raise KeyError("outer")  # noqa: B904
    except KeyError as error:
        expected, back = shown(error), travelled(error)
    assert not back.__suppress_context__
    assert shown(back) == expected
    assert "During handling" in expected


def test_a_circle_of_contexts_comes_back_as_one() -> None:
    one, two = ValueError(1), ValueError(2)
    one.__context__, two.__context__ = two, one
    back = travelled(one)
    assert back.__context__ is not None
    assert back.__context__.__context__ is back


def test_a_long_chain_is_cut() -> None:
    error: BaseException = ValueError(0)
    for number in range(1, 2000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    back: BaseException | None = travelled(error)
    count = 0
    while back is not None:
        count, back = count + 1, back.__cause__
    assert count == remote_errors.EXCEPTIONS_MAX


def test_a_chain_of_large_errors_is_bounded_as_a_whole() -> None:
    error: BaseException = ValueError("the first")
    for number in range(200):
        following = ValueError(number, "x" * 200_000)
        following.__cause__ = error
        for _ in range(50):
            following.add_note("n" * 5000)
        error = following
    back = travelled(error)
    assert back.args[0] == 199
    assert isinstance(back.__cause__, ValueError)
    last: BaseException = back
    while last.__cause__ is not None:
        last = last.__cause__
    assert isinstance(last, exceptions.UnknownExceptionError)
    assert last.text == "the first"


class OwnGroup(ExceptionGroup[Exception]):
    def derive(self, members: Any) -> Any:
        return OwnGroup(self.message, members)


def test_groups_keep_their_members_each_with_its_traceback() -> None:
    members: list[Any] = [raised(TwoArguments("one", "two"))]
    inner = OwnGroup("inner", members)
    inner.add_note("about the inner one")
    members = [raised(ValueError(1)), raised(inner)]
    group = ExceptionGroup("outer", members)
    back = travelled(raised(group))
    assert shown(back) == shown(group)
    assert isinstance(back, ExceptionGroup)
    matching = back.subgroup(TwoArguments)
    assert matching is not None
    assert isinstance(matching.exceptions[0], OwnGroup)


def test_a_member_that_cannot_be_rebuilt_spoils_nobody_else() -> None:
    group = BaseExceptionGroup("g", [ValueError(1), raised(Refuses("no")), KeyboardInterrupt()])
    back = travelled(group)
    assert isinstance(back, BaseExceptionGroup)
    kinds = [type(member) for member in back.exceptions]
    assert kinds == [ValueError, exceptions.UnknownExceptionError, KeyboardInterrupt]
    assert "Refuses: no" in str(back.exceptions[1])
    assert names(back.exceptions[1].__traceback__) == ["raised"]


def test_a_group_of_very_many_says_how_many_are_left_out() -> None:
    back = travelled(ExceptionGroup("g", [ValueError(n) for n in range(5000)]))
    assert isinstance(back, ExceptionGroup)
    assert len(back.exceptions) == remote_errors.EXCEPTIONS_MAX
    assert str(back.exceptions[-1]).startswith(f"{5001 - remote_errors.EXCEPTIONS_MAX} more")


def test_a_cause_that_is_not_here_is_named_in_its_place(
    only_there: ModuleType,
) -> None:
    error = raised(ValueError("outer"))
    error.__cause__ = raised(only_there.Own("what it says"))
    data = encode_error(error)
    take_away(only_there)
    back = decode_error(data)
    assert type(back) is ValueError
    assert isinstance(back.__cause__, exceptions.UnknownExceptionError)
    assert back.__cause__.type_name == "only_there.Own"


# --- odd and hostile ------------------------------------------------------------------------------


def test_encoding_an_error_never_fails() -> None:
    assert type(travelled(Unspeakable())) is Unspeakable
    assert "\ud800" in str(travelled(ValueError("\ud800")))

    class Local(Exception):
        pass

    assert type(travelled(Local("by value"))).__name__ == "Local"


@given(st.binary())
def test_garbage_instead_of_an_error_is_an_internal_error(data: bytes) -> None:
    assert isinstance(decode_failure(data), exceptions.InternalError)
    assert isinstance(decode_error(data), exceptions.InternalError)


@pytest.mark.parametrize("code", FAILURE_CODES)
def test_every_failure_has_its_class(code: str) -> None:
    failure = decode_failure(failure_payload(code, "what happened", {"args": 9, "unheard": 1}))
    assert isinstance(failure, exceptions.Error)
    assert str(failure) == "what happened"
    assert vars(failure) == {}
    assert isinstance(failure, exceptions.InternalError) == (code == "internal")


def test_what_is_known_of_a_crash_becomes_attributes_and_travels_on() -> None:
    details = {"signal": "SIGKILL", "exit_code": None, "call_id": b"\1" * 16, "input_index": 4}
    failure = decode_failure(failure_payload("crash", "it died", details | {"crash_count": 3}))
    for error in (failure, pickle.loads(pickle.dumps(failure)), travelled(failure)):
        assert isinstance(error, exceptions.ContainerCrashedError)
        assert (error.signal, error.exit_code, error.crash_count) == ("SIGKILL", None, 3)
        assert (error.call_id, error.input_index) == ("fc-" + "01" * 16, 4)
        assert error.peak_memory_mib is None
