"""A dump of the database, restored into another one."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import connect_to, new_database
from tests.database.conftest import Session, counts

SOURCE = """
    import helper
    flow = Flow("f", max_attempts=3)

    @flow.step
    def first(flow_input):
        return helper.double(flow_input)

    @flow.map(over=first)
    def second(element, tx: Transaction):
        return element + 1
"""
Dump = Callable[[str, str], None]  # from, to


@pytest.fixture
def dump_into(server: PostgreSQLExecutor, tmp_path: Path) -> Dump:
    """Dumps a database and restores it into another, as an administrator does."""

    def dump(database: str, target: str) -> None:
        environment = os.environ | {
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": server.user,
        }
        tools = Path(server.executable).parent
        file = tmp_path / "dump"
        subprocess.run(
            [tools / "pg_dump", "--format=custom", f"--file={file}", database],
            env=environment,
            check=True,
        )
        subprocess.run(
            [tools / "pg_restore", "--exit-on-error", f"--dbname={target}", file],
            env=environment,
            check=True,
        )

    return dump


def test_a_restored_database_goes_on_where_it_was(
    session: Session, database: str, server: PostgreSQLExecutor, dump_into: Dump
) -> None:
    session.deploy("def double(list): return [2 * number for number in list]", "helper")
    session.deploy(SOURCE)
    session.deploy(SOURCE + "    # changed\n")
    session.run("update pgflow_worker.flows set workers = 3")
    session.run("insert into pgflow_worker.settings values ('memory_mb', '300')")
    session.run("select pgflow_worker.pause('f', 'to be dumped')")
    session.run("select pgflow_worker.resume('f')")
    for _ in range(2):
        session.start("f", [1, 2])
    session.work("f")
    session.run("select pgflow_worker.pause('f', 'to be dumped')")
    tables = ("modules", "flows", "settings", "pauses", "attempts", "invocations")
    contents = (
        "select (select array_agg(t) from (select * from pgflow_worker.{} order by 1, 2) as t)"
    )

    def all_rows(of: Session) -> list[Any]:
        return [of.value(contents.format(table)) for table in tables]

    with new_database(server, "template0") as target:
        dump_into(database, target)
        with connect_to(server, target) as connection:
            restored = Session(connection)
            assert all_rows(restored) == all_rows(session)
            restored.run("select pgflow_worker.resume('f')")
            assert counts(restored.work("f", mode="drain")) == {"completed": 4}
            assert (
                restored.rows("select status, output from pgflow.runs")
                == [("completed", {"second": [3, 5]})] * 2
            )
            # What is generated goes on after what was restored.
            [[flow, status, _]] = restored.deploy(SOURCE)
            assert (flow, status) == ("f", "verified")
            assert restored.value("select max(version) from pgflow_worker.modules") == 3
