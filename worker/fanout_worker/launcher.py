"""Templates, parent side: one warm interpreter for each environment, from which containers fork.

What an interpreter or its loader reads once, at its start, cannot be set in a fork. So a template
is keyed by the interpreter, the path that its own imports come from, and those variables; all
other variables, the working folder and the container's path are set in the fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgpack

import fanout
import fanout_worker
from fanout.exceptions import ContainerStartError
from fanout_worker import channel, process

logger = logging.getLogger("fanout.worker")

#: Templates kept for the next container; the one that was used longest ago leaves.
TEMPLATES_MAX = 4
TEMPLATE_START_TIMEOUT_S = 60.0
#: How much of what a failed interpreter printed goes into the error.
_OUTPUT_TAIL_BYTES = 4096

_LOADER_PREFIXES = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LC_", "LANG")

#: The client's path is tried first: its interpreter may not be able to load the daemon's packages.
#: Running from a checkout, the worker's package is in no interpreter's path.
_BOOT = """
import json, sys
path, fallback, descriptor, daemon_pid, agreed = json.loads(sys.argv[1])
sys.path[:] = path
try:
    import fanout_worker.runtime.template as template
except ImportError:
    sys.path += fallback
    import fanout_worker.runtime.template as template
    sys.path[:] = path
template.main(descriptor, daemon_pid, agreed)
"""

#: Read at the daemon's start, so it tells of the code that the daemon runs.
_AGREED = channel.fingerprint()


@dataclass(slots=True)
class Interpreter:
    """What a template is started with."""

    python: str
    path: list[str]
    variables: dict[str, str]

    def key(self) -> tuple[object, ...]:
        loader = [v for v in sorted(self.variables.items()) if v[0].startswith(_LOADER_PREFIXES)]
        return (self.python, tuple(self.path), tuple(loader))


class Template:
    """One template process.

    Args:
        group: a control group that it is put into; None for none.
    """

    def __init__(self, interpreter: Interpreter, group: Path | None) -> None:
        """Start it.

        Raises:
            ContainerStartError: there is no such interpreter here.
        """
        self._loop = asyncio.get_running_loop()
        self._python = interpreter.python
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        self._forks: dict[int, asyncio.Future[int]] = {}
        self.is_dead = False
        #: Forks that were asked for and not answered. One that is needed must not be closed.
        self.pending = 0
        self._ready = self._loop.create_future()
        # Nobody may be left to ask why it failed.
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        packages = [str(Path(p.__path__[0]).parent) for p in (fanout, fanout_worker)]
        argument = json.dumps([interpreter.path, packages, theirs.fileno(), os.getpid(), _AGREED])
        try:
            self._process = subprocess.Popen(
                [interpreter.python, "-c", _BOOT, argument],
                env=interpreter.variables,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            self._output.close()
            raise ContainerStartError(
                f"the interpreter {interpreter.python} cannot be started on this host: {error}"
            ) from error
        finally:
            theirs.close()
        self._loop.add_reader(self._control, self._on_readable)
        #: In a thread, as it takes longer than this loop may stand still; the template, which has
        #: its imports to do, takes longer still.
        self._grouping: asyncio.Future[None] | None = None
        #: Why it is not in the group.
        self.group_error: OSError | None = None
        if group is not None:
            self._grouping = self._loop.run_in_executor(
                None, process.put_into_group, self.pid, group
            )
            self._grouping.add_done_callback(
                lambda future: future.cancelled() or future.exception()
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def fork(self, container_id: int, descriptors: list[int]) -> int:
        """Fork a container with these descriptors; returns its pid.

        Raises:
            ContainerStartError: the template cannot; the text says what it printed.
        """
        self.pending += 1
        try:
            async with asyncio.timeout(TEMPLATE_START_TIMEOUT_S):
                await asyncio.shield(self._ready)
                await self._wait_grouped()
                if self.is_dead:
                    raise ContainerStartError(f"the template of {self._python} has ended")
                answer: asyncio.Future[int] = self._loop.create_future()
                self._forks[container_id] = answer
                socket.send_fds(self._control, [msgpack.packb([container_id])], descriptors)
                return await answer
        finally:
            self.pending -= 1
            self._forks.pop(container_id, None)

    async def _wait_grouped(self) -> None:
        if self._grouping is not None:
            try:
                await asyncio.shield(self._grouping)
            except OSError as error:
                self.group_error = error

    def close(self) -> None:
        """End the process. Containers do not need it any more."""
        if self.is_dead:
            return
        self.is_dead = True
        self._loop.remove_reader(self._control)
        self._control.close()
        self._process.kill()
        self._process.wait()
        error = ContainerStartError(
            f"the interpreter {self._python} ended with status {self._process.returncode} before "
            f"it could start a container. It printed:\n{self._printed()}"
        )
        self._output.close()
        for answer in [self._ready, *self._forks.values()]:
            if not answer.done():
                answer.set_exception(error)
        self._forks.clear()

    def _printed(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _OUTPUT_TAIL_BYTES))
        return self._output.read().decode(errors="replace").strip() or "(nothing)"

    def _on_readable(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # It leaves by itself; `close` must not change the status that it leaves with.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.2)
            self.close()
            return
        answer = msgpack.unpackb(data)
        if not answer:
            self._ready.set_result(None)
            return
        waiting = self._forks.pop(answer[0], None)
        if waiting is None or waiting.done():
            return
        if answer[1] < 0:
            text = f"no process can be forked for a container: {os.strerror(-answer[1])}"
            waiting.set_exception(ContainerStartError(text))
        else:
            waiting.set_result(answer[1])


class Launcher:
    """The templates of a daemon."""

    def __init__(self) -> None:
        #: A control group for all that is started from now on; None for none.
        self.group: Path | None = None
        self._templates: OrderedDict[tuple[object, ...], Template] = OrderedDict()

    @property
    def pids(self) -> set[int]:
        return {template.pid for template in self._templates.values()}

    async def fork(
        self, interpreter: Interpreter, container_id: int, descriptors: list[int]
    ) -> int:
        """Fork a container from the template of this environment, started if there is none.

        Raises:
            ContainerStartError: it cannot be started.
        """
        key = interpreter.key()
        template = self._templates.get(key)
        if template is None or template.is_dead:
            template = self._templates[key] = Template(interpreter, self.group)
            logger.info("= template %d for %s", template.pid, interpreter.python)
        self._templates.move_to_end(key)
        try:
            return await template.fork(container_id, descriptors)
        except TimeoutError:
            template.close()
            raise ContainerStartError(
                f"the interpreter {interpreter.python} gave no container within "
                f"{TEMPLATE_START_TIMEOUT_S:g} s"
            ) from None
        finally:
            if template.group_error is not None:
                self._do_without_group(template.group_error)
            if template.is_dead:
                self._templates.pop(key, None)
            self._evict()

    def _do_without_group(self, error: OSError) -> None:
        """What is in the group already stays there."""
        if self.group is not None:
            logger.warning("containers are in no control group from now on: %s", error)
            self.group = None

    def _evict(self) -> None:
        """Close templates that were not used for long, but none that somebody waits for."""
        for key, template in list(self._templates.items()):
            if len(self._templates) <= TEMPLATES_MAX:
                return
            if template.pending == 0:
                del self._templates[key]
                template.close()

    def close(self) -> None:
        """End all templates."""
        for template in self._templates.values():
            template.close()
        self._templates.clear()
