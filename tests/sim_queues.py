"""Clients of a simulated fanout that put into one queue and get out of it; see `sim_world.py`.

Each plays the client's part of the rule in `core/object_requests.py`, as `fanout/client/objects.py`
does: repeat after a reconnect what is not answered, then say that this was all; acknowledge answers
when they are taken; cancel as abandoned what nobody waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fanout.protocol import messages as m
from tests.sim_world import Link, World, copy

QUEUE = b"Q" * 16


class SimQueueUser:
    """A client process that uses a queue."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.session_id = b"queue user" + number.to_bytes(6, "big")
        self.link: Link | None = None
        self.is_gone = False
        self.requests: dict[int, m.Message] = {}
        self.request_count = 0
        self.value_count = 0
        #: Values that were acknowledged; that were refused; that are under way, by request.
        self.put_values: set[bytes] = set()
        self.refused: set[bytes] = set()
        self.under_way: dict[int, list[bytes]] = {}
        self.got: Counter[bytes] = Counter()
        self.empty_count = 0
        self._ask(lambda n: m.OpenObject(n, QUEUE, 1, "sim", m.OpenMode.MAKE_IF_MISSING))
        self.connect()

    def connect(self) -> None:
        if self.is_gone or self.link is not None:
            return
        world = self.world
        self.link = world.scheduler.accept("client", self.session_id, self.receive, self.on_lost)
        if self.link is None:
            world.after(0.1 + world.random.random(), self.connect)
            return
        for message in self.requests.values():
            self.link.up(message)
        self.link.up(m.RequestsRepeated(len(self.requests)))

    def on_lost(self) -> None:
        self.link = None
        self.world.after(0.05 + self.world.random.random(), self.connect)

    def go(self) -> None:
        """The process dies."""
        self.is_gone = True
        if self.link is not None:
            self.link.cut("queue user died")

    # --- requests --------------------------------------------------------------------------------

    def _ask(self, make: Callable[[int], m.Message]) -> int:
        self.request_count += 1
        # The core takes a put's values out of the frame.
        self.requests[self.request_count] = message = make(self.request_count)
        if self.link is not None:
            self.link.up(copy(message))
        return self.request_count

    def act(self) -> None:
        """Something that a program does."""
        if self.is_gone:
            return
        random = self.world.random
        choice = random.random()
        if choice < 0.4:
            self.put(random.randint(1, 3), random.random() < 0.8)
        elif choice < 0.8:
            self.get(random.randint(1, 3), random.random() < 0.7)
        else:
            gets = [n for n, q in self.requests.items() if isinstance(q, m.QueueGet)]
            if gets:
                self.cancel(random.choice(gets), is_abandoned=random.random() < 0.5)

    def put(self, count: int, block: bool) -> None:
        values = []
        for _ in range(count):
            self.value_count += 1
            values.append(b"%d/%d" % (self.number, self.value_count))
        lengths = b"".join(len(value).to_bytes(4, "little") for value in values)
        payload = b"".join(values)
        number = self._ask(lambda n: m.QueuePut(n, QUEUE, b"", 1e6, block, lengths, payload))
        self.under_way[number] = values

    def get(self, count: int, block: bool) -> None:
        self._ask(lambda n: m.QueueGet(n, QUEUE, b"", count, block))

    def cancel(self, target: int, is_abandoned: bool) -> None:
        if is_abandoned:
            del self.requests[target]
        self._ask(lambda n: m.CancelRequest(n, target, is_abandoned))

    def receive(self, message: m.Message) -> None:
        if not isinstance(message, m.ObjectAnswer):
            return
        question = self.requests.pop(message.request_id, None)
        if question is None:
            return  # abandoned, or answered before the connection was lost
        if isinstance(question, m.QueuePut):
            self._take_put(message)
        elif isinstance(question, m.QueueGet):
            self._take_get(message)
        elif isinstance(question, m.CancelRequest) and not question.is_abandoned and message.number:
            self.requests.pop(question.target, None)

    def _take_put(self, answer: m.ObjectAnswer) -> None:
        values = self.under_way.pop(answer.request_id)
        if answer.code == "ok":
            self.put_values.update(values)
            self._done(answer.request_id)
        else:
            assert answer.code in ("store", "full", "missing"), answer
            self.refused.update(values)

    def _take_get(self, answer: m.ObjectAnswer) -> None:
        if answer.code != "ok":
            assert answer.code in ("store", "empty", "missing"), answer
            self.empty_count += answer.code == "empty"
            return
        offset = 0
        for size in memoryview(answer.lengths).cast("I"):
            value = bytes(answer.payload[offset : offset + size])
            self.got[value] += 1
            offset += size
        self._done(answer.request_id)

    def _done(self, request_id: int) -> None:
        if self.link is not None:
            self.link.up(m.RequestsDone([(request_id, 1)]))

    @property
    def is_settled(self) -> bool:
        """No put waits for its answer."""
        return not self.under_way


def verify_queue(users: list[SimQueueUser]) -> Counter[str]:
    """No item that was acknowledged is lost, none that was refused appears, none comes twice but
    what a client had got that was then lost before it could say so."""
    alive: Counter[bytes] = Counter()
    for user in users:
        if not user.is_gone:
            alive.update(user.got)
    dead = {value for user in users if user.is_gone for value in user.got}
    put = set().union(*[user.put_values for user in users])
    refused = set().union(*[user.refused for user in users])
    maybe = {value for user in users for row in user.under_way.values() for value in row}
    lost = put - alive.keys() - dead
    assert not lost, f"items lost: {sorted(lost)}"
    invented = (alive.keys() | dead) - put - maybe
    assert not invented & refused, f"items that were refused appeared: {sorted(invented)}"
    assert not invented, f"items that nobody put: {sorted(invented)}"
    doubled = {value: count for value, count in alive.items() if count > 1}
    assert not doubled, f"items came twice: {doubled}"
    return Counter({"item through a queue": len(alive), "item whose taker died": len(dead)})
