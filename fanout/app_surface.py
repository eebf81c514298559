"""What an app says of itself, how apps are put together, and what only deployed ones could do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fanout.exceptions import InvalidError
from fanout.twin import Twin

if TYPE_CHECKING:
    from typing import Self

    from fanout.client.app_run import AppRun
    from fanout.cls import Cls
    from fanout.function import Function

T = TypeVar("T")

_NO_DEPLOYED_APPS = (
    "fanout has no deployed apps yet: an app runs while `with app.run():` or `fanout run` lasts"
)


class AppSurface:
    """The part of `App` that declares no function and runs nothing."""

    registered_functions: dict[str, Function[..., Any, Any]]
    registered_classes: dict[str, Cls]
    _name: str | None
    _run: AppRun | None

    def __init__(self, tags: Mapping[str, str] | None) -> None:
        self._tags = _checked_tags(tags)
        #: Apps that include this one: its functions run when one of them does.
        self._includers: list[AppSurface] = []
        #: Apps that this one includes.
        self._included: list[AppSurface] = []

    @property
    def description(self) -> str | None:
        """Its name; without one, that of the run under way."""
        return self._name or (self._run.name if self._run is not None else None) or None

    @property
    def registered_web_endpoints(self) -> list[str]:
        """Always empty: fanout serves no HTTP."""
        return []

    def include(self, other_app: AppSurface, inherit_tags: bool = True) -> Self:
        """Take the functions and classes of another app into this one, which is returned: they run
        while this app does, and are found by their names in `registered_functions` and
        `registered_classes`.

        Args:
            other_app: the other app. It may still run by itself.
            inherit_tags: take its tags too, where this app has none of that name.

        Raises:
            InvalidError: not an app, or this one.
        """
        if not isinstance(other_app, AppSurface) or other_app is self:
            raise InvalidError(f"include({other_app!r}): must be an App, and not this one")
        self._take(other_app, self.registered_functions, other_app.registered_functions, "function")
        self._take(other_app, self.registered_classes, other_app.registered_classes, "class")
        if self not in other_app._includers:
            other_app._includers.append(self)
            self._included.append(other_app)
        if inherit_tags:
            self._tags = {**other_app._tags, **self._tags}
        return self

    def _take(
        self, other_app: AppSurface, mine: dict[str, T], others: dict[str, T], kind: str
    ) -> None:
        for name, thing in others.items():
            if mine.get(name, thing) is not thing:
                from fanout.warning import warn_of_declaration

                warn_of_declaration(
                    f"app {self._name!r} has a {kind} {name!r}, and app {other_app._name!r} that "
                    "it includes has another; the included one is found by that name"
                )
            mine[name] = thing

    def _set_tags(self, tags: Mapping[str, str], *, client: Any = None) -> None:
        """Replace the tags. They are for the program itself: nothing else reads them yet.

        Raises:
            InvalidError: keys and values are not texts.
        """
        from fanout.compat import reject_cloud_options

        reject_cloud_options("set_tags", {"client": client})
        self._tags = _checked_tags(tags)

    async def _set_tags_aio(self, tags: Mapping[str, str], *, client: Any = None) -> None:
        self._set_tags(tags, client=client)

    def _get_tags(self, *, client: Any = None) -> dict[str, str]:
        """A copy of the tags."""
        from fanout.compat import reject_cloud_options

        reject_cloud_options("get_tags", {"client": client})
        return dict(self._tags)

    async def _get_tags_aio(self, *, client: Any = None) -> dict[str, str]:
        return self._get_tags(client=client)

    set_tags = Twin(_set_tags, _set_tags_aio)
    get_tags = Twin(_get_tags, _get_tags_aio)

    def _including_run(self) -> AppRun | None:
        """The run of an app that includes this one."""
        waiting, seen = list(self._includers), {id(self)}
        while waiting:
            app = waiting.pop()
            if app._run is not None:
                return app._run
            if id(app) not in seen:
                seen.add(id(app))
                waiting += app._includers
        return None

    def _running_with(self) -> list[AppSurface]:
        """This app, and those it includes, directly or not, that have no run of their own."""
        found: list[AppSurface] = [self]
        for app in found:
            found += [a for a in app._included if a._run is None and a not in found]
        return found

    # --- what deployed apps are for --------------------------------------------------------------

    @staticmethod
    def lookup(name: str, **options: Any) -> NoReturn:
        """In Modal, a deployed app by its name. Not in fanout yet.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"App.lookup({name!r}): {_NO_DEPLOYED_APPS}; import the app from the module that "
            "defines it"
        )

    def deploy(self, **options: Any) -> NoReturn:
        """In Modal, keep the app for good. Not in fanout yet.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"app.deploy(): {_NO_DEPLOYED_APPS}. What `spawn` and `spawn_map` have started goes on "
            "after that, and its results are kept for 7 days"
        )

    def stop(self, **options: Any) -> NoReturn:
        """In Modal, end an app from outside. Not in fanout yet.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"app.stop(): {_NO_DEPLOYED_APPS}, so leave that block; end a spawned call with "
            "`call.cancel()`"
        )

    def get_dashboard_url(self) -> NoReturn:
        """In Modal, the app's page. Not in fanout yet.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            "app.get_dashboard_url(): fanout has no pages to show yet; `fanout status` tells what "
            "runs"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from fanout.compat import missing_attribute

            raise missing_attribute("App", name)


def _checked_tags(tags: Any) -> dict[str, str]:
    tags = {} if tags is None else tags
    is_right = isinstance(tags, Mapping) and all(
        isinstance(text, str) and text for pair in tags.items() for text in pair
    )
    if not is_right:
        raise InvalidError(
            f"tags={tags!r}: must be a dict of texts that are not empty, such as "
            '{"team": "search"}'
        )
    return dict(tags)
