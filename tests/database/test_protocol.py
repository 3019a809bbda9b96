"""The transaction protocol: what is committed when, what is locked in which order."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts

Background = Callable[..., "Future[Any]"]

# Waits for the advisory lock 1 in SQL, and writes a row.
WRITER = """
    flow = Flow("writer", max_attempts=3, base_delay=1)

    @flow.step
    def step(flow_input, tx: Transaction):
        tx.execute("insert into written (id) values ($1)", [flow_input["id"]])
        tx.execute("select pg_advisory_xact_lock(1)")
        return "done"
"""

# Waits in Python, until a file is there.
WAITER = """
    import os, time
    flow = Flow("waiter", max_attempts=3, base_delay=1)

    @flow.step
    def step(flow_input):
        while not os.path.exists(flow_input["file"]):
            time.sleep(0.01)
        if flow_input.get("fail"):
            raise ValueError("told to")
"""

TASK = "select status from pgflow.step_tasks"


@pytest.fixture
def written(session: Session) -> None:
    session.run("create table written (id int)")


@pytest.fixture
def started(session: Session, other: Session, background: Background) -> "Future[Any]":
    """A call that runs WRITER's handler, held up by a lock of the second session."""
    session.run("create table written (id int)")
    session.deploy(WRITER)
    session.start("writer", {"id": 1})
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "writer")
    other.until(WAITING, 1)
    return call


def log_transactions(session: Session) -> None:
    """Note in which transaction, under which settings, tasks and messages are changed."""
    session.run("""
        create table public.noted (
            what text, xid xid8 default pg_current_xact_id(),
            isolation text default current_setting('transaction_isolation'),
            commit text default current_setting('synchronous_commit')
        );
        create function note() returns trigger language plpgsql as $$
        begin
            insert into public.noted (what)
            values (coalesce(to_jsonb(new) ->> 'status', 'read'));
            return null;
        end $$;
        create trigger note after update on pgflow.step_tasks
        for each row execute function note();
    """)


@pytest.mark.parametrize("wants", ["", "tx: Transaction"])
def test_read_start_and_completion_are_three_transactions(session: Session, wants: str) -> None:
    session.deploy(f'flow = Flow("f")\n@flow.step\ndef step({wants}): pass\n')
    log_transactions(session)
    session.run("""create trigger note after update on pgmq.q_f
        for each row when (old.read_ct <> new.read_ct) execute function note()""")
    session.start("f")
    session.work("f")
    noted = session.rows("select what, xid::text from noted order by xid")
    assert [what for what, _ in noted] == ["read", "started", "completed"]
    assert len({xid for _, xid in noted}) == 3


def test_roles_defaults_do_not_matter(session: Session, connect: Callable[..., Connection]) -> None:
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(tx: Transaction): pass\n')
    log_transactions(session)
    session.run("alter role postgres set default_transaction_isolation = 'serializable'")
    session.run("alter role postgres set synchronous_commit = off")
    try:
        stranger = Session(connect())
    finally:
        session.run("alter role postgres reset all")
    session.start("f")
    assert counts(stranger.work("f")) == {"completed": 1}
    assert stranger.value("show default_transaction_isolation") == "serializable"
    # The attempt must survive a crash: a task that crashes the server would else do it for ever.
    assert session.rows("select what, isolation, commit from noted") == [
        ("started", "read committed", "on"),
        ("completed", "read committed", "off"),
    ]


def test_the_attempt_is_durable_while_the_handler_runs(
    started: "Future[Any]", other: Session
) -> None:
    assert other.rows("select status, attempts_count from pgflow.step_tasks") == [("started", 1)]
    assert other.value("select vt > now() + interval '60 seconds' from pgmq.q_writer")
    assert other.value("select count(*) from written") == 0
    other.run("select pg_advisory_unlock(1)")
    assert counts(started.result()) == {"completed": 1}
    assert other.value("select count(*) from written") == 1


