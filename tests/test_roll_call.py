"""Who is missing, who is a stranger, who was started otherwise: in sentences."""

import contextlib
import errno
import json
import math
import socket
import subprocess
import sys
import threading
import time

import pytest

from mpdit_jax.distributed.clusters import Cluster
from mpdit_jax.distributed.roll_call import _listen, _read_line, roll_call, tell_apart, turn_away
from mpdit_jax.errors import ProcessError
from tests.tiny import ROOT, free_port


def connected(port):
    """A connection to whoever is about to listen there."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.05)
    raise TimeoutError(port)


def calls(coordinator, count):
    """Threads that each answer the roll call as one process, not started, and what each has from it."""
    found = {}

    def call(index):
        found[index] = roll_call(Cluster(coordinator, count, index), {}, 20.0)

    return [threading.Thread(target=call, args=(index,)) for index in range(count)], found


def connections_of(threads, found):
    """Whom each process is connected with when all have been called; the connections are closed."""
    for thread in threads:
        thread.join(15)
    for joined in found.values():
        joined.close()
    return {index: sorted(joined.connections) for index, joined in found.items()}


def test_nobody_answers():
    with pytest.raises(ProcessError, match=r"process 0 at 127\.0\.0\.1:9 did not answer process 1 within 0\.5 s"):
        roll_call(Cluster("127.0.0.1:9", 2, 1), {}, 0.5)


def test_a_stranger_who_says_nothing_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr("mpdit_jax.distributed.roll_call._LONGEST_SILENCE", 0.5)
    port = free_port()
    (first, second), found = calls(f"127.0.0.1:{port}", 2)
    first.start()
    with connected(port + 1):
        second.start()
        assert connections_of((first, second), found) == {0: [1], 1: [0]}


def test_who_has_heard_nothing_yet_says_so(monkeypatch):
    """Process 0 came late, and still waits for a third one."""
    monkeypatch.setattr("mpdit_jax.distributed.roll_call._REPLY_GRACE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ProcessError, match=r"was still waiting for others when process 1 had waited 0\.5 s for it"):
            roll_call(Cluster(f"127.0.0.1:{port - 1}", 3, 1), {}, 0.5)


@pytest.mark.parametrize(("said", "sentence"), [
    ({"index": 1, "count": 3, "facts": {}}, "process 1 was started as one of 3 and process 0 as one of 2"),
    ({"index": 1, "count": 2, "facts": {"code": "other"}}, "code=other instead of None"),
    ({"index": 0, "count": 2, "facts": {}}, "a second process calls itself number 0; process 1 of 2 did not join"),
    ({"index": 1, "facts": {}}, "process 1 of 2 did not join within 2 s"),
    ({"index": 1, "count": "x", "facts": {}}, "process 1 of 2 did not join within 2 s"),
    (["no", "dictionary"], "process 1 of 2 did not join within 2 s"),
    ({"index": math.inf, "count": 2, "facts": {}}, "process 1 of 2 did not join within 2 s"),
    ({"index": 1, "count": 2, "facts": [[1, "a"]]}, "process 1 was started with 1=a instead of None"),
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


def test_a_long_difference_is_cut_and_says_so():
    sentence = tell_apart(1, {f"config.f{number}": "1" for number in range(8)}, {})
    assert sentence.endswith("config.f4=1 instead of None and 3 more, unlike process 0")


@pytest.mark.parametrize("behind", [0, 1])
def test_a_port_that_somebody_has_is_not_taken_from_them(behind):
    """JAX's own port, and the one after it; of the first, JAX would not notice."""
    port = free_port()
    sentence = f"process 0 cannot listen on port {port + behind} .*by another run"
    with socket.create_server(("", port + behind)), pytest.raises(ProcessError, match=sentence):
        roll_call(Cluster(f"127.0.0.1:{port}", 2, 0), {}, 5.0)


def test_the_answer_ends_where_the_watch_begins():
    """Process 0 may say more before its answer is read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b'{"problem": ""}\na')
        assert _read_line(ours) == b'{"problem": ""}\n'
        assert ours.recv(5) == b"a"


def test_who_comes_to_a_run_that_is_under_way():
    """A process of another run, by mistake, or one that was started again: it tries until its time is over."""
    port = free_port()
    sentence = "has all its processes, and had after 1 s: process 1 was started twice, or is of another run"
    with _listen(port + 1) as listener:
        listener.settimeout(0.1)
        threading.Thread(target=lambda: [turn_away(listener) for _ in range(100)], daemon=True).start()
        with pytest.raises(ProcessError, match=sentence):
            roll_call(Cluster(f"127.0.0.1:{port}", 2, 1), {}, 1.0)


_UNDER_WAY = """
import sys, time
from mpdit_jax.distributed.peers import start_watch
from mpdit_jax.distributed.roll_call import Joined, _listen
start_watch(0, 1, Joined({}, _listen(int(sys.argv[1]))))
print("ready", flush=True)
time.sleep(60)
"""


def test_the_watch_answers_who_comes_late():
    """Also behind one who says nothing."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", _UNDER_WAY, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        with connected(port) as silent, connected(port) as late:
            late.settimeout(20)
            late.sendall(b"{}")
            time.sleep(0.2)
            late.sendall(b"\n")
            assert late.recv(100) == b'{"under_way": true}\n'
            silent.settimeout(20)
            assert silent.recv(100) == b""
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_coordinator_by_its_ipv6_address():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    threads, found = calls(f"[::1]:{free_port()}", 2)
    for thread in threads:
        thread.start()
    assert connections_of(threads, found) == {0: [1], 1: [0]}


def test_who_was_started_again_takes_its_own_place():
    """While others are still missing: its first connection has ended with the process."""
    port = free_port()
    threads, found = calls(f"127.0.0.1:{port}", 3)
    threads[0].start()
    with connected(port + 1) as killed:
        killed.sendall(json.dumps({"index": 1, "count": 3, "facts": {}}).encode() + b"\n")
        time.sleep(0.5)
    for thread in threads[1:]:
        thread.start()
    assert connections_of(threads, found) == {0: [1, 2], 1: [0], 2: [0]}


_MANY = """
import os, resource, signal, socket, sys, time
from mpdit_jax.runtime.signals import PreemptionHandler
from mpdit_jax.distributed.peers import start_watch
from mpdit_jax.distributed.roll_call import Joined, _allow_files

resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
_allow_files(1000)
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
ours, theirs = socket.socketpair()
assert ours.fileno() > 1024
with PreemptionHandler(saved=lambda: "nothing") as stop:
    stop.nothing_to_save = False
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print(stop.name, flush=True)
    start_watch(0, 2, Joined({1: ours}))
    theirs.close()
    time.sleep(20)
"""


def test_a_thousand_processes_can_be_watched():
    """Their connections are more files than `select` knows, and than a process may have open unless it asks."""
    done = subprocess.run([sys.executable, "-c", _MANY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "SIGTERM\n")
    assert "error: process 1 of 2 was lost (its connection ended)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_may_have_too_few_files_open(monkeypatch):
    class Full:
        def close(self):
            pass

        def settimeout(self, seconds):
            pass

        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("mpdit_jax.distributed.roll_call._listen", lambda port: Full())
    with pytest.raises(ProcessError, match=r"another connection beside 0 \(Too many open files\): raise `ulimit -n`"):
        roll_call(Cluster("127.0.0.1:9", 2, 0), {}, 5.0)
