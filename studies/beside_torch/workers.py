"""Contestants of a benchmark, each in a process of its own, so that memory peaks and idle threads do not mix."""

import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from mpdit_jax.benchmark.common import progress, timed
from mpdit_jax.errors import MPDiTError

# Makes a contestant's tasks by name (each runs to the end of its work and returns a result) and facts for the report.
Setup: TypeAlias = Callable[..., tuple[Mapping[str, Callable[[], Any]], dict[str, Any]]]


class Worker:
    """A contestant; `about` holds the facts that its setup returned."""

    def __init__(self, name: str, setup: Setup, *arguments: Any) -> None:
        """Start a process, call `setup(*arguments)` there, and wait for it.

        Raises:
            MPDiTError: the setup failed.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would lose the threads of JAX and PyTorch
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def time(self, task: str) -> float:
        """Seconds of one run of a task."""
        return float(self._ask("time", task))

    def result(self, task: str) -> Any:
        """The return value of a task."""
        return self._ask("result", task)

    def peak_memory(self) -> int:
        """Peak memory of the process in bytes, libraries and weights included."""
        return int(self._ask("memory", ""))

    def _ask(self, command: str, task: str) -> Any:
        self._connection.send((command, task))
        return self._receive()

    def _receive(self) -> Any:
        try:
            status, value = self._connection.recv()
        except EOFError as error:
            raise MPDiTError(f"{self.name}: its process died, perhaps for want of memory.") from error
        if status == "error":
            raise MPDiTError(f"{self.name}: {value}")
        return value


def start_workers(stack: ExitStack, setups: Mapping[str, Setup], *arguments: Any) -> list[Worker]:
    """A worker for each setup, started one after the other with the same arguments; the stack ends them."""
    workers = []
    for name, setup in setups.items():
        progress(f"loading and warming up {name}")
        workers.append(stack.enter_context(Worker(name, setup, *arguments)))
    return workers


def jax_about() -> dict[str, str]:
    """The version and the device of JAX, for a setup."""
    import jax

    device = jax.devices()[0]
    return {"version": jax.__version__, "device": f"{device.platform} ({device.device_kind})"}


def peak_memory() -> int:
    """Peak memory of this process in bytes, libraries included."""
    # ru_maxrss of a child starts at its parent's memory, so Linux's own figure comes first.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(connection: Connection, setup: Setup, arguments: tuple[Any, ...]) -> None:
    try:
        tasks, about = setup(*arguments)
        connection.send(("ok", about))
        while True:
            command, task = connection.recv()
            if command == "memory":
                connection.send(("ok", peak_memory()))
            else:
                connection.send(("ok", timed(tasks[task]) if command == "time" else tasks[task]()))
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark is over
    except MPDiTError as error:
        connection.send(("error", str(error)))
    except Exception as error:
        traceback.print_exc()
        connection.send(("error", f"{type(error).__name__}: {error}"))
