"""Which file system a path is on, and whether locks and databases work there.

Locks, sockets and SQLite's write-ahead log need one kernel that sees all of it. On a network file
system they seem to work until two hosts meet, so such a folder is refused before anything is
written.

Also how a file is replaced so that nobody sees half of it, and nobody else reads it, and how a
socket is reached whose path is long.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Types, as the kernel names them, whose files several hosts see at once. A type that is not
#: listed is taken for local: refusing somebody's unusual local disk would be the worse mistake.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph", "lustre", "gpfs",
        "beegfs", "glusterfs", "orangefs", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.cephfs",
        "fuse.ceph-fuse", "fuse.davfs2", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse",
        "fuse.smbnetfs", "fuse.juicefs", "fuse.goofys",
    }
)  # fmt: skip

MOUNT_TABLE = "/proc/self/mountinfo"
#: `sun_path` of Linux has 108 bytes, one of them for the end.
SOCKET_PATH_SIZE_BYTES_MAX = 107


def network_file_system_of(
    path: str | os.PathLike[str], mount_table: str | os.PathLike[str] = MOUNT_TABLE
) -> str:
    """The type of the network file system that a path is on, such as ``nfs4``; "" for a local one.

    Args:
        path: a file or folder; it need not exist yet.
        mount_table: where the kernel tells what is mounted.
    """
    kind = file_system_of(path, mount_table)
    return kind if kind in NETWORK_FILE_SYSTEMS else ""


def file_system_of(
    path: str | os.PathLike[str], mount_table: str | os.PathLike[str] = MOUNT_TABLE
) -> str:
    """The type of the file system that a path is on, such as ``ext4``; "" when unknown.

    Args:
        path: a file or folder; it need not exist yet.
        mount_table: where the kernel tells what is mounted.
    """
    try:
        with open(mount_table, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    target = os.path.realpath(path)
    best_size, kind = -1, ""
    for line in lines:
        # "36 35 98:0 /root /mount/point options [optional fields] - type source options"
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        mount_point = _unescaped(fields[4])
        # A later line for the same point is mounted over the earlier one.
        if len(mount_point) >= best_size and _is_within(target, mount_point):
            best_size, kind = len(mount_point), right.split(" ")[0]
    return kind


def _is_within(target: str, mount_point: str) -> bool:
    return mount_point == "/" or target == mount_point or target.startswith(mount_point + "/")


def _unescaped(field: str) -> str:
    """The kernel writes space, tab, newline and backslash of a mount point as octal escapes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, character)
    return field


@contextlib.contextmanager
def short_socket_path(path: str) -> Iterator[str]:
    """Another path of the same unix socket, as the kernel takes only 107 bytes of one. It holds
    while the context is open.

    Args:
        path: of a socket that is there or is to be made, in a folder that is there.

    Raises:
        OSError: the folder of a long path cannot be opened.
    """
    if len(os.fsencode(path)) <= SOCKET_PATH_SIZE_BYTES_MAX:
        yield path
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def write_private(path: Path, data: bytes, must_last: bool = True) -> None:
    """Replace a file in one step, mode 0600; a reader sees the old or the new content, whole.

    Args:
        path: of the file.
        data: what it holds from now on.
        must_last: it is on disk when this returns. Not worth the wait for what tells of a process,
            which does not survive the machine either.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if must_last:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if must_last:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
