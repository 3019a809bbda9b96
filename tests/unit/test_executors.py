"""Where concurrent handlers run: what they may do to their loop, and how it ends."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import pgflow_worker
from pgflow_worker.executors import EventLoopExecutor, Executors, signals_blocked

SOON = 5  # seconds until a test gives up; no test needs them
LOOP_THREAD = "pgflow_worker event loop"


@pytest.fixture
def executors() -> Iterator[Executors]:
    executors = Executors(2)
    yield executors
    executors.shutdown(wait=True)


@pytest.fixture
def loop(executors: Executors) -> EventLoopExecutor:
    return executors.event_loop


def blocked_signals() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


# A thread cannot block these.
ALL_SIGNALS = {int(number) for number in signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP}


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


async def endless() -> None:
    await asyncio.Event().wait()


def started(executor: EventLoopExecutor, ended: list[BaseException]) -> Future[None]:
    """The future of an endless coroutine that has begun and will tell how it ended."""
    begun = threading.Event()

    async def run() -> None:
        begun.set()
        try:
            await endless()
        except BaseException as error:
            ended.append(error)
            raise

    future = executor.submit(run)
    assert begun.wait(SOON)
    return future


# Before need


def test_nothing_is_imported_or_started_before_it_is_needed() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(pgflow_worker.__file__).parents[1])!r})\n"
        "import threading\n"
        "from pgflow_worker.executors import Executors\n"
        "executors = Executors(5)\n"
        "executors.shutdown(wait=True)\n"
        "print(executors.has_event_loop, threading.active_count())\n"
        "print(sorted({'asyncio', 'concurrent.futures.thread'} & set(sys.modules)))\n"
        "executors = Executors(5)\n"
        "print(executors.threads.submit(int).result(), 'asyncio' in sys.modules)\n"
        "executors.shutdown(wait=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["False 1", "[]", "0 False"]


def test_the_executors_are_made_once(executors: Executors) -> None:
    assert not executors.has_event_loop
    assert executors.event_loop is executors.event_loop
    assert executors.has_event_loop
    assert executors.threads is executors.threads


# Signals


def test_the_loops_thread_takes_no_signals(loop: EventLoopExecutor) -> None:
    async def blocked() -> set[int]:
        return blocked_signals()

    assert loop.submit(blocked).result(SOON) >= ALL_SIGNALS


def test_threads_that_a_coroutine_starts_take_no_signals(loop: EventLoopExecutor) -> None:
    async def blocked() -> set[int]:
        return await asyncio.to_thread(blocked_signals)

    assert loop.submit(blocked).result(SOON) >= ALL_SIGNALS


def test_the_threads_of_handlers_take_no_signals(executors: Executors) -> None:
    together = threading.Barrier(2)

    def blocked() -> set[int]:
        together.wait(SOON)
        return blocked_signals()

    futures = [executors.threads.submit(blocked) for _ in range(2)]
    assert all(future.result(SOON) >= ALL_SIGNALS for future in futures)


def test_the_main_thread_takes_its_signals_as_before(executors: Executors) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        executors.event_loop.submit(asyncio.sleep, 0).result(SOON)
        executors.threads.submit(int).result(SOON)
        assert blocked_signals() == {int(number) for number in before} | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signals_are_taken_again_after_an_error() -> None:
    before = blocked_signals()
    with pytest.raises(ValueError, match="x"), signals_blocked():
        raise ValueError("x")
    assert blocked_signals() == before


# The loop


def test_all_coroutines_run_on_one_loop_in_one_thread(loop: EventLoopExecutor) -> None:
    async def where() -> tuple[int, int]:
        return id(asyncio.get_running_loop()), threading.get_ident()

    places = {loop.submit(where).result(SOON) for _ in range(3)}
    assert len(places) == 1
    assert threading.get_ident() not in {thread for _, thread in places}


def test_coroutines_run_beside_each_other(loop: EventLoopExecutor) -> None:
    meeting = asyncio.Barrier(3)
    futures = [loop.submit(meeting.wait) for _ in range(3)]
    assert sorted(future.result(SOON) for future in futures) == [0, 1, 2]


def test_arguments_and_errors_pass_through(loop: EventLoopExecutor) -> None:
    async def divide(one: int, *, by: int) -> float:
        return one / by

    assert loop.submit(divide, 4, by=2).result(SOON) == 2
    with pytest.raises(ZeroDivisionError):
        loop.submit(divide, 4, by=0).result(SOON)


def exit_in_a_task() -> None:
    async def exits() -> None:
        raise SystemExit(3)

    task = asyncio.get_running_loop().create_task(exits())
    # Otherwise asyncio complains that nobody asked for its exception.
    task.add_done_callback(asyncio.Task.exception)


def exit_in_a_callback() -> None:
    def exits() -> None:
        raise KeyboardInterrupt

    asyncio.get_running_loop().call_soon(exits)


def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()


@pytest.mark.parametrize("harm", [exit_in_a_task, exit_in_a_callback, stop_the_loop])
def test_a_handler_cannot_end_the_loop(loop: EventLoopExecutor, harm: Callable[[], None]) -> None:
    async def harming() -> str:
        harm()
        for _ in range(5):
            await asyncio.sleep(0)
        return "done"

    async def another() -> str:
        return "goes on"

    ended: list[BaseException] = []
    beside = started(loop, ended)
    assert loop.submit(harming).result(SOON) == "done"
    assert loop.submit(another).result(SOON) == "goes on"
    assert not beside.done()
    assert ended == []


# Shutdown


def test_shutdown_cancels_coroutines_and_ends_the_thread() -> None:
    executors = Executors(2)
    ended: list[BaseException] = []
    future = started(executors.event_loop, ended)
    executors.shutdown(wait=True)
    assert [type(error) for error in ended] == [asyncio.CancelledError]
    assert future.cancelled()
    assert threads(LOOP_THREAD) == []


def test_shutdown_without_waiting_ends_the_loop_all_the_same() -> None:
    executors = Executors(2)
    ended: list[BaseException] = []
    started(executors.event_loop, ended)
    executors.shutdown(wait=False)
    assert len(ended) == 1
    assert threads(LOOP_THREAD) == []


def test_a_coroutine_that_has_not_begun_is_cancelled_too() -> None:
    loop = EventLoopExecutor()
    hold, held = threading.Event(), threading.Event()

    async def holding() -> None:
        held.set()
        hold.wait(SOON)

    loop.submit(holding)
    assert held.wait(SOON)
    future = loop.submit(endless)
    hold.set()
    loop.shutdown()
    assert future.cancelled()


def test_a_coroutine_may_clean_up_when_it_is_cancelled() -> None:
    loop = EventLoopExecutor()
    begun, cleaned = threading.Event(), threading.Event()

    async def run() -> None:
        try:
            begun.set()
            await endless()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    loop.submit(run)
    assert begun.wait(SOON)
    loop.shutdown()
    assert cleaned.is_set()


@pytest.mark.parametrize("harm", [exit_in_a_task, exit_in_a_callback, stop_the_loop])
def test_a_coroutine_that_does_harm_when_it_is_cancelled_ends_too(harm: Callable[[], None]) -> None:
    loop = EventLoopExecutor()
    begun = threading.Event()

    async def run() -> None:
        begun.set()
        try:
            await endless()
        finally:
            harm()

    loop.submit(run)
    assert begun.wait(SOON)
    loop.shutdown()
    assert threads(LOOP_THREAD) == []


def test_an_asynchronous_generator_is_closed() -> None:
    loop = EventLoopExecutor()
    closed: list[bool] = []
    generators: list[Any] = []

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            closed.append(True)

    async def first() -> int:
        generators.append(numbers())
        number: int = await anext(generators[0])
        return number

    assert loop.submit(first).result(SOON) == 1
    loop.shutdown()
    assert closed == [True]


def test_what_blocks_the_loop_is_waited_for_only_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgflow_worker.executors.SHUTDOWN_SECONDS", 0.01)
    loop = EventLoopExecutor()
    hold, held = threading.Event(), threading.Event()

    async def holding() -> None:
        held.set()
        hold.wait(SOON)

    future = loop.submit(holding)
    assert held.wait(SOON)
    loop.shutdown()
    [thread] = threads(LOOP_THREAD)
    assert not future.done()
    hold.set()
    thread.join(SOON)
    assert threads(LOOP_THREAD) == []


def test_shutdown_twice_is_like_once() -> None:
    executors = Executors(2)
    started(executors.event_loop, [])
    executors.threads.submit(int).result(SOON)
    for _ in range(2):
        executors.shutdown(wait=True)
    executors.shutdown(wait=False)
    assert threads("pgflow_worker") == []
    assert executors.has_event_loop


def test_shutdown_waits_for_threads_if_it_is_to() -> None:
    executors = Executors(1)
    begun, hold = threading.Event(), threading.Event()

    def holding() -> str:
        begun.set()
        hold.wait(SOON)
        return "done"

    running = executors.threads.submit(holding)
    waiting = executors.threads.submit(holding)
    assert begun.wait(SOON)
    executors.shutdown(wait=False)
    assert not running.done()
    assert waiting.cancelled()
    hold.set()
    executors.shutdown(wait=True)
    assert running.result(0) == "done"
    assert threads("pgflow_worker") == []


# Threads


def test_there_are_as_many_threads_as_places(executors: Executors) -> None:
    together = threading.Barrier(2)
    futures = [executors.threads.submit(together.wait, SOON) for _ in range(4)]
    assert sorted(future.result(SOON) for future in futures) == [0, 0, 1, 1]
    assert len(threads("pgflow_worker_")) == 2
