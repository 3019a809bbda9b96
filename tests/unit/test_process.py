"""What handlers change in their process is noted and changed back; children and memory end."""

import ctypes
import locale
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pgflow_worker import Flow, Transaction
from pgflow_worker.adapter import AutonomousDatabase
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.errors import Interrupted
from pgflow_worker.executors import Executors
from pgflow_worker.flow import Handler
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.process import Process
from pgflow_worker.runner import Result, Runner
from pgflow_worker.transaction import DatabaseTransaction
from tests.unit.fakes import FakeFlags, FakePlpy, process_with

LONG = 60.0
CLAIM = Claim("12345678-1234-5678-1234-567812345678", "only", 0, "worker", 1, 1, 42, 3, 60)
TASK = Task(CLAIM, '{"run": 1}')
MB = 1 << 20


def runner_of(process: Process, handler: Handler, **options: Any) -> Runner:
    flow = Flow("f")
    flow.step("only", **options)(handler)
    return Runner(flow, process, lambda: 0.0)


def run(process: Process, handler: Handler) -> Success | Failure:
    return runner_of(process, handler).run(TASK).outcome


# What PostgreSQL would stumble over


@pytest.fixture
def before() -> Iterator[None]:
    """Whatever a test leaves is undone."""
    directory, limit = os.getcwd(), resource.getrlimit(resource.RLIMIT_DATA)
    mask, depth = os.umask(0), sys.getrecursionlimit()
    os.umask(mask)
    language = locale.setlocale(locale.LC_ALL)
    yield
    os.chdir(directory)
    os.umask(mask)
    locale.setlocale(locale.LC_ALL, language)
    sys.setrecursionlimit(depth)
    resource.setrlimit(resource.RLIMIT_DATA, limit)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def change_directory() -> None:
    os.chdir("/")


def lose_directory() -> None:
    directory = Path("lost").absolute()
    directory.mkdir()
    os.chdir(directory)
    directory.rmdir()


def change_umask() -> None:
    os.umask(umask() ^ 0o111)


def change_locale() -> None:
    now = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C" if now != "C" else "C.UTF-8")
    assert locale.setlocale(locale.LC_ALL) != now


def change_recursion_limit() -> None:
    sys.setrecursionlimit(sys.getrecursionlimit() + 1)


def state() -> tuple[object, ...]:
    directory = os.readlink("/proc/self/cwd")  # also of one that is lost
    return directory, umask(), locale.setlocale(locale.LC_ALL), sys.getrecursionlimit()


CHANGES = [
    (change_directory, "a handler changed the working directory: it was changed back"),
    (lose_directory, "a handler changed the working directory: it was changed back"),
    (change_umask, "a handler changed the umask: it was changed back"),
    (change_locale, "a handler changed the locale: it was changed back"),
]
AFTERWARDS = [
    (change_recursion_limit, "a handler changed Python's recursion limit: it was changed back"),
]


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("change", "note"), [*CHANGES, *AFTERWARDS])
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_handler_changes_is_changed_back_and_noted(
    somewhere: None,
    process: Process,
    notes: list[str],
    change: Callable[[], None],
    note: str,
    fails: bool,
) -> None:
    def handler() -> None:
        change()
        assert not fails

    now = state()
    run(process, handler)
    assert state() == now
    assert notes == [note]
    assert process.is_trusted
    run(process, lambda: 1)
    assert notes == [note]


@pytest.mark.parametrize(("change", "note"), CHANGES)
def test_it_is_changed_back_before_sql(
    somewhere: None, process: Process, notes: list[str], change: Callable[[], None], note: str
) -> None:
    now = state()

    def answer() -> list[dict[str, Any]]:
        assert state() == now
        return [{"n": 1}]

    def handler(tx: Transaction) -> list[Any]:
        change()
        return tx.execute("select 1")

    database = AutonomousDatabase(FakePlpy({"select 1": answer}, oids=[23]), process)
    outcome = runner_of(process, handler).run(TASK, DatabaseTransaction(database)).outcome
    assert outcome == Success('[{"n":1}]')
    assert notes == [note]


