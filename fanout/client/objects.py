"""What queues and dicts have in common on the client's side: requests, handles, managers.

The scheduler does each request once (see `scheduler/fanout_scheduler/core/object_requests.py`).
Our part of that: a request is sent again after each reconnect until its answer has been taken, then
`RequestsDone` says so; one that nobody waits for any more is cancelled as abandoned, which puts
back what it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from fanout import exceptions
from fanout.exceptions import InvalidError
from fanout.protocol import messages as m
from fanout.twin import twin

if TYPE_CHECKING:
    from fanout.client.session import Session

H = TypeVar("H", bound="Handle")
R = TypeVar("R")

#: An answer within this time is none that one waits for, and a container keeps its core.
WAIT_GRACE_S = 0.005
#: How long the end of an ephemeral object waits for the scheduler, which ends it anyway.
CLOSE_TIMEOUT_S = 3.0

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ERRORS: dict[str, type[exceptions.Error]] = {
    "missing": exceptions.NotFoundError,
    "exists": exceptions.AlreadyExistsError,
    "invalid": exceptions.InvalidError,
    "size": exceptions.RequestSizeError,
    "exhausted": exceptions.ResourceExhaustedError,
    "store": exceptions.StorageError,
}
#: Requests that the scheduler keeps a receipt of.
_CHANGES = (m.QueuePut, m.QueueGet, m.DictPut, m.DictGet, m.ObjectAction)


# --- requests ------------------------------------------------------------------------------------


async def exchange(
    make: Callable[[int], m.Message],
    take: Callable[[m.ObjectAnswer], R],
    *,
    timeout: float | None = None,
    waits: bool = False,
) -> R | None:
    """Send a request and take its answer; None when there is nothing to take: the queue is empty
    or full, or the time is up.

    Args:
        make: gives the message for a request number.
        take: makes the result of an answer. If it raises, what came out of a queue goes back.
        timeout: seconds that a request which `waits` may wait; None for ever.

    Raises:
        Error: what the scheduler refuses it with.
    """
    from fanout.client.sessions import connected

    session = await connected()
    session.uses_objects = True
    question = make(session.next_request())
    number: int = question.request_id  # type: ignore[attr-defined]
    future = session.post(question)
    result: R | None = None
    try:
        answer: m.ObjectAnswer | None
        answer = await (_wait(session, question, future, timeout) if waits else future)
        if answer is not None and answer.code == "ok":
            result = take(answer)
    except BaseException:
        if waits or isinstance(question, _CHANGES):
            _abandon(session, number)
        raise
    finally:
        session.drop_request(number)
    if answer is None or answer.code in ("empty", "full", "cancelled"):
        return None
    if answer.code != "ok":
        text = str(answer.info[0]) if answer.info else answer.code
        raise _ERRORS.get(answer.code, exceptions.InternalError)(text)
    if isinstance(question, m.QueueGet):
        # Before the caller has the items: if it dies of them, they are not to come again.
        session.send(m.RequestsDone([(number, 1)]))
    elif isinstance(question, _CHANGES):
        session.send_lazily(m.RequestsDone([(number, 1)]))
    return result


async def _wait(
    session: Session, question: m.Message, future: asyncio.Future[Any], timeout: float | None
) -> m.ObjectAnswer | None:
    """The answer of a request that waits in the scheduler; None if the time is up before it."""
    loop = session.loop
    deadline = None if timeout is None else loop.time() + timeout
    await asyncio.wait([future], timeout=min(WAIT_GRACE_S, timeout or WAIT_GRACE_S))
    if not future.done():
        waiter = session.waiting.begin()
        try:
            rest = None if deadline is None else max(0.0, deadline - loop.time())
            await asyncio.wait([future], timeout=rest)
            if not future.done() and await _is_stopped(session, question):
                return None
            await asyncio.wait([future])
        finally:
            session.waiting.end(waiter)
    answer: m.ObjectAnswer = future.result()
    return answer


async def _is_stopped(session: Session, question: m.Message) -> bool:
    """End a request whose time is up. False if it was done before that: its answer is coming."""
    target: int = question.request_id  # type: ignore[attr-defined]
    if not isinstance(question, m.QueuePut) and not session.is_connected:
        # Nothing is taken without us, so there is no need to wait for the scheduler.
        _abandon(session, target)
        return True
    number = session.next_request()
    try:
        stopped = await session.post(m.CancelRequest(number, target, False))
    finally:
        session.drop_request(number)
    return bool(stopped.number)


def _abandon(session: Session, target: int) -> None:
    """Tell the scheduler that nobody waits for an answer, as soon as it can be told."""
    number = session.next_request()
    told = session.post(m.CancelRequest(number, target, True))

    def forget(future: asyncio.Future[Any]) -> None:
        session.drop_request(number)
        # That there is no scheduler any more is told to those who wait for it.
        if not future.cancelled():
            future.exception()

    told.add_done_callback(forget)


def nothing(answer: m.ObjectAnswer) -> m.ObjectAnswer:
    """The answer as it is."""
    return answer


def values_of(answer: m.ObjectAnswer) -> list[memoryview]:
    """The values of an answer, as they lie in its frame."""
    view = memoryview(answer.payload)
    offsets = list(accumulate(memoryview(answer.lengths).cast("I"), initial=0))
    return [view[low:high] for low, high in zip(offsets, offsets[1:], strict=False)]


def table(values: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Length table and payload of some values."""
    values = list(values)
    return b"".join(len(value).to_bytes(4, "little") for value in values), b"".join(values)


