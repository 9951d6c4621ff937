"""Ending a run politely when asked to. Imports nothing heavy: it is the first thing a command loads."""

import gc
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KILLED_BY = 128  # plus the signal's number: the status that shells show


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing has to be finished first."""


def this_command() -> str:
    """The command line of this process, for a shell."""
    return shlex.join([sys.executable, *sys.orig_argv[1:]])


def guard_imports() -> None:
    """Libraries take seconds to import: until `ending_by_exception`, a signal ends the process with a sentence."""
    resumable = bool({"mpdit_jax.train", "mpdit_jax.train_vae"} & {*sys.orig_argv[:4]})

    def end(number: int, frame: FrameType | None) -> None:
        status = 0 if resumable and number == signal.SIGTERM else KILLED_BY + number
        _end(
            status, f"{signal.Signals(number).name}: nothing had begun; the same command starts it:\n  {this_command()}"
        )

    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where they are ignored
            signal.signal(number, end)


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            if not waiting:  # somebody else's
                return
            number = waiting.pop()
        if _would_be_lost(frame):
            waiting.append(number)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        elif number == signal.SIGTERM:
            raise Terminated
        else:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    for number, previous in before.items():
        if previous != signal.SIG_IGN or number == signal.SIGALRM:
            signal.signal(number, end)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # What guarded the imports has done its work; `end` stays in its place, and then needs its alarm.
        restored = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_IGN)
        if all(before[number] in restored for number in SIGNALS):
            for number, previous in before.items():
                signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether Python would print an exception raised here and go on: the garbage collector calls (JAX has it do so)."""
    called = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in called or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted in `name` and the next one ends the process at once.

    A thread listens for signals: Python itself heeds one only when the main thread is back from what it does in a
    library, and compiling takes minutes. In another thread than the main one, signals are left alone.

    Attributes:
        name: of the signal; None as long as nobody has asked.
        nothing_to_save: set this to True while SIGTERM may end the process at once, with status 0.
    """

    def __init__(self, grace: float = 0.0, saved: Callable[[], str] = lambda: "nothing") -> None:
        """Nothing happens yet.

        Args:
            grace: seconds after SIGTERM in which everything must be saved, or the process ends; 0 for no limit.
            saved: says what is safe on disk, such as "the checkpoint of step 300".
        """
        self.name: str | None = None
        self.nothing_to_save = False
        self._grace, self._saved = grace, saved
        self._deadline: float | None = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopRequest":
        if self._main:
            self._ours, self._theirs = socket.socketpair()
            self._theirs.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._theirs.close()  # which ends the thread
            self._thread.join()
            self._ours.close()

    def begin_grace(self) -> None:
        """Count the grace period from now on, as another process was asked to stop."""
        if self._deadline is None and self._grace:
            self._deadline = time.monotonic() + self._grace
            if self._main:
                self._theirs.send(b"\0")  # wakes the thread, which then knows how long it may sleep

    def _listen(self) -> None:
        while True:
            left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            if not select.select([self._ours], [], [], left)[0]:
                _end(
                    1,
                    f"error: {self.name or 'another process was asked to stop'}: the run could not be saved within "
                    f"{self._grace:g} s (config.checkpoint.grace); {self._saved()} is what there is. The same command "
                    f"continues from it:\n  {this_command()}",
                )
            received = self._ours.recv(64)
            if not received:
                return
            for number in received:
                if number in SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if self.name is not None:
            _end(KILLED_BY + number, f"{number.name} again: ended at once; {self._saved()} is safe.")
        if number == signal.SIGTERM and self.nothing_to_save:
            _end(0, f"SIGTERM: no step was done since; {self._saved()} is safe; continue with:\n  {this_command()}")
        self.name = number.name
        if number == signal.SIGTERM and self._grace:
            self._deadline = time.monotonic() + self._grace


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread does everything."""


def _end(status: int, sentence: str) -> None:
    """End this process from any thread, whatever the others are doing."""
    os.write(2, f"{sentence}\n".encode())
    os._exit(status)
