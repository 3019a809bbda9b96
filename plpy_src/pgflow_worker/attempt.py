"""One attempt: call a handler, check what it returns, describe what went wrong."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from types import TracebackType

from pgflow_worker import codec
from pgflow_worker.errors import DatabaseError, Fail, QueryCanceled
from pgflow_worker.flow import Handler, Step

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
    except QueryCanceled:
        raise
    except BaseException as error:
        return failure(error, handler)
    if step.must_return_list and not isinstance(result, list | tuple):
        reader = f', and map step "{step.feeds_map}" needs a list' if step.feeds_map else ""
        return Failure(f'step "{step.slug}" returned {type(result).__name__}, not a list{reader}')
    try:
        return Success(codec.encode(result))
    except codec.NotJson as error:
        return Failure(f'result of step "{step.slug}": {error}')


def failure(error: BaseException, handler: Handler) -> Failure:
    """Describe an exception: `KeyError: 'url' (analyze_website.py:42, in summary)`."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames):
        frames = frames.tb_next
    location = _location(frames, handler)
    reason = _text(error) if isinstance(error, Fail) else _named(error)
    lines = traceback.format_exception(error.with_traceback(frames))
    return Failure(
        printable(reason)[:MAX_ERROR] + (f" ({location})" if location else ""),
        printable("".join(lines))[-MAX_TRACEBACK:],
        final=isinstance(error, Fail),
        sqlstate=error.sqlstate if isinstance(error, DatabaseError) else None,
    )


def printable(text: str) -> str:
    """The text without what PostgreSQL's text cannot hold: NUL and lone surrogates."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _wait_for(awaitable: Awaitable[object]) -> object:
    # Imported by the first handler that needs it: asyncio costs a fresh interpreter 25 ms.
    import asyncio

    async def main() -> object:
        return await awaitable

    return asyncio.run(main())


def _named(error: BaseException) -> str:
    text = _text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an exception's own __str__ may be broken
        return "(its text cannot be made)"


def _is_ours(frames: TracebackType) -> bool:
    name = str(frames.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] == __name__.partition(".")[0]


def _location(frames: TracebackType | None, handler: Handler) -> str | None:
    """The innermost frame in the handler's own package; without one, the innermost of all."""
    package = handler.__module__.partition(".")[0]
    innermost = own = None
    for frame in _walk(frames):
        innermost = frame
        if str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0] == package:
            own = frame
    found = own or innermost
    if found is None:
        return None
    code = found.tb_frame.f_code
    return f"{code.co_filename.rpartition('/')[2]}:{found.tb_lineno}, in {code.co_name}"


def _walk(frames: TracebackType | None) -> Iterator[TracebackType]:
    while frames is not None:
        yield frames
        frames = frames.tb_next
