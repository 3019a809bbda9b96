"""A server to test with, and databases in it. Nothing starts unless a test asks for it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import settings
from psycopg import sql
from pytest_postgresql import factories
from pytest_postgresql.executors import PostgreSQLExecutor

Connection = psycopg.Connection[tuple[Any, ...]]

ROOT = Path(__file__).parent.parent
TEMPLATE = "pgflow_worker_template"
CRON_DATABASE = "cron_test"
# pytest --hypothesis-profile=long
settings.register_profile("long", max_examples=200, stateful_step_count=30, print_blob=True)
SOCKET_DIRECTORY = "/tmp"  # a socket's path may not be long


def pg_ctl() -> str | None:
    try:
        bindir = subprocess.check_output(
            [os.environ.get("PG_CONFIG", "pg_config"), "--bindir"],
            text=True,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # tests/unit needs no server
    return f"{bindir.strip()}/pg_ctl"


def server_with(options: str = "") -> Callable[..., Any]:
    """A fixture: a server that has pg_cron."""
    return factories.postgresql_proc(
        executable=pg_ctl(),
        port=None,
        unixsocketdir=SOCKET_DIRECTORY,
        startparams="-w",
        postgres_options=(
            "-c fsync=off -c max_connections=200 -c shared_preload_libraries=pg_cron "
            f"-c cron.database_name={CRON_DATABASE} -c cron.host={SOCKET_DIRECTORY} {options}"
        ),
    )


server = server_with()


def connect_to(server: PostgreSQLExecutor, dbname: str, **kwargs: Any) -> Connection:
    """A connection as the server's superuser, unless told otherwise."""
    parameters: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "dbname": dbname,
        "autocommit": True,
        "prepare_threshold": None,
    }
    return psycopg.connect(**(parameters | kwargs))


def create_database(server: PostgreSQLExecutor, name: str, template: str) -> None:
    with connect_to(server, "postgres") as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )


@pytest.fixture(scope="session")
def migrations() -> Path:
    """The directory of pgflow's migrations."""
    if directory := os.environ.get("PGFLOW_MIGRATIONS"):
        return Path(directory)
    found = sorted(ROOT.glob(".dev/pgflow-*/"))
    if not found:
        pytest.fail("pgflow's migrations are not here: run make dev-deps")
    return found[-1]


def install(
    server: PostgreSQLExecutor, database: str, migrations: Path, release: str | None = None
) -> None:
    """Install pgflow and pgflow_worker, this version or a former one, into a database."""
    environment = os.environ | {
        "PGHOST": server.host,
        "PGPORT": str(server.port),
        "PGUSER": server.user,
        "PGDATABASE": database,
    }
    subprocess.run([ROOT / "scripts/install-pgflow", migrations], env=environment, check=True)
    with connect_to(server, database) as connection:
        version = "" if release is None else f"version '{release}'"
        connection.execute(f"create extension pgflow_worker {version} cascade")


def make_template(server: PostgreSQLExecutor, migrations: Path) -> str:
    """Create the database that others are copies of; its name."""
    create_database(server, TEMPLATE, "template0")
    install(server, TEMPLATE, migrations)
    return TEMPLATE


_numbers = count(1)


@contextmanager
def new_database(server: PostgreSQLExecutor, template: str) -> Iterator[str]:
    """The name of a copy of the template, which is dropped in the end."""
    name = f"test_{next(_numbers)}"
    create_database(server, name, template)
    try:
        yield name
    finally:
        with connect_to(server, "postgres") as connection:
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )


@pytest.fixture(scope="session")
def template(
    server: PostgreSQLExecutor,
    migrations: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> str:
    """A database with pgmq, pgflow and pgflow_worker; nothing is connected to it."""
    name = make_template(server, migrations)
    # For docs/compatibility.md.
    record_testsuite_property("pgflow", migrations.name.removeprefix("pgflow-"))
    with connect_to(server, name) as connection:
        connection.execute("""create function pg_temp.python() returns text language plpython3u
            as 'import platform; return platform.python_version()'""")
        versions = connection.execute("""
            select 'PostgreSQL', split_part(current_setting('server_version'), ' ', 1)
            union all select 'Python', pg_temp.python()
            union all select extname, extversion from pg_extension where extname = 'pgmq'""")
        for of_what, version in versions:
            record_testsuite_property(of_what, version)
    return name


@pytest.fixture(scope="session")
def spare_databases(
    server: PostgreSQLExecutor, template: str
) -> Iterator[Callable[[], AbstractContextManager[str]]]:
    """Gives new_database()s that are made, and dropped, while another test runs."""
    with ThreadPoolExecutor(max_workers=1) as background:

        def make() -> tuple[AbstractContextManager[str], str]:
            database = new_database(server, template)
            return database, database.__enter__()

        spare = [background.submit(make)]

        @contextmanager
        def take() -> Iterator[str]:
            database, name = spare.pop().result()
            spare.append(background.submit(make))
            yield name
            background.submit(database.__exit__, None, None, None)

        yield take
        database, _ = spare.pop().result()
        background.submit(database.__exit__, None, None, None)


@pytest.fixture
def database(spare_databases: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """The name of a new database, a copy of the template."""
    with spare_databases() as name:
        yield name


@contextmanager
def connections(server: PostgreSQLExecutor, database: str) -> Iterator[Callable[..., Connection]]:
    """Opens connections to a database, and closes them in the end."""
    with ExitStack() as stack:

        def open_connection(**kwargs: Any) -> Connection:
            connection = connect_to(server, database, **kwargs)
            stack.callback(connection.close)
            return connection

        yield open_connection


@pytest.fixture
def connect(server: PostgreSQLExecutor, database: str) -> Iterator[Callable[..., Connection]]:
    """Opens further connections to the test's database: connect(user="somebody")."""
    with connections(server, database) as open_connection:
        yield open_connection


@pytest.fixture
def db(connect: Callable[..., Connection]) -> Connection:
    """A connection to the test's database; autocommit, so that CALL may commit."""
    return connect()
