"""Deadlocks, serialization failures, locks, and commits that fail."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.database.conftest import WAITING, Session, counts
from tests.database.test_protocol import WAITER
from tests.faults.conftest import STEPS, attempts

Background = Callable[..., "Future[Any]"]


# Conflicts


def lose_deadlocks(session: Session, other: Session) -> None:
    """Let the worker be the one that notices, and so the one that PostgreSQL ends."""
    session.run("set deadlock_timeout = '1s'")
    other.run("set deadlock_timeout = '20s'")


def test_a_deadlock_between_a_handlers_row_and_its_run(
    session: Session, other: Session, third: Session, background: Background
) -> None:
    """Nothing: the handler is called again, and no attempt is counted."""
    session.run("create table stock (n int)")
    session.run("insert into stock values (0)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("update stock set n = n + 1")
    """)
    lose_deadlocks(session, other)
    session.start("f")
    with other.connection.transaction():
        other.run("select from pgflow.runs for update")
        call = background(session.work, "f")
        third.until(WAITING, 1)
        other.run("update stock set n = n + 10")
    assert counts(call.result()) == {"completed": 1}
    assert session.value("select n from stock") == 11
    assert session.value("select attempts_count from pgflow.step_tasks") == 1


@pytest.mark.parametrize("fail", [False, True])
def test_a_deadlock_in_the_bookkeeping(
    session: Session,
    other: Session,
    third: Session,
    background: Background,
    tmp_path: Path,
    fail: bool,
) -> None:
    """Nothing: completions and failures are stored again, and the handler is not."""
    session.deploy(WAITER)
    lose_deadlocks(session, other)
    session.start("waiter", {"file": str(tmp_path / "go"), "fail": fail})
    call = background(session.work, "waiter")
    third.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    with other.connection.transaction():
        # In the other order than the worker's: first the task, then the run.
        other.run("select from pgflow.step_tasks for update")
        (tmp_path / "go").touch()
        third.until(WAITING, 1)
        other.run("select from pgflow.runs for update")
    assert counts(call.result()) == {"retried" if fail else "completed": 1}
    assert session.value("select attempts_count from pgflow.step_tasks") == 1


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_role_whose_transactions_are_isolated(
    session: Session, other: Session, third: Session, background: Background, level: str
) -> None:
    """Nothing: handlers' SQL runs in read committed, where waiting for a row is no conflict."""
    session.run("create table stock (n int)")
    session.run("insert into stock values (0)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("select from stock")
            tx.execute("update stock set n = n + 1")
            return tx.execute("show transaction_isolation")[0]["transaction_isolation"]
    """)
    session.run(f"set default_transaction_isolation = '{level}'")
    session.start("f")
    with other.connection.transaction():
        other.run("update stock set n = n + 10")
        call = background(session.work, "f")
        third.until(WAITING, 1)
    assert counts(call.result()) == {"completed": 1}
    assert session.value("select n from stock") == 11
    assert session.value("select output from pgflow.step_tasks") == "read committed"
    assert session.value("show default_transaction_isolation") == level


def test_a_handler_that_isolates_the_sessions_transactions(session: Session) -> None:
    """Nothing: the setting is gone before the next handler runs."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("show transaction_isolation")
            tx.execute("set default_transaction_isolation = 'serializable'")
            return row["transaction_isolation"]
    """)
    session.start("f")
    session.start("f")
    assert counts(session.work("f")) == {"completed": 2}
    assert session.rows("select output from pgflow.step_tasks") == [("read committed",)] * 2


def test_a_conflict_in_the_callers_transaction(
    session: Session, other: Session, third: Session
) -> None:
    """work_batch() in a serializable transaction raises 40001, for the caller to begin again."""
    session.run("create table stock (n int)")
    session.run("insert into stock values (0)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("update stock set n = n + 1")
    """)
    session.start("f")

    def work_on_an_old_snapshot() -> None:
        with session.connection.transaction():
            session.run("set transaction isolation level serializable")
            session.run("select from stock")
            other.run("update stock set n = n + 10")
            session.work_batch("f")

    with pytest.raises(psycopg.errors.SerializationFailure):
        work_on_an_old_snapshot()
    with session.connection.transaction():
        session.run("set transaction isolation level serializable")
        assert counts(session.work_batch("f")) == {"completed": 1}
    assert session.value("select n from stock") == 11


