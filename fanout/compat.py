"""What scripts for Modal name and fanout does not have: what it is there, and what to do here.

The rule: a declaration is let pass, since a script may carry it along and never use it; what would
have to act on it is an error, at the line that asks for it. So ``Image.debian_slim()`` and
``Secret.from_name("x")`` give an object that remembers how it was made, and
``app.function(image=...)`` is the error. What changes nothing but where or how cheaply a function
runs (``region=``) is a warning. Nothing is ignored in silence that a result could depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fanout import context
from fanout.exceptions import InvalidError
from fanout.warning import warn_of_declaration

#: Of the text of a declaration, in messages.
SHOWN_LENGTH_MAX = 200

# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    """An option of Modal's: what it means there and what to do here."""

    text: str
    #: Whether leaving it out changes no result.
    is_harmless: bool = False
    #: Values that ask for nothing.
    nothing: tuple[Any, ...] = (None,)


_EMPTY: tuple[Any, ...] = (None, [], (), {}, set())
_FALSE: tuple[Any, ...] = (None, False)
_IN_THE_CLOUD = "it says where in Modal's cloud to run, and your workers are where you put them"

OPTIONS: dict[str, _Option] = {
    "image": _Option(
        "fanout builds no images yet; functions run in this script's own interpreter, on another "
        "host in the one that runs `fanout worker`: install the packages there and remove image="
    ),
    "secrets": _Option(
        "fanout keeps no secrets yet; on this machine functions see the script's environment "
        "variables, on another host those of `fanout worker`: set them there and remove secrets=",
        nothing=_EMPTY,
    ),
    "volumes": _Option(
        "fanout has no volumes yet; functions see the file system of their host: use a path, on "
        "several hosts one of a shared file system, and remove volumes=",
        nothing=_EMPTY,
    ),
    "network_file_systems": _Option(
        "functions see the file system of their host: use a path of a shared file system",
        nothing=_EMPTY,
    ),
    "gpu": _Option(
        "fanout does not hand out GPUs yet; a function sees all GPUs of its host: remove gpu=, and "
        "set max_containers= to how many may use them at a time"
    ),
    "schedule": _Option(
        "fanout has no schedules yet; start the script from cron or a systemd timer"
    ),
    "max_inputs": _Option(
        "write single_use_containers=True for a container for each input, or @fanout.concurrent "
        "for several inputs in one"
    ),
    "block_network": _Option(
        "fanout does not cut containers off the network: run the worker where there is none",
        nothing=_FALSE,
    ),
    "restrict_modal_access": _Option(
        "containers of an app may call its functions; nothing restricts that", nothing=_FALSE
    ),
    "_experimental_restrict_output": _Option(
        "results are pickled; nothing restricts what they may be", nothing=_FALSE
    ),
    "detach": _Option(
        "what `spawn` and `spawn_map` start goes on after this process without it, and results "
        "that a process waits for end with it: remove detach=True",
        nothing=_FALSE,
    ),
    "interactive": _Option(
        "containers have no terminal; run the function here with `.local(...)` to debug it",
        nothing=_FALSE,
    ),
    "region": _Option(_IN_THE_CLOUD, is_harmless=True),
    "cloud": _Option(_IN_THE_CLOUD, is_harmless=True),
    "routing_region": _Option(_IN_THE_CLOUD, is_harmless=True),
    "proxy": _Option("containers use the network of their host", is_harmless=True),
    "i6pn": _Option("containers use the network of their host", is_harmless=True, nothing=_FALSE),
    "ephemeral_disk": _Option("containers use the disks of their host", is_harmless=True),
    "nonpreemptible": _Option("no container is ever preempted", is_harmless=True, nothing=_FALSE),
    "enable_memory_snapshot": _Option(
        "containers start from a warm interpreter, without snapshots",
        is_harmless=True,
        nothing=_FALSE,
    ),
    "include_source": _Option(
        "what the functions need of the project travels in any case",
        is_harmless=True,
        nothing=(None, True),
    ),
    "experimental_options": _Option(
        "they are options of Modal's cloud", is_harmless=True, nothing=_EMPTY
    ),
    "client": _Option("FANOUT_URL names the scheduler", is_harmless=True),
    "environment_name": _Option(
        "a scheduler is one environment; FANOUT_URL names the scheduler", is_harmless=True
    ),
}

#: Names that options had in older versions of Modal.
RENAMED = {
    "allow_concurrent_inputs": "@fanout.concurrent(max_inputs=...) below it",
    "secret": "secrets=[...]",
    "mount": "nothing: the project's modules travel by themselves",
    "mounts": "nothing: the project's modules travel by themselves",
    "shared_volumes": "volumes={...}",
}

