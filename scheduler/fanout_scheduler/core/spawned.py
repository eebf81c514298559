"""How much memory spawned calls take, and whether there is enough for more of them.

Their inputs and outputs are on disk and in memory: a container can be given an input, and a client
an output, at any time. Nobody waits for a spawned call, so nothing slows those down who make them;
instead there is a bound, beyond which a spawn fails with an error that says so. What was accepted
goes on, and its outputs are kept, beyond the bound if need be.
"""

from __future__ import annotations

from fanout.protocol import messages as m
from fanout_scheduler.core.chunk import Chunk
from fanout_scheduler.core.state import Call, State

#: What a call costs beside its inputs and outputs, and a frame beside what is in it.
CALL_SIZE_BYTES = 2500
FRAME_SIZE_BYTES = 400


def size_of(frame: m.Inputs | m.Outputs | m.SubmitCall | Chunk) -> int:
    return FRAME_SIZE_BYTES + len(frame.payload) + len(frame.lengths)


def refusal(state: State, frame: m.Inputs | m.SubmitCall | None) -> str:
    """Why a call, or more inputs of one, cannot be taken; "" if they can."""
    wanted = CALL_SIZE_BYTES if frame is None else size_of(frame)
    if state.spawned_bytes + state.arriving_bytes + wanted <= state.spawned_bytes_max:
        return ""
    return (
        f"inputs and results of spawned calls take {state.spawned_bytes >> 20} MiB of the "
        f"scheduler's memory, and {state.spawned_bytes_max >> 20} MiB are allowed. Spawn again "
        f"when some have run, spawn fewer or smaller inputs at a time, or start the scheduler with "
        f"a larger FANOUT_SPAWNED_MEMORY"
    )


def grew(state: State, call: Call, what: m.Outputs | Chunk) -> None:
    """Inputs or outputs of a call are kept from now on."""
    if call.is_durable:
        state.spawned_bytes += size_of(what)


def shrank(state: State, call: Call, what: m.Outputs | Chunk) -> None:
    """They are kept no longer."""
    if call.is_durable:
        state.spawned_bytes -= size_of(what)


def check(state: State) -> None:
    """17. The memory of spawned calls is what they hold, and what is on its way to disk."""
    held = 0
    for call in state.calls.values():
        if call.is_durable:
            held += CALL_SIZE_BYTES
            held += sum(map(size_of, call.chunks.values())) + sum(map(size_of, call.outputs))
    assert held == state.spawned_bytes, f"17: {held} bytes held, {state.spawned_bytes} counted"
    arriving = sum(
        size_of(record)
        for pending in state.pending_stores.values()
        for record in pending.records
        if isinstance(record, m.Inputs)
    )
    assert arriving == state.arriving_bytes, f"17: {arriving} != {state.arriving_bytes} arriving"
