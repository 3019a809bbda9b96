"""Exceptions as text: without this package's own frames, and as PostgreSQL can store it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_OWN = os.path.dirname(__file__) + os.sep
_ASYNCIO = f"{os.sep}asyncio{os.sep}"
HIDDEN = "***"

# What no text may show, the longest first.
_hidden: tuple[str, ...] = ()


def reason(error: BaseException) -> str:
    """The exception as `KeyError: 'url'`."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def text_of(error: BaseException) -> str:
    """The exception's message."""
    try:
        return printable(str(error))
    except BaseException:  # an exception's own __str__ may be broken in any way
        return "(its text cannot be made)"


def format_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, from the frames that are not this package's."""
    described = traceback.TracebackException.from_exception(error)
    pending = [described]
    while pending:
        one = pending.pop()
        frames = list(one.stack)
        # An async handler is called through this package and then asyncio.
        while frames and (_is_own(frames[0]) or _ASYNCIO in frames[0].filename):
            del frames[0]
        one.stack = traceback.StackSummary.from_list([f for f in frames if not _is_own(f)])
        pending += [linked for linked in (one.__cause__, one.__context__) if linked is not None]
        pending += one.exceptions or []
    return printable("".join(described.format()))


def _is_own(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_OWN)


def printable(text: str) -> str:
    """The text without what it may not show, see hide(), and what PostgreSQL's cannot hold:

    NUL and lone surrogates.
    """
    for hidden in _hidden:
        text = text.replace(hidden, HIDDEN)
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def hide(texts: Iterable[str]) -> None:
    """Let printable() replace these as well, until hiding() ends."""
    global _hidden
    _hidden = tuple(sorted({*_hidden, *texts}, key=len, reverse=True))


@contextmanager
def hiding() -> Iterator[None]:
    """What hide() is told meanwhile holds until the end of this."""
    global _hidden
    former = _hidden
    try:
        yield
    finally:
        _hidden = former
