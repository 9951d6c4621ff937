"""Where every process waits for all others, however long they take.

JAX's own meeting point is a collective of all devices, which on CPUs gives up after 30 s if it is the first of a
command, and a process that ends before the others waits 300 s for them and then ends all of them with a stack trace.
The service that connects the processes has meeting points with a limit of one's own.
"""

import threading

import jax

from mpdit_jax.distributed.peers import await_verdict
from mpdit_jax.errors import ProcessError

_LIMIT = 20 * 24 * 3600 * 1000  # milliseconds: 20 days, which 32 bits still hold


def barrier(place: str) -> None:
    """Return when every process has come to `place`; at once where there is one process.

    A process that is lost ends the wait with a sentence (see `peers`), and a signal interrupts it.

    Args:
        place: what to call it; the same on all processes, and may be used again.

    Raises:
        ProcessError: the processes are no longer connected.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # takes a moment to import, which a process by itself need not spend

    meet, problems = multihost.get_barrier_sync_fn(), list[jax.errors.JaxRuntimeError]()

    def wait() -> None:
        try:
            meet(key=f"mpdit_jax: {place}", timeout_ms=_LIMIT)
        except jax.errors.JaxRuntimeError as error:
            problems.append(error)

    # In a thread of its own, for Python heeds no signal while it waits in the service.
    thread = threading.Thread(target=wait, name="meeting", daemon=True)
    thread.start()
    thread.join()
    if problems:
        await_verdict()
        raise ProcessError(
            f"another process was lost while this one waited for it ({str(problems[0]).splitlines()[0][:200]}): see "
            "its log; the same command on all machines continues."
        ) from problems[0]
