"""Where concurrent handlers run: coroutines on an event loop, blocking ones in threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

SHUTDOWN_SECONDS = 3
P = ParamSpec("P")
T = TypeVar("T")


class Executors:
    """The executors of one call of work(), each made when it is first needed.

    Neither costs anything before: importing asyncio takes a fresh interpreter 25 ms.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers = max_workers
        self._loop: EventLoopExecutor | None = None
        self._threads: Executor | None = None

    @property
    def event_loop(self) -> EventLoopExecutor:
        """Runs what coroutine functions return."""
        if self._loop is None:
            self._loop = EventLoopExecutor()
        return self._loop

    @property
    def threads(self) -> Executor:
        """Runs functions in threads."""
        if self._threads is None:
            self._threads = _thread_pool(self._max_workers)
        return self._threads

    @property
    def has_event_loop(self) -> bool:
        """Whether an event loop was needed; what is bound to it dies with it."""
        return self._loop is not None

    def shutdown(self, *, wait: bool) -> None:
        """Cancel what has not ended. `wait`: until the threads have, which cannot be cancelled."""
        if self._loop is not None:
            self._loop.shutdown()
        if self._threads is not None:
            self._threads.shutdown(wait, cancel_futures=True)


class EventLoopExecutor(Executor):
    """An Executor for coroutine functions: one event loop in a thread of its own."""

    def __init__(self) -> None:
        import asyncio

        self._asyncio = asyncio
        self._loop = asyncio.new_event_loop()
        self._closing = False
        # A daemon, so that a Dask worker can end, in which nobody shuts it down.
        self._thread = threading.Thread(
            target=self._run, name="pgflow_worker event loop", daemon=True
        )
        with signals_blocked():
            self._thread.start()

    def submit(  # type: ignore[override]  # a coroutine function, and the future of its result
        self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Run the coroutine that `fn` returns."""
        return self._asyncio.run_coroutine_threadsafe(fn(*args, **kwargs), self._loop)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:  # noqa: ARG002
        """Cancel the coroutines that are left, and end the loop.

        What blocks the loop, or refuses to be cancelled, is waited for only a moment.
        """
        self._closing = True
        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SHUTDOWN_SECONDS)

    def _run(self) -> None:
        loop = self._loop
        while not self._closing:
            # A task that a handler made may stop the loop, or end it with SystemExit.
            with suppress(BaseException):
                loop.run_forever()
        with suppress(BaseException):
            self._cancel_all()
        with suppress(BaseException):
            generators = self._asyncio.wait_for(loop.shutdown_asyncgens(), timeout=1)
            loop.run_until_complete(generators)
        loop.close()

    def _cancel_all(self) -> None:
        tasks = self._asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            # Those that refuse are left behind with their loop.
            self._loop.run_until_complete(self._asyncio.wait(tasks, timeout=1))


def _thread_pool(max_workers: int) -> Executor:
    from concurrent.futures import ThreadPoolExecutor

    class Threads(ThreadPoolExecutor):
        """Whose threads, which start when they are first needed, take no signals."""

        def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
            with signals_blocked():
                return super().submit(fn, *args, **kwargs)

    return Threads(max_workers, thread_name_prefix="pgflow_worker")


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start threads with all signals blocked: PostgreSQL's are for the main thread alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
