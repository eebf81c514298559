"""Every message that travels between fanout's processes: kinds, fields, limits, who may send it.

A message is the decoded form of one frame (`frames.py`). Its header is the msgpack array
``[kind, field, field, ...]`` in the order in which the class lists its fields; a field named
`payload` is the frame's payload and stays bytes. `decode` checks the type and the bounds of every
field, so whatever is past this module can rely on them, and a peer that sends nonsense is told
which field was wrong.

Names follow one rule: an imperative when the message orders something (`StartContainer`), a noun
or a participle when it informs (`Outputs`, `ContainerExited`).

Conversations, in the order of a call's life::

    client -> scheduler   OpenApp, DefineFunction, OpenCall, Inputs..., SealCall
    scheduler -> client   CallOpened
    scheduler -> worker   DefineFunction, StartContainer, Lease...
    worker -> scheduler   ContainerStarted, LeaseOutputs...     (generators: LeaseItems...)
    scheduler -> worker   OutputsAck
    scheduler -> client   Outputs...                            (generators: Items...)
    client -> scheduler   Ack, ItemCredit, at last CloseApp

Numbers that identify: an *index* is the position of an input in its call, an *item number* the
position of an item in its generator's stream; both start at 0. A lease id is
``epoch << 40 | counter``, so the leases of an earlier life of the scheduler are recognised.

This module is sans-IO and knows nothing of sockets, clocks or processes.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import partial
from operator import attrgetter
from typing import (
    Annotated,
    Any,
    ClassVar,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
)

import msgpack

from fanout.exceptions import ProtocolError
from fanout.protocol import frames

#: Grows whenever a frame changes; two sides with different numbers refuse each other by name.
PROTOCOL_VERSION = 2

#: Inputs in one `Inputs` frame, and so in one chunk. A no-op map is fastest at a few hundred.
CHUNK_INPUTS_MAX = 4096
TEXT_SIZE_MAX = 64 << 10
LIST_LENGTH_MAX = 4096
#: Lists and maps within each other; msgpack alone would give us a thousand.
NESTING_MAX = 32
INDEX_MAX = 1 << 40
ID_MAX = (1 << 63) - 1
BLOB_PART_SIZE_BYTES = 64 << 10
BLOB_SIZE_BYTES_MAX = 1 << 40
#: What a sender may have under way of one blob.
BLOB_CREDIT_BYTES = 4 * BLOB_PART_SIZE_BYTES
EPOCH_SHIFT = 40
#: Values in one frame about a queue or dict: a partition full of items, or its keys and values.
VALUES_MAX = 10_000
PARTITION_SIZE_MAX = 64
DICT_KEY_SIZE_MAX = 64 << 10


class Status(IntEnum):
    """What kind of output an input gave; one byte for each output of a frame."""

    #: The pickled value that the function returned.
    VALUE = 0
    #: The pickled exception that it raised (see `fanout.serialization`).
    ERROR = 1
    #: A generator has ended; the payload is the msgpack integer of how many items it gave.
    DONE = 2
    #: fanout ended the input: msgpack ``[code, text, details]``; see `FAILURE_CODES`.
    FAILURE = 3


#: Looked up for each frame: asking an enum costs more than the rest of the check.
STATUS_MAX = int(max(Status))

#: The first element of a `Status.FAILURE` payload, and what the client raises for it.
FAILURE_CODES = (
    "timeout",  # FunctionTimeoutError: the input ran longer than timeout=
    "crash",  # ContainerCrashedError: its container died under it
    "cancelled",  # InputCancelledError: somebody cancelled the call
    "start",  # ContainerStartError: no container of the function could start
    "deadlock",  # DeadlockError: only the call's own ancestors stand in its way
    "unplaceable",  # ResourceExhaustedError: no worker can ever run it
    "serialization",  # SerializationError: the value could not be pickled or unpickled
    "store",  # StorageError: the scheduler could not write it down (disk full)
    "internal",  # InternalError: a bug in fanout
)


class ObjectType(IntEnum):
    """What a stored object is."""

    QUEUE = 1
    DICT = 2


class OpenMode(IntEnum):
    """How `OpenObject` looks for an object."""

    FIND = 0
    MAKE_IF_MISSING = 1
    #: An error if there is one of that name.
    MAKE = 2
    #: In memory, without a name, as long as the client's session lives.
    EPHEMERAL = 3
    BY_ID = 4


class Action(IntEnum):
    """What `ObjectAction` asks for; the last three change something."""

    LEN = 0
    LEN_TOTAL = 1
    CLEAR = 2
    CLEAR_ALL = 3
    DELETE = 4


class Look(IntEnum):
    """What `DictGet` asks for; only POP changes something."""

    GET = 0
    CONTAINS = 1
    POP = 2


class Source(IntEnum):
    """Where the bytes of a log line were written."""

    STDOUT = 1
    STDERR = 2
    SYSTEM = 3


# --- field types -------------------------------------------------------------------------------

Check = Callable[[Any], bool]


class Between:
    """An integer from `low` to `high`, both included; a bool is not an integer here."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def as_code(self, value: str, own: str) -> str:
        """The same as an expression of Python; see `_compile_reader`."""
        return f"type({value}) is int and {self.low} <= {value} <= {self.high}"


class Sized:
    """A `kind` of at least `low` and at most `high` elements."""

    def __init__(self, kind: type, low: int, high: int) -> None:
        self.kind, self.low, self.high = kind, low, high

    def __call__(self, value: Any) -> bool:
        is_kind = type(value) is self.kind
        return is_kind and self.low <= len(value) <= self.high

    def as_code(self, value: str, own: str) -> str:
        """The same as an expression of Python; see `_compile_reader`."""
        kind = self.kind.__name__
        return f"type({value}) is {kind} and {self.low} <= len({value}) <= {self.high}"


