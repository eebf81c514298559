"""Everything fanout raises, and the names under which Modal's scripts catch it.

::

    Error                             base of all below
     +- InvalidError                  the program is wrong: an option, a name, a way to call
     |   +- ConflictError             it contradicts what is there already
     |   +- RequestSizeError          something is too large to travel, or for a queue or dict
     +- NotFoundError                 no such call, function, app, queue, dict
     +- AlreadyExistsError            there is one of that name
     +- ConnectionError               the scheduler cannot be reached, or went away for good
     |   +- AuthError                 it is there and refuses the token
     |   |   +- PermissionDeniedError  the token is good, but not for this
     |   +- VersionError              it is there and speaks another protocol
     +- ProtocolError                 a peer sent something it must not send
     +- SerializationError            a value cannot be pickled
     +- ExecutionError                used in the wrong state: no app running, definition missing
     |   +- DeserializationError      a value cannot be unpickled
     |   +- UnknownExceptionError     (RemoteError too) the remote exception cannot be rebuilt
     +- RemoteError                   what ended an input, other than its own exception or time
     |   +- UnknownExceptionError     its own type cannot be rebuilt here
     |   +- SteeringError             it raised KeyboardInterrupt, StopIteration or the like
     |   +- ContainerStartError       a container of the function cannot start
     |   +- ContainerCrashedError     the process that ran the input died
     |   +- InputCancelledError       the call was cancelled
     +- TimeoutError                  base of fanout's own time limits (not the builtin)
     |   +- FunctionTimeoutError      an input ran longer than `timeout=`
     |   +- OutputExpiredError        the result was kept its time and is gone
     +- DeadlockError                 only the call's own ancestors stand in its way
     +- ResourceExhaustedError        no worker can ever satisfy the request; no memory for a value
     +- StorageError                  the scheduler could not write (disk full)
     +- InternalError                 a bug in fanout
    InputCancellation (BaseException) raised inside user code to stop it

    UserWarning
     +- DeprecationError              something that still works and will not for ever
     +- ServerWarning  AsyncUsageWarning  InternalAPIWarning
                                      of Modal, for filters that name them; fanout warns of none

    InternalFailure is InternalError; ServiceError and ClientClosed are ConnectionError.

A function's own exception arrives as its own type, with the remote traceback attached.
`docs/errors.md` says which error comes when.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any


class Error(Exception):
    """Base of every error that fanout raises on its own account."""


class InvalidError(Error):
    """The program asks for something that cannot be: what, which value, what to do instead."""


class ConflictError(InvalidError):
    """The program asks for something that contradicts what is there already."""


class RequestSizeError(InvalidError):
    """Something is too large to travel: how large it is, the limit, what to do instead."""


class NotFoundError(Error):
    """There is no such call, function, app, queue or dict at this scheduler."""


class AlreadyExistsError(Error):
    """There is one of that name already."""


class ConnectionError(Error, builtins.ConnectionError):
    """The scheduler cannot be reached, or is gone."""


class AuthError(ConnectionError):
    """The scheduler refuses this token, or cannot prove that it knows the secret."""


class PermissionDeniedError(AuthError):
    """The token is known and may not do this, such as one for workers that is used by a client."""


class VersionError(ConnectionError):
    """The other side speaks another version of the protocol."""


class ProtocolError(Error):
    """A peer sent bytes that the protocol does not allow. The connection is closed."""


class SerializationError(Error):
    """A value cannot be pickled."""


class ExecutionError(Error):
    """Something was used in a state in which it cannot work, such as a call with no app running."""


class DeserializationError(ExecutionError):
    """A value cannot be unpickled here."""


class RemoteError(Error):
    """An input ended by something else than its own exception or its time limit.

    The attributes that are not known, or do not apply, are None.
    """

    #: Id of the call, ``fc-...``.
    call_id: str | None = None
    #: Number of the input in its call, from 0.
    input_index: int | None = None


class UnknownExceptionError(RemoteError, ExecutionError):
    """The remote exception's own type could not be rebuilt here; the text says why, and holds its
    traceback."""

    #: Full name of the exception's type, such as ``"package.module.Name"``.
    type_name: str | None = None
    #: What it said: its `str`.
    text: str | None = None
    #: Its traceback, as it would have been printed there.
    traceback_text: str | None = None


class SteeringError(RemoteError, RuntimeError):
    """The function raised what steers an interpreter: KeyboardInterrupt, GeneratorExit,
    StopIteration, StopAsyncIteration or asyncio.CancelledError. Raised here as it is it would mean
    something else, so it is the cause of this."""


class _ContainerError(RemoteError):
    #: Name of the signal that ended the process, such as ``"SIGKILL"``.
    signal: str | None = None
    #: What the process left with, if no signal ended it.
    exit_code: int | None = None
    #: Most memory that it held at a time, in MiB.
    peak_memory_mib: int | None = None
    #: What the function asks for, `memory=`, in MiB.
    memory_mib: int | None = None
    #: What the worker may use, by its host or its cgroup, in MiB.
    memory_limit_mib: int | None = None
    #: Whether the kernel killed it for want of memory; None if that cannot be known.
    is_out_of_memory: bool | None = None


class ContainerStartError(_ContainerError):
    """A container of the function cannot start, so none of its inputs can run."""


class ContainerCrashedError(_ContainerError):
    """The container died while it ran this input."""

    #: How often containers died while they ran this input.
    crash_count: int | None = None


class InputCancelledError(RemoteError):
    """The call was cancelled before this input had an output."""


class TimeoutError(Error):
    """Base of fanout's time limits. `FunctionCall.get(timeout=)` raises the builtin instead."""


