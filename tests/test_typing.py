"""The library's types are exact, for mypy and for pyright: results, parameters, mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "typing_cases.py"
MARK = re.compile(r"  # type: ignore\[([a-z-]+)\]")
#: The cases without the marks, so that every mistake is reported.
UNMARKED = MARK.sub("", CASES.read_text())


def run_mypy(folder: Path, subject: Path) -> list[tuple[int, str]]:
    """(line, code) of each error."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--no-error-summary", "--cache-dir", str(folder / "cache"), str(subject)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if ": note: " not in line]
    found = [re.fullmatch(r".+?:(\d+): error: .*  \[([a-z-]+)\]", line) for line in lines]
    assert all(found), done.stdout
    return [(int(match[1]), match[2]) for match in found if match]


def run_pyright(folder: Path, text: str) -> list[tuple[int, str]]:
    """(line, message) of each error of a file with this text."""
    folder.mkdir()
    (folder / "cases.py").write_text(text)
    config = {
        "include": ["cases.py"],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": True,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    path = folder / "pyrightconfig.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--project", str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, done.stdout
    return [
        (entry["range"]["start"]["line"] + 1, entry["message"])
        for entry in report["generalDiagnostics"]
        if entry["severity"] == "error"
    ]


def marked_lines() -> dict[int, str]:
    """The mistakes that the file marks, by line, with mypy's code."""
    lines = enumerate(CASES.read_text().splitlines(), 1)
    return {number: match[1] for number, line in lines if (match := MARK.search(line))}


@pytest.mark.slow
def test_mypy_sees_every_result_and_every_mistake(tmp_path: Path) -> None:
    assert len(marked_lines()) >= 20
    unmarked = tmp_path / "unmarked.py"
    unmarked.write_text(UNMARKED)
    assert run_mypy(tmp_path, CASES) == []
    assert dict(run_mypy(tmp_path, unmarked)) == marked_lines()


@pytest.mark.slow
def test_pyright_sees_every_result_and_every_mistake(tmp_path: Path) -> None:
    # pyright reads the marks as mypy does, and reports those that mark nothing.
    assert run_pyright(tmp_path / "marked", CASES.read_text()) == []
    found = run_pyright(tmp_path / "unmarked", UNMARKED)
    assert {line for line, _ in found} == set(marked_lines())
