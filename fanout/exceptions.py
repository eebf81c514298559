"""Everything fanout raises.

::

    Error                             base of all below
     +- InvalidError                  the program is wrong: an option, a name, a way to call
     +- NotFoundError                 no such call, function, app, queue, dict
     +- AlreadyExistsError            there is one of that name
     +- ConnectionError               the scheduler cannot be reached, or went away for good
     |   +- AuthError                 it is there and refuses the token
     |   +- VersionError              it is there and speaks another protocol
     +- ProtocolError                 a peer sent something it must not send
     +- SerializationError            a value cannot be pickled
     +- RequestSizeError              a value is too large for a queue or dict
     +- DeserializationError          a value cannot be unpickled
     +- ExecutionError                used in the wrong state: no app running, definition missing
     +- RemoteError                   the remote exception's own type could not be rebuilt
     |   +- ContainerStartError       a container of the function cannot start
     |   +- ContainerCrashedError     the process that ran the input died
     +- TimeoutError                  base of fanout's own time limits (not the builtin)
     |   +- FunctionTimeoutError      an input ran longer than `timeout=`
     |   +- OutputExpiredError        the result was kept its time and is gone
     +- InputCancelledError           the call was cancelled
     +- DeadlockError                 only the call's own ancestors stand in its way
     +- ResourceExhaustedError        no worker can ever satisfy the request; no memory for a value
     +- StorageError                  the scheduler could not write (disk full)
     +- InternalError                 a bug in fanout
    InputCancellation (BaseException) raised inside user code to stop it

A function's own exception arrives as its own type, with the remote traceback attached.
"""

from __future__ import annotations

import builtins


class Error(Exception):
    """Base of every error that fanout raises on its own account."""


class InvalidError(Error):
    """The program asks for something that cannot be: what, which value, what to do instead."""


class NotFoundError(Error):
    """There is no such call, function, app, queue or dict at this scheduler."""


class AlreadyExistsError(Error):
    """There is an object of that name already."""


class ConnectionError(Error, builtins.ConnectionError):
    """The scheduler cannot be reached, or is gone."""


class AuthError(ConnectionError):
    """The scheduler refuses this token, or cannot prove that it knows the secret."""


class VersionError(ConnectionError):
    """The other side speaks another version of the protocol."""


class ProtocolError(Error):
    """A peer sent bytes that the protocol does not allow. The connection is closed."""


class SerializationError(Error):
    """A value cannot be pickled."""


class RequestSizeError(Error):
    """A value is too large for a queue or dict, or several are for one request."""


class DeserializationError(Error):
    """A value cannot be unpickled here."""


class ExecutionError(Error):
    """Something was used in a state in which it cannot work, such as a call with no app running."""


class RemoteError(Error):
    """The remote exception could not be rebuilt here; the text holds its traceback."""


class ContainerStartError(RemoteError):
    """A container of the function cannot start, so none of its inputs can run."""


class ContainerCrashedError(RemoteError):
    """The container died while it ran this input."""


class TimeoutError(Error):
    """Base of fanout's time limits. `FunctionCall.get(timeout=)` raises the builtin instead."""


class FunctionTimeoutError(TimeoutError):
    """The input ran longer than the function's `timeout`."""


class OutputExpiredError(TimeoutError):
    """The result was kept for its time and is gone."""


class InputCancelledError(Error):
    """The call was cancelled before this input had an output."""


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
