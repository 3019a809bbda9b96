"""Servers whose pg_cron runs its jobs, in both of its ways."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import (
    CRON_DATABASE,
    TEMPLATE,
    Connection,
    connect_to,
    create_database,
    make_template,
    server_with,
)

server_of_background_workers = server_with("-c cron.use_background_workers=on")
server_without_pg_cron = server_with("-c shared_preload_libraries=")


def make_cron_database(
    server: PostgreSQLExecutor, record_testsuite_property: Callable[[str, object], None]
) -> PostgreSQLExecutor:
    create_database(server, CRON_DATABASE, TEMPLATE)
    with connect_to(server, CRON_DATABASE) as connection:
        connection.execute("create extension pg_cron")
        [[version]] = connection.execute(
            "select extversion from pg_extension where extname = 'pg_cron'"
        ).fetchall()
        record_testsuite_property("pg_cron", version)
    return server


@pytest.fixture(scope="session")
def libpq(
    server: PostgreSQLExecutor,
    template: str,
    record_testsuite_property: Callable[[str, object], None],
) -> PostgreSQLExecutor:
    """A server whose pg_cron connects to it as any client does."""
    return make_cron_database(server, record_testsuite_property)


@pytest.fixture(scope="session")
def background_workers(
    server_of_background_workers: PostgreSQLExecutor,
    migrations: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> PostgreSQLExecutor:
    """A server whose pg_cron starts a background worker for every firing."""
    make_template(server_of_background_workers, migrations)
    return make_cron_database(server_of_background_workers, record_testsuite_property)


@pytest.fixture(scope="session")
def without_pg_cron(
    server_without_pg_cron: PostgreSQLExecutor, migrations: Path
) -> PostgreSQLExecutor:
    """A server that has not loaded pg_cron."""
    make_template(server_without_pg_cron, migrations)
    return server_without_pg_cron


@pytest.fixture(params=["libpq", "background_workers"])
def cron(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection to the database of pg_cron's jobs.

    There can be only one in a server: its data outlives a test, its jobs do not.
    """
    with connect_to(request.getfixturevalue(request.param), CRON_DATABASE) as connection:
        yield connection
        connection.execute("select cron.unschedule(jobid) from cron.job")
