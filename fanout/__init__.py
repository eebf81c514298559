"""Modal's programming model for batch work, on machines of your own::

    import fanout

    app = fanout.App("squares")

    @app.function()
    def square(x: int) -> int:
        return x * x

    with app.run():
        print(sum(square.map(range(1000))))

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanout import exceptions as exception
    from fanout import exceptions as exceptions
    from fanout.app import App as App
    from fanout.app import LocalEntrypoint as LocalEntrypoint
    from fanout.app import Stub as Stub
    from fanout.call import FunctionCall as FunctionCall
    from fanout.exceptions import Error as Error
    from fanout.execution import current_function_call_id as current_function_call_id
    from fanout.execution import current_input_id as current_input_id
    from fanout.execution import interact as interact
    from fanout.execution import is_local as is_local
    from fanout.function import Function as Function
    from fanout.output import enable_output as enable_output
    from fanout.retries import Retries as Retries

__version__ = "0.1.0"

_HOMES = {
    "App": "fanout.app",
    "Error": "fanout.exceptions",
    "Function": "fanout.function",
    "FunctionCall": "fanout.call",
    "LocalEntrypoint": "fanout.app",
    "Retries": "fanout.retries",
    "Stub": "fanout.app",
    "current_function_call_id": "fanout.execution",
    "current_input_id": "fanout.execution",
    "enable_output": "fanout.output",
    "interact": "fanout.execution",
    "is_local": "fanout.execution",
}
_MODULES = {"exception": "fanout.exceptions", "exceptions": "fanout.exceptions"}

__all__ = [
    "App",
    "Error",
    "Function",
    "FunctionCall",
    "LocalEntrypoint",
    "Retries",
    "Stub",
    "current_function_call_id",
    "current_input_id",
    "enable_output",
    "exception",
    "exceptions",
    "interact",
    "is_local",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'fanout' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
