"""Signals that ask a run to end. A command loads this module first, so it imports nothing heavy."""

import errno
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from mpdit_jax.errors import InputError

if os.name != "posix":
    raise ImportError(
        f"mpdit_jax runs on Linux, macOS and Windows' WSL: this system ({sys.platform}) has no such locks and signals."
    )

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOST = (errno.EPIPE, errno.EIO)
"""Error numbers of writing to a pipe without a reader and to a closed terminal."""
KILLED_BY = 128  # exit status of a process that a signal ended, less the signal's number
_REQUESTS = (*SIGNALS, signal.SIGHUP)  # SIGHUP comes when a terminal is closed
_SAME_REQUEST = 0.1  # seconds; `timeout` and some launchers signal a process and then its group
_STOPPED_STATUS = "MPDIT_JAX_STOPPED_STATUS"


class Terminated(KeyboardInterrupt):
    """Raised by a SIGTERM inside `ending_by_exception`."""


def stopped_status() -> int:
    """Return the exit status of a training that was stopped and can be continued: MPDIT_JAX_STOPPED_STATUS, or 0.

    Kubernetes and other schedulers take 0 for the end of the work and start it again after any other status.

    Raises:
        InputError: the variable holds no exit status.
    """
    text = os.environ.get(_STOPPED_STATUS) or "0"
    if not text.isdecimal() or int(text) > 255:
        raise InputError(f"{_STOPPED_STATUS}={text}: expected an exit status from 0 to 255, such as 75.")
    return int(text)


def this_command() -> str:
    """Return the command line of this process, for a shell."""
    return shlex.join([sys.executable, *sys.orig_argv[1:]])


def guard_imports() -> None:
    """Make SIGINT and SIGTERM end the process with a sentence during the imports, which take seconds."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_imports)


def _end_imports(number: int, frame: FrameType | None) -> None:
    status = KILLED_BY + number
    if number == signal.SIGTERM and {"mpdit_jax.train", "mpdit_jax.train_vae"} & {*sys.orig_argv[:4]}:
        with suppress(InputError):
            status = stopped_status()
    _end(status, f"{signal.Signals(number).name}: nothing had begun; the same command starts it:\n  {this_command()}")


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, previous in before.items():
        if previous != signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous in (None, _end_imports) else previous)


class PreemptionHandler:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is noted in `name`; the next one ends the process at once.

    A thread listens for signals, because Python runs handlers only when the main thread returns from a library, and
    compiling takes minutes. Signals that this process was started to ignore stay ignored; outside the main thread, all
    are left alone.

    A pipe or terminal whose reader has gone counts as a request too; later output is discarded.

    Attributes:
        name: the signal or other request to stop; None if there was none.
        nothing_to_save: set this to True while SIGTERM may end the process at once, with `stopped_status`.
    """

    def __init__(self, grace: float = 0.0, saved: Callable[[], str] = lambda: "nothing") -> None:
        """Make a handler.

        Args:
            grace: seconds from SIGTERM until the process ends even if it is still saving; 0 for no limit.
            saved: returns words for what is safe on disk, such as "the checkpoint of step 300".

        Raises:
            InputError: see `stopped_status`.
        """
        self.name: str | None = None
        self.nothing_to_save = False
        self._grace, self._tell_saved = grace, saved
        self._deadline: float | None = None
        self._signalled: float | None = None  # time of the first signal
        self._stopped_status = stopped_status()
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "PreemptionHandler":
        if self._main:
            self._ours, self._theirs = socket.socketpair()
            self._theirs.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            heeded = [number for number in _REQUESTS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, _leave_to_thread) for number in heeded}
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            self._streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (_Outliving(stream, self._lost_reader) for stream in self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            sys.stdout, sys.stderr = self._streams
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._theirs.close()  # which ends the thread
            self._thread.join()
            self._ours.close()

    def begin_grace(self) -> None:
        """Start the grace period, because another process was asked to stop."""
        if self._deadline is None and self._grace:
            self._deadline = time.monotonic() + self._grace
            if self._main:
                self._theirs.send(b"\0")  # wakes the thread, which then waits until the deadline

    def _saved(self) -> str:
        try:
            return self._tell_saved()
        except OSError as error:  # the process must end all the same
            return f"what the disk has ({error.strerror})"

    def _lost_reader(self, error: OSError) -> None:
        if self.name is None:
            lost = error.errno in LOST
            self.name = "nobody reads the output any more" if lost else f"the output is refused ({error.strerror})"

    def _listen(self) -> None:
        while True:
            self._ours.settimeout(None if self._deadline is None else max(self._deadline - time.monotonic(), 1e-3))
            try:
                received = self._ours.recv(64)
            except TimeoutError:
                _end(
                    1,
                    f"error: {self.name or 'another process was asked to stop'}: the run could not be saved within "
                    f"{self._grace:g} s (config.checkpoint.grace); {self._saved()} is safe. The same command "
                    f"continues from it:\n  {this_command()}",
                )
            if not received:
                return
            for number in received:
                if number in _REQUESTS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if self._signalled is not None:
            if time.monotonic() - self._signalled < _SAME_REQUEST:
                return
            _end(KILLED_BY + number, f"{number.name} again: ended at once; {self._saved()} is safe.")
        self._signalled = time.monotonic()
        if number == signal.SIGTERM and self.nothing_to_save:
            _end(
                self._stopped_status,
                f"SIGTERM: no step was done since; {self._saved()} is safe; continue with:\n  {this_command()}",
            )
        self.name = number.name
        if number == signal.SIGTERM and self._grace:
            self._deadline = time.monotonic() + self._grace


class _Outliving:
    """A text stream that drops what cannot be written, because its reader has gone or the disk is full."""

    def __init__(self, stream: TextIO, lost: Callable[[OSError], None]) -> None:
        self._stream, self._lost = stream, lost

    @property
    def encoding(self) -> str:
        """The stream's encoding, which progress bars ask for."""
        return self._stream.encoding

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, or report that it is refused."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or report that it is refused."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread handles the signal."""


def _end(status: int, sentence: str) -> NoReturn:
    """End this process from any thread; print a sentence first, unless stderr takes nothing within a second."""
    with suppress(OSError):
        if select.select([], [2], [], 1.0)[1]:
            os.write(2, f"{sentence}\n".encode())
    os._exit(status)