# --- handles -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of a queue or dict."""

    #: None for an ephemeral one.
    name: str | None
    created_at: datetime


class Handle:
    """A queue or dict, by name or by id. Making a handle does nothing; it is looked up when it is
    first used. It can be pickled, and works wherever there is the same scheduler."""

    __slots__ = ("_create", "_name", "_object_id")

    _TYPE: ClassVar[m.ObjectType]
    _PREFIX: ClassVar[str]
    #: How code calls one of it; for messages.
    _EXAMPLE: ClassVar[str]
    _name: str | None
    _create: bool
    _object_id: bytes | None

    def __init__(self) -> None:
        kind = type(self).__name__
        raise RuntimeError(
            f"{kind}() makes no {self._EXAMPLE}: use {kind}.from_name(name, "
            f"create_if_missing=True), or `with {kind}.ephemeral() as {self._EXAMPLE}`"
        )

    @classmethod
    def _new(cls, name: str | None, create: bool, object_id: bytes | None) -> Self:
        handle = cls.__new__(cls)
        handle._name, handle._create, handle._object_id = name, create, object_id
        return handle

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        environment_name: str | None = None,
        create_if_missing: bool = False,
        client: Any = None,
    ) -> Self:
        """The one of this name. It lives with the scheduler, on its disk, until it is deleted.

        Args:
            name: 1 to 64 letters, digits, dots, dashes and underscores.
            environment_name: must be None; fanout has no environments.
            create_if_missing: make it at its first use if there is none; otherwise that raises
                `NotFoundError`.
            client: must be None; `FANOUT_URL` says which scheduler is meant.

        Raises:
            InvalidError: the name does not have that form.
        """
        check_name(cls._EXAMPLE, name)
        refuse_cloud_options(environment_name, client)
        return cls._new(name, create_if_missing, None)

    @classmethod
    def from_id(cls, object_id: str, client: Any = None) -> Self:
        """The one with this id, as `object_id` gives it; found when it is first used.

        Raises:
            InvalidError: it does not have the form of an id.
        """
        refuse_cloud_options(None, client)
        text = object_id.removeprefix(cls._PREFIX) if isinstance(object_id, str) else ""
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if len(raw) != 16 or not object_id.startswith(cls._PREFIX):
            raise InvalidError(
                f"{object_id!r} is not the id of a {cls._EXAMPLE}; it must be {cls._PREFIX!r} and "
                f"32 hexadecimal digits, as {cls.__name__}.object_id gives it"
            )
        return cls._new(None, False, raw)

    @classmethod
    def ephemeral(cls, client: Any = None, environment_name: str | None = None) -> Ephemeral[Self]:
        """One without a name that lives as long as the `with` (or `async with`) block::

            with fanout.Queue.ephemeral() as queue:
                ...

        It is in the scheduler's memory alone: it ends with the scheduler, and 30 s after this
        process was lost. Handles of it can be given to functions.
        """
        refuse_cloud_options(environment_name, client)
        return Ephemeral(cls)

    @property
    def name(self) -> str | None:
        """The name it was looked up by; None if it was not."""
        return self._name

    @property
    def object_id(self) -> str:
        """Its id, for `from_id`.

        Raises:
            ExecutionError: it has not been looked up yet.
        """
        if self._object_id is None:
            raise exceptions.ExecutionError(
                f"{self!r} has no id before its first use; call its hydrate() to look it up"
            )
        return self._PREFIX + self._object_id.hex()

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._name is not None:
            return f"{kind}.from_name({self._name!r})"
        assert self._object_id is not None
        return f"{kind}.from_id({self._PREFIX + self._object_id.hex()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self._name, self._create, self._object_id)

    async def _resolve(self) -> bytes:
        """Its id, looked up once."""
        if self._object_id is None:
            assert self._name is not None
            mode = m.OpenMode.MAKE_IF_MISSING if self._create else m.OpenMode.FIND
            self._object_id = (await open_object(self._TYPE, self._name, mode)).info[0]
        assert self._object_id is not None
        return self._object_id

    async def _info(self) -> ObjectInfo:
        """Its name and when it was made.

        Raises:
            NotFoundError: there is none.
        """
        object_id = await self._resolve()
        answer = await open_object(self._TYPE, "", m.OpenMode.BY_ID, object_id)
        _, name, made_at = answer.info
        return ObjectInfo(name or None, datetime.fromtimestamp(made_at).astimezone())

    async def _act(self, action: m.Action, partition: bytes = b"") -> int:
        object_id = await self._resolve()
        answer = await exchange(
            lambda number: m.ObjectAction(number, object_id, action, partition), nothing
        )
        assert answer is not None
        return answer.number

    info = twin(_info)


