"""The worker's bookkeeping under conflicts, cancels, nested calls and handlers that misbehave."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts
from tests.database.test_protocol import WAITER, WRITER
from tests.database.test_work import CHAIN

Background = Callable[..., "Future[Any]"]


def test_a_nested_work_batch_gets_another_slot(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2)

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("select pgflow_worker.work_batch('f', 1) as report")
            return row["report"]["slot"]
    """)
    session.run("update pgflow_worker.flows set workers = 2")
    session.start("f")
    session.start("f")
    # In slot 1 the inner call would "rescue" the task that the outer one runs.
    assert counts(session.work("f", batch_size=1)) == {"completed": 1}
    assert session.rows("select output from pgflow.step_tasks order by message_id") == [
        (2,),
        (None,),
    ]


def test_work_batch_leaves_the_callers_settings(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.run("create schema own; set search_path = own; set datestyle = 'German'")
    with session.connection.transaction():
        assert counts(session.work_batch("chain")) == {"completed": 1}
        assert session.value("show search_path") == "own"
        assert session.value("show datestyle") == "German, DMY"


def test_operators_of_the_callers_search_path_take_no_part(session: Session) -> None:
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.run("""
        create schema trap;
        create function trap.equal(text, text) returns boolean language plpgsql as $$
        begin
            raise exception 'trapped';
        end $$;
        create operator trap.= (leftarg = text, rightarg = text, function = trap.equal);
        set search_path = trap, pg_catalog;
    """)
    assert counts(session.work("chain", mode="drain")) == {"completed": 3}


@pytest.mark.parametrize("wants", ["", "tx: Transaction"])
def test_a_conflict_in_the_bookkeeping_is_tried_again(session: Session, wants: str) -> None:
    session.deploy(f'flow = Flow("f", max_attempts=1)\n@flow.step\ndef step({wants}): pass\n')
    session.run("""
        create sequence public.tries;
        create function public.conflict() returns trigger language plpgsql as $$
        begin
            if nextval('public.tries') < 3 then
                raise exception using errcode = '40001', message = 'try again';
            end if;
            return new;
        end $$;
        create trigger conflict before insert on pgflow_worker.attempts
        for each row execute function public.conflict();
    """)
    session.start("f")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.value("select attempts_count from pgflow.step_tasks") == 1


def test_a_handler_cannot_swallow_a_cancel(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2)

        @flow.step
        def step(tx: Transaction):
            try:
                tx.execute("select pg_advisory_xact_lock(1)")
            except Exception:
                return "swallowed"
    """)
    session.start("f")
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "f")
    other.until(WAITING, 1)
    other.run("select pg_cancel_backend(%s)", session.connection.info.backend_pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result()
    assert session.value("select status from pgflow.step_tasks") == "queued"


def test_tx_is_of_no_use_after_its_handler(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)
        kept = []

        @flow.step
        def first(tx: Transaction): kept.append(tx)

        @flow.step
        def second(first): kept[0].execute("select 1")
    """)
    session.start("f")
    session.work("f", mode="drain")
    error = session.value("select error_message from pgflow.step_tasks where status = 'failed'")
    assert error.startswith("RuntimeError: tx was used after its handler had returned")


