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
    from fanout.dict import Dict as Dict
    from fanout.exceptions import Error as Error
    from fanout.function import Function as Function
    from fanout.output import enable_output as enable_output
    from fanout.queue import Queue as Queue
    from fanout.retries import Retries as Retries

__version__ = "0.1.0"

_HOMES = {
    "App": "fanout.app",
    "Dict": "fanout.dict",
    "Error": "fanout.exceptions",
    "Function": "fanout.function",
    "FunctionCall": "fanout.call",
    "LocalEntrypoint": "fanout.app",
    "Queue": "fanout.queue",
    "Retries": "fanout.retries",
    "Stub": "fanout.app",
    "enable_output": "fanout.output",
}
_MODULES = {"exception": "fanout.exceptions", "exceptions": "fanout.exceptions"}

__all__ = [
    "App",
    "Dict",
    "Error",
    "Function",
    "FunctionCall",
    "LocalEntrypoint",
    "Queue",
    "Retries",
    "Stub",
    "enable_output",
    "exception",
    "exceptions",
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