# Locks


def test_a_roles_lock_timeout_ends_handlers_sql_only(
    session: Session, other: Session, third: Session, background: Background
) -> None:
    """A handler's statement that waits too long fails the attempt; a completion goes on waiting."""
    session.run("create table stock (n int)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            if flow_input == "lock":
                tx.execute("lock table stock")
    """)
    session.run("set lock_timeout = '50ms'")
    session.start("f", "lock")
    with other.connection.transaction():
        other.run("lock table stock")
        assert counts(session.work("f")) == {"failed": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    assert error.startswith("DatabaseError: canceling statement due to lock timeout (")
    run = session.start("f", "go")
    with other.connection.transaction():
        other.run("select from pgflow.runs where run_id = %s for update", run)
        call = background(session.work, "f")
        third.until(WAITING, 1)
        other.run("select pg_sleep(0.2)")
    assert counts(call.result()) == {"completed": 1}


def test_a_table_that_somebody_has_locked(
    session: Session, other: Session, background: Background
) -> None:
    """Nothing, unless a handler needs it: the worker itself looks at pgflow's tables only."""
    session.run("create table stock (n int)")
    session.deploy(STEPS)
    session.start("f", "go")
    session.run("set statement_timeout = '10s'")
    with other.connection.transaction():
        other.run("lock table stock")
        assert counts(session.work("f", mode="drain")) == {"completed": 2}


# Commits


def refuse_at_commit(session: Session, condition: str, sqlstate: str) -> None:
    """Let the commit of a completed task fail, where the condition on `new` holds."""
    session.run("create sequence public.tries")
    session.run(f"""
        create function public.refuse() returns trigger language plpgsql as $$
        begin
            if new.status = 'completed' and ({condition}) then
                raise exception using errcode = '{sqlstate}', message = 'refused at the commit';
            end if;
            return null;
        end $$;
        create constraint trigger refuse after update on pgflow.step_tasks
        deferrable initially deferred for each row execute function public.refuse();
    """)


BOTH_WAYS = pytest.mark.parametrize("wants", ["", ", tx: Transaction"], ids=["plain", "tx"])


@BOTH_WAYS
def test_a_commit_that_refuses_a_result(session: Session, wants: str) -> None:
    """The attempt fails with the trigger's message, and the tasks behind it run."""
    session.deploy(f"""
        flow = Flow("f", max_attempts=3, base_delay=100)

        @flow.step
        def step(flow_input{wants}): return flow_input
    """)
    refuse_at_commit(session, "new.output = '\"bad\"'", "23514")
    session.start("f", "bad")
    session.start("f", "good")
    assert counts(session.work("f", mode="drain")) == {"retried": 1, "completed": 1}
    [(outcome, error)] = attempts(session)
    assert outcome == "failed"
    assert "refused at the commit" in error


@BOTH_WAYS
def test_a_conflict_at_the_commit(session: Session, wants: str) -> None:
    """Nothing: it is tried again, and no attempt is counted."""
    session.deploy(f"""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input{wants}): return flow_input
    """)
    refuse_at_commit(session, "nextval('public.tries') < 3", "40001")
    session.start("f")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.value("select attempts_count from pgflow.step_tasks") == 1


@BOTH_WAYS
def test_a_commit_that_the_server_cannot_make(session: Session, wants: str) -> None:
    """The call ends with the server's error; the task is given back without an attempt."""
    session.deploy(f"""
        flow = Flow("f", max_attempts=3)

        @flow.step
        def step(flow_input{wants}): return flow_input
    """)
    refuse_at_commit(session, "true", "53100")
    session.start("f")
    with pytest.raises(psycopg.errors.DiskFull, match="refused at the commit"):
        session.work("f")
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [("queued", 0)]
    assert attempts(session) == []
    session.run("drop trigger refuse on pgflow.step_tasks")
    assert counts(session.work("f")) == {"completed": 1}
