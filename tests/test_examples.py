"""The examples do what they say, each started as a user starts it."""

from __future__ import annotations

import ast
import re
import runpy
import time
from pathlib import Path

import pytest

import fanout
from fanout.exceptions import ContainerCrashedError, FunctionTimeoutError
from tests.conftest import ROOT, Cluster

EXAMPLES = ROOT / "examples"


def output_of(cluster: Cluster, *arguments: str | Path) -> str:
    result = cluster.python(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sorted((EXAMPLES / "data").glob("*.py")), ids=lambda p: p.stem)
def test_each_broken_file_is_broken(path: Path) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        ast.parse(path.read_bytes(), filename=str(path))


def check_stdlib_report(text: str, limit: int) -> None:
    assert f"{limit + 6} files, of which 6 could not be parsed" in text
    assert "\n0 files failed in another way" in text
    assert re.search(r"^IndentationError: 1\n  data/bad_indentation\.py: ", text, re.MULTILINE)
    assert re.search(r"^TabError: 1\n  data/tabs_and_spaces\.py: ", text, re.MULTILINE)
    for name in ("not_utf8", "null_byte", "unclosed_bracket", "unterminated_string"):
        assert f"  data/{name}.py: " in text
    rows = re.findall(r"^ +(\d+) +\d+  \w+  \S+\.py:\d+$", text, re.MULTILINE)
    assert len(rows) == 20
    assert [int(row) for row in rows] == sorted(map(int, rows), reverse=True)


def test_stdlib_report_by_the_command_line(cluster: Cluster) -> None:
    result = cluster.fanout("run", EXAMPLES / "stdlib_report.py", "--limit", "60")
    assert result.returncode == 0, result.stdout + result.stderr
    check_stdlib_report(result.stdout, 60)


def test_stdlib_report_as_a_plain_script(cluster: Cluster) -> None:
    check_stdlib_report(output_of(cluster, EXAMPLES / "stdlib_report.py", "--limit", "60"), 60)


def test_stdlib_report_counts_only_errors_of_the_parser_as_unparsed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = runpy.run_path(str(EXAMPLES / "stdlib_report.py"))["Report"]()
    parser_errors = [TabError("tabs"), ValueError("null bytes")]
    for error in [*parser_errors, FunctionTimeoutError("60 s"), ContainerCrashedError("signal 9")]:
        report.add(error)
    report.show(1.0)
    text = capsys.readouterr().out
    assert "4 files, of which 2 could not be parsed\n2 files failed in another way" in text
    assert "\nFunctionTimeoutError: 1\n  60 s\n" in text


def test_async_app(cluster: Cluster) -> None:
    text = output_of(cluster, EXAMPLES / "async_app.py")
    assert "awaited map: 1000 squares, the last is 998001" in text
    assert f"async for: the squares add up to {sum(x * x for x in range(1000))}" in text
    assert f"a hundred calls at once: they add up to {sum(x * x for x in range(100))}" in text


def test_generators(cluster: Cluster) -> None:
    text = output_of(cluster, EXAMPLES / "generators.py")
    assert "1000 of 1000 numbers are the product of their factors" in text
    assert "360 = 2 * 2 * 2 * 3 * 3 * 5" in text


def test_background_call_is_collected_by_another_process(cluster: Cluster) -> None:
    call_id = output_of(cluster, EXAMPLES / "background.py").strip()
    assert call_id.startswith("fc-")
    expected = f"100 results, they add up to {sum(x * x for x in range(100))}"
    # Twice: collecting takes nothing away.
    for _ in range(2):
        assert expected in output_of(cluster, EXAMPLES / "background.py", call_id)


# --- in Modal's style -----------------------------------------------------------------------------


def shown_by(cluster: Cluster, name: str, *flags: str) -> str:
    result = cluster.fanout("run", "-q", EXAMPLES / f"{name}.py", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_classes_load_their_model_once_for_each_container(cluster: Cluster) -> None:
    text = shown_by(cluster, "classes", "--text", "send a mail over smtp")
    assert "'execute a query of a database connection': sqlite3" in text
    assert "100 questions, answered by at most 2 containers: True" in text
    assert "about time: calendar" in text
    assert "\nnet: smtplib\n" in text


def test_batching_gathers_the_inputs_of_many_callers(cluster: Cluster) -> None:
    text = shown_by(cluster, "batching")
    for line in ("asincio -> asyncio", "dattetime -> datetime", "statistic -> statistics"):
        assert line in text
    match = re.search(r"100 calls of one input each ran in batches of up to (\d+)", text)
    assert match is not None
    assert 1 < int(match[1]) <= 64


def test_retries_run_what_failed_again_and_give_up_at_last(cluster: Cluster) -> None:
    lines = shown_by(cluster, "retries").splitlines()
    assert lines[:4] == [f"page {n} after {n} attempts" for n in range(1, 5)]
    assert lines[4:6] == [f"page {n} given up: page {n}: attempt 4 failed" for n in (5, 6)]
    assert lines[6] == "18 attempts in all"


def test_queue_and_dict_share_a_crawl_between_containers(cluster: Cluster) -> None:
    text = shown_by(cluster, "queue_and_dict", "--start", "json", "--crawlers", "2")
    assert re.search(r"^\d+ modules visited, each once: True$", text, re.MULTILINE)


def test_a_crawler_waits_a_second_for_others_to_find_more(cluster: Cluster) -> None:
    crawl = runpy.run_path(str(EXAMPLES / "queue_and_dict.py"))["crawl"]
    with (
        fanout.Queue.ephemeral() as to_visit,
        fanout.Dict.ephemeral() as seen,
        fanout.Dict.ephemeral() as links,
    ):
        began = time.monotonic()
        assert crawl.local(to_visit, seen, links) == 0
        assert time.monotonic() - began >= 1.0
        to_visit.put("json")
        assert crawl.local(to_visit, seen, links) == links.len() >= 1


def test_nested_map_counts_packages_and_their_files(cluster: Cluster) -> None:
    lines = shown_by(cluster, "nested_map").splitlines()
    counted = [int(line.split()[3]) for line in lines[:-1]]
    assert len(counted) == 8
    assert lines[-1] == f"8 packages, {sum(counted)} lines in all"
