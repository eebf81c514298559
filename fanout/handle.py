"""Handles of functions and classes on their way between processes.

A pickled handle holds the definition that the scheduler has. Where the module that made it is
loaded, the object found there is used, so that `is` and `.local` hold; elsewhere a handle without
a body is made, which can do everything but run locally.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from fanout.exceptions import ExecutionError
from fanout.options import Options
from fanout.service import Service, id_of

if TYPE_CHECKING:
    from typing import Self

    from fanout.client.app_run import AppRun
    from fanout.definition import Definition
    from fanout.protocol import messages as m


class _Found(Protocol):
    """A `Function` or a `Cls`."""

    def _like(self, handle: Handle) -> Self | None: ...


F = TypeVar("F", bound=_Found)

_SHAPE = ("is_generator", "is_async", "methods", "is_mixed")


@dataclass(frozen=True)
class Handle:
    """What is pickled of a service."""

    app_name: str | None
    app_id: bytes
    name: str
    options: dict[str, Any]
    payload: bytes

    @classmethod
    def of(cls, service: Service) -> Handle:
        """The handle of a service in the run under way.

        Raises:
            ExecutionError: the app does not run.
        """
        run = service.app._current_run(f"pickling {service.name}")
        definition, _ = service.defined(run)
        return cls(
            service.app.name,
            run.app_id,
            definition.name,
            definition.options,
            bytes(definition.payload),
        )

    @property
    def parameters(self) -> dict[str, Any] | None:
        """Values of a class's parameters; None for a function."""
        values: dict[str, Any] | None = self.extra.get("parameters")
        return values

    @property
    def extra(self) -> dict[str, Any]:
        """`Definition.extra`."""
        return self._definition.extra

    @functools.cached_property
    def _definition(self) -> Definition:
        from fanout.definition import unpack_definition

        return unpack_definition(self.payload)

    @property
    def full_options(self) -> Options:
        """The options of its containers, checked where they were given."""
        return Options.of_data(self.options, self.extra.get("env") or {})

    @property
    def shape(self) -> dict[str, Any]:
        """As `Service.shape`."""
        return {key: self.options[key] for key in _SHAPE if key in self.options}

    def find_here(self, kind: type[F]) -> F | None:
        """The object of this process that it means, or one that is made over it if that has other
        options; None if its module is not loaded here, or is another version.

        Args:
            kind: `Function` or `Cls`.
        """
        target = self._definition.target
        if target.pickled:
            return None
        found: Any = sys.modules.get(target.module)
        for part in target.qualname.split("."):
            found = getattr(found, part, None)
        return found._like(self) if isinstance(found, kind) else None

    def service(self) -> Service:
        """A service of which only this handle came here."""
        return AbsentService(self)


class AbsentService(Service):
    """What containers are started for, where its code is not: its definition is made out of the
    one that came, with other options or parameters."""

    has_code = False

    def __init__(
        self,
        handle: Handle,
        options: Options | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        from fanout.app import App
        from fanout.definition import unpack_definition

        definition = unpack_definition(handle.payload)
        extra = definition.extra
        if parameters is not None:
            extra = {**extra, "parameters": parameters}
        target = definition.target
        super().__init__(
            App._joined(handle.app_name, handle.app_id),
            _absent(handle.name, target.module, target.qualname),
            handle.name,
            options or handle.full_options,
            handle.shape,
            extra,
        )
        self.handle = handle

    def with_options(self, options: Options) -> Service:
        return AbsentService(self.handle, options, self.extra.get("parameters"))

    def _define(self, run: AppRun) -> tuple[m.DefineFunction, bytes | None]:
        from fanout.definition import pack_definition, unpack_definition
        from fanout.protocol import messages as m

        definition = unpack_definition(self.handle.payload)
        definition.extra.update(self.extra)
        definition.extra.pop("env", None)
        if self.options.env:
            definition.extra["env"] = dict(self.options.env)
        payload = pack_definition(definition)
        options = {**self.handle.options, **self.options.as_data()}
        sources = definition.environment.sources
        blobs = [bytes.fromhex(sources)] if sources else []
        function_id = id_of(run.app_id, self.name, options, payload)
        return m.DefineFunction(function_id, run.app_id, self.name, options, blobs, payload), None


def _absent(name: str, module: str, qualname: str) -> Any:
    """Stands for a function whose module is not loaded here."""

    def run_locally(*args: Any, **kwargs: Any) -> NoReturn:
        raise ExecutionError(
            f"{name} came here as a handle and cannot run locally: module {module!r}, which "
            "defines it, is not loaded"
        )

    run_locally.__name__ = run_locally.__qualname__ = qualname.rpartition(".")[2]
    run_locally.__module__ = module
    return run_locally
