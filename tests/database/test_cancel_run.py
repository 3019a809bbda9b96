"""cancel_run(): the run fails, and its handlers are stopped."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts
from tests.database.runs import EACH, ECHO, WAYS, cancel, hanging, start, until_begun, wait_for

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]


@pytest.mark.parametrize("way", WAYS)
def test_a_canceled_runs_handler_is_stopped(
    session: Session, other: Session, background: Background, tmp_path: Path, way: str
) -> None:
    session.deploy(hanging(way))
    path = tmp_path / "began"
    run = start(session, "f", json.dumps({"path": str(path)}))
    working = background(other.work, "f")
    until_begun(path)
    assert cancel(session, run, "no longer wanted") == (1, [other.connection.info.backend_pid])
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()
    assert session.rows("select status, failed_at is not null from pgflow.runs") == [
        ("failed", True)
    ]
    assert session.rows("select step_slug, status, error_message from pgflow.step_tasks") == [
        ("step", "failed", "canceled: no longer wanted")
    ]
    assert session.rows(
        "select step_slug, status, error_message from pgflow.step_states order by 1"
    ) == [("afterwards", "created", None), ("step", "failed", "canceled: no longer wanted")]
    assert session.value("select count(*) from pgmq.q_f") == 0
    assert session.rows("select step_slug, outcome from pgflow_worker.attempts") == [
        ("step", "discarded")
    ]
    # The flow's other runs go on.
    again = start(session, "f", json.dumps({"path": str(path), "hangs": False}))
    session.work("f", mode="drain")
    assert wait_for(session, again)[0] == "completed"


def test_a_run_that_waits_is_canceled_without_a_worker(session: Session) -> None:
    session.deploy(EACH)
    run = start(session, "each", "[1, 2, 3]")
    assert cancel(session, run) == (3, [])
    assert wait_for(session, run) == (
        "failed",
        None,
        f'step "double": canceled: by {session.connection.info.user}',
    )
    assert counts(session.work("each", mode="drain")) == {}


def test_other_runs_of_the_canceled_worker_go_on(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(hanging("async"))
    path = tmp_path / "began"
    run, spared = (start(session, "f", json.dumps({"path": str(path)})) for _ in range(2))
    working = background(other.work, "f")
    until_begun(path, 2)
    assert cancel(session, run)[1] == [other.connection.info.backend_pid]
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()
    assert session.rows(
        "select status from pgflow.step_tasks where run_id = %s and step_slug = 'step'", spared
    ) == [("queued",)]


def test_a_worker_that_would_fail_another_run_is_left_alone(
    session: Session,
    other: Session,
    background: Background,
    notices: list[str],
    tmp_path: Path,
) -> None:
    session.deploy(hanging("async").replace("max_attempts=2", "max_attempts=1"))
    path = tmp_path / "began"
    run, spared = (start(session, "f", json.dumps({"path": str(path)})) for _ in range(2))
    working = background(other.work, "f")
    until_begun(path, 2)
    pid = other.connection.info.backend_pid
    assert cancel(session, run) == (1, [])
    assert notices == [f"the worker with pid {pid} was not stopped"]
    assert session.rows("select status from pgflow.runs where run_id = %s", spared) == [
        ("started",)
    ]
    assert cancel(session, spared) == (1, [pid])
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()


def test_the_worker_waits_for_the_canceling_transaction(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(hanging("python"))
    path = tmp_path / "began"
    run = start(session, "f", json.dumps({"path": str(path)}))
    working = background(other.work, "f")
    until_begun(path)
    with session.connection.transaction():
        cancel(session, run)
        session.until(WAITING, 1)
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()
    assert session.value("select outcome from pgflow_worker.attempts") == "discarded"


def test_a_run_that_has_ended_is_not_canceled(session: Session, notices: list[str]) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    session.work("echo")
    assert cancel(session, run) == (0, [])
    assert notices == [f"run {run} has ended already: completed"]
    assert wait_for(session, run)[0] == "completed"


def test_who_may_not_stop_the_worker_is_told_so(
    session: Session,
    other: Session,
    role: Role,
    background: Background,
    tmp_path: Path,
) -> None:
    session.deploy(hanging("python"))
    path = tmp_path / "began"
    operator = role("operate")
    heard: list[str] = []
    operator.connection.add_notice_handler(lambda diag: heard.append(diag.message_primary or ""))
    run = start(operator, "f", json.dumps({"path": str(path)}))
    working = background(other.work, "f")
    until_begun(path)
    assert cancel(operator, run) == (1, [])
    pid = other.connection.info.backend_pid
    assert heard[0].startswith(f"the worker with pid {pid} was not stopped: ")
    session.run("select pg_cancel_backend(%s)", pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()
    assert session.value("select outcome from pgflow_worker.attempts") == "discarded"


def test_a_role_stops_its_own_workers(
    role: Role,
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    tmp_path: Path,
) -> None:
    session.deploy(hanging("python"))
    path = tmp_path / "began"
    operator = role("operate")
    worker = Session(connect(user=operator.connection.info.user))
    run = start(operator, "f", json.dumps({"path": str(path)}))
    working = background(worker.work, "f")
    until_begun(path)
    assert cancel(operator, run) == (1, [worker.connection.info.backend_pid])
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()


def test_a_canceled_runs_events_are_those_of_a_failed_one(session: Session) -> None:
    session.run("""
        create table public.events (run_id uuid, payload jsonb, event text, private boolean);
        create or replace function realtime.send(
            payload jsonb, event text, topic text, private boolean default true
        ) returns void language sql as $$
            insert into public.events values (
                substr(topic, 12)::uuid,
                payload - array['run_id', 'input', 'started_at', 'failed_at', 'error_message'],
                event, private
            )
        $$;
    """)
    session.deploy(ECHO)
    failed, canceled = start(session, "echo", '"bad"'), start(session, "echo")
    session.work("echo", batch_size=1)
    cancel(session, canceled)
    events = "select payload, event, private from public.events where run_id = %s"
    assert session.rows(events, canceled) == session.rows(events, failed)
    assert len(session.rows(events, canceled)) == 4
