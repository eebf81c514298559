"""Options about containers, as a user sees them: how many live and how long, what they see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanout.exceptions import InvalidError
from tests import classes_kit as kit
from tests.conftest import Cluster, poll_until
from tests.engine_fixture import status


@pytest.fixture
def running(cluster: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield


def containers_of(name: str) -> list[str]:
    """States of the containers of a function."""
    return [c["state"] for c in status()["containers"] if c["function"] == name]


def test_the_minimum_of_containers_is_there_before_the_first_call(running: None) -> None:
    poll_until(lambda: containers_of("kept") == ["idle", "idle"], lambda: str(status()))
    assert kit.kept.get_current_stats().num_total_runners == 2
    assert len(set(kit.kept.map(range(20)))) <= 2


def test_a_minimum_can_be_set_and_taken_back(running: None) -> None:
    kit.pid_of.update_autoscaler(min_containers=2, scaledown_window=0.1)
    poll_until(lambda: containers_of("pid_of") == ["idle", "idle"], "two containers are kept")
    settings = kit.pid_of.autoscaler.settings()
    assert (settings.min_containers, settings.scaledown_window) == (2, 0.1)
    kit.pid_of.autoscaler.update(min_containers=0)
    poll_until(lambda: containers_of("pid_of") == [], "they have left")


async def test_the_autoscaler_has_its_aio_twins(cluster: Cluster) -> None:
    async with kit.app.run():
        settings = await kit.pid_of.autoscaler.update.aio(max_containers=3)
        assert settings.max_containers == 3
        assert (await kit.pid_of.get_current_stats.aio()).backlog == 0


def test_settings_that_contradict_each_other_are_refused(running: None) -> None:
    kit.pid_of.update_autoscaler(max_containers=2)
    with pytest.raises(InvalidError, match="would be above max_containers=2"):
        kit.pid_of.update_autoscaler(min_containers=3)
    with pytest.raises(InvalidError, match="min_containers=-1"):
        kit.pid_of.update_autoscaler(min_containers=-1)


def test_current_stats_tell_what_waits_and_runs(running: None) -> None:
    kit.pid_of.update_autoscaler(max_containers=1)
    results = kit.pid_of.map(range(6), kwargs={"seconds": 0.3})
    next(results)
    stats = kit.pid_of.get_current_stats()
    assert stats.num_total_runners == 1
    assert stats.num_running_inputs >= 1
    assert stats.backlog + stats.num_running_inputs <= 5
    results.close()


def test_each_input_of_a_single_use_function_has_a_process_of_its_own(running: None) -> None:
    assert len(set(kit.once.map(range(8)))) == 8


def test_other_options_are_other_containers(running: None) -> None:
    other = kit.pid_of.with_options(max_containers=1)
    assert other.remote() != kit.pid_of.remote()
    assert other.remote() == other.remote()
    assert len(set(other.map(range(10), kwargs={"seconds": 0.01}))) == 1


def test_options_stack_and_none_changes_nothing() -> None:
    options = kit.pid_of.with_options(max_containers=5, timeout=9).with_options(
        timeout=None, min_containers=2
    )
    checked = options.service.options
    assert (checked.max_containers, checked.timeout, checked.min_containers) == (5, 9.0, 2)
    with pytest.raises(InvalidError, match="min_containers=6 is above max_containers=5"):
        options.with_options(min_containers=6)


def test_variables_of_env_are_set_in_the_containers(running: None) -> None:
    assert kit.variable.remote("KIT_VARIABLE") == "set"
    assert kit.variable.remote("KIT_NOTHING") is None
    other = kit.variable.with_options(env={"KIT_VARIABLE": "other"})
    assert other.remote("KIT_VARIABLE") == "other"


def test_retries_without_delay_begin_at_once(running: None, tmp_path: Path) -> None:
    kit.pid_of.remote()
    started = time.monotonic()
    assert kit.third_time.remote(str(tmp_path / "tries")) == 3
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_containers": 3, "max_containers": 2}, "min_containers=3 is above max_containers=2"),
        ({"buffer_containers": -1}, "buffer_containers=-1"),
        ({"startup_timeout": 0}, "startup_timeout=0"),
        ({"single_use_containers": 1}, "single_use_containers=1"),
        ({"cpu": (2, 1)}, "the limit not less"),
        ({"memory": (10, "x")}, "must be \\(request, limit\\)"),
        ({"env": {"A": 1}}, "must be a dict of names and texts"),
        ({"keep_warm": 1, "min_containers": 2}, "two names of one option"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidError, match=words):
        kit.app.function(**options)  # type: ignore[arg-type]
