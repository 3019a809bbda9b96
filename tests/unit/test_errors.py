"""Errors: a SQLSTATE of one's own, and the texts PostgreSQL's way."""

import inspect
import re

import pytest

from pgflow_worker import errors
from pgflow_worker.errors import (
    MAX_AFTER,
    DatabaseError,
    Fail,
    FlowError,
    Interrupted,
    QueryCanceled,
    Retry,
    Snooze,
    WorkerError,
)

OURS = [
    error
    for error in vars(errors).values()
    if inspect.isclass(error) and issubclass(error, WorkerError) and error is not WorkerError
]


def test_every_error_has_a_sqlstate_of_its_own() -> None:
    states = [error.sqlstate for error in OURS]
    assert len(set(states)) == len(states) > 5
    assert all(len(state) == 5 and state.startswith("PW") for state in states)
    assert WorkerError.sqlstate not in states


@pytest.mark.parametrize("error", OURS)
def test_every_error_says_what_it_means(error: type[WorkerError]) -> None:
    assert error.__doc__
    assert error.__doc__ != WorkerError.__doc__


def test_message_hint_and_detail() -> None:
    error = FlowError("message", hint="Hint.", detail="Detail.")
    assert (str(error), error.hint, error.detail) == ("message", "Hint.", "Detail.")
    assert (FlowError("message").hint, FlowError("message").detail) == (None, None)
    assert isinstance(error, ValueError)


def test_a_database_error_tells_what_happened() -> None:
    error = DatabaseError("duplicate key", "23505", "Key exists.", "Choose another.")
    assert str(error) == "duplicate key"
    assert (error.sqlstate, error.detail, error.hint) == (
        "23505",
        "Key exists.",
        "Choose another.",
    )
    assert not isinstance(error, WorkerError)


def test_a_cancel_is_no_exception_that_a_handler_catches_by_accident() -> None:
    assert not issubclass(QueryCanceled, Exception)
    assert issubclass(Fail, Exception)
    assert issubclass(Interrupted, QueryCanceled)
    assert Interrupted.sqlstate == "57014"


# Retry and Snooze


@pytest.mark.parametrize("kind", [Retry, Snooze])
@pytest.mark.parametrize("after", [0, 0.5, 60, MAX_AFTER])
def test_a_time_until_the_next_attempt(kind: type[Retry], after: float) -> None:
    assert kind(after=after).after == after
    assert str(kind(after=after)) == f"again after {after:g} s"
    assert str(kind("busy", after=after)) == "busy"


@pytest.mark.parametrize("kind", [Retry, Snooze])
@pytest.mark.parametrize(
    "after", [-1, -0.001, MAX_AFTER + 1, 10**30, float("nan"), float("inf"), float("-inf")]
)
def test_a_time_that_is_none_is_refused(kind: type[Retry], after: float) -> None:
    with pytest.raises(ValueError, match=f"^after must be .* not {re.escape(repr(after))}$"):
        kind(after=after)


@pytest.mark.parametrize("kind", [Retry, Snooze])
def test_a_time_is_asked_for(kind: type[Retry]) -> None:
    with pytest.raises(TypeError, match="after"):
        kind("busy")  # type: ignore[call-arg]
