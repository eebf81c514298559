"""The options of `app.function` and `app.cls`: checked once, where they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fanout import config
from fanout.exceptions import InvalidError
from fanout.partial import Batching, Concurrency, PartialFunction
from fanout.retries import Retries, as_retries

TIMEOUT_S_MAX = 24 * 3600.0
MEMORY_MIB_MAX = 1 << 40

#: Older names of options, and what they are called now.
OLD_NAMES = {
    "concurrency_limit": "max_containers",
    "keep_warm": "min_containers",
    "container_idle_timeout": "scaledown_window",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options; times in seconds, memory in MiB, cpu in cores."""

    timeout: float = config.TIMEOUT_S
    #: None: as `timeout`.
    startup_timeout: float | None = None
    retries: Retries | None = None
    max_containers: int | None = None
    min_containers: int = 0
    buffer_containers: int = 0
    scaledown_window: float = config.SCALEDOWN_WINDOW_S
    cpu: float | None = None
    memory: int = 0
    is_single_use: bool = False
    is_serialized: bool = False
    concurrency: Concurrency | None = None
    batching: Batching | None = None
    env: tuple[tuple[str, str], ...] = ()

    def as_data(self) -> dict[str, Any]:
        """As `DefineFunction.options` has them; what is not set is left out."""
        data: dict[str, Any] = {
            "timeout": self.timeout,
            "startup_timeout": self.startup_timeout or self.timeout,
            "retries": None if self.retries is None else self.retries.as_data(),
            "max_containers": self.max_containers,
            "min_containers": self.min_containers,
            "buffer_containers": self.buffer_containers,
            "cpu": self.cpu,
            "memory": self.memory,
            "scaledown_window": self.scaledown_window,
            "single_use": self.is_single_use,
        }
        if self.concurrency is not None:
            data["max_inputs"] = self.concurrency.max_inputs
            data["target_inputs"] = self.concurrency.target_inputs or self.concurrency.max_inputs
        if self.batching is not None:
            data["batch"] = [self.batching.max_batch_size, self.batching.wait_ms]
        return data

    @classmethod
    def of_data(cls, data: Mapping[str, Any], env: Mapping[str, str]) -> Options:
        """The options of a definition, as far as a handle needs them; `env` has a place of its own
        there."""
        retries = data["retries"]
        batch = data.get("batch")
        concurrency = data.get("max_inputs")
        return cls(
            timeout=data["timeout"],
            startup_timeout=data["startup_timeout"],
            retries=None
            if retries is None
            else Retries(int(retries[0]), retries[2], retries[1], retries[3]),
            max_containers=data["max_containers"],
            min_containers=data["min_containers"],
            buffer_containers=data["buffer_containers"],
            scaledown_window=data["scaledown_window"],
            cpu=data["cpu"],
            memory=data["memory"],
            is_single_use=data["single_use"],
            concurrency=None
            if concurrency is None
            else Concurrency(concurrency, data.get("target_inputs")),
            batching=None if batch is None else Batching(*batch),
            env=tuple(sorted(env.items())),
        )

    def means(self, other: Options) -> bool:
        """Whether containers of both are the same."""
        return self.env == other.env and self.as_data() == other.as_data()

    def with_changes(self, given: Mapping[str, Any]) -> Options:
        """These options with some replaced, as `with_options` does: None leaves one as it is.

        Raises:
            InvalidError: one is wrong, or they do not fit each other.
        """
        changes = {name: value for name, value in given.items() if value is not None}
        checked = check_options({**DEFAULTS, **changes})
        fields = {_FIELD_OF.get(name, name) for name in changes}
        options = dataclasses.replace(self, **{name: getattr(checked, name) for name in fields})
        check_together(options)
        return options

    def with_partial(self, partial: PartialFunction[..., Any, Any]) -> Options:
        """These options with what decorators below said."""
        options = self
        if partial.concurrency is not None:
            options = dataclasses.replace(options, concurrency=partial.concurrency)
        if partial.batching is not None:
            options = dataclasses.replace(options, batching=partial.batching)
        check_together(options)
        return options


#: What options are called in `Options`, where it is not the same.
_FIELD_OF = {"single_use_containers": "is_single_use", "serialized": "is_serialized"}

#: The names that `app.function` and `app.cls` take, and what each is if not given.
DEFAULTS: dict[str, Any] = {
    "timeout": config.TIMEOUT_S,
    "startup_timeout": None,
    "retries": None,
    "max_containers": None,
    "min_containers": None,
    "buffer_containers": None,
    "scaledown_window": None,
    "cpu": None,
    "memory": None,
    "single_use_containers": False,
    "serialized": False,
    "env": None,
}


