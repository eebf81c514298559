"""The library's types are exact: results, parameters, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUBJECT = ROOT / "tests" / "typing" / "api.py"


@pytest.mark.slow
def test_a_type_checker_sees_results_and_mistakes(tmp_path: Path) -> None:
    assert "# type: ignore[arg-type]" in SUBJECT.read_text()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--cache-dir", str(tmp_path), str(SUBJECT)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
