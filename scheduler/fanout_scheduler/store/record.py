"""How a record becomes a row, and how a row becomes a record again.

A row holds the header and the payload of the frame in which the record travelled, so the store has
no format of its own beside the wire's. The payload of a function's definition holds the user's
environment variables and is encrypted; the key lies in a file of its own, so that a copy of the
database alone gives nothing away.
"""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fanout.exceptions import ProtocolError, StorageError
from fanout.filesystem import write_private
from fanout.protocol import messages as m
from fanout_scheduler.core.events import (
    ForgetApp,
    ForgetCall,
    ForgetObject,
    ForgetRecord,
    Record,
)
from fanout_scheduler.core.object_state import OBJECT_RECORDS, record_key

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

#: Kinds of record that may lie in the table; anything else there is damage.
STORED_TYPES: frozenset[type[m.Message]] = frozenset(
    {
        m.OpenApp,
        m.DefineFunction,
        m.OpenCall,
        m.Inputs,
        m.SealCall,
        m.Outputs,
        m.CallFailed,
        m.CallEnded,
        m.CallExpired,
        *OBJECT_RECORDS,
    }
)
_DEFINITION_KIND = m.DefineFunction.KIND
_KEY_SIZE_BYTES = 32


@dataclass(slots=True)
class Insert:
    """A row to be written; the payload is still readable."""

    call_id: bytes | None
    app_id: bytes | None
    kind: int
    header: bytes
    payload: m.Payload
    blob_ids: list[bytes]
    #: (object id, key) of a record of a queue or dict; it replaces the one that is there.
    object_key: tuple[bytes, bytes] | None = None


#: One row to write, or rows to remove.
Forget = ForgetCall | ForgetApp | ForgetRecord | ForgetObject
Write = Insert | Forget


def write_of(record: Record) -> Write:
    """What a record does to the table.

    The header is encoded here, and this must be called on the loop's thread: the encoder of
    `messages.py` is one object that the connections use as well.
    """
    if isinstance(record, Forget):
        return record
    assert type(record) in STORED_TYPES, type(record).__name__
    object_key = None
    if isinstance(record, OBJECT_RECORDS):
        object_key = record.object_id, record_key(record)
    return Insert(
        call_id=getattr(record, "call_id", None),
        app_id=getattr(record, "app_id", None),
        kind=record.KIND,
        header=m.encode_header(record),
        payload=getattr(record, "payload", b""),
        blob_ids=list(blob_ids_of(record)),
        object_key=object_key,
    )


def blob_ids_of(record: Record) -> Iterator[bytes]:
    """The blobs that a record names; it is worth nothing without them."""
    if isinstance(record, m.DefineFunction):
        yield from record.blobs
    elif isinstance(record, m.Inputs | m.Outputs):
        for _, blob_ids in record.blobs:
            yield from blob_ids


def load_key(path: Path, database: Path | None = None) -> bytes:
    """The key that definitions are encrypted with; made on the first call, mode 0600.

    Args:
        path: of its file.
        database: what was encrypted with it. While that is there, no other key is made.

    Raises:
        StorageError: the file is there and holds no key; or only its database is there.
    """
    try:
        key = path.read_bytes().strip()
    except FileNotFoundError:
        if database is not None and database.exists():
            raise StorageError(
                f"{path} is missing, and the function definitions in {database} cannot be read "
                f"without it. Put the file back, or move the database away together with its -wal "
                f"and -shm files to begin without its calls."
            ) from None
        key = base64.urlsafe_b64encode(os.urandom(_KEY_SIZE_BYTES))
        write_private(path, key + b"\n")
    try:
        size = len(base64.urlsafe_b64decode(key))
    except ValueError:
        size = -1
    if size != _KEY_SIZE_BYTES:
        raise StorageError(
            f"{path} does not hold a key of {_KEY_SIZE_BYTES} bytes in base64. Put the right file "
            f"back; without it the stored function definitions cannot be read."
        )
    return key


class RowCodec:
    """Encrypts what must not lie readable on the disk, and notices when a row has changed."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._fernet: Fernet | None = None

    def warm(self) -> None:
        """Load the cipher. It takes 50 ms, too long for the way to a ready scheduler."""
        self._cipher()

    def _cipher(self) -> Fernet:
        if self._fernet is None:
            from cryptography.fernet import Fernet

            self._fernet = Fernet(self._key)
        return self._fernet

    def row(self, insert: Insert) -> tuple[bytes | None, bytes | None, int, bytes, m.Payload, int]:
        """The columns of a row, in the order of the table."""
        payload = insert.payload
        if insert.kind == _DEFINITION_KIND:
            payload = self._cipher().encrypt(bytes(payload))
        checksum = _checksum(insert.header, payload)
        return insert.call_id, insert.app_id, insert.kind, insert.header, payload, checksum

    def record(self, kind: int, header: bytes, payload: bytes, checksum: int) -> Record:
        """The record of a row.

        Raises:
            StorageError: the row is not what was written, or the key is another one.
        """
        if _checksum(header, payload) != checksum:
            raise StorageError("its checksum does not fit its content")
        if kind == _DEFINITION_KIND:
            from cryptography.fernet import InvalidToken

            try:
                payload = self._cipher().decrypt(payload)
            except InvalidToken as error:
                raise StorageError(
                    "it was encrypted with another key than the one in store.key"
                ) from error
        try:
            message = m.decode(header, payload)
        except ProtocolError as error:
            raise StorageError(f"it is not a frame of this version: {error}") from error
        if type(message) not in STORED_TYPES or kind != message.KIND:
            raise StorageError(f"it holds a {type(message).__name__} under kind {kind}")
        return message  # type: ignore[return-value]


def _checksum(header: bytes, payload: m.Payload) -> int:
    return zlib.crc32(payload, zlib.crc32(header))
