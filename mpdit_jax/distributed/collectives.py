"""Collective operations on values of the host: barriers, broadcasts, comparisons, votes.

Every function but `run_interruptibly` is collective: call it on every process in the same order.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpdit_jax.errors import MPDiTError, ProcessError

SharedValues: TypeAlias = Mapping[str, str]
"""Values that must be equal on every process, by name: config fields, versions."""

_LONGEST_WAIT = 20 * 24 * 3600 * 1000  # milliseconds: 20 days, which fit into 32 bits
_WIDTH = 1024  # bytes; gathered values are padded to a multiple of it, as JAX compiles a program for each length
_MOST_SHOWN = 5  # differing values that are named for each process
T = TypeVar("T")


def run_interruptibly(action: Callable[[], object], seconds: float | None = None) -> bool:
    """Run `action` in a thread and wait for it, at most `seconds`; return whether it has ended. Its errors are raised.

    Python runs signal handlers in the main thread only, and not while that thread waits inside a library.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="waiting", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def barrier(place: str) -> None:
    """Wait until every process has called this with the same `place`, for days if need be; a signal interrupts it.

    JAX's `sync_global_devices` would not do: it is a computation on all devices, which on CPUs fails after 30 s.

    Args:
        place: a name, the same on all processes; it may be used again.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    from mpdit_jax.io.storage import wait_at_barrier  # imports Orbax, which a process by itself need not wait for

    run_interruptibly(lambda: wait_at_barrier(f"mpdit_jax: {place}", _LONGEST_WAIT))


def gather(value: Any, place: str = "gather") -> list[Any]:
    """Return the `value` of every process, which JSON can hold, in the processes' order."""
    if jax.process_count() == 1:
        return [value]
    barrier(place)  # a collective of CPUs that one process begins late fails, see `barrier`
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    width = -(-int(lengths.max()) // _WIDTH) * _WIDTH
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - len(text))))
    return [json.loads(bytes(row[:length])) for row, length in zip(np.asarray(rows), lengths, strict=True)]


def assert_equal_across_processes(
    shared_values: SharedValues, remedy: str = "start the same command with the same files on all machines"
) -> None:
    """Compare values with process 0's; `remedy` ends the sentence of the error.

    Raises:
        ProcessError: on every process; the message names each process that differs, and in what.
    """
    first, *others = gather(dict(shared_values))
    differing = [_difference(index, theirs, first) for index, theirs in enumerate(others, 1) if theirs != first]
    if differing:
        raise ProcessError(f"{'; '.join(differing)}: {remedy}.")


def _difference(index: int, theirs: SharedValues, first: SharedValues) -> str:
    changed = [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]
    shown = ", ".join(f"{name}={theirs.get(name)} instead of {first.get(name)}" for name in changed[:_MOST_SHOWN])
    more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    return f"process {index} was started with {shown}{more}, unlike process 0"


def run_on_process_0(action: Callable[[], T]) -> T | None:
    """Run `action` on process 0 while the others wait; return its result on process 0 and None on the others.

    Raises:
        MPDiTError, OSError: what `action` raised; ProcessError with the same sentence on the other processes.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except (MPDiTError, OSError) as error:
            failure = error
    heard = first_sentence("" if failure is None else str(failure), "process 0 has done it")
    if failure is not None:
        raise failure
    if heard:
        raise ProcessError(heard)
    return result


def broadcast(value: int) -> int:
    """Return process 0's whole number on every process."""
    return int(gather(int(value))[0])


def first_sentence(sentence: str, place: str) -> str:
    """Return on every process the sentence of the first process that has one; "" if none has one.

    See `barrier` for `place`.
    """
    return next((one for one in gather(sentence, place) if one), "")


def count_machines() -> int:
    """Return the number of machines that the processes run on, told apart by host names."""
    return len(set(gather(socket.gethostname())))


def any_process(flag: bool) -> bool:
    """Return whether `flag` holds on any process."""
    return any(gather(bool(flag)))


class StopVote:
    """Lets all processes stop before the same step if one of them was asked to.

    The devices wait while the processes ask each other, so they do it about every two seconds.
    """

    EVERY = 2.0  # seconds

    def __init__(self) -> None:
        self._next, self._last_step, self._last_time = 0, 0, time.monotonic()

    def asked(self, flag: bool, step: int) -> bool:
        """Return whether to end before `step`; call it before every step.

        Args:
            flag: whether this process was asked to stop.
            step: steps done so far.
        """
        if jax.process_count() == 1:
            return flag
        if step < self._next:
            return False
        flags, seconds = zip(*gather([bool(flag), time.monotonic() - self._last_time]), strict=True)
        # The slowest process decides when to ask again; all compute the same step from the gathered numbers.
        steps = max(step - self._last_step, 1)
        self._next = step + min(max(int(self.EVERY * steps / max(*seconds, 1e-6)), 1), 4 * steps)
        self._last_step, self._last_time = step, time.monotonic()
        return any(flags)
