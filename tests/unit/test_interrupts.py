"""Handlers that are interrupted, and everything that must not be."""

import ctypes
import gc
import itertools
import logging
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import pytest

from pgflow_worker import Context, Flow, Transaction, interrupts
from pgflow_worker.adapter import AutonomousDatabase
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.errors import Interrupted, QueryCanceled, TimeIsUp
from pgflow_worker.flow import Handler
from pgflow_worker.interrupts import Interrupts
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.process import Process
from pgflow_worker.runner import Runner
from pgflow_worker.transaction import DatabaseTransaction
from tests.unit.fakes import FakeFlags, FakePlpy, process_with

SIGNAL = signal.SIGRTMIN
LONG = 60.0  # seconds that no test waits
SOON = 0.05


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "TICK_SECONDS", 0.01)


@pytest.fixture
def some(flags: FakeFlags) -> Iterator[Interrupts]:
    some = Interrupts(flags)
    yield some
    some.close()


def is_blocked() -> bool:
    return SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def tick() -> None:
    """What the timer does, at this moment."""
    signal.raise_signal(SIGNAL)


def fall_due() -> None:
    """Wait until the timer has sent a signal that is held back."""
    deadline = time.monotonic() + LONG
    while SIGNAL not in signal.sigpending():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# What ends a handler, and what it can be doing


class LaterFlags(FakeFlags):
    """A wish of PostgreSQL's that comes soon. Without a thread, which might not get its turn."""

    def __init__(self, wish: str) -> None:
        super().__init__()
        self._wish = wish
        self._at = time.monotonic() + SOON

    def __getattribute__(self, name: str) -> Any:
        if name in ("cancel", "die"):
            return name == self._wish and time.monotonic() > self._at
        return super().__getattribute__(name)


def sleep() -> None:
    time.sleep(LONG)


def loop() -> None:
    while True:
        pass


def receive() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.recv(1)


def get() -> None:
    queue.Queue[int]().get()


def wait_for_process() -> None:
    subprocess.run(["sleep", str(LONG)], check=True)


def match() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")


def sleep_on_errors() -> None:
    while True:
        with suppress(Exception):
            time.sleep(LONG)


HANGING = [sleep, loop, receive, get, wait_for_process, match, sleep_on_errors]


@pytest.mark.parametrize("hanging", HANGING)
@pytest.mark.parametrize("wish", ["cancel", "die"])
def test_what_postgresql_wants_ends_it(wish: str, hanging: Callable[[], None]) -> None:
    some = Interrupts(LaterFlags(wish))
    with pytest.raises(Interrupted, match="canceling statement due to user request"):
        some.call(hanging, LONG, runs_sql=False)
    assert some.has_raised
    some.close()


@pytest.mark.parametrize("hanging", HANGING)
def test_its_time_ends_it_and_it_is_told_where_it_was(
    some: Interrupts, flags: FakeFlags, hanging: Callable[[], None]
) -> None:
    with pytest.raises(TimeIsUp) as caught:
        some.call(hanging, SOON, runs_sql=False)
    cause = caught.value.__cause__
    assert isinstance(cause, Interrupted)
    assert some.has_raised
    assert not flags.forgotten


def test_a_handler_that_ends_by_itself_has_its_result_or_its_error(
    some: Interrupts, flags: FakeFlags
) -> None:
    def fail() -> NoReturn:
        raise SystemExit("own")

    for seconds in (LONG, float("inf")):
        assert some.call(lambda: 1, seconds, runs_sql=False) == 1
        with pytest.raises(SystemExit, match="own"):
            some.call(fail, seconds, runs_sql=False)
    assert not some.has_raised
    assert not flags.forgotten


