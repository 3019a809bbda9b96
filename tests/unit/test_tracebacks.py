"""Exceptions as text."""

import asyncio
import traceback

import pytest

from pgflow_worker import tracebacks
from pgflow_worker.codec import NotJson, decode
from pgflow_worker.tracebacks import format_traceback, printable, reason, text_of


class BrokenError(Exception):
    def __str__(self) -> str:
        raise SystemExit


def raised(error: BaseException) -> BaseException:
    """The error with the traceback of having been raised here."""
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä😀\n", "plain ä😀\n"),
        ("\0", "\\0"),
        ("\ud800x\udfff", "\\ud800x\\udfff"),
        ("", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("error", "text", "named"),
    [
        (ValueError("x"), "x", "ValueError: x"),
        (KeyError("url"), "'url'", "KeyError: 'url'"),
        (ValueError(), "", "ValueError"),
        (SystemExit(3), "3", "SystemExit: 3"),
        (ValueError("\0"), "\\0", "ValueError: \\0"),
        (BrokenError(), "(its text cannot be made)", "BrokenError: (its text cannot be made)"),
    ],
)
def test_text_and_reason(error: BaseException, text: str, named: str) -> None:
    assert text_of(error) == text
    assert reason(error) == named


def test_a_traceback_of_others_is_as_python_prints_it() -> None:
    error = raised(ValueError("x"))
    error.add_note("a note")
    assert format_traceback(error) == "".join(traceback.format_exception(error))


def test_the_packages_own_frames_are_left_out() -> None:
    try:
        decode("{")
    except NotJson as error:
        text = format_traceback(error)
    assert "in test_the_packages_own_frames_are_left_out" in text
    assert tracebacks._OWN not in text
    assert text.endswith(
        "NotJson: the input cannot be read as JSON: Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)\n"
    )


def test_the_packages_own_frames_are_left_out_of_causes_and_groups() -> None:
    try:
        decode("{")
    except NotJson as error:
        cause = error
    outer = ValueError("outer")
    outer.__cause__ = cause
    for told in (outer, ExceptionGroup("group", [cause])):
        assert tracebacks._OWN not in format_traceback(raised(told))


def test_asyncios_frames_below_ones_own_code_stay() -> None:
    async def handler() -> None:
        await asyncio.wait_for(asyncio.sleep(1), 0.001)

    try:
        asyncio.run(handler())
    except TimeoutError as error:
        text = format_traceback(error)
    assert "await asyncio.wait_for" in text
    assert "in wait_for" in text


def test_causes_contexts_and_groups_are_told() -> None:
    error = ValueError("outer")
    error.__cause__ = raised(KeyError("cause"))
    error.__cause__.__context__ = raised(TypeError("context"))
    text = format_traceback(raised(ExceptionGroup("group", [error])))
    for part in ("outer", "'cause'", "context", "group (1 sub-exception)"):
        assert part in text


def test_an_error_that_causes_itself_is_told_once() -> None:
    one, two = raised(ValueError("one")), raised(ValueError("two"))
    one.__context__, two.__context__ = two, one
    assert format_traceback(one).count("ValueError: one") == 1
