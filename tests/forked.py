"""Processes of our commands that are forked, so that they do not import JAX anew: a third of a tiny run's time.

A server process imports the libraries once and forks at each request. The child does what `python -m mpdit_jax.COMMAND`
does from there on, as a process of its own with its own environment. Nothing of JAX runs before the fork.
"""

import array
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from mpdit_jax.runtime.hugepages import TUNABLE

MODULES = (
    "mpdit_jax.train.loop", "mpdit_jax.train.replay", "mpdit_jax.sample.command", "mpdit_jax.prepare.store",
    "mpdit_jax.evaluate.command", "mpdit_jax.evaluate.runs", "mpdit_jax.train.vae",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
# Of the server, as it is before any test changes a variable.
ENVIRONMENT = os.environ | {
    "GLIBC_TUNABLES": TUNABLE,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
_LARGEST = 1 << 17  # bytes of a request


class Forked:
    """A forked command with the part of `subprocess.Popen`'s interface that tests use; its output is text."""

    def __init__(self, command, arguments, environment):
        self.args, self.returncode = [command, *arguments], None
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        request = {"command": command, "arguments": list(map(str, arguments)), "environment": environment}
        self.pid = _ask(request | {"cwd": os.getcwd()}, [out_end, err_end])
        self._pidfd = os.pidfd_open(self.pid)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def poll(self):
        """Return the exit status, or None while the process runs."""
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        """Wait for the end and return the exit status."""
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = _ask({"wait": self.pid})
            os.close(self._pidfd)
        return self.returncode

    def communicate(self, timeout=None):
        """Read the output to its end: (stdout, stderr)."""
        read = {}
        readers = [
            threading.Thread(target=lambda name=name: read.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        self.stdout.close()
        self.stderr.close()
        return read["stdout"], read["stderr"]

    def send_signal(self, number):
        """Send a signal to the process if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Kill the process if it still runs."""
        self.send_signal(signal.SIGKILL)


def can_fork(environment):
    """Return whether a forked process is what a new one would be: libraries read their variables when imported."""
    return _has_pidfd() and _read_early(environment) == _read_early(ENVIRONMENT)


@cache
def _has_pidfd():
    """Return whether this system is a Linux that lets a process wait for one that is not its child."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _read_early(environment):
    late = ("XLA_FLAGS", "PYTEST_CURRENT_TEST", "MPDIT_JAX_", "GLIBC_TUNABLES")
    return {name: value for name, value in environment.items() if not name.startswith(late)}


@cache
def _server():
    """Start the server, which ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    theirs.close()
    return ours


def _ask(request, files=()):
    """Send a request and open files to the server, and return its answer."""
    server = _server()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    server.sendmsg([json.dumps(request).encode()], rights)
    return json.loads(server.recv(_LARGEST))


def _serve(client):
    """Answer requests until the other side closes; a child returns from here to live its life."""
    children = set()
    while message := socket.recv_fds(client, _LARGEST, 2):
        data, files, _, _ = message
        if not data:
            break
        request = json.loads(data)
        if "wait" in request:
            children.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                client.close()
                return lambda: _live(request, files)
            children.add(answer)
            for file in files:
                os.close(file)
        client.send(json.dumps(answer).encode())
    for child in children:
        os.kill(child, signal.SIGKILL)
    return None


def _live(request, files):
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    # The server's own streams were perhaps a file's, in which one can seek, unlike in a pipe.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = sys.orig_argv = [sys.executable, *request["arguments"]]
    runpy.run_module(f"mpdit_jax.{request['command']}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # garbage collection of what is imported would copy its pages in every child
    live = _serve(socket.socket(fileno=int(sys.argv[1])))
    if live:
        live()