def rename_old(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that they have now.

    Raises:
        InvalidError: one is given under both of its names.
    """
    renamed: dict[str, Any] = {}
    for name, value in given.items():
        new = OLD_NAMES.get(name, name)
        if value is None and new != name:
            continue
        if renamed.get(new) is not None:
            raise InvalidError(f"{new}= and {name}= are two names of one option; keep the first")
        renamed[new] = value
    return renamed


def check_options(given: Mapping[str, Any]) -> Options:
    """Options out of what a decorator was given; the keys are those of `DEFAULTS`.

    Raises:
        InvalidError: which one, its value, and what it may be.
    """
    window = given["scaledown_window"]
    options = Options(
        timeout=_seconds("timeout", given["timeout"]),
        startup_timeout=None
        if given["startup_timeout"] is None
        else _seconds("startup_timeout", given["startup_timeout"]),
        retries=as_retries(given["retries"]),
        max_containers=_count("max_containers", given["max_containers"], 1),
        min_containers=_count("min_containers", given["min_containers"], 0) or 0,
        buffer_containers=_count("buffer_containers", given["buffer_containers"], 0) or 0,
        scaledown_window=config.SCALEDOWN_WINDOW_S if window is None else _window(window),
        cpu=_cpu(given["cpu"]),
        memory=_memory(given["memory"]),
        is_single_use=_flag("single_use_containers", given["single_use_containers"]),
        is_serialized=_flag("serialized", given["serialized"]),
        env=_env(given["env"]),
    )
    check_together(options)
    return options


def named(where: str, **given: Any) -> dict[str, Any]:
    """All options of a decorator, under the names they have now, defaults among them.

    Raises:
        InvalidError: there is none of that name.
    """
    return {**DEFAULTS, **options_of(where, given)}


def options_of(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a user gave, under the names they have now. Those of Modal that change no
    result here are left out, with a warning.

    Raises:
        InvalidError: one is unknown, or cannot work here.
    """
    renamed = rename_old(given)
    foreign = {name: renamed.pop(name) for name in list(renamed) if name not in DEFAULTS}
    if foreign:
        from fanout.compat import reject_cloud_options

        reject_cloud_options(where, foreign)
    return renamed


#: What decorators take and `with_options` does not, and what it says.
_FIXED = {
    "name": "what it is called",
    "serialized": "how its code travels",
    "is_generator": "what calling it gives",
}


def changes_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `with_options` was given, as `options_of`.

    Raises:
        InvalidError: one is unknown, cannot work here, or cannot be changed.
    """
    for option, fixed in _FIXED.items():
        if given.get(option) is not None:
            raise InvalidError(
                f"{name}.with_options({option}=...): {fixed} is said once, where it is decorated; "
                f"give {option}= to the decorator"
            )
    return options_of(name, {key: value for key, value in given.items() if key not in _FIXED})


def check_retries(options: Options, name: str, shape: Mapping[str, Any]) -> None:
    """Whether code of this shape (`Service.shape`) may be run again.

    Raises:
        InvalidError: it is a generator, or a class with one, and has `retries`.
    """
    if options.retries is None:
        return
    if shape.get("is_generator"):
        raise InvalidError(
            f"retries= of generator function {name!r}: its items would come twice; catch errors "
            "inside the generator, or call it again"
        )
    for method, kind in shape.get("methods", {}).items():
        if kind["is_generator"]:
            raise InvalidError(
                f"retries= of class {name!r}, whose method {method!r} is a generator: its items "
                "would come twice; catch errors inside the generator, or call it again"
            )


def check_together(options: Options) -> None:
    """Whether options fit each other.

    Raises:
        InvalidError: they do not.
    """
    limit = options.max_containers
    if limit is not None and options.min_containers > limit:
        raise InvalidError(
            f"min_containers={options.min_containers} is above max_containers={limit}"
        )
    if options.is_single_use and (options.concurrency or options.batching):
        raise InvalidError(
            "single_use_containers=True gives each input a container of its own, so neither "
            "@concurrent nor @batched can do anything; remove one of them"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _seconds(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= TIMEOUT_S_MAX:
        raise InvalidError(
            f"{name}={value!r}: must be seconds, more than 0 and at most {TIMEOUT_S_MAX:g}"
        )
    return float(value)


def _window(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= TIMEOUT_S_MAX:
        raise InvalidError(
            f"scaledown_window={value!r}: must be seconds, from 0 to {TIMEOUT_S_MAX:g}"
        )
    return float(value)


def _count(name: str, value: Any, low: int) -> int | None:
    if value is not None and (type(value) is not int or value < low):
        raise InvalidError(f"{name}={value!r}: must be an int of at least {low}, or None")
    count: int | None = value
    return count


def _cpu(value: Any) -> float | None:
    if value is None:
        return None
    request, limit = _request_and_limit("cpu", value)
    for cores in (request, limit):
        if not _is_number(cores) or not 0 < cores < 1e6:
            raise InvalidError(f"cpu={value!r}: must be a number of cores above 0, or None")
    return float(request)


def _memory(value: Any) -> int:
    if value is None:
        return 0
    request, limit = _request_and_limit("memory", value)
    for mebibytes in (request, limit):
        if type(mebibytes) is not int or not 0 <= mebibytes < MEMORY_MIB_MAX:
            raise InvalidError(f"memory={value!r}: must be an int of MiB of at least 0, or None")
    return int(request)


def _request_and_limit(name: str, value: Any) -> tuple[Any, Any]:
    """What is asked for, and the most that may be used: the same, or a pair of both."""
    if not isinstance(value, tuple):
        return value, value
    if len(value) != 2 or not all(map(_is_number, value)) or value[1] < value[0]:
        raise InvalidError(f"{name}={value!r}: a pair must be (request, limit), the limit not less")
    return value


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise InvalidError(f"{name}={value!r}: must be True or False")
    return value


def _env(value: Any) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    is_mapping = isinstance(value, Mapping)
    if not is_mapping or not all(
        type(name) is str and name and "=" not in name and (text is None or type(text) is str)
        for name, text in value.items()
    ):
        raise InvalidError(f"env={value!r}: must be a dict of names and texts (or None)")
    return tuple(sorted((name, text) for name, text in value.items() if text is not None))
