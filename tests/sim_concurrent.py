"""A container of the simulation that runs several inputs at a time: all that it gets begins at
once, and ends in any order."""

from __future__ import annotations

from fanout.protocol import messages as m
from fanout_worker import commands as w
from tests.sim_workers import SimContainer


class SimConcurrentContainer(SimContainer):
    """What it does is drawn from the seed, too."""

    def _next(self) -> None:
        if not self.is_ready or self.is_gone:
            return
        while self.queue:
            lease = self.queue.popleft()
            for index in range(lease.start, lease.start + len(lease.lengths) // 4):
                self._begin(lease, index)
        self._leave_if_done()

    def _begin(self, lease: m.Lease, index: int) -> None:
        random, rates = self.world.random, self.world.rates
        self.live[lease.lease_id, index] = lease
        self.world.counts["input begun beside others"] += 1
        most = self.plan.options["max_inputs"]
        assert len(self.live) <= most, f"{len(self.live)} inputs in a container for {most}"
        duration_s = self.plan.input_s * random.random() * 2
        if self.plan.may_crash and random.random() < rates.get("container crash", 0.0):
            self._later(duration_s, self._crash_with_all)
        else:
            self._later(duration_s, lambda: self._finish(lease.lease_id, index))

    def _crash_with_all(self) -> None:
        self.world.counts["container crashed with several inputs"] += len(self.live) > 1
        for (_, index), lease in self.live.items():
            self.world.crashes[lease.call_id, index] += 1
        self._exit("crash", list(self.live))

    def _finish(self, lease_id: int, index: int) -> None:
        self._end(lease_id, index, m.Status.VALUE, b"=%d" % index)

    def _end(self, lease_id: int, index: int, status: int, payload: bytes) -> None:
        lease = self.live.pop((lease_id, index), None)
        if lease is None:
            return
        if status == m.Status.VALUE:
            self.ran(lease.call_id, index, self.plan.input_s)
        lengths = len(payload).to_bytes(4, "little")
        busy_us = int(self.plan.input_s * 1e6)
        self.worker.state.lease_outputs(
            lease_id, index, busy_us, lengths, bytes([status]), [], payload
        )
        self._leave_if_done()

    def lower(self, command: w.LowerLimit) -> None:
        for lease in list(self.queue):
            if lease.lease_id == command.lease_id:
                stop = self.stops[lease.lease_id]
                if command.keep == 0:
                    self.queue.remove(lease)
                    stop = lease.start
                self.worker.state.lease_reclaimed(lease.lease_id, stop)
                return
        if command.is_cancelled:
            for lease_id, index in list(self.live):
                if lease_id == command.lease_id:
                    self._later(
                        self.world.random.random() * 0.2,
                        lambda index=index: self._cancelled_one(command.lease_id, index),  # type: ignore[misc]
                    )
        self.worker.state.lease_reclaimed(command.lease_id, self.stops.get(command.lease_id, 0))

    def _cancelled_one(self, lease_id: int, index: int) -> None:
        payload = m.failure_payload("cancelled", "cancelled")
        self._end(lease_id, index, m.Status.FAILURE, payload)

    def stop(self, kill: bool) -> None:
        self.is_stopping = True
        if kill:
            self._exit("stopped", [])
        else:
            self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self.is_stopping and not self.live and not self.queue and not self.is_gone:
            self._exit("stopped", [])
