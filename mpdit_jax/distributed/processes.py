"""Several processes that act as one: how they find each other, and how they agree.

Before JAX connects them, the processes of a cluster (`clusters`) hold a roll call (`roll_call`).
"""

import argparse
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

from mpdit_jax.distributed.clusters import Cluster, find_cluster, find_pod, on_cloud_tpu
from mpdit_jax.distributed.peers import start_watch
from mpdit_jax.distributed.roll_call import REMEDY, Facts, roll_call, tell_apart
from mpdit_jax.distributed.waiting import barrier
from mpdit_jax.errors import ConfigError, MPDiTError, ProcessError
from mpdit_jax.version import __version__

_SENTENCE_LIMIT = 4096  # bytes
T = TypeVar("T")


_LONGEST = 10**6  # seconds to wait for others


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that many processes can run together."""
    group = parser.add_argument_group("several processes", "found by themselves under SLURM and on TPU pods")
    group.add_argument("--coordinator_address", default="", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for the others (300)"
    )


def join(options: argparse.Namespace, facts: Facts) -> None:
    """Connect with the other processes of the command, if there are any; call before JAX is used.

    Args:
        options: parsed flags, see `add_flags`.
        facts: what every process must have in common with process 0, beside the versions of this package and of JAX.

    Raises:
        ConfigError: flags or variables that describe no cluster.
        ProcessError: a process is missing, or has other facts; the message names it.
    """
    if not 0 < options.join_timeout <= _LONGEST:
        raise ConfigError(f"join_timeout={options.join_timeout}: expected seconds, more than 0 and at most {_LONGEST}.")
    given = (options.coordinator_address, options.num_processes, options.process_id)
    if any(value not in ("", None) for value in given):
        if any(value in ("", None) for value in given):
            raise ConfigError("--coordinator_address, --num_processes and --process_id: give all three, or none.")
        cluster: Cluster | None = Cluster(*given)
    else:
        cluster = find_cluster(os.environ)
    # JAX's service would take SIGTERM for itself and leave it at that: a command that is asked to end has to.
    jax.config.update("jax_enable_preemption_service", False)
    if cluster is None and on_cloud_tpu(os.environ):
        cluster = find_pod(os.environ)
    if cluster is None or cluster.count == 1:
        return
    facts = {**facts, "version": __version__, "code": code_fingerprint()}
    facts |= {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    start_watch(cluster.index, cluster.count, roll_call(cluster, facts, options.join_timeout))
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.count,
        cluster.index,
        # It would look for the cluster again, and under SLURM take one GPU a process, however many the node has.
        cluster_detection_method="deactivate",
        initialization_timeout=int(options.join_timeout) + 1,
    )


def assert_equal_across_processes(facts: Mapping[str, Any]) -> None:
    """Raise ProcessError on every process unless all have process 0's values, which JSON can hold. Collective."""
    barrier("values are compared")
    text = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(text)))).ravel()
    filled = np.pad(text, (0, int(lengths.max()) - len(text)))
    texts = _rows_of_all(filled)
    told = [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]
    differing = [tell_apart(index, theirs, told[0]) for index, theirs in enumerate(told) if theirs != told[0]]
    if differing:
        raise ProcessError(f"{'; '.join(differing)}: {REMEDY}.")


def run_on_process_0(action: Callable[[], T]) -> T | None:
    """Run `action` on process 0 alone and wait for it everywhere, however long; its result there, None on the others.

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
    heard = first_sentence("" if failure is None else str(failure), "the first has done it")
    if failure is not None:
        raise failure
    if heard:
        raise ProcessError(heard)
    return result


def broadcast(value: int) -> int:
    """Process 0's whole number below 2**31, on every process; all must ask at the same point."""
    if jax.process_count() == 1:
        return value
    barrier("the first tells")
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_sentence(sentence: str, place: str) -> str:
    """The sentence of the first process that has one, on all of them; "" if none has. Every process must ask.

    Args:
        sentence: what this process has to say, or "".
        place: what to call the moment, see `barrier`.
    """
    if jax.process_count() == 1:
        return sentence
    barrier(place)
    text = np.zeros(_SENTENCE_LIMIT, np.uint8)
    encoded = np.frombuffer(sentence.encode()[:_SENTENCE_LIMIT], np.uint8)
    text[: len(encoded)] = encoded
    heard = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in _rows_of_all(text)]
    return next((one for one in heard if one), "")


def count_machines() -> int:
    """On how many machines the processes run, told apart by host names; every process must ask at the same point."""
    if jax.process_count() == 1:
        return 1
    barrier("machines are counted")
    name = np.frombuffer(hashlib.sha256(socket.gethostname().encode()).digest(), np.uint8)
    return len(np.unique(_rows_of_all(name), axis=0))


def _rows_of_all(row: np.ndarray) -> np.ndarray:
    """(processes, n), of the rows (n,) that all give at the same point; one process has no first axis to begin with."""
    return np.asarray(multihost_utils.process_allgather(row)).reshape(-1, len(row))


def any_process(flag: bool) -> bool:
    """Whether `flag` holds on any process; every process must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    barrier("all answer")
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


class StopVote:
    """All processes stop before the same step if one of them was asked to.

    Asking the others takes a moment in which the devices wait, so that it is done about every two seconds.
    """

    EVERY = 2.0  # seconds

    def __init__(self) -> None:
        self._next, self._last_step, self._last_time = 0, 0, time.monotonic()

    def asked(self, flag: bool, step: int) -> bool:
        """Whether to end before `step`; every process must ask before every step.

        Args:
            flag: whether this process was asked to stop.
            step: steps done so far.
        """
        if jax.process_count() == 1:
            return flag
        if step < self._next:
            return False
        now = time.monotonic()
        answers = np.asarray(multihost_utils.process_allgather(np.array([flag, now - self._last_time], np.float32)))
        # The slowest decides when to ask again, from numbers that all of them have.
        seconds, steps = float(answers[:, 1].max()), max(step - self._last_step, 1)
        self._next = step + min(max(int(self.EVERY * steps / max(seconds, 1e-6)), 1), 4 * steps)
        self._last_step, self._last_time = step, time.monotonic()
        return bool(answers[:, 0].any())


def code_fingerprint() -> str:
    """The first digits of a SHA-256 over this package's source files, by which two installations are told apart."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
