"""Contestants of a benchmark, each in a process of its own.

Memory peaks then do not mix, one library's idle threads do not disturb the other, and the measurements can still take
turns, so that a noisy machine is noisy for both.
"""

import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from mpdit_jax.errors import MPDiTError

# Makes a contestant's tasks by name (each runs to the end of its work and returns a result) and what to tell about it.
Setup: TypeAlias = Callable[..., tuple[Mapping[str, Callable[[], Any]], dict[str, Any]]]


class Worker:
    """A contestant.

    Attributes:
        name: what reports call it.
        about: what its setup told.
    """

    def __init__(self, name: str, setup: Setup, *arguments: Any) -> None:
        """Start a process, call `setup(*arguments)` there, and wait for it.

        Raises:
            MPDiTError: the setup failed.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")  # JAX and PyTorch both run threads that a fork would lose
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
        self._connection.send(("time", task))
        return float(self._receive())

    def result(self, task: str) -> Any:
        """What a task returns."""
        self._connection.send(("result", task))
        return self._receive()

    def peak_memory(self) -> int:
        """Bytes of memory the process has held at most, libraries and weights included."""
        self._connection.send(("memory", ""))
        return int(self._receive())

    def _receive(self) -> Any:
        try:
            status, value = self._connection.recv()
        except EOFError as error:
            raise MPDiTError(f"{self.name}: its process died, perhaps for want of memory.") from error
        if status == "error":
            raise MPDiTError(f"{self.name}: {value}")
        return value


def _serve(connection: Connection, setup: Setup, arguments: tuple[Any, ...]) -> None:
    try:
        tasks, about = setup(*arguments)
        connection.send(("ok", about))
        while True:
            command, task = connection.recv()
            if command == "memory":
                connection.send(("ok", peak_memory()))
                continue
            start = time.perf_counter()
            result = tasks[task]()
            seconds = time.perf_counter() - start
            connection.send(("ok", seconds if command == "time" else result))
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark is over
    except MPDiTError as error:
        connection.send(("error", str(error)))
    except Exception as error:
        traceback.print_exc()
        connection.send(("error", f"{type(error).__name__}: {error}"))


def peak_memory() -> int:
    """Bytes of memory that this process has held at most, libraries included."""
    # ru_maxrss of a child starts at what its parent held, so Linux's own figure comes first.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