class Usually:
    """A check that need not be called for the usual values.

    Args:
        usual: an expression of Python that is true for them; `{0}` stands for the value.
        check: what holds for all values.
    """

    def __init__(self, usual: str, check: Check) -> None:
        self.usual, self.check = usual, check

    def __call__(self, value: Any) -> bool:
        return self.check(value)

    def as_code(self, value: str, own: str) -> str:
        """The same as an expression of Python, where the name `own` is this check; see
        `_compile_reader`."""
        return f"{self.usual.format(value)} or {own}({value})"


class Plain(Sized):
    """A `kind` of plain data, not nested deeper than code can walk through it."""

    def as_code(self, value: str, own: str) -> str:
        return f"{own}({value})"

    def __call__(self, value: Any) -> bool:
        return super().__call__(value) and _is_plain(value, NESTING_MAX)


def _is_plain(value: Any, levels: int) -> bool:
    kind = type(value)
    if kind is list:
        return levels > 0 and all(_is_plain(element, levels - 1) for element in value)
    if kind is dict:
        return levels > 0 and all(_is_plain(element, levels - 1) for element in value.values())
    return value is None or kind in (bool, int, float, str, bytes)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) < 1e15


def _is_pairs(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) <= LIST_LENGTH_MAX
        and all(
            type(pair) is list
            and len(pair) == 2
            and all(type(n) is int and 0 <= n <= ID_MAX for n in pair)
            for pair in value
        )
    )


def _is_blob_refs(value: Any) -> bool:
    """``[[index in this frame, [blob id, ...]], ...]``"""
    return (
        type(value) is list
        and len(value) <= LIST_LENGTH_MAX
        and all(
            type(ref) is list
            and len(ref) == 2
            and type(ref[0]) is int
            and 0 <= ref[0] < CHUNK_INPUTS_MAX
            and _is_blob_ids(ref[1])
            for ref in value
        )
    )


def _is_blob_ids(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) <= LIST_LENGTH_MAX
        and all(type(blob_id) is bytes and len(blob_id) == 32 for blob_id in value)
    )


def _is_call_ids(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) <= LIST_LENGTH_MAX
        and all(type(call_id) is bytes and len(call_id) == 16 for call_id in value)
    )


def _is_lengths(value: Any) -> bool:
    return type(value) is bytes and len(value) % 4 == 0 and len(value) <= 4 * CHUNK_INPUTS_MAX


def _is_value_lengths(value: Any) -> bool:
    return type(value) is bytes and len(value) % 4 == 0 and len(value) <= 4 * VALUES_MAX


def _is_pair_or_none(value: Any) -> bool:
    return value is None or (_is_pairs([value]))


CallId = Annotated[bytes, Sized(bytes, 16, 16)]
AppId = Annotated[bytes, Sized(bytes, 16, 16)]
FunctionId = Annotated[bytes, Sized(bytes, 16, 16)]
SessionId = Annotated[bytes, Sized(bytes, 16, 16)]
WorkerId = Annotated[bytes, Sized(bytes, 16, 16)]
BlobId = Annotated[bytes, Sized(bytes, 32, 32)]
ObjectId = Annotated[bytes, Sized(bytes, 16, 16)]
ObjectName = Annotated[str, Sized(str, 0, 64)]
PartitionKey = Annotated[bytes, Sized(bytes, 0, PARTITION_SIZE_MAX)]
DictKey = Annotated[bytes, Sized(bytes, 1, DICT_KEY_SIZE_MAX)]
ItemNumber = Annotated[int, Between(0, ID_MAX)]
ValueLengths = Annotated[bytes, _is_value_lengths]
ContainerId = Annotated[int, Between(0, ID_MAX)]
LeaseId = Annotated[int, Between(0, ID_MAX)]
Index = Annotated[int, Between(0, INDEX_MAX)]
Count = Annotated[int, Between(0, INDEX_MAX)]
RequestId = Annotated[int, Between(0, ID_MAX)]
SmallInt = Annotated[int, Between(0, 255)]
Flag = Annotated[bool, Usually("{0} is True or {0} is False", lambda value: type(value) is bool)]
Number = Annotated[float, _is_number]
MethodName = Annotated[str, Sized(str, 0, 255)]
Text = Annotated[str, Sized(str, 0, TEXT_SIZE_MAX)]
Map = Annotated[dict[str, Any], Plain(dict, 0, LIST_LENGTH_MAX)]
Lengths = Annotated[bytes, Usually("type({0}) is bytes and len({0}) == 4", _is_lengths)]
Statuses = Annotated[bytes, Sized(bytes, 0, CHUNK_INPUTS_MAX)]
BlobRefs = Annotated[list[tuple[int, list[bytes]]], Usually("{0} == []", _is_blob_refs)]
BlobIds = Annotated[list[bytes], _is_blob_ids]
Pairs = Annotated[list[tuple[int, int]], _is_pairs]
MaybePair = Annotated[tuple[int, int] | None, Usually("{0} is None", _is_pair_or_none)]
Records = Annotated[list[Any], Plain(list, 0, 1 << 20)]
InnerHeader = Annotated[bytes, Sized(bytes, 1, frames.HEADER_SIZE_BYTES_MAX)]

#: Bytes on the way in; on the way out also a memoryview, so that a slice costs no copy.
Payload = bytes | memoryview


