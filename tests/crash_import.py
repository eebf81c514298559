"""A module that goes wrong while it is imported in a container; see `crash_kit`."""

from __future__ import annotations

import os

import fanout
from tests import crash_kit as kit

app = fanout.App("crash at import")

if not fanout.is_local():
    kit.do(os.environ["CRASH_AT_IMPORT"], os.environ["CRASH_FOLDER"])


@app.function(max_containers=2, retries=2)
def run(x: int) -> int:
    return x
