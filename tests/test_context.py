"""What code knows of where it runs: ids, is_local, variables; in containers and outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fanout
from fanout.exceptions import InvalidError
from tests import errors_kit as kit
from tests.conftest import Cluster
from tests.engine_fixture import engine as engine
from tests.engine_fixture import wait_until_no_call_is_open


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


def test_in_the_client_there_is_no_input(running: None) -> None:
    assert fanout.is_local()
    assert kit.IS_LOCAL_AT_IMPORT
    assert kit.ids() == kit.own_ids.local(1) == (None, None)


def test_each_input_has_an_id_of_its_own_and_the_call_has_one(running: None) -> None:
    pairs = list(kit.own_ids.map(range(300)))
    inputs, calls = zip(*pairs, strict=True)
    assert len(set(calls)) == 1
    assert re.fullmatch("fc-[0-9a-f]{32}", calls[0] or "")
    assert inputs == tuple(f"in-{(calls[0] or '')[3:]}-{n}" for n in range(300))


def test_the_id_of_a_spawned_call_is_that_of_its_handle(running: None) -> None:
    call = kit.own_ids.spawn(1)
    assert call.get()[1] == call.object_id


def test_async_functions_and_what_they_await_know_their_input(running: None) -> None:
    for own, in_task, in_thread in kit.own_ids_async.map(range(20)):
        assert own == in_task == in_thread
        assert own[0] is not None


def test_items_of_generators_know_their_input(running: None) -> None:
    items = list(kit.own_ids_as_item.map(range(3)))
    assert [(number or "").rpartition("-")[2] for number, _ in items] == list("001122")


def test_a_thread_knows_its_input_only_in_a_copy_of_the_context(running: None) -> None:
    own, bare, in_copy = kit.ids_of_threads.remote()
    assert own == in_copy
    assert bare == (None, None)


def test_a_call_from_a_container_has_ids_of_its_own(running: None) -> None:
    before, inner, after = kit.ids_and_those_of_a_call.remote()
    assert before == after
    assert before[1] != inner[1]
    assert inner[1] is not None


def test_an_input_keeps_its_id_when_it_is_tried_again(running: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="again"):
        kit.note_id_and_fail.remote(str(tmp_path))
    noted = (tmp_path / "ids").read_text().split()
    assert len(noted) == 3
    assert len(set(noted)) == 1


def test_only_the_container_itself_is_not_local(running: None) -> None:
    assert kit.where.remote() == (False, False, "True")


def test_variables_tell_where_code_runs_and_what_it_is_part_of(running: None) -> None:
    found, shown = kit.variables.remote()
    number = found["FANOUT_CONTAINER_ID"]
    expected = {
        "FANOUT_IS_REMOTE": "1",
        "FANOUT_CONTAINER_ID": number,
        "FANOUT_APP_NAME": "errors",
        "FANOUT_FUNCTION_NAME": "variables",
        "MODAL_IS_REMOTE": "1",
        "MODAL_TASK_ID": f"ta-{number}",
    }
    assert number.isdigit()
    assert expected.items() <= found.items()
    assert set(map("=".join, expected.items())) <= set(shown.splitlines()), "programs have them too"


def test_interact_says_why_it_cannot(running: None) -> None:
    with pytest.raises(InvalidError, match="this process is not one"):
        fanout.interact()
    with pytest.raises(InvalidError, match="has no terminal"):
        kit.try_interact.remote()
