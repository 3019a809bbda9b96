"""Run a task's handler in a process of a Dask cluster. offload.py sends this code, and asks it.

Every flow has its own copy of this package there, under a name of its own: it is one flow's.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any

from pgflow_worker import attempt, codec, secrets
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.context import Context
from pgflow_worker.errors import Interrupted, TimeIsUp, WorkerError
from pgflow_worker.executors import Executors
from pgflow_worker.flow import Flow, Step
from pgflow_worker.modules import StoredModules
from pgflow_worker.runner import decoded

WATCH_SECONDS = 0.2  # between two looks at what runs
AGAIN_SECONDS = 1.0  # before a handler that goes on is interrupted once more

# One event loop for all coroutines of this process, as in the server: an HTTP client may be kept.
_executors = Executors(0)
_lock = threading.Lock()
_modules = StoredModules({})
_module = ""
_flow_slug = ""
_OWN = __name__.partition(".")[0]
# How many handlers use this code, and when one did last: boot.py forgets what nobody uses.
running = 0
last_used = 0.0


def prepare(modules: Mapping[str, str], module: str, flow_slug: str) -> None:
    """Take note of the stored modules, once, and of the one that defines the flow."""
    global _modules, _module, _flow_slug, last_used
    with _lock:
        last_used = time.monotonic()
        if not _modules.sources:
            _modules, _module, _flow_slug = StoredModules(modules), module, flow_slug


def run(request: str) -> tuple[str, str]:
    """Call the handler. The answer: JSON with what is known of the attempt, and its output.

    request: JSON, see Offload._request(). Raises Interrupted if nobody waits for the answer.
    """
    global running, last_used
    with _lock:
        running += 1
    try:
        known, output = _run(request)
    finally:
        with _lock:
            running -= 1
            last_used = time.monotonic()
    # The package's name here is nobody's business.
    return json.dumps(known).replace(_OWN, "pgflow_worker"), output


def _run(request: str) -> tuple[dict[str, object], str]:
    asked: dict[str, Any] = json.loads(request)
    claim = asked["context"]
    worker = _Worker(asked["topic"])
    try:
        flow = _flow()
    except WorkerError as error:
        needs = "the cluster's machines need what the flow's modules import"
        return _answer("", refused=f"{error} on Dask worker {worker.address}: {needs}")
    secrets.give(flow.slug, asked["secrets"])
    step = flow.steps[asked["step_slug"]]
    context = Context(flow_slug=flow.slug, step_slug=step.slug, **claim)
    if claim["max_attempts"] == 1 and not worker.is_first():
        died = Failure("the Dask worker that ran this task died, and it must not run twice")
        return _answer("", failure=died._asdict(), duration_ms=0.0, log="")
    started = time.perf_counter()
    outcome = _outcome(step, asked, context, worker)
    duration_ms = (time.perf_counter() - started) * 1000
    known = {"duration_ms": duration_ms, "log": context.log_text}
    if isinstance(outcome, Success) and len(outcome.output) > asked["max_bytes"]:
        outcome = Failure(
            f'result of step "{step.slug}" takes {len(outcome.output)} bytes as JSON, and from a '
            f"cluster at most {asked['max_bytes']}: keep it elsewhere and return where it is"
        )
    if isinstance(outcome, Failure):
        return _answer("", failure=outcome._asdict(), **known)
    return _answer(outcome.output, **known)


def close() -> None:
    """End what this code has started, because it is not needed any more."""
    _executors.shutdown(wait=False)


def examine() -> tuple[str | None, dict[str, float]]:
    """Why the flow cannot run in this process, if so; and the resources of its Dask worker."""
    from distributed import get_worker

    try:
        _flow()
    except WorkerError as error:
        return str(error), {}
    return None, dict(get_worker().state.total_resources)


def _answer(output: str, **known: object) -> tuple[dict[str, object], str]:
    return known, output


def _flow() -> Flow:
    with _lock:
        return next(flow for flow in _modules.flows(_module) if flow.slug == _flow_slug)


def _outcome(
    step: Step, asked: Mapping[str, Any], context: Context, worker: _Worker
) -> Success | Failure:
    try:
        inputs = decoded(asked["input"], asked["run_input"])
    except codec.NotJson as error:
        return Failure(str(error))
    if step.is_async:
        return _run_async(step, inputs, context, worker)

    def call(function: Callable[[], object]) -> object:
        return _call(function, context.timeout, worker)

    return attempt.run(step, *inputs, context, None, call=call)


def _run_async(
    step: Step, inputs: tuple[object, object], context: Context, worker: _Worker
) -> Success | Failure:
    with _lock:
        event_loop = _executors.event_loop
    future = event_loop.submit(attempt.run_async, step, *inputs, context)
    watched = _Watched(future.cancel, float("inf"), worker)
    _watch.add(watched)
    try:
        return future.result()
    except CancelledError:
        return attempt.CANCELLED
    finally:
        _watch.remove(watched)


def _call(function: Callable[[], object], seconds: float, worker: _Worker) -> object:
    """Call a function for so many seconds. Raises TimeIsUp, or Interrupted if it is not wanted."""
    thread = threading.get_ident()
    until = time.monotonic() + seconds
    watched = _Watched(partial(_raise_in, thread), until, worker)
    result, error = None, None
    _watch.add(watched)
    try:
        result = function()
    except BaseException as raised:
        error = raised
    while True:
        try:
            _watch.remove(watched)
            # What is still to come arrives at the next jump back. To take it back instead would
            # leave Python 3.11 looking for it at every such point, for ever.
            for _ in range(2):
                pass
            break
        except _Stopped:
            pass
    try:
        if time.monotonic() >= until:
            raise TimeIsUp from error
        if isinstance(error, _Stopped):
            raise Interrupted("nobody waits for this task any more") from error
        if error is not None:
            raise error
        return result
    finally:
        del error


class _Stopped(BaseException):
    """Raised in a handler, at any point of it."""


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))


class _Watched:
    """A handler that runs. stop: interrupts it. until: its time."""

    def __init__(self, stop: Callable[[], object], until: float, worker: _Worker) -> None:
        self._stop = stop
        self._until = until
        self._worker = worker
        self._not_before = 0.0
        self._has_told = False

    def look(self) -> None:
        """Interrupt it if it is time, and once more if it goes on."""
        if not self._has_told:
            # Not before: the message would keep the answer of a short task waiting.
            self._worker.tell_begun()
            self._has_told = True
        now = time.monotonic()
        if now < self._not_before:
            return
        if now >= self._until or not self._worker.is_wanted():
            self._not_before = now + AGAIN_SECONDS
            self._stop()


class _Watch:
    """One thread that tells which handlers run, and interrupts them when it is time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[_Watched] = set()
        self._thread: threading.Thread | None = None

    def add(self, watched: _Watched) -> None:
        """Begin to watch."""
        with self._lock:
            self._running.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()

    def remove(self, watched: _Watched) -> None:
        """End it: nothing is interrupted any more when this returns."""
        with self._lock:
            self._running.discard(watched)

    def _look(self) -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            with self._lock:
                if not self._running:
                    self._thread = None
                    return
                for watched in self._running:
                    with suppress(Exception):  # of Dask's, while the worker ends
                        watched.look()


_watch = _Watch()


class _Worker:
    """The Dask worker of this process, and the task that it runs in this thread."""

    def __init__(self, topic: str) -> None:
        from distributed import get_worker

        self._worker = get_worker()
        self._key = self._worker.get_current_task()
        self._topic = topic
        self.address: str = self._worker.address

    def tell_begun(self) -> None:
        """Let the server know that the handler has begun."""
        self._worker.log_event(self._topic, self._key)

    def is_first(self) -> bool:
        """Whether no other process has begun this task before: Dask runs it again if one dies."""
        from distributed import Variable, get_client

        begun = Variable(f"pgflow_worker/{self._key}", client=get_client())
        try:
            begun.get(timeout=0.01)
        except TimeoutError:
            begun.set(True)
            return True
        return False

    def is_wanted(self) -> bool:
        """Whether the scheduler has not taken the task back, as it does if nobody waits for it."""
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state not in ("cancelled", "released")
