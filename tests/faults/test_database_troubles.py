"""The database's own troubles: what the call says, what becomes of tasks, and how it goes on."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import Connection, connect_to, create_database
from tests.database.conftest import WAITING, Session, counts
from tests.database.test_protocol import WAITER
from tests.faults.servers import Copy, copy_of

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


# Queues


def test_a_queue_dropped_while_tasks_wait(session: Session) -> None:
    """PW004 says to deploy again; that makes the queue and sends the lost messages again."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.start("f", "two")
    assert counts(session.work("f", batch_size=1)) == {"completed": 1}
    session.run("select pgmq.drop_queue('f')")
    with pytest.raises(psycopg.Error, match='the queue of flow "f" does not exist') as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW004"
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 2"])]
    assert session.deploy(STEPS) == [("f", "verified", [])]
    session.start("f", "three")
    assert counts(session.work("f", mode="drain")) == {"completed": 5}
    assert outputs(session) == ["one", "two", "three"]


def test_a_queue_dropped_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The call ends with PostgreSQL's error, the next one with PW004; deploying again mends it."""
    other.run("select pgmq.drop_queue('f')")
    go_on(other)
    with pytest.raises(psycopg.errors.UndefinedTable, match=r'"pgmq\.q_f" does not exist'):
        waiting.result()
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW004"
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 2"])]
    assert counts(session.work("f", mode="drain")) == {"rescued": 1, "completed": 4}
    assert outputs(session) == ["wait", "behind"]


@pytest.mark.parametrize("kind", ["step", "map"])
def test_a_queue_that_counts_from_one_again(session: Session, kind: str) -> None:
    """Old tasks that share their messages' numbers with new ones get their own inputs."""
    parameter = {"step": "flow_input", "map": "element"}[kind]
    session.deploy(f"""
        flow = Flow("f")

        @flow.{kind}
        def step({parameter}): return {parameter}
    """)
    for text in ("old one", "old two"):
        session.start("f", [text])
    session.run("select pgmq.drop_queue('f'), pgmq.create('f')")
    for text in ("new one", "new two"):
        session.start("f", [text])
    assert counts(session.work("f", mode="drain")) == {"completed": 4}
    for given, output in session.rows("select input, output -> 'step' from pgflow.runs"):
        assert output == given


def test_a_queue_purged_while_tasks_wait(session: Session) -> None:
    """The calls find nothing to do, and say nothing; deploying again sends the messages again."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.run("select pgmq.purge_queue('f')")
    assert session.work("f", mode="drain")["notes"] == []
    assert outputs(session) == [None]
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["one"]


def test_a_queue_purged_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """Nothing: what a call has read it finishes, and a completed step sends new messages."""
    other.run("select pgmq.purge_queue('f')")
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}
    assert outputs(session) == ["wait", "behind"]


def test_a_retry_whose_message_was_purged(session: Session) -> None:
    """It waits for ever, until the module is deployed again."""
    source = """
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(ctx: Context):
            if ctx.attempt == 1:
                raise ValueError("the first time")
    """
    session.deploy(source)
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    session.run("select pgmq.purge_queue('f')")
    assert session.deploy(source) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f")) == {"completed": 1}


def test_a_task_without_a_message(session: Session) -> None:
    """Deploying again sends its message again, and leaves the others' alone."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.start("f", "two")
    session.run("delete from pgmq.q_f where msg_id = 1")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == [None, "two"]
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["one", "two"]


NO_TASKS = (
    '{"run_id": "none", "step_slug": "first", "task_index": "none"}',
    '{"run_id": null, "step_slug": "first", "task_index": 99999999999}',
    '{"step_slug": "first", "run_id": "00000000-0000-0000-0000-000000000001"}',
)
NO_STEPS = ('{"hello": "world"}', '"text"', "null", "[]", '{"step_slug": null}')


