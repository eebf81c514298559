"""How a function is found without its code, and what only Modal's functions can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from fanout.exceptions import InvalidError

if TYPE_CHECKING:
    from fanout.function import Function


class FunctionSurface:
    """The part of `Function` that runs nothing."""

    @staticmethod
    def from_name(
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: Any = None,
    ) -> Function[..., Any, Any]:
        """A function of a deployed app. fanout has no deployed apps yet, so every use of the handle
        is an error that says what to do instead.

        Args:
            app_name, name: what to look for, later, when the handle is used.
            version, environment_name, client: as in Modal.

        Raises:
            InvalidError: a name is not one.
            NotFoundError: on every use of it.
        """
        from fanout.lookup import function_from_name

        return function_from_name(app_name, name)

    @staticmethod
    def lookup(app_name: str, name: str, **options: Any) -> NoReturn:
        """Older name of `from_name`, removed in Modal too.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"Function.lookup({app_name!r}, {name!r}): this is now Function.from_name, and fanout "
            "has no deployed apps yet; import the function from the module that defines it"
        )

    @staticmethod
    def from_id(function_id: str, *, client: Any = None) -> NoReturn:
        """In Modal, a function by its id. Functions have no ids of their own here.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(
            f"Function.from_id({function_id!r}): functions have no ids of their own here; import "
            "the function, or pass it as an argument, which is allowed"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from fanout.compat import missing_attribute

            raise missing_attribute("Function", name)