@pytest.mark.parametrize(("change", "note"), CHANGES)
def test_what_threads_change_is_changed_back_before_sql_and_at_the_end(
    somewhere: None, flags: FakeFlags, change: Callable[[], None], note: str
) -> None:
    notes: list[str] = []
    now = state()
    with process_with(flags, notes) as process:
        process.has_threads()
        change()
        process.enter_sql()
        assert state() == now
        process.leave_sql()
        change()
        run(process, lambda: 1)
        assert state() == now
        change()
    assert state() == now
    assert notes == [note] * 3


def test_a_handler_that_changes_nothing_is_told_nothing(process: Process, notes: list[str]) -> None:
    run(process, lambda: os.getcwd())
    assert notes == []
    assert process.is_trusted


# Signal handlers


SA_RESTORER = 0x04000000  # the C library's own


class SigAction(ctypes.Structure):
    # Of a mask the kernel gives the first 64 bits; the others are whatever they were.
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64),
        ("more", ctypes.c_uint64 * 15),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def actions() -> list[tuple[object, ...]]:
    """The process's signal handlers, as the kernel knows them."""
    libc = ctypes.CDLL(None)
    found: list[tuple[object, ...]] = []
    for number in signal.valid_signals() - {signal.SIGRTMIN}:
        action = SigAction()
        if libc.sigaction(number, None, ctypes.byref(action)) == 0:
            found.append((number, action.handler, action.mask, action.flags & ~SA_RESTORER))
    return found


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own handlers stay what they were."""
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM]
    former = {number: signal.getsignal(number) for number in numbers}
    # What the server has set, Python cannot set again; for want of a server, what it ignores.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def fail_on_signal(*_: object) -> NoReturn:
    pytest.fail("a handler's handler was called")


DISTRUST = ": the call ended, and the next one has a new process"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_signal_handlers_that_a_handler_has_replaced_are_the_servers_again(
    handlers: None, flags: FakeFlags, number: signal.Signals
) -> None:
    notes: list[str] = []
    now = actions()
    with process_with(flags, notes) as process:
        run(process, lambda: signal.signal(number, fail_on_signal) and None)
        assert actions() == now
        assert notes == [f"a handler replaced signal handlers of the server's{DISTRUST}"]
        assert not process.is_trusted
        run(process, lambda: 1)
        assert len(notes) == 1


def test_what_the_server_ignores_it_ignores_again(handlers: None, process: Process) -> None:
    run(process, lambda: signal.signal(signal.SIGUSR1, fail_on_signal) and None)
    signal.raise_signal(signal.SIGUSR1)


def test_a_handler_that_takes_the_workers_signal_is_noted_and_the_next_can_be_interrupted(
    process: Process, flags: FakeFlags, notes: list[str]
) -> None:
    run(process, lambda: signal.signal(signal.SIGRTMIN, signal.SIG_IGN) and None)
    assert notes == [f"a handler replaced a signal handler of the worker's{DISTRUST}"]
    assert not process.is_trusted
    flags.cancel = True
    with pytest.raises(Interrupted):
        run(process, lambda: signal.raise_signal(signal.SIGRTMIN))


def test_a_process_in_which_something_was_stopped_is_distrusted(
    process: Process, flags: FakeFlags, notes: list[str]
) -> None:
    flags.cancel = True
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(process, lambda: signal.raise_signal(signal.SIGRTMIN))
    assert set(notes) == {f"a handler was stopped in the middle of Python{DISTRUST}"}
    assert not process.is_trusted
    notes.clear()
    flags.cancel = False
    run(process, lambda: 1)
    assert notes == []


# Children


def forking() -> int:
    """What became of a child that ends as a handler does: its exit code."""
    child = os.fork()
    if child == 0:
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forking_and_exiting() -> int:
    child = os.fork()
    if child == 0:
        raise SystemExit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def forking_async() -> int:
    return forking()


@contextmanager
def no_child() -> Iterator[None]:
    """Nobody but this process comes out of it: a child would run the tests that follow."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(99)


threaded = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("handler", [forking, forking_and_exiting, lambda: forking_async()])
def test_a_child_does_not_go_on_as_the_worker(process: Process, handler: Handler) -> None:
    with no_child():
        assert run(process, handler) == Success("1")


def test_a_child_of_anything_else_that_is_called_does_not_either(process: Process) -> None:
    with no_child():
        assert process.call(forking, LONG, runs_sql=False) == 1


