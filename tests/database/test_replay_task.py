"""replay_task(): a task's handler runs again, and nothing of it stays."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]
COLUMNS = (
    *("outcome", "output", "error", "traceback", "log", "rows_written", "duration_ms"),
    *("attempt", "notes", "input"),
)
# Every kind of handler and every kind of input.
RICH = """
    flow = Flow("rich", max_attempts=2, base_delay=1)

    @flow.step
    def numbers(flow_input):
        return list(range(flow_input["most"]))

    @flow.map(over=numbers)
    def double(number, flow_input):
        return {"twice": 2 * number, "of": flow_input["most"]}

    @flow.map(over=double)
    def stored(element, tx: Transaction):
        [row] = tx.execute(
            "insert into public.stored (twice) values ($1) returning twice", [element["twice"]]
        )
        return row["twice"]

    @flow.map(over=stored)
    async def later(n):
        import asyncio
        await asyncio.sleep(0.001)
        return n + 1

    @flow.step("inThread", thread=True)
    def in_thread(later, flow_input):
        return [sum(later), flow_input["most"]]

    @flow.array
    async def listed(stored):
        return stored

    @flow.map(over=listed)
    def none(element):
        return None

    @flow.step(after=[none])
    def key(ctx: Context):
        return [ctx.idempotency_key, ctx.attempt, ctx.max_attempts]

    @flow.step
    def total(in_thread, listed, none, tx: Transaction, flow_input):
        return [in_thread, listed, none, tx.execute("select count(*) as n from public.stored")]
"""
ELEMENTS = """
    flow = Flow("elements")

    @flow.map
    def same(element):
        return element
"""
# A flow whose only step has a body that tests choose.
ONE = """
    flow = Flow("f", max_attempts=2, base_delay=1, timeout={timeout})

    @flow.step
    def a(flow_input, ctx: Context, tx: Transaction):
        return tx.execute("select count(*) as n from public.t")

    @flow.step(thread={thread})
    {more}def b(a, flow_input, ctx: Context{tx}):
        {body}
"""
# All that a replay must leave alone. Views of pgflow's are not among them.
BOOKS = """
    select jsonb_object_agg(name, md5(rows)) from (
        select format('%%I.%%I', nspname, relname) as name,
            query_to_xml(format('select * from %%I.%%I as t order by t::text', nspname, relname),
                true, false, '')::text as rows
        from pg_class as class join pg_namespace on pg_namespace.oid = relnamespace
        where relkind = 'r' and nspname in ('pgflow', 'pgmq', 'pgflow_worker', 'public')
    ) as tables
