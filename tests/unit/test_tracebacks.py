"""Exceptions as text."""

import pytest

from pgflow_worker.tracebacks import format_traceback, printable, reason


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


def test_the_cause_is_told_as_well() -> None:
    try:
        try:
            raise KeyError("url")
        except KeyError as error:
            raise ValueError("no page") from error
    except ValueError as error:
        caught = error
    assert reason(caught) == "ValueError: no page"
    text = format_traceback(caught)
    assert "KeyError: 'url'" in text
    assert text.endswith("ValueError: no page\n")
