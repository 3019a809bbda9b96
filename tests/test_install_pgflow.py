"""scripts/install-pgflow: pgflow outside Supabase."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.versions.conftest import VERSIONS

Connection = psycopg.Connection[tuple[Any, ...]]
InstallPgflow = Callable[..., "subprocess.CompletedProcess[str]"]

SCRIPT = Path(__file__).parent.parent / "scripts/install-pgflow"
EMPTY = "install_pgflow_test"
STAND_IN = """
    select lanname, obj_description(pg_proc.oid, 'pg_proc')
    from pg_proc join pg_language on pg_language.oid = prolang
    where pg_proc.oid = 'realtime.send(jsonb, text, text, boolean)'::regprocedure
"""
FORMER = """
    create or replace function realtime.send(
        payload jsonb, event text, topic text, private boolean default true
    ) returns void language sql as 'select';
    comment on function realtime.send(jsonb, text, text, boolean) is
    'Stand-in that does nothing, for pgflow outside Supabase.';
"""


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
    def run(database: str, directory: Path = migrations) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": server.user,
            "PGDATABASE": database,
        }
        return subprocess.run(
            [SCRIPT, directory], env=environment, text=True, capture_output=True, check=False
        )

    return run


@pytest.fixture
def first_migrations(migrations: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a directory of the migrations up to one of them: pgflow as it was."""

    def directory(last: str) -> Path:
        # The first versions' functions are not valid with later ones of pgmq.
        (tmp_path / "0_settings.sql").write_text("set check_function_bodies = off;")
        for file in migrations.glob("*.sql"):
            if file.name[: len(last)] <= last:
                shutil.copy(file, tmp_path)
        return tmp_path

    return directory


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
    assert empty.execute(STAND_IN).fetchone() == (
        "plpgsql",
        "Stand-in for pgflow outside Supabase: where pgflow.notify is on, pgflow's events are "
        "notifications of channel pgflow.",
    )


def test_the_former_stand_in_is_updated(empty: Connection, install_pgflow: InstallPgflow) -> None:
    install_pgflow(EMPTY)
    [present] = empty.execute(STAND_IN).fetchall()
    empty.execute(FORMER)
    run = install_pgflow(EMPTY)
    assert (run.returncode, run.stdout) == (
        0,
        f'pgflow is already in database "{EMPTY}"; the stand-in for realtime.send was updated\n',
    )
    assert empty.execute(STAND_IN).fetchall() == [present]
    assert "nothing was changed" in install_pgflow(EMPTY).stdout


def test_the_former_stand_in_is_updated_where_pgflow_is_not_yet(
    empty: Connection, install_pgflow: InstallPgflow
) -> None:
    empty.execute("create schema realtime")
    empty.execute(FORMER)
    assert install_pgflow(EMPTY).returncode == 0
    assert [row[0] for row in empty.execute(STAND_IN)] == ["plpgsql"]


@pytest.mark.parametrize(
    "others",
    [FORMER.replace("'select'", "'notify mine'"), FORMER.replace("Stand-in that does", "It does")],
    ids=["body", "comment"],
)
def test_a_stand_in_that_is_not_the_former_one_stays(
    empty: Connection, install_pgflow: InstallPgflow, others: str
) -> None:
    install_pgflow(EMPTY)
    empty.execute(others)
    before = contents(empty)
    assert "nothing was changed" in install_pgflow(EMPTY).stdout
    assert contents(empty) == before


def test_a_missing_realtime_send_is_made_good(
    empty: Connection, install_pgflow: InstallPgflow
) -> None:
    install_pgflow(EMPTY)
    empty.execute("drop schema realtime cascade")
    run = install_pgflow(EMPTY)
    assert (run.returncode, run.stdout) == (
        0,
        f'pgflow is already in database "{EMPTY}"; '
        "realtime.send was missing: it has a stand-in now\n",
    )
    empty.execute("select pgflow.create_flow('greet')")
    empty.execute("select pgflow.add_step('greet', 'hello')")
    empty.execute("select pgflow.start_flow('greet', '{}')")


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


@pytest.mark.parametrize("version", ["0.3.0", "0.8.1"])
def test_every_supported_pgflow_is_known(
    empty: Connection,
    install_pgflow: InstallPgflow,
    first_migrations: Callable[[str], Path],
    version: str,
) -> None:
    install_pgflow(EMPTY, first_migrations(VERSIONS[version]))
    before = contents(empty)
    run = install_pgflow(EMPTY)
    assert (run.returncode, "nothing was changed" in run.stdout) == (0, True)
    assert contents(empty) == before


def test_an_older_pgflow_is_refused(
    empty: Connection, install_pgflow: InstallPgflow, first_migrations: Callable[[str], Path]
) -> None:
    install_pgflow(EMPTY, first_migrations("20250517072017"))  # 0.2
    empty.execute(FORMER)
    before = contents(empty)
    run = install_pgflow(EMPTY)
    assert run.returncode != 0
    assert "that is not pgflow 0.3 or later" in run.stderr
    assert contents(empty) == before