"""


def replay(session: Session, run: str, step: str, *task_index: int) -> dict[str, Any]:
    """The one row, by column."""
    arguments = "%s, %s" + ", %s" * len(task_index)
    [row] = session.rows(
        f"select * from pgflow_worker.replay_task({arguments})", run, step, *task_index
    )
    return dict(zip(COLUMNS, row, strict=True))


def refused(session: Session, run: str | None, step: str, task_index: int = 0) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.replay_task(%s, %s, %s)", run, step, task_index)
    return caught.value


def ready(
    session: Session,
    body: str,
    *,
    timeout: int = 30,
    thread: bool = False,
    tx: str = ", tx: Transaction",
    more: str = "",
) -> str:
    """A run in which `a` is completed and `b`, with this body, is queued."""
    session.run("create table if not exists public.t (id integer primary key, name text)")
    lines = body.replace("\n", "\n        ")
    session.deploy(ONE.format(body=lines, timeout=timeout, thread=thread, tx=tx, more=more))
    run = session.start("f")
    session.work("f")
    return run


def one(session: Session, body: str, **parts: Any) -> dict[str, Any]:
    """What a replay of a step with this body gives."""
    run = ready(session, body, **parts)
    before = session.value(BOOKS)
    replayed = replay(session, run, "b")
    assert session.value(BOOKS) == before
    return replayed


@pytest.fixture
def rich(session: Session) -> str:
    """A completed run."""
    session.run("create table public.stored (id serial, twice integer)")
    session.deploy(RICH)
    run = session.start("rich", {"most": 4})
    session.work("rich", mode="drain")
    assert session.value("select status from pgflow.runs") == "completed"
    return run


def test_every_task_of_a_run_gives_its_recorded_output(session: Session, rich: str) -> None:
    tasks = session.rows(
        "select step_slug, task_index, output from pgflow.step_tasks order by step_slug, task_index"
    )
    assert len(tasks) == 5 + 4 * 4
    replays = [replay(session, rich, step, index) for step, index, _ in tasks]
    assert [(r["outcome"], r["output"]) for r in replays] == [
        ("completed", output) for _, _, output in tasks
    ]
    # As JSON's null.
    assert session.value(
        "select output = 'null' from pgflow_worker.replay_task(%s, 'none', 1)", rich
    )


def test_nothing_is_left(session: Session, rich: str) -> None:
    before = session.value(BOOKS)
    for step, index in session.rows("select step_slug, task_index from pgflow.step_tasks"):
        replay(session, rich, step, index)
    assert session.value(BOOKS) == before


def test_the_input_is_told(session: Session, rich: str) -> None:
    assert replay(session, rich, "double", 3)["input"] == 3
    assert replay(session, rich, "numbers")["input"] == {"run": {"most": 4}}
    assert replay(session, rich, "inThread")["input"] == {
        "run": {"most": 4},
        "later": [1, 3, 5, 7],
    }


def test_a_map_of_the_runs_input(session: Session) -> None:
    session.deploy(ELEMENTS)
    run = session.start("elements", ["a", None, {"b": 1}])
    assert [replay(session, run, "same", index)["output"] for index in range(3)] == [
        *("a", None, {"b": 1})
    ]
    error = refused(session, run, "same", 3)
    assert (error.sqlstate, error.diag.message_primary, error.diag.message_hint) == (
        "PW002",
        'step "same" of this run has no task 3',
        "It has the tasks 0 to 2.",
    )


def test_a_task_that_has_not_begun_is_replayed(session: Session) -> None:
    session.deploy(ELEMENTS)
    run = session.start("elements", [7])
    row = replay(session, run, "same")
    assert (row["outcome"], row["output"], row["attempt"]) == ("completed", 7, 1)
    assert session.work("elements")["completed"] == 1


def test_a_dependency_without_output_is_named(session: Session) -> None:
    session.run("create table public.stored (id serial, twice integer)")
    session.deploy(RICH)
    run = session.start("rich", {"most": 2})
    error = refused(session, run, "double")
    assert error.sqlstate == "PW002"
    assert error.diag.message_primary == (
        'step "double" has no input yet: there is no output of step "numbers" (started)'
    )
    error = refused(session, run, "total")
    assert (error.diag.message_primary or "").endswith(
        'there is no output of step "inThread" (created), step "listed" (created), '
        'step "none" (created)'
    )


def test_a_failed_task_of_a_failed_run_with_the_code_that_cures_it(session: Session) -> None:
    source = """
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def a(flow_input, ctx: Context):
            ctx.log.info("attempt %s", ctx.attempt)
            return 1 / flow_input["by"]
    """
    session.deploy(source)
    run = session.start("f", {"by": 0})
    for _ in range(2):
        session.work("f", mode="batch")
        session.run("update pgmq.q_f set vt = now()")
    [(status, recorded)] = session.rows("select status, error_message from pgflow.step_tasks")
    row = replay(session, run, "a")
    assert (status, row["outcome"], row["attempt"]) == ("failed", "failed", 2)
    assert row["output"] is None
    assert row["error"] == recorded
    assert row["error"].startswith("ZeroDivisionError: division by zero (flows_of_test.py:")
    assert row["traceback"].startswith("Traceback (most recent call last)")
    assert row["log"].endswith("INFO attempt 2")
    session.deploy(source.replace('flow_input["by"]', '(flow_input["by"] or 4)'))
    assert replay(session, run, "a")["output"] == 0.25


def test_rows_are_counted_by_table(session: Session) -> None:
    session.run("""
        create schema "Other";
        create table "Other"."Log" (name text);
        create table public.t (id integer primary key, name text);
        create table public.untouched (id integer);
        insert into public.t select n, 'old' from generate_series(1, 20) as n;
        create function public.note() returns trigger language plpgsql as $$
            begin insert into "Other"."Log" values (new.name), (new.name); return new; end $$;
        create trigger note after insert on public.t for each row execute function public.note();
        create function public.forget() returns void language sql as
            'delete from public.t where id > 17';
    """)
    row = one(
        session,
        """tx.execute("insert into public.t select n, 'new' from generate_series(21, 25) as n")
