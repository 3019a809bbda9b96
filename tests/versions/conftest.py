"""Databases with pgflow as it was: its migrations are cumulative, so the first ones are a version.

The package of which `make dev-deps` has the migrations ends with 0.8.1. Later versions are tested
where PGFLOW_MIGRATIONS_LATER names a directory with all migrations up to one of them.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import Connection, create_database, install, new_database
from tests.database.conftest import Session

# The last migration of a version.
VERSIONS = {
    "0.3.0": "20250609105135",
    "0.3.1": "20250610180554",
    "0.4.0": "20250614124241",
    "0.4.2": "20250619195327",
    "0.5.0": "20250627090700",
    "0.5.3": "20250707210212",
    "0.6.0": "20250719205006",
    "0.7.0": "20251006073122",
    "0.7.2": "20251103222045",
    "0.8.1": "20251104080523",
}
LATER = {
    "0.10.0": "20251209074533",
    "0.11.0": "20251212100113",
    "0.12.0": "20251225163110",
    "0.13.0": "20260103145141",
    "0.13.2": "20260120205547",
    "0.14.1": "20260214181656",
    "0.15.1": "20260904095427",
    "0.16.0": "20260907082520",
    "0.17.0": "20260913093141",
}
WITH_CONDITIONS = [*LATER][[*LATER].index("0.14.1") :]
# What later migrations want of Supabase, and flows do not need: extensions, jobs of pg_cron.
SUPABASE = re.compile(
    r'^(CREATE EXTENSION .*?"pg_(net|cron)"|SELECT pgflow\.setup_\w+_cron\().*?;$',
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def directory_of(version: str, migrations: Path) -> Path:
    """Where the migrations of a version are; skips the test if nowhere."""
    if version in VERSIONS:
        return migrations
    later = os.environ.get("PGFLOW_MIGRATIONS_LATER")
    if later is None or not list(Path(later).glob(f"{LATER[version]}*.sql")):
        # One short reason for all of them: docs/compatibility.md counts by reason.
        pytest.skip("PGFLOW_MIGRATIONS_LATER has no such pgflow")
    return Path(later)


@pytest.fixture(scope="session")
def templates(
    server: PostgreSQLExecutor, migrations: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """Makes a database with a version of pgflow that others are copies of; its name."""
    made: dict[str, str] = {}

    def template(version: str) -> str:
        if version in made:
            return made[version]
        source = directory_of(version, migrations)
        last = (VERSIONS | LATER)[version]
        folder = tmp_path_factory.mktemp("migrations")
        (folder / "00000000000000_settings.sql").write_text("set check_function_bodies = off;")
        for file in sorted(source.glob("*.sql")):
            if file.name[: len(last)] <= last:
                (folder / file.name).write_text(SUPABASE.sub("", file.read_text()))
        name = f"pgflow_{version.replace('.', '_')}"
        create_database(server, name, "template0")
        install(server, name, folder)
        made[version] = name
        return name

    return template


@pytest.fixture(params=[*VERSIONS, *LATER])
def version(request: pytest.FixtureRequest) -> str:
    """Each version of pgflow."""
    name: str = request.param
    return name


@pytest.fixture
def database(
    server: PostgreSQLExecutor, templates: Callable[[str], str], version: str
) -> Iterator[str]:
    """The name of a new database with that version."""
    with new_database(server, templates(version)) as name:
        yield name


@pytest.fixture
def session(db: Connection) -> Session:
    return Session(db)