_warned: set[tuple[str, str]] = set()


def reject_cloud_options(where: str, options: Mapping[str, Any]) -> None:
    """Look at options that scripts for Modal give and fanout does not implement.

    Args:
        where: what they were given to, for messages: "app.function", "App".
        options: by name. Values that ask for nothing (None, an empty list) are let pass.

    Raises:
        InvalidError: one cannot work, is unknown, or has another name now. One that changes no
            result is a warning, the first time.
    """
    for name, value in options.items():
        option = OPTIONS.get(name)
        if option is None:
            raise InvalidError(f"{where}({name}=...): {_advice_on(name)}")
        if any(type(value) is type(nothing) and value == nothing for nothing in option.nothing):
            continue
        shown = f"{where}({name}={_shown(value)})"
        if not option.is_harmless:
            raise InvalidError(f"{shown}: {option.text}")
        if (where, name) not in _warned:
            _warned.add((where, name))
            warn_of_declaration(f"{shown} is ignored: {option.text}")


def _advice_on(name: str) -> str:
    import difflib
    import inspect

    from fanout.app import App

    if name in RENAMED:
        return f"this is now {RENAMED[name]}"
    known = [*OPTIONS, *inspect.signature(App.function).parameters]
    close = difflib.get_close_matches(name, known, 1)
    return f"there is no such option{f'; did you mean {close[0]}=?' if close else ''}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH_MAX else text[: SHOWN_LENGTH_MAX - 3] + "..."


# --- objects --------------------------------------------------------------------------------------


class Absent(type):
    """A class of Modal's that fanout does not have. `ADVICE`: what to do instead. `DECLARES`: its
    methods that only declare something; "" means calling the class itself."""

    ADVICE: str
    DECLARES: frozenset[str]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "" in cls.DECLARES:
            return _declare(cls, _call_text(cls.__name__, args, kwargs))
        _refuse(_call_text(cls.__name__, args, kwargs), cls.ADVICE)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{cls.__name__} has no {name}")
        return _attribute(cls, cls.__name__, name)


