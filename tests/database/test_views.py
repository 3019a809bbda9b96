"""What an operator sees in psql."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]

VIEWS = (
    *("flow_status", "worker_status", "run_progress", "step_progress"),
    *("recent_failures", "recent_invocations"),
)
ONE = """
    flow = Flow("f", max_attempts=2, base_delay=100)

    @flow.step
    def only(flow_input):
        if flow_input == "fail":
            raise Fail("on\\npurpose")
        if flow_input == "retry":
            raise ValueError("not yet")
"""
MAP = """
    import time

    flow = Flow("m")

    @flow.array
    def numbers(flow_input):
        time.sleep(0.05)
        return list(range(flow_input))

    @flow.map(over=numbers)
    def double(number):
        time.sleep(0.05)
        return 2 * number

    @flow.step
    def total(double):
        time.sleep(0.05)
        return sum(double)
"""
LOCK = """
    flow = Flow("f")

    @flow.step
    def locked(tx: Transaction):
        tx.execute("select pg_advisory_xact_lock(1)")
"""


def column(session: Session, view: str, name: str) -> list[Any]:
    return [row[0] for row in session.rows(f"select {name} from pgflow_worker.{view}")]


@pytest.fixture
def working(
    session: Session, connect: Callable[..., Connection], background: Background
) -> Callable[[], Session]:
    """Start the task of LOCK in another session, which waits in it for this one; that session."""
    session.deploy(LOCK)

    def start() -> Session:
        session.run("select pg_advisory_lock(1)")
        session.start("f")
        worker = Session(connect())
        background(worker.work, "f")
        session.until(WAITING, 1)
        return worker

    return start


# flow_status


def test_a_flow_that_has_nothing_to_do(session: Session) -> None:
    session.deploy(ONE)
    assert session.rows("table pgflow_worker.flow_status") == [
        ("f", 1, 1, 0, None, None, 0, None, 0, 0, 0)
    ]


def test_a_flows_version_counts_its_deploys(session: Session) -> None:
    session.deploy(ONE)
    session.deploy(ONE + "\n    # changed")
    assert column(session, "flow_status", "version") == [2]


def test_ready_tasks_wait_and_the_oldest_tells_for_how_long(session: Session) -> None:
    session.deploy(ONE)
    session.start("f")
    session.start("f")
    session.run("update pgmq.q_f set vt = vt - interval '90 s' where msg_id = 1")
    [[waiting, oldest]] = session.rows("select waiting, oldest from pgflow_worker.flow_status")
    assert waiting == 2
    assert timedelta(seconds=90) <= oldest < timedelta(seconds=120)
    assert oldest.microseconds == 0


def test_a_task_that_waits_for_a_retry_comes_later(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "retry")
    session.work("f")
    status = session.rows("select waiting, oldest, later, failed from pgflow_worker.flow_status")
    assert status == [(0, None, 1, 0)]


def test_a_task_that_runs_is_neither_waiting_nor_later(
    session: Session, working: Callable[[], Session]
) -> None:
    working()
    status = session.rows("select busy, waiting, later, running from pgflow_worker.flow_status")
    assert status == [(1, 0, 0, 1)]
    session.run("select pg_advisory_unlock(1)")


def test_tasks_that_failed_for_good_in_the_last_hour_are_counted(session: Session) -> None:
    session.deploy(ONE)
    for _ in range(2):
        session.start("f", "fail")
        session.work("f")
    session.run(
        "update pgflow_worker.attempts set finished_at = now() - interval '2 h' "
        "where attempt_id = (select min(attempt_id) from pgflow_worker.attempts)"
    )
    assert column(session, "flow_status", "failed") == [1]


def test_a_paused_flow_says_why(session: Session) -> None:
    session.deploy(ONE)
    session.run("select pgflow_worker.pause('f', 'maintenance')")
    assert column(session, "flow_status", "paused") == ["maintenance"]
    session.run("select pgflow_worker.resume('f'); select pgflow_worker.pause()")
    [paused] = column(session, "flow_status", "paused")
    assert paused.startswith("every flow is paused: paused by ")


# worker_status


def test_every_enabled_slot_is_a_row(session: Session) -> None:
    session.deploy(ONE)
    session.run("update pgflow_worker.flows set workers = 2")
    assert session.rows("select flow_slug, slot, pid, state from pgflow_worker.worker_status") == [
        ("f", 1, None, "free"),
        ("f", 2, None, "free"),
    ]


def test_a_worker_its_task_and_what_blocks_it(
    session: Session, working: Callable[[], Session]
) -> None:
    worker = working()
    [[*status, step_age, last_beat, backend_age]] = session.rows(
        "table pgflow_worker.worker_status"
    )
    own = session.connection.info.backend_pid
    pid = worker.connection.info.backend_pid
    assert status == ["f", 1, pid, f"blocked by {own}", "locked", 0, 1]
    assert all(age >= timedelta(0) for age in (step_age, last_beat, backend_age))
    session.run(
        "update pgflow.step_tasks set queued_at = queued_at - interval '1 h', "
        "started_at = started_at - interval '1 h'"
    )
    assert column(session, "worker_status", "step_age")[0] >= timedelta(hours=1)
    session.run("select pg_advisory_unlock(1)")


def test_a_disabled_slot_is_shown_while_it_is_held(session: Session, other: Session) -> None:
    session.deploy(ONE)
    lock = "select pg_advisory_lock(lock_key) from pgflow_worker._slots('f') where slot = 2"
    other.run(lock)
    status = "select slot, state from pgflow_worker.worker_status"
    assert session.rows(status) == [(1, "free"), (2, "idle, disabled")]
    other.run(lock.replace("_lock(", "_unlock("))
    assert session.rows(status) == [(1, "free")]


def test_a_worker_that_waits_for_tasks(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(ONE)
    call = background(other.work, "f", mode="wait", max_duration="20 s")
    session.until("select state = 'waiting' from pgflow_worker.worker_status")
    session.run("select pgflow_worker.pause()")
    call.result()


def test_a_worker_that_died_with_a_task(session: Session, working: Callable[[], Session]) -> None:
    pid = working().connection.info.backend_pid
    session.run("select pg_terminate_backend(%s, 10000)", pid)
    assert session.rows("select pid, state, step, tasks from pgflow_worker.worker_status") == [
        (None, "died", "locked", 1)
    ]


# run_progress and step_progress


def test_the_progress_of_a_run(session: Session) -> None:
    session.deploy(MAP)
    session.start("m", 4)
    progress = "select status, progress, percent, steps, tasks from pgflow_worker.run_progress"
    assert session.rows(progress) == [("started", "..........", 0, "0/3", "0/2+")]
    session.work("m")
    assert session.rows(progress) == [("started", "###.......", 33, "1/3", "1/6")]
    session.work("m", batch_size=2)
    assert session.rows(progress) == [("started", "#####.....", 50, "1/3", "3/6")]
    session.work("m", mode="drain")
    assert session.rows(progress) == []


def test_the_progress_of_the_steps(session: Session) -> None:
    session.deploy(MAP)
    run = session.start("m", 4)
    session.work("m")
    session.work("m", batch_size=2)
    rows = session.rows(
        "select step_slug, status, tasks, failed, mean_ms, run_id::text "
        "from pgflow_worker.step_progress"
    )
    assert [(*row[:4], row[5]) for row in rows] == [
        ("numbers", "completed", "1/1", 0, run),
        ("double", "started", "2/4", 0, run),
        ("total", "created", "0/1", 0, run),
    ]
    assert [row[4] is not None and row[4] > 40 for row in rows] == [True, True, False]


def test_failed_attempts_of_a_step_are_counted(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "retry")
    session.work("f")
    assert column(session, "step_progress", "failed") == [1]


def test_a_run_that_failed_is_shown_for_an_hour(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "fail")
    session.work("f")
    progress = "select status, steps, time_left from pgflow_worker.run_progress"
    assert session.rows(progress) == [("failed", "0/1", None)]
    assert column(session, "step_progress", "status") == ["failed"]
    session.run(
        "update pgflow.runs set started_at = now() - interval '3 h', "
        "failed_at = now() - interval '2 h'"
    )
    assert session.rows(progress) == []


def test_the_time_left_is_unknown_until_every_step_has_run_once(session: Session) -> None:
    session.deploy(MAP)
    session.start("m", 3)
    session.work("m")
    assert column(session, "run_progress", "time_left") == [None]


def test_the_time_left_is_estimated_from_former_runs_and_divided_by_the_slots(
    session: Session,
) -> None:
    session.deploy(MAP)
    session.start("m", 3)
    session.work("m", mode="drain")
    session.run("update pgflow_worker.attempts set duration_ms = 10000")
    session.start("m", 3)
    # The array, three elements as in the former run, and the last step.
    assert column(session, "run_progress", "time_left") == [timedelta(seconds=50)]
    session.run("update pgflow_worker.flows set workers = 2")
    assert column(session, "run_progress", "time_left") == [timedelta(seconds=25)]


def test_the_time_left_is_estimated_from_the_run_itself_where_it_can_be(session: Session) -> None:
    session.deploy(MAP)
    session.start("m", 4)
    session.work("m", mode="drain")
    session.run("update pgflow_worker.attempts set duration_ms = 10000")
    session.start("m", 6)
    session.work("m")
    session.work("m", batch_size=2)
    session.run("update pgflow_worker.attempts set duration_ms = 1000 where duration_ms < 10000")
    assert column(session, "run_progress", "time_left") == [timedelta(seconds=4 * 1 + 10)]


# recent_failures


def test_failures_the_newest_first(session: Session) -> None:
    session.deploy(ONE)
    for flow_input in ("fail", "retry"):
        session.start("f", flow_input)
        session.work("f")
    rows = session.rows(
        "select step_slug, task, attempt, error, task_is, retried_at is null, outcome, "
        "full_error, traceback from pgflow_worker.recent_failures"
    )
    assert [row[:7] for row in rows] == [
        ("only", 0, "1/2", "ValueError: not yet (flows_of_test.py:10", "queued", False, "failed"),
        ("only", 0, "1/2", "on purpose (flows_of_test.py:8, in only)", "failed", True, "failed"),
    ]
    assert rows[1][7] == "on\npurpose (flows_of_test.py:8, in only)"
    assert "ValueError: not yet" in rows[0][8]


def test_a_retried_attempt_says_when(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "retry")
    session.work("f")
    vt = session.value("select date_trunc('second', vt) from pgmq.q_f")
    assert column(session, "recent_failures", "retried_at") == [vt]


def test_old_failures_and_what_has_not_failed_are_left_out(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "retry")
    session.start("f")
    session.work("f")
    assert len(column(session, "recent_failures", "outcome")) == 1
    session.run("update pgflow_worker.attempts set finished_at = now() - interval '25 h'")
    assert column(session, "recent_failures", "outcome") == []


# recent_invocations


def test_a_call_that_did_something(session: Session) -> None:
    session.deploy(ONE)
    session.start("f", "retry")
    session.start("f")
    session.work("f")
    [row] = session.rows(
        "select flow_slug, pid, status, mode, completed, retried, failed, notes, "
        "duration > interval '0', finished_at is not null from pgflow_worker.recent_invocations"
    )
    pid = session.connection.info.backend_pid
    assert row == ("f", pid, "completed", "batch", 1, 1, 0, None, True, True)


def test_an_invocations_notes_are_its_error_or_those_of_its_report(session: Session) -> None:
    insert = "insert into pgflow_worker.invocations (flow_slug, report) values ('f', %s)"
    session.run(insert, '{"status": "error", "error": "it broke", "notes": ["a"]}')
    session.run(insert, '{"status": "completed", "notes": ["a", "b"]}')
    assert column(session, "recent_invocations", "notes") == ["a; b", "it broke"]


def test_the_last_invocations_of_every_flow(session: Session) -> None:
    session.run(
        "insert into pgflow_worker.invocations (flow_slug, report) values ('a', '{}'), ('b', '{}')"
    )
    session.run(
        "insert into pgflow_worker.invocations (flow_slug, pid, report) "
        "select 'b', n, '{}' from generate_series(1, 60) as n"
    )
    assert session.rows(
        "select flow_slug, count(*), max(pid) filter (where flow_slug = 'b') "
        "from pgflow_worker.recent_invocations group by 1 order by 1"
    ) == [("a", 1, None), ("b", 50, 60)]


# All of them


@pytest.mark.parametrize("view", VIEWS)
def test_monitor_may_read_it(session: Session, role: Role, view: str) -> None:
    monitor = role("monitor")
    session.deploy(ONE)  # the queue is newer than the role
    session.start("f", "retry")
    session.work("f")
    assert len(monitor.rows(f"table pgflow_worker.{view}")) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_nobody_else_may_read_it(session: Session, role: Role, view: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        role(None).rows(f"table pgflow_worker.{view}")


@pytest.mark.parametrize("view", VIEWS[:5])
def test_without_pgflow_it_says_what_is_missing(session: Session, view: str) -> None:
    session.run("drop schema pgflow cascade")
    with pytest.raises(psycopg.Error) as caught:
        session.rows(f"table pgflow_worker.{view}")
    assert caught.value.sqlstate == "PW004"
