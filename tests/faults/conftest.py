"""The sessions of tests/database, and a flow whose handler waits."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, background, other, role, session

__all__ = ["background", "other", "role", "session"]

Background = Callable[..., "Future[Any]"]

# Returns its input after it has waited for the advisory lock 1, if it is told to.
STEPS = """
    flow = Flow("f", max_attempts=3, base_delay=1)

    @flow.step
    def first(flow_input, tx: Transaction):
        if flow_input == "wait":
            tx.execute("select pg_advisory_xact_lock(1)")
        return flow_input

    @flow.step
    def second(first): return first
"""


@pytest.fixture
def third(connect: Callable[..., Connection]) -> Session:
    """A session to look on with, while the two others hold each other up."""
    return Session(connect())


@pytest.fixture
def waiting(session: Session, other: Session, background: Background) -> "Future[Any]":
    """A call whose first handler waits for the second session; another run is behind it."""
    session.deploy(STEPS)
    session.start("f", "wait")
    session.start("f", "behind")
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "f", mode="drain")
    other.until(WAITING, 1)
    return call


def go_on(other: Session) -> None:
    """Let the handler of `waiting` go on."""
    other.run("select pg_advisory_unlock(1)")


def outputs(session: Session) -> list[Any]:
    """The results of the flow's runs, oldest first; None of those that have not completed."""
    rows = session.rows("select output -> 'second' from pgflow.runs order by started_at")
    return [output for (output,) in rows]


def attempts(session: Session) -> list[tuple[Any, ...]]:
    return session.rows(
        "select outcome, error from pgflow_worker.attempts where outcome <> 'completed' "
        "order by attempt_id"
    )