def test_what_postgresql_does_not_mean_for_the_call_is_nothing_to_a_handler(
    some: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> str:
        until = time.monotonic() + SOON
        while time.monotonic() < until:
            tick()
        return "done"

    monkeypatch.setattr(interrupts, "TICK_SECONDS", 0.001)
    assert some.call(busy, LONG, runs_sql=False) == "done"
    assert not some.has_raised


def test_nothing_is_left_armed_after_a_call(some: Interrupts, flags: FakeFlags) -> None:
    blocked = is_blocked()
    some.call(lambda: None, LONG, runs_sql=True)
    flags.cancel = True
    with pytest.raises(Interrupted):
        some.call(sleep, LONG, runs_sql=True)
    assert is_blocked() is blocked is True
    # The timer goes on ticking, which does nothing.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
    tick()


# A handler that goes on


def test_what_swallows_it_gets_it_again_but_has_time_to_clean_up(
    some: Interrupts, flags: FakeFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.1)
    times: list[float] = []

    def stubborn() -> str:
        while len(times) < 3:
            try:
                time.sleep(LONG)
            except:  # noqa: E722
                times.append(time.monotonic())
                time.sleep(0.08)
        return "done"

    flags.cancel = True
    assert some.call(stubborn, LONG, runs_sql=False) == "done"
    assert all(later - earlier >= 0.09 for earlier, later in itertools.pairwise(times))


def test_a_new_handler_is_given_no_grace(some: Interrupts, flags: FakeFlags) -> None:
    flags.cancel = True
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(Interrupted):
            some.call(sleep, LONG, runs_sql=False)
        assert time.monotonic() - started < interrupts.GRACE_SECONDS


def swallowing(then: Callable[[], object]) -> Callable[[], object]:
    """A handler that does not end when it is interrupted, but with this."""

    def handler() -> object:
        try:
            time.sleep(LONG)
        except BaseException:
            return then()
        return None

    return handler


def test_a_result_that_comes_too_late_is_none(some: Interrupts) -> None:
    with pytest.raises(TimeIsUp) as caught:
        some.call(swallowing(lambda: "late"), SOON, runs_sql=False)
    assert caught.value.__cause__ is None


def test_an_error_that_comes_too_late_is_the_cause(some: Interrupts) -> None:
    def fail() -> NoReturn:
        raise ValueError("late")

    with pytest.raises(TimeIsUp) as caught:
        some.call(swallowing(fail), SOON, runs_sql=False)
    assert repr(caught.value.__cause__) == "ValueError('late')"


def test_an_error_while_a_cancel_is_pending_is_taken_for_its_consequence(
    some: Interrupts, flags: FakeFlags
) -> None:
    def fail() -> NoReturn:
        flags.cancel = True
        raise ValueError("the process that I had started was killed")

    with pytest.raises(Interrupted, match="canceling statement") as caught:
        some.call(fail, LONG, runs_sql=False)
    assert isinstance(caught.value.__cause__, ValueError)


def test_postgresqls_own_cancel_stays_what_it_is(some: Interrupts, flags: FakeFlags) -> None:
    error = QueryCanceled("canceling statement due to statement timeout")

    def fail() -> NoReturn:
        raise error

    flags.cancel = True
    with pytest.raises(QueryCanceled) as caught:
        some.call(fail, LONG, runs_sql=False)
    assert caught.value is error


def test_a_result_while_a_cancel_is_pending_is_kept(some: Interrupts, flags: FakeFlags) -> None:
    def handler() -> str:
        flags.cancel = True
        return "done"

    assert some.call(handler, LONG, runs_sql=False) == "done"


# SQL


def test_nothing_is_interrupted_in_sql(some: Interrupts, flags: FakeFlags) -> None:
    told: list[str] = []

    def handler() -> None:
        some.enter_sql()
        flags.cancel = True
        assert is_blocked()
        fall_due()
        # Also what got through before it was held back.
        some._tick(SIGNAL, sys._getframe())
        told.append("in SQL")
        some.leave_sql()
        assert not is_blocked()
        time.sleep(LONG)

    with pytest.raises(Interrupted):
        some.call(handler, LONG, runs_sql=True)
    assert told == ["in SQL"]


def test_outside_of_a_call_sql_changes_nothing(some: Interrupts) -> None:
    for change in (some.enter_sql, some.leave_sql):
        change()
        assert is_blocked()


@pytest.fixture
def canceled(flags: FakeFlags) -> Iterator[list[float]]:
    """When SIGINT came: PostgreSQL's handler of it asks for the cancel of a statement."""
    times: list[float] = []

    def cancel(_: int, __: FrameType | None) -> None:
        times.append(time.monotonic())
        flags.cancel = True

    former = signal.signal(signal.SIGINT, cancel)
    yield times
    signal.signal(signal.SIGINT, former)


def statement(some: Interrupts, flags: FakeFlags) -> NoReturn:
    """One that takes long, and can be canceled."""
    some.enter_sql()
    deadline = time.monotonic() + LONG
    while not flags.cancel:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    some.leave_sql()
    raise QueryCanceled("canceling statement due to user request")


def test_what_is_in_sql_when_its_time_is_up_is_canceled_by_postgresql(
    some: Interrupts, flags: FakeFlags, canceled: list[float]
) -> None:
    started = time.monotonic()
    with pytest.raises(TimeIsUp) as caught:
        some.call(partial(statement, some, flags), SOON, runs_sql=True)
    assert type(caught.value.__cause__) is QueryCanceled
    assert [at - started >= SOON for at in canceled] == [True]
    # It was ours: nobody must see it later.
    assert (flags.cancel, flags.forgotten) == (False, 1)


def test_what_somebody_cancels_in_sql_before_its_time_is_up_is_canceled(
    some: Interrupts, flags: FakeFlags, canceled: list[float]
) -> None:
    def handler() -> None:
        signal.raise_signal(signal.SIGINT)
        statement(some, flags)

    with pytest.raises(QueryCanceled):
        some.call(handler, LONG, runs_sql=True)
    assert (flags.cancel, flags.forgotten) == (True, 0)


@pytest.mark.parametrize("runs_sql", [True, False])
def test_postgresql_is_asked_only_for_the_time_of_what_runs_sql(
    some: Interrupts, flags: FakeFlags, canceled: list[float], runs_sql: bool
) -> None:
    with pytest.raises(TimeIsUp):
        some.call(sleep, SOON, runs_sql=runs_sql)
    assert (len(canceled), flags.forgotten) == (runs_sql, runs_sql)
    assert not flags.cancel


def test_what_ends_in_time_is_not_canceled_later(
    some: Interrupts, flags: FakeFlags, canceled: list[float]
) -> None:
    some.call(lambda: None, SOON, runs_sql=True)
    time.sleep(2 * SOON)
    assert (canceled, flags.forgotten) == ([], 0)


# Where an exception would do harm

WAITING = "for _ in range(2): tick()"
GOING_ON = "tick(); tick(); tick()"


def run_in(some: Interrupts, module: str, code: str) -> None:
    """Run code as that of a module, which a tick meets where it says so."""
    compiled = compile(code, "made_up.py", "exec")
    some.call(
        lambda: exec(compiled, {"__name__": module, "tick": partial(signal.raise_signal, SIGNAL)}),
        LONG,
        runs_sql=False,
    )


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("pgflow_worker", GOING_ON),
        ("pgflow_worker.runner", WAITING),
        *(
            (module, GOING_ON)
            for module in (
                *("logging", "logging.handlers", "importlib", "importlib.util", "threading"),
                *("_frozen_importlib", "_frozen_importlib_external"),
            )
        ),
    ],
)
def test_this_package_and_what_has_locks_come_to_their_end(
    some: Interrupts, flags: FakeFlags, module: str, code: str
) -> None:
    flags.cancel = True
    run_in(some, module, code)
    assert not some.has_raised


