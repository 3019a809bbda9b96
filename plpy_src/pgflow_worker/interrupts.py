"""End a handler on the main thread: its step's time is up, or PostgreSQL wants the call to end.

PostgreSQL's own signals (a cancel, a timeout, a shutdown) only set flags, at which nobody looks
while Python runs. So a timer sends the thread a signal that PostgreSQL does not use. Python's
handler of it looks at the flags, and raises Interrupted in whatever the handler is doing.
"""

from __future__ import annotations

import _signal
import ctypes
import math
import signal
import sys
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Protocol, TypeVar

from pgflow_worker.errors import Interrupted, QueryCanceled, TimeIsUp

TICK_SECONDS = 0.05
AGAIN_SECONDS = 0.005  # after a tick that came at the wrong moment
# Time for a handler to clean up, before it is interrupted once more.
GRACE_SECONDS = 1.0

T = TypeVar("T")
# Where an exception at any point would leave locks or half a record behind.
_FRAGILE = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "logging", "threading")
_OWN = __name__.partition(".")[0]


class Flags(Protocol):
    """What PostgreSQL wants of this process."""

    @property
    def cancel(self) -> bool:
        """That the call ends."""
        ...

    @property
    def die(self) -> bool:
        """That the process ends."""
        ...

    def forget_cancel(self) -> None:
        """Take back a cancel that nobody has seen yet."""
        ...


class ServerFlags:
    """PostgreSQL's own variables, which its signal handlers set (miscadmin.h).

    InterruptPending is not among them: it is set for harmless things as well.
    """

    def __init__(self) -> None:
        server = ctypes.CDLL(None)
        self._cancel = ctypes.c_int.in_dll(server, "QueryCancelPending")
        self._die = ctypes.c_int.in_dll(server, "ProcDiePending")

    @property
    def cancel(self) -> bool:
        return self._cancel.value != 0

    @property
    def die(self) -> bool:
        return self._die.value != 0

    def forget_cancel(self) -> None:
        self._cancel.value = 0


