"""The bodies of `functions.py` as functions of an app."""

from __future__ import annotations

import fanout

app = fanout.App("benchmark")


@app.function()
def noop(x: int) -> int:
    return x


@app.function()
def echo(data: bytes) -> bytes:
    return data


@app.function(cpu=1000)
def unplaceable(x: int) -> int:
    """No machine has so many cores: its calls wait."""
    return x