tx.execute("update public.t set name = 'newer' where id <= 2")
tx.execute("select public.forget()")
return "done" """,
    )
    assert row["output"] == "done"
    assert row["rows_written"] == {
        "public.t": {"inserted": 5, "updated": 2, "deleted": 8},
        '"Other"."Log"': {"inserted": 10},
    }


def test_what_the_callers_transaction_has_written_is_not_counted(session: Session) -> None:
    run = ready(
        session,
        'tx.execute("insert into public.t values (3, null)")\n'
        'return tx.execute("select count(*) as n from public.t")',
    )
    with session.connection.transaction():
        session.run("insert into public.t values (1, null), (2, null)")
        row = replay(session, run, "b")
        assert session.value("select count(*) from public.t") == 2
    assert row["output"] == [{"n": 3}]
    assert row["rows_written"] == {"public.t": {"inserted": 1}}


def test_a_truncated_table_is_told(session: Session) -> None:
    session.run("create table public.t (id integer primary key, name text)")
    session.run("insert into public.t values (1, null), (2, null)")
    row = one(session, 'tx.execute("truncate public.t")')
    assert row["rows_written"] == {"public.t": {"rewritten": True}}


def test_rows_of_a_handler_that_fails_are_not_told(session: Session) -> None:
    row = one(
        session, 'tx.execute("insert into public.t values (1, null)")\nraise ValueError("late")'
    )
    assert row["error"].startswith("ValueError: late")
    assert row["rows_written"] is None


@pytest.mark.parametrize("parent", [1, 2])
def test_a_deferred_constraint_fails_as_at_the_commit(session: Session, parent: int) -> None:
    session.run("""
        create table public.t (id integer primary key, name text);
        create table public.child (t integer references public.t deferrable initially deferred);
    """)
    row = one(
        session,
        f"""tx.execute("insert into public.child values (1)")
