"""The roll call that processes hold before JAX connects them, on the port after the coordinator's.

JAX itself ends a process that waits in vain with a stack trace; the roll call ends it with a sentence that names who is
missing, or who was started with another config or version. Its connections stay open: see `peers`. So does
the port, as long as process 0 lives: JAX would let another run listen on the coordinator's, and both would end.
"""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import socket
import time
from collections.abc import Mapping
from typing import TypeAlias

from mpdit_jax.distributed.clusters import Cluster
from mpdit_jax.errors import ProcessError
from mpdit_jax.io.json_files import parse_json

Facts: TypeAlias = Mapping[str, str]
"""What all processes must have in common, by name: fields of the config, the version."""

_MESSAGE_LIMIT = 1 << 20
_REPLY_GRACE = 10.0  # seconds; a peer waits this much longer than process 0, to hear from it who is missing
_LONGEST_SILENCE = 5.0  # seconds in which whoever connects must have said who it is
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OTHER_FILES = 1024  # that a training may have open beside its connections
_MOST_SHOWN = 5  # facts a process
_UNDER_WAY = b'{"under_way": true}\n'
REMEDY = "start the same command of the same installation, with the same files, on all machines"


@dataclasses.dataclass(frozen=True)
class Joined:
    """What remains open after a roll call.

    Attributes:
        connections: to every other process on process 0, to process 0 on the others.
        listener: the port, on process 0; see `turn_away`.
    """

    connections: dict[int, socket.socket]
    listener: socket.socket | None = None

    def close(self) -> None:
        """Close all of it."""
        for connection in self.connections.values():
            connection.close()
        if self.listener is not None:
            self.listener.close()


def roll_call(cluster: Cluster, facts: Facts, timeout: float) -> Joined:
    """Return when every process of the cluster is there with the same facts.

    Raises:
        ProcessError: one is missing after `timeout` seconds, or differs; every process that is there raises it.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.index:
        problem, joined = _answer(host.strip("[]"), int(port) + 1, cluster, facts, timeout)
    else:
        _listen(int(port)).close()  # JAX's own, which may be somebody else's
        listener = _listen(int(port) + 1)
        try:
            problem, connections = _hear_all(listener, cluster, facts, timeout)
        except BaseException:
            listener.close()
            raise
        joined = Joined(connections, listener)
    if problem:
        joined.close()
        raise ProcessError(problem)
    return joined


def turn_away(listener: socket.socket) -> None:
    """Answer one who comes when the roll call is over, in a second: it may try again, or belongs to another run."""
    try:
        late, _ = listener.accept()
    except OSError as error:
        if error.errno in _FULL:
            time.sleep(0.1)  # it stays where it is, and would be tried without a pause
        return
    end, part = time.monotonic() + 1.0, b""
    with late, contextlib.suppress(OSError):
        while not part.endswith(b"\n"):  # a connection closed before it is read takes the answer with it
            late.settimeout(max(end - time.monotonic(), 1e-3))
            part = late.recv(65536)
            if not part or time.monotonic() > end:
                return
        late.sendall(_UNDER_WAY)


def _listen(port: int) -> socket.socket:
    """A server on every address, as JAX's is."""
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # where IPv6 is known and switched off
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        guess = ", perhaps by another run" if error.errno == errno.EADDRINUSE else ""
        raise ProcessError(
            f"process 0 cannot listen on port {port} ({reason}{guess}): choose another port for the coordinator's "
            "address; the one after it is needed as well."
        ) from error


