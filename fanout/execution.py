"""What a function may ask about the run that it is part of. Each works anywhere."""

from __future__ import annotations

from typing import NoReturn

from fanout import context
from fanout.exceptions import InvalidError


def is_local() -> bool:
    """Whether this is the client's side: False in a container, also while it imports the module,
    and True in the client and in programs that a container starts."""
    return context.container is None


def current_input_id() -> str | None:
    """The id of the input that is running, ``in-<call>-<number>``; None outside a container.

    It is the same for each attempt at the input, so it can name what must be done only once. A
    thread that user code starts has none, unless it is started in a copy of the context
    (`contextvars.copy_context().run`).
    """
    running = context.current_input.get()
    return None if running is None else f"in-{running.call_id.hex()}-{running.index}"


def current_function_call_id() -> str | None:
    """The id of the call whose input is running, ``fc-...``; None outside a container.

    If it was made by `spawn` or `spawn_map`, `FunctionCall.from_id` gives a handle of it.
    """
    running = context.current_input.get()
    return None if running is None else context.CALL_PREFIX + running.call_id.hex()


def interact() -> NoReturn:
    """In Modal: attach a container to the terminal of its caller. Here nothing can be attached.

    Raises:
        InvalidError: always; it says what to do instead.
    """
    if is_local():
        raise InvalidError(
            "interact() is for code in a container, and this process is not one; use `breakpoint()`"
        )
    raise InvalidError(
        "a container has no terminal, so interact() cannot attach one; run the function in your "
        "own process with `.local(...)` and use `breakpoint()` there, or print what you want to see"
    )