def test_the_message_of_a_running_task_is_not_archived(
    session: Session, other: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.run("create table written (id int)")
    session.deploy(WRITER)
    session.run("update pgflow_worker.flows set workers = 2")
    session.start("writer", {"id": 1})
    other.run("select pg_advisory_lock(1)")
    call = background(session.work, "writer")
    other.until(WAITING, 1)
    other.run("update pgmq.q_writer set vt = now()")  # its handler takes longer than its timeout
    assert counts(Session(connect()).work("writer")) == {}
    assert other.value("select count(*) from pgmq.q_writer") == 1
    other.run("select pg_advisory_unlock(1)")
    assert counts(call.result()) == {"completed": 1}


def test_a_call_that_fails_gives_back_what_it_started(session: Session) -> None:
    session.deploy('flow = Flow("f", max_attempts=2)\n@flow.step\ndef step(): pass\n')
    session.run("""
        create function public.full() returns trigger language plpgsql as $$
        begin
            raise exception using errcode = '53100', message = 'disk full';
        end $$;
        create trigger full_disk before insert on pgflow_worker.attempts
        for each row execute function public.full();
    """)
    session.start("f")
    with pytest.raises(psycopg.Error, match="disk full"):
        session.work("f")
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [("queued", 0)]
    session.run("drop trigger full_disk on pgflow_worker.attempts")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.value("select count(*) from pgflow_worker.attempts where outcome = 'died'") == 0


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("insert into spoilt values (true)", "spoilt"),
    ],
)
def test_a_handler_that_spoils_its_transaction_fails_only_its_task(
    session: Session, statement: str, error: str
) -> None:
    session.run("""
        create table public.spoilt (yes boolean);
        create function public.spoil() returns trigger language plpgsql as $$
        begin
            if exists (select from public.spoilt) then
                raise exception 'spoilt';
            end if;
            return new;
        end $$;
        create trigger spoil before update on pgflow.step_tasks
        for each row when (new.status = 'completed') execute function public.spoil();
    """)
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            if "sql" in flow_input:
                tx.execute(flow_input["sql"])
    """)
    session.start("f", {"sql": statement})
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1, "completed": 1}
    message = session.value("select error_message from pgflow.step_tasks where status = 'failed'")
    assert error in message


def test_a_prepared_statement_that_fails_later_is_not_left_behind(session: Session) -> None:
    session.run("create table written (id int)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            tx.execute(flow_input["sql"], [1])
    """)
    session.start("f", {"sql": "insert into written values ($1); select 1/0"})
    session.start("f", {"sql": "insert into written values ($1)"})
    assert counts(session.work("f")) == {"failed": 1, "completed": 1}
    assert session.rows("select id from written") == [(1,)]


def test_a_roles_lock_timeout_loses_no_result(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(WAITER)
    session.run("set lock_timeout = '50ms'")
    session.start("waiter", {"file": str(tmp_path / "go")})
    call = background(session.work, "waiter")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    with other.connection.transaction():
        other.run("select from pgflow.runs for update")
        (tmp_path / "go").touch()
        other.until(WAITING, 1)
        other.run("select pg_sleep(0.2)")
    assert counts(call.result()) == {"completed": 1}


def test_an_error_before_the_rescue_does_not_hide_a_death(session: Session) -> None:
    session.deploy('flow = Flow("f", max_attempts=1)\n@flow.step\ndef step(): pass\n')
    session.start("f")
    # What a worker that died in slot 1 leaves behind.
    session.run("""
        insert into pgflow.workers (worker_id, queue_name, function_name)
        select worker_id, 'f', 'pgflow_worker' from pgflow_worker._slots('f') where slot = 1;
        select pgflow.start_tasks('f', array_agg(msg_id), (select worker_id from pgflow.workers))
        from pgmq.q_f;
        insert into pgflow_worker.living select worker_id from pgflow.workers;
        update pgflow.steps set step_type = 'map';
    """)
    with pytest.raises(psycopg.Error, match="differs from the database"):
        session.work("f")
    session.run("update pgflow.steps set step_type = 'single'")
    assert counts(session.work("f")) == {"failed": 1}
    assert session.rows("select outcome from pgflow_worker.attempts") == [("died",)]


def test_drain_goes_on_behind_parked_messages(session: Session) -> None:
    session.deploy(CHAIN)
    session.run("select pgflow.add_step('chain', 'a_surplus')")
    for n in range(3):
        session.start("chain", {"n": n})
    report = session.work("chain", mode="drain", batch_size=1)
    assert counts(report) == {"completed": 9, "parked": 3}


def test_a_message_that_others_may_have_by_now_is_not_started(session: Session) -> None:
    session.deploy("""
        import pgflow_worker.intake
        flow = Flow("f")

        @flow.step
        def step():
            # As if the handler had taken almost as long as messages stay invisible.
            pgflow_worker.intake.READ_VISIBILITY = 5
    """)
    session.start("f")
    session.start("f")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.rows("select attempts_count from pgflow.step_tasks where status = 'queued'") == [
        (0,)
    ]
