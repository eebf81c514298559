"""The user's own object behind an `Obj` in this process, and its enter hooks.

The hooks run before the first method, once, and count when all of them have succeeded: who comes
meanwhile waits, and after a failure the next call runs them again. What a hook itself calls does
not wait for the hooks.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from fanout.exceptions import InvalidError
from fanout.partial import Lifecycle, PartialFunction

#: The objects whose hooks are running, and called what runs here.
_entering: ContextVar[tuple[LocalObject, ...]] = ContextVar("entering", default=())


class LocalObject:
    """See the module's text.

    Args:
        instance: the user's object; no hook has run.
        lifecycle: that of its class.
        is_entered: whether somebody else runs the hooks, as the runtime of a container does.
    """

    def __init__(self, instance: Any, lifecycle: Lifecycle, is_entered: bool) -> None:
        self.instance = instance
        self._lifecycle = lifecycle
        self._is_entered = is_entered
        # Of threads, where all hooks are sync, and of tasks, where one is not.
        self._lock = threading.Lock()
        self._turn = asyncio.Lock()

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method, behind the hooks; an async one gives its coroutine or async generator.

        Raises:
            InvalidError: it is sync, and would have to wait for an async hook.
        """
        partial = self._lifecycle.methods[name]
        bound = partial.raw.__get__(self.instance)
        if self._is_entered or self in _entering.get():
            return bound(*args, **kwargs)
        hook = next((hook for hook in self._hooks() if inspect.iscoroutinefunction(hook)), None)
        if hook is None:
            self._enter()
            return bound(*args, **kwargs)
        if not partial.is_async:
            raise InvalidError(self._cannot_wait(partial, hook.__name__))
        if inspect.isasyncgenfunction(partial.raw):
            return self._enter_and_iterate(bound, args, kwargs)
        return self._enter_and_await(bound, args, kwargs)

    def _hooks(self) -> list[Any]:
        return [getattr(self.instance, name) for name in self._lifecycle.enters]

    def _enter(self) -> None:
        with self._lock:
            if self._is_entered:
                return
            token = _entering.set((*_entering.get(), self))
            try:
                for hook in self._hooks():
                    hook()
            finally:
                _entering.reset(token)
            self._is_entered = True

    async def _enter_async(self) -> None:
        async with self._turn:
            if self._is_entered:
                return
            token = _entering.set((*_entering.get(), self))
            try:
                for hook in self._hooks():
                    entered = hook()
                    if inspect.isawaitable(entered):
                        await entered
            finally:
                _entering.reset(token)
            self._is_entered = True

    async def _enter_and_await(self, bound: Any, args: Any, kwargs: Any) -> Any:
        await self._enter_async()
        return await bound(*args, **kwargs)

    async def _enter_and_iterate(self, bound: Any, args: Any, kwargs: Any) -> AsyncIterator[Any]:
        await self._enter_async()
        async with contextlib.aclosing(bound(*args, **kwargs)) as stream:
            async for value in stream:
                yield value

    def _cannot_wait(self, partial: PartialFunction[..., Any, Any], hook: str) -> str:
        text = (
            f"{partial.__qualname__}.local(...): enter hook {hook!r} is async and has not run in "
            "this process, and a sync method cannot wait for it; make the hook sync"
        )
        for name, other in self._lifecycle.methods.items():
            if other.is_async:
                return f"{text}, or begin with an async method: `await ....{name}.local(...)`"
        return f"{text}, or the method async"
