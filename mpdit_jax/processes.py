"""Several processes that act as one: how they find each other, and how they agree.

A cluster is taken from the first that says anything of: the command's flags, the environment variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM, GKE's TPU variables. On a machine with TPU chips
where none of them is set, JAX asks the metadata server itself. Otherwise this process is alone.

Before JAX connects them, the processes hold a roll call on the port after the coordinator's. JAX itself ends a process
that waits in vain with a stack trace; the roll call ends it with a sentence that names who is missing, or who was
started with another config or version. The connections of the roll call stay open: see `mpdit_jax.peers`.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpdit_jax.errors import ConfigError, MPDiTError, ProcessError
from mpdit_jax.peers import start_watch
from mpdit_jax.waiting import wait_for_all

Facts = Mapping[str, str]
"""What all processes must have in common, by name: fields of the config, the version."""

_MESSAGE_LIMIT = 1 << 20
_REPLY_GRACE = 10.0  # seconds; a peer waits this much longer than process 0, to hear from it who is missing
_LONGEST_SILENCE = 5.0  # seconds in which whoever connects must have said who it is
_SENTENCE_LIMIT = 4096  # bytes
_MOST_SHOWN = 5  # facts a process
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`count` processes, of which this is number `index`; number 0 listens at `coordinator`, "host:port"."""

    coordinator: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65535:
            raise ConfigError(f"coordinator_address={self.coordinator!r}: expected host:port, such as 10.0.0.2:12345.")
        if self.count < 1:
            raise ConfigError(f"num_processes={self.count}: expected 1 or more.")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"process_id={self.index}: expected 0 to {self.count - 1}, a different one each.")


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
        facts: what every process must have in common with process 0.

    Raises:
        ConfigError: flags or variables that describe no cluster.
        ProcessError: a process is missing, or has other facts; the message names it.
    """
    if options.join_timeout <= 0:
        raise ConfigError(f"join_timeout={options.join_timeout}: expected a positive number of seconds.")
    given = (options.coordinator_address, options.num_processes, options.process_id)
    if any(value not in ("", None) for value in given):
        if any(value in ("", None) for value in given):
            raise ConfigError("--coordinator_address, --num_processes and --process_id: give all three, or none.")
        cluster: Cluster | None = Cluster(*given)
    else:
        cluster = find_cluster(os.environ)
    # JAX's service would take SIGTERM for itself and leave it at that: a command that is asked to end has to.
    jax.config.update("jax_enable_preemption_service", False)
    if cluster is None and on_cloud_tpu():
        try:
            jax.distributed.initialize(initialization_timeout=int(options.join_timeout) + 1)
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise
            return  # chips, but no pod of them that JAX finds
        compare_facts(facts)
        return
    if cluster is None or cluster.count == 1:
        return
    start_watch(cluster.index, cluster.count, roll_call(cluster, facts, options.join_timeout))
    jax.distributed.initialize(
        cluster.coordinator, cluster.count, cluster.index, initialization_timeout=int(options.join_timeout) + 1
    )


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that environment variables describe, or None.

    Raises:
        ConfigError: variables that contradict each other or cannot be read.
    """
    for names, make in (
        (("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"), _from_jax_variables),
        (("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"), _from_slurm),
        (("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), _from_tpu_variables),
    ):
        if all(environment.get(name) for name in names):
            values = [environment[name] for name in names]
            try:
                return make(*values)
            except ValueError as error:
                if isinstance(error, MPDiTError):
                    raise
                listed = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise ConfigError(f"{listed}: these describe no cluster ({error}).") from error
    return None


def on_cloud_tpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has TPU chips and the library that drives them."""
    chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def compare_facts(facts: Facts) -> None:
    """Raise ProcessError, on every process, unless all have process 0's facts; all must ask at the same point.

    For processes that JAX has connected: those of a TPU pod, which hold no roll call, and facts that are known late.
    """
    text = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(text)))).ravel()
    filled = np.pad(text, (0, int(lengths.max()) - len(text)))
    texts = np.asarray(multihost_utils.process_allgather(filled)).reshape(len(lengths), -1)
    told = [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]
    differing = [_tell_apart(index, theirs, told[0]) for index, theirs in enumerate(told) if theirs != told[0]]
    if differing:
        raise ProcessError(f"{'; '.join(differing)}: start the same command on all machines.")


def _tell_apart(index: int, theirs: Facts, facts: Facts) -> str:
    """What a process has that process 0 has otherwise, or nothing."""
    changed = [name for name in sorted({*facts, *theirs}) if facts.get(name) != theirs.get(name)]
    shown = ", ".join(f"{name}={theirs.get(name)} instead of {facts.get(name)}" for name in changed[:_MOST_SHOWN])
    return f"process {index} was started with {shown}, unlike process 0" if changed else ""


def _from_jax_variables(coordinator: str, count: str, index: str) -> Cluster:
    return Cluster(coordinator, int(count), int(index))


def _from_slurm(job: str, count: str, index: str, nodes: str) -> Cluster:
    # A port that jobs on one node do not share: process 0's roll call takes the odd one after it.
    return Cluster(f"{first_host(nodes)}:{49152 + 2 * (int(job) % 8000)}", int(count), int(index))


def _from_tpu_variables(hosts: str, index: str) -> Cluster:
    names = hosts.split(",")
    return Cluster(f"{names[0]}:8476", len(names), int(index))


def first_host(nodes: str) -> str:
    """First name of a SLURM list: "gpu[03-07,11],login" starts with gpu03."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of hosts.")
    return "".join(part or "" for part in match.groups())


def roll_call(cluster: Cluster, facts: Facts, timeout: float) -> dict[int, socket.socket]:
    """Return when every process of the cluster is there with the same facts.

    Returns:
        Open connections: to every other process on process 0, to process 0 on the others.

    Raises:
        ProcessError: one is missing after `timeout` seconds, or differs; every process that is there raises it.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.index == 0:
        problem, connections = _hear_all(int(port) + 1, cluster, facts, timeout)
    else:
        problem, connections = _answer(host, int(port) + 1, cluster, facts, timeout)
    if problem:
        for connection in connections.values():
            connection.close()
        raise ProcessError(problem)
    return connections


def _hear_all(port: int, cluster: Cluster, facts: Facts, timeout: float) -> tuple[str, dict[int, socket.socket]]:
    deadline, differing = time.monotonic() + timeout, list[str]()
    present, connections, strangers = {0}, dict[int, socket.socket](), list[socket.socket]()
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        return (
            f"process 0 cannot listen on port {port} ({error.strerror}): is another run using it? Choose another port "
            "for --coordinator_address; the one after it is needed as well."
        ), {}
    with server:
        while len(present) < cluster.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
                peer.settimeout(min(max(left, 0.1), _LONGEST_SILENCE))  # others wait behind a stranger who says nothing
                message = json.loads(_read_line(peer))
                index, theirs = int(message["index"]), dict(message["facts"])
            except TimeoutError:
                continue
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            if not 0 < index < cluster.count or index in present or message["count"] != cluster.count:
                differing.append(f"a second process, or one too many, calls itself number {index}")
                strangers.append(peer)
                continue
            if sentence := _tell_apart(index, theirs, facts):
                differing.append(sentence)
            present.add(index)
            connections[index] = peer
        missing = [str(index) for index in range(1, cluster.count) if index not in present]
        if missing and not differing:
            verb = "process" if len(missing) == 1 else "processes"
            problem = (
                f"{verb} {', '.join(missing)} of {cluster.count} did not join within {timeout:g} s: see its log, and "
                f"whether its host reaches {cluster.coordinator} (and the port after it)."
            )
        else:
            problem = "; ".join(differing)
        for peer in (*connections.values(), *strangers):
            try:
                peer.sendall(json.dumps({"problem": problem}).encode() + b"\n")
            except OSError:
                continue  # it will say itself that it lost process 0
        for peer in strangers:
            peer.close()
    return problem, connections


def _answer(
    host: str, port: int, cluster: Cluster, facts: Facts, timeout: float
) -> tuple[str, dict[int, socket.socket]]:
    deadline = time.monotonic() + timeout
    message = json.dumps({"index": cluster.index, "count": cluster.count, "facts": dict(facts)}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except OSError:
            time.sleep(0.2)  # it may not be listening yet
            continue
        try:
            connection.settimeout(left + _REPLY_GRACE)
            connection.sendall(message)
            return str(json.loads(_read_line(connection))["problem"]), {0: connection}
        except (OSError, ValueError, KeyError):
            connection.close()
            time.sleep(0.2)
    return (
        f"process 0 at {cluster.coordinator} did not answer process {cluster.index} within {timeout:g} s: see its log, "
        "and whether this host reaches it (and the port after it)."
    ), {}


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(data) > _MESSAGE_LIMIT:
            raise ConnectionError("the connection ended before the message did")
        data += part
    return data


def first_does(action: Callable[[], T]) -> T | None:
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


def told_by_first(value: int) -> int:
    """Process 0's whole number below 2**31, on every process; all must ask at the same point."""
    if jax.process_count() == 1:
        return value
    wait_for_all("the first tells")
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_sentence(sentence: str, place: str) -> str:
    """The sentence of the first process that has one, on all of them; "" if none has. Every process must ask.

    Args:
        sentence: what this process has to say, or "".
        place: what to call the moment, see `wait_for_all`.
    """
    if jax.process_count() == 1:
        return sentence
    wait_for_all(place)
    text = np.zeros(_SENTENCE_LIMIT, np.uint8)
    encoded = np.frombuffer(sentence.encode()[:_SENTENCE_LIMIT], np.uint8)
    text[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(text)).reshape(-1, _SENTENCE_LIMIT)
    heard = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return next((one for one in heard if one), "")


def any_process(flag: bool) -> bool:
    """Whether `flag` holds on any process; every process must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    wait_for_all("all answer")
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