class FunctionTimeoutError(TimeoutError):
    """The input ran longer than the function's `timeout`."""

    #: The limit, in seconds.
    timeout: float | None = None
    #: Id of the call, ``fc-...``.
    call_id: str | None = None
    #: Number of the input in its call, from 0.
    input_index: int | None = None


class OutputExpiredError(TimeoutError):
    """The result was kept for its time and is gone."""


class DeadlockError(Error):
    """The call waits only for containers that wait, directly or not, for this call."""


class ResourceExhaustedError(Error):
    """No worker can ever give what the function asks for, or the scheduler has no memory left for
    what is to be put into a queue or dict."""


class StorageError(Error):
    """The scheduler could not write to its disk; nothing that was acknowledged is lost."""


class InternalError(Error):
    """fanout broke one of its own rules. Please report it."""


class InputCancellation(BaseException):
    """Raised inside user code to stop it: the call was cancelled or the time is up.

    A BaseException, so that `except Exception` in user code does not swallow it.
    """


# --- warnings -------------------------------------------------------------------------------------


class DeprecationError(UserWarning):
    """A warning, in spite of its name: it still works and will not for ever."""


class ServerWarning(UserWarning):
    """For filters that name it; fanout's scheduler sends no warnings."""


class AsyncUsageWarning(UserWarning):
    """For filters that name it; a blocking call in a running loop is an `InvalidError`."""


class InternalAPIWarning(UserWarning):
    """For filters that name it; nothing of fanout's is half public."""


# --- second names ---------------------------------------------------------------------------------

InternalFailure = InternalError
ServiceError = ConnectionError
ClientClosed = ConnectionError

_NO_SANDBOX = "it has no sandboxes"
#: Names of Modal's that mean nothing here, and why; told to whoever asks for one.
_ABSENT = {
    "DataLossError": "what the scheduler cannot write is a StorageError, and nothing is lost",
    "ExecTimeoutError": _NO_SANDBOX,
    "ImageBuildError": "it builds no images in a cloud",
    "InteractiveTimeoutError": "containers have no terminal",
    "LogsFetchError": "logs come with the call, and are not fetched",
    "ModuleNotMountable": "what cannot travel is an InvalidError",
    "MountUploadTimeoutError": "sources travel with the call",
    "SandboxFilesystemError": _NO_SANDBOX,
    "SandboxTerminatedError": _NO_SANDBOX,
    "SandboxTimeoutError": _NO_SANDBOX,
    "SnapshotCreationError": "it takes no memory snapshots",
    "UnimplementedError": "a scheduler of another version is a VersionError",
    "VolumeUploadTimeoutError": "nothing is uploaded to a cloud",
    "WorkspaceManagementError": "it has no workspaces",
    "simulate_preemption": "its containers are not preempted",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        reason = _ABSENT.get(name)
        if reason is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise AttributeError(f"fanout has no {name}: {reason}")
