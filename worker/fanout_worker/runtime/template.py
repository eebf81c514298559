"""A warm interpreter of one environment, from which containers are forked.

It has fanout's runtime imported and nothing of the user's, has one thread and no event loop, so a
fork of it is a clean start that takes milliseconds. On each request it forks twice: the process in
between leaves at once, so the daemon (a child subreaper) becomes the parent of the container and
gets its exit status and its resource usage from wait. The daemon is answered after the process in
between is gone, so a container that is told to start already has its lasting parent.

The daemon's socket keeps message boundaries: each request is ``[container id]`` with the
container's descriptors attached, each answer ``[container id, pid]``, with
a negative errno instead of the pid if there is no container.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import sys

import cloudpickle  # noqa: F401  imported here so that containers find it warm
import msgpack

import fanout  # noqa: F401
import fanout.remote_errors  # noqa: F401
import fanout.serialization  # noqa: F401
from fanout_worker import channel, process
from fanout_worker.runtime import child, child_async, child_concurrent  # noqa: F401

#: Channel, shared memory, standard output, standard error.
DESCRIPTORS = 4


def main(descriptor: int, daemon_pid: int, agreed: str) -> None:
    """Serve the daemon until it closes the socket. In a forked container this returns into
    `child.main`, which never returns.

    Args:
        agreed: the daemon's `channel.fingerprint()`.
    """
    if channel.fingerprint() != agreed:
        raise SystemExit(
            f"fanout in {sys.prefix} is not the fanout that the worker daemon was started with; "
            f"run `fanout stop` (or restart `fanout worker`), then start the program again"
        )
    process.die_with_parent(daemon_pid)
    control = socket.socket(fileno=descriptor)
    gc.collect()
    # What exists now is shared with all containers, as long as no collector touches it.
    gc.freeze()
    control.send(msgpack.packb([]))
    descriptors = _serve(control)
    if descriptors is None:
        return
    control.close()
    child.main(*descriptors)


def _serve(control: socket.socket) -> list[int] | None:
    """Answer requests. Returns None when the daemon is gone, and in a new container that
    container's descriptors."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, DESCRIPTORS)
        if not data:
            return None
        (container_id,) = msgpack.unpackb(data)
        try:
            # Descriptors for which the limit had no room did not come.
            pid = _fork_twice() if len(descriptors) == DESCRIPTORS else -errno.EMFILE
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            return descriptors
        for number in descriptors:
            os.close(number)
        control.send(msgpack.packb([container_id, pid]))


def _fork_twice() -> int:
    """The pid of a grandchild, or a negative errno; 0 in the grandchild itself.

    Raises:
        OSError: there is not even a child.
    """
    reader, writer = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if between == 0:
        os.close(reader)
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            os.close(writer)
            return 0
        os.write(writer, struct.pack("q", pid))
        os._exit(0)
    os.close(writer)
    answer = os.read(reader, 8)
    os.close(reader)
    os.waitpid(between, 0)
    return int(struct.unpack("q", answer)[0]) if len(answer) == 8 else -errno.ECHILD
