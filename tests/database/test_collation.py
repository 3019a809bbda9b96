"""A database that sorts text as people do, which is what most servers make."""

from pathlib import Path

from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import connect_to, install
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
    install(server, NAME, migrations)
    with connect_to(server, NAME) as connection:
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