@pytest.mark.parametrize("messages", [NO_TASKS, NO_STEPS], ids=["no task", "no step"])
def test_messages_that_are_not_pgflows(session: Session, messages: tuple[str, ...]) -> None:
    """They are archived, which a note says, and the tasks behind them run."""
    session.deploy(STEPS)
    # Among deaths, which are looked up for every message.
    session.run("""
        insert into pgflow_worker.attempts
            (flow_slug, run_id, step_slug, task_index, attempt, outcome, worker_id)
        select 'f', gen_random_uuid(), 'first', n, 1, 'died', gen_random_uuid()
        from generate_series(1, 10) as n
    """)
    for message in messages:
        session.run("select pgmq.send('f', %s::jsonb)", message)
    session.start("f", "behind")
    report = session.work("f", mode="drain")
    assert outputs(session) == ["behind"]
    assert report["notes"] == ["messages whose task was over or gone were archived"]
    assert session.value("select count(*) from pgmq.q_f") == 0


# What pgflow knows


def test_a_flow_deleted_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The result is discarded, the next call says PW003 while there is anything to do."""
    other.run("""
        delete from pgflow.step_tasks; delete from pgflow.step_states; delete from pgflow.runs;
        delete from pgflow.deps; delete from pgflow.steps; delete from pgflow.flows;
    """)
    go_on(other)
    assert counts(waiting.result()) == {"discarded": 1}
    session.run("select pgmq.send('f', '{}')")
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW003"
    [[_, status, _]] = session.deploy(STEPS)
    assert status == "compiled"
    session.start("f", "anew")
    session.work("f", mode="drain")
    assert outputs(session) == ["anew"]


def test_a_workers_row_deleted_while_its_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The result is discarded, because the claim is gone; the task is taken back and run again."""
    other.run("delete from pgflow.workers")
    go_on(other)
    report = waiting.result()
    assert counts(report) == {"discarded": 1, "completed": 2}
    session.run("""update pgflow.step_tasks
        set queued_at = queued_at - interval '1 hour', started_at = started_at - interval '1 hour'
        where status = 'started'""")
    session.run("update pgmq.q_f set vt = now()")
    session.work("f", mode="drain")
    assert outputs(session) == ["wait", "behind"]


# Code


def test_new_code_while_two_workers_run(
    session: Session,
    other: Session,
    third: Session,
    connect: Callable[..., Connection],
    background: Background,
) -> None:
    """Both calls end after the task they are at and say so; the next ones run the new code."""
    session.deploy(STEPS)
    session.run("update pgflow_worker.flows set workers = 2")
    for _ in range(6):
        session.start("f", "wait")
    other.run("select pg_advisory_lock(1)")
    calls = [background(Session(connect()).work, "f", mode="wait", batch_size=1) for _ in range(2)]
    third.until(WAITING, 2)
    assert third.deploy(STEPS.replace("return first", 'return [first, "new"]')) == [
        ("f", "verified", [])
    ]
    other.run("select pg_advisory_unlock(1)")
    note = "new code was deployed: the call ended for the next one to run it"
    assert [call.result()["notes"] for call in calls] == [[note], [note]]
    assert "new" not in str(outputs(session))
    session.work("f", mode="drain")
    assert outputs(session) == [["wait", "new"]] * 6


