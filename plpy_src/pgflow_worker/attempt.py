"""One attempt: call a handler, check what it returns, describe what went wrong."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from types import TracebackType

from pgflow_worker import codec
from pgflow_worker.errors import DatabaseError, Fail, QueryCanceled
from pgflow_worker.flow import Handler, Step
from pgflow_worker.tracebacks import format_traceback, printable, reason, text_of

MAX_ERROR = 1_000  # characters: pgflow repeats the error in its events
MAX_TRACEBACK = 10_000


@dataclass(frozen=True)
class Success:
    """The handler's result as JSON."""

    output: str


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed. `final`: no further attempts. `sqlstate`: of a DatabaseError."""

    error: str
    traceback: str = ""
    final: bool = False
    sqlstate: str | None = None


def run(
    step: Step,
    task_input: object,
    flow_input: object,
    context: object,
    transaction: object,
    handler: Handler | None = None,
) -> Success | Failure:
    """Call the step's handler, or the one that replaces it, and check what it returns.

    Whatever it raises, SystemExit and KeyboardInterrupt included, is the task's failure; only
    QueryCanceled passes through, because it is meant for the whole call.
    """
    handler = handler or step.handler
    try:
        result = step.call(task_input, flow_input, context, transaction, handler)
        if inspect.isawaitable(result):
            result = _wait_for(result)
        if step.must_return_list and not isinstance(result, list | tuple):
            reader = f', and map step "{step.feeds_map}" needs a list' if step.feeds_map else ""
            return _refused(
                f'step "{step.slug}" returned {type(result).__name__}, not a list{reader}'
            )
        return _encoded(step, result)
    except QueryCanceled:
        raise
    except BaseException as error:
        return failure(error, handler)


def _encoded(step: Step, result: object) -> Success | Failure:
    try:
        return Success(codec.encode(result))
    except codec.NotJson as error:
        return _refused(f'result of step "{step.slug}": {error}')


def failure(error: BaseException, handler: Handler) -> Failure:
    """Describe an exception: `KeyError: 'url' (analyze_website.py:42, in summary)`."""
    # `raise Fail("the page is gone")` needs no name before its reason.
    text = (isinstance(error, Fail) and text_of(error)) or reason(error)
    location = _location(error.__traceback__, handler)
    return Failure(
        text[:MAX_ERROR] + (f" ({location})" if location else ""),
        format_traceback(error)[-MAX_TRACEBACK:],
        final=isinstance(error, Fail),
        sqlstate=error.sqlstate if isinstance(error, DatabaseError) else None,
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
