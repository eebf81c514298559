"""The storm of a simulation: faults at rates that its seed has drawn; then healing, and what must
be true when all is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from dataclasses import fields
from typing import Any

from fanout.protocol import messages as m
from fanout_scheduler.core.events import FrameReceived, PeerId
from fanout_scheduler.core.state import State
from tests.sim_blobs import ids_of
from tests.sim_peers import Plan, SimCall, SimClient
from tests.sim_queues import SimQueueUser, verify_queue
from tests.sim_story import Broken
from tests.sim_workers import SimWorker
from tests.sim_world import APP, Link, World

#: How often each fault strikes in a second of the storm, at most; each seed draws less.
FAULTS_PER_S = {
    "client cut": 0.15,
    "worker cut": 0.15,
    "half-open link": 0.05,
    "stall": 0.2,
    "slow reader": 0.1,
    "frame said again": 0.3,
    "stray frame": 0.2,
    "scheduler killed": 0.05,
    "scheduler stopped": 0.03,
    "worker killed": 0.06,
    "worker stopped": 0.05,
    "disk full": 0.02,
    "worker disk full": 0.05,
    "consumer paused": 0.1,
    "client died": 0.01,
    "queue user died": 0.01,
    "call cancelled": 0.1,
}
CHANCES = {
    "container crash": 0.02,
    "start failure": 0.02,
    "kill at commit": 0.01,
    "cut at commit": 0.02,
    "container babbles": 0.05,
}
#: Virtual seconds of the fairness probe: the first call runs alone, then both.
ALONE_S = 3.0
#: By then a connection that was half open when the faults ended is another one.
MENDING_S = 40.0
TOGETHER_S = 60.0
#: The least part of what both got that each of two calls gets while they share a container.
SHARE_MIN = 0.3

#: What a scheduler holds when all is quiet: peers and their sessions, spawned calls with their apps
#: and functions until their results expire, what a thousand lost workers had at most, and what has
#: happened so far.
KEPT = {
    "apps", "functions", "calls", "workers", "sessions", "peers", "objects", "deadlines",
    "ended_nodes", "expired", "counts", "lost_containers", "present_blobs", "blob_references",
}  # fmt: skip


class Storm(World):
    """A world with faults, whose rates its seed has drawn."""

    def __init__(self, seed: int, is_told: bool = False) -> None:
        super().__init__(seed, is_told)
        random = self.random
        self.clients: list[SimClient] = []
        for name, highest in {**FAULTS_PER_S, **CHANCES}.items():
            self.rates[name] = highest * random.random() if random.random() < 0.7 else 0.0
        self.fair = Plan("fair", b"f" * 16, {"max_containers": 1}, input_s=0.1, is_steady=True)
        cores = [float(random.randint(1, 4)) for _ in range(random.randint(1, 3))]
        self.plans = make_plans(self, max(cores))
        all_plans = [*self.plans, self.fair]
        by_id = {plan.function_id: plan for plan in all_plans}
        self.scheduler.start()
        for number, cpu in enumerate(cores):
            self.workers.append(SimWorker(self, number, cpu, by_id))
        for number in range(1, random.randint(2, 4)):
            self.clients.append(SimClient(self, number, all_plans))
        self.queue_users = [SimQueueUser(self, number) for number in range(random.randint(2, 3))]

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
        """A fault that finds nobody to strike does not count."""
        self.log(name)
        if getattr(self, "do_" + name.replace(" ", "_").replace("-", "_"))():
            self.counts[name] += 1
        self.check_due = 0

    def _some_link(self, kinds: str) -> Any:
        owners: list[Any] = []
        if "c" in kinds:
            users: list[Any] = [*self.clients, *self.queue_users]
            owners += [c for c in users if c.link is not None and not c.is_gone]
        if "w" in kinds:
            owners += [x for x in self.workers if x.link is not None and not x.is_dead]
        return self.random.choice(owners).link if owners else None

    def do_client_cut(self) -> bool:
        link = self._some_link("c")
        if link is not None:
            link.cut("client")
        return link is not None

    def do_worker_cut(self) -> bool:
        link = self._some_link("w")
        if link is not None:
            link.cut("worker")
        return link is not None

    def do_half_open_link(self) -> bool:
        """Bytes vanish both ways; the peer's TCP finds out later than the worker deadline."""
        link = self._some_link("cw")
        if link is not None:
            link.is_half_open = True
            self.after(10 + self.random.random() * 20, link.close_here)
            self.after(10 + self.random.random() * 20, link.close_there)
        return link is not None

    def do_stall(self) -> bool:
        link = self._some_link("cw")
        if link is not None:
            link.stalled_until = self.now + self.random.random() * 20
        return link is not None

    def do_slow_reader(self) -> bool:
        link = self._some_link("cw")
        if link is not None:
            link.read_slowly(self.random.random() * 10)
        return link is not None

    def do_frame_said_again(self) -> bool:
        return self.random.choice(self.clients).repeat()

    def do_stray_frame(self) -> bool:
        """Somebody speaks of what is another's, or of what there never was. Nothing may come of
        it."""
        random = self.random
        if random.random() < 0.3:
            worker = random.choice(self.workers)
            worker.state.container_started(random.getrandbits(30), 1, 0.0)
            worker.carry_out()
            return worker.link is not None
        client = random.choice(self.clients)
        calls = [call for c in self.clients for call in c.calls.values() if not call.is_cancelled]
        foreign = [c.call.call_id for c in calls if c.call.call_id not in client.calls]
        if client.link is None:
            return False
        call_id = random.choice([*foreign, random.randbytes(16)])
        stray: list[m.Message] = [
            m.SealCall(call_id, 0),
            m.Ack(call_id, [(0, 1 << 20)], 1 << 20, 0),
            m.CallsFinished([call_id]),
            m.ItemCredit(call_id, 0, 0, 1 << 20),
            m.Inputs(call_id, 0, b"\1\0\0\0", [], b"x"),
            m.DefineFunction(random.randbytes(16), random.randbytes(16), "stray", {}, [], b""),
        ]
        client.link.up(random.choice(stray))
        return True

    def do_scheduler_killed(self) -> bool:
        was_up = self.scheduler.is_up
        self.restart_scheduler()
        return was_up

    def do_scheduler_stopped(self) -> bool:
        if not self.scheduler.is_up:
            return False
        seconds = 1 + self.random.random() * 30
        self.scheduler.stop(seconds)
        self.scheduler.gap_s = seconds
        self.scheduler.tell(FrameReceived(PeerId(0), m.Heartbeat(0)))
        return True

    def do_worker_killed(self) -> bool:
        worker = self.random.choice(self.workers)
        if worker.is_dead:
            return False
        worker.kill()
        return True

    def do_worker_stopped(self) -> bool:
        self.random.choice(self.workers).pause(self.random.random() * 40)
        return True

    def do_disk_full(self) -> bool:
        self.disk.is_full = True
        self.after(self.random.random() * 5, self.free_disk)
        return True

    def do_worker_disk_full(self) -> bool:
        self.random.choice(self.workers).fill_disk(self.random.random() * 10)
        return True

    def free_disk(self) -> None:
        self.disk.is_full = False

    def do_consumer_paused(self) -> bool:
        client = self.random.choice(self.clients)
        client.is_paused = True
        self.after(self.random.random() * 8, client.resume)
        return True

    def do_client_died(self) -> bool:
        alive = [client for client in self.clients if not client.is_gone]
        if len(alive) > 1:
            self.random.choice(alive).go()
        return len(alive) > 1

    def do_call_cancelled(self) -> bool:
        client = self.random.choice(self.clients)
        open_calls = [c for c in client.calls.values() if not c.is_finished]
        if not open_calls or client.is_gone:
            return False
        call = self.random.choice(open_calls)
        if self.random.random() < 0.3 and client.link is not None:
            self.counts["call terminated"] += 1
            client.terminate(call)
        else:
            client.cancel(call)
        return True

    def do_queue_user_died(self) -> bool:
        alive = [user for user in self.queue_users if not user.is_gone]
        if len(alive) > 1:
            self.random.choice(alive).go()
        return len(alive) > 1

    def use_queue(self) -> None:
        self.random.choice(self.queue_users).act()

    def open_call(self) -> None:
        random = self.random
        client = random.choice(self.clients)
        if client.is_gone:
            return
        plan = random.choice(self.plans)
        count = random.choice([1, 1, 3, 30, 300])
        if plan.item_count or plan.nested is not None or plan.name in ("slow", "large", "bulky"):
            count = min(count, 8)
        elif plan.name == "quick" and random.random() < 0.3:
            # More than the smallest window of credit holds.
            count = 2000
        is_durable = random.random() < 0.25 and not plan.item_count
        client.open(plan, count, random.random() < 0.5, is_durable)
        self.counts["durable call" if is_durable else "attached call"] += 1

    # --- after it --------------------------------------------------------------------------------

    def heal(self) -> None:
        self.log("heal")
        self.rates = dict.fromkeys(self.rates, 0.0)
        self.disk.is_full = False
        # So that what is left of the work fits into the bound.
        self.delay_s = min(self.delay_s, 0.001)
        for plan in self.plans:
            plan.error_rate = 0.0
        owners: list[Any] = [*self.clients, *self.queue_users, *self.workers]
        for owner in owners:
            if owner.link is not None:
                owner.link.stalled_until = self.now
        for worker in self.workers:
            worker.free_disk()
        for client in self.clients:
            client.resume()
            if client.is_gone:
                client.calls.clear()

    def is_quiet(self) -> bool:
        return (
            self.scheduler.is_up
            and not any(client.calls for client in self.clients)
            and all(call.is_over for call in self.scheduler.core.state.calls.values())
            and all(user.is_settled or user.is_gone for user in self.queue_users)
            and len(self.scheduler.core.state.workers) == len(self.workers)
            and all(worker.paused_until <= self.now for worker in self.workers)
        )

    def verify(self) -> None:
        """Everything ended, exactly once, and nothing is left."""
        for client in self.clients:
            if not client.is_gone:
                for call in [*client.calls.values(), *client.ended.values()]:
                    verify_call(call)
        if not self.is_quiet():
            raise Broken(f"not quiet in time: {self.describe_unrest()}")
        self.run_until(self.now + 5.0)
        verify_containers(self)
        self.probe_fairness()
        for client in self.clients:
            if client.link is not None:
                client.link.up(m.CloseApp(APP))
        for worker in self.workers:
            worker.lose_idle_containers()
        self.run_until(self.now + 200.0)
        self.verify_baseline()
        self.scheduler.harvest()
        for worker in self.workers:
            worker.harvest()
        self.verify_spawned()
        self.drain_queue()

    def describe_unrest(self) -> str:
        state = self.scheduler.core.state
        calls = [
            f"{call.call_id.hex()[:6]} of {call.function.definition.name} waits for "
            f"{call.waits_for!r}, {call.finished.count} of {call.received.count} finished"
            for call in state.calls.values()
            if not call.is_over
        ]
        return f"{calls}, {len(state.workers)} of {len(self.workers)} workers"

    def _hears(self, link: Link | None) -> bool:
        return link is not None and not link.is_half_open and link.stalled_until <= self.now

    def probe_fairness(self) -> None:
        """Two calls of one function share its one container by time, whoever came first."""
        alive = [client for client in self.clients if not client.is_gone]
        # A client that says nothing notices late that nothing gets through.
        self.run_until(self.now + MENDING_S, lambda: all(self._hears(c.link) for c in alive))
        first = alive[0].open(self.fair, 100, True, False)
        self.run_until(self.now + ALONE_S)
        second = alive[-1].open(self.fair, 30, True, False)
        self.busy_s.clear()
        self.run_until(self.now + TOGETHER_S, lambda: first.is_finished or second.is_finished)
        shares = [self.busy_s.get(call.call.call_id, 0.0) for call in (first, second)]
        if min(shares) < SHARE_MIN * sum(shares) or not sum(shares):
            raise Broken(f"two calls got {shares} seconds of one container", second.call.call_id)
        self.run_until(self.now + TOGETHER_S, lambda: first.is_finished and second.is_finished)
        verify_call(first)
        verify_call(second)

    def verify_baseline(self) -> None:
        """The app is closed: nothing of it is left but the outputs of spawned calls."""
        core = self.scheduler.core
        core.check()
        state = core.state
        assert not state.leases, f"leases left: {list(state.leases)}"
        assert all(call.is_over for call in state.calls.values()), "calls left open"
        assert all(call.is_durable for call in state.calls.values()), "attached calls left"
        assert not state.containers, "containers left"
        assert not state.pending_stores, "records never stored"
        assert not state.unsafe_stores, "records that count as not stored"
        assert not state.resuming, "containers that wait for nothing"
        assert not state.ready_functions, "functions on offer without a call"
        assert len(state.workers) == len(self.workers), "workers not back"
        for worker in state.workers.values():
            assert abs(worker.cpu_free - worker.cpu) < 1e-6, f"cores of {worker.name} not free"
            assert worker.memory_free_mib == worker.memory_mib, f"memory of {worker.name}"
            assert not worker.unsafe, f"reports of {worker.name} never acknowledged"
        for part in fields(State):
            kept = getattr(state, part.name)
            assert part.name in KEPT or not isinstance(kept, Sized) or not kept, (
                f"{part.name} keeps {kept!r:.300}"
            )
        named = {call.function.function_id for call in state.calls.values()}
        assert state.functions.keys() == named, "functions left that no call names"
        assert all(app.calls for app in state.apps.values()), "apps left without calls"
        for function in state.functions.values():
            assert not function.containers, f"permits of {function.definition.name} left"
        self.verify_blobs()
        for session in state.sessions.values():
            assert session.peer_id is not None, "a lost client is remembered for ever"
            assert not session.calls, "calls of a session left"
        for peer in self.workers:
            assert not peer.containers, f"containers left at worker {peer.number}"
            assert not peer.state.leases, f"leases left at worker {peer.number}"
            assert not peer.state.containers, f"containers known at worker {peer.number}"

    def verify_blobs(self) -> None:
        """Of large values there are those of kept results, at the scheduler, and no others."""
        state = self.scheduler.core.state
        named = {
            blob_id
            for call in state.calls.values()
            for frame in call.outputs
            for blob_id in ids_of(frame)
        }
        assert state.blob_references.keys() == named, "blobs are kept that no result names"
        assert named == state.present_blobs.keys(), "blobs are here that no result names"
        assert named == set(self.disk.blobs.ids()), "files of blobs are left"
        for worker in self.workers:
            assert not worker.store.ids(), f"blobs are left at worker {worker.number}"
        for client in self.clients:
            assert client.is_gone or not client.blobs.store.ids(), "blobs are left at a client"

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
        spawned = {
            call.call.call_id: call
            for client in self.clients
            for call in client.ended.values()
            if call.call.is_durable and call.call.is_stored
        }

        def receive(message: m.Message) -> None:
            if isinstance(message, m.Outputs):
                seen = got.setdefault(message.call_id, Counter())
                call, offset = spawned[message.call_id], 0
                for position, status in enumerate(message.statuses):
                    size = int.from_bytes(message.lengths[4 * position :][:4], "little")
                    value = bytes(message.payload[offset : offset + size])
                    offset += size
                    index = message.start + position
                    seen[index] += 1
                    if not call.is_failed_whole(status, value):
                        call.check_output(index, status, value)

        link = self.scheduler.accept("client", b"R" * 16, receive, lambda: None)
        assert link is not None
        for number, call in enumerate(spawned.values()):
            link.up(m.FetchOutputs(number, call.call.call_id, 0, call.count))
        self.run_until(self.now + 100.0)
        for call in spawned.values():
            seen = got.get(call.call.call_id, Counter())
            for index in range(call.count):
                if seen[index] != 1:
                    call.broken(f"output {index} was fetched {seen[index]} times", index)
            self.counts["spawned call fetched whole"] += 1


