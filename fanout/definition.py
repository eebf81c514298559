"""What a function is, as plain data: the payload of `DefineFunction`.

The client writes it, the scheduler passes it on unread, the worker daemon reads `Environment` to
choose a template, and the container reads `Target` to find the function. Plain msgpack, so that
the daemon never unpickles anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

#: Paths and environment variables may be any bytes, and are text with surrogates then.
_UNICODE_ERRORS = "surrogateescape"


@dataclass(slots=True)
class Environment:
    """Where a function's code runs.

    On the embedded worker a container uses all of it. On another host the worker's own interpreter
    runs, `sources` is unpacked into a folder of its own that comes first on the path, and the
    cwd and path of the client are not used; its variables do not even travel.
    """

    #: Interpreter of the client (`sys.executable`), and "3.11" for messages and checks.
    python: str
    python_version: str
    #: `sys.path` of the client, in order, as absolute paths.
    path: list[str]
    cwd: str
    variables: dict[str, str]
    #: Blob id (hex) of a zip of the sources, or "" when there are none to send.
    sources: str = ""
    #: Hex digest over the content of the sources: an edited file is another environment.
    code_digest: str = ""

    def fingerprint(self) -> str:
        """Hex digest: equal means that a container of one may serve the other's functions."""
        packed: bytes = msgpack.packb(
            [
                self.python,
                self.path,
                self.cwd,
                sorted(self.variables.items()),
                self.sources,
                self.code_digest,
            ],
            unicode_errors=_UNICODE_ERRORS,
        )
        return hashlib.sha256(packed).hexdigest()[:32]


@dataclass(slots=True)
class Target:
    """Which function it is.

    By name: `module` and `qualname`; when `file` is set the module is a script, loaded from that
    path (relative to the sources' root on another host: `relative_file`) under the name `module`
    with `__main__` as alias. By value: `pickled` is the cloudpickled function.
    """

    module: str
    qualname: str
    file: str = ""
    relative_file: str = ""
    pickled: bytes = b""


@dataclass(slots=True)
class Definition:
    environment: Environment
    target: Target
    #: Name of the app and the function, for the container's context and for log lines.
    app_name: str = ""
    function_name: str = ""
    #: Anything later versions add; unknown keys are kept.
    extra: dict[str, Any] = field(default_factory=dict)


def pack_definition(definition: Definition) -> bytes:
    """The bytes of a definition, for `DefineFunction.payload`."""
    packed: bytes = msgpack.packb(asdict(definition), unicode_errors=_UNICODE_ERRORS)
    return packed


def unpack_definition(payload: bytes | memoryview) -> Definition:
    """The definition in a `DefineFunction.payload`.

    Raises:
        ValueError: the bytes are not one.
    """
    data = msgpack.unpackb(payload, raw=False, unicode_errors=_UNICODE_ERRORS)
    try:
        return Definition(
            environment=Environment(**data["environment"]),
            target=Target(**data["target"]),
            app_name=data["app_name"],
            function_name=data["function_name"],
            extra=data["extra"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a function definition: {error!r}") from error