class Message:
    """Base of all messages: `KIND` and how to check a field.

    Equality and repr are written once here: generated for each class they would double the time
    that importing this module takes, which every process pays.
    """

    __slots__ = ()
    KIND: ClassVar[int]
    CHECKS: ClassVar[tuple[tuple[str, Check], ...]]
    #: Gives the values of all fields but the payload.
    FIELDS: ClassVar[Callable[[Any], tuple[Any, ...]]]
    HAS_PAYLOAD: ClassVar[bool]
    #: Makes one of a decoded header and a payload; itself made when the first one is decoded.
    READ: ClassVar[Callable[[list[Any], bytes], "Message"] | None] = None
    #: Whether there is a length table, and a status for each of its elements, to be checked.
    HAS_LENGTHS: ClassVar[bool]
    HAS_STATUSES: ClassVar[bool]

    def _values(self) -> list[Any]:
        values = list(type(self).FIELDS(self))
        if self.HAS_PAYLOAD:
            values.append(bytes(self.payload))  # type: ignore[attr-defined]
        return values

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_shown(getattr(self, name))}" for name, _ in self.CHECKS)
        if self.HAS_PAYLOAD:
            shown += f", payload of {len(self.payload)} bytes"  # type: ignore[attr-defined]
        return f"{type(self).__name__}({shown})"


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if not names:
        return lambda message: ()
    if len(names) > 1:
        return attrgetter(*names)
    first = attrgetter(names[0])
    return lambda message: (first(message),)


#: Which class a kind is.
KINDS: dict[int, type[Message]] = {}

M = TypeVar("M")


@dataclass_transform()
def _message(kind: int) -> Callable[[type[M]], type[M]]:
    """Register a dataclass as the message of this kind and derive its field checks."""

    def register(cls: type[M]) -> type[M]:
        made = dataclass(slots=True, eq=False, repr=False, match_args=False)(cls)
        # Annotations are objects and not strings in this module: reading them costs nothing.
        hints = made.__annotations__
        names = [f.name for f in fields(made)]  # type: ignore[arg-type]
        checks = []
        for name in names:
            if name == "payload":
                continue
            hint: Any = hints[name]
            assert get_origin(hint) is Annotated, f"{cls.__name__}.{name} has no check"
            checks.append((name, get_args(hint)[1]))
        assert kind not in KINDS
        assert "payload" not in names[:-1], "the payload is the last field"
        made.KIND = kind  # type: ignore[attr-defined]
        made.CHECKS = tuple(checks)  # type: ignore[attr-defined]
        made.FIELDS = staticmethod(_getter([name for name, _ in checks]))  # type: ignore[attr-defined]
        made.HAS_PAYLOAD = "payload" in names  # type: ignore[attr-defined]
        made.HAS_LENGTHS = "lengths" in names  # type: ignore[attr-defined]
        made.HAS_STATUSES = "statuses" in names  # type: ignore[attr-defined]
        KINDS[kind] = made  # type: ignore[assignment]
        return made

    return register


# --- handshake (see handshake.py for the proof) --------------------------------------------------


@_message(1)
class Hello(Message):
    """Dialler's first frame. `info` is plain data about it: hostname, pid, Python and fanout
    versions."""

    protocol: Count
    role: Text
    token_id: Text
    session_id: SessionId
    nonce: Annotated[bytes, Sized(bytes, 32, 32)]
    info: Map


@_message(2)
class Challenge(Message):
    """The scheduler's answer: its nonce, and the proof that it too holds the secret."""

    protocol: Count
    nonce: Annotated[bytes, Sized(bytes, 32, 32)]
    proof: Annotated[bytes, Sized(bytes, 32, 32)]


@_message(3)
class Proof(Message):
    proof: Annotated[bytes, Sized(bytes, 32, 32)]


@_message(4)
class Welcome(Message):
    """The connection is open. `epoch` is the scheduler's life number, `info` its versions."""

    epoch: Count
    info: Map


@_message(5)
class Goodbye(Message):
    """Why the sender closes the connection: a code for programs and a sentence for people."""

    code: Text
    text: Text


@_message(6)
class Heartbeat(Message):
    """A worker is alive. Any byte counts as life; this is for when there is nothing to say."""

    sequence: Count


# --- client to scheduler -------------------------------------------------------------------------


@_message(20)
class OpenApp(Message):
    """An app run begins. Sending it again after a reconnect is harmless."""

    app_id: AppId
    name: Text


@_message(21)
class CloseApp(Message):
    """The run is over: its attached calls are cancelled, its containers leave when its spawned
    calls have ended."""

    app_id: AppId


@_message(22)
class DefineFunction(Message):
    """What to run and how. Also sent by the scheduler to each worker before first use.

    `options` is plain data: `timeout` (s), `retries` ([max_retries, initial_delay,
    backoff_coefficient, max_delay] or None), `max_containers` (int or None), `cpu` (cores, float
    or None for the default), `memory` (MiB, 0 for none), `is_generator`, `is_async`,
    `scaledown_window` (s), `environment` (hex fingerprint: functions with the same one share
    templates), `python` (interpreter of the client, with its version, for messages).
    `blobs` must be present before a container starts. `payload` is what only containers read.
    """

    function_id: FunctionId
    app_id: AppId
    name: Text
    options: Map
    blobs: BlobIds
    payload: Payload


@_message(23)
class OpenCall(Message):
    """A call begins. Sent again under the same id after a reconnect, with `is_resumed`; the
    answer, `CallOpened`, says which inputs the scheduler still has. A new attached call gets no
    answer: it begins with the smallest window, and an answer would cost each single call a frame.

    `is_durable`: a spawned call; it outlives the client and is acknowledged only when stored.
    `parent`: (lease id, index) of the input that makes this nested call, None at top level.
    `method`: which method, where the definition is a class; "" for a function.
    """

    call_id: CallId
    function_id: FunctionId
    is_durable: Flag
    is_ordered: Flag
    parent: MaybePair
    is_resumed: Flag = False
    method: MethodName = ""


@_message(24)
class Inputs(Message):
    """A chunk: consecutive inputs from `start`. `lengths` holds the size of each as u32 little
    endian; the payload is their bytes end to end. `blobs` names the large buffers that stand
    beside some of them, counted from the frame's first input."""

    call_id: CallId
    start: Index
    lengths: Lengths
    blobs: BlobRefs
    payload: Payload