@pytest.mark.parametrize("module", ["handlers", "pgflow_workers", "loggings", "threading_tools"])
def test_everything_else_does_not(some: Interrupts, flags: FakeFlags, module: str) -> None:
    flags.cancel = True
    with pytest.raises(Interrupted):
        run_in(some, module, GOING_ON)


@pytest.mark.parametrize("module", ["logging", "importlib", "threading"])
def test_what_has_locks_and_waits_is_interrupted(
    some: Interrupts, flags: FakeFlags, module: str
) -> None:
    flags.cancel = True
    with pytest.raises(Interrupted):
        run_in(some, module, WAITING)


def test_other_threads_do_not_get_the_signal(some: Interrupts) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)  # in which nothing is held back
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
    thread.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def handler() -> None:
        some.enter_sql()
        fall_due()
        for _ in range(20):  # it stays, because nobody else takes it
            time.sleep(0.001)
            assert SIGNAL in signal.sigpending()
        some.leave_sql()

    some.call(handler, LONG, runs_sql=False)
    end.set()
    thread.join()


# One inside another, and the end


def test_one_inside_another_leaves_it_as_it_was(some: Interrupts, flags: FakeFlags) -> None:
    inner_flags = FakeFlags()
    inner_flags.cancel = True

    def handler() -> None:
        some.enter_sql()  # in which a function is called that has handlers of its own
        inner = Interrupts(inner_flags)
        flags.cancel = True
        with pytest.raises(Interrupted):
            inner.call(sleep, LONG, runs_sql=False)
        assert inner.is_installed()
        assert not some.is_installed()
        inner.close()
        assert some.is_installed()
        assert is_blocked()
        fall_due()
        some.leave_sql()
        time.sleep(LONG)

    with pytest.raises(Interrupted):
        some.call(handler, LONG, runs_sql=False)
    assert some.has_raised


