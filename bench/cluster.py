"""A throw-away PostgreSQL server with its own data, and databases in it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

Connection = psycopg.Connection[tuple[Any, ...]]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Database:
    """A database, by its name and the directory of the server's socket."""

    socket: Path
    name: str

    @property
    def url(self) -> str:
        """Where it is, for libraries that want a URL."""
        return f"postgresql://postgres@/{self.name}?host={quote(str(self.socket), safe='')}"

    @property
    def environment(self) -> dict[str, str]:
        """Where it is, for programs that use libpq."""
        return os.environ | {
            "PGHOST": str(self.socket),
            "PGUSER": "postgres",
            "PGDATABASE": self.name,
        }

    def connect(self, **options: Any) -> Connection:
        """A new session, in autocommit so that CALL may commit. options: psycopg's."""
        return psycopg.connect(self.url, autocommit=True, **options)

    def run(self, *statements: str) -> None:
        """Execute the statements in a session of their own."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def rows(self, query: str, *args: object) -> list[tuple[Any, ...]]:
        """The answer to a query in a session of its own."""
        with self.connect() as connection:
            return connection.execute(query.encode(), args or None).fetchall()


class Cluster:
    """A server in a directory of its own: `data`, `log` and its socket."""

    def __init__(self, directory: Path, bindir: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.log = directory / "log"
        self._bindir = bindir
        self._numbers = count(1)

    def initialize(self) -> None:
        """Make the data directory."""
        _run(self._bindir / "initdb", "--pgdata", self.data, "--username=postgres", "--auth=trust",
             "--encoding=UTF8", "--locale=C.UTF-8")  # fmt: skip
        with (self.data / "postgresql.conf").open("a") as file:
            # Everything else is PostgreSQL's default, fsync included.
            file.write("listen_addresses = ''\n")
            file.write(f"unix_socket_directories = '{self.directory}'\n")

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        self._control("start", "--wait", f"--log={self.log}")

    def stop(self) -> None:
        """Stop the server at once."""
        self._control("stop", "--mode=immediate")

    def restart(self, mode: str) -> None:
        """Stop and start the server. mode: of pg_ctl."""
        self._control("restart", "--wait", f"--mode={mode}", f"--log={self.log}")

    @property
    def is_running(self) -> bool:
        """Whether there is a postmaster."""
        status: list[str | Path] = [self._bindir / "pg_ctl", "status", "--pgdata", self.data]
        return subprocess.run(status, stdout=subprocess.DEVNULL).returncode == 0

    @property
    def maintenance(self) -> Database:
        """A database for looking at the others."""
        return Database(self.directory, "postgres")

    def create(self, name: str, template: str = "template0") -> Database:
        """Create a database."""
        with self.maintenance.connect() as connection:
            connection.execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
        return Database(self.directory, name)

    def create_with_pgflow(self, name: str, migrations: Path) -> Database:
        """Create a database with pgmq, pgflow and pgflow_worker; no flows."""
        database = self.create(name)
        subprocess.run(
            [ROOT / "scripts/install-pgflow", migrations],
            env=database.environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        database.run("create extension pgflow_worker cascade")
        return database

    @contextmanager
    def copy(self, template: Database) -> Iterator[Database]:
        """A new database, a copy of the template, that is dropped afterwards."""
        database = self.create(f"{template.name}_{next(self._numbers)}", template.name)
        try:
            yield database
        finally:
            with self.maintenance.connect() as connection:
                connection.execute(
                    sql.SQL("drop database {} with (force)").format(sql.Identifier(database.name))
                )

    def commits(self, database: Database) -> int:
        """How many transactions were committed in the database; nobody may be connected to it.

        A session reports its last commits when it ends, a moment after its client has left.
        """
        with self.maintenance.connect() as connection:
            deadline = time.monotonic() + 10
            while connection.execute(
                """select from pg_stat_activity
                where datname = %s and backend_type = 'client backend'""",
                [database.name],
            ).fetchone():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"somebody is still connected to {database.name}")
                time.sleep(0.01)
            [row] = connection.execute(
                "select xact_commit from pg_stat_database where datname = %s", [database.name]
            )
        return int(row[0])

    def _control(self, action: str, *options: str) -> None:
        # A server that crashed may need more than pg_ctl's minute.
        _run(self._bindir / "pg_ctl", action, "--silent", "--timeout=300", "--pgdata", self.data,
             *options)  # fmt: skip


@contextmanager
def throw_away_cluster(pg_config: str) -> Iterator[Cluster]:
    """A new server, stopped and removed afterwards. /var/tmp, unlike /tmp, is never in memory."""
    bindir = Path(subprocess.check_output([pg_config, "--bindir"], text=True).removesuffix("\n"))
    parent = os.environ.get("TMPDIR", "/var/tmp")
    with tempfile.TemporaryDirectory(prefix="pgflow_worker_", dir=parent) as name:
        cluster = Cluster(Path(name), bindir)
        cluster.initialize()
        try:
            cluster.start()
            yield cluster
        finally:
            if cluster.is_running:
                cluster.stop()


def _run(*command: str | Path) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
