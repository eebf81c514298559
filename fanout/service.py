"""What containers are started for: a function, or a class with the values of its parameters.

A `Service` turns itself into the definition that a scheduler stores, once for each run of its app.
Definitions with the same content have the same id, so two handles that mean the same share their
containers.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fanout.options import Options

if TYPE_CHECKING:
    from fanout.app import App
    from fanout.client.app_run import AppRun
    from fanout.protocol import messages as m


#: What definitions are being made of, the outermost first.
_being_defined: ContextVar[tuple[Any, ...]] = ContextVar("being_defined", default=())


def is_being_defined(raw: Any) -> bool:
    """Whether a function or class is pickled within its own definition, or within one that is
    made for it: code by value that refers to itself."""
    return any(defined is raw for defined in _being_defined.get())


class Service:
    """See the module's text.

    Args:
        app: whose runs it belongs to.
        raw: the user's function or class.
        name: for people, and one of the things that tell services apart.
        options: of the containers.
        shape: what else `DefineFunction.options` says: `is_generator` and `is_async` of a
            function, `methods` of a class.
        extra: what else the definition says; `parameters`, the values of a class's parameters.
    """

    #: Whether the function or class itself is here, in `raw`.
    has_code = True

    def __init__(
        self,
        app: App,
        raw: Any,
        name: str,
        options: Options,
        shape: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.app = app
        self.raw = raw
        self.name = name
        self.options = options
        self.shape = shape
        self.extra = extra or {}
        #: It came here within its own definition, and so with its code.
        self.came_whole = False
        # Each call looks its definition up.
        self._hash = hash((id(raw), name, options))

    def with_options(self, options: Options) -> Service:
        """The same in containers of other options, which are other containers."""
        return type(self)(self.app, self.raw, self.name, options, self.shape, self.extra)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same definition, in each run of the app."""
        if not isinstance(other, Service):
            return NotImplemented
        return (
            self.raw is other.raw
            and self.name == other.name
            and self.app.name == other.app.name
            and self.shape == other.shape
            and self.options == other.options
            and self.extra == other.extra
        )

    def __hash__(self) -> int:
        return self._hash

    def defined(self, run: AppRun) -> tuple[m.DefineFunction, bytes | None]:
        """The definition for a run of the app, made when it is first used there; and the content
        of the blob with the sources, where code must travel."""
        made: tuple[m.DefineFunction, bytes | None] | None = run.definitions.get(self)
        if made is None:
            token = _being_defined.set((*_being_defined.get(), self.raw))
            try:
                made = run.definitions[self] = self._define(run)
            finally:
                _being_defined.reset(token)
        return made

    def _define(self, run: AppRun) -> tuple[m.DefineFunction, bytes | None]:
        from fanout import context, source
        from fanout.definition import Definition, pack_definition, unpack_definition
        from fanout.protocol import messages as m

        code = run.definitions.get("code")
        if code is None:
            code = run.definitions["code"] = source.capture(source.is_remote_scheduler())
        own = context.container if self.came_whole else None
        is_own = False
        if own is not None and own.function is self.raw:
            # What this container runs, perhaps with other parameters. The scheduler knows it by
            # this definition, and it need not be pickled again.
            mine = unpack_definition(own.definition)
            target, payload = mine.target, own.definition
            is_own = mine.extra.get("parameters") == self.extra.get("parameters")
            if not is_own:
                mine.extra["parameters"] = self.extra["parameters"]
                payload = pack_definition(mine)
        else:
            target = source.make_target(self.raw, self.options.is_serialized)
            extra = {**source.describe_main(target), **self.extra}
            if self.options.env:
                extra["env"] = dict(self.options.env)
            payload = pack_definition(
                Definition(code.environment, target, self.app.name or "", self.name, extra)
            )
        options = {**self.options.as_data(), **self.shape}
        options["module"] = target.module
        options["environment"] = code.environment.fingerprint()
        options["python"] = f"{sys.executable} ({code.environment.python_version})"
        sources = code.environment.sources
        blobs = [bytes.fromhex(sources)] if sources else []
        function_id = id_of(run.app_id, self.name, options, payload)
        if own is not None and is_own:
            function_id = own.function_id
        define = m.DefineFunction(function_id, run.app_id, self.name, options, blobs, payload)
        return define, code.archive


def id_of(app_id: bytes, name: str, options: dict[str, Any], payload: bytes) -> bytes:
    """The id of a definition: 16 bytes that follow from its content."""
    import hashlib

    digest = hashlib.sha256()
    for part in (app_id, name.encode(), repr(sorted(options.items())).encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    digest.update(payload)
    return digest.digest()[:16]
