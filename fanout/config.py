"""Every default and every environment variable of fanout, in one place.

Times are seconds, sizes bytes unless the name says otherwise.

| variable | meaning | default |
|---|---|---|
| `FANOUT_URL` | join string of a scheduler; without it the embedded default is used | none |
| `FANOUT_HOME` | folder of the embedded default's state | `$XDG_STATE_HOME/fanout` |
| `FANOUT_CPU` | cores the embedded worker gives out | affinity and cgroup quota |
| `FANOUT_IDLE_TIMEOUT` | seconds without work after which embedded daemons leave | 600 |
| `FANOUT_KILL_GRACE` | seconds between asking code to stop and SIGKILL | 10 |
| `FANOUT_SPAWNED_MEMORY` | MiB that spawned calls may take in the scheduler | 4096, at most half |
| `FANOUT_LOG` | log level of the daemons and of the client's own log | warning |
"""

from __future__ import annotations

import os

TIMEOUT_S = 300.0
KILL_GRACE_S = 10.0
CRASH_LIMIT = 3
CLIENT_GRACE_S = 30.0
WORKER_DEADLINE_S = 15.0
HEARTBEAT_INTERVAL_S = 3.0
SCALEDOWN_WINDOW_S = 60.0
IDLE_TIMEOUT_S = 600.0
RESULT_RETENTION_S = 7 * 24 * 3600.0
CONNECT_TIMEOUT_S = 10.0

#: Credit of a call. Client and scheduler both hold what is in flight, and the worker part of it,
#: so twice this and a little is what a call may occupy in all processes together.
WINDOW_BYTES = 32 << 20
#: Inputs in flight beyond what containers hold at the moment; the floor of the count window.
WINDOW_COUNT_MIN = 1024
WINDOW_COUNT_MAX = 64 << 10

#: Memory that spawned calls may take in the scheduler, unless FANOUT_SPAWNED_MEMORY says how much.
SPAWNED_SIZE_BYTES_MAX = 4 << 30
#: And this part of the machine's memory at most.
SPAWNED_MEMORY_SHARE = 0.5

#: Items a generator may send before its consumer has said anything.
ITEM_CREDIT_INITIAL = 4

#: Queues and dicts: the scheduler holds them in memory, so all of them together have a bound.
OBJECTS_SIZE_BYTES_MAX = 1 << 30
#: One frame of them. Several wait behind each other on a connection, with calls among them.
OBJECT_REQUEST_SIZE_BYTES_MAX = 16 << 20
QUEUE_ITEM_SIZE_BYTES_MAX = 1 << 20
QUEUE_PARTITION_ITEMS_MAX = 5_000
QUEUE_PARTITIONS_MAX = 100_000
QUEUE_PARTITION_TTL_S = 24 * 3600.0
QUEUE_PARTITION_TTL_S_MAX = 7 * 24 * 3600.0
DICT_ENTRY_RETENTION_S = 7 * 24 * 3600.0

#: Buffers of at least this size leave the pickle and travel as blobs.
BLOB_SIZE_BYTES_MIN = 1 << 20


def number_from_env(name: str, default: float) -> float:
    """The float value of an environment variable.

    Raises:
        InvalidError: it is set and is not a number of at least zero.
    """
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    from fanout.exceptions import InvalidError

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise InvalidError(f"{name}={text!r} is not a number of at least 0")
    return value
