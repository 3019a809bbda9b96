"""Runs as an operator handles them: start, wait, restart, cancel, retry, remove."""

import json
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts
from tests.database.random_runs import retry

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]

ECHO = """
    flow = Flow("echo", max_attempts=1)

    @flow.step
    def echo(flow_input):
        if flow_input == "bad":
            raise Fail("as told")
        return flow_input
"""
EACH = 'flow = Flow("each")\n@flow.map\ndef double(n): return 2 * n\n'


def error_of(session: Session, statement: str, *args: Any) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        session.run(statement, *args)
    return caught.value


def said(error: psycopg.Error) -> tuple[str | None, str | None]:
    return error.sqlstate, error.diag.message_primary


def start(session: Session, flow_slug: str, flow_input: str = "{}") -> str:
    return str(session.value("select pgflow_worker.start_flow(%s, %s)", flow_slug, flow_input))


@pytest.fixture
def notices(session: Session) -> list[str]:
    heard: list[str] = []
    session.connection.add_notice_handler(lambda diag: heard.append(diag.message_primary or ""))
    return heard


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

WAIT = "select from pgflow_worker.wait_for_run(%s)"


def wait_for(session: Session, run: str, timeout: str = "20 s") -> tuple[Any, ...]:
    [row] = session.rows("select * from pgflow_worker.wait_for_run(%s, %s)", run, timeout)
    return row


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


# cancel_run

# A step that hangs, and says before that it runs.
HANGING = """
    import asyncio, time

    flow = Flow("f", max_attempts=2, timeout=500)

    def began(path):
        with open(path, "a") as file:
            file.write("x")

    @flow.step
    {signature}
        began(flow_input["path"])
        if flow_input.get("hangs", True):
            {body}
        return 1

    @flow.step(after=[step])
    def afterwards(flow_input): pass
"""
WAYS = {
    "python": ("def step(flow_input):", "while True: pass"),
    "tx": ("def step(flow_input, tx: Transaction):", "time.sleep(600)"),
    "sql": ("def step(flow_input, tx: Transaction):", "tx.execute('select pg_sleep(600)')"),
    "async": ("async def step(flow_input):", "await asyncio.sleep(600)"),
}


def hanging(way: str) -> str:
    signature, body = WAYS[way]
    return HANGING.format(signature=signature, body=body)


def until_begun(path: Path, times: int = 1) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or len(path.read_text()) < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cancel(session: Session, run: str, *reason: str) -> tuple[int, list[int]]:
    [row] = session.rows(
        f"select * from pgflow_worker.cancel_run(%s{', %s' * len(reason)})", run, *reason
    )
    return row[0], row[1]


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


# prune_data_older_than

AGE = """
    update pgflow.runs set started_at = started_at - interval '40 days',
        completed_at = completed_at - interval '40 days', failed_at = failed_at - interval '40 days'
        where run_id = any(%(runs)s);
    update pgflow_worker.attempts set finished_at = finished_at - interval '40 days'
        where run_id = any(%(runs)s);
    update pgmq.a_echo set archived_at = archived_at - interval '40 days'
        where (message ->> 'run_id')::uuid = any(%(runs)s);
"""


def age(session: Session, *runs: str) -> None:
    session.connection.execute(
        psycopg.ClientCursor(session.connection).mogrify(AGE, {"runs": list(runs)})
    )


def prune(session: Session, *args: Any) -> dict[str, int]:
    result: dict[str, int] = session.value(
        f"call pgflow_worker.prune_data_older_than({', '.join(['%s'] * len(args))})", *args
    )
    return {part: number for part, number in result.items() if number}


def run_ids(session: Session, table: str = "pgflow.runs") -> set[str]:
    return {row[0] for row in session.rows(f"select distinct run_id::text from {table}")}


