"""A server that starts real processes of our commands so cheaply that a test can kill many of them.

A tiny run spends half of its time importing libraries. The server imports them once and forks; each child then does
what `python -m mpdit_jax.COMMAND` does after its imports. JAX starts no threads or devices before the fork.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny import ROOT, command_main, environment

MODULES = ("train", "train_vae", "sample", "prepare", "evaluate")  # commands that tests kill
IMPORTED = (
    "mpdit_jax.train.loop", "mpdit_jax.train.replay", "mpdit_jax.sample.command", "mpdit_jax.prepare.store",
    "mpdit_jax.sample.decoding", "mpdit_jax.sample.options", "mpdit_jax.data.image_sets",
    "mpdit_jax.evaluate.command", "mpdit_jax.evaluate.runs", "mpdit_jax.train.vae", "sklearn.datasets",
)  # fmt: skip


@dataclasses.dataclass
class Child:
    """A running command."""

    pid: int
    output: Path
    fork_server: "ForkServer"

    def text(self):
        return self.output.read_text()

    def kill(self):
        """Send SIGKILL and return the exit status, which is 0 if the command had ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self):
        return self.fork_server.ask({"wait": self.pid})

    def is_done(self):
        return self.fork_server.ask({"poll": self.pid})


class ForkServer:
    """A context manager; it kills its children when it ends."""

    def __init__(self, folder):
        self._folder, self._count = folder, 0

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        )  # fmt: skip
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def start(self, command, arguments, largest_file=None):
        """Start `python -m mpdit_jax.COMMAND`; `largest_file` limits the bytes of each file that it writes."""
        self._count += 1
        output = self._folder / f"output_{self._count}.txt"
        output.touch()
        arguments = list(map(str, arguments))
        pid = self.ask(
            {"command": command, "arguments": arguments, "output": str(output), "largest_file": largest_file}
        )
        return Child(pid, output, self)

    def run(self, command, arguments):
        """Run a command to its end, which must be a success; return what it printed."""
        child = self.start(command, arguments)
        status = child.wait()
        assert status == 0, child.text()
        return child.text()

    def ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def wait_until(condition, child, timeout=120.0):
    """Wait until `condition()` holds or the child has ended; return whether the condition holds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if child.is_done():
            return condition()
        time.sleep(0.002)
    raise TimeoutError(child.text())


def serve():
    """Answer one request a line."""
    for name in (*(f"mpdit_jax.{module}" for module in MODULES), *IMPORTED):
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would touch the imported objects, and so copy their pages
    children = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "command" in request:
            answer = os.fork() or live(request)
            children[answer] = None
        else:
            (asked, pid), *_ = request.items()
            if children[pid] is None:
                done, status = os.waitpid(pid, 0 if asked == "wait" else os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = children[pid] if asked == "wait" else children[pid] is not None
        print(json.dumps(answer), flush=True)
    for pid, status in children.items():
        if status is None:
            os.kill(pid, signal.SIGKILL)


def live(request):
    """Run a command in the forked child, and end the process."""
    from mpdit_jax.runtime import cli

    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], request["largest_file"]))
    sys.argv = [f"mpdit_jax.{request['command']}", *request["arguments"]]
    cli.run(command_main(request["command"]))


if __name__ == "__main__":
    serve()
