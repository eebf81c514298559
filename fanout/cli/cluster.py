"""`fanout status` and `fanout stop`: look at a scheduler, and end the embedded one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fanout.cli.failure import EXIT_ERROR, complain
from fanout.client.home import home_folder
from fanout.client.local import ask_status, cluster_status, stop_cluster
from fanout.protocol.join import JoinString

_GAP = "  "


def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all there is, for a program.")
    ] = False,
) -> None:
    """Show the scheduler, its workers, containers, functions and calls. Starts nothing."""
    url = os.environ.get("FANOUT_URL")
    if url:
        join = JoinString.parse(url)
        found: dict[str, Any] | None = ask_status(join) | {"address": str(join.address)}
    else:
        found = cluster_status()
    if found is None:
        complain(
            f"no scheduler runs on this machine (looked in {home_folder()}). "
            f"`fanout run` starts one; FANOUT_URL names one elsewhere."
        )
        raise typer.Exit(EXIT_ERROR)
    if as_json:
        typer.echo(json.dumps(found, indent=1, default=_plain))
    else:
        typer.echo("\n".join(status_lines(found)))


def stop(
    force: Annotated[
        bool,
        typer.Option("--force", help="Also while calls are queued or running: they are lost."),
    ] = False,
) -> None:
    """End the scheduler and the worker that fanout started on this machine by itself."""
    if os.environ.get("FANOUT_URL"):
        complain(
            "FANOUT_URL is set, and this ends only what runs on this machine by itself; "
            "a scheduler that you started ends by Ctrl-C or SIGTERM"
        )
    done = stop_cluster(force)
    if not done.is_stopped:
        complain(f"not stopped, there is work: {done.text}. `fanout stop --force` drops it.")
        raise typer.Exit(EXIT_ERROR)
    typer.echo("stopped" if done.was_running else "nothing runs on this machine")


# --- how a snapshot reads ------------------------------------------------------------------------


def status_lines(status: dict[str, Any]) -> list[str]:
    """The lines of `fanout status` for a scheduler's snapshot; unknown keys are left out."""
    lines = [_scheduler_line(status)]
    if status.get("home"):
        lines.append(f"{_GAP}state in {status['home']}")
    lines += section_lines(
        "workers",
        ("NAME", "CPU FREE", "MEMORY MIB", "CONTAINERS", "STATE"),
        [
            (
                worker.get("name"),
                f"{_number(worker.get('cpu_free'))} of {_number(worker.get('cpu'))}",
                worker.get("memory"),
                worker.get("containers"),
                _worker_state(worker),
            )
            for worker in status.get("workers", [])
        ],
    )
    lines += section_lines(
        "containers",
        ("ID", "FUNCTION", "WORKER", "STATE", "LEASES", "WAITS FOR"),
        [
            [container.get(key) for key in ("id", "function", "worker", "state", "leases", "waits")]
            for container in status.get("containers", [])
        ],
    )
    lines += section_lines(
        "functions",
        ("NAME", "APP", "CONTAINERS", "MAX"),
        [
            [function.get(key) for key in ("name", "app", "containers", "max_containers")]
            for function in status.get("functions", [])
        ],
    )
    calls = status.get("calls", [])
    lines += section_lines(
        "calls",
        ("ID", "FUNCTION", "STATE", "INPUTS", "QUEUED", "RUNNING", "DONE", "KIND", "WAITS FOR"),
        [_call_row(call) for call in calls],
    )
    more = status.get("call_count", 0) - len(calls)
    if more > 0:
        lines.append(f"{_GAP}and {more} more")
    return lines


def _scheduler_line(status: dict[str, Any]) -> str:
    parts = ["scheduler"]
    if status.get("address"):
        parts.append(f"at {status['address']}")
    if status.get("scheduler_pid"):
        parts.append(f"pid {status['scheduler_pid']}")
    if status.get("uptime_s") is not None:
        parts.append(f"up {_duration(status['uptime_s'])}")
    if status.get("epoch") is not None:
        parts.append(f"epoch {status['epoch']}")
    return _GAP.join(parts)


def _worker_state(worker: dict[str, Any]) -> str:
    if not worker.get("is_connected", True):
        return "lost"
    kept_for = worker.get("reserved_for")
    return f"kept free for {kept_for}" if kept_for else "ready"


def _call_row(call: dict[str, Any]) -> list[Any]:
    counts = [call.get(key) for key in ("inputs", "queued", "running", "done")]
    kind = "spawned" if call.get("durable") else "attached"
    head = [call.get("id"), call.get("function"), call.get("state")]
    return [*head, *counts, kind, call.get("waiting_for")]


def section_lines(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A title and a table below it, an empty line before."""
    if not rows:
        return ["", f"{title}: none"]
    table = [list(heads)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = ["", f"{title}:"]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append((_GAP + _GAP.join(cells)).rstrip())
    return lines


def _cell(value: Any) -> str:
    if value is None or value == "" or value is False:
        return "-"
    if value is True:
        return "yes"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple | set):
        return ", ".join(_cell(element) for element in value) or "-"
    return str(value).replace("\n", " ")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else _cell(value)


def _duration(seconds: float) -> str:
    """At most two units: ``45 s``, ``3 min``, ``2 h 5 min``, ``4 d 1 h``."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)
