"""Where code lives: names of modules, what travels by value, which files travel at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, sys
from fanout import source
import {helper}
def f(): pass
class Outer:
    def method(self): pass
if __name__ == "__main__":
    source.alias_main()
    name = source.main_name()
    target = source.make_target(f, False)
    other = source.make_target({helper}.g, False)
    code = source.capture(is_remote=True)
    sys.stdout.write(json.dumps(dict(
        name=name,
        is_alias=sys.modules.get(name) is sys.modules["__main__"],
        module=target.module, qualname=target.qualname, file=target.file,
        relative_file=target.relative_file, by_value=bool(target.pickled),
        other=[other.module, other.qualname, other.file],
        main=source.describe_main(other),
        digest=code.environment.code_digest,
        sources=code.environment.sources,
        fingerprint=code.environment.fingerprint(),
        path=code.environment.path,
        archive=code.archive.hex(),
    )))
"""


def run(folder: Path, *arguments: str, stdin: str | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        input=stdin,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def g(): pass\n")
    (tmp_path / "job.py").write_text(SCRIPT.format(helper="helper"))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hook.py").write_text("")
    (tmp_path / "env-of-mine").mkdir()
    (tmp_path / "env-of-mine" / "pyvenv.cfg").write_text("")
    (tmp_path / "env-of-mine" / "big.py").write_text("")
    return tmp_path


def names_of(found: dict[str, Any]) -> list[str]:
    archive = zipfile.ZipFile(io.BytesIO(bytes.fromhex(found["archive"])))
    return sorted(archive.namelist())


def test_a_script_is_known_by_its_stem(project: Path) -> None:
    found = run(project, "job.py")
    assert found["name"] == found["module"] == "job"
    assert found["is_alias"]
    assert found["qualname"] == "f"
    assert found["file"] == str(project / "job.py")
    assert found["relative_file"] == "job.py"
    assert not found["by_value"]
    assert found["other"] == ["helper", "g", ""]
    assert found["main"]["main"]["module"] == "job"


def test_a_module_run_with_m_keeps_its_dotted_name(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def g(): pass\n")
    text = SCRIPT.format(helper="pack.helper")
    (package / "job.py").write_text(text)
    found = run(tmp_path, "-m", "pack.job")
    assert found["name"] == found["module"] == "pack.job"
    assert found["relative_file"] == os.path.join("pack", "job.py")
    assert names_of(found) == ["pack/__init__.py", "pack/helper.py", "pack/job.py"]


def test_the_archive_has_the_folder_of_the_script_and_nobody_elses_files(project: Path) -> None:
    assert names_of(run(project, "job.py")) == ["helper.py", "job.py"]


def test_modules_from_elsewhere_on_the_path_travel_too(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (project / "helper.py").rename(elsewhere / "helper.py")
    text = (project / "job.py").read_text()
    (project / "job.py").write_text(f"import sys\nsys.path.append({str(elsewhere)!r})\n{text}")
    assert names_of(run(project, "job.py")) == ["helper.py", "job.py"]


def test_an_edited_file_is_another_environment(project: Path) -> None:
    first = run(project, "job.py")
    assert run(project, "job.py")["fingerprint"] == first["fingerprint"]
    (project / "helper.py").write_text("def g(): return 1\n")
    second = run(project, "job.py")
    assert second["digest"] != first["digest"]
    assert second["sources"] != first["sources"]
    assert second["fingerprint"] != first["fingerprint"]


def test_paths_are_absolute(project: Path) -> None:
    assert all(os.path.isabs(folder) for folder in run(project, "job.py")["path"])


PROMPT = """
import json, sys
from fanout import source
def f(): return 1
sys.stdout.write(json.dumps([source.main_name(), bool(source.make_target(f, False).pickled)]))
"""


def test_code_without_a_file_travels_by_value(tmp_path: Path) -> None:
    assert run(tmp_path, "-c", PROMPT) == [None, True]
    assert run(tmp_path, "-", stdin=PROMPT) == [None, True]


LIMITS = """
import json, sys
from fanout import source
from fanout.exceptions import InvalidError
source.SOURCES_SIZE_BYTES_MAX = 1000
try:
    source.capture(is_remote=True)
except InvalidError as error:
    sys.stdout.write(json.dumps(str(error)))
"""


def test_too_much_source_is_refused_with_advice(project: Path) -> None:
    (project / "limits.py").write_text(LIMITS)
    (project / "large.py").write_text("#" * 1001)
    assert "install the project on the workers" in run(project, "limits.py")
