"""What code inside a container knows about where it runs.

The worker's runtime fills this in before it imports anything of the user's; in any other process
`container` stays None. The client library reads it: in a container it joins the scheduler through
its own daemon, belongs to the app that its function belongs to, and names the input that makes a
nested call.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanout.definition import Environment


#: Begins the id of a call, as users see it; 32 hexadecimal digits follow.
CALL_PREFIX = "fc-"


@dataclass(slots=True)
class ContainerContext:
    """The container that this process is."""

    container_id: int
    app_id: bytes
    app_name: str
    function_id: bytes
    function_name: str
    environment: Environment
    #: Whether the code runs on another host than the client, from unpacked sources.
    is_remote_host: bool
    #: The daemon's unix socket, and what proves to it which container is calling.
    socket_path: str
    secret: bytes
    #: Blobs are files here, named by the hex of their id.
    blob_folder: str
    #: Folder of the sources that came from the client, on another host than the client's; else "".
    sources: str = ""
    #: The definition as it came (`fanout.definition`), and the raw function found by it.
    definition: bytes = b""
    function: Callable[..., Any] | None = None


@dataclass(slots=True)
class InputContext:
    """The input that is running.

    A container that runs its inputs one after another keeps one object for a lease and moves
    `index` on, so whoever needs the numbers later has to copy them.
    """

    call_id: bytes
    index: int
    lease_id: int


#: Set once, by the runtime of a container.
container: ContainerContext | None = None

#: Set round each input.
current_input: ContextVar[InputContext | None] = ContextVar("current_input", default=None)