@pytest.fixture
def unused_signal() -> Iterator[None]:
    """The signal as a new process has it."""
    former = signal.signal(SIGNAL, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(SIGNAL, former)


def test_after_its_end_a_late_signal_does_nothing(unused_signal: None, flags: FakeFlags) -> None:
    some = Interrupts(flags)
    flags.cancel = True
    with pytest.raises(Interrupted):
        some.call(sleep, LONG, runs_sql=True)
    some.close()
    assert not is_blocked()
    # By default it would end the process.
    assert callable(signal.getsignal(SIGNAL))
    tick()


def test_a_signal_that_is_held_back_at_its_end_does_nothing(
    unused_signal: None, flags: FakeFlags
) -> None:
    some = Interrupts(flags)
    flags.cancel = True
    tick()
    assert SIGNAL in signal.sigpending()
    some.close()
    assert not signal.sigpending()


def test_an_end_in_the_middle_leaves_nothing_armed(
    unused_signal: None, flags: FakeFlags, canceled: list[float]
) -> None:
    some = Interrupts(flags)

    def handler() -> str:
        some.close()
        flags.cancel = True
        tick()
        signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])
        assert signal.sigtimedwait([SIGNAL], 2 * SOON) is None
        return "done"

    with pytest.raises(TimeIsUp) as caught:
        some.call(handler, SOON, runs_sql=True)
    assert caught.value.__cause__ is None
    assert canceled == []


def test_a_signal_that_somebody_has_taken_is_taken_back(some: Interrupts) -> None:
    assert some.is_installed()
    signal.signal(SIGNAL, lambda *_: None)
    assert not some.is_installed()
    some.install()
    assert some.is_installed()


# Bookkeeping is never interrupted half-way

RUN_ID = "12345678-1234-5678-1234-567812345678"
CLAIM = Claim(RUN_ID, "only", 0, "worker", 1, 1_700_000_000_000_000, 42, 3, 60)
TASK = Task(CLAIM, '{"run": 1}')

# raise(3): Python's own would also look whether a signal has come.
_raise = ctypes.CDLL(None)["raise"]


class Tracer:
    """Sends the signal at the n-th opcode, from 0."""

    def __init__(self, at: int, wish: Callable[[], None]) -> None:
        self._left = at
        self._wish = wish
        self.has_sent = False

    def __call__(self, frame: FrameType, event: str, _: object) -> "Tracer | None":
        if event == "call":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            self._left -= 1
            if self._left < 0 and not self.has_sent:
                self.has_sent = True
                self._wish()
                sys.settrace(None)
                # Python looks for signals after a call, not after a step of such an iterator. So
                # this one is noticed where it is meant to be: in the frame that is traced.
                for _ in map(_raise, [SIGNAL]):
                    return None
        return self


