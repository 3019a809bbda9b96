"""Conflicts with other transactions are tried again, and cancels explained."""

from collections.abc import Callable

import pytest

from pgflow_worker.database import CONFLICT_TRIES, confirmed, retrying
from pgflow_worker.errors import DatabaseError, Interrupted, QueryCanceled
from tests.unit.fakes import FakeDatabase


def failing(times: int, error: BaseException) -> tuple[Callable[[], str], list[int]]:
    """An action that fails so many times, and its calls."""
    calls: list[int] = []

    def action() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return action, calls


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
@pytest.mark.parametrize("times", range(CONFLICT_TRIES))
def test_a_conflict_is_tried_again(sqlstate: str, times: int) -> None:
    action, calls = failing(times, DatabaseError("conflict", sqlstate))
    assert retrying(action) == "done"
    assert len(calls) == times + 1


def test_a_conflict_that_stays_is_raised() -> None:
    action, calls = failing(100, DatabaseError("conflict", "40P01"))
    with pytest.raises(DatabaseError, match="conflict"):
        retrying(action)
    assert len(calls) == CONFLICT_TRIES


@pytest.mark.parametrize(
    "error", [DatabaseError("duplicate", "23505"), ValueError("duplicate"), QueryCanceled("dupl")]
)
def test_other_errors_are_raised_at_once(error: BaseException) -> None:
    action, calls = failing(100, error)
    with pytest.raises(type(error), match="dupl"):
        retrying(action)
    assert len(calls) == 1


# Cancels


def test_why_something_was_interrupted_is_postgresqls_to_say() -> None:
    own = QueryCanceled("due to statement timeout")
    database = FakeDatabase({"[check interrupts]": own})
    assert confirmed(database, Interrupted("canceling statement")) is own


def test_a_cancel_of_which_postgresql_does_not_know_any_more_stays() -> None:
    error = Interrupted("canceling statement")
    assert confirmed(FakeDatabase(), error) is error


def test_postgresqls_own_cancel_needs_no_other() -> None:
    error = QueryCanceled("due to statement timeout")
    database = FakeDatabase({"[check interrupts]": QueryCanceled("another")})
    assert confirmed(database, error) is error
    assert database.events == []