def _rebuilt(kind: type[H], name: str | None, create: bool, object_id: bytes | None) -> H:
    return kind._new(name, create, object_id)


async def open_object(
    kind: m.ObjectType, name: str, mode: m.OpenMode, object_id: bytes | None = None
) -> m.ObjectAnswer:
    """Find or make one; the answer's `info` is [id, name, when it was made].

    Raises:
        NotFoundError: there is none and none shall be made.
        AlreadyExistsError: there is one and another shall be made.
    """
    proposed = os.urandom(16) if object_id is None else object_id
    answer = await exchange(lambda n: m.OpenObject(n, proposed, kind, name, mode), nothing)
    assert answer is not None
    return answer


def check_name(kind: str, name: str) -> None:
    """Raises InvalidError if no queue or dict can be called that."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidError(
            f"{name!r} cannot be the name of a {kind}: it must be 1 to 64 letters, digits, dots, "
            "dashes and underscores"
        )


def refuse_cloud_options(environment_name: str | None, client: Any) -> None:
    """Parameters that other clouds need and that mean nothing here."""
    if environment_name:
        raise InvalidError(
            f"environment_name={environment_name!r}: fanout has no environments; leave it out"
        )
    if client is not None:
        raise InvalidError("client=: leave it out; FANOUT_URL says which scheduler is meant")


class Ephemeral(Generic[H]):
    """The context manager that `ephemeral()` gives."""

    def __init__(self, kind: type[H]) -> None:
        self._kind = kind
        self._handle: H | None = None
        self._session: Session | None = None

    def __enter__(self) -> H:
        from fanout.client import loop

        kind = self._kind.__name__
        loop.forbid_in_loop(f"{kind}.ephemeral", f"async with {kind}.ephemeral() as ...")
        return loop.run(self.__aenter__)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from fanout.client import loop

        loop.run(lambda: self.__aexit__(kind, error, trace))

    async def __aenter__(self) -> H:
        from fanout.client.sessions import connected

        if self._handle is not None:
            raise InvalidError("an ephemeral object can be entered once; call ephemeral() again")
        session = await connected()
        answer = await open_object(self._kind._TYPE, "", m.OpenMode.EPHEMERAL)
        session.ephemeral_count += 1
        self._session = session
        self._handle = self._kind._new(None, False, answer.info[0])
        return self._handle

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, handle = self._session, self._handle
        assert session is not None
        assert handle is not None
        session.ephemeral_count -= 1
        if session.is_connected:
            with contextlib.suppress(TimeoutError, exceptions.Error):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await handle._act(m.Action.DELETE)
        await session.close_if_unused()


# --- managers ------------------------------------------------------------------------------------


class ObjectManager(Generic[H]):
    """All named queues, or all named dicts: `Queue.objects`, `Dict.objects`."""

    _EXAMPLE = "objects"

    def __init__(self, kind: type[H]) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"{self._kind.__name__}.objects"

    async def _create(
        self,
        name: str,
        *,
        allow_existing: bool = False,
        environment_name: str | None = None,
        client: Any = None,
    ) -> None:
        """Make one.

        Args:
            name: as for `from_name`.
            allow_existing: it is no error if there is one of that name.

        Raises:
            AlreadyExistsError: there is one of that name.
            InvalidError: the name does not have the form of a name.
        """
        check_name(self._kind._EXAMPLE, name)
        refuse_cloud_options(environment_name, client)
        mode = m.OpenMode.MAKE_IF_MISSING if allow_existing else m.OpenMode.MAKE
        await open_object(self._kind._TYPE, name, mode)

    async def _list(
        self,
        *,
        max_objects: int | None = None,
        created_before: datetime | str | None = None,
        environment_name: str = "",
        client: Any = None,
    ) -> list[H]:
        """Handles of those there are, the newest first.

        Args:
            max_objects: at most so many; None for all.
            created_before: only those made before this time, a text in ISO format or a datetime;
                without a time zone it is local time.
        """
        refuse_cloud_options(environment_name or None, client)
        if max_objects is not None and (type(max_objects) is not int or max_objects < 0):
            raise InvalidError(f"max_objects={max_objects!r}: must be None or an int of at least 0")
        limit = float("inf") if created_before is None else _timestamp(created_before)
        kind = self._kind._TYPE
        found: list[Any] = []
        after = ""
        while True:
            answer = await exchange(
                lambda number, after=after: m.ListObjects(number, kind, after),  # type: ignore[misc]
                nothing,
            )
            assert answer is not None
            if not answer.info:
                break
            found += answer.info
            after = answer.info[-1][1]
        found = sorted((row for row in found if row[2] < limit), key=lambda row: -row[2])
        return [self._kind._new(name, False, key) for key, name, _ in found[:max_objects]]

    async def _delete(
        self,
        name: str,
        *,
        allow_missing: bool = False,
        environment_name: str | None = None,
        client: Any = None,
    ) -> None:
        """Delete one and all that is in it. Whoever waits at it gets `NotFoundError`.

        Args:
            allow_missing: it is no error if there is none of that name.

        Raises:
            NotFoundError: there is none of that name.
        """
        refuse_cloud_options(environment_name, client)
        try:
            await self._kind.from_name(name)._act(m.Action.DELETE)
        except exceptions.NotFoundError:
            if not allow_missing:
                raise

    create = twin(_create)
    list = twin(_list)
    delete = twin(_delete)


def _timestamp(moment: datetime | str) -> float:
    try:
        parsed = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        return parsed.timestamp()
    except (ValueError, AttributeError):
        raise InvalidError(
            f"created_before={moment!r}: must be a datetime or a text in ISO format"
        ) from None
