"""The soak, for a moment: everything is struck at least once in it. `make soak` is the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import STRIKES, Soak
from tests.soak_kit import UNITS

#: Clients are stopped and not killed, whose lost calls end only when their grace is over; and the
#: blobs of large values stay for a minute.
SHORT_STRIKES = {key: weight for key, weight in STRIKES.items() if key != ("client", "kill")}
SHORT_UNITS = [name for name in UNITS if name != "large values"]


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_left_behind_in_a_short_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    soak = Soak(tmp_path, 5, 8.0, SHORT_STRIKES, SHORT_UNITS, interval_s=0.6, say=said.append)
    soak.run()
    assert soak.struck.total() >= 3, "".join(said)
