"""Runs as an operator handles them: start, wait, restart, retry."""

import json
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.database.conftest import Session, counts
from tests.database.random_runs import retry
from tests.database.runs import (
    EACH,
    ECHO,
    WAIT,
    cancel,
    error_of,
    hanging,
    prune,
    said,
    start,
    wait_for,
)

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]


# start_flow


def test_a_run_is_started(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo", '{"a": 1}')
    assert counts(session.work("echo")) == {"completed": 1}
    assert session.rows("select run_id::text, status, output from pgflow.runs") == [
        (run, "completed", {"echo": {"a": 1}})
    ]


def test_a_run_can_be_given_its_id(session: Session) -> None:
    session.deploy(ECHO)
    run = str(uuid.uuid4())
    assert session.value("select pgflow_worker.start_flow('echo', '{}', %s)::text", run) == run


def test_a_flow_of_pgflows_alone_can_be_started(session: Session) -> None:
    session.run("select pgflow.create_flow('theirs'); select pgflow.add_step('theirs', 'step')")
    start(session, "theirs")
    assert session.value("select count(*) from pgmq.q_theirs") == 1


def test_an_unknown_flow_is_named_with_those_that_are_known(session: Session) -> None:
    session.deploy(ECHO)
    error = error_of(session, "select pgflow_worker.start_flow('ecko', '{}')")
    assert said(error) == ("PW001", 'flow "ecko" is not deployed')
    assert "Deployed flows: echo." in (error.diag.message_hint or "")


def test_a_map_needs_an_array(session: Session) -> None:
    session.deploy(EACH)
    error = error_of(session, "select pgflow_worker.start_flow('each', '{}')")
    assert said(error) == ("PW002", 'the input of flow "each" must be an array, not an object')
    assert error.diag.message_hint == (
        'Step "double" is a map over it: give one element for each of its tasks.'
    )
    start(session, "each", "[1, 2]")


def test_a_null_input_is_refused(session: Session) -> None:
    session.deploy(ECHO)
    error = error_of(session, "select pgflow_worker.start_flow('echo', null)")
    assert said(error) == ("PW002", "input is null")


def test_a_run_id_is_used_once(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    error = error_of(session, "select pgflow_worker.start_flow('echo', '{}', %s)", run)
    assert said(error) == ("PW002", f'run {run} exists already: flow "echo", started')


def test_a_flow_without_its_queue_is_not_started(session: Session) -> None:
    session.deploy(ECHO)
    session.run("select pgmq.drop_queue('echo')")
    error = error_of(session, "select pgflow_worker.start_flow('echo', '{}')")
    assert said(error) == ("PW004", 'the queue of flow "echo" does not exist')


# wait_for_run


def test_a_run_is_awaited(session: Session, other: Session, background: Background) -> None:
    session.deploy(ECHO)
    run = start(session, "echo", '"good"')
    waiting = background(wait_for, other, run)
    session.until("select count(*) = 1 from pg_stat_activity where wait_event = 'PgSleep'")
    session.work("echo")
    assert waiting.result() == ("completed", {"echo": "good"}, None)


def test_a_failed_run_is_told_with_its_error(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo", '"bad"')
    session.work("echo")
    status, output, error = wait_for(session, run)
    assert (status, output) == ("failed", None)
    assert error == 'step "echo": as told (flows_of_test.py:8, in echo)'


def test_waiting_for_a_run_of_the_same_transaction_is_refused_at_once(session: Session) -> None:
    session.deploy(ECHO)
    with session.connection.transaction(force_rollback=True):
        run = start(session, "echo")
        error = error_of(session, WAIT, run)
    assert said(error) == ("PW011", f"run {run} cannot end before this transaction does")


def test_waiting_for_a_run_of_a_subtransaction_is_refused_at_once(session: Session) -> None:
    session.deploy(ECHO)
    with session.connection.transaction(force_rollback=True):
        session.run("create table first (n int)")
        for _ in range(2):
            with session.connection.transaction():
                run = start(session, "echo")
        error = error_of(session, WAIT, run)
    assert error.sqlstate == "PW011"


def test_a_transaction_that_has_written_may_wait_for_another(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    with session.connection.transaction():
        session.run("create table first (n int)")
        working = background(other.work, "echo")
        assert wait_for(session, run)[0] == "completed"
    working.result()


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_transaction_that_could_not_see_the_end_is_refused_at_once(
    session: Session, level: str
) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    with session.connection.transaction(force_rollback=True):
        session.run(f"set transaction isolation level {level}")
        error = error_of(session, WAIT, run)
    assert said(error) == ("PW011", f"a transaction that is {level} cannot see a run end")


def test_a_run_that_has_ended_can_be_seen_by_every_transaction(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    session.work("echo")
    with session.connection.transaction():
        session.run("set transaction isolation level serializable")
        assert wait_for(session, run)[0] == "completed"


def test_when_the_time_is_up_it_says_what_the_run_is_waiting_for(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def first(flow_input): pass

        @flow.step(after=[first])
        def last(flow_input): pass
    """)
    run = start(session, "f")
    query = "select * from pgflow_worker.wait_for_run(%s, '0.05 s')"
    error = error_of(session, query, run)
    assert said(error) == ("PW015", f'run {run} of flow "f" has not ended after 00:00:00.05')
    assert error.diag.message_detail == (
        'step "first": 0 started, 1 queued; step "last": waits for 1 step'
    )
    assert error.diag.message_hint == (
        "No worker of the flow is running. To start one: "
        "call pgflow_worker.work('f', mode => 'drain'); "
        "if pg_cron should: select * from pgflow_worker.doctor() \\gx"
    )
    session.run("select pgflow_worker.pause('f', 'maintenance')")
    assert error_of(session, query, run).diag.message_hint == (
        "The flow is paused (maintenance). To resume it: select pgflow_worker.resume('f');"
    )
    session.run("select pgflow_worker.resume('f'), pgflow_worker.pause()")
    hint = error_of(session, query, run).diag.message_hint or ""
    assert hint.endswith("select pgflow_worker.resume();")


def test_an_unknown_run_is_refused(session: Session) -> None:
    run = str(uuid.uuid4())
    for call in (
        "select from pgflow_worker.wait_for_run(%s)",
        "select pgflow_worker.restart_run(%s)",
        "select from pgflow_worker.cancel_run(%s)",
        "select pgflow_worker.retry_run(%s)",
    ):
        assert said(error_of(session, call, run)) == ("PW002", f"run {run} does not exist")
        assert said(error_of(session, call, None)) == ("PW002", "run_id is null")


@pytest.mark.parametrize("timeout", [None, "-1 s"])
def test_a_timeout_that_cannot_be_is_refused(session: Session, timeout: str | None) -> None:
    error = error_of(
        session, "select from pgflow_worker.wait_for_run(%s, %s)", str(uuid.uuid4()), timeout
    )
    assert error.sqlstate == "PW002"


# restart_run


def test_a_run_is_restarted_with_its_input(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo", '{"a": [1]}')
    session.work("echo")
    again = session.value("select pgflow_worker.restart_run(%s)::text", run)
    assert again != run
    session.work("echo")
    assert wait_for(session, again)[1] == {"echo": {"a": [1]}}
    assert wait_for(session, run)[1] == {"echo": {"a": [1]}}


def test_a_run_that_has_not_ended_is_not_restarted(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    error = error_of(session, "select pgflow_worker.restart_run(%s)", run)
    assert said(error) == ("PW016", f"run {run} has not ended")
    assert session.value("select count(*) from pgflow.runs") == 1


# retry_run


@pytest.mark.parametrize("seed", range(12))
def test_a_failed_run_goes_on(session: Session, tmp_path: Path, seed: int) -> None:
    retry(session, seed, tmp_path / "failing")


def test_a_failed_task_has_all_its_attempts_again(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(ctx: Context):
            raise ValueError(str(ctx.attempt))
    """)
    run = start(session, "f")
    for _ in range(2):
        session.work_batch("f", ignore_delay=True)
    assert wait_for(session, run)[0] == "failed"
    assert session.value("select pgflow_worker.retry_run(%s)", run) == 1
    assert session.rows("select attempts_count, error_message from pgflow.step_tasks") == [
        (0, None)
    ]
    assert counts(session.work("f")) == {"retried": 1}
    assert counts(session.work_batch("f", ignore_delay=True)) == {"failed": 1}


def test_only_a_failed_run_is_retried(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo")
    error = error_of(session, "select pgflow_worker.retry_run(%s)", run)
    assert said(error) == ("PW016", f"run {run} has not failed: started")
    session.work("echo")
    error = error_of(session, "select pgflow_worker.retry_run(%s)", run)
    assert said(error) == ("PW016", f"run {run} has not failed: completed")


def test_a_run_is_not_retried_while_a_worker_has_a_task_of_it(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(
        hanging("async")
        + """
    @flow.step(thread=True)
    def broken(flow_input):
        while not os.path.exists(flow_input["path"]):
            time.sleep(0.01)
        raise Fail("as told")
""".replace("os.path", "__import__('os').path")
    )
    path = tmp_path / "began"
    run = start(session, "f", json.dumps({"path": str(path)}))
    working = background(other.work, "f", mode="drain")
    session.until("select exists (select from pgflow.runs where status = 'failed')")
    pid = other.connection.info.backend_pid
    error = error_of(session, "select pgflow_worker.retry_run(%s)", run)
    assert said(error) == ("PW009", f'a worker still runs step "step" of this run, pid {pid}')
    session.run("select pg_cancel_backend(%s)", pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        working.result()
    assert session.value("select pgflow_worker.retry_run(%s)", run) == 2


def test_with_a_pgflow_that_nobody_tested_a_run_is_not_retried(session: Session) -> None:
    session.deploy(ECHO)
    run = start(session, "echo", '"bad"')
    session.work("echo")
    session.run("""
        create or replace function pgflow.maybe_complete_run(run_id uuid) returns void
        language plpgsql as 'begin end'
    """)
    error = error_of(session, "select pgflow_worker.retry_run(%s)", run)
    assert said(error) == ("PW004", "retry_run() was not tested with this version of pgflow")
    assert error.diag.message_hint == (
        f"From the beginning: select pgflow_worker.restart_run('{run}');"
    )


# All of them


def test_operate_handles_runs(session: Session, role: Role) -> None:
    session.deploy(ECHO)
    operator = role("operate")
    run = start(operator, "echo", '"bad"')
    operator.work("echo")
    assert wait_for(operator, run)[0] == "failed"
    assert operator.value("select pgflow_worker.retry_run(%s)", run) == 1
    assert cancel(operator, run) == (1, [])
    operator.run("select pgflow_worker.restart_run(%s)", run)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        prune(operator, "0 s")


def test_a_paused_flow_is_told_by_a_notice(session: Session, notices: list[str]) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input):
            raise Fail("on purpose")
    """)
    run = start(session, "f")
    session.work("f")
    session.run("select pgflow_worker.pause('f', 'why not')")
    start(session, "f")
    session.run("select pgflow_worker.retry_run(%s)", run)
    session.run("select pgflow_worker.resume()")
    assert notices == [
        *['flow "f" is paused (why not): no worker takes the tasks'] * 2,
        "still paused, each on its own: f",
    ]