def test_two_workers_that_deploy(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    """A handler that deploys its own module waits for the other one; nothing is lost."""
    source = """
        flow = Flow("f", max_attempts=3, base_delay=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            [row] = tx.execute("select source from pgflow_worker.modules where current")
            tx.execute(
                "select pgflow_worker.deploy('flows_of_test', $1)",
                [row["source"] + f"# {flow_input}\\n"],
            )
    """
    session.deploy(source)
    session.run("update pgflow_worker.flows set workers = 2")
    for number in range(6):
        session.start("f", number)
    workers = [Session(connect()) for _ in range(2)]

    def work_until_nothing_is_left(worker: Session) -> None:
        while worker.value("select count(*) > 0 from pgmq.q_f where vt <= clock_timestamp()"):
            worker.work("f", mode="drain")

    for call in [background(work_until_nothing_is_left, worker) for worker in workers]:
        call.result()
    assert session.rows("select distinct status, attempts_count from pgflow.step_tasks") == [
        ("completed", 1)
    ]
    [(versions, newest)] = session.rows(
        "select count(*), max(source) filter (where current) from pgflow_worker.modules"
    )
    # Each has read what the other one has not yet committed, so that not every line must be there.
    assert versions == 7
    assert "# " in newest


def test_a_step_renamed_while_a_call_runs(
    session: Session, other: Session, third: Session, waiting: "Future[Any]"
) -> None:
    """PW003 refuses the new code with the ways out; the call and the run go on with the old."""
    with pytest.raises(psycopg.Error) as caught:
        third.deploy(STEPS.replace("def second", "def renamed"))
    assert caught.value.sqlstate == "PW003"
    assert '@flow.step("old_name")' in (caught.value.diag.message_hint or "")
    renamed = STEPS.replace("@flow.step\n    def second", '@flow.step("second")\n    def renamed')
    assert renamed != STEPS
    assert third.deploy(renamed) == [("f", "verified", [])]
    go_on(other)
    assert counts(waiting.result()) == {"completed": 1}
    assert counts(session.work("f", mode="drain")) == {"completed": 3}
    assert outputs(session) == ["wait", "behind"]


# Servers


def test_two_databases_with_the_same_flow(
    server: PostgreSQLExecutor,
    template: str,
    session: Session,
    other: Session,
    waiting: "Future[Any]",
) -> None:
    """Each has its own slots, and takes back the tasks of its own workers only."""
    create_database(server, "twin", template)
    try:
        with connect_to(server, "twin") as connection:
            twin = Session(connection)
            twin.deploy(STEPS)
            twin.start("f", "twin")
            # What a worker has left that died in slot 1 of the other database.
            twin.run("""
                insert into pgflow.workers (worker_id, queue_name, function_name)
                select worker_id, 'f', 'pgflow_worker' from pgflow_worker._slots('f')
                where slot = 1;
                select pgflow.start_tasks('f', array[1], (select worker_id from pgflow.workers))
            """)
            assert counts(twin.work("f", mode="drain")) == {"rescued": 1, "completed": 2}
            assert outputs(twin) == ["twin"]
    finally:
        with connect_to(server, "postgres") as connection:
            connection.execute("drop database twin with (force)")
    assert other.value("select count(*) from pgflow.step_tasks where status = 'started'") == 1
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}


