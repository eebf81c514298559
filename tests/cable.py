"""A bad cable: what comes into one network card leaves by another; late, slowly, or not at all.

Kernels differ in which of this they can do by themselves (`netem` is often missing), so it is done
here, with every frame in hand. Run as a script, in the namespace that has both cards; see
`hosts_kit.Cable`.

The first card is at the host, the second at the switch. Each line on stdin sets both directions::

    {"out": {"delay_s": 0.2, "loss": 0.01}, "in": {"bits_s": 8e6}}

and is answered by a line of what both directions have carried and dropped so far.

With `--plain` before the name of a card, that card cuts what it sends into frames as they travel
on a real cable, with checksums. Virtual cards otherwise leave both to the receiver.
"""

from __future__ import annotations

import array
import fcntl
import json
import random
import select
import socket
import struct
import sys
import time
from collections import deque

ALL_PROTOCOLS = 3
SIOCETHTOOL = 0x8946
#: Checksums on sending, and cutting by the card: TCP's, and everybody's.
OFFLOADS = {"checksums": 0x17, "tcp segmentation": 0x1F, "segmentation": 0x24}
FRAME_SIZE_BYTES_MAX = 1 << 16
RECEIVE_BUFFER_SIZE_BYTES = 8 << 20
#: What a slow direction keeps before it drops, like the buffer of a modem.
QUEUE_SIZE_BYTES_MAX = 128 << 10


def make_plain(card: str) -> None:
    """Have the kernel finish each frame before this card gets it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in OFFLOADS.values():
            value = array.array("B", struct.pack("II", command, 0))
            request = struct.pack("16sP16x", card.encode(), value.buffer_info()[0])
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


class Direction:
    """From one card to the other."""

    def __init__(self, source: socket.socket, target: socket.socket, seed: int) -> None:
        self.source = source
        self.target = target
        self._random = random.Random(seed)
        #: Frames under way, with the time at which each arrives.
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued_size = 0
        self.free_at = 0.0
        self.carried_count = 0
        self.dropped_count = 0
        self.set()

    def set(
        self,
        delay_s: float = 0.0,
        loss: float = 0.0,
        bits_s: float = float("inf"),
        is_cut: bool = False,
    ) -> None:
        self.delay_s = delay_s
        self.loss = 1.0 if is_cut else loss
        self.bits_s = bits_s

    def receive(self) -> None:
        """Take all that the source has."""
        while True:
            try:
                frame, (_, _, kind, *_) = self.source.recvfrom(FRAME_SIZE_BYTES_MAX)
            except OSError:
                return  # nothing more, or the card is down
            if kind == socket.PACKET_OUTGOING:
                continue
            now = time.monotonic()
            is_full = self.queued_size > QUEUE_SIZE_BYTES_MAX and self.free_at > now
            if is_full or self._random.random() < self.loss:
                self.dropped_count += 1
                continue
            self.free_at = max(now, self.free_at) + len(frame) * 8 / self.bits_s
            self.queue.append((self.free_at + self.delay_s, frame))
            self.queued_size += len(frame)

    def deliver(self) -> None:
        """Send what has arrived."""
        now = time.monotonic()
        while self.queue and self.queue[0][0] <= now:
            _, frame = self.queue.popleft()
            self.queued_size -= len(frame)
            try:
                self.target.send(frame)
            except OSError:
                self.dropped_count += 1  # the card is down
            else:
                self.carried_count += 1


def open_card(name: str) -> socket.socket:
    card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    card.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_SIZE_BYTES)
    card.bind((name, 0))
    card.setblocking(False)
    return card


def say(directions: dict[str, Direction]) -> None:
    counts = {name: [d.carried_count, d.dropped_count] for name, d in directions.items()}
    sys.stdout.write(json.dumps(counts) + "\n")
    sys.stdout.flush()


def main(host_card: str, switch_card: str) -> None:
    host, switch = open_card(host_card), open_card(switch_card)
    directions = {"out": Direction(host, switch, 1), "in": Direction(switch, host, 2)}
    by_source = {host.fileno(): directions["out"], switch.fileno(): directions["in"]}
    poll = select.poll()
    for number in (*by_source, sys.stdin.fileno()):
        poll.register(number, select.POLLIN)
    say(directions)
    while True:
        due_at = min((d.queue[0][0] for d in directions.values() if d.queue), default=None)
        wait_s = 60.0 if due_at is None else max(0.0, due_at - time.monotonic())
        # In whole milliseconds, rounded up: late by less than one is no fault of a bad cable.
        for number, _ in poll.poll(-int(-wait_s * 1000 // 1)):
            if number in by_source:
                by_source[number].receive()
                continue
            line = sys.stdin.readline()
            if not line:
                return
            for name, settings in json.loads(line).items():
                directions[name].set(**settings)
            say(directions)
        for direction in directions.values():
            direction.deliver()


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        make_plain(sys.argv[2])
    else:
        main(*sys.argv[1:])
