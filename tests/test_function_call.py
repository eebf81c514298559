"""Spawned calls: their graph, their end, and reading them from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fanout
from fanout.exceptions import InputCancelledError, NotFoundError
from fanout.types import InputInfo, InputStatus
from tests import calls_kit as kit
from tests.conftest import Cluster, is_alive, poll_until
from tests.engine_fixture import engine as engine
from tests.engine_fixture import wait_until_no_call_is_open


@pytest.fixture
def running(engine: Cluster) -> Iterator[None]:
    """The app of the kit runs; nothing of it is left open at the end."""
    with kit.app.run():
        yield
    wait_until_no_call_is_open()


# --- the call graph ------------------------------------------------------------------------------


def shape(infos: list[InputInfo]) -> list[tuple[str, str, list[str]]]:
    return [
        (
            info.function_name,
            info.status.name,
            sorted(f"{child.function_name} {child.status.name}" for child in info.children),
        )
        for info in infos
    ]


def test_the_graph_shows_what_each_input_has_called(running: None, tmp_path: Path) -> None:
    call = kit.note_children.spawn(1, str(tmp_path))
    waiting = ["add SUCCESS", "hold PENDING", "same SUCCESS"]
    poll_until(
        lambda: shape(call.get_call_graph()) == [("note_children", "PENDING", waiting)],
        lambda: f"the graph shows the call that is held: {shape(call.get_call_graph())}",
    )
    (root,) = call.get_call_graph()
    assert root.function_call_id == call.object_id
    assert root.task_id.startswith("ct-")
    assert root.module_name == "tests.calls_kit"
    (held,) = (child for child in root.children if child.function_name == "hold")
    assert held.input_id == f"in-{held.function_call_id.removeprefix('fc-')}-0"
    (tmp_path / "go").touch()
    assert call.get() == [1, 1, 2]
    ended = ["add SUCCESS", "hold SUCCESS", "same SUCCESS"]
    assert shape(call.get_call_graph()) == [("note_children", "SUCCESS", ended)]
    (added,) = (c for c in call.get_call_graph()[0].children if c.function_name == "add")
    assert fanout.FunctionCall.from_id(added.function_call_id).get() == 2


def test_the_graph_says_how_inputs_ended(running: None, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    call = kit.fail_or_note.spawn_map([1, -1, 2], kwargs={"folder": str(tmp_path)})
    with pytest.raises(kit.Refused):
        list(call.iter())
    poll_until(
        lambda: InputStatus.PENDING not in [info.status for info in call.get_call_graph()],
        "all inputs end",
    )
    statuses = [info.status for info in call.get_call_graph()]
    assert statuses == [InputStatus.SUCCESS, InputStatus.FAILURE, InputStatus.SUCCESS]


def test_the_graph_of_a_large_call_is_cut_and_says_so(
    running: None, caplog: pytest.LogCaptureFixture
) -> None:
    call = kit.same.spawn_map(range(1500))
    assert sum(call.iter()) == sum(range(1500))
    assert len(call.get_call_graph()) == 1000
    assert "is not whole" in caplog.text


async def test_the_graph_has_its_asyncio_form(engine: Cluster) -> None:
    async with kit.app.run():
        call = await kit.same.spawn.aio(1)
        assert await call.get.aio() == 1
        assert shape(await call.get_call_graph.aio()) == [("same", "SUCCESS", [])]
        unknown: fanout.FunctionCall[int] = fanout.FunctionCall.from_id("fc-" + "ab" * 16)
        with pytest.raises(NotFoundError, match="knows no call fc-abab"):
            await unknown.get_call_graph.aio()


# --- cancelling and gathering --------------------------------------------------------------------


@pytest.mark.parametrize("is_forced", [False, True], ids=["asked", "killed"])
def test_a_cancelled_call_is_asked_to_stop_or_its_container_killed(
    running: None, tmp_path: Path, is_forced: bool
) -> None:
    call = kit.note_how_it_ends.spawn(str(tmp_path))
    begun = tmp_path / "begun"
    poll_until(begun.exists, "the function begins")
    call.cancel(terminate_containers=is_forced)
    with pytest.raises(InputCancelledError):
        call.get(timeout=30)
    if is_forced:
        poll_until(lambda: not is_alive(int(begun.read_text())), "the container is gone")
        assert not (tmp_path / "asked").exists()
    else:
        poll_until((tmp_path / "asked").exists, "the function is asked to stop")
    assert kit.same.remote(1) == 1
    call.cancel()


def test_gather_raises_the_first_error_and_lets_the_others_go_on(
    running: None, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    calls = [kit.fail_or_note.spawn(x, folder) for x in (1, -1)]
    with pytest.raises(kit.Refused, match="-1"):
        fanout.FunctionCall.gather(*calls)
    (tmp_path / "go").touch()
    assert calls[0].get() == 1
    more = [kit.add.spawn(x, 10) for x in range(5)]
    assert fanout.FunctionCall.gather(*more) == [10, 11, 12, 13, 14]
    assert fanout.FunctionCall.gather() == []


# --- from another process ------------------------------------------------------------------------

READER = """
import sys
import fanout
for object_id in sys.argv[1:]:
    call = fanout.FunctionCall.from_id(object_id)
    try:
        sys.stdout.write(f"{call.get(timeout=0)}\\n")
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
    sys.stdout.write(f"{call.num_inputs()} {call.get_call_graph()[0].function_name}\\n")
"""

WRITER = """
import sys
import fanout
app = fanout.App("writer")
class Mine:
    pass
@app.function()
def plain(x):
    return x + 1
@app.function()
def own():
    return Mine()
if __name__ == "__main__":
    with app.run():
        calls = [plain.spawn(1), own.spawn()]
        [call.get() for call in calls]
        sys.stdout.write(" ".join(call.object_id for call in calls))
"""


def test_results_are_read_where_the_functions_module_cannot_be_imported(
    engine: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "written_elsewhere.py").write_text(WRITER)
    written = engine.python(tmp_path / "written_elsewhere.py")
    assert (written.returncode, written.stderr) == (0, "")
    read = engine.python("-c", READER, *written.stdout.split())
    assert (read.returncode, read.stderr) == (0, "")
    value, plain, failure, own = read.stdout.splitlines()
    assert (value, plain, own) == ("2", "1 plain", "1 own")
    assert failure.startswith("DeserializationError")
    assert "written_elsewhere" in failure
