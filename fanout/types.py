"""Plain types that methods return."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class InputStatus(IntEnum):
    """What has become of an input; numbered as in Modal."""

    #: Waits, runs, or will be tried again.
    PENDING = 0
    SUCCESS = 1
    #: It raised, or its container died.
    FAILURE = 2
    #: Somebody cancelled its call.
    TERMINATED = 3
    #: It ran longer than its function's `timeout`.
    TIMEOUT = 4
    #: No container of its function could start.
    INIT_FAILURE = 5


@dataclass(slots=True)
class InputInfo:
    """An input in a call graph, with the inputs of the calls that it made."""

    #: ``in-``, the hexadecimal id of its call, a dash and its index.
    input_id: str
    #: As `FunctionCall.object_id`.
    function_call_id: str
    #: The container that has it now, as `fanout status` shows it; "" when none has.
    task_id: str
    status: InputStatus
    function_name: str
    module_name: str
    children: list[InputInfo] = field(default_factory=list)
