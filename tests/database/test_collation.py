"""A database that sorts text as people do, which is what most servers make."""

import os
import subprocess
from pathlib import Path

from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import ROOT, connect_to
from tests.database.conftest import Session

NAME = "collation_test"


def test_a_flow_is_verified_and_run_whatever_the_databases_collation(
    server: PostgreSQLExecutor, migrations: Path
) -> None:
    with connect_to(server, "postgres") as connection:
        connection.execute(
            f"create database {NAME} template template0 encoding 'UTF8' "
            "locale_provider icu icu_locale 'en-US'"
        )
    environment = os.environ | {
        "PGHOST": server.host,
        "PGPORT": str(server.port),
        "PGUSER": server.user,
        "PGDATABASE": NAME,
    }
    subprocess.run([ROOT / "scripts/install-pgflow", migrations], env=environment, check=True)
    with connect_to(server, NAME) as connection:
        connection.execute("create extension pgflow_worker cascade")
        session = Session(connection)
        # "getB" is before "get_a" in Python and in collation "C", and behind it here.
        source = """
            flow = Flow("f")

            @flow.step
            def get_a(flow_input): return 1

            @flow.step("getB")
            def get_b(flow_input): return 2

            @flow.step
            def last(get_a, get_b): return get_a + get_b
        """
        session.deploy(source)
        session.start("f")
        assert session.work("f", mode="drain")["completed"] == 3
        assert session.deploy(source) == [("f", "verified", [])]
