"""The function bodies that every engine runs: plain functions, so that any peer can pickle them."""

from __future__ import annotations


def noop(x: int) -> int:
    return x


def echo(data: bytes) -> bytes:
    return data
