"""An embedded cluster that the tests of one module share, for tests that leave it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.behaviour_kit import app
from tests.conftest import Cluster, environment, poll_until

#: Seconds between asking code to stop and killing it, in these clusters.
KILL_GRACE_S = 1.0


def status() -> dict[str, Any]:
    """What `fanout status` shows of the embedded cluster."""
    from fanout.client.local import cluster_status

    found = cluster_status()
    assert found is not None, "no scheduler runs"
    return found


def wait_until_no_call_is_open() -> None:
    """Wait until the scheduler has nothing to do."""
    poll_until(
        lambda: status()["open_call_count"] == 0, lambda: f"calls end: {status()['calls']}", 20
    )


def engine_of(
    tmp_path_factory: pytest.TempPathFactory, cpu: str, kill_grace_s: float = KILL_GRACE_S
) -> Iterator[Cluster]:
    """an embedded cluster for a whole module, whose logs tell of no bug at the end."""
    home = tmp_path_factory.mktemp("engine") / "fanout-home"
    changes = {
        "FANOUT_HOME": str(home),
        "FANOUT_CPU": cpu,
        "FANOUT_IDLE_TIMEOUT": "120",
        "FANOUT_KILL_GRACE": str(kill_grace_s),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FANOUT_")]:
            if not name.startswith("FANOUT_TEST_"):
                patch.delenv(name)
        for name, value in changes.items():
            patch.setenv(name, value)
        made = Cluster(home, environment(**changes))
        try:
            yield made
        finally:
            made.stop()
        for path in home.rglob("*.output"):
            text = path.read_text(errors="replace")
            assert "Traceback" not in text, f"{path.name} tells of a bug: {text[-4000:]}"
        for path in home.rglob("*.log"):
            text = path.read_text(errors="replace")
            assert "ERROR" not in text, f"{path.name} tells of a bug: {text[-4000:]}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An embedded cluster of two cores, one for the whole module."""
    yield from engine_of(tmp_path_factory, "2")


@pytest.fixture(scope="module")
def one_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An embedded cluster of one core, one for the whole module."""
    yield from engine_of(tmp_path_factory, "1")


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    """The app of the kit runs on two cores; nothing of it is left open at the end."""
    with app.run():
        yield
    wait_until_no_call_is_open()


@pytest.fixture
def running_on_one_core(one_core: Cluster) -> Iterator[None]:
    """The app of the kit runs on one core; nothing of it is left open at the end."""
    with app.run():
        yield
    wait_until_no_call_is_open()
