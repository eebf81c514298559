"""What must come up in a full run of the simulation: faults, what they strike, and the late,
duplicate and unknown messages that the cores put up with."""

from __future__ import annotations

from tests.sim_promises import LIES as LIES
from tests.sim_storm import FAULTS_PER_S

OTHER_FAULTS = [
    "attached call",
    "blob refused by a full disk",
    "blob refused by a worker's full disk",
    "call terminated",
    "client back within its grace",
    "client: duplicate output or item",
    "container babbles",
    "container crashed",
    "container crashed with several inputs",
    "container that could not start",
    "dropped blob named again",
    "durable call",
    "frame that waited for its blobs",
    "generator out of credit",
    "generator run again behind its first items",
    "idle container died",
    "input run to its end twice",
    "item through a queue",
    "item whose taker died",
    "large result",
    "link cut between commit and acknowledgement",
    "nested call",
    "report that a nested call may overtake",
    "scheduler killed between commit and acknowledgement",
    "spawned call fetched whole",
    "submitted again: a call that is known",
    "submitted again: a call that was forgotten",
    "user error",
    "void lease of a worker that is back",
    "worker stopped past its deadline with leases",
    "write refused by a full disk",
]
AMID_SCHEDULER = [
    "a write",
    "a retry backing off",
    "a generator",
    "a nested call",
    "a lost client in its grace",
]
AMID_WORKER = ["an unacknowledged report", "a generator", "a nested call"]
#: What the scheduler's core counts.
ODD_AT_SCHEDULER = [
    "core taken back early",
    "definition for an unknown app",
    "duplicate call",
    "duplicate inputs",
    "duplicate items",
    "duplicate output",
    "exit of an unknown container",
    "failure under a void lease",
    "generator evicted",
    "items of an unknown lease",
    "items out of order",
    "log text that nobody read",
    "message for an unknown call",
    "message for another session's call",
    "nested client of an unknown container",
    "output of an ended call",
    "reclaim of an unknown lease",
    "silent worker",
    "start of an unknown container",
    "wait of an unknown lease",
    "wait that a frame on the wire may have ended",
    "write that failed",
]
#: What workers count.
ODD_AT_WORKER = [
    "credit for an unknown lease",
    "lease for an unknown container",
    "reclaim of an unknown lease",
    "stop of an unknown container",
]
#: What is seen from outside.
ODD_ON_THE_WIRE = [
    "Ack of an unknown call",
    "CallsFinished of an unknown call",
    "CancelCall of an unknown call",
    "Inputs of an unknown call",
    "ItemCredit of an unknown call",
    "LeaseOutputs of an unknown call",
    "SealCall of an unknown call",
    "frame to a client about a call that is over",
    "inputs that are here already",
    "items under a void lease",
    "output that is here already",
    "report under a void lease",
]

#: What must come up in a full run. Not here are the `LIES`, which must not.
EXPECTED = [
    *FAULTS_PER_S,
    *OTHER_FAULTS,
    *(f"scheduler killed amid {what}" for what in AMID_SCHEDULER),
    *(f"worker killed amid {what}" for what in AMID_WORKER),
    *(f"scheduler: {what}" for what in ODD_AT_SCHEDULER),
    *(f"worker: {what}" for what in ODD_AT_WORKER),
    *(f"late or odd: {what}" for what in ODD_ON_THE_WIRE),
]