tx.execute("insert into public.t values ({parent}, null)")
return 5""",
    )
    if parent == 1:
        assert (row["outcome"], row["output"], row["error"]) == ("completed", 5, None)
    else:
        assert (row["outcome"], row["output"]) == ("failed", None)
        assert "violates foreign key constraint" in row["error"]


def test_a_deferred_constraint_that_the_caller_violates_is_not_the_handlers(
    session: Session,
) -> None:
    session.run("""
        create table public.t (id integer primary key, name text);
        create table public.child (t integer references public.t deferrable initially deferred);
    """)
    run = ready(session, "return 1")
    with session.connection.transaction():
        session.run("insert into public.child values (1)")
        row = replay(session, run, "b")
        session.run("insert into public.child values (2)")  # they are deferred as before
        session.run("insert into public.t values (1, null), (2, null)")
    assert row["outcome"] == "completed"
    [note] = row["notes"]
    assert note.startswith("deferred constraints were not checked: this transaction violates one")


def test_the_session_is_as_before(session: Session) -> None:
    session.run("""
        set search_path = public, pg_catalog;
        set datestyle = 'SQL, DMY';
        set lock_timeout = '7s';
        create role replayer;
    """)
    state = """
        select current_user, current_setting('search_path'), current_setting('work_mem'),
            current_setting('datestyle'), current_setting('lock_timeout'),
            coalesce(current_setting('my.own', true), ''),
            (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
            (select count(*) from pg_class where relnamespace = pg_my_temp_schema()),
            (select count(*) from pg_locks where pid = pg_backend_pid()
                and mode like '%%Exclusive%%' and relation is not null)
    """
    before = session.rows(state)
    try:
        row = one(
            session,
            """tx.execute("select pg_advisory_lock(1), pg_advisory_lock(1), pg_advisory_lock(2, 3)")
tx.execute("set work_mem = '77MB'")
tx.execute("set search_path = pg_catalog")
tx.execute("select set_config('my.own', 'x', false)")
tx.execute("create temporary table mine as select 1")
tx.execute("lock table public.t in access exclusive mode")
tx.execute("listen news")
tx.execute("notify news")
tx.execute("set role replayer")
return 1""",
        )
        assert (row["outcome"], row["notes"]) == ("completed", [])
        with session.connection.transaction():
            session.rows("select * from t")
        assert session.rows(state) == before
        assert session.rows("select pg_listening_channels()") == []
        assert list(session.connection.notifies(timeout=0)) == []
    finally:
        session.run("reset role; drop role replayer")


def test_a_lock_of_the_callers_is_kept(session: Session) -> None:
    session.run("select pg_advisory_lock(5)")
    row = one(session, 'tx.execute("select pg_advisory_lock(6)")')
    assert row["notes"] == ["the handler has changed which advisory locks the session holds"]
    assert session.value("select pg_advisory_unlock(5)")


def test_a_handler_gets_the_callers_search_path(session: Session) -> None:
    session.run("create schema mine; create table mine.things (); set search_path = mine")
    assert one(session, 'return tx.execute("select count(*) from things")')["output"] == [
        {"count": 0}
    ]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("while True: pass", {"tx": ""}),
        ("while True: pass", {}),
        ('tx.execute("select pg_sleep(60)")', {}),
        ("import asyncio\nawait asyncio.sleep(60)", {"tx": "", "more": "async "}),
        ("import time\ntime.sleep(6)", {"tx": "", "thread": True}),
    ],
    ids=["python", "tx", "sql", "async", "thread"],
)
def test_the_steps_timeout_holds(session: Session, body: str, parts: dict[str, Any]) -> None:
    row = one(session, body, timeout=3, **parts)
    assert row["outcome"] == "failed"
    assert row["error"] == 'step "b" took longer than 3 s'
    assert 3000 <= row["duration_ms"] < 6000 or "thread" in parts
    assert not any("the call ended" in note for note in row["notes"])
    assert session.value("select 1") == 1


@pytest.mark.parametrize("parts", [{}, {"tx": ""}, {"tx": "", "more": "async "}])
def test_the_limit_of_memory_holds(session: Session, parts: dict[str, Any]) -> None:
    row = one(session, "return len(bytearray(1 << 30))", **parts)
    assert row["error"].startswith("MemoryError")
    assert row["notes"] == [
        "handlers ran out of memory, of which a call gives them 512 MB "
        "(memory_mb in pgflow_worker.settings): go on in a new session"
    ]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("while True: pass", {"tx": ""}),
        ('tx.execute("select pg_advisory_lock(1)")\ntx.execute("select pg_sleep(60)")', {}),
        ('tx.execute("select pg_advisory_lock(1)")\nwhile True: pass', {}),
        ("import asyncio\nawait asyncio.sleep(60)", {"tx": "", "more": "async "}),
    ],
    ids=["python", "sql", "python with tx", "async"],
)
def test_a_replay_can_be_canceled(
    session: Session, other: Session, background: Background, body: str, parts: dict[str, Any]
) -> None:
    run = ready(session, body, **parts)
    call = background(replay, session, run, "b")
    other.until(
        "select now() - query_start > interval '1 s' from pg_stat_activity "
        "where query like %s and state = 'active' and pid <> pg_backend_pid()",
        "%replay_task(%",
    )
    other.run("select pg_cancel_backend(%s)", session.connection.info.backend_pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result(timeout=10)
    assert session.value("select count(*) from pg_locks where locktype = 'advisory'") == 0
    assert session.value("select count(*) from pgflow.step_tasks") == 2


def test_a_snooze_is_told(session: Session) -> None:
    row = one(
        session,
        "from pgflow_worker import Snooze\nraise Snooze('not yet', after=60)",
        tx="",
    )
    assert (row["outcome"], row["error"][:7]) == ("snoozed", "not yet")


def test_a_result_that_is_not_json_is_a_failure(session: Session) -> None:
    row = one(session, "return {1, 2}", tx="")
    assert row["outcome"] == "failed"
    assert row["error"] == 'result of step "b": $ is of type set, which JSON does not have'


def test_a_replay_beside_the_running_task_is_told_and_waits_for_its_rows(
    session: Session, other: Session, background: Background
) -> None:
    run = ready(
        session,
        """tx.execute("insert into public.t values (1, null)")
tx.execute("select pg_advisory_xact_lock(99)")
return 1""",
    )
    with other.connection.transaction():
        other.run("select pg_advisory_xact_lock(99)")
        working = background(session.work, "f")
        other.until(WAITING, 1)
    assert working.result()["completed"] == 1
    session.run(
        "update pgflow.step_tasks set status = 'started', completed_at = null, output = null "
        "where step_slug = 'b'"
    )
    row = replay(session, run, "b")
    assert "duplicate key" in row["error"]
    assert row["notes"] == ["the task is started: a worker may be running it at the same time"]


def test_in_a_read_only_transaction(session: Session) -> None:
    session.deploy(ELEMENTS)
    run = session.start("elements", [7])
    with session.connection.transaction():
        session.run("set transaction read only")
        assert replay(session, run, "same")["output"] == 7


def test_what_is_unknown_is_refused(session: Session) -> None:
    session.deploy(ELEMENTS, "elements")
    run = ready(session, "return 1")
    unknown = "00000000-0000-0000-0000-000000000000"
    errors = [
        refused(session, unknown, "a"),
        refused(session, None, "a"),
        refused(session, run, "c"),
        refused(session, run, "a", 1),
        refused(session, run, "a", -1),
        refused(session, session.start("elements", []), "same"),
    ]
    assert [(e.sqlstate, e.diag.message_primary) for e in errors] == [
        ("PW002", f"run {unknown} does not exist"),
        ("PW002", "run null does not exist"),
        ("PW002", 'flow "f" has no step "c"'),
        ("PW002", 'step "a" of this run has no task 1'),
        ("PW002", 'step "a" of this run has no task -1'),
        ("PW002", 'step "same" of this run has no task 0'),
    ]
    assert [e.diag.message_hint for e in errors][2:] == [
        "Its steps: a, b.",
        "It is no map step and has only task 0.",
        "It is no map step and has only task 0.",
        "There is nothing that it maps, so that it has no tasks.",
    ]


def test_a_flow_that_is_not_deployed_is_refused(session: Session) -> None:
    session.deploy(ELEMENTS)
    run = session.start("elements", [7])
    session.run("select pgflow_worker.undeploy('flows_of_test')")
    error = refused(session, run, "same")
    assert (error.sqlstate, error.diag.message_primary) == (
        "PW001",
        'flow "elements" is not deployed',
    )


def test_a_step_without_a_handler_is_refused(session: Session) -> None:
    session.deploy(ELEMENTS)
    run = session.start("elements", [7])
    session.run("select pgflow.add_step('elements', 'typescript')")
    session.run(
        "insert into pgflow.step_states (flow_slug, run_id, step_slug, remaining_deps) "
        "values ('elements', %s, 'typescript', 0)",
        run,
    )
    error = refused(session, run, "typescript")
    assert (error.sqlstate, error.diag.message_primary) == (
        "PW002",
        'step "typescript" has no handler in the deployed module',
    )
    assert "Steps with a handler: same." in (error.diag.message_hint or "")


def test_without_pgflow(session: Session) -> None:
    session.run("drop schema pgflow cascade")
    assert refused(session, None, "a").sqlstate == "PW004"


def test_the_level_operate_may_replay(session: Session, rich: str, role: Role) -> None:
    operator = role("operate")
    row = replay(operator, rich, "stored", 2)
    assert "permission denied for table stored" in row["error"]  # as the caller, not as the worker
    assert replay(operator, rich, "inThread")["outcome"] == "completed"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        replay(role("monitor"), rich, "inThread")


def test_an_element_as_large_as_text_may_be(session: Session) -> None:
    session.deploy(ELEMENTS)
    text = "ä" * 3_000_000
    run = session.start("elements", [text])
    assert json.dumps(replay(session, run, "same")["output"]) == json.dumps(text)


def test_modules_of_an_ended_event_loop_are_forgotten(
    session: Session, connect: Callable[..., Connection]
) -> None:
    session.deploy("""
        import asyncio
        flow = Flow("f")
        lock = asyncio.Lock()

        @flow.step
        async def a(flow_input):
            for _ in range(2):
                async def hold():
                    async with lock:
                        await asyncio.sleep(0.01)
                await asyncio.gather(hold(), hold())
            return 1
    """)
    run = session.start("f")
    assert [replay(session, run, "a")["error"] for _ in range(2)] == [None, None]


def test_a_table_that_another_session_truncates_meanwhile_is_not_told(
    session: Session, other: Session, background: Background
) -> None:
    run = ready(session, 'tx.execute("select pg_advisory_xact_lock(99)")')
    session.run("create table public.others (id integer)")
    with other.connection.transaction():
        other.run("select pg_advisory_xact_lock(99)")
        call = background(replay, session, run, "b")
        other.until(WAITING, 1)
        other.run("truncate public.others")
    assert call.result(timeout=10)["rows_written"] == {}
