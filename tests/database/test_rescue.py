"""A dead worker's tasks are taken back by the next call."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts

Background = Callable[..., "Future[Any]"]

FLOW = """
    flow = Flow("f", max_attempts={max_attempts}, base_delay=1)

    @flow.step
    def step(flow_input, tx: Transaction):
        tx.execute("insert into written values (1)")
        tx.execute("select pg_advisory_xact_lock(1)")
"""


@pytest.fixture
def die(
    session: Session, connect: Callable[..., Connection], background: Background
) -> Callable[[], None]:
    """Start the flow's task in a worker, and terminate that in the middle of the handler."""
    session.run("create table written (id int)")

    def start_and_die() -> None:
        session.run("select pg_advisory_lock(1)")
        victim = Session(connect())
        call = background(victim.work, "f")
        session.until(WAITING, 1)
        session.run("select pg_terminate_backend(%s, 10000)", victim.connection.info.backend_pid)
        with pytest.raises(psycopg.OperationalError):
            call.result()
        session.run("select pg_advisory_unlock(1)")

    return start_and_die


def test_a_task_that_has_lost_its_message_gets_a_new_one(
    session: Session, die: Callable[[], None], role: Callable[[str | None], Session]
) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    worker = role("operate")
    session.run("grant insert on written to public")
    session.start("f")
    die()
    session.run("select pgmq.purge_queue('f')")
    assert counts(worker.work("f", mode="drain")) == {"completed": 1, "rescued": 1}
    assert session.value("select status from pgflow.runs") == "completed"


def test_the_next_call_takes_the_task_back(session: Session, die: Callable[[], None]) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    session.start("f")
    die()
    assert session.rows("select status from pgflow.step_tasks") == [("started",)]

    report = session.work("f")

    assert counts(report) == {"completed": 1, "rescued": 1}
    # The death is no attempt of the handler, and its SQL is there once.
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [
        ("completed", 1)
    ]
    assert session.value("select count(*) from written") == 1
    assert session.rows("select outcome, attempt from pgflow_worker.attempts order by 1") == [
        ("completed", 1),
        ("died", 1),
    ]


@pytest.mark.parametrize("max_deaths", [3, 2])
def test_a_task_that_keeps_killing_workers_fails(
    session: Session, die: Callable[[], None], max_deaths: int
) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    if max_deaths != 3:
        session.run("insert into pgflow_worker.settings values ('max_deaths', %s)", str(max_deaths))
    session.start("f")
    for _ in range(max_deaths):
        die()
    assert counts(session.work("f")) == {"failed": 1}
    assert session.rows("select status, attempts_count, error_message from pgflow.step_tasks") == [
        ("failed", 1, f"the worker died while it ran this task (attempt 1); deaths: {max_deaths}")
    ]
    assert session.value("select status from pgflow.runs") == "failed"


def test_a_task_with_one_attempt_never_runs_twice(
    session: Session, die: Callable[[], None]
) -> None:
    session.deploy(FLOW.format(max_attempts=1))
    session.start("f")
    die()
    assert counts(session.work("f")) == {"failed": 1}
    assert session.value("select status from pgflow.runs") == "failed"


def test_a_free_slots_tasks_are_taken_back_too(
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    die: Callable[[], None],
) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    session.run("update pgflow_worker.flows set workers = 2")
    # Somebody sits in slot 1, so that the worker that dies has slot 2.
    key = session.value("select lock_key from pgflow_worker._slots('f') where slot = 1")
    session.run("select pg_advisory_lock(%s)", key)
    session.start("f")
    die()
    session.run("select pg_advisory_unlock(%s)", key)
    session.run("update pgflow_worker.flows set workers = 1")
    report = session.work("f")
    assert (report["slot"], counts(report)) == (1, {"completed": 1, "rescued": 1})


