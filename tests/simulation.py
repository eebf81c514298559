"""Seeded simulation of a whole fanout: storm, heal, then everything must have ended exactly once.

    python tests/simulation.py                     # as `make sim`: until 2 million events
    python tests/simulation.py --seed 7 -v         # replay one seed, with its story
    python tests/simulation.py --events 20000000   # for as long as wanted

Each seed draws its own fault rates, so one run is a gentle network and another a storm of
partitions. During the storm there are: cuts, half-open links, stalls, stopped schedulers and
workers (past their deadlines, so that inputs run twice), killed schedulers (everything that was
not stored is lost, also between commit and acknowledgement), killed workers and containers,
containers that cannot start, a full disk, paused consumers, lost clients, cancelled calls. Then
faults end, and within a bound of virtual time every call must finish, each input must have ended
exactly once with its own value, items in order and none missing, and the scheduler must be back
at its baseline: no lease, every core free, no call but the finished spawned ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("", "scheduler", "worker"):
    sys.path.insert(0, str(ROOT / folder))

from fanout.protocol import messages as m  # noqa: E402
from fanout_scheduler.core.events import FrameReceived, PeerId  # noqa: E402
from tests.sim_peers import Plan, SimCall, SimClient, SimWorker  # noqa: E402
from tests.sim_queues import SimQueueUser, verify_queue  # noqa: E402
from tests.sim_world import APP, World  # noqa: E402

EVENTS_DEFAULT = 2_000_000
STORM_S = 60.0
#: Virtual time after the storm in which everything must have ended. Long enough for a client's
#: grace, a worker's deadline and the retries of what a full disk refused.
HEAL_S = 600.0

#: How often each fault strikes in a second of the storm, at most; each seed draws less.
FAULTS_PER_S = {
    "client cut": 0.15,
    "worker cut": 0.15,
    "half-open link": 0.05,
    "stall": 0.2,
    "scheduler killed": 0.05,
    "scheduler stopped": 0.03,
    "worker killed": 0.06,
    "worker stopped": 0.05,
    "disk full": 0.02,
    "consumer paused": 0.1,
    "client died": 0.01,
    "queue user died": 0.01,
    "call cancelled": 0.1,
}
CHANCES = {"container crash": 0.02, "start failure": 0.02, "kill at commit": 0.01}


class Storm(World):
    """A world with faults, whose rates its seed has drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        random = self.random
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        for name, highest in {**FAULTS_PER_S, **CHANCES}.items():
            self.rates[name] = highest * random.random() if random.random() < 0.7 else 0.0
        self.plans = make_plans(self)
        by_id = {plan.function_id: plan for plan in self.plans}
        self.scheduler.start()
        for number in range(random.randint(1, 3)):
            self.workers.append(SimWorker(self, number, float(random.randint(1, 4)), by_id))
        for number in range(1, random.randint(2, 4)):
            self.clients.append(SimClient(self, number, self.plans))
        self.queue_users = [SimQueueUser(self, number) for number in range(random.randint(2, 3))]
        self.finished_calls = 0
        self.is_storming = True

    def restart_scheduler(self) -> None:
        """SIGKILL, and a while later a new life with what was stored."""
        if not self.scheduler.is_up:
            return
        self.log("scheduler killed")
        self.scheduler.kill()
        self.after(0.05 + self.random.random() * 4, self.scheduler.start)

    # --- the storm -------------------------------------------------------------------------------

    def schedule_faults(self, end: float) -> None:
        for name in FAULTS_PER_S:
            rate = self.rates[name]
            when = self.now
            while rate and (when := when + self.random.expovariate(rate)) < end:
                self.at(when, lambda name=name: self.strike(name))  # type: ignore[misc]
        when = self.now
        while (when := when + self.random.expovariate(1.5)) < end:
            self.at(when, self.open_call)
        when = self.now
        while (when := when + self.random.expovariate(4.0)) < end:
            self.at(when, self.use_queue)

    def strike(self, name: str) -> None:
        self.counts[name] += 1
        self.log(name)
        getattr(self, "do_" + name.replace(" ", "_").replace("-", "_"))()

    def _some_link(self, kinds: str) -> Any:
        owners: list[Any] = []
        if "c" in kinds:
            users: list[Any] = [*self.clients, *self.queue_users]
            owners += [c for c in users if c.link is not None and not c.is_gone]
        if "w" in kinds:
            owners += [x for x in self.workers if x.link is not None and not x.is_dead]
        return self.random.choice(owners).link if owners else None

    def do_client_cut(self) -> None:
        link = self._some_link("c")
        if link is not None:
            link.cut("client")

    def do_worker_cut(self) -> None:
        link = self._some_link("w")
        if link is not None:
            link.cut("worker")

    def do_half_open_link(self) -> None:
        """Bytes vanish both ways; the peer's TCP finds out later than the worker deadline."""
        link = self._some_link("cw")
        if link is not None:
            link.is_half_open = True
            self.after(10 + self.random.random() * 20, link.close_here)
            self.after(10 + self.random.random() * 20, link.close_there)

    def do_stall(self) -> None:
        link = self._some_link("cw")
        if link is not None:
            link.stalled_until = self.now + self.random.random() * 20

    def do_scheduler_killed(self) -> None:
        self.restart_scheduler()

    def do_scheduler_stopped(self) -> None:
        seconds = 1 + self.random.random() * 30
        self.scheduler.stop(seconds)
        self.scheduler.gap_s = seconds
        self.scheduler.tell(FrameReceived(PeerId(0), m.Heartbeat(0)))

    def do_worker_killed(self) -> None:
        worker = self.random.choice(self.workers)
        if not worker.is_dead:
            worker.kill()

    def do_worker_stopped(self) -> None:
        self.random.choice(self.workers).pause(self.random.random() * 40)

    def do_disk_full(self) -> None:
        self.disk.is_full = True
        self.after(self.random.random() * 5, self.do_disk_free)

    def do_disk_free(self) -> None:
        self.disk.is_full = False

    def do_consumer_paused(self) -> None:
        client = self.random.choice(self.clients)
        client.is_paused = True
        self.after(self.random.random() * 8, client.resume)

    def do_client_died(self) -> None:
        alive = [client for client in self.clients if not client.is_gone]
        if len(alive) > 1:
            self.random.choice(alive).go()

    def do_call_cancelled(self) -> None:
        client = self.random.choice(self.clients)
        open_calls = [c for c in client.calls.values() if not c.is_finished]
        if open_calls and not client.is_gone:
            client.cancel(self.random.choice(open_calls))

    def do_queue_user_died(self) -> None:
        alive = [user for user in self.queue_users if not user.is_gone]
        if len(alive) > 1:
            self.random.choice(alive).go()

    def use_queue(self) -> None:
        self.random.choice(self.queue_users).act()

    def open_call(self) -> None:
        random = self.random
        client = random.choice(self.clients)
        if client.is_gone:
            return
        plan = random.choice(self.plans)
        count = random.choice([1, 1, 3, 30, 300])
        if plan.item_count or plan.nested is not None or plan.name == "slow":
            count = min(count, 8)
        is_durable = random.random() < 0.25 and not plan.item_count
        client.open(plan, count, random.random() < 0.5, is_durable)
        self.counts["durable call" if is_durable else "attached call"] += 1

    # --- after it --------------------------------------------------------------------------------

    def heal(self) -> None:
        self.is_storming = False
        self.rates = dict.fromkeys(self.rates, 0.0)
        self.disk.is_full = False
        for plan in self.plans:
            plan.error_rate = 0.0
        for client in self.clients:
            client.resume()
            if client.is_gone:
                client.calls.clear()

    def is_quiet(self) -> bool:
        return (
            self.scheduler.is_up
            and all(call.is_finished for client in self.clients for call in client.calls.values())
            and not any(not call.is_over for call in self.scheduler.core.state.calls.values())
            and all(user.is_settled or user.is_gone for user in self.queue_users)
        )

    def verify(self) -> None:
        """Everything ended, exactly once, and nothing is left."""
        for client in self.clients:
            for call in client.calls.values():
                if not client.is_gone and not call.is_cancelled:
                    verify_call(call)
        for client in self.clients:
            if client.link is not None:
                client.link.up(m.CloseApp(APP))
        self.run_until(self.now + 200.0)
        core = self.scheduler.core
        core.check()
        state = core.state
        assert not state.leases, f"leases left: {list(state.leases)}"
        assert all(call.is_over for call in state.calls.values()), "calls left open"
        for worker in state.workers.values():
            assert abs(worker.cpu_free - worker.cpu) < 1e-6, f"cores of {worker.name} not free"
        assert not state.pending_stores, "records never stored"
        assert not state.resuming, "containers that wait for nothing"
        assert len(state.workers) == len(self.workers), "workers not back"
        for name, count in state.counts.items():
            self.counts["late or odd: " + name] += count
        self.verify_spawned()
        self.drain_queue()

    def drain_queue(self) -> None:
        """What is left in the queue is got by one client; then nothing is missing or doubled."""
        users = [user for user in self.queue_users if not user.is_gone]
        last = users[0]
        # Waits of the storm may still be served; and what dead clients held has come back.
        for user in users:
            for number in [n for n, q in user.requests.items() if isinstance(q, m.QueueGet)]:
                user.cancel(number, is_abandoned=True)
        self.run_until(self.now + 10.0)
        seen_empty = last.empty_count
        while last.empty_count == seen_empty:
            last.get(100, block=False)
            self.run_until(self.now + 10.0)
        self.run_until(self.now + 10.0)
        self.counts.update(verify_queue(self.queue_users))
        state = self.scheduler.core.state
        state_of_queue = state.objects.by_name[1, "sim"]
        assert not state_of_queue.partitions, "something is left in the queue"
        assert not state.objects.ending, "receipts of what was abandoned are left"
        alive = {user.session_id for user in users}
        assert not alive & state.objects.clients.keys(), "requests left of clients that live"

    def verify_spawned(self) -> None:
        """What was acknowledged as spawned is there, each output once, for whoever fetches it."""
        got: dict[bytes, Counter[int]] = {}

        def receive(message: m.Message) -> None:
            if isinstance(message, m.Outputs):
                seen = got.setdefault(message.call_id, Counter())
                for position in range(len(message.statuses)):
                    seen[message.start + position] += 1

        link = self.scheduler.accept("client", b"R" * 16, receive, lambda: None)
        assert link is not None
        spawned = [
            call
            for client in self.clients
            for call in client.calls.values()
            if call.call.is_durable and call.call.is_stored and not call.is_cancelled
        ]
        for number, call in enumerate(spawned):
            link.up(m.FetchOutputs(number, call.call.call_id, 0, call.count))
        self.run_until(self.now + 100.0)
        for call in spawned:
            seen = got.get(call.call.call_id, Counter())
            assert dict(seen) == dict.fromkeys(range(call.count), 1), (
                f"spawned call {call.call.call_id.hex()[:6]}: {seen}"
            )
            self.counts["spawned call fetched whole"] += 1


