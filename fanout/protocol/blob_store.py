"""Where blobs are kept: in memory, or as files.

A blob's id is the SHA-256 of its content; whoever puts one into a store has computed it. How blobs
get from one store to another is in `blobs.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import mmap
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from fanout.exceptions import StorageError
from fanout.filesystem import sync_folder

#: A file of this size or more is freed in a thread: a gibibyte takes the kernel 80 ms, in which an
#: event loop could do nothing else.
LARGE_SIZE_BYTES = 32 << 20

Buffer = bytes | bytearray | memoryview
#: What became of the file of a blob; "unknown" where the system does not let it be read now.
Finding = Literal["sound", "changed", "gone", "unknown"]


def blob_id_of(data: Buffer) -> bytes:
    """The id of a blob with this content: 32 bytes."""
    return hashlib.sha256(data).digest()


class BlobWriter(Protocol):
    """A blob on its way into a store. Invisible there until `finish`."""

    def write(self, data: Buffer) -> None:
        """Append `data`."""

    def finish(self) -> None:
        """All is written and verified: the blob is there now."""

    def abort(self) -> None:
        """Forget what was written. Harmless to repeat."""


class BlobStore(Protocol):
    """Where blobs are kept."""

    def has(self, blob_id: bytes) -> bool:
        """Whether the blob is here, whole."""
        ...

    def size(self, blob_id: bytes) -> int:
        """Its bytes. Raises KeyError if it is not here."""
        ...

    def put(self, blob_id: bytes, data: Buffer) -> None:
        """Keep `data`, whose id the caller has computed. Does nothing if it is here."""

    def buffer(self, blob_id: bytes) -> memoryview:
        """Its content, read only; stays valid after `drop`. Raises KeyError if it is not here."""
        ...

    def drop(self, blob_id: bytes) -> None:
        """Forget it. Harmless if it is not here."""

    def open_writer(self, blob_id: bytes, size_bytes: int = 0) -> BlobWriter:
        """Begin to write a blob that arrives in parts. StorageError if there is no room for so many
        bytes: a disk that is filled in vain is full for others meanwhile."""
        ...


class KeptBlobStore(BlobStore, Protocol):
    """A store that outlives the process."""

    def ids(self) -> list[bytes]:
        """All blobs that are here."""
        ...

    def remove_drafts(self) -> None:
        """Delete what writers of an earlier life left."""


class MemoryBlobStore:
    """Blobs in this process's memory. `put` keeps the caller's buffer itself, without a copy, so
    nobody may change it afterwards."""

    def __init__(self) -> None:
        self._buffers: dict[bytes, memoryview] = {}

    def has(self, blob_id: bytes) -> bool:
        return blob_id in self._buffers

    def size(self, blob_id: bytes) -> int:
        return self._buffers[blob_id].nbytes

    def put(self, blob_id: bytes, data: Buffer) -> None:
        self._buffers.setdefault(blob_id, memoryview(data).cast("B").toreadonly())

    def buffer(self, blob_id: bytes) -> memoryview:
        return self._buffers[blob_id]

    def drop(self, blob_id: bytes) -> None:
        self._buffers.pop(blob_id, None)

    def open_writer(self, blob_id: bytes, size_bytes: int = 0) -> BlobWriter:
        return _MemoryWriter(self, blob_id)


class _MemoryWriter:
    def __init__(self, store: MemoryBlobStore, blob_id: bytes) -> None:
        self._store = store
        self._blob_id = blob_id
        # Grows with what arrives: an announced size must not make us allocate it.
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._data += data

    def finish(self) -> None:
        self._store.put(self._blob_id, self._data)

    def abort(self) -> None:
        self._data = bytearray()


_BLOB_NAME = re.compile("[0-9a-f]{64}")


class FileBlobStore:
    """Blobs as files named by the hex of their id, in a folder that processes may share.

    A file appears under its name only when it is whole. Content is read through a mapping, so
    processes that use the same blob share its pages, and a dropped file lives as long as its
    mappings.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, blob_id: bytes) -> Path:
        """Where the blob is, if it is here."""
        return self.folder / blob_id.hex()

    def has(self, blob_id: bytes) -> bool:
        return self.path(blob_id).exists()

    def size(self, blob_id: bytes) -> int:
        try:
            return self.path(blob_id).stat().st_size
        except FileNotFoundError:
            raise KeyError(blob_id) from None

    def put(self, blob_id: bytes, data: Buffer) -> None:
        """Raises StorageError if the disk does not take it."""
        if self.has(blob_id):
            return
        writer = self.open_writer(blob_id)
        try:
            writer.write(data)
            writer.finish()
        finally:
            writer.abort()

    def buffer(self, blob_id: bytes) -> memoryview:
        return self._map(blob_id, mmap.ACCESS_READ).toreadonly()

    def private_buffer(self, blob_id: bytes) -> memoryview:
        """Like `buffer`, but writable: what is written there is seen by nobody else."""
        return self._map(blob_id, mmap.ACCESS_COPY)

    def drop(self, blob_id: bytes) -> None:
        path, descriptor = self.path(blob_id), -1
        # Without a descriptor, as when there are no more of them, it is freed here.
        with contextlib.suppress(OSError):
            if path.stat().st_size >= LARGE_SIZE_BYTES:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        path.unlink(missing_ok=True)
        if descriptor >= 0:
            # The name is gone; what it stood for goes with the last descriptor.
            threading.Thread(target=os.close, args=(descriptor,), name="fanout-free").start()

    def open_writer(self, blob_id: bytes, size_bytes: int = 0) -> BlobWriter:
        return _FileWriter(self.path(blob_id), size_bytes)

    def ids(self) -> list[bytes]:
        """All blobs that are here."""
        names = (entry.name for entry in os.scandir(self.folder))
        return [bytes.fromhex(name) for name in names if _BLOB_NAME.fullmatch(name)]

    def remove_drafts(self) -> None:
        """Delete what writers of an earlier life left. Only for the owner of the folder, and only
        while nobody writes."""
        for path in self.folder.glob("*.part"):
            path.unlink(missing_ok=True)

    def inspect(self, blob_id: bytes) -> Finding:
        """Whether the file of a blob holds what its name says; one that does not is removed. Reads
        all of it; for a thread."""
        path = self.path(blob_id)
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() == blob_id:
                    return "sound"
                # Not one that was brought meanwhile.
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    path.unlink()
            return "changed"
        except FileNotFoundError:
            return "gone"
        except OSError:
            return "unknown"

    def sync(self, blob_ids: Iterable[bytes]) -> None:
        """Have these blobs on disk, as far as they are here. For a thread.

        Raises:
            OSError: the disk refuses.
        """
        for blob_id in blob_ids:
            try:
                descriptor = os.open(self.path(blob_id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(self.folder)

    def _map(self, blob_id: bytes, access: int) -> memoryview:
        try:
            with self.path(blob_id).open("rb") as file:
                # A mapping cannot be empty.
                if os.fstat(file.fileno()).st_size == 0:
                    return memoryview(bytearray())
                return memoryview(mmap.mmap(file.fileno(), 0, access=access))
        except FileNotFoundError:
            raise KeyError(blob_id) from None


class _FileWriter:
    """Several processes may write the same blob at once, so each draft has a name of its own."""

    _counter = itertools.count()

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._descriptor = -1
        self._draft = path.with_name(f"{path.name}.{os.getpid()}-{next(self._counter)}.part")
        self._is_finished = False
        try:
            if size_bytes > _free_bytes(path.parent):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._draft, flags, 0o600)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        try:
            while len(rest):
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        try:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            os.rename(self._draft, self._path)
            self._is_finished = True
        except OSError as error:
            raise self._failed(error) from error

    def abort(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        with contextlib.suppress(OSError):
            if descriptor >= 0:
                os.close(descriptor)
        with contextlib.suppress(OSError):
            if not self._is_finished:
                self._draft.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write a blob to {self._path.parent}: {error}")


def _free_bytes(folder: Path) -> int:
    """What this user may still write there, quotas left aside."""
    found = os.statvfs(folder)
    return found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)
