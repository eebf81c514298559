"""Whose interpreter, packages, variables and files a container has, and which files travel."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanout.definition import Definition, Environment, Target
from fanout.exceptions import ContainerStartError
from fanout_worker.environment import Launch, plan_launch
from fanout_worker.host import Settings
from tests.conftest import ROOT, TIMEOUT_FACTOR, Cluster, HandStarted, environment


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# --- virtual environments -------------------------------------------------------------------------

WHERE_IT_RUNS = """
    import json, sys
    import fanout
    import marker_pkg

    app = fanout.App("where")

    @app.function()
    def where(number):
        from marker_pkg import later
        return [sys.executable, sys.prefix, marker_pkg.VERSION, later.VERSION]

    if __name__ == "__main__":
        with app.run():
            found = list(where.map(range(40)))
        sys.stdout.write(json.dumps(sorted(set(map(tuple, found)))))
"""


def make_venv(folder: Path, version: str) -> Path:
    """A virtual environment with fanout in it and a package that no other has in this version.
    Returns its interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    packages = next(folder.glob("lib/python*/site-packages"))
    paths = [ROOT, ROOT / "scheduler", ROOT / "worker", sysconfig.get_path("purelib")]
    (packages / "fanout.pth").write_text("\n".join(map(str, paths)) + "\n")
    for name in ("__init__", "later"):
        write(packages / "marker_pkg" / f"{name}.py", f"VERSION = {version!r}\n")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_two_virtual_environments_share_the_daemons_and_nothing_else(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = write(tmp_path / "where.py", WHERE_IT_RUNS)
    variables = {key: value for key, value in cluster.variables.items() if key != "PYTHONPATH"}
    versions = {
        make_venv(tmp_path / name, f"{name}-1.0"): f"{name}-1.0" for name in ("red", "blue")
    }
    clients = {
        python: subprocess.Popen(
            [str(python), str(script)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for python in versions
    }
    for python, client in clients.items():
        stdout, stderr = client.communicate(timeout=60 * TIMEOUT_FACTOR)
        assert client.returncode == 0, stderr
        prefix, version = str(python.parent.parent), versions[python]
        assert json.loads(stdout) == [[str(python), prefix, version, version]]
    states = list(cluster.home.rglob("scheduler.json"))
    assert len(states) == 1, "one scheduler served both"


@pytest.mark.slow
def test_an_installation_that_differs_from_the_daemons_is_told_what_to_do(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = write(tmp_path / "where.py", WHERE_IT_RUNS)
    python = make_venv(tmp_path / "new", "1.0")
    packages = next((tmp_path / "new").glob("lib/python*/site-packages"))
    for folder in ("fanout", "scheduler/fanout_scheduler", "worker/fanout_worker"):
        shutil.copytree(ROOT / folder, packages / Path(folder).name)
    with (packages / "fanout_worker" / "channel.py").open("a") as file:
        file.write("# a later version\n")
    start = "from fanout.client.local import ensure_cluster; ensure_cluster()"
    subprocess.run([sys.executable, "-c", start], env=cluster.variables, check=True)
    variables = {key: value for key, value in cluster.variables.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(script)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60 * TIMEOUT_FACTOR,
    )
    assert done.returncode != 0
    assert "run `fanout stop`" in done.stderr


# --- variables, folder, edits ---------------------------------------------------------------------

SHOWS_ITSELF = """
    import json, os, sys
    import fanout
    from helper import answer

    app = fanout.App("shows")

    @app.function()
    def show():
        odd = os.fsencode(os.environ["ODD"])
        return [os.environ.get("COLOUR"), odd.hex(), os.getcwd(), answer()]

    if __name__ == "__main__":
        with app.run():
            sys.stdout.write(json.dumps(show.remote()))
"""


@pytest.mark.slow
def test_container_has_the_variables_the_folder_and_the_latest_files_of_its_client(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = write(tmp_path / "project" / "shows.py", SHOWS_ITSELF)
    helper = tmp_path / "project" / "helper.py"

    def run(colour: str, folder: Path) -> Any:
        # The second variable is no text in any encoding, which Unix allows.
        odd: dict[str, Any] = {"COLOUR": colour, "ODD": os.fsdecode(b"\xff\xfe")}
        done = subprocess.run(
            [sys.executable, str(script)],
            env=cluster.variables | odd,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60 * TIMEOUT_FACTOR,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    write(helper, "def answer():\n    return 'old'\n")
    assert run("green", tmp_path) == ["green", "fffe", str(tmp_path), "old"]
    write(helper, "def answer():\n    return 'edited'\n")
    project = tmp_path / "project"
    assert run("red", project) == ["red", "fffe", str(project), "edited"]


def test_variables_of_the_client_do_not_travel_to_other_hosts(tmp_path: Path) -> None:
    script = write(
        tmp_path / "captures.py",
        """
        import sys
        from fanout import source
        from fanout.definition import Definition, Target, pack_definition
        for is_remote in (False, True):
            code = source.capture(is_remote)
            packed = pack_definition(Definition(code.environment, Target("m", "f")))
            sys.stdout.write(f"{b'hunter2' in packed} ")
        """,
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(PASSWORD="hunter2"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]


# --- ways to start a program ----------------------------------------------------------------------

#: Its own class goes there and back; `{helper}` is the import of a module that travels with it.
PROGRAM = """
    import sys
    import fanout
    {helper}

    app = fanout.App("program")
    FACTOR = 7

    class Box:
        def __init__(self, value):
            self.value = value

    @app.function()
    def work(box):
        return Box(plus_one(box.value) * FACTOR)

    if __name__ == "__main__":
        with app.run():
            one = work.remote(Box(1))
            many = list(work.map([Box(number) for number in range(3)]))
        assert all(type(box) is Box for box in [one, *many])
        sys.stdout.write(" ".join(str(box.value) for box in [one, *many]))
"""
EXPECTED = "14 7 14 21"
HELPER = "def plus_one(x):\n    return x + 1\n"
BESIDE = textwrap.dedent(PROGRAM).format(helper="from helper import plus_one")
RELATIVE = textwrap.dedent(PROGRAM).format(helper="from .helper import plus_one")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    files = {
        "plain/helper.py": HELPER,
        "plain/job.py": BESIDE,
        "plain/my-job.v2.py": BESIDE,
        "plain/__main__.py": BESIDE,
        "packed/pack/__init__.py": "",
        "packed/pack/helper.py": HELPER,
        "packed/pack/__main__.py": RELATIVE,
        "packed/pack/inner/__init__.py": "",
        "packed/pack/inner/job.py": RELATIVE.replace(".helper", "..helper"),
        "packed/pack/beside.py": BESIDE,
        "packed/spaces/helper.py": HELPER,
        "packed/spaces/job.py": RELATIVE,
    }
    for name, text in files.items():
        write(folder / name, text)
    return folder


@pytest.fixture(scope="module", params=["embedded", "remote"])
def client_variables(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The variables of a client, once of the embedded default and once of workers elsewhere."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        home = folder / "home"
        variables = environment(FANOUT_HOME=str(home), FANOUT_CPU="2", FANOUT_IDLE_TIMEOUT="120")
        embedded = Cluster(home, variables)
        try:
            yield embedded.variables
        finally:
            embedded.stop()
        return
    started = HandStarted(folder)
    try:
        started.start_scheduler()
        started.start_worker("w1", cpu=2)
        yield environment(FANOUT_URL=started.client_join, FANOUT_HOME=str(folder / "none"))
    finally:
        started.stop()


def run_program(
    variables: dict[str, str], folder: Path, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=variables,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60 * TIMEOUT_FACTOR,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "arguments"),
    [
        ("plain", ["job.py"]),
        (".", ["plain/job.py"]),
        ("plain", ["my-job.v2.py"]),
        (".", ["plain"]),
        ("packed", ["-m", "pack"]),
        ("packed", ["-m", "pack.inner.job"]),
        ("packed", ["pack/beside.py"]),
        ("packed", ["-m", "spaces.job"]),
    ],
    ids=[
        "script", "script of another folder", "name with a dot", "folder", "package",
        "module of a package", "script in a package", "module of a namespace package",
    ],
)  # fmt: skip
def test_program_runs_however_it_is_started(
    client_variables: dict[str, str], programs: Path, folder: str, arguments: list[str]
) -> None:
    done = run_program(client_variables, programs / folder, *arguments)
    assert done.stdout == EXPECTED, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["-c", "stdin", "interactive"])
def test_code_without_a_file_runs_by_value_with_the_modules_beside_it(
    client_variables: dict[str, str], programs: Path, way: str
) -> None:
    folder = programs / "plain"
    if way == "-c":
        done = run_program(client_variables, folder, "-c", BESIDE)
    elif way == "stdin":
        done = run_program(client_variables, folder, "-", stdin=BESIDE)
    else:
        # A prompt ends a block at an empty line, and must not meet one within it.
        lines = [line for line in BESIDE.splitlines() if line]
        blocks = "\n".join(f"\n{line}" if line[0] not in " " else line for line in lines)
        blocks = blocks.replace("@app.function()\n\ndef", "@app.function()\ndef")
        done = run_program(client_variables, folder, "-i", "-q", stdin=f"{blocks}\n\n")
    assert done.stdout.startswith(EXPECTED), done.stderr


# --- limits ---------------------------------------------------------------------------------------

ONE_CALL = """
    import sys
    import fanout

    app = fanout.App("one")

    @app.function()
    def one():
        return 1

    if __name__ == "__main__":
        with app.run():
            sys.stdout.write(str(one.remote()))
"""


@pytest.mark.slow
def test_script_in_a_huge_folder_runs_here_and_is_refused_elsewhere(
    client_variables: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "job.py", ONE_CALL)
    for number in range(2100):
        (tmp_path / f"module_{number}.py").touch()
    done = run_program(client_variables, tmp_path, "job.py")
    if "FANOUT_URL" not in client_variables:
        assert done.stdout == "1", done.stderr
        return
    assert done.returncode != 0
    assert f"{tmp_path} holds more than 2000 Python files" in done.stderr
    assert "put the script in a folder of its own" in done.stderr


def test_looking_for_sources_ends_in_a_folder_without_end(tmp_path: Path) -> None:
    """As a script in a home folder does: it runs in place, so nothing must be found."""
    script = write(
        tmp_path / "looks.py",
        """
        import os, sys
        from fanout import source
        folders = 0
        walk = os.walk
        def counted(*arguments, **options):
            global folders
            for entry in walk(*arguments, **options):
                folders += 1
                yield entry
        os.walk = counted
        source.ENTRIES_COUNT_MAX = 100
        source.capture(is_remote=False)
        sys.stdout.write(str(folders))
        """,
    )
    for number in range(300):
        (tmp_path / "data" / f"{number:03}").mkdir(parents=True)
    (tmp_path / "data" / "000" / os.fsdecode(b"\xff.py")).touch()
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2


def test_other_version_of_python_matters_only_to_code_by_value(tmp_path: Path) -> None:
    settings = Settings(
        blob_folder=str(tmp_path / "blobs"),
        sources_folder=str(tmp_path / "sources"),
        socket_path="",
        is_embedded=False,
        kill_grace_s=1.0,
        variables={},
    )
    theirs = Environment("/usr/bin/python", "3.99", [], "/", {})
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"

    def plan(target: Target) -> Launch:
        return asyncio.run(plan_launch(Definition(theirs, target), settings))

    by_name = plan(Target("job", "work"))
    assert by_name.interpreter.python == sys.executable
    with pytest.raises(ContainerStartError) as caught:
        plan(Target("m", "f", pickled=b"code"))
    assert "Python 3.99" in str(caught.value)
    assert f"Python {ours}" in str(caught.value)
    assert "Define it at the top level of a file" in str(caught.value)
