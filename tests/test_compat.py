"""Scripts written for Modal: what is let pass, what is refused, and what the refusal says."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fanout
from fanout import compat
from fanout.exceptions import ExecutionError, InvalidError, NotFoundError
from tests.conftest import Cluster, poll_until
from tests.engine_fixture import status

#: `modal.__all__` of 1.6.4, less what fanout has or is about to have.
ABSENT = [
    "Client", "Cluster", "Cron", "Environment", "FilePatternMatcher", "Image", "NetworkFileSystem",
    "Period", "Probe", "Proxy", "CloudBucketMount", "Sandbox", "SandboxSnapshot",
    "SchedulerPlacement", "Secret", "Server", "Tunnel", "Volume", "Workspace", "asgi_app",
    "billing", "clustered", "experimental", "fastapi_endpoint", "forward", "sessioned",
    "web_endpoint", "web_server", "wsgi_app",
]  # fmt: skip
PRESENT = [
    "App", "Error", "Function", "FunctionCall", "Retries", "Stub", "enable_output", "exception",
    "types",
]  # fmt: skip

#: What makes use of a name, for names that may be declared.
USES: dict[str, Any] = {
    "Image": lambda image: image.debian_slim().pip_install("x").build(),
    "Secret": lambda secret: secret.from_name("x").update({}),
    "Volume": lambda volume: volume.from_name("x").commit(),
    "NetworkFileSystem": lambda system: system.from_name("x").listdir("/"),
    "CloudBucketMount": lambda mount: mount("bucket").read_only,
    "Cron": lambda cron: cron("* * * * *").next(),
    "Period": lambda period: period(days=1).next(),
    "Proxy": lambda proxy: proxy.from_name("x").address,
    "SchedulerPlacement": lambda placement: placement(region="x").region,
    "FilePatternMatcher": lambda matcher: matcher("*.py").match("a"),
    "billing": lambda billing: billing.report(),
    "experimental": lambda experimental: experimental.anything,
}


@pytest.fixture(autouse=True)
def nothing_was_warned_of() -> Iterator[None]:
    """Each warning comes once in a process; here, once in a test."""
    compat._warned.clear()
    yield
    compat._warned.clear()


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABSENT)
def test_a_name_that_only_modal_has_says_what_to_do_when_it_is_used(name: str) -> None:
    found = getattr(fanout, name)
    use = USES.get(name, lambda thing: thing())
    with pytest.raises(InvalidError, match=rf"{name}.*: {name} is in Modal \w+ .*\. \w+"):
        use(found)


@pytest.mark.parametrize("name", PRESENT)
def test_names_that_fanout_has_are_its_own(name: str) -> None:
    assert name not in compat.NAMES
    assert not isinstance(getattr(fanout, name), compat.Absent)


def test_a_name_that_nobody_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Immage'"):
        fanout.Immage


def test_declarations_are_let_pass_and_remembered() -> None:
    modal: Any = fanout
    image = modal.Image.debian_slim(python_version="3.12").pip_install("numpy", "torch")
    assert repr(image) == "Image.debian_slim(python_version=...).pip_install('numpy', 'torch')"
    assert isinstance(image, modal.Image)
    assert "hunter2" not in repr(modal.Secret.from_dict({"PASSWORD": "hunter2"}))
    assert len(repr(modal.Image.debian_slim().pip_install(*["x" * 50] * 50))) < 300

    def annotated(volume: modal.Volume | None = None) -> None:
        """Annotations name classes."""

    with image.imports():
        importlib.import_module("no_such_module_anywhere")
    with pytest.raises(InvalidError, match="with Image"), image:
        pass


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"image": "i"}, r"app\.function\(image='i'\): fanout builds no images yet.*install"),
        ({"gpu": "T4"}, r"gpu='T4'.*all GPUs of its host"),
        ({"gpu": ["H100", "A100"]}, "max_containers="),
        ({"secrets": ["s"]}, r"environment variables.*remove secrets="),
        ({"volumes": {"/data": "v"}}, "shared file system"),
        ({"schedule": "daily"}, "cron or a systemd timer"),
        ({"block_network": True}, "run the worker where there is none"),
        ({"allow_concurrent_inputs": 3}, r"@fanout\.concurrent"),
        ({"timeuot": 3}, "no such option; did you mean timeout="),
        ({"gpus": 3}, "did you mean gpu="),
        ({"zzzzzzzz": 3}, "no such option$"),
    ],
)
def test_options_that_cannot_work_are_refused_with_what_to_do(
    options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(InvalidError, match=pattern):
        compat.reject_cloud_options("app.function", options)


@pytest.mark.parametrize(
    "options",
    [
        {"region": "us-east"},
        {"cloud": "aws"},
        {"proxy": "p"},
        {"nonpreemptible": True},
        {"ephemeral_disk": 1000},
        {"enable_memory_snapshot": True},
        {"include_source": False},
        {"experimental_options": {"a": 1}},
    ],
)
def test_options_that_change_no_result_are_warned_of_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.warns(UserWarning, match=rf"app\.function\({name}=.*\) is ignored: \w+"):
        compat.reject_cloud_options("app.function", options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.reject_cloud_options("app.function", options)


def test_a_warning_names_the_line_of_the_user() -> None:
    app = fanout.App("warns")
    other = fanout.App("other")
    app.function(name="f", serialized=True)(lambda: 1)
    other.function(name="f", serialized=True)(lambda: 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app.function(region="here", serialized=True)(lambda: 1)
        app.cls(region="here", serialized=True)
        app.include(other)
        one.with_options(region="here")
        app.run(environment_name="here")
    assert len(caught) == 5
    assert {warning.filename for warning in caught} == {__file__}
    lines = [warning.lineno for warning in caught]
    assert lines == sorted(set(lines)), "each its own line"


def test_nothing_is_warned_of_in_containers_which_import_the_script_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import fanout\n"
        "app = fanout.App('script')\n"
        "@app.function(region='here')\n"
        "def f():\n"
        "    return 1\n"
        "@app.local_entrypoint()\n"
        "def main():\n"
        "    assert f.remote() == 1\n"
    )
    done = cluster.fanout("run", path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert shown.count("is ignored") == 1, shown
    assert f"{path}:3: UserWarning" in shown


def test_imports_of_an_image_fail_in_a_container_where_they_are_needed(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import fanout as modal\n"
        "app = modal.App('script')\n"
        "image = modal.Image.debian_slim()\n"
        "with image.imports():\n"
        "    import no_such_module_anywhere\n"
        "@app.function()\n"
        "def f():\n"
        "    return 1\n"
        "@app.local_entrypoint()\n"
        "def main():\n"
        "    f.remote()\n"
    )
    done = cluster.fanout("run", path)
    assert done.returncode != 0
    assert "No module named 'no_such_module_anywhere'" in done.stderr


def test_options_that_ask_for_nothing_are_let_pass() -> None:
    nothing = {name: option.nothing for name, option in compat.OPTIONS.items()}
    for name, values in nothing.items():
        for value in values:
            compat.reject_cloud_options("app.function", {name: value})
    with pytest.raises(InvalidError):
        compat.reject_cloud_options("app.function", {"max_inputs": 1})


# --- apps ----------------------------------------------------------------------------------------


one_app = fanout.App("one", tags={"team": "a", "kind": "x"})
two_app = fanout.App("two", tags={"team": "b"})


@one_app.function()
def one(x: int = 0) -> str:
    return f"one {x}"


@two_app.function()
def two(x: int = 0) -> str:
    return f"two {x}"


both_app = fanout.App("both").include(one_app).include(two_app)


def test_functions_of_included_apps_run_with_the_app_that_includes_them(cluster: Cluster) -> None:
    assert sorted(both_app.registered_functions) == ["one", "two"]
    with both_app.run():
        assert (one.remote(1), two.remote(2)) == ("one 1", "two 2")
        assert list(two.map([3])) == ["two 3"]
    with pytest.raises(ExecutionError, match="app 'one' is not running"):
        one.remote()
    with one_app.run():
        assert one.remote(4) == "one 4"
        with pytest.raises(ExecutionError, match="app 'two' is not running"):
            two.remote()


def test_two_apps_run_within_each_other(cluster: Cluster) -> None:
    with one_app.run(name="first"), two_app.run():
        assert one_app.app_id != two_app.app_id
        assert (one.remote(1), two.remote(2)) == ("one 1", "two 2")
        names = {function["name"]: function["app"] for function in status()["functions"]}
        assert names == {"one": "first", "two": "two"}
        with pytest.raises(InvalidError, match="running already"):
            one_app.run().__enter__()
    assert one_app.app_id is two_app.app_id is None


def test_apps_that_include_each_other_do_not_search_for_ever() -> None:
    first, second = fanout.App("first"), fanout.App("second")
    first.include(second)
    second.include(first)
    function = first.function(serialized=True)(lambda: 1)
    with pytest.raises(ExecutionError, match="not running"):
        function.remote()


def test_including_a_function_of_the_same_name_warns() -> None:
    first, second = fanout.App("first"), fanout.App("second")
    first.function(name="f", serialized=True)(lambda: 1)
    other = second.function(name="f", serialized=True)(lambda: 2)
    with pytest.warns(UserWarning, match="'first' has a function 'f'"):
        first.include(second)
    assert first.registered_functions["f"] is other
    first.include(second)
    number: Any = 3
    for not_another_app in (first, number):
        with pytest.raises(InvalidError, match="must be an App"):
            first.include(not_another_app)


def test_classes_of_included_apps_run_with_the_app_that_includes_them(cluster: Cluster) -> None:
    inner = fanout.App("inner")

    @inner.cls(serialized=True, cpu=0.1)
    class Model:
        @fanout.method()
        def double(self, x: int) -> int:
            return 2 * x

    made: Any = Model
    outer = fanout.App("outer").include(inner)
    assert outer.registered_classes == {"Model": made}
    with outer.run():
        assert made().double.remote(2) == 4
    other = fanout.App("other")
    other.cls(serialized=True)(Model.get_user_cls())  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="'other' has a class 'Model'"):
        other.include(inner)


def test_what_included_apps_keep_containers_for_is_told_when_the_outer_one_runs(
    cluster: Cluster,
) -> None:
    inner = fanout.App("inner")
    middle = fanout.App("middle").include(inner)
    outer = fanout.App("outer").include(middle)

    @inner.function(serialized=True, min_containers=1, cpu=0.1)
    def kept() -> None: ...

    @inner.cls(serialized=True, min_containers=1, cpu=0.1)
    class Kept:
        @fanout.method()
        def nothing(self) -> None: ...

    with outer.run():
        poll_until(
            lambda: {function["name"] for function in status()["functions"]} == {"kept", "Kept"},
            lambda: f"both are known: {status()['functions']}",
        )


def test_tags_are_kept_checked_and_inherited() -> None:
    assert both_app.get_tags() == {"team": "a", "kind": "x"}
    app = fanout.App("tagged", tags={"a": "b"})
    app.get_tags()["a"] = "changed"
    assert app.get_tags() == {"a": "b"}
    app.set_tags({"c": "d"})
    assert app.get_tags() == {"c": "d"}
    assert fanout.App().include(app, inherit_tags=False).get_tags() == {}
    wrong: Any = {"a": 1}
    for use in (lambda: app.set_tags(wrong), lambda: fanout.App(tags=wrong)):
        with pytest.raises(InvalidError, match="texts that are not empty"):
            use()


async def test_tags_have_their_asyncio_form() -> None:
    app = fanout.App()
    await app.set_tags.aio({"a": "b"})
    assert await app.get_tags.aio() == {"a": "b"}


def test_what_an_app_says_of_itself() -> None:
    app = fanout.App("named")
    assert (app.name, app.description, app.registered_web_endpoints) == ("named", "named", [])
    assert fanout.App().description is None


def test_an_app_that_asks_for_what_fanout_lacks_is_refused() -> None:
    modal: Any = fanout
    image = modal.Image.debian_slim()
    with pytest.raises(InvalidError, match=r"App\(image=Image\.debian_slim\(\)\): .*no images"):
        modal.App("a", image=image)
    with pytest.raises(InvalidError, match=r"App\(volumes="):
        modal.App("a", volumes={"/data": modal.Volume.from_name("v", create_if_missing=True)})
    modal.App("a", image=None, secrets=[], volumes={}, include_source=True)


@pytest.mark.parametrize(
    ("use", "pattern"),
    [
        (lambda app: app.deploy(name="x"), r"no deployed apps yet.*`spawn`"),
        (lambda app: app.stop(), r"call\.cancel\(\)"),
        (lambda app: app.lookup("x", create_if_missing=True), "import the app"),
        (lambda app: fanout.App.lookup("x"), "import the app"),
        (lambda app: app.get_dashboard_url(), "fanout status"),
        (lambda app: app.run(detach=True), r"app\.run\(detach=True\): what `spawn`.*remove detach"),
        (lambda app: app.run(interactive=True), r"\.local\(\.\.\.\)"),
        (lambda app: app.run(name=""), r"app\.run\(name=''\)"),
        (lambda app: fanout.Function.from_id("fu-1"), "no ids of their own"),
        (lambda app: fanout.Function.lookup("a", "f"), "import the function from the module"),
        (lambda app: fanout.Cls.lookup("a", "C"), "import the class from the module"),
    ],
)
def test_what_needs_a_deployed_app_says_what_works_today(use: Any, pattern: str) -> None:
    with pytest.raises(InvalidError, match=pattern):
        use(fanout.App("a"))


@pytest.mark.parametrize("name", ["logs", "stats", "info", "sandboxes", "image", "is_interactive"])
def test_attributes_that_only_modals_apps_have_say_what_to_do(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"App has no attribute '{name}': .+"):
        getattr(fanout.App(), name)
    assert not hasattr(fanout.App(), name)


def test_attributes_that_only_modals_functions_have_say_what_to_do() -> None:
    with pytest.raises(AttributeError, match="'get_web_url': fanout serves no HTTP"):
        one.get_web_url  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'remoet'$"):
        one.remoet  # type: ignore[attr-defined]
    call: Any = fanout.FunctionCall.from_id("fc-" + "0" * 32, client=None)
    with pytest.raises(AttributeError, match="'get_gen': write"):
        call.get_gen()


# --- functions by name ---------------------------------------------------------------------------


def test_a_function_by_name_is_an_error_only_when_it_is_used() -> None:
    function = fanout.Function.from_name("app", "f", environment_name="main")
    assert function.name == "f"
    for use in (
        lambda: function.remote(1),
        lambda: function.remote_gen(1),
        lambda: function.spawn(1),
        lambda: function.map([1]),
        lambda: function.for_each([1]),
        lambda: function.spawn_map([1]),
        lambda: function.with_options(cpu=1).remote(1),
        lambda: function.with_batching(max_batch_size=2, wait_ms=1).map([1]),
        lambda: function.get_current_stats(),
        lambda: function.update_autoscaler(min_containers=1),
        lambda: function.autoscaler.settings(),
        lambda: function.get_raw_f(),
    ):
        with pytest.raises(NotFoundError, match=re.escape("no deployed app 'app' with a function")):
            use()
    with pytest.raises(ExecutionError, match="cannot run locally"):
        function.local(1)


def test_a_class_by_name_is_an_error_only_when_it_is_used() -> None:
    model: Any = fanout.Cls.from_name("app", "Model", environment_name="main")
    obj = model.with_options(cpu=1)(size="large")
    for use in (
        lambda: model().predict.remote(1),
        lambda: obj.predict.remote_gen(1),
        lambda: obj.predict.map([1]),
        lambda: obj.update_autoscaler(min_containers=1),
        lambda: model.get_user_cls(),
    ):
        with pytest.raises(NotFoundError, match=re.escape("no deployed app 'app' with a class 'M")):
            use()  # type: ignore[no-untyped-call]
    with pytest.raises(ExecutionError, match="cannot run locally"):
        obj.predict.local(1)
    with pytest.raises(InvalidError, match="app_name=''"):
        fanout.Cls.from_name("", "Model")


async def test_a_function_by_name_has_its_asyncio_form() -> None:
    function = fanout.Function.from_name("app", "f")
    with pytest.raises(NotFoundError, match="`with app.run"):
        await function.remote.aio(1)
    with pytest.raises(NotFoundError):
        function.map.aio([1])


def test_names_of_functions_are_checked() -> None:
    with pytest.raises(InvalidError, match=r"Cls\.from_name\('app', 'Model'\)"):
        fanout.Function.from_name("app", "Model.predict")
    with pytest.raises(InvalidError, match="app_name=''"):
        fanout.Function.from_name("", "f")


def test_decorators_refuse_what_they_cannot_do() -> None:
    app = fanout.App("refused")
    for decorate in (app.function, app.cls):
        with pytest.raises(InvalidError, match="all GPUs of its host"):
            decorate(gpu="T4")
        with pytest.raises(InvalidError, match="did you mean timeout="):
            decorate(timeuot=3)
        with pytest.warns(UserWarning, match="is ignored"):
            decorate(region=f"of {decorate.__name__}")


def test_older_names_of_options_still_work() -> None:
    app = fanout.App("older")

    @app.function(keep_warm=1, container_idle_timeout=30, concurrency_limit=2, serialized=True)
    def f() -> None: ...

    options = f.service.options
    assert options.min_containers == 1
    assert (options.scaledown_window, options.max_containers) == (30, 2)