@_message(25)
class SealCall(Message):
    """No input follows; the call has `count`."""

    call_id: CallId
    count: Count


@_message(26)
class Ack(Message):
    """Outputs that the client now has, as (start, count) ranges, and how far its user is:
    outputs and bytes of outputs consumed, counted from the call's beginning. The scheduler
    forgets what was received, and what was consumed makes room for more."""

    call_id: CallId
    received: Pairs
    consumed_count: Count
    consumed_bytes: Count


@_message(27)
class ItemCredit(Message):
    """Items of input `index` with numbers below `upto` may be sent, and those below `received`
    are safe with the client: the scheduler forgets them, and a generator that must run again
    skips them."""

    call_id: CallId
    index: Index
    upto: Count
    received: Count = 0


@_message(28)
class CancelCall(Message):
    call_id: CallId


@_message(29)
class FetchOutputs(Message):
    """Send the outputs of inputs `start` to `stop` of a durable call, each as soon as it is
    there. The answer is `Outputs` frames; `CallInfo` when there is no such call."""

    request_id: RequestId
    call_id: CallId
    start: Index
    stop: Index


@_message(30)
class StopFetch(Message):
    request_id: RequestId


@_message(31)
class AskCall(Message):
    """Answered by `CallInfo`."""

    request_id: RequestId
    call_id: CallId


@_message(32)
class AskStatus(Message):
    """Answered by `StatusInfo`."""

    request_id: RequestId


@_message(33)
class SessionWaits(Message):
    """From a client inside a container: all that its running inputs do is wait for their calls.
    `seen` counts the frames of the kinds in `ENDS_WAIT` that this session has received, so that a
    wait which one on the wire may already have ended is not taken for one. Sent when a wait
    begins, and again after each such frame that did not end it."""

    seen: Count


@_message(34)
class AskShutdown(Message):
    """`fanout stop`: leave now (`force`), or only when nothing is running or queued."""

    request_id: RequestId
    force: Flag


@_message(35)
class SessionRuns(Message):
    """From a client inside a container: the wait that it told of last is over, and no frame of the
    scheduler ended it; somebody cancelled the input, or gave up waiting. What runs in the container
    from here on needs its core, whether or not that is free."""


@_message(36)
class SubmitCall(Message):
    """`OpenCall`, `Inputs` from index 0 and `SealCall` in one frame, for a call whose inputs are
    all there when it begins. A single call costs one frame instead of three."""

    call_id: CallId
    function_id: FunctionId
    is_durable: Flag
    is_ordered: Flag
    parent: MaybePair
    method: MethodName
    lengths: Lengths
    blobs: BlobRefs
    payload: Payload


@_message(37)
class CallsFinished(Message):
    """All outputs of these attached calls have reached their client, which lets go of them: so
    may the scheduler."""

    call_ids: Annotated[list[bytes], _is_call_ids]


@_message(38)
class AskFunction(Message):
    """How busy is a function, and how is it scaled? `changes`, if there are any, are made first:
    `min_containers`, `max_containers`, `buffer_containers`, `scaledown_window`. Answered by
    `FunctionInfo`."""

    request_id: RequestId
    function_id: FunctionId
    changes: Map


# --- scheduler to client -------------------------------------------------------------------------


@_message(40)
class CallOpened(Message):
    """The call exists. `window_count` and `window_bytes` are the credit: so many inputs, and so
    many bytes of them, may be sent beyond what the user has consumed. `present` lists the inputs
    that the scheduler holds or has an output of, as (start, count). For a durable call all this
    is true on disk."""

    call_id: CallId
    window_count: Count
    window_bytes: Count
    present: Pairs


@_message(41)
class Window(Message):
    """The credit of a call has changed."""

    call_id: CallId
    window_count: Count
    window_bytes: Count


@_message(42)
class Outputs(Message):
    """Outputs of consecutive inputs from `start`, one status byte and one u32 length each."""

    call_id: CallId
    start: Index
    lengths: Lengths
    statuses: Statuses
    blobs: BlobRefs
    payload: Payload


@_message(43)
class Items(Message):
    """Items of one generator, numbered from `number`."""

    call_id: CallId
    index: Index
    number: Count
    lengths: Lengths
    blobs: BlobRefs
    payload: Payload


@_message(44)
class CallFailed(Message):
    """Every input of the call that has no output yet ends like this. `status` is ERROR (a pickled
    exception, when a container could not start) or FAILURE."""

    call_id: CallId
    status: SmallInt
    payload: Payload


@_message(45)
class InputsStored(Message):
    """Inputs of a durable call that are on disk, as (start, count); `is_sealed` too when so."""

    call_id: CallId
    stored: Pairs
    is_sealed: Flag


@_message(46)
class CallInfo(Message):
    """`state` is one of unknown, expired, open, sealed, finished, cancelled, failed."""

    request_id: RequestId
    call_id: CallId
    state: Text
    input_count: Count
    output_count: Count
    function_name: Text
    is_generator: Flag


@_message(54)
class FunctionInfo(Message):
    """Answer to `AskFunction`: what is set (the names of its `changes`) and `backlog`,
    `containers`, `running`, `headroom`; or `error`, why the changes were not made."""

    request_id: RequestId
    info: Map


@_message(47)
class StatusInfo(Message):
    request_id: RequestId
    status: Map


@_message(48)
class Log(Message):
    """Text that a container wrote, for the client whose call it ran."""

    call_id: CallId
    index: Index
    container_id: ContainerId
    source: SmallInt
    payload: Payload


@_message(49)
class Notice(Message):
    """A sentence for the person at the client, once: why nothing runs, what would be faster."""

    code: Text
    text: Text


@_message(50)
class ShutdownInfo(Message):
    """Answer to `AskShutdown`: whether the scheduler leaves, and what still runs if not."""

    request_id: RequestId
    is_leaving: Flag
    text: Text


