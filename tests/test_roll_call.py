"""Who is missing, who is a stranger, who was started otherwise: in sentences."""

import contextlib
import json
import socket
import threading
import time

import pytest

from mpdit_jax.clusters import Cluster
from mpdit_jax.errors import ProcessError
from mpdit_jax.roll_call import roll_call
from tests.tiny import free_port


def connected(port):
    """A connection to whoever is about to listen there."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.05)
    raise TimeoutError(port)


def test_nobody_answers():
    with pytest.raises(ProcessError, match=r"process 0 at 127\.0\.0\.1:9 did not answer process 1 within 0\.5 s"):
        roll_call(Cluster("127.0.0.1:9", 2, 1), {}, 0.5)


def test_a_stranger_who_says_nothing_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr("mpdit_jax.roll_call._LONGEST_SILENCE", 0.5)
    port, found = free_port(), {}

    def call(index):
        found[index] = roll_call(Cluster(f"127.0.0.1:{port}", 2, index), {}, 20.0)

    first = threading.Thread(target=call, args=(0,))
    first.start()
    stranger = connected(port + 1)
    second = threading.Thread(target=call, args=(1,))
    second.start()
    for thread in (first, second):
        thread.join(15)
    stranger.close()
    assert {index: list(connections) for index, connections in found.items()} == {0: [1], 1: [0]}
    for connections in found.values():
        for connection in connections.values():
            connection.close()


def test_who_has_heard_nothing_yet_says_so(monkeypatch):
    """Process 0 came late, and still waits for a third one."""
    monkeypatch.setattr("mpdit_jax.roll_call._REPLY_GRACE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ProcessError, match=r"was still waiting for others when process 1 had waited 0\.5 s for it"):
            roll_call(Cluster(f"127.0.0.1:{port - 1}", 3, 1), {}, 0.5)


@pytest.mark.parametrize(("said", "sentence"), [
    ({"index": 1, "count": 3, "facts": {}}, "process 1 was started as one of 3 and process 0 as one of 2"),
    ({"index": 0, "count": 2, "facts": {}}, "a second process calls itself number 0; process 1 of 2 did not join"),
    ({"index": 1, "facts": {}}, "process 1 of 2 did not join within 2 s"),
    ({"index": 1, "count": "x", "facts": {}}, "process 1 of 2 did not join within 2 s"),
    (["no", "dictionary"], "process 1 of 2 did not join within 2 s"),
])  # fmt: skip
def test_whoever_is_not_expected_is_named(said, sentence):
    port, found = free_port(), []

    def call():
        try:
            roll_call(Cluster(f"127.0.0.1:{port}", 2, 0), {}, 2.0)
        except ProcessError as error:
            found.append(str(error))

    first = threading.Thread(target=call)
    first.start()
    with connected(port + 1) as other:
        other.sendall(json.dumps(said).encode() + b"\n")
        first.join(15)
    [problem] = found
    assert sentence in problem
