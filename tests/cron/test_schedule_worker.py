"""schedule_worker() and unschedule_worker(), with the real pg_cron."""

import json
import re
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import CRON_DATABASE, TEMPLATE, Connection, connect_to, new_database

FLOWS = """
from pgflow_worker import Flow

wave, other = Flow("wave"), Flow("other")

@wave.step
def hello(flow_input):
    return f"Hello, {flow_input}!"

@other.step
def step(flow_input):
    return flow_input
"""
Rows = list[tuple[Any, ...]]


@pytest.fixture
def db(libpq: PostgreSQLExecutor) -> Any:
    """A connection to pg_cron's database."""
    with connect_to(libpq, CRON_DATABASE) as connection:
        connection.execute("select pgflow_worker.deploy('flows', %s)", [FLOWS])
        yield connection
        connection.execute("select cron.unschedule(jobid) from cron.job")
        connection.execute("update pgflow_worker.flows set workers = 1")


def rows(db: Connection, query: str, *args: object) -> Rows:
    return db.execute(query, args).fetchall()


def schedule(db: Connection, arguments: str) -> list[tuple[str, str]]:
    """The jobs and what became of them."""
    return rows(db, f"select job, status from pgflow_worker.schedule_worker({arguments})")


def jobs(db: Connection) -> Rows:
    return rows(db, "select jobname, schedule, command from cron.job order by jobname")


def has_seconds(db: Connection) -> bool:
    [[version]] = rows(db, "select extversion from pg_extension where extname = 'pg_cron'")
    return [int(number) for number in re.findall(r"\d+", version)][:2] >= [1, 5]


def name(of: str, number: int) -> str:
    return f"pgflow-worker--{CRON_DATABASE}--{of}--{number}"


def test_a_job_is_made_changed_and_removed(db: Connection) -> None:
    assert schedule(db, "'wave', every => '1 minute'") == [(name("wave", 1), "scheduled")]
    command = "call pgflow_worker.work('wave', mode => 'drain')"
    assert jobs(db) == [(name("wave", 1), "* * * * *", command)]
    assert schedule(db, "'wave', every => '1 minute'") == [(name("wave", 1), "unchanged")]
    assert schedule(db, "'wave', 'batch', '5 minutes', 1, 20, 3") == [(name("wave", 1), "changed")]
    command = (
        "call pgflow_worker.work('wave', mode => 'batch', batch_size => 20, max_concurrent => 3)"
    )
    assert jobs(db) == [(name("wave", 1), "*/5 * * * *", command)]
    unscheduled = rows(db, "select job, status from pgflow_worker.unschedule_worker('wave')")
    assert unscheduled == [(name("wave", 1), "unscheduled")]
    assert jobs(db) == []
    assert rows(db, "select * from pgflow_worker.unschedule_worker('wave')") == []


def test_as_many_jobs_and_slots_as_workers(db: Connection) -> None:
    schedule(db, "'other', every => '1 minute'")
    slots = "select workers from pgflow_worker.flows where flow_slug = 'wave'"
    assert schedule(db, "'wave', every => '1 minute', workers => 3") == [
        (name("wave", number), "scheduled") for number in (1, 2, 3)
    ]
    assert rows(db, slots) == [(3,)]
    assert schedule(db, "'wave', every => '1 minute', workers => 1") == [
        (name("wave", 1), "unchanged"),
        (name("wave", 2), "unscheduled"),
        (name("wave", 3), "unscheduled"),
    ]
    assert rows(db, slots) == [(1,)]
    assert [job for job, _, _ in jobs(db)] == [name("other", 1), name("wave", 1)]


def test_a_job_that_is_not_active_is_made_anew(db: Connection) -> None:
    schedule(db, "'wave', every => '1 minute'")
    db.execute("update cron.job set active = false")
    assert schedule(db, "'wave', every => '1 minute'") == [(name("wave", 1), "changed")]
    assert rows(db, "select active from cron.job") == [(True,)]


def test_seconds_where_pg_cron_has_them_else_a_call_that_waits(db: Connection) -> None:
    notices: list[str | None] = []
    db.add_notice_handler(lambda diag: notices.append(diag.message_primary))
    schedule(db, "'wave'")
    [(_, found, command)] = jobs(db)
    if has_seconds(db):
        assert (found, notices) == ("5 seconds", [])
        assert command == "call pgflow_worker.work('wave', mode => 'drain')"
    else:
        assert found == "* * * * *"
        assert command == "call pgflow_worker.work('wave', mode => 'wait')"
        assert notices == [
            "this pg_cron has no schedules in seconds: the job waits for tasks, minute by minute"
        ]