class Interrupts:
    """Calls functions on the main thread so that they can be interrupted.

    Nothing is interrupted outside of call(), nor between enter_sql() and leave_sql(): PostgreSQL
    must not be met by a signal of ours, nor by an exception in what it calls.
    has_raised: whether something was interrupted in the middle of Python.
    """

    def __init__(self, flags: Flags) -> None:
        self._flags = flags
        self._armed = False
        self._until = math.inf
        self._not_before = 0.0
        self._fragile: tuple[FrameType, int] | None = None
        self._in_sql = False
        self.has_raised = False
        self._former = _signal.getsignal(_SIGNAL)
        self._former_mask = _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signal.signal(_SIGNAL, self._tick)
        self._ticks = _Timer(_SIGNAL)  # from the first handler to the end
        self._is_ticking = False
        self._was_wanted = False  # before the time was up
        # While it is in SQL, PostgreSQL must end it: as it ends what somebody cancels.
        self._cancels = _Timer(signal.SIGINT)

    def close(self) -> None:
        """Leave nothing armed. The handler stays if there was none: the default would kill."""
        self._armed = False
        self._ticks.delete()
        self._cancels.delete()
        if callable(self._former):
            signal.signal(_SIGNAL, self._former)
        _signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)

    @property
    def wanted(self) -> bool:
        """Whether PostgreSQL wants the call to end."""
        return self._flags.cancel or self._flags.die

    @property
    def dying(self) -> bool:
        """Whether PostgreSQL wants the process to end."""
        return self._flags.die

    def call(self, function: Callable[[], T], seconds: float, *, runs_sql: bool) -> T:
        """What the function returns; it may take so many seconds.

        Raises TimeIsUp if it took longer, however it ended, and Interrupted if PostgreSQL wants
        the call to end. runs_sql: whether it may be in SQL when its time is up.
        """
        until = self._until = monotonic() + seconds
        self._not_before = 0.0
        self._was_wanted = False
        if not self._is_ticking:
            self._is_ticking = True
            self._ticks.set(TICK_SECONDS, TICK_SECONDS)
        if runs_sql:
            self._cancels.set(seconds)
        error: BaseException | None = None
        self._armed = True
        mask = _signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            result = function()
        except BaseException as raised:
            error = raised
        self._armed = False
        self._in_sql = False
        self._fragile = None  # a frame, which holds all that the handler had
        _signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if runs_sql:
            self._cancels.set(0)
        try:
            if monotonic() >= until and not self._was_wanted:
                if runs_sql:
                    self._flags.forget_cancel()  # it was ours
                raise TimeIsUp from error
            if error is not None:
                if self.wanted and not isinstance(error, QueryCanceled):
                    # Perhaps its consequence: the processes that a handler has started get it too.
                    raise Interrupted(_CANCELED) from error
                raise error
            return result
        finally:
            del error  # whose traceback has this frame: only garbage collection would end that

    def enter_sql(self) -> None:
        """Hold the signal back: PostgreSQL may be about to write."""
        if self._armed:
            self._in_sql = True
            _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def leave_sql(self) -> None:
        """Let it through again."""
        if self._armed:
            self._in_sql = False
            _signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def is_installed(self) -> bool:
        """Whether the signal is still ours."""
        return bool(_signal.getsignal(_SIGNAL) == self._tick)

    def install(self) -> None:
        """Take the signal again."""
        signal.signal(_SIGNAL, self._tick)

    def _tick(self, _: int, frame: FrameType | None) -> None:
        if not self._armed or self._in_sql or frame is None:
            return
        now = monotonic()
        if now < self._not_before or not (now >= self._until or self.wanted):
            return
        if not self._may_raise(frame):
            self._ticks.set(AGAIN_SECONDS, TICK_SECONDS)
            return
        self._not_before = now + GRACE_SECONDS
        self._was_wanted |= now < self._until
        self.has_raised = True
        raise Interrupted(_CANCELED)

    def _may_raise(self, frame: FrameType) -> bool:
        """Whether an exception at this point does no harm.

        In code that has to come to its end it does, unless it is waiting for something: then it
        is where it was at the last tick.
        """
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package == _OWN:
            return False
        if package not in _FRAGILE:
            return True
        place = (frame, frame.f_lasti)
        waits = place == self._fragile
        self._fragile = place
        return waits


_SIGNAL = signal.SIGRTMIN
_CANCELED = "canceling statement due to user request"
_SIGNALS = {_SIGNAL}


class _Timer:
    """A timer of the kernel's that sends a signal to the thread that has made it.

    Unlike setitimer() it leaves PostgreSQL's own alone, and unlike a thread it needs no Python:
    a regular expression looks for signals, and keeps all threads waiting. timer_create(2).
    """

    def __init__(self, signal_number: int) -> None:
        event = _SignalEvent(
            signal=signal_number, notify=_SIGEV_THREAD_ID, thread_id=threading.get_native_id()
        )
        self._id = ctypes.c_void_p()
        if _libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float, interval: float = 0.0) -> None:
        """Send the signal after so many seconds, 0 for never, and then at an interval."""
        times = _TimerTimes(*_split(interval), *_split(seconds))
        _libc.timer_settime(self._id, 0, ctypes.byref(times), None)

    def delete(self) -> None:
        _libc.timer_delete(self._id)


class _SignalEvent(ctypes.Structure):
    # struct sigevent of Linux: 64 bytes.
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("padding", ctypes.c_byte * (64 - ctypes.sizeof(ctypes.c_void_p) - 12)),
    )


class _TimerTimes(ctypes.Structure):
    # struct itimerspec: the interval, then the time to the first signal.
    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("interval", "interval_ns", "seconds", "nanoseconds")
    )


_SIGEV_THREAD_ID = 4
_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _split(seconds: float) -> tuple[int, int]:
    """Seconds and nanoseconds."""
    whole = int(min(seconds, sys.maxsize >> 8))
    return whole, min(int((seconds - whole) * 1e9), 999_999_999)
