"""Values to bytes and back: every tag, every way to pickle, errors that name their culprit."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanout import exceptions
from fanout.config import BLOB_SIZE_BYTES_MIN
from fanout.serialization import (
    COMMON_INLINE_SIZE_BYTES_MAX,
    COPY_SIZE_BYTES_MAX,
    CommonKwargs,
    copy_of,
    decode_args,
    decode_value,
    encode_args,
    encode_plain_column,
    encode_unencodable,
    encode_value,
)

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | st.binary(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.lists(values).map(tuple), st.dictionaries(st.text(), values))
def test_arguments_come_back_equal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    data, buffers = encode_args(args, kwargs)
    assert decode_args(data, buffers) == (args, kwargs)
    assert decode_args(memoryview(data), buffers) == (args, kwargs)


@given(values)
def test_values_come_back_equal(value: Any) -> None:
    data, buffers = encode_value(value)
    assert decode_value(data, buffers) == value
    assert data == encode_value(value)[0], "nothing of an earlier value may stay in the pickler"


@given(st.lists(plain))
def test_a_column_is_encoded_like_its_values_one_by_one(column: list[Any]) -> None:
    inputs = encode_plain_column(column)
    assert inputs == [encode_args((value,), None)[0] for value in column]


def test_a_column_with_anything_but_plain_values_is_left_to_the_general_way() -> None:
    class Number(int):
        pass

    assert encode_plain_column([1, [2]]) is None
    assert encode_plain_column([1, Number(2)]) is None


@pytest.mark.parametrize("size", [10, COMMON_INLINE_SIZE_BYTES_MAX * 2])
def test_common_kwargs_are_pickled_once_and_reach_every_input(size: int) -> None:
    kwargs = {"text": "x" * size}
    common = CommonKwargs(kwargs)
    for number in range(3):
        data, buffers = encode_args((number,), None, common)
        assert decode_args(data, buffers) == ((number,), kwargs)
        assert buffers == common.buffers
    assert (not common.buffers) == (size < COMMON_INLINE_SIZE_BYTES_MAX)


def test_common_kwargs_stand_before_the_buffers_of_the_input() -> None:
    table = numpy.arange(BLOB_SIZE_BYTES_MIN // 8)
    common = CommonKwargs({"text": "x" * COMMON_INLINE_SIZE_BYTES_MAX, "table": table})
    table[0] = 7
    array = numpy.ones(BLOB_SIZE_BYTES_MIN // 8)
    data, buffers = encode_args((array,), None, common)
    assert len(buffers) == 3
    (back,), kwargs = decode_args(data, buffers)
    assert (back == array).all()
    assert len(kwargs["text"]) == COMMON_INLINE_SIZE_BYTES_MAX
    assert (kwargs["table"] == numpy.arange(len(table))).all(), "as it was when the map began"


def test_common_kwargs_with_very_many_large_buffers_are_one() -> None:
    tables = [numpy.full(BLOB_SIZE_BYTES_MIN, number, dtype=numpy.uint8) for number in range(101)]
    common = CommonKwargs({"tables": tables})
    data, buffers = encode_args((1,), None, common)
    assert len(buffers) <= 2
    _, kwargs = decode_args(data, buffers)
    assert [table[-1] for table in kwargs["tables"]] == list(range(101))


@pytest.mark.parametrize(
    ("count", "is_beside"),
    [(BLOB_SIZE_BYTES_MIN // 8 - 100, False), (BLOB_SIZE_BYTES_MIN // 8, True)],
)
def test_only_large_buffers_leave_the_pickle(count: int, is_beside: bool) -> None:
    array = numpy.arange(count, dtype=numpy.int64)
    data, buffers = encode_value({"array": array})
    assert bool(buffers) == is_beside
    if is_beside:
        assert len(data) < 1000
        assert buffers[0].nbytes == array.nbytes
    assert (decode_value(data, buffers)["array"] == array).all()


@pytest.mark.parametrize(
    "value",
    [
        b"b" * BLOB_SIZE_BYTES_MIN,
        "t" * BLOB_SIZE_BYTES_MIN,
        list(range(BLOB_SIZE_BYTES_MIN)),
        [b"b" * BLOB_SIZE_BYTES_MIN, numpy.zeros(BLOB_SIZE_BYTES_MIN)],
    ],
    ids=["bytes", "text", "list", "bytes and array"],
)
def test_no_value_makes_a_frame_large(value: Any) -> None:
    for data, buffers in (encode_value(value), encode_args((value,), None)):
        assert len(data) < 1000
        assert buffers
    data, buffers = encode_value(value)
    back = decode_value(data, buffers)
    assert pickle.dumps(back) == pickle.dumps(value)


def test_writable_buffers_give_arrays_that_can_be_changed() -> None:
    data, buffers = encode_value(numpy.zeros(BLOB_SIZE_BYTES_MIN))
    array = decode_value(data, [memoryview(bytearray(buffer)) for buffer in buffers])
    array += 1
    assert array[0] == 1


def test_lambdas_and_closures_travel_by_value() -> None:
    offset = 5
    data, buffers = encode_args((lambda x: x + offset,), None)
    (function,), _ = decode_args(data, buffers)
    assert function(1) == 6


def test_an_argument_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(exceptions.SerializationError, match="argument 1, a _thread.lock"):
        encode_args((1, threading.Lock()), None)
    with pytest.raises(exceptions.SerializationError, match="argument door=, a _thread.lock"):
        encode_args((1,), {"door": threading.Lock()})
    with pytest.raises(exceptions.SerializationError, match="argument door="):
        CommonKwargs({"door": threading.Lock()})
    with pytest.raises(exceptions.SerializationError, match="_thread.lock"):
        encode_value(threading.Lock())


def test_a_failed_value_leaves_nothing_in_the_next() -> None:
    before = encode_args(([1, 2],), None)
    with pytest.raises(exceptions.SerializationError):
        encode_args(([numpy.zeros(BLOB_SIZE_BYTES_MIN), threading.Lock()],), None)
    assert encode_args(([1, 2],), None) == before


def test_an_unencodable_input_fails_where_it_is_decoded() -> None:
    data = encode_unencodable(exceptions.SerializationError("argument 0 cannot be pickled"))
    with pytest.raises(exceptions.SerializationError, match="argument 0 cannot be pickled"):
        decode_args(data, [])


def test_a_missing_module_is_named() -> None:
    data = pickle.dumps(Path("x"), 5).replace(b"pathlib", b"pathlia")
    with pytest.raises(exceptions.DeserializationError, match="pathlia"):
        decode_value(data, [])
    with pytest.raises(exceptions.DeserializationError, match="pathlia"):
        decode_args(b"\0" + data, [])


@given(st.binary(min_size=1))
def test_garbage_is_a_deserialization_error(data: bytes) -> None:
    if data[0] == 4:
        return
    # Unpickling arbitrary bytes may call anything importable; only the tag is garbage here.
    with pytest.raises(exceptions.DeserializationError, match="no known tag"):
        decode_args(bytes([5 + data[0] % 250]) + data, [])


# --- __main__ -------------------------------------------------------------------------------------

MAIN = """
import pickle, pickletools, sys
from fanout.serialization import encode_args
class C: pass
def f(): pass
data, _ = encode_args((C(), f, lambda: C), None)
print("C" if b"__main__" in data and b"co_name" not in data else "?", len(data))
plain, _ = encode_args((C(), f), None)
print("by value" if len(plain) > 300 else "by reference")
"""


def test_a_script_travels_by_reference_and_a_prompt_by_value(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    for command, expected in (
        ([sys.executable, str(script)], "by reference"),
        ([sys.executable, "-c", MAIN], "by value"),
    ):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert done.stdout.splitlines()[1] == expected


@pytest.mark.parametrize("extra", [-1, 0, 1, COPY_SIZE_BYTES_MAX + 7])
def test_a_copy_of_a_large_buffer_is_whole_and_of_its_own(extra: int) -> None:
    original = numpy.arange(COPY_SIZE_BYTES_MAX + extra, dtype=numpy.uint8)
    copy = copy_of(original.data)
    assert copy == original.tobytes()
    original[:] = 0
    assert copy[1] == 1


def test_copying_a_large_buffer_lets_other_threads_run() -> None:
    """As one piece it would hold them up for as long as it takes."""
    original = memoryview(bytes(256 << 20))
    waits_s: list[float] = []
    is_over = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not is_over.is_set():
            time.sleep(0)
            now = time.perf_counter()
            waits_s.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    copy_of(original)
    taken_s = time.perf_counter() - begin
    is_over.set()
    thread.join()
    assert max(waits_s) < taken_s / 2
