"""docs/testing.md: its examples do what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import ROOT
from tests.database.conftest import Session

Environment = dict[str, str]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A directory with the files that the document shows."""
    text = (ROOT / "docs/testing.md").read_text()
    files = re.findall(r"`(\S+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == [
        *("booking.py", "test_booking.py", "test_booking_in_database.py", "booking.sql")
    ]
    for name, content in files:
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def environment(server: PostgreSQLExecutor, database: str, session: Session) -> Environment:
    session.run("create table bookings (customer text primary key, price integer)")
    return os.environ | {
        "PGHOST": server.host,
        "PGPORT": str(server.port),
        "PGUSER": server.user,
        "PGDATABASE": database,
        "PYTHONPATH": str(ROOT / "plpy_src"),
    }


@pytest.mark.parametrize(
    ("name", "passed"), [("test_booking.py", 3), ("test_booking_in_database.py", 2)]
)
def test_the_tests_pass_and_leave_nothing(
    examples: Path, environment: Environment, session: Session, name: str, passed: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", name],
        cwd=examples,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert f"{passed} passed" in done.stdout, done.stdout
    assert session.rows("select from bookings union all select from pgflow.flows") == []


def test_the_sql_passes_and_leaves_nothing(
    examples: Path, environment: Environment, session: Session
) -> None:
    done = subprocess.run(
        ["psql", "-XqAt", "-f", "booking.sql"],
        cwd=examples,
        env=environment,
        capture_output=True,
        text=True,
    )
    [shown] = re.findall(
        r"booking\.sql\n(    1\.\..*?)\n\n", (ROOT / "docs/testing.md").read_text(), re.DOTALL
    )
    assert done.stdout.splitlines() == [line.strip() for line in shown.splitlines()]
    assert session.rows("select from bookings union all select from pgflow.flows") == []