def test_a_handler_in_python_holds_no_snapshot(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(WAITER)
    session.start("waiter", {"file": str(tmp_path / "go")})
    call = background(session.work, "waiter")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    assert other.value(
        "select backend_xmin is null and backend_xid is null from pg_stat_activity where pid = %s",
        session.connection.info.backend_pid,
    )
    (tmp_path / "go").touch()
    assert counts(call.result()) == {"completed": 1}


def test_messages_sent_after_work_batchs_transaction_began_are_left(
    session: Session, other: Session
) -> None:
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    with session.connection.transaction():
        session.run("select 1")
        other.start("f")
        assert counts(session.work_batch("f")) == {}
    assert counts(session.work_batch("f")) == {"completed": 1}


@pytest.mark.parametrize("fail", [False, True])
def test_the_run_is_locked_before_the_task(
    session: Session,
    other: Session,
    background: Background,
    connect: Callable[..., Connection],
    tmp_path: Path,
    fail: bool,
) -> None:
    session.deploy(WAITER)
    run = session.start("waiter", {"file": str(tmp_path / "go"), "fail": fail})
    call = background(session.work, "waiter")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    with other.connection.transaction():
        other.run("select from pgflow.runs where run_id = %s for update", run)
        (tmp_path / "go").touch()
        third = Session(connect())
        third.until(WAITING, 1)
        # Whoever waits for the run must hold nothing of it: that is how deadlocks are made.
        third.run("select from pgflow.step_tasks for update nowait")
        third.run("select from pgflow.step_states for update nowait")
    assert counts(call.result()) == {"retried" if fail else "completed": 1}


def test_completing_and_failing_one_run_at_once_does_not_deadlock(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.map
        def each(element):
            if element % 2:
                raise ValueError("odd")
    """)
    session.run("update pgflow_worker.flows set workers = 2")
    session.start("f", list(range(200)))
    deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
    before = session.value(deadlocks)
    calls = [background(Session(connect()).work, "f", batch_size=100) for _ in range(2)]
    total = sum(sum(counts(call.result()).values()) for call in calls)
    assert total == 200
    session.run("select pg_stat_clear_snapshot()")
    assert session.value(deadlocks) == before


@pytest.mark.parametrize("handler", [WRITER, WAITER])
def test_a_result_for_a_run_that_has_failed_is_discarded(
    session: Session, other: Session, background: Background, tmp_path: Path, handler: str
) -> None:
    session.run("create table written (id int)")
    [[flow, *_]] = session.deploy(handler)
    run = session.start(flow, {"id": 1, "file": str(tmp_path / "go")})
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, flow)
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    other.run("update pgflow.runs set status = 'failed', failed_at = now() where run_id = %s", run)
    (tmp_path / "go").touch()
    other.run("select pg_advisory_unlock(1)")
    assert counts(call.result()) == {"discarded": 1}
    assert session.rows("select status, error_message from pgflow.step_tasks") == [
        ("failed", "the run had ended (failed) before the handler did")
    ]
    assert session.value("select count(*) from written") == 0
    assert session.value(f"select count(*) from pgmq.q_{flow}") == 0


def test_a_task_that_another_session_starts_first_is_not_run(
    session: Session, other: Session, background: Background
) -> None:
    session.run("create table written (id int)")
    session.deploy(WRITER)
    session.start("writer", {"id": 1})
    [[message]] = other.rows("select msg_id from pgmq.q_writer")
    stranger = "00000000-0000-0000-0000-000000000001"
    other.run("insert into pgflow.workers values (%s, 'writer', 'stranger')", stranger)
    with other.connection.transaction():
        other.run("select pgflow.start_tasks('writer', %s, %s)", [message], stranger)
        call = background(session.work, "writer")
        other.until(WAITING, 1)
    # start_tasks has returned the task to both; only one of them has started it.
    assert counts(call.result()) == {}
    assert other.rows(
        "select status, attempts_count, last_worker_id::text from pgflow.step_tasks"
    ) == [("started", 1, stranger)]
    assert session.value("select count(*) from written") == 0


@pytest.mark.parametrize(
    "change",
    [
        "status = 'queued'",
        "last_worker_id = null",
        "attempts_count = attempts_count + 1",
        "started_at = started_at + interval '1 microsecond'",
    ],
)
def test_a_lost_claim_undoes_the_handlers_sql(
    started: "Future[Any]", other: Session, change: str
) -> None:
    other.run(f"update pgflow.step_tasks set {change}")
    before = other.rows("select * from pgflow.step_tasks")
    other.run("select pg_advisory_unlock(1)")
    assert counts(started.result()) == {"discarded": 1}
    assert other.value("select count(*) from written") == 0
    assert other.rows("select * from pgflow.step_tasks") == before
    assert other.rows("select outcome, error from pgflow_worker.attempts") == [
        ("discarded", "another worker had taken the task")
    ]


def test_a_completion_that_pgflow_refuses_is_a_failed_attempt(session: Session) -> None:
    session.run("create table written (id int)")
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("insert into written values (1)")
            return {"not": "a list"}
    """)
    # The code does not know that a map depends on its step: pgflow refuses without an error.
    session.run("select pgflow.add_step('f', 'each', array['step'], step_type => 'map')")
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    assert session.rows("select status, error_message from pgflow.step_tasks") == [
        ("queued", 'result of step "step": pgflow refused it')
    ]
    assert session.value("select status from pgflow.runs") == "started"
    assert session.value("select count(*) from written") == 0


def test_a_handler_that_calls_work_batch_finds_its_slot_taken(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("select pgflow_worker.work_batch('f') as report")
            return row["report"]
    """)
    session.start("f")
    session.start("f")
    session.work("f", batch_size=1)
    report = session.value("select output from pgflow.step_tasks where status = 'completed'")
    assert report["status"] == "skipped"
    pid = session.connection.info.backend_pid
    assert report["notes"] == [f'slot 1 is held by this session, pid {pid}: step "step" for 0 s']


def test_a_handler_that_releases_the_slot_ends_the_call(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def step(tx: Transaction):
            tx.execute("select pg_advisory_unlock_all()")
    """)
    session.start("f")
    session.start("f")
    report = session.work("f")
    assert counts(report) == {"completed": 1}
    assert report["notes"] == [
        "a handler released the worker's advisory lock: the call ended early"
    ]
    assert counts(session.work("f")) == {"completed": 1}


def test_a_deadlock_in_a_handlers_sql_is_tried_again(
    session: Session, other: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.run("create table pair (id int primary key, n int)")
    session.run("insert into pair values (1, 0), (2, 0)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("update pair set n = n + 1 where id = 1")
            tx.execute("select pg_advisory_xact_lock(1)")
            tx.execute("update pair set n = n + 1 where id = 2")
    """)
    # The worker is the one that notices the deadlock, and so the one that PostgreSQL ends.
    session.run("set deadlock_timeout = '10ms'")
    other.run("set deadlock_timeout = '1h'")
    third = Session(connect())
    third.run("select pg_advisory_lock(1)")
    session.start("f")
    call = background(session.work, "f")
    third.until(WAITING, 1)

    def update_the_other_way_round() -> None:
        with other.connection.transaction():
            other.run("update pair set n = n + 1 where id = 2")
            other.run("update pair set n = n + 1 where id = 1")

    crossing = background(update_the_other_way_round)
    third.until(WAITING, 2)
    third.run("select pg_advisory_unlock(1)")
    crossing.result()
    assert counts(call.result()) == {"completed": 1}
    assert session.rows("select n from pair") == [(2,), (2,)]
    assert session.value("select attempts_count from pgflow.step_tasks") == 1


def test_a_deferred_constraint_is_the_handlers_failure(session: Session) -> None:
    session.run("create table parent (id int primary key)")
    session.run("create table child (id int references parent deferrable initially deferred)")
    session.deploy("""
        flow = Flow("f", max_attempts=2)

        @flow.step
        def step(tx: Transaction):
            tx.execute("insert into child values (1)")
    """)
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    assert error.startswith('DatabaseError: insert or update on table "child" violates foreign key')


def test_a_deferred_trigger_meets_the_callers_search_path(session: Session) -> None:
    session.run("""
        create schema own;
        set search_path = own;
        create table written (id int);
        create table audited (id int);
        create function audit() returns trigger language plpgsql as $$
        begin
            insert into audited values (new.id);
            return null;
        end $$;
        create constraint trigger audit after insert on written
        deferrable initially deferred for each row execute function audit();
    """)
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("insert into written values (1)")
    """)
    session.start("f")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.rows("select id from audited") == [(1,)]


def test_a_handler_cannot_commit(session: Session) -> None:
    session.run("create table written (id int)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            import plpy
            tx.execute("insert into written values (1)")
            plpy.commit()
    """)
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1}
    assert session.value("select count(*) from written") == 0


def test_the_handlers_duration_is_our_own(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.step
        def step(tx: Transaction):
            time.sleep(0.2)
    """)
    session.start("f")
    session.work("f")
    assert 200 <= session.value("select duration_ms from pgflow_worker.attempts") < 2_000
    # pgflow's own times are transaction starts: by them the handler took no time.
    assert session.value("select completed_at - started_at < '0.2 s' from pgflow.step_tasks")
