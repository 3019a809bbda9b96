"""One attempt: call a handler, check what it returns, describe what went wrong."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import NamedTuple, TypeVar

from pgflow_worker import codec
from pgflow_worker.context import Context
from pgflow_worker.errors import DatabaseError, Fail, QueryCanceled, Retry, Snooze, TimeIsUp
from pgflow_worker.flow import Handler, Step
from pgflow_worker.tracebacks import format_traceback, printable, reason, text_of

MAX_ERROR = 1_000  # characters: pgflow repeats the error in its events
MAX_TRACEBACK = 10_000
# What most handlers return: no need to ask whether it can be awaited.
_PLAIN = (type(None), bool, int, float, str, list, dict)


T = TypeVar("T")
Caller = Callable[[Callable[[], object]], object]


class Success(NamedTuple):
    """The handler's result as JSON."""

    output: str


class Failure(NamedTuple):
    """Why an attempt failed.

    final: no further attempts. after: seconds until the next one, if the handler chose them.
    is_snooze: the attempt is not to count. sqlstate: of a DatabaseError. out_of_memory: it ran
    into the limit of memory.
    """

    error: str
    traceback: str = ""
    final: bool = False
    after: float | None = None
    is_snooze: bool = False
    sqlstate: str | None = None
    out_of_memory: bool = False


# A handler can cancel the asyncio task that it runs in; then there is nothing but that.
CANCELLED = Failure("the handler cancelled itself")


def directly(function: Callable[[], T]) -> T:
    """Call a function; where nothing can interrupt it."""
    return function()


def run(
    step: Step,
    task_input: object,
    flow_input: object,
    context: Context,
    transaction: object,
    handler: Handler | None = None,
    call: Caller = directly,
) -> Success | Failure:
    """Call the step's handler, or the one that replaces it, and check what it returns.

    call: calls the handler, and may raise TimeIsUp. Whatever a handler raises, SystemExit and
    KeyboardInterrupt included, is the task's failure; only QueryCanceled passes through, because
    it is meant for the whole call.
    """
    handler = handler or step.handler

    def called() -> object:
        result = step.call(task_input, flow_input, context, transaction, handler)
        if not isinstance(result, _PLAIN) and inspect.isawaitable(result):
            return _wait_for(result)
        return result

    try:
        return _checked(step, call(called))
    except QueryCanceled:
        raise
    except TimeIsUp as error:
        return took_too_long(step.slug, context.timeout, error.__cause__)
    except BaseException as error:
        return failure(error, handler)


async def run_async(
    step: Step,
    task_input: object,
    flow_input: object,
    context: Context,
    handler: Handler | None = None,
) -> Success | Failure:
    """As run(), on the running event loop, for at most as long as the step's timeout."""
    handler = handler or step.handler
    limit = _Limit(context)
    try:
        result = step.call(task_input, flow_input, context, None, handler)
        if inspect.isawaitable(result):
            result = await result
        outcome = _checked(step, result)
    except BaseException as error:
        outcome = failure(error, handler)
    if limit.lift():
        return took_too_long(step.slug, context.timeout)
    return outcome


class _Limit:
    """Cancels the current task when its step's time is up.

    asyncio.timeout() would count the time in which the loop stood still, see Context.remaining().
    """

    def __init__(self, context: Context) -> None:
        import asyncio

        self._context = context
        self._exceeded = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(context.remaining(), self._check)

    def lift(self) -> bool:
        """Stop watching; whether the time was up."""
        self._timer.cancel()
        return self._exceeded

    def _check(self) -> None:
        remaining = self._context.remaining()
        if remaining > 0:
            self._timer = self._loop.call_later(remaining, self._check)
            return
        self._exceeded = True
        if self._task is not None:
            self._task.cancel()
        # A handler may swallow it and go on.
        self._timer = self._loop.call_later(1, self._check)


def _checked(step: Step, result: object) -> Success | Failure:
    if step.must_return_list and not isinstance(result, list | tuple):
        reader = f', and map step "{step.feeds_map}" needs a list' if step.feeds_map else ""
        return _refused(f'step "{step.slug}" returned {type(result).__name__}, not a list{reader}')
    return _encoded(step, result)


def _encoded(step: Step, result: object) -> Success | Failure:
    try:
        return Success(codec.encode(result))
    except codec.NotJson as error:
        return _refused(f'result of step "{step.slug}": {error}')


def took_too_long(step_slug: str, timeout: float, ended_by: BaseException | None = None) -> Failure:
    """The failure of a handler whose step's time was up; `ended_by` shows where it was."""
    traceback = "" if ended_by is None else format_traceback(ended_by)[-MAX_TRACEBACK:]
    return Failure(f'step "{step_slug}" took longer than {timeout:g} s', traceback)


def failure(error: BaseException, handler: Handler) -> Failure:
    """Describe an exception: `KeyError: 'url' (analyze_website.py:42, in summary)`."""
    # `raise Fail("the page is gone")` needs no name before its reason.
    text = (isinstance(error, Fail | Retry | Snooze) and text_of(error)) or reason(error)
    location = _location(error.__traceback__, handler)
    return Failure(
        text[:MAX_ERROR] + (f" ({location})" if location else ""),
        format_traceback(error)[-MAX_TRACEBACK:],
        final=isinstance(error, Fail),
        after=error.after if isinstance(error, Retry | Snooze) else None,
        is_snooze=isinstance(error, Snooze),
        sqlstate=error.sqlstate if isinstance(error, DatabaseError) else None,
        out_of_memory=isinstance(error, MemoryError),
    )


def _refused(text: str) -> Failure:
    return Failure(printable(text)[:MAX_ERROR])


def _wait_for(awaitable: Awaitable[object]) -> object:
    # Imported by the first handler that needs it: asyncio costs a fresh interpreter 25 ms.
    import asyncio

    async def main() -> object:
        return await awaitable

    return asyncio.run(main())


def _location(frames: TracebackType | None, handler: Handler) -> str | None:
    """The innermost frame in the handler's own package; without one, the innermost of all."""
    package = _package(handler.__module__)
    found = innermost = None
    for frame in _walk(frames):
        name = _package(frame.tb_frame.f_globals.get("__name__"))
        if name == package:
            found = frame
        if name != _package(__name__):
            innermost = frame
    found = found or innermost
    if found is None:
        return None
    code = found.tb_frame.f_code
    return f"{code.co_filename.rpartition('/')[2]}:{found.tb_lineno}, in {code.co_name}"


def _package(module: object) -> str:
    return str(module).partition(".")[0]


def _walk(frames: TracebackType | None) -> Iterator[TracebackType]:
    while frames is not None:
        yield frames
        frames = frames.tb_next