# --- scheduler to worker -------------------------------------------------------------------------


@_message(60)
class WorkerAccepted(Message):
    """Answer to `WorkerReady`: ids of the containers to keep; all others are killed."""

    keep: Records


@_message(61)
class StartContainer(Message):
    container_id: ContainerId
    function_id: FunctionId


@_message(62)
class StopContainer(Message):
    """Leave when idle (`kill` false), or now."""

    container_id: ContainerId
    kill: Flag


@_message(63)
class Lease(Message):
    """Run inputs `start`, `start` + 1, ... (one for each length) of a call: one after another, or
    all at once where the definition has `max_inputs` or `batch`. `method` as in `OpenCall`.

    `credit` and `skip` matter to generators: items below `credit` may be sent, and the first
    `skip` items are made and thrown away because somebody has them already.
    """

    container_id: ContainerId
    lease_id: LeaseId
    call_id: CallId
    start: Index
    lengths: Lengths
    blobs: BlobRefs
    skip: Count
    credit: Count
    method: MethodName
    payload: Payload


@_message(64)
class Reclaim(Message):
    """Give back the tail of a lease: keep at most `keep` of the inputs that have not begun.
    Answered by `Reclaimed`."""

    lease_id: LeaseId
    keep: Count


@_message(65)
class CancelLease(Message):
    """Begin no further input of the lease, and stop the one that runs. Answered by `Reclaimed`;
    the input that ran gives an output."""

    lease_id: LeaseId


@_message(66)
class LeaseCredit(Message):
    """`ItemCredit`, addressed to the lease that runs the generator."""

    lease_id: LeaseId
    upto: Count


@_message(67)
class OutputsAck(Message):
    """All reports with a sequence number up to this one are safe; the worker forgets them."""

    sequence: Count


@_message(68)
class DropFunction(Message):
    function_id: FunctionId


@_message(69)
class Relay(Message):
    """One frame of a nested client: its header, and its payload untouched. Both ways."""

    session_id: SessionId
    header: InnerHeader
    payload: Payload


# --- worker to scheduler -------------------------------------------------------------------------


@_message(80)
class WorkerReady(Message):
    """First message of a worker, after each connect.

    `containers` are those still alive, as [container id, function id]; `leases` the ids of the
    leases it still holds. Reports that were not acknowledged follow.
    """

    worker_id: WorkerId
    name: Text
    cpu: Number
    memory: Count
    is_embedded: Flag
    containers: Records
    leases: Records


@_message(81)
class ContainerStarted(Message):
    """The user's code is imported and the container takes leases."""

    container_id: ContainerId
    pid: Count
    start_time_s: Number


@_message(82)
class ContainerExited(Message):
    """A container is gone. All that it finished has been reported before this.

    `reason`: stopped (as ordered), start (it never became ready), timeout, cancelled, crash.
    `running`: (lease id, index) of the inputs that were running. `details` is plain data: exit
    code, signal, peak memory in MiB, text. The payload is the pickled exception for `start`.
    """

    container_id: ContainerId
    reason: Text
    running: Pairs
    details: Map
    payload: Payload


@_message(83)
class LeaseOutputs(Message):
    """Outputs of consecutive inputs of a lease. `busy_us` is the time that running them took,
    in the container."""

    sequence: Count
    lease_id: LeaseId
    call_id: CallId
    start: Index
    busy_us: Count
    lengths: Lengths
    statuses: Statuses
    blobs: BlobRefs
    payload: Payload


@_message(84)
class LeaseItems(Message):
    sequence: Count
    lease_id: LeaseId
    call_id: CallId
    index: Index
    number: Count
    lengths: Lengths
    blobs: BlobRefs
    payload: Payload


@_message(85)
class Reclaimed(Message):
    """Answer to `Reclaim` and `CancelLease`: the lease now ends before index `stop`."""

    lease_id: LeaseId
    stop: Index


@_message(86)
class LeaseWaits(Message):
    """The generator that runs under this lease has used its credit and waits for items from
    `upto` on to be allowed."""

    lease_id: LeaseId
    upto: Count


@_message(87)
class ContainerLog(Message):
    container_id: ContainerId
    call_id: Annotated[bytes, Sized(bytes, 0, 16)]
    index: Index
    source: SmallInt
    payload: Payload


@_message(90)
class CpuTimes(Message):
    """(container id, milliseconds of processor time so far, its children's included), of the
    containers that have leases. Sent with each heartbeat."""

    times: Pairs


@_message(88)
class SessionOpened(Message):
    """A container begins to make nested calls; frames of its client follow as `Relay`."""

    session_id: SessionId
    container_id: ContainerId


@_message(89)
class SessionClosed(Message):
    """The nested client is gone (worker to scheduler), or not welcome (scheduler to worker)."""

    session_id: SessionId


# --- blobs, on any connection and both ways -------------------------------------------------------


@_message(100)
class BlobOffer(Message):
    """The sender refers to this blob in a later frame. Answered by `BlobWanted` or `BlobHeld`."""

    blob_id: BlobId
    size: Annotated[int, Between(0, BLOB_SIZE_BYTES_MAX)]


@_message(101)
class BlobWanted(Message):
    blob_id: BlobId


@_message(102)
class BlobHeld(Message):
    """The blob is here, whole: since before it was offered, or since its last part."""

    blob_id: BlobId


@_message(103)
class BlobPart(Message):
    """Bytes of a blob at `offset`, in order; the last part completes it."""

    blob_id: BlobId
    offset: Annotated[int, Between(0, BLOB_SIZE_BYTES_MAX)]
    payload: Payload


@_message(104)
class BlobDrop(Message):
    """The scheduler needs this blob no longer at this worker."""

    blob_id: BlobId


