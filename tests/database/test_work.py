"""work() and work_batch() as a user meets them."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

CHAIN = """
    flow = Flow("chain", max_attempts=2, base_delay=1)

    @flow.step
    def first(flow_input):
        return flow_input["n"] + 1

    @flow.step
    def second(first):
        return first * 10

    @flow.step
    def third(second, flow_input):
        return [second, flow_input]
"""


def test_a_batch_runs_what_is_ready_and_ends(session: Session) -> None:
    session.deploy(CHAIN)
    run = session.start("chain", {"n": 1})

    report = session.work("chain")

    assert counts(report) == {"completed": 1}
    assert session.rows(
        "select step_slug, status from pgflow.step_states where run_id = %s order by 1", run
    ) == [("first", "completed"), ("second", "started"), ("third", "created")]


def test_drain_finishes_a_chain_in_one_call(session: Session) -> None:
    session.deploy(CHAIN)
    run = session.start("chain", {"n": 1})

    report = session.work("chain", mode="drain")

    assert counts(report) == {"completed": 3}
    assert session.rows("select status, output from pgflow.runs where run_id = %s", run) == [
        ("completed", {"third": [20, {"n": 1}]})
    ]


def test_wait_takes_what_arrives_and_ends_in_time(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(CHAIN)
    call = background(session.work, "chain", mode="wait", max_duration="2 seconds")
    other.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    other.start("chain", {"n": 1})
    other.until("select count(*) = 3 from pgflow_worker.attempts where outcome = 'completed'")

    report = call.result()

    assert counts(report) == {"completed": 3}
    assert 2_000 <= report["duration_ms"] < 5_000


def test_wait_holds_no_snapshot(session: Session, other: Session, background: Background) -> None:
    session.deploy(CHAIN)
    pid = session.connection.info.backend_pid
    call = background(session.work, "chain", mode="wait", max_duration="1 second")
    other.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    held = [
        other.value("select backend_xmin is not null from pg_stat_activity where pid = %s", pid)
        for _ in range(50)
    ]
    call.result()
    # It has one only while it looks at the queue.
    assert held.count(False) > 25


def test_the_report_says_what_was_asked_and_done(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    report = session.work("chain", batch_size=3, max_concurrent=2)
    assert 0 < report.pop("duration_ms") < 60_000
    worker = str(session.value("select worker_id from pgflow.workers"))
    assert report == {
        "status": "completed",
        "flow_slug": "chain",
        "mode": "batch",
        "batch_size": 3,
        "max_concurrent": 2,
        "worker_id": worker,
        "slot": 1,
        "completed": 1,
        "retried": 0,
        "snoozed": 0,
        "failed": 0,
        "discarded": 0,
        "rescued": 0,
        "parked": 0,
        "frozen_ms": 0,
        "notes": [],
    }


def test_the_report_of_an_idle_call_has_the_same_fields(session: Session) -> None:
    session.deploy(CHAIN)
    idle = session.work("chain")
    session.start("chain", {"n": 1})
    assert idle.keys() == session.work("chain").keys()


def test_batch_size_bounds_a_batch(session: Session) -> None:
    session.deploy(CHAIN)
    for n in range(5):
        session.start("chain", {"n": n})
    assert counts(session.work("chain", batch_size=2)) == {"completed": 2}


def test_an_idle_call_writes_nothing_and_starts_no_python(
    connect: Callable[..., Connection], session: Session
) -> None:
    session.deploy(CHAIN)
    fresh = Session(connect())
    before = session.value("select pg_current_xact_id()::text::bigint")

    report = fresh.work("chain", mode="drain")

    assert counts(report) == {}
    assert session.value("select pg_current_xact_id()::text::bigint") == before + 1
    assert session.rows("select * from pgflow_worker.invocations") == []
    # plpython3.so and with it the interpreter are loaded by the first function that needs them.
    maps = Path(f"/proc/{fresh.connection.info.backend_pid}/maps").read_text()
    assert "plpython3" not in maps
    session.start("chain", {"n": 1})
    fresh.work("chain")
    assert "plpython3" in Path(f"/proc/{fresh.connection.info.backend_pid}/maps").read_text()


def test_every_call_that_worked_leaves_its_report(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    reports = [session.work("chain"), session.work_batch("chain")]
    assert session.rows(
        "select flow_slug, report from pgflow_worker.invocations order by invocation_id"
    ) == [("chain", report) for report in reports]


def test_the_workers_row_is_marked_as_stopped(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.work("chain")
    session.work("chain")
    assert session.rows(
        "select queue_name, function_name, deprecated_at is not null from pgflow.workers"
    ) == [("chain", "pgflow_worker", True)]


def test_work_batch_is_undone_with_its_transaction(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    with session.connection.transaction(force_rollback=True):
        assert counts(session.work_batch("chain")) == {"completed": 1}
        # Its own messages are of the same transaction, not too new.
        assert counts(session.work_batch("chain")) == {"completed": 1}
    assert session.value("select count(*) from pgflow_worker.attempts") == 0
    assert counts(session.work("chain")) == {"completed": 1}


def test_work_batch_can_ignore_delays(session: Session) -> None:
    session.deploy("""
        flow = Flow("late", max_attempts=2)

        @flow.step(start_delay=1000)
        def step(ctx: Context):
            if ctx.attempt == 1:
                raise ValueError("again")
    """)
    session.start("late")
    assert counts(session.work_batch("late")) == {}
    assert counts(session.work_batch("late", ignore_delay=True)) == {"retried": 1}
    assert counts(session.work_batch("late", ignore_delay=True)) == {"completed": 1}


def test_work_inside_a_transaction_says_what_to_do(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    with (
        pytest.raises(psycopg.Error, match="work\\(\\) cannot run inside a transaction") as caught,
        session.connection.transaction(),
    ):
        session.work("chain")
    assert caught.value.sqlstate == "PW011"
    assert "work_batch" in (caught.value.diag.message_hint or "")


def test_pause_and_resume(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.run("select pgflow_worker.pause('chain', 'the bank is closed')")
    report = session.work("chain")
    assert (report["status"], report["notes"]) == ("paused", ["the bank is closed"])
    assert session.work_batch("chain")["status"] == "paused"
    session.run("select pgflow_worker.resume('chain')")
    assert counts(session.work("chain")) == {"completed": 1}


def test_pausing_everything_is_a_pause_of_its_own(session: Session) -> None:
    session.deploy(CHAIN)
    session.run("select pgflow_worker.pause()")
    session.run("select pgflow_worker.pause()")
    assert session.work("chain")["notes"] == ["every flow is paused: paused by postgres"]
    session.run("select pgflow_worker.resume('chain')")
    assert session.work("chain")["status"] == "paused"
    session.run("select pgflow_worker.resume()")
    assert session.work("chain")["status"] == "completed"


def test_a_pause_stops_a_worker_at_the_next_task(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy("""
        flow = Flow("slow")

        @flow.step
        def step(tx: Transaction):
            tx.execute("select pg_advisory_xact_lock(1)")
    """)
    for _ in range(3):
        session.start("slow")
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "slow")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    other.run("select pgflow_worker.pause('slow')")
    other.run("select pg_advisory_unlock(1)")
    report = call.result()
    assert (report["status"], counts(report)) == ("paused", {"completed": 1})
    # What had been read is there for the next call at once.
    session.run("select pgflow_worker.resume('slow')")
    assert counts(session.work("slow")) == {"completed": 2}


def test_a_step_without_a_handler_is_parked(session: Session) -> None:
    session.deploy(CHAIN)
    session.run("select pgflow.add_step('chain', 'surplus')")
    session.start("chain", {"n": 1})
    report = session.work("chain", mode="drain")
    assert counts(report) == {"completed": 3, "parked": 1}
    assert report["notes"] == [
        'step "surplus" has no handler: its messages are parked for 300 s at a time, '
        "without an attempt"
    ]
    assert session.rows(
        "select status, attempts_count from pgflow.step_tasks where step_slug = 'surplus'"
    ) == [("queued", 0)]
    assert counts(session.work("chain", mode="drain")) == {}


def test_a_message_without_a_task_is_archived(session: Session) -> None:
    session.deploy(CHAIN)
    session.run("""select pgmq.send('chain', '{"step_slug": "first"}')""")
    report = session.work("chain")
    assert report["notes"] == ["messages whose task was over or gone were archived"]
    assert session.value("select count(*) from pgmq.q_chain") == 0
    assert session.value("select count(*) from pgmq.a_chain") == 1


def test_a_busy_slot_is_skipped_with_its_pid(session: Session, other: Session) -> None:
    session.deploy(CHAIN)
    other.run("select pg_advisory_lock(lock_key) from pgflow_worker._slots('chain') where slot = 1")
    assert session.work("chain")["status"] == "completed"  # nothing to do, whoever could do it
    session.start("chain", {"n": 1})
    for mode in ("batch", "drain", "wait"):
        report = session.work("chain", mode=mode)
        assert report["status"] == "skipped"
        assert report["notes"] == [f"slot 1 is held by pid {other.connection.info.backend_pid}"]


def test_as_many_workers_as_the_flow_has_slots(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.deploy(CHAIN)
    session.run("update pgflow_worker.flows set workers = 2")
    calls = [
        background(Session(connect()).work, "chain", mode="wait", max_duration="1 second")
        for _ in range(2)
    ]
    session.until("select count(*) = 2 from pg_locks where locktype = 'advisory'")
    assert session.work("chain", mode="wait")["status"] == "skipped"
    assert sorted(call.result()["slot"] for call in calls) == [1, 2]


def test_a_read_only_session_ends_quietly(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.run("set default_transaction_read_only = on")
    report = session.work("chain")
    assert report["status"] == "skipped"
    assert report["notes"] == ["this server or transaction is read-only"]


def test_an_error_of_the_call_is_raised_and_recorded(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.run("update pgflow.steps set step_type = 'map' where step_slug = 'first'")
    with pytest.raises(psycopg.Error) as caught:
        session.work("chain")
    assert caught.value.sqlstate == "PW003"
    report = session.value("select report from pgflow_worker.invocations")
    assert report["status"] == "error"
    assert report["error"] == 'flow "chain" differs from the database'
    assert report["sqlstate"] == "PW003"


def test_a_call_leaves_nothing_in_the_session(session: Session) -> None:
    session.run("create schema own; set search_path = own")
    session.deploy("""
        flow = Flow("messy")

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("show search_path")
            tx.execute("set search_path = elsewhere")
            return row["search_path"]
    """)
    for _ in range(2):
        session.start("messy")
    session.work("messy")
    assert session.rows("select output from pgflow.step_tasks") == [("own",), ("own",)]
    assert session.value("show search_path") == "own"
    assert session.value("select count(*) from pg_locks where locktype = 'advisory'") == 0


def test_a_redeployed_module_is_used_by_the_same_session(session: Session) -> None:
    source = 'flow = Flow("f")\n@flow.step\ndef step(): return "{0}"\n'
    for text in ("old", "new"):
        session.deploy(source.format(text))
        run = session.start("f")
        session.work("f")
        output = session.value("select output from pgflow.runs where run_id = %s", run)
        assert output == {"step": text}


def test_a_waiting_worker_makes_way_for_new_code(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(CHAIN)
    call = background(session.work, "chain", mode="wait", max_duration="1 minute")
    other.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    other.deploy(CHAIN + "    # new\n")
    assert call.result()["notes"] == [
        "new code was deployed: the call ended for the next one to run it"
    ]


def test_two_calls_in_a_session_share_the_module(session: Session) -> None:
    session.deploy("""
        import functools, itertools
        flow = Flow("f")
        counter = itertools.count(1)

        @functools.cache
        def client():
            return next(counter)

        @flow.step
        def step():
            return client()
    """)
    for _ in range(2):
        session.start("f")
        session.work("f")
    assert session.rows("select output from pgflow.step_tasks") == [(1,), (1,)]
