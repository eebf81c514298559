"""Call graphs: which calls the inputs of a spawned call have made, and what became of them.

A nested call that is over is forgotten as soon as its client has its results, long before anybody
asks for the graph of the spawned call above it. So each nested call below a spawned one has a
`Node`, which stays. Calls that only somebody's attached call is above have none, because nobody
can ask for their graph: it ends with the answer.

Memory is bounded: of calls that are over, `ENDED_MAX` nodes are kept in all, the newest; an answer
has at most `ROWS_MAX` inputs, those nearest to the root. Whatever was left out, the answer says so.
Nothing of this is stored: after a restart of the scheduler a graph begins anew.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgpack

from fanout.protocol import messages as m
from fanout_scheduler.core.state import Call, Lease, Node, Peer, State

ENDED_MAX = 10_000
ROWS_MAX = 1000
#: Failures of one nested call that are remembered one by one.
FAILURES_MAX = 1000

#: Status words of `CallGraph`; by the code of a failure, everything else is "failure".
_BY_CODE = {"timeout": "timeout", "cancelled": "terminated", "start": "init_failure"}


def join(call: Call, lease: Lease, index: int) -> None:
    """Input `index` of a lease has made a call."""
    above = lease.call
    if above.node is None:
        if not above.is_durable:
            return
        above.node = Node(above.call_id, *_names(above), call=above)
    call.node = Node(call.call_id, *_names(call), call=call, parent=above.node, index=index)
    above.node.children.setdefault(index, []).append(call.node)


def note(call: Call, outputs: m.Outputs) -> None:
    """Outputs of a call that has a node. Those of spawned calls are kept anyway."""
    node = call.node
    assert node is not None
    if call.is_durable or not any(outputs.statuses):
        return
    for index, status in _failures(outputs):
        if len(node.failures) < FAILURES_MAX:
            node.failures[index] = status
        else:
            node.is_cut = True


def leave(state: State, call: Call) -> None:
    """A call is being forgotten; its node stays for a while."""
    node = call.node
    assert node is not None
    node.input_count = call.received.count
    node.finished = call.finished
    node.rest = "terminated" if call.failure is None else _status_of(call.failure)
    if call.is_durable:
        node.failures = _durable_failures(call)
    node.call = None
    if node.parent is None:
        return
    state.ended_nodes.append(node)
    while len(state.ended_nodes) > ENDED_MAX:
        oldest = state.ended_nodes.popleft()
        assert oldest.parent is not None
        oldest.parent.children[oldest.index].remove(oldest)
        oldest.parent.is_cut = True


def on_ask_call_graph(state: State, peer: Peer, message: m.AskCallGraph) -> None:
    call = state.calls.get(message.call_id)
    graph: dict[str, Any] = {}
    if call is not None and call.is_durable:
        graph = describe(call)
    state.send(peer.peer_id, m.CallGraph(message.request_id, graph))


def describe(call: Call) -> dict[str, Any]:
    """The graph below a spawned call as plain data, breadth first.

    `calls` lists [id, function, module]; `inputs` lists [position of its call in `calls`, index,
    position in `inputs` of the one that made its call or -1, status, container]. Flat, since
    calls may nest deeper than messages may.
    """
    root = call.node or Node(call.call_id, *_names(call), call=call)
    calls: list[list[Any]] = []
    inputs: list[list[Any]] = []
    is_cut = False
    waiting = deque([(root, -1)])
    while waiting:
        node, above = waiting.popleft()
        is_cut = is_cut or node.is_cut
        count = node.input_count if node.call is None else node.call.received.end
        shown = min(count, ROWS_MAX - len(inputs))
        is_cut = is_cut or shown < count
        if shown <= 0:
            continue
        calls.append([node.call_id.hex(), node.function, node.module])
        failures = node.failures
        if node.call is not None and node.call.is_durable:
            failures = _durable_failures(node.call)
        containers = _containers(node, shown)
        for index in range(shown):
            waiting.extend((child, len(inputs)) for child in node.children.get(index, ()))
            status = failures.get(index) or _status(node, index)
            inputs.append([len(calls) - 1, index, above, status, containers.get(index, "")])
    return {"calls": calls, "inputs": inputs, "is_cut": is_cut}


def _status(node: Node, index: int) -> str:
    """What is known of an input that did not fail by itself."""
    call = node.call
    if index in (node.finished if call is None else call.finished):
        return "success"
    if call is None:
        return node.rest
    return "pending" if call.failure is None else _status_of(call.failure)


def _containers(node: Node, stop: int) -> dict[int, str]:
    """Which container has each input below `stop` that one has."""
    if node.call is None:
        return {}
    return {
        index: f"ct-{lease.container.container_id:x}"
        for lease in node.call.leases.values()
        if not lease.is_cancelled
        for low, high in lease.open.common(0, stop)
        for index in range(low, high)
    }


def _names(call: Call) -> tuple[str, str]:
    definition = call.function.definition
    return definition.name, str(definition.options.get("module") or "")


def _durable_failures(call: Call) -> dict[int, str]:
    return {
        index: status
        for outputs in call.outputs
        if any(outputs.statuses)
        for index, status in _failures(outputs)
    }


def _failures(outputs: m.Outputs) -> list[tuple[int, str]]:
    """(index, status) of each output that is an error or a failure."""
    failures = []
    start = 0
    for position, size in enumerate(memoryview(outputs.lengths).cast("I")):
        status = outputs.statuses[position]
        if status == m.Status.ERROR:
            failures.append((outputs.start + position, "failure"))
        elif status == m.Status.FAILURE:
            payload = memoryview(outputs.payload)[start : start + size]
            failures.append((outputs.start + position, _status_of_payload(payload)))
        start += size
    return failures


def _status_of(failure: m.CallFailed) -> str:
    if failure.status != m.Status.FAILURE:
        # User code raised while it was loaded: no container could start.
        return "init_failure"
    return _status_of_payload(failure.payload)


def _status_of_payload(payload: bytes | memoryview) -> str:
    try:
        code = msgpack.unpackb(payload)[0]
    except Exception:
        # A worker wrote it. What it means is the client's concern, that it failed is certain.
        return "failure"
    return _BY_CODE.get(code, "failure")