@_message(105)
class BlobCredit(Message):
    """Bytes of the blob below `upto` may be sent. `BlobWanted` allows the first
    `BLOB_CREDIT_BYTES`. So only little of a blob is ever on the wire, and a small frame behind it
    waits for that little and not for what all buffers on the way hold."""

    blob_id: BlobId
    upto: Annotated[int, Between(0, 2 * BLOB_SIZE_BYTES_MAX)]


@_message(106)
class BlobRefused(Message):
    """The receiver drops what it has of the blob. It cannot keep it now, its disk being full, and
    may be offered it again later; or what came is broken: its digest is not the blob's id."""

    blob_id: BlobId
    is_broken: Flag
    text: Text


# --- progress: for a client that shows it --------------------------------------------------------


@_message(140)
class WatchProgress(Message):
    """From a client: say how its calls get on, from now on, or no more. Without it the scheduler
    counts and sends nothing for the sake of being looked at."""

    is_on: Flag


@_message(141)
class CallProgress(Message):
    """How one call gets on, with the calls that its containers make: to a client that watches, when
    something has changed and a few times a second at most. Before the first text of a nested call,
    too, whose name the client would not know. `running` counts inputs, `starting` containers that
    are not ready yet. `waits_for` is for people."""

    call_id: CallId
    name: Text
    is_durable: Flag
    is_nested: Flag
    is_sealed: Flag
    is_over: Flag
    input_count: Count
    finished_count: Count
    running: Count
    starting: Count
    waits_for: Text


@_message(142)
class FunctionProgress(Message):
    """Inputs of one function that run, and containers of it that are being started."""

    function_id: FunctionId
    name: Text
    running: Count
    starting: Count


# --- only in the store ---------------------------------------------------------------------------


@_message(110)
class CallEnded(Message):
    """A durable call has all its outputs, or failed, at this time (seconds since 1970). Its
    results are kept from then on, restarts or not. Nobody sends this."""

    call_id: CallId
    ended_at: Number


@_message(150)
class CallExpired(Message):
    """The results of a durable call were kept until this time (seconds since 1970). Remembered for
    a while, so that whoever asks is told more than of a call that never was. Nobody sends this."""

    call_id: CallId
    expired_at: Number


# --- cancelling with force, call graphs -----------------------------------------------------------


@_message(155)
class TerminateCall(Message):
    """As `CancelCall`, and the containers that run the call are killed."""

    call_id: CallId


@_message(156)
class AskCallGraph(Message):
    """Which calls the inputs of a spawned call have made. Answered by `CallGraph`."""

    request_id: RequestId
    call_id: CallId


@_message(157)
class CallGraph(Message):
    """`graph` is empty when there is no such call; else `calls`, `inputs` and `is_cut`, as the
    scheduler's `core/graph.py` writes them."""

    request_id: RequestId
    graph: Map


# --- queues and dicts ----------------------------------------------------------------------------
#
# Each request is known by its session and its number, and is done once, however often it comes: see
# `scheduler/fanout_scheduler/core/objects.py` for the rule. All are answered by `ObjectAnswer`.


@_message(120)
class OpenObject(Message):
    """Find or make a queue or dict. `object_id` is the one to look for (BY_ID), or the one that a
    new object gets. The answer's `info` is [id, name, time of its making in seconds since 1970]."""

    request_id: RequestId
    object_id: ObjectId
    object_type: Annotated[int, Between(1, 2)]
    name: ObjectName
    mode: Annotated[int, Between(0, 4)]


@_message(121)
class ListObjects(Message):
    """The named objects of a type, in the order of their names, from the first one behind `after`.
    The answer's `info` is a list of what `OpenObject` gives; an empty one is the end."""

    request_id: RequestId
    object_type: Annotated[int, Between(1, 2)]
    after: ObjectName


@_message(122)
class QueuePut(Message):
    """Append all of these items or, if there is no room, wait (`block`) or answer "full"."""

    request_id: RequestId
    object_id: ObjectId
    partition: PartitionKey
    ttl_s: Number
    block: Flag
    lengths: ValueLengths
    payload: Payload


@_message(123)
class QueueGet(Message):
    """Take up to `count` items, as soon as there is one; with nothing there wait (`block`) or
    answer "empty"."""

    request_id: RequestId
    object_id: ObjectId
    partition: PartitionKey
    count: Count
    block: Flag


@_message(124)
class QueuePeek(Message):
    """Like `QueueGet`, of items with a number above `after`, and leave them there. The answer's
    `number` is that of the last one."""

    request_id: RequestId
    object_id: ObjectId
    partition: PartitionKey
    after: ItemNumber
    count: Count
    block: Flag


@_message(125)
class DictPut(Message):
    """Set entries: the table holds key, value, key, value, ... With `if_missing` only those whose
    key is not there; the answer's `number` is how many were set."""

    request_id: RequestId
    object_id: ObjectId
    if_missing: Flag
    lengths: ValueLengths
    payload: Payload


@_message(126)
class DictGet(Message):
    """Look a key up, the payload, as `Look` says. The answer's `number` is 1 if it was there."""

    request_id: RequestId
    object_id: ObjectId
    look: Annotated[int, Between(0, 2)]
    payload: Payload


@_message(127)
class DictScan(Message):
    """A page of entries with numbers above `after`: keys, values, or key, value, key, value, ...
    The answer's `number` is that of the last one; a page without entries is the end."""

    request_id: RequestId
    object_id: ObjectId
    after: ItemNumber
    has_keys: Flag
    has_values: Flag


@_message(128)
class ObjectAction(Message):
    """See `Action`; the answer's `number` is a length."""

    request_id: RequestId
    object_id: ObjectId
    action: Annotated[int, Between(0, 4)]
    partition: PartitionKey


@_message(129)
class CancelRequest(Message):
    """End a request that waits: the answer's `number` is 1 if nothing came of it, 0 if it was done
    already. With `is_abandoned` nobody will take its answer: what it took out of a queue goes back
    to its place, and the answer to this says that it will be there after a restart too."""

    request_id: RequestId
    target: RequestId
    is_abandoned: Flag


