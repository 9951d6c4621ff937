"""Several processes that notice when one of them is gone.

JAX lets a process that has lost a peer wait for it, or ends it with a stack trace after minutes. Here every process
keeps the connection of the roll call to process 0 open. The system closes it when a process ends, in whatever way; a
machine that is gone sends no more signs of life. Whoever remains says who is lost, and ends.
"""

import os
import selectors
import socket
import sys
import threading
import time
from types import TracebackType

from mpdit_jax.distributed.roll_call import Joined, turn_away
from mpdit_jax.runtime.signals import say_last

_ALIVE, _DONE, _FAILED, _LOST = b"aqel"  # what one byte says; the number of the lost process follows the last one
_EVERY = 5.0  # seconds between signs of life
_SILENCE = 60.0  # seconds without one after which a process counts as lost
_OWN_END = 20.0  # seconds that a process has to end by itself after another one ended with an error
_VERDICT = 10.0  # seconds that an error waits for the news that a lost process explains it
_MARGIN = 5.0  # seconds by which a process that serves the others outlives them, and one that is served ends before


class PeerWatch(threading.Thread):
    """A thread that watches the other processes, and ends this one when one of them is lost.

    On process 0 it also turns away who comes after the roll call.
    """

    def __init__(self, index: int, count: int, joined: Joined) -> None:
        """Not started yet.

        Args:
            index: of this process.
            count: of all.
            joined: what the roll call has left open.
        """
        super().__init__(name="peers", daemon=True)
        self._index, self._count = index, count
        self._peers, self._listener = dict(joined.connections), joined.listener
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._farewell: dict[int, float | None] = {}  # who ends by itself, and when it said so if with an error
        self._ending = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()  # `select` knows no more than 1,024 files
        for number, connection in self._peers.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, number)
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def leave(self, *, failed: bool) -> bool:
        """Say that this process ends by itself, so that it is not taken for lost.

        Returns:
            Whether all others end by themselves too, as far as they have said so in the time that they have; True at
            once unless `failed`, for JAX lets a process that is done wait for the others.
        """
        with self._lock:
            self._ending = True
            self._tell(bytes([_FAILED if failed else _DONE]))
        if not failed:
            return True
        others = set(self._heard)
        end = time.monotonic() + _OWN_END + (_MARGIN if self._index == 0 else -_MARGIN)
        while not others <= self._farewell.keys() and self._peers and time.monotonic() < end:
            time.sleep(0.05)
        return others <= self._farewell.keys()

    def wait_for_verdict(self) -> None:
        """Give the thread time to find out that a lost process explains an error; it then ends this process."""
        time.sleep(_VERDICT)

    def run(self) -> None:
        """Watch until the process ends."""
        beat = time.monotonic()
        while True:
            for key, _ in self._selector.select(1.0):
                if self._listener is not None and key.fileobj is self._listener:
                    turn_away(self._listener)
                else:
                    self._hear(key.data, self._peers[key.data])
            now = time.monotonic()
            if now - beat >= _EVERY:
                beat = now
                with self._lock:
                    self._tell(bytes([_ALIVE]))
            for number in list(self._peers):
                if number not in self._farewell and now - self._heard[number] > _SILENCE:
                    self._lost(number, f"no sign of life for {_SILENCE:g} s")
            for number, when in self._farewell.items():
                if when is not None and now - when > _OWN_END:
                    self._lost(number, "it ended with an error")

    def _hear(self, number: int, connection: socket.socket) -> None:
        try:
            received = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._gone(number)
            return
        self._heard[number] = time.monotonic()
        news = iter(received)
        for what in news:
            if what == _LOST:
                self._lost(next(news, 0) | next(news, 0) << 8, "as process 0 says")
            elif what == _FAILED:
                self._farewell[number] = time.monotonic()
            elif what == _DONE:
                self._farewell[number] = None

    def _gone(self, number: int) -> None:
        """The connection has ended: without a word, or after one."""
        connection = self._peers.pop(number)
        self._selector.unregister(connection)
        connection.close()
        if number not in self._farewell:
            self._lost(number, "its connection ended")

    def _lost(self, number: int, how: str) -> None:
        if self._ending:
            return
        say_last(
            f"error: process {number} of {self._count} was lost ({how}): see its log. This process, {self._index}, "
            "ends as well; the same command on all machines continues from the newest checkpoint."
        )
        with self._lock:
            self._tell(bytes([_LOST, number & 255, number >> 8]))
        os._exit(1)

    def _tell(self, message: bytes) -> None:
        for connection in list(self._peers.values()):  # `leave` tells while the watch may forget
            try:
                connection.send(message)
            except OSError:
                continue  # it is found out when it is read from


def start_watch(index: int, count: int, joined: Joined) -> None:
    """Watch the other processes until `leave`. An error that nobody catches waits for what the watch finds out."""
    watch = PeerWatch(index, count, joined)
    watch.start()
    print_traceback = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        watch.wait_for_verdict()
        print_traceback(kind, error, trace)

    sys.excepthook = hook


def await_verdict() -> None:
    """Give the watch, if there is one, time to find out that a lost process explains an error, and to end this one."""
    for watch in _watches():
        watch.wait_for_verdict()


def leave(*, failed: bool) -> bool:
    """Tell the others, if there are any, that this process ends by itself; see `PeerWatch.leave`."""
    return all(watch.leave(failed=failed) for watch in _watches())


def has_peers() -> bool:
    """Whether this process watches others."""
    return bool(_watches())


def _watches() -> list[PeerWatch]:
    """The one of this process, or none."""
    return [thread for thread in threading.enumerate() if isinstance(thread, PeerWatch)]