@pytest.mark.parametrize(
    ("every", "schedule_of_cron"),
    [
        ("60 s", "* * * * *"),
        ("30 min", "*/30 * * * *"),
        ("1 h", "0 * * * *"),
        ("6 h", "0 */6 * * *"),
        ("1 day", "0 0 * * *"),
    ],
)
def test_periods(db: Connection, every: str, schedule_of_cron: str) -> None:
    schedule(db, f"'wave', every => '{every}'")
    assert [found for _, found, _ in jobs(db)] == [schedule_of_cron]


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        ("'wave', every => '7 min'", "PW002", "pg_cron has no schedule for every 00:07:00"),
        ("'wave', every => '1.5 s'", "PW002", "pg_cron has no schedule for every 00:00:01.5"),
        ("'wave', every => '90 s'", "PW002", "pg_cron has no schedule for every 00:01:30"),
        ("'wave', every => '0'", "PW002", "pg_cron has no schedule for every 00:00:00"),
        ("'wave', every => null", "PW002", "pg_cron has no schedule for every null"),
        ("'wave', workers => 0", "PW002", "workers must be between 1 and 32, not 0"),
        ("'wave', workers => null", "PW002", "workers must be between 1 and 32, not null"),
        ("'wave', 'forever'", "PW002", 'unknown mode "forever"'),
        ("'wave', batch_size => 0", "PW002", "batch_size must be at least 1, not 0"),
        ("'unknown'", "PW001", 'flow "unknown" is not deployed'),
    ],
)
def test_bad_arguments(db: Connection, arguments: str, sqlstate: str, message: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        schedule(db, arguments)
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == (sqlstate, message)
    assert jobs(db) == []


@pytest.mark.timeout(180)
def test_one_job_works_for_all_flows(db: Connection) -> None:
    assert schedule(db, "") == [(name("*", 1), "scheduled")]
    runs = [
        rows(db, "select run_id from pgflow.start_flow(%s, %s)", slug, json.dumps("Ada"))[0][0]
        for slug in ("wave", "other")
    ]
    db.execute(
        """do $$ begin
            for second in 1 .. 130 loop
                exit when not exists (select from pgflow.runs where status = 'started');
                perform pg_sleep(1);
            end loop;
        end $$"""
    )
    outputs = rows(
        db, "select output from pgflow.runs where run_id = any(%s) order by flow_slug", runs
    )
    assert outputs == [({"step": "Ada"},), ({"hello": "Hello, Ada!"},)]
    unscheduled = rows(db, "select job, status from pgflow_worker.unschedule_worker()")
    assert unscheduled == [(name("*", 1), "unscheduled")]


def test_a_role_without_pg_cron_is_told_what_it_lacks(db: Connection) -> None:
    db.execute("create role scheduler login")
    db.execute("select pgflow_worker.grant_usage('scheduler', 'operate')")
    try:
        db.execute("set role scheduler")
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            schedule(db, "'wave'")
        hint = caught.value.diag.message_hint
        assert hint == "Let a superuser run: grant usage on schema cron to scheduler;"
        db.execute("reset role; grant usage on schema cron to scheduler; set role scheduler")
        assert schedule(db, "'wave'") == [(name("wave", 1), "scheduled")]
        assert rows(db, "select username from cron.job") == [("scheduler",)]
    finally:
        db.execute("reset role; select cron.unschedule(jobid) from cron.job")
        db.execute("drop owned by scheduler; drop role scheduler")


def test_where_pg_cron_is_in_another_database_the_statement_is_told(
    db: Connection, libpq: PostgreSQLExecutor
) -> None:
    with new_database(libpq, TEMPLATE) as database, connect_to(libpq, database) as elsewhere:
        elsewhere.execute("select pgflow_worker.deploy('flows', %s)", [FLOWS])
        statuses = rows(elsewhere, "select * from pgflow_worker.schedule_worker('wave')")
        assert {status for _, _, status, _ in statuses} == {
            f"not done: run the statement in database {CRON_DATABASE}"
        }
        assert jobs(db) == []
        for *_, statement in statuses:
            db.execute(statement)
        job = f"pgflow-worker--{database}--wave--1"
        [found] = rows(db, "select jobname, database, username, command from cron.job")
        assert found[:3] == (job, database, elsewhere.info.user)
        assert found[3].startswith("call pgflow_worker.work('wave', mode => ")
        for *_, statement in rows(
            elsewhere, "select * from pgflow_worker.unschedule_worker('wave')"
        ):
            db.execute(statement)
        assert jobs(db) == []


def test_without_pg_cron_the_error_says_how_to_get_it(without_pg_cron: PostgreSQLExecutor) -> None:
    with connect_to(without_pg_cron, TEMPLATE) as connection:
        connection.execute("select pgflow_worker.deploy('flows', %s)", [FLOWS])
        with pytest.raises(psycopg.Error) as caught:
            schedule(connection, "'wave'")
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_primary) == ("PW013", "pg_cron is not loaded")
    assert diag.message_hint is not None
    assert diag.message_hint.startswith("Set shared_preload_libraries = 'pg_cron'")
