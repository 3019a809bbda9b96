"""scripts/install-pgflow: pgflow outside Supabase."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

Connection = psycopg.Connection[tuple[Any, ...]]
InstallPgflow = Callable[[str], "subprocess.CompletedProcess[str]"]

SCRIPT = Path(__file__).parent.parent / "scripts/install-pgflow"
EMPTY = "install_pgflow_test"


@pytest.fixture
def empty(server: PostgreSQLExecutor) -> Iterator[Connection]:
    """A connection to a database with nothing in it."""
    admin: Connection = psycopg.connect(
        host=server.host, port=server.port, user=server.user, dbname="postgres", autocommit=True
    )
    with admin:
        admin.execute(f"create database {EMPTY} template template0")
        with psycopg.connect(
            host=server.host, port=server.port, user=server.user, dbname=EMPTY, autocommit=True
        ) as connection:
            yield connection
        admin.execute(f"drop database {EMPTY} with (force)")


@pytest.fixture
def install_pgflow(server: PostgreSQLExecutor, migrations: Path) -> InstallPgflow:
    def run(database: str = EMPTY) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": server.user,
            "PGDATABASE": database,
        }
        return subprocess.run(
            [SCRIPT, migrations], env=environment, text=True, capture_output=True, check=False
        )

    return run


def contents(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "select oid, xmin::text from pg_proc union all select oid, xmin::text from pg_class "
        "union all select oid, xmin::text from pg_namespace order by 1, 2"
    ).fetchall()


def test_a_second_call_changes_nothing_and_says_so(
    empty: Connection, install_pgflow: InstallPgflow
) -> None:
    first = install_pgflow(EMPTY)
    assert (first.returncode, first.stdout) == (0, f'pgflow is now in database "{EMPTY}"\n')
    before = contents(empty)

    second = install_pgflow(EMPTY)
    assert second.returncode == 0
    assert "nothing was changed" in second.stdout
    assert contents(empty) == before


def test_the_stand_in_says_what_it_is(empty: Connection, install_pgflow: InstallPgflow) -> None:
    install_pgflow(EMPTY)
    [comment] = empty.execute(
        "select obj_description('realtime.send(jsonb, text, text, boolean)'::regprocedure)"
    ).fetchall()
    assert comment == ("Stand-in that does nothing, for pgflow outside Supabase.",)


def test_a_realtime_send_that_is_there_stays(
    empty: Connection, install_pgflow: InstallPgflow
) -> None:
    empty.execute(
        """
        create schema realtime;
        create table realtime.sent (event text);
        create function realtime.send(payload jsonb, event text, topic text, private boolean)
        returns void language sql as 'insert into realtime.sent values (event)';
        """
    )
    assert install_pgflow(EMPTY).returncode == 0
    empty.execute("select pgflow.create_flow('greet')")
    empty.execute("select pgflow.add_step('greet', 'hello')")
    empty.execute("select pgflow.start_flow('greet', '{}')")
    assert ("run:started",) in empty.execute("select event from realtime.sent").fetchall()


def test_an_ordinary_role_may_not_own_what_every_run_calls(
    empty: Connection, install_pgflow: InstallPgflow
) -> None:
    empty.execute("create role somebody")
    empty.execute("create schema realtime authorization somebody")
    try:
        run = install_pgflow(EMPTY)
        assert run.returncode != 0
        assert (
            'schema "realtime" belongs to role "somebody", which is not a superuser' in run.stderr
        )
        assert "alter schema realtime owner to" in run.stderr
        assert empty.execute("select to_regnamespace('pgflow')").fetchone() == (None,)
    finally:
        empty.execute("drop schema realtime cascade")
        empty.execute("drop role somebody")


def test_an_older_pgflow_is_refused(empty: Connection, install_pgflow: InstallPgflow) -> None:
    install_pgflow(EMPTY)
    empty.execute("create function pgflow.read_with_poll() returns void language sql as 'select'")
    before = contents(empty)
    run = install_pgflow(EMPTY)
    assert run.returncode != 0
    assert "that is not pgflow 0.8 or later" in run.stderr
    assert contents(empty) == before