def test_a_temporary_file_that_grows_too_large(session: Session) -> None:
    """The attempt fails with PostgreSQL's error, which names the setting."""
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("select n from generate_series(1, 100000) as n order by -n")
    """)
    session.run("set work_mem = '64kB'; set temp_file_limit = '100kB'")
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    assert error.startswith("DatabaseError: temporary file size exceeds temp_file_limit (100kB)")
    session.run("reset temp_file_limit; update pgmq.q_f set vt = now()")
    assert counts(session.work("f")) == {"completed": 1}


def test_a_standby_and_its_promotion(
    server: PostgreSQLExecutor,
    database: str,
    session: Session,
    other: Session,
    waiting: "Future[Any]",
) -> None:
    """work() on a standby is skipped with a note; once promoted it takes the tasks back."""
    with copy_of(server, standby=True) as standby, standby.connect(database) as connection:
        there = Session(connection)
        there.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
        for mode in ("batch", "wait"):
            report = there.work("f", mode=mode)
            assert (report["status"], report["notes"]) == (
                "skipped",
                ["this server or transaction is read-only"],
            )
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            there.deploy(STEPS)
        there.run("select pg_promote()")
        # The advisory lock that the handler waits for is the primary's.
        assert counts(there.work("f", mode="drain")) == {"rescued": 1, "completed": 4}
        assert outputs(there) == ["wait", "behind"]
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}


# A file system of its own for one directory, and then a program, as an ordinary user.
SMALL_DISK = """
mount -t tmpfs -o size=48m tmpfs "$0" && exec unshare --user --map-user=1 --map-group=1 "$@"
"""


@pytest.fixture(scope="module")
def small_disk(server: PostgreSQLExecutor, template: str) -> Iterator[tuple[Copy, Path]]:
    """A server with a database "small" on a file system of 48 MB, and where that is mounted."""
    with TemporaryDirectory(prefix="pgflow_worker_disk_", dir="/tmp") as directory:
        in_namespace = ("unshare", "--user", "--map-root-user", "--mount")
        try:
            subprocess.run(
                [*in_namespace, "sh", "-c", SMALL_DISK, directory, "true"],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this user may not mount a file system in a namespace of its own: {error}")
        wrapper = (*in_namespace, "sh", "-c", SMALL_DISK, directory)
        with copy_of(server, wrapper=wrapper) as copy:
            with copy.connect("postgres") as connection:
                connection.execute(f"create tablespace small location '{directory}'")
                connection.execute(f"create database small template {template} tablespace small")
            yield copy, Path(directory)


@pytest.fixture
def small(small_disk: tuple[Copy, Path]) -> Iterator[Session]:
    """A session in the database on the small disk, where a run of the flow "f" has been."""
    copy, _ = small_disk
    with copy.connect("small") as connection:
        session = Session(connection)
        session.deploy("""
            import random
            flow = Flow("f", max_attempts=3, base_delay=1)

            def noise(size):  # so that it cannot be compressed
                return random.randbytes(size // 2).hex()

            @flow.step
            def step(flow_input, tx: Transaction):
                if flow_input == "insert":
                    tx.execute("insert into written values ($1)", [noise(1_000_000)])
                return flow_input

            @flow.step
            def large(step):
                return noise(1_000_000) if step == "return" else None
        """)
        session.run("create table if not exists written (value text)")
        session.start("f", "insert")
        session.work("f", mode="drain")
        yield session
        session.run("delete from pgflow.step_tasks")


FILL = """
do language plpython3u $$
    with open('{}/ballast', 'ab', buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(8192))
        except OSError as error:
            assert error.errno == 28, error
$$
"""
EMPTY = "do language plpython3u $$ import os; os.remove('{}/ballast') $$"


def test_a_disk_that_is_full_for_a_handler(small: Session, small_disk: tuple[Copy, Path]) -> None:
    """The attempt fails with PostgreSQL's error; another follows when there is room."""
    small.start("f", "insert")
    small.run(FILL.format(small_disk[1]))
    try:
        assert counts(small.work("f")) == {"retried": 1}
    finally:
        small.run(EMPTY.format(small_disk[1]))
    error = small.value("select error_message from pgflow.step_tasks where status = 'queued'")
    assert error.startswith("DatabaseError: could not extend file")
    assert "No space left on device" in error
    small.run("update pgmq.q_f set vt = now()")
    assert counts(small.work("f", mode="drain")) == {"completed": 2}


def test_a_disk_that_is_full_for_a_result(small: Session, small_disk: tuple[Copy, Path]) -> None:
    """The call ends with PostgreSQL's error and its hint; no attempt is counted."""
    small.start("f", "return")
    assert counts(small.work("f")) == {"completed": 1}
    small.run(FILL.format(small_disk[1]))
    try:
        with pytest.raises(psycopg.errors.DiskFull, match="No space left") as caught:
            small.work("f")
    finally:
        small.run(EMPTY.format(small_disk[1]))
    assert caught.value.diag.message_hint == "Check free disk space."
    assert small.rows(
        "select attempts_count, error_message from pgflow.step_tasks where status = 'queued'"
    ) == [(0, None)]
    assert counts(small.work("f")) == {"completed": 1}
    assert small.value("select count(*) from pgflow.runs where status <> 'completed'") == 0


# Clocks
#
# A clock that is set back by an hour is the same as stored times that are an hour later.


def later_by_an_hour(session: Session, *columns: str) -> None:
    """Move the times in these columns, given as table.column; a minus before it moves them back."""
    for column in columns:
        table, _, name = column.lstrip("-").rpartition(".")
        sign = "-" if column.startswith("-") else "+"
        session.run(f"update {table} set {name} = {name} {sign} interval '1 hour'")


EVERY_TIME = (
    *("pgmq.q_f.vt", "pgmq.q_f.enqueued_at", "pgflow.step_tasks.queued_at"),
    *("pgflow.step_states.created_at", "pgflow.runs.started_at"),
)


def test_a_clock_set_back_while_tasks_wait(session: Session) -> None:
    """They wait until the clock has caught up, and the calls say nothing; new runs go on."""
    session.deploy(STEPS)
    session.start("f", "old")
    session.run("alter table pgflow.step_states drop constraint started_at_is_after_created_at")
    later_by_an_hour(session, *EVERY_TIME)
    session.start("f", "new")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert counts(session.work("f", mode="drain")) == {}
    session.run("update pgmq.q_f set vt = vt - interval '1 hour'")
    later_by_an_hour(session, "-pgmq.q_f.enqueued_at", *(f"-{column}" for column in EVERY_TIME[2:]))
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert sorted(outputs(session)) == ["new", "old"]


def test_a_message_of_a_time_to_come(session: Session) -> None:
    """A task that was taken back after the clock was set back waits, and costs no time."""
    session.deploy(STEPS)
    session.start("f", "old")
    later_by_an_hour(session, "pgmq.q_f.enqueued_at", "pgflow.step_tasks.queued_at")
    session.start("f", "new")
    assert counts(session.work("f", mode="drain", max_duration="2 s")) == {"completed": 2}
    assert session.value("select read_ct < 20 from pgmq.q_f where msg_id = 1")
    later_by_an_hour(session, "-pgmq.q_f.enqueued_at", "-pgflow.step_tasks.queued_at")
    session.run("update pgmq.q_f set vt = now()")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["old", "new"]


def test_a_clock_set_back_while_a_handler_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The call ends with the violated constraint of pgflow's; no attempt is counted."""
    other.run("alter table pgflow.step_tasks drop constraint started_at_is_after_queued_at")
    later_by_an_hour(other, "pgflow.step_tasks.queued_at")
    go_on(other)
    with pytest.raises(psycopg.errors.CheckViolation, match="is_after_queued_at"):
        waiting.result()
    assert session.rows("select distinct status, attempts_count from pgflow.step_tasks") == [
        ("queued", 0)
    ]
    later_by_an_hour(other, "-pgflow.step_tasks.queued_at")
    session.run("update pgmq.q_f set vt = now()")
    assert counts(session.work("f", mode="drain")) == {"completed": 4}


def test_a_task_that_cannot_be_taken_back(session: Session) -> None:
    """A note says why; the other tasks run, and it is taken back when that can be done."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return flow_input
    """)
    session.start("f", "old")
    # What a worker has left that died in slot 1; then the clock is set back.
    session.run("""
        insert into pgflow.workers (worker_id, queue_name, function_name)
        select worker_id, 'f', 'pgflow_worker' from pgflow_worker._slots('f') where slot = 1;
        select pgflow.start_tasks('f', array[1], (select worker_id from pgflow.workers))
    """)
    session.run("alter table pgflow.step_tasks drop constraint started_at_is_after_queued_at")
    later_by_an_hour(session, "pgflow.step_tasks.queued_at")
    session.start("f", "new")
    report = session.work("f", mode="drain")
    assert counts(report) == {"completed": 1}
    assert "failed_at_is_after_queued_at" in str(report["notes"])
    later_by_an_hour(session, "-pgflow.step_tasks.queued_at")
    assert counts(session.work("f", mode="drain")) == {"failed": 1}


def test_a_clock_that_is_really_set_back(
    server: PostgreSQLExecutor, database: str, session: Session, tmp_path: Path
) -> None:
    """What has begun is finished; what it starts waits until the clock has caught up."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.skip("libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    session.deploy("""
        flow = Flow("f", max_attempts=3, base_delay=1)

        @flow.step
        def first(flow_input):
            if "clock" in flow_input:
                with open(flow_input["clock"], "w") as clock:
                    clock.write("-1h")
            return flow_input["name"]

        @flow.step
        def second(first): return first
    """)
    environment = {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with (
        copy_of(server, environment=environment) as misled,
        misled.connect(database) as connection,
    ):
        there = Session(connection)
        before = there.value("select clock_timestamp()")
        there.start("f", {"name": "old", "clock": str(clock)})
        assert counts(there.work("f", mode="drain", max_duration="1 s")) == {"completed": 1}
        assert there.value("select clock_timestamp() < %s", before)
        there.start("f", {"name": "new"})
        assert counts(there.work("f", mode="drain", max_duration="1 s")) == {"completed": 2}
        clock.write_text("+0")
        assert counts(there.work("f", mode="drain")) == {"completed": 1}
        assert sorted(outputs(there)) == ["new", "old"]
