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
    from fanout import types as types
    from fanout.app import App as App
    from fanout.app import LocalEntrypoint as LocalEntrypoint
    from fanout.app import Stub as Stub
    from fanout.call import FunctionCall as FunctionCall
    from fanout.cls import Cls as Cls
    from fanout.dict import Dict as Dict
    from fanout.exceptions import Error as Error
    from fanout.execution import current_function_call_id as current_function_call_id
    from fanout.execution import current_input_id as current_input_id
    from fanout.execution import interact as interact
    from fanout.execution import is_local as is_local
    from fanout.function import Function as Function
    from fanout.output import enable_output as enable_output
    from fanout.partial import batched as batched
    from fanout.partial import concurrent as concurrent
    from fanout.partial import enter as enter
    from fanout.partial import exit as exit
    from fanout.partial import method as method
    from fanout.partial import parameter as parameter
    from fanout.queue import Queue as Queue
    from fanout.retries import Retries as Retries

__version__ = "0.1.0"

_HOMES = {
    "App": "fanout.app",
    "Cls": "fanout.cls",
    "Dict": "fanout.dict",
    "Error": "fanout.exceptions",
    "Function": "fanout.function",
    "FunctionCall": "fanout.call",
    "LocalEntrypoint": "fanout.app",
    "Queue": "fanout.queue",
    "Retries": "fanout.retries",
    "Stub": "fanout.app",
    "batched": "fanout.partial",
    "concurrent": "fanout.partial",
    "current_function_call_id": "fanout.execution",
    "current_input_id": "fanout.execution",
    "enable_output": "fanout.output",
    "enter": "fanout.partial",
    "exit": "fanout.partial",
    "interact": "fanout.execution",
    "is_local": "fanout.execution",
    "method": "fanout.partial",
    "parameter": "fanout.partial",
}
_MODULES = {
    "exception": "fanout.exceptions",
    "exceptions": "fanout.exceptions",
    "types": "fanout.types",
}

__all__ = [
    "App",
    "Cls",
    "Dict",
    "Error",
    "Function",
    "FunctionCall",
    "LocalEntrypoint",
    "Queue",
    "Retries",
    "Stub",
    "batched",
    "concurrent",
    "current_function_call_id",
    "current_input_id",
    "enable_output",
    "enter",
    "exception",
    "exceptions",
    "exit",
    "interact",
    "is_local",
    "method",
    "parameter",
    "types",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif not name.startswith("_") and name in (compat := _compat()).NAMES:
        value = compat.absent(name)
    else:
        raise AttributeError(f"module 'fanout' has no attribute {name!r}")
    globals()[name] = value
    return value


def _compat() -> Any:
    """What is said of names that only Modal has; loaded when one is asked for."""
    import importlib

    return importlib.import_module("fanout.compat")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