def verify_call(call: SimCall) -> None:
    if not call.is_finished:
        missing = [index for index in range(call.count) if not call.seen[index]]
        call.broken(f"never ended: {missing[:10]} of {call.count} are missing", missing[0])
    if call.is_cancelled or call.call.is_durable:
        return
    for index in range(call.count):
        if call.seen[index] != 1:
            call.broken(f"input {index} ended {call.seen[index]} times", index)
    if call.call.is_ordered and call.order != sorted(call.order):
        call.broken("out of order")
    if call.plan.item_count and call.failure is None and not call.plan.may_crash:
        for index in range(call.count):
            if len(call.items.get(index, [])) != call.plan.item_count:
                call.broken(f"generator {index} lost items", index)


def verify_containers(world: Storm) -> None:
    """All is quiet and the app still open: the books about containers agree with the workers'."""
    state = world.scheduler.core.state
    assert not state.leases, f"leases left: {list(state.leases)}"
    by_id = {worker.state.worker_id: worker for worker in world.workers}
    for known in state.workers.values():
        there = by_id[known.worker_id].containers.keys()
        staying = {key for key, c in known.containers.items() if c.state != "stopping"}
        assert staying <= there, "containers that are not there"
        assert there <= known.containers.keys(), "containers that nobody knows"
    for function in state.functions.values():
        gone = function.containers.keys() - state.containers.keys()
        assert not gone, f"permits of {function.definition.name} are held by nobody"


