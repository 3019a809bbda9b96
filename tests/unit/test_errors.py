"""Errors: a SQLSTATE of one's own, and the texts PostgreSQL's way."""

import inspect

import pytest

from pgflow_worker import errors
from pgflow_worker.errors import DatabaseError, Fail, FlowError, QueryCanceled, WorkerError

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