@_message(130)
class RequestsDone(Message):
    """The answers of these requests, as (first, count), have arrived. The scheduler forgets them,
    and what they took out of a queue is gone."""

    requests: Pairs


@_message(131)
class RequestsRepeated(Message):
    """After a reconnect, behind the `count` requests that the client sends again: the answers of
    all its other requests have arrived."""

    count: Count


@_message(132)
class ObjectAnswer(Message):
    """What came of a request. `code` is one of `ANSWER_CODES`; `info` is [sentence] for an
    error."""

    request_id: RequestId
    code: Text
    number: ItemNumber
    info: Records
    lengths: ValueLengths
    payload: Payload


#: `ObjectAnswer.code`, and what the client makes of it.
ANSWER_CODES = (
    "ok",
    "empty",  # queue.Empty, or the end
    "full",  # queue.Full
    "missing",  # NotFoundError: no such object
    "exists",  # AlreadyExistsError
    "invalid",  # InvalidError
    "size",  # RequestSizeError
    "exhausted",  # ResourceExhaustedError: the scheduler has no memory for it
    "store",  # StorageError
    "cancelled",  # nobody waits for it any more
)


@_message(136)
class ObjectMade(Message):
    """Only in the store: a named object."""

    object_id: ObjectId
    object_type: Annotated[int, Between(1, 2)]
    name: ObjectName
    made_at: Number


@_message(137)
class QueueItem(Message):
    """Only in the store: an item, with the time (since 1970) at which its partition expires."""

    object_id: ObjectId
    number: ItemNumber
    partition: PartitionKey
    expires_at: Number
    payload: Payload


@_message(138)
class DictEntry(Message):
    """Only in the store: a key and its value."""

    object_id: ObjectId
    number: ItemNumber
    key: DictKey
    payload: Payload


@_message(139)
class Receipt(Message):
    """Only in the store: a request was done, and its client has not said that it knows. `items`
    are the numbers of those that it took out of a queue; the rest is its answer."""

    object_id: ObjectId
    session_id: SessionId
    request_id: RequestId
    partition: PartitionKey
    items: Records
    number: ItemNumber
    lengths: ValueLengths
    payload: Payload


# --- who may send what ----------------------------------------------------------------------------

#: What transfers of blobs consist of.
BLOB_KINDS = frozenset({BlobOffer, BlobWanted, BlobHeld, BlobPart, BlobCredit, BlobRefused})

#: Requests about queues and dicts, and what a client says about them.
OBJECT_REQUESTS: frozenset[type[Message]] = frozenset({
    OpenObject, ListObjects, QueuePut, QueueGet, QueuePeek, DictPut, DictGet, DictScan,
    ObjectAction, CancelRequest, RequestsDone, RequestsRepeated,
})  # fmt: skip

#: A worker's token cannot submit calls: these sets are checked against the role that was proved.
FROM_CLIENT: frozenset[type[Message]] = BLOB_KINDS | OBJECT_REQUESTS | {
    Goodbye, Heartbeat, OpenApp, CloseApp, DefineFunction, OpenCall, SubmitCall, Inputs, SealCall,
    Ack, CallsFinished,
    ItemCredit, CancelCall, FetchOutputs, StopFetch, AskCall, AskFunction, AskStatus, AskShutdown,
    TerminateCall, AskCallGraph, WatchProgress,
}  # fmt: skip
FROM_NESTED_CLIENT: frozenset[type[Message]] = (FROM_CLIENT | {SessionWaits, SessionRuns}) - {
    AskShutdown, AskStatus, OpenApp, CloseApp, WatchProgress,
}  # fmt: skip
FROM_WORKER: frozenset[type[Message]] = BLOB_KINDS | {
    Goodbye, Heartbeat, WorkerReady, ContainerStarted, ContainerExited, LeaseOutputs, LeaseItems,
    Reclaimed, LeaseWaits, ContainerLog, CpuTimes, SessionOpened, SessionClosed, Relay,
}  # fmt: skip
TO_CLIENT: frozenset[type[Message]] = BLOB_KINDS | {
    Goodbye, Heartbeat, CallOpened, Window, Outputs, Items, CallFailed, InputsStored, CallInfo,
    FunctionInfo, StatusInfo, Log, Notice, ShutdownInfo, CallGraph, CallProgress,
    FunctionProgress, ObjectAnswer,
}  # fmt: skip
TO_WORKER: frozenset[type[Message]] = BLOB_KINDS | {
    Goodbye, Heartbeat, WorkerAccepted, DefineFunction, DropFunction, StartContainer,
    StopContainer, Lease, Reclaim, CancelLease, LeaseCredit, OutputsAck, Relay, SessionClosed,
    BlobDrop,
}  # fmt: skip

#: Frames that can end a client's wait. While a container waits, the scheduler holds them back until
#: the container has its core again.
ENDS_WAIT: frozenset[type[Message]] = frozenset(
    {
        Outputs,
        Items,
        CallFailed,
        InputsStored,
        CallInfo,
        FunctionInfo,
        StatusInfo,
        CallGraph,
        ObjectAnswer,
    }
)

# --- codec ----------------------------------------------------------------------------------------

#: A payload of at most this is copied behind its header, as that costs less than a buffer more.
COPIED_SIZE_BYTES_MAX = 1024
#: A length table of one element.
_LENGTH = struct.Struct("=I")
_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack
_unpack = partial(msgpack.unpackb, use_list=True, raw=False, strict_map_key=True, max_ext_len=0)


def encode_header(message: Message) -> bytes:
    """The header of a message's frame, without the payload."""
    header: bytes = _pack((message.KIND, *type(message).FIELDS(message)))
    return header