def make_plans(world: World, cores_max: float) -> list[Plan]:
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
    few = {"is_generator": True, "max_containers": random.choice([1, 2, 50])}
    stream = Plan("stream", b"g" * 16, few, input_s=0.001, item_count=40)
    # Needs all of the largest worker, so that the worker has to be kept free for it.
    large = Plan("large", b"l" * 16, {"cpu": cores_max, "memory": 4096}, input_s=0.02)
    most = random.randint(2, 8)
    many = Plan(
        "many",
        b"n" * 16,
        {"max_inputs": most, "target_inputs": random.randint(1, most), "max_containers": 3},
        input_s=0.05,
    )
    poisoned = Plan("poisoned", b"p" * 16, {"max_inputs": 3}, input_s=0.02, may_crash=True)
    bulky = Plan("bulky", b"b" * 16, {}, input_s=0.02, is_bulky=True)
    inner = Plan("inner", b"i" * 16, {}, input_s=0.005)
    middle = Plan("middle", b"m" * 16, {}, input_s=0.002, nested=inner, nested_count=3)
    outer = Plan("outer", b"o" * 16, {}, input_s=0.002, nested=middle, nested_count=2)
    return [
        quick, slow, flaky, crashy, stream, large, many, poisoned, bulky, inner, middle, outer,
    ]  # fmt: skip