def _hear_all(
    server: socket.socket, cluster: Cluster, facts: Facts, timeout: float
) -> tuple[str, dict[int, socket.socket]]:
    deadline, differing = time.monotonic() + timeout, list[str]()
    present, connections, strangers = {0}, dict[int, socket.socket](), list[socket.socket]()
    named = set[int]()  # that came and cannot be counted
    _allow_files(cluster.count)
    while (left := deadline - time.monotonic()) > 0:
        if present | named >= {*range(cluster.count)}:
            _lose_ended(present, connections)  # such a one may be started again
            if present | named >= {*range(cluster.count)}:
                break
        server.settimeout(left)
        try:
            peer, _ = server.accept()
        except OSError as error:
            if error.errno in _FULL:
                differing.append(
                    f"process 0 cannot hold another connection beside {len(connections)} ({error.strerror}): raise "
                    "`ulimit -n` where it runs"
                )
                named.update(range(cluster.count))  # whoever is not there is not at fault
            continue
        try:
            peer.settimeout(min(max(left, 0.1), _LONGEST_SILENCE))  # others wait behind a stranger who says nothing
            message = parse_json(_read_line(peer))
            index, count = int(message["index"]), int(message["count"])
            theirs = {str(name): str(value) for name, value in dict(message["facts"]).items()}
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError):
            peer.close()  # not one of ours, or one that will try again
            continue
        if index in present:
            _lose_ended(present, connections)
        if count != cluster.count or not 0 < index < cluster.count or index in present:
            differing.append(
                f"process {index} was started as one of {count} and process 0 as one of {cluster.count}"
                if count != cluster.count
                else f"a second process calls itself number {index}"
            )
            strangers.append(peer)
            named.add(index)
            continue
        if sentence := tell_apart(index, theirs, facts):
            differing.append(f"{sentence}: {REMEDY}")
        present.add(index)
        connections[index] = peer
    missing = [str(index) for index in range(1, cluster.count) if index not in present | named]
    if missing:
        verb = "process" if len(missing) == 1 else "processes"
        differing.append(
            f"{verb} {', '.join(missing)} of {cluster.count} did not join within {timeout:g} s: see its log, and "
            f"whether its host reaches {cluster.coordinator} (and the port after it)."
        )
    problem = "; ".join(differing)
    for peer in (*connections.values(), *strangers):
        try:
            peer.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        except OSError:
            continue  # it will say itself that it lost process 0
    for peer in strangers:
        peer.close()
    return problem, connections


def _allow_files(count: int) -> None:
    """Raise this process's limit of open files, as far as that is allowed, for so many connections beside others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft < wanted and soft != resource.RLIM_INFINITY:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _lose_ended(present: set[int], connections: dict[int, socket.socket]) -> None:
    """Forget whose connection has ended meanwhile."""
    for index in [index for index, connection in connections.items() if _has_ended(connection)]:
        connections.pop(index).close()
        present.discard(index)


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it, or its process has ended."""
    patience = connection.gettimeout()
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(patience)


def _answer(host: str, port: int, cluster: Cluster, facts: Facts, timeout: float) -> tuple[str, Joined]:
    deadline, under_way = time.monotonic() + timeout, False
    message = json.dumps({"index": cluster.index, "count": cluster.count, "facts": dict(facts)}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except OSError as error:
            under_way = under_way and not isinstance(error, ConnectionRefusedError)
            time.sleep(0.2)  # it may not be listening yet
            continue
        try:
            connection.settimeout(left + _REPLY_GRACE)
            connection.sendall(message)
            reply = parse_json(_read_line(connection))
            under_way = "under_way" in reply
            return str(reply["problem"]), Joined({0: connection})
        except TimeoutError:
            connection.close()
            return (
                f"process 0 at {cluster.coordinator} was still waiting for others when process {cluster.index} had "
                f"waited {timeout:g} s for it: its log names them; start all within --join_timeout of each other."
            ), Joined({})
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            time.sleep(0.2)
    if under_way:
        return (
            f"process 0 at {cluster.coordinator} has all its processes, and had after {timeout:g} s: process "
            f"{cluster.index} was started twice, or is of another run. End the one that is running, or choose another "
            "port for the coordinator's address."
        ), Joined({})
    return (
        f"process 0 at {cluster.coordinator} did not answer process {cluster.index} within {timeout:g} s: see its log, "
        "and whether this host reaches it (and the port after it)."
    ), Joined({})


def _read_line(connection: socket.socket) -> bytes:
    """All of it and not a byte more: what comes after it is for the watch."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536, socket.MSG_PEEK)
        if not part or len(data) > _MESSAGE_LIMIT:
            raise ConnectionError("the connection ended before the message did")
        data += connection.recv(part.find(b"\n") + 1 or len(part))
    return data


def tell_apart(index: int, theirs: Facts, facts: Facts) -> str:
    """What a process has that process 0 has otherwise, or nothing."""
    changed = [name for name in sorted({*facts, *theirs}) if facts.get(name) != theirs.get(name)]
    shown = ", ".join(f"{name}={theirs.get(name)} instead of {facts.get(name)}" for name in changed[:_MOST_SHOWN])
    if len(changed) > _MOST_SHOWN:
        shown += f" and {len(changed) - _MOST_SHOWN} more"
    return f"process {index} was started with {shown}, unlike process 0" if changed else ""