def encode(message: Message) -> list[Payload]:
    """The buffers of a message's frame, to be written in this order.

    Raises:
        ProtocolError: the frame would be over a limit of `frames.py`.
    """
    cls = type(message)
    header = _pack((cls.KIND, *cls.FIELDS(message)))
    if not cls.HAS_PAYLOAD:
        return [frames.prefix(header, 0) + header]
    payload: Payload = message.payload  # type: ignore[attr-defined]
    size = len(payload)
    start = frames.prefix(header, size) + header
    return [start + payload] if size <= COPIED_SIZE_BYTES_MAX else [start, payload]


def decode(header: bytes, payload: bytes) -> Message:
    """The message of a frame, every field checked.

    Raises:
        ProtocolError: not msgpack, not a known kind, a field missing, ill-typed or out of bounds.
            Nothing else is raised, whatever the bytes are.
    """
    try:
        values = _unpack(header)
    except Exception as error:
        raise ProtocolError(f"frame header is not msgpack: {error}") from error
    if type(values) is not list or not values or type(values[0]) is not int:
        raise ProtocolError("frame header is not an array that begins with a kind")
    cls = KINDS.get(values[0])
    if cls is None:
        raise ProtocolError(f"unknown message kind {values[0]}")
    return (cls.READ or _compile_reader(cls))(values, payload)


#: What `_compile_reader` fills in. A frame of one element needs no look at a table.
_READER = """
def read(values, payload):
    if len(values) != {count}:
        raise fault_of(cls, values, payload)
    _, {fields} = values
    if not ({valid}):
        raise fault_of(cls, values, payload)
    return cls({arguments})
"""
_SINGLE = "len({lengths}) == 4 and int_of({lengths})[0] == len(payload)"
_SINGLE_STATUS = "len({statuses}) == 1 and {statuses}[0] <= " + str(int(STATUS_MAX))


def _compile_reader(cls: type[Message]) -> Callable[[list[Any], bytes], Message]:
    """What reads a kind, as one function, as `dataclasses` makes its methods: calling the checks
    one by one would be half of what decoding a small frame costs."""
    names: dict[str, Any] = {
        "cls": cls, "fault_of": _fault_of, "int_of": _LENGTH.unpack, "fits": _fits,
    }  # fmt: skip
    # A field may be called what the code calls something else.
    own = {name: f"field_{name}" for name, _ in cls.CHECKS}
    terms = []
    for name, check in cls.CHECKS:
        names[f"check_{name}"] = check
        as_code = getattr(check, "as_code", None)
        call = f"check_{name}({own[name]})"
        terms.append(as_code(own[name], f"check_{name}") if as_code else call)
    if not cls.HAS_PAYLOAD:
        terms.append("not payload")
    if cls.HAS_STATUSES:
        fits = "fits({lengths}, payload, {statuses})"
        terms.append(f"{_SINGLE} and {_SINGLE_STATUS} or {fits}".format(**own))
    elif cls.HAS_LENGTHS:
        terms.append((_SINGLE + " or fits({lengths}, payload)").format(**own))
    code = _READER.format(
        count=len(own) + 1,
        fields="".join(f"{name}, " for name in own.values()),
        valid=" and ".join(f"({term})" for term in terms) or "True",
        arguments=", ".join([*own.values(), *(["payload"] if cls.HAS_PAYLOAD else [])]),
    )
    exec(code, names)
    read: Callable[[list[Any], bytes], Message] = names["read"]
    cls.READ = staticmethod(read)
    return read


def _fits(lengths: bytes, payload: bytes, statuses: bytes | None = None) -> bool:
    """Whether a length table describes the payload exactly, and there is a status, and one that
    exists, for each of its elements."""
    if sum(memoryview(lengths).cast("I")) != len(payload):
        return False
    if statuses is None:
        return True
    return 4 * len(statuses) == len(lengths) and max(statuses, default=0) <= STATUS_MAX


def _fault_of(cls: type[Message], values: list[Any], payload: bytes) -> ProtocolError:
    """What is wrong with a frame."""
    name = cls.__name__
    if len(values) != len(cls.CHECKS) + 1:
        return ProtocolError(
            f"{name} has {len(cls.CHECKS)} fields, the frame gave {len(values) - 1}"
        )
    for position, (field, is_valid) in enumerate(cls.CHECKS, 1):
        if not is_valid(values[position]):
            return ProtocolError(f"{name}.{field} is not valid: {_shown(values[position])}")
    if payload and not cls.HAS_PAYLOAD:
        return ProtocolError(f"{name} carries no payload, the frame gave {len(payload)}")
    fields = dict(zip((field for field, _ in cls.CHECKS), values[1:], strict=True))
    return _fault_of_table(name, fields["lengths"], payload, fields.get("statuses"))


def _fault_of_table(
    name: str, lengths: bytes, payload: bytes, statuses: bytes | None
) -> ProtocolError:
    total = sum(memoryview(lengths).cast("I"))
    if total != len(payload):
        text = f"{name}.lengths add up to {total}, the payload has {len(payload)}"
        return ProtocolError(text)
    assert statuses is not None, f"nothing is wrong with {name}"
    if 4 * len(statuses) != len(lengths):
        text = f"{name} has {len(statuses)} statuses for {len(lengths) // 4} outputs"
        return ProtocolError(text)
    return ProtocolError(f"{name}.statuses holds the unknown status {max(statuses)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep"
    return text if len(text) <= 80 else text[:77] + "..."


def failure_payload(code: str, text: str, details: dict[str, Any] | None = None) -> bytes:
    """The payload of a `Status.FAILURE` output."""
    assert code in FAILURE_CODES, code
    packed: bytes = msgpack.packb([code, text, details or {}])
    return packed


__all__ = [name for name, value in list(globals().items()) if isinstance(value, type)] + [
    "decode",
    "encode",
    "encode_header",
    "failure_payload",
]
