"""How inputs and containers end when it is not the user's code that ends them: texts and codes."""

from __future__ import annotations

import signal
from typing import Any

from fanout.protocol.messages import Status, failure_payload
from fanout_worker import resources, shared

#: What `ContainerExited.reason` says of an input that the daemon stopped.
REASONS = {shared.REASON_TIMEOUT: "timeout", shared.REASON_CANCELLED: "cancelled"}

#: Without `startup_timeout`, code may take at least so long to be loaded.
START_LIMIT_S_MIN = 60.0


#: A container that held so much of what the worker may use was killed for it, most likely.
NEAR_LIMIT = 0.95


def stopped_payload(reason: int, timeout_s: float | None, call_id: bytes, index: int) -> bytes:
    """The output of an input that the daemon stopped, for `shared.REASON_...`."""
    details: dict[str, Any] = {"call_id": call_id, "input_index": index}
    if reason == shared.REASON_TIMEOUT:
        text = f"the input ran longer than timeout={timeout_s:g} s"
        return failure_payload("timeout", text, details | {"timeout": timeout_s})
    return failure_payload("cancelled", "the call was cancelled while the input ran", details)


def start_limit(options: dict[str, Any]) -> tuple[float, str] | None:
    """How many seconds a container of these options has to load the user's code, and what is said
    of one that has not; None if it has for ever.

    Without a limit of its own it has that of an input, which the client may have filled in. Not
    less than a minute then: a short one was set for inputs, and says nothing of how long the
    imports take.
    """
    limit_s: float | None = options.get("startup_timeout")
    timeout_s: float | None = options.get("timeout")
    code = "the user's code, with its enter hooks," if options.get("methods") else "the user's code"
    if limit_s is not None and limit_s != timeout_s:
        return limit_s, f"{code} was not loaded within startup_timeout={limit_s:g} s"
    if timeout_s is None:
        return None
    limit_s = max(timeout_s, START_LIMIT_S_MIN)
    return limit_s, f"{code} was not loaded within {limit_s:g} s; startup_timeout= allows for more"


def exit_details(
    status: int | None, peak_memory_kib: int, function_name: str, is_started: bool
) -> dict[str, Any]:
    """`ContainerExited.details` of a container that has ended.

    Args:
        status: as `os.wait` gives it; None if it is not known.
        peak_memory_kib: its largest resident set.
        function_name: for the text.
        is_started: whether it had loaded the user's code.
    """
    exit_code: int | None = None
    name: str | None = None
    if status is None:
        how = "ended"
    elif status & 0x7F:
        number = status & 0x7F
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        how = f"was killed by {name}"
    else:
        exit_code = status >> 8
        how = f"exited with code {exit_code}"
    peak_memory_mib = peak_memory_kib // 1024
    when = "" if is_started else " while it loaded the user's code"
    peak = f"its peak memory was {peak_memory_mib} MiB"
    text = f"the container of {function_name} {how}{when}; {peak}"
    return {
        "exit_code": exit_code,
        "signal": name,
        "peak_memory_mib": peak_memory_mib,
        "text": text,
    }


def explain_kill(
    details: dict[str, Any], options: dict[str, Any], oom_kill_count_before: int | None
) -> None:
    """Say of a container that was killed by SIGKILL, and not by the worker, what is known of why.

    Args:
        details: as `exit_details` made them; gets a text that goes on, and what it is made of.
        options: of the function.
        oom_kill_count_before: `resources.oom_kill_count()` when the container was started.
    """
    now = resources.oom_kill_count()
    if now is not None and oom_kill_count_before is not None:
        details["is_out_of_memory"] = now > oom_kill_count_before
    details["memory_limit_mib"] = resources.memory_mib()
    details["memory_mib"] = options.get("memory")
    details["text"] += kill_reason(details)


def kill_reason(details: dict[str, Any]) -> str:
    """The end of the text about a container that was killed by SIGKILL."""
    peak_mib, limit_mib = details["peak_memory_mib"], details["memory_limit_mib"]
    asked_mib, is_out_of_memory = details.get("memory_mib"), details.get("is_out_of_memory")
    text = ". Nothing in fanout killed it"
    if is_out_of_memory or peak_mib >= NEAR_LIMIT * limit_mib:
        text = f", and this worker may use {limit_mib} MiB"
        text += ". The kernel killed it for want of memory" if is_out_of_memory else ""
        if asked_mib:
            text += f". The function asked for memory={asked_mib}"
        return text + "; ask for as much as it needs with memory=, so that fewer run at a time"
    if is_out_of_memory is None:
        return text + "; was the host out of memory?"
    return text + ", and the kernel killed nothing for want of memory"


def replaced(
    segment: shared.Segment, reason: int, timeout_s: float | None, call_id: bytes, index: int
) -> shared.Segment:
    """The segment, with the output of the stopped input saying so, whatever the code made of it:
    an input that ran over its time has not succeeded, even if it swallowed the signal."""
    at = index - segment.index
    lengths = list(memoryview(segment.lengths).cast("I"))
    start = sum(lengths[:at])
    payload = stopped_payload(reason, timeout_s, call_id, index)
    rest = segment.payload[start + lengths[at] :]
    lengths[at] = len(payload)
    statuses = bytearray(segment.statuses)
    statuses[at] = Status.FAILURE
    return shared.Segment(
        segment.slot, segment.kind, segment.index, segment.number, segment.count,
        segment.busy_us, b"".join(n.to_bytes(4, "little") for n in lengths), bytes(statuses),
        segment.payload[:start] + payload + rest,
    )  # fmt: skip
