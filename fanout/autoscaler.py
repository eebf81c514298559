"""How many containers a function has: what it is set to, and what it is now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanout.exceptions import InvalidError
from fanout.options import DEFAULTS, check_options
from fanout.twin import twin

if TYPE_CHECKING:
    from fanout.service import Service


@dataclass(frozen=True, slots=True)
class FunctionCurrentStats:
    """What `get_current_stats` tells."""

    #: Inputs that wait for a container.
    backlog: int
    #: Containers that live.
    num_total_runners: int
    #: Inputs that containers have.
    num_running_inputs: int
    #: How many more inputs the containers could take at once.
    input_headroom: int


@dataclass(frozen=True, slots=True)
class AutoscalerSettings:
    """What `Autoscaler.settings` tells; `scaledown_window` in seconds."""

    min_containers: int
    max_containers: int | None
    buffer_containers: int
    scaledown_window: float


class Autoscaler:
    """Looks at, and changes, how the containers of one function or class are scaled."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def __repr__(self) -> str:
        return f"<fanout.Autoscaler of {self._service.name!r}>"

    async def _settings(self) -> AutoscalerSettings:
        """What holds now, updates included."""
        return _as_settings(await ask(self._service, {}))

    async def _update(
        self,
        *,
        min_containers: int | None = None,
        max_containers: int | None = None,
        buffer_containers: int | None = None,
        scaledown_window: float | None = None,
    ) -> AutoscalerSettings:
        """Change some settings for as long as the app runs; None leaves one as it is.

        Args:
            min_containers: containers that are kept even when idle.
            max_containers: containers that may live at a time.
            buffer_containers: idle containers kept ready beside those that work.
            scaledown_window: seconds an idle container is kept.

        Raises:
            InvalidError: a value is wrong, or the minimum would be above the maximum.
            ExecutionError: the app does not run.
        """
        given = {
            "min_containers": min_containers,
            "max_containers": max_containers,
            "buffer_containers": buffer_containers,
            "scaledown_window": scaledown_window,
        }
        check_options({**DEFAULTS, **given})
        changes = {name: value for name, value in given.items() if value is not None}
        return _as_settings(await ask(self._service, changes))

    settings = twin(_settings)
    update = twin(_update)


async def current_stats(service: Service) -> FunctionCurrentStats:
    """How busy the containers are at this moment."""
    info = await ask(service, {})
    return FunctionCurrentStats(
        info["backlog"], info["containers"], info["running"], info["headroom"]
    )


async def ask(service: Service, changes: dict[str, Any]) -> dict[str, Any]:
    """Ask the scheduler about a service, and change its settings if `changes` has any.

    Raises:
        InvalidError: the changes do not fit what is set.
        ExecutionError: the app does not run.
    """
    from fanout.client.sessions import connected
    from fanout.protocol import messages as m

    run = service.app._current_run(f"{service.name}.autoscaler")
    definition, sources = service.defined(run)
    session = await connected()
    session.use_app(run)
    session.define(definition, sources)
    question = m.AskFunction(session.next_request(), definition.function_id, changes)
    info: dict[str, Any] = (await session.ask(question)).info
    if "error" in info:
        raise InvalidError(f"{service.name}: {info['error']}")
    return info


def _as_settings(info: dict[str, Any]) -> AutoscalerSettings:
    return AutoscalerSettings(
        info["min_containers"],
        info["max_containers"],
        info["buffer_containers"],
        info["scaledown_window"],
    )