def verify_call(call: SimCall) -> None:
    name = f"call {call.call.call_id.hex()[:6]} of {call.plan.name}"
    assert call.is_finished, f"{name} never ended: {call.call.received} of {call.count}"
    if call.call.is_durable:
        return
    assert dict(call.seen) == dict.fromkeys(range(call.count), 1), f"{name}: {call.seen}"
    if call.call.is_ordered:
        assert call.order == sorted(call.order), f"{name} out of order"
    if call.plan.item_count and call.failure is None and not call.plan.may_crash:
        for index in range(call.count):
            assert len(call.items.get(index, [])) == call.plan.item_count, f"{name}: {index}"


def make_plans(world: World) -> list[Plan]:
    random = world.random
    quick = Plan("quick", b"q" * 16, {}, input_s=0.0002)
    slow = Plan("slow", b"s" * 16, {"max_containers": random.randint(1, 4)}, input_s=0.3)
    flaky = Plan(
        "flaky",
        b"e" * 16,
        {"retries": [random.randint(1, 3), random.random(), 2.0, 5.0]},
        input_s=0.01,
        error_rate=0.2,
        is_flaky=True,
    )
    crashy = Plan("crashy", b"c" * 16, {}, input_s=0.02, may_crash=True)
    stream = Plan("stream", b"g" * 16, {"is_generator": True}, input_s=0.001, item_count=40)
    most = random.randint(2, 8)
    many = Plan(
        "many",
        b"n" * 16,
        {"max_inputs": most, "target_inputs": random.randint(1, most), "max_containers": 3},
        input_s=0.05,
    )
    poisoned = Plan("poisoned", b"p" * 16, {"max_inputs": 3}, input_s=0.02, may_crash=True)
    inner = Plan("inner", b"i" * 16, {}, input_s=0.005)
    middle = Plan("middle", b"m" * 16, {}, input_s=0.002, nested=inner, nested_count=3)
    outer = Plan("outer", b"o" * 16, {}, input_s=0.002, nested=middle, nested_count=2)
    return [quick, slow, flaky, crashy, stream, many, poisoned, inner, middle, outer]