def test_what_ended_long_ago_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    old, old_failed, new = (start(session, "echo", text) for text in ("1", '"bad"', "2"))
    session.work("echo", mode="drain")
    old_active = start(session, "echo")
    age(session, old, old_failed, old_active)
    assert prune(session, "30 days") == {"runs": 2, "tasks": 2, "attempts": 2, "messages": 2}
    assert run_ids(session) == {new, old_active}
    assert run_ids(session, "pgflow.step_states") == {new, old_active}
    assert run_ids(session, "pgflow.step_tasks") == {new, old_active}
    assert run_ids(session, "pgflow_worker.attempts") == {new}
    assert counts(session.work("echo")) == {"completed": 1}


def test_an_active_runs_attempts_stay(session: Session) -> None:
    session.deploy("""
        flow = Flow("echo", max_attempts=2)

        @flow.step
        def step(flow_input):
            raise ValueError
    """)
    run = start(session, "echo")
    session.work("echo")
    age(session, run)
    assert prune(session, "30 days") == {}
    assert run_ids(session, "pgflow_worker.attempts") == {run}


def test_invocations_and_workers_are_removed_if_nobody_uses_them(session: Session) -> None:
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    session.run("""
        insert into pgflow.workers (worker_id, queue_name, function_name)
        select gen_random_uuid(), 'echo', 'another' from generate_series(1, 3);
        update pgflow.workers set last_heartbeat_at = now() - interval '40 days';
        update pgflow_worker.invocations set finished_at = now() - interval '40 days';
    """)
    assert prune(session, "30 days") == {"workers": 3, "invocations": 1}
    assert session.rows("select function_name from pgflow.workers") == [("pgflow_worker",)]


def test_what_versions_of_pgflow_have_left_in_the_queue_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    old, active = start(session, "echo"), start(session, "echo")
    session.run(
        "update pgflow.runs set status = 'failed', failed_at = now() where run_id = %s", old
    )
    age(session, old)
    assert prune(session, "30 days") == {"runs": 1, "tasks": 1}
    assert session.rows("select message ->> 'run_id' from pgmq.q_echo") == [(active,)]


def test_batches_are_committed_one_by_one(session: Session) -> None:
    session.deploy(EACH)
    for _ in range(5):
        start(session, "each", "[1, 2, 3]")
    session.work("each", mode="drain", batch_size=100)
    session.run("""
        create table public.removed (transaction xid8 default pg_current_xact_id(), run_id uuid);
        create function public.remember() returns trigger language plpgsql as $$
            begin insert into public.removed (run_id) values (old.run_id); return old; end
        $$;
        create trigger remember after delete on pgflow.runs
            for each row execute function public.remember();
    """)
    assert prune(session, "0 s", 8)["runs"] == 5
    # A run is four rows of runs and tasks: two fill a batch.
    assert session.rows(
        "select count(*)::int from public.removed group by transaction order by transaction"
    ) == [(2,), (2,), (1,)]


def test_a_run_that_somebody_has_locked_is_left_for_the_next_time(
    session: Session, other: Session
) -> None:
    session.deploy(ECHO)
    for text in ("1", "2"):
        run = start(session, "echo", text)
    session.work("echo", mode="drain")
    with other.connection.transaction():
        other.run("select from pgflow.runs where run_id = %s for update", run)
        assert prune(session, "0 s")["runs"] == 1
    assert run_ids(session) == {run}
    assert prune(session, "0 s")["runs"] == 1


def test_in_a_transaction_nothing_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    with session.connection.transaction(force_rollback=True):
        error = error_of(session, "call pgflow_worker.prune_data_older_than('0 s')")
    assert said(error) == (
        "PW011",
        "prune_data_older_than() cannot run inside a transaction, because it commits every batch",
    )


@pytest.mark.parametrize("arguments", ["null", "'-1 day'", "'1 day', 0", "'1 day', null"])
def test_wrong_arguments_of_a_removal_are_refused(session: Session, arguments: str) -> None:
    error = error_of(session, f"call pgflow_worker.prune_data_older_than({arguments})")
    assert error.sqlstate == "PW002"


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


def test_deploy_removes_what_ended_also_of_later_flows(session: Session, role: Role) -> None:
    deployer = role("deploy")
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    assert prune(deployer, "0 s") == {
        "runs": 1,
        "tasks": 1,
        "attempts": 1,
        "messages": 1,
        "invocations": 1,
    }


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