def test_a_canceled_call_fails_the_attempt_and_says_so(
    session: Session, other: Session, background: Background
) -> None:
    session.run("create table written (id int)")
    session.deploy(FLOW.format(max_attempts=2))
    session.start("f")
    session.start("f")
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "f")
    other.until(WAITING, 1)
    other.run("select pg_cancel_backend(%s)", session.connection.info.backend_pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result()
    assert session.rows(
        "select status, attempts_count, error_message from pgflow.step_tasks order by message_id"
    ) == [("queued", 1, "canceled: canceling statement due to user request"), ("queued", 0, None)]
    # What was not started is there for the next call at once.
    assert session.value("select count(*) from pgmq.q_f where vt <= clock_timestamp()") == 1
    assert session.value("select count(*) from written") == 0
    assert session.value("select report ->> 'status' from pgflow_worker.invocations") == "error"
    assert session.value("select count(*) = 1 from pg_locks where locktype = 'advisory'")


def test_rescue_waits_for_the_run(
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    die: Callable[[], None],
) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    session.start("f")
    die()
    with session.connection.transaction():
        session.run("select from pgflow.runs for update")
        call = background(Session(connect()).work, "f")
        session.until(WAITING, 1)
        Session(connect()).run("select from pgflow.step_tasks for update nowait")
        # It is the rescue that waits, not the completion after it.
        assert session.value("select count(*) from pgflow_worker.attempts") == 0
    assert counts(call.result()) == {"completed": 1, "rescued": 1}


def test_a_task_that_somebody_else_takes_back_first_is_left_alone(
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    die: Callable[[], None],
) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    session.start("f")
    die()
    with session.connection.transaction():
        session.run("select from pgflow.runs for update")
        call = background(Session(connect()).work, "f")
        session.until(WAITING, 1)
        session.run(
            "update pgflow.step_tasks "
            "set status = 'queued', started_at = null, last_worker_id = null"
        )
    assert "rescued" not in counts(call.result())
    assert session.rows("select from pgflow_worker.attempts where outcome = 'died'") == []


def test_rescue_in_a_failed_run_fails_the_task(session: Session, die: Callable[[], None]) -> None:
    session.deploy(FLOW.format(max_attempts=2))
    run = session.start("f")
    die()
    session.run(
        "update pgflow.runs set status = 'failed', failed_at = now() where run_id = %s", run
    )
    assert counts(session.work("f")) == {"failed": 1}
    assert session.value("select count(*) from written") == 0


def test_a_second_worker_leaves_the_first_ones_task_alone(
    session: Session, other: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.run("create table written (id int)")
    session.deploy(FLOW.format(max_attempts=2))
    session.run("update pgflow_worker.flows set workers = 2")
    session.start("f")
    other.run("select pg_advisory_lock(1)")
    first = background(session.work, "f")
    other.until(WAITING, 1)
    other.start("f")  # so that the second worker passes the gate and looks for orphans
    second = background(Session(connect()).work, "f")
    other.until(WAITING, 2)
    other.run("select pg_advisory_unlock(1)")
    assert counts(first.result()) == {"completed": 1}
    assert counts(second.result()) == {"completed": 1}


BATCH = """
    import os, time
    flow = Flow("batch", max_attempts=2, base_delay=1)

    @flow.step
    def step(flow_input):
        if flow_input["poison"] and not os.path.exists(flow_input["file"]):
            open(flow_input["file"] + ".begun", "w").close()
            while not os.path.exists(flow_input["file"]):
                time.sleep(0.01)
"""


def test_only_a_task_that_was_alone_is_blamed(
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    tmp_path: Path,
) -> None:
    session.deploy(BATCH)
    for n in range(20):
        session.start("batch", {"poison": n == 5, "file": str(tmp_path / "never")})
    started = "select count(*) from pgflow.step_tasks where status = 'started'"

    def die(expected: int) -> None:
        """Let a worker run into the task that hangs, and kill it; so many others were started."""
        begun = tmp_path / "never.begun"
        begun.unlink(missing_ok=True)
        victim = Session(connect())
        background(victim.work, "batch", mode="drain", batch_size=20)
        while not begun.exists():
            session.run("select pg_sleep(0.01)")
        assert session.value(started) == expected
        # In Python a backend does not notice that it is terminated: somebody releases its slot.
        session.run("select pg_terminate_backend(%s)", victim.connection.info.backend_pid)
        (tmp_path / "never").touch()
        session.until("select count(*) = 0 from pg_locks where locktype = 'advisory'")
        (tmp_path / "never").unlink()
        session.run("update pgmq.q_batch set vt = now()")

    # The first one starts alone, because nothing is known of its step; the others together.
    die(expected=19)
    # From then on each of them is started alone.
    for _ in range(3):
        die(expected=1)
    report = session.work("batch", mode="drain", batch_size=20)
    assert report["failed"] == 1
    assert session.rows("select status, count(*) from pgflow.runs group by 1 order by 1") == [
        ("completed", 19),
        ("failed", 1),
    ]
    assert session.rows(
        "select outcome, count(*) from pgflow_worker.attempts "
        "where outcome in ('died', 'suspected') group by 1 order by 1"
    ) == [("died", 3), ("suspected", 19)]