def run_seed(seed: int) -> tuple[int, Counter[str], str]:
    """One storm. Returns events, counts and what failed ("" if nothing)."""
    world = Storm(seed)
    try:
        world.schedule_faults(world.now + STORM_S)
        world.run_until(world.now + STORM_S)
        world.heal()
        world.run_until(world.now + HEAL_S, world.is_quiet)
        world.verify()
    except Exception:
        story = "\n".join(world.story)
        return world.event_count, world.counts, f"{story}\n{traceback.format_exc()}"
    return world.event_count, world.counts, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--seeds", type=int, help="run so many seeds instead of counting events")
    parser.add_argument("--events", type=int, default=EVENTS_DEFAULT)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("-v", "--verbose", action="store_true", help="print the story")
    options = parser.parse_args()
    if options.seed is not None:
        events, counts, failure = run_seed(options.seed)
        report(events, counts, 1)
        if failure:
            sys.stdout.write(failure if options.verbose else failure[-6000:])
        return bool(failure)
    return run_many(options.first, options.seeds, options.events)


def run_many(first: int, seeds: int | None, events_wanted: int) -> int:
    events, done = 0, 0
    counts: Counter[str] = Counter()
    started = time.monotonic()
    processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes) as pool:
        pending: dict[int, Future[tuple[int, Counter[str], str]]] = {}
        next_seed = first
        while True:
            wanted = next_seed - first < seeds if seeds is not None else events < events_wanted
            while wanted and len(pending) < processes:
                pending[next_seed] = pool.submit(run_seed, next_seed)
                next_seed += 1
                wanted = seeds is None or next_seed - first < seeds
            if not pending:
                break
            seed = min(pending)
            seed_events, seed_counts, failure = pending.pop(seed).result()
            events += seed_events
            done += 1
            counts.update(seed_counts)
            if failure:
                sys.stdout.write(failure[-8000:])
                sys.stdout.write(
                    f"\nseed {seed} failed; replay it with\n"
                    f"    python tests/simulation.py --seed {seed} -v\n"
                )
                return 1
    report(events, counts, done)
    sys.stdout.write(f"{time.monotonic() - started:.1f} s\n")
    never = [name for name in [*FAULTS_PER_S, *CHANCES_SEEN] if not counts[name]]
    if never and seeds is None:
        sys.stdout.write(f"faults that never struck: {never}\n")
        return 1
    return 0


CHANCES_SEEN = [
    "container crashed",
    "container that could not start",
    "scheduler killed between commit and acknowledgement",
]


def report(events: int, counts: Counter[str], seeds: int) -> None:
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:10}  {name}\n")
    sys.stdout.write(f"{events} events over {seeds} seeds\n")


if __name__ == "__main__":
    sys.exit(main())