class RecordedTimer(interrupts._Timer):
    """A timer that tells whether it is set."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.is_set = False
        timers.append(self)

    def set(self, seconds: float, interval: float = 0.0) -> None:
        super().set(seconds, interval)
        self.is_set = seconds > 0


timers: list[RecordedTimer] = []


def plain(flow_input: int) -> list[int]:
    return [flow_input]


def with_log(flow_input: int, ctx: Context) -> None:
    ctx.log.info("input: %s", flow_input)


def with_tx(flow_input: int, tx: Transaction) -> list[Any]:
    return tx.execute("select 1")


def streaming(flow_input: int, tx: Transaction) -> list[Any]:
    return list(tx.stream("select 1"))


def catching_everything(flow_input: int, tx: Transaction) -> None:
    try:
        tx.execute("select 1")
    except:  # noqa: E722
        tx.execute("select 1")


class Traced:
    """Runs a handler again and again, and looks at what is left each time."""

    def __init__(
        self, process: Process, flags: FakeFlags, notes: list[str], handler: Handler
    ) -> None:
        self._process = process
        self._flags = flags
        self._notes = notes
        plpy = FakePlpy({"select 1": self._answer}, oids=[23])
        self._database = AutonomousDatabase(plpy, process)
        self._runner = self._runner_of(handler)
        self._checking = self._runner_of(self._check)
        self._has_checked = False
        self._state = self._look()
        flow = self._runner._flow
        self._is_transactional = flow.steps["only"].is_transactional

    def outcome_at(self, opcode: int, *, time_is_up: bool) -> tuple[object, bool]:
        """What becomes of the task, and whether the signal was sent before its end."""
        tracer = Tracer(opcode, lambda: setattr(self._flags, "cancel", not time_is_up))
        task = TASK._replace(claim=CLAIM._replace(timeout=0)) if time_is_up else TASK
        transaction = DatabaseTransaction(self._database) if self._is_transactional else None
        outcome: object
        former = sys.gettrace()
        sys.settrace(tracer)
        try:
            outcome = self._runner.run(task, transaction).outcome
        except pytest.fail.Exception:  # this test has hung
            raise
        except BaseException as error:
            outcome = error
        finally:
            sys.settrace(former)
        while signal.sigtimedwait([SIGNAL], 0):  # those that came after the end
            pass
        return outcome, tracer.has_sent

    def check(self) -> None:
        """Nothing is left armed or half done, and the next handler runs as the first did."""
        self._flags.cancel = True
        assert self._look() == self._state
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
        tick()
        signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])
        self._has_checked = False
        with pytest.raises(Interrupted) as caught:
            self._checking.run(TASK, DatabaseTransaction(self._database))
        assert self._has_checked, caught.value.__cause__
        self._flags.cancel = False
        self._notes.clear()
        self._process.is_trusted = True

    def _check(self, tx: Transaction) -> None:
        assert self._look() != self._state
        self._has_checked = bool(tx.execute("select 1"))
        tick()

    def _answer(self, *_: object) -> list[dict[str, Any]]:
        """PostgreSQL must not be met by the signal, nor by the limit of memory."""
        assert is_blocked()
        assert self._look()[1] == self._state[1]
        return [{"n": 1}]

    def _look(self) -> tuple[object, ...]:
        limit = resource.getrlimit(resource.RLIMIT_DATA)
        # The other one goes on ticking, with the signal blocked.
        is_set = [timer.is_set for timer in timers if timer.signal_number == signal.SIGINT]
        return is_blocked(), limit, is_set, self._process.interrupts.is_installed()

    def _runner_of(self, handler: Handler) -> Runner:
        flow = Flow("f")
        flow.step("only")(handler)
        return Runner(flow, self._process, time.monotonic)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, fast: None) -> Iterator[None]:
    """No ticks but the test's own."""
    timers.clear()
    monkeypatch.setattr(interrupts, "TICK_SECONDS", 1000)
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 1000)
    monkeypatch.setattr(interrupts, "_Timer", RecordedTimer)
    # asyncio and others would take Python's own handler for theirs.
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # an exception in what Python calls then is lost, until the next tick
    yield
    gc.enable()
    signal.signal(signal.SIGINT, former)


# The first two at every opcode. The others, which take longer, have most of their own in common.
@pytest.mark.parametrize(
    ("handler", "step"),
    [(plain, 1), (with_tx, 1), (streaming, 3), (catching_everything, 3), (with_log, 11)],
)
@pytest.mark.parametrize("time_is_up", [False, True], ids=["cancel", "time is up"])
def test_the_bookkeeping_is_never_interrupted_half_way(
    slow: None, flags: FakeFlags, notes: list[str], handler: Handler, step: int, time_is_up: bool
) -> None:
    with process_with(flags, notes) as process:
        traced = Traced(process, flags, notes, handler)
        kinds = set()
        for opcode in itertools.count(0, step):
            outcome, has_sent = traced.outcome_at(opcode, time_is_up=time_is_up)
            kinds.add(type(outcome))
            if time_is_up:
                assert isinstance(outcome, Failure), (opcode, outcome)
                assert outcome.error == 'step "only" took longer than 0 s'
            else:
                assert isinstance(outcome, Success | QueryCanceled), (opcode, outcome)
            traced.check()
            assert not logging._lock._is_owned()  # type: ignore[attr-defined]
            if not has_sent:
                break
        assert opcode > 300
        # Later Pythons look for signals only where a function begins or a loop goes back.
        if sys.version_info < (3, 12):
            assert len(kinds) == (1 if time_is_up else 2)