@threaded
@pytest.mark.parametrize("handler", [forking, forking_and_exiting])
def test_a_child_of_a_thread_does_not_either(process: Process, handler: Handler) -> None:
    def in_thread() -> Result:
        with no_child():
            return runner_of(process, handler, thread=True).run_in_thread(TASK)

    executors = Executors(1)
    process.has_threads()
    assert executors.threads.submit(in_thread).result(LONG).outcome == Success("1")
    executors.shutdown(wait=True)


@threaded
def test_a_child_of_an_event_loop_does_not_either(process: Process) -> None:
    async def on_loop() -> Result:
        with no_child():
            return await runner_of(process, forking_async).run_async(TASK)

    executors = Executors(1)
    process.has_threads()
    assert executors.event_loop.submit(on_loop).result(LONG).outcome == Success("1")
    executors.shutdown(wait=True)


def test_a_child_runs_no_sql(process: Process) -> None:
    database = AutonomousDatabase(FakePlpy(), process)
    with no_child():
        child = os.fork()
        if child == 0:
            database.query("select 1", [])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


# Memory


def allocating(megabytes: int) -> Handler:
    return lambda: len(bytearray(megabytes * MB))


def limit() -> int:
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def test_a_handler_that_takes_too_much_memory_fails_and_nothing_else(notes: list[str]) -> None:
    now = limit()
    with process_with(notes=notes, memory_mb=64) as process:
        for _ in range(2):
            outcome = run(process, allocating(1024))
            assert isinstance(outcome, Failure)
            assert outcome.out_of_memory
            assert outcome.error.startswith("MemoryError (test_process.py:")
            assert limit() == now
            assert run(process, allocating(16)) == Success(str(16 * MB))
            assert len(bytearray(128 * MB)) == 128 * MB
    assert all(note.startswith("handlers ran out of memory, of which") for note in notes)


def test_a_handler_that_takes_too_much_memory_bit_by_bit_fails_too() -> None:
    def handler() -> None:
        kept: list[Any] = []
        while True:
            kept.append([kept])

    with process_with(memory_mb=16) as process:
        outcome = run(process, handler)
        assert isinstance(outcome, Failure)
        assert outcome.out_of_memory
        assert run(process, lambda: 1) == Success("1")


def test_postgresql_has_no_such_limit() -> None:
    now = limit()

    def answer() -> list[dict[str, Any]]:
        assert limit() == now
        return [{"n": len(bytearray(128 * MB))}]

    def handler(tx: Transaction) -> list[Any]:
        return [tx.execute("select 1"), len(bytearray(128 * MB))]

    with process_with(memory_mb=64) as process:
        database = AutonomousDatabase(FakePlpy({"select 1": answer}, oids=[23]), process)
        outcome = runner_of(process, handler).run(TASK, DatabaseTransaction(database)).outcome
        assert isinstance(outcome, Failure)
        assert outcome.out_of_memory


def test_threads_have_the_limit_until_there_are_no_more_handlers() -> None:
    now = limit()
    with process_with(memory_mb=64) as process:
        process.has_threads()
        for _ in range(2):
            with pytest.raises(MemoryError):
                bytearray(1024 * MB)
            run(process, lambda: 1)
        process.enter_sql()
        assert limit() == now
        process.leave_sql()
        assert limit() != now
        process.has_no_more_handlers()
        assert limit() == now
    assert limit() == now


def test_the_limit_ends_though_no_memory_is_left() -> None:
    now = limit()
    kept: list[Any] = []

    def handler() -> None:
        nonlocal kept
        while True:
            kept = [kept, 1]

    with process_with(memory_mb=32) as process:
        outcome = run(process, handler)
        assert isinstance(outcome, Failure)
        assert outcome.out_of_memory
        assert limit() == now


def test_a_limit_that_the_server_has_stays_if_it_is_lower(before: None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * MB, hard))
    for memory_mb, lower in ((64, True), (100_000, False)):
        with process_with(memory_mb=memory_mb) as process:
            outcome = run(process, limit)
            assert isinstance(outcome, Success)
            assert (int(outcome.output) < 1024 * MB) is lower
            assert int(outcome.output) <= 1024 * MB
        assert limit() == 1024 * MB


def test_a_process_that_is_distrusted_says_why(process: Process, notes: list[str]) -> None:
    assert process.is_trusted
    process.distrust("it limps")
    assert not process.is_trusted
    assert notes == [f"it limps{DISTRUST}"]
