"""The server process that PostgreSQL and handlers share: each finds it as it needs it.

Handlers run under a limit of memory and can be interrupted. PostgreSQL has neither, and finds the
working directory, umask, locale and signal handlers that it has set up.
"""

from __future__ import annotations

import _locale
import _signal
import ctypes
import os
import resource
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypeVar

from pgflow_worker.errors import Interrupted
from pgflow_worker.interrupts import Interrupts, ServerFlags

DEFAULT_MEMORY_MB = 512
CALL_ENDED = "the call ended, and the next one has a new process"
# pqsignal()s of PostgreSQL's backends, and what Python sets or a handler might.
_SIGNALS = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGALRM),
    *(signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2, signal.SIGFPE, signal.SIGCHLD),
    signal.SIGURG,
)
_libc = ctypes.CDLL(None)
_POINTER = ctypes.sizeof(ctypes.c_void_p)  # to the handler: the first in a struct sigaction

T = TypeVar("T")


class Process:
    """This backend during one call of work().

    note: told what handlers have changed. memory_mb: how much more than at the start handlers may
    allocate. is_trusted: False when the call should end, and leave the rest to a new process.
    """

    def __init__(
        self, note: Callable[[str], object], *, memory_mb: int, interrupts: Interrupts
    ) -> None:
        self._note = note
        self.interrupts = interrupts
        self.is_trusted = True
        self._pid = os.getpid()
        self._runs_handler = False
        self._has_threads = False
        self._directory = os.getcwd()
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._locale = _locale.setlocale(_locale.LC_ALL, None)
        self._threads = threading.active_count()
        self._recursion_limit = sys.getrecursionlimit()
        self._python_handlers = _first_python_handlers()
        self._handlers = [_handler(number) for number in _SIGNALS]
        self._descriptors = _descriptors()
        self._unlimited = resource.getrlimit(resource.RLIMIT_DATA)
        self.memory_mb = memory_mb
        limit = _data_bytes() + (memory_mb << 20)
        if self._unlimited[0] != resource.RLIM_INFINITY:
            limit = min(limit, self._unlimited[0])
        self._limited = limit, self._unlimited[1]

    def close(self) -> None:
        """Give the process back to PostgreSQL."""
        self._lift()
        self.interrupts.close()
        self._restore()

    def call(self, function: Callable[[], T], seconds: float, *, runs_sql: bool) -> T:
        """Run a handler on the main thread, see Interrupts.call().

        Raises Interrupted, with a shutdown pending, if this process cannot go on.
        """

        def limited() -> T:
            self._limit()
            try:
                return function()
            finally:
                # Before anything else, which could need memory that there is not.
                self._lift()

        self._runs_handler = True
        try:
            return self.interrupts.call(limited, seconds, runs_sql=runs_sql)
        finally:
            self._runs_handler = False
            self._restore()
            self._inspect()
            if self._has_threads:
                self._limit()

    def has_threads(self) -> None:
        """From now on handlers may run at any time that the main thread is not in SQL."""
        self._has_threads = True
        self._limit()

    def has_no_more_handlers(self) -> None:
        """Lift the limit: what is still to be done must not fail for want of memory."""
        self._has_threads = False
        self._lift()

    def enter_sql(self) -> None:
        """Before PostgreSQL takes over."""
        self.leave_if_forked()
        if self._runs_handler or self._has_threads:
            self._lift()
        if self._runs_handler:
            self.interrupts.enter_sql()
        if self._runs_handler or self._has_threads:
            self._restore()

    def leave_sql(self) -> None:
        """When PostgreSQL is done."""
        if self._runs_handler:
            self.interrupts.leave_sql()
        if self._runs_handler or self._has_threads:
            self._limit()

    def leave_if_forked(self) -> None:
        """End a child process of a handler's: it must not go on as the worker."""
        if os.getpid() != self._pid:
            os._exit(1)

    def has_no_memory(self) -> None:
        """Distrust the process after a MemoryError: others may have been swallowed."""
        self.distrust(
            f"handlers ran out of memory, of which a call gives them {self.memory_mb} MB "
            "(memory_mb in pgflow_worker.settings)"
        )

    def distrust(self, reason: str) -> None:
        """Let the call end after the tasks that run."""
        self._note(f"{reason}: {CALL_ENDED}")
        self.is_trusted = False

    def _limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._limited)

    def _lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._unlimited)

    def _restore(self) -> None:
        """Undo what PostgreSQL would stumble over at its next step: its paths are relative."""
        if _directory() != self._directory:
            os.chdir(self._directory)
            self._note("a handler changed the working directory: it was changed back")
        if os.umask(self._umask) != self._umask:
            self._note("a handler changed the umask: it was changed back")
        if _locale.setlocale(_locale.LC_ALL, None) != self._locale:
            _locale.setlocale(_locale.LC_ALL, self._locale)
            self._note("a handler changed the locale: it was changed back")

    def _inspect(self) -> None:
        """After a handler on the main thread."""
        self.leave_if_forked()
        if any(event & select.POLLNVAL for _, event in self._descriptors.poll(0)):
            # The next thing that PostgreSQL writes could be a PANIC, which ends all sessions.
            os.kill(self._pid, signal.SIGTERM)
            raise Interrupted("a handler closed file descriptors of the server's")
        if self.interrupts.has_raised:
            self.interrupts.has_raised = False
            self.distrust("a handler was stopped in the middle of Python")
        if sys.getrecursionlimit() != self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
            self._note("a handler changed Python's recursion limit: it was changed back")
        if signal.set_wakeup_fd(-1) != -1:
            self._note("a handler left a wakeup descriptor for signals: it was removed")
        if threading.active_count() > self._threads and not self._has_threads:
            self._note("a handler left a thread running, which a call cannot stop")
        if not self.interrupts.is_installed():
            self.interrupts.install()
            self.distrust("a handler replaced a signal handler of the worker's")
        if _python_handlers() != self._python_handlers:
            # Python knows of the last it was given, and can set no other again.
            now = [_handler(number) for number in _SIGNALS]
            if any(a[:_POINTER] != b[:_POINTER] for a, b in zip(now, self._handlers, strict=True)):
                for number, handler in zip(_SIGNALS, self._handlers, strict=True):
                    _libc.sigaction(number, handler, None)
                self.distrust("a handler replaced signal handlers of the server's")


def server_process(note: Callable[[str], object], memory_mb: int) -> Process:
    """This process, which must be a backend."""
    interrupts = Interrupts(ServerFlags())
    try:
        return Process(note, memory_mb=memory_mb, interrupts=interrupts)
    except BaseException:
        interrupts.close()
        raise


def _python_handlers() -> list[object]:
    return [_signal.getsignal(number) for number in _SIGNALS]


@cache
def _first_python_handlers() -> list[object]:
    """Before any handler of a task's has run."""
    return _python_handlers()


def _handler(signal_number: int) -> bytes:
    """The signal's struct sigaction, as sigaction(2) gives it; its size is the C library's."""
    action = ctypes.create_string_buffer(512)
    _libc.sigaction(signal_number, None, action)
    return action.raw


@cache
def _descriptors() -> select.poll:
    """The sockets, pipes and the like of the server's that are open; files come and go.

    Found once, before the first handler opens others.
    """
    found = select.poll()
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself is closed by now
            if number > 2 and not stat.S_ISREG(os.fstat(number).st_mode):
                found.register(number, 0)
    return found


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _data_bytes() -> int:
    """How much memory counts against RLIMIT_DATA now: proc(5), the field `data` of statm."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[5]) * resource.getpagesize()