class Declared(metaclass=Absent):
    """Base of the absent classes; an instance remembers how it was made."""

    ADVICE = ""
    DECLARES: frozenset[str] = frozenset()
    _text: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return _attribute(type(self), self._text, name)

    def __repr__(self) -> str:
        return self._text

    def __enter__(self) -> Declared:
        if not self._text.endswith(".imports()"):
            _refuse(f"with {self._text}", type(self).ADVICE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        # As `Image.imports()`: what only containers have may be missing here, and not in them.
        return context.container is None and kind is not None and issubclass(kind, ImportError)


def _declare(cls: Absent, text: str) -> Declared:
    made: Declared = object.__new__(cls)  # type: ignore[arg-type]
    made._text = text
    return made


def _attribute(cls: Absent, text: str, name: str) -> Any:
    if name not in cls.DECLARES:
        _refuse(f"{text}.{name}", cls.ADVICE)

    def declare(*args: Any, **kwargs: Any) -> Declared:
        return _declare(cls, _call_text(f"{text}.{name}", args, kwargs))

    return declare


def _call_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    # Values of keywords are not shown: they may be secrets.
    parts = [*(repr(arg) if isinstance(arg, str) else "..." for arg in args)]
    parts += [f"{key}=..." for key in kwargs]
    text = f"{name}({', '.join(parts)})"
    return text if len(text) <= SHOWN_LENGTH_MAX else text[: SHOWN_LENGTH_MAX - 4] + "...)"


def _refuse(what: str, advice: str) -> NoReturn:
    raise InvalidError(f"{what}: {advice}")


_LAYERS = (
    "debian_slim micromamba from_registry from_gcp_artifact_registry from_aws_ecr from_dockerfile "
    "from_scratch from_name from_id pip_install pip_install_private_repos "
    "pip_install_from_requirements pip_install_from_pyproject uv_pip_install uv_sync "
    "poetry_install_from_file micromamba_install apt_install run_commands run_function "
    "dockerfile_commands env workdir cmd entrypoint shell pipe add_local_file add_local_dir "
    "add_local_python_source imports"
)
_WEB = (
    "a function behind a URL. fanout serves no HTTP: write a server of your own (uvicorn, FastAPI) "
    "whose handlers call `await f.remote.aio(...)`"
)
_NO_VOLUMES = "a file system of Modal's cloud. " + OPTIONS["volumes"].text
_NO_SANDBOX = (
    "a container for arbitrary commands. fanout runs Python functions: start the command in one, "
    "with subprocess"
)
_ONE_SCHEDULER = "one scheduler is one workspace; FANOUT_URL names it"
_NO_SCHEDULE = "a time at which a function runs. " + OPTIONS["schedule"].text

#: name -> (what to do, methods that only declare something)
_CLASSES: dict[str, tuple[str, str]] = {
    "Image": ("a container image. " + OPTIONS["image"].text, _LAYERS),
    "Secret": (
        "a set of environment variables kept by Modal. " + OPTIONS["secrets"].text,
        "from_name from_dict from_dotenv from_local_environ",
    ),
    "Volume": (_NO_VOLUMES, "from_name from_id with_mount_options read_only"),
    "NetworkFileSystem": (_NO_VOLUMES, "from_name"),
    "CloudBucketMount": (
        "a bucket mounted as a folder. Mount it on the workers' hosts (rclone, s3fs) and use its "
        "path",
        " ",
    ),
    "Cron": (_NO_SCHEDULE, " "),
    "Period": (_NO_SCHEDULE, " "),
    "Proxy": ("a fixed address for outgoing traffic. " + OPTIONS["proxy"].text, "from_name"),
    "SchedulerPlacement": ("a place in Modal's cloud. " + _IN_THE_CLOUD, " "),
    "FilePatternMatcher": ("a choice of files for an image. " + OPTIONS["image"].text, " "),
    "Probe": (_NO_SANDBOX, ""),
    "Sandbox": (_NO_SANDBOX, ""),
    "SandboxSnapshot": (_NO_SANDBOX, ""),
    "Server": (_WEB, ""),
    "Tunnel": (_WEB, ""),
    "Client": ("a connection to Modal. FANOUT_URL names the scheduler", ""),
    "Cluster": ("a group of containers that start together. fanout has none", ""),
    "Environment": ("a part of a Modal workspace. " + _ONE_SCHEDULER, ""),
    "Workspace": ("an account at Modal. " + _ONE_SCHEDULER, ""),
    "billing": ("what Modal charges. Your own machines send no bill", ""),
    "experimental": ("what Modal is trying out. fanout has none of it", ""),
}

_FUNCTIONS = {
    "asgi_app": _WEB,
    "wsgi_app": _WEB,
    "web_server": _WEB,
    "web_endpoint": _WEB,
    "fastapi_endpoint": _WEB,
    "forward": "a public address for a port of a container. Bind the port on the worker's host",
    "clustered": "a group of containers that start together. Each fanout container works alone",
    "sessioned": "inputs that stay with one container. Keep the state in a fanout.Dict",
}

NAMES = frozenset(_CLASSES) | frozenset(_FUNCTIONS)


def absent(name: str) -> Any:
    """The stand-in for one of `NAMES`: a class, or a function that only raises."""
    if name in _CLASSES:
        advice, declares = _CLASSES[name]
        methods = frozenset(declares.split(" "))
        space = {
            "ADVICE": f"{name} is in Modal {advice}",
            "DECLARES": methods if declares.strip() else frozenset([""] if declares else []),
        }
        return Absent(name, (Declared,), {**space, "__module__": "fanout"})

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(_call_text(name, args, kwargs), f"{name} is in Modal {_FUNCTIONS[name]}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__module__ = "fanout"
    return refuse


# --- attributes -----------------------------------------------------------------------------------

_STATUS = "`fanout status` shows what runs, and for how long"
_OUTPUT = "`with fanout.enable_output():` shows what functions print, and `fanout run` does"
_BATCH_ONLY = "fanout serves no HTTP"

_ATTRIBUTES: dict[tuple[str, str], str] = {
    ("App", "logs"): _OUTPUT,
    ("App", "stats"): _STATUS,
    ("App", "info"): _STATUS,
    ("App", "server"): _BATCH_ONLY,
    ("App", "sandboxes"): _NO_SANDBOX,
    ("App", "image"): OPTIONS["image"].text,
    ("App", "is_interactive"): OPTIONS["interactive"].text,
    ("Function", "logs"): _OUTPUT,
    ("Function", "stats"): _STATUS,
    ("Function", "metrics"): _STATUS,
    ("Function", "info"): _STATUS,
    ("Function", "get_web_url"): _BATCH_ONLY,
    ("Function", "web_url"): _BATCH_ONLY,
    ("Function", "keep_warm"): "this is now min_containers=",
    ("FunctionCall", "logs"): _OUTPUT,
    ("FunctionCall", "get_gen"): "write `for x in f.remote_gen(...)`",
}


def missing_attribute(kind: str, name: str) -> AttributeError:
    """The error for an attribute that `kind` does not have; with advice if it has it in Modal."""
    advice = _ATTRIBUTES.get((kind, name))
    text = f"fanout.{kind} has no attribute {name!r}"
    return AttributeError(text if advice is None else f"{text}: {advice}")
