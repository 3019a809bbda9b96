"""From every released version to this one, with `alter extension pgflow_worker update`."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import ROOT, connect_to, install, new_database
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]
RELEASES = sorted(
    path.name.removeprefix("pgflow_worker-").removesuffix(".tar.gz")
    for path in (ROOT / "tests/releases").iterdir()
)
FLOW = """
    flow = Flow("f", max_attempts=3)

    @flow.step
    def first(flow_input):
        return flow_input

    @flow.step
    def second(first, tx: Transaction):
        return first + 1
"""
# Everything about the extension's objects, as text.
CATALOGUE = """
    with member as (
        select classid, objid, pg_identify_object(classid, objid, 0) as identity
        from pg_depend
        where refclassid = 'pg_extension'::regclass and deptype = 'e'
            and refobjid = (select oid from pg_extension where extname = 'pgflow_worker')
    ),
    relation as (
        select pg_class.* from member
        join pg_class on classid = 'pg_class'::regclass and pg_class.oid = objid
    )
    select format('%%s: %%s', identity, obj_description(objid, classid::regclass::name)) from member
    union all
    select pg_get_functiondef(objid) || (select proacl::text from pg_proc where oid = objid)
    from member where classid = 'pg_proc'::regclass
    union all
    select format(
        '%%s.%%s %%s %%s %%s %%s', relname, attnum, attname, format_type(atttypid, atttypmod),
        attnotnull, col_description(relation.oid, attnum)
    )
    from relation join pg_attribute on attrelid = relation.oid and attnum > 0
    union all
    select format('%%s %%s %%s', relname, conname, pg_get_constraintdef(pg_constraint.oid))
    from relation join pg_constraint on conrelid = relation.oid
    union all
    select pg_get_indexdef(indexrelid) from relation join pg_index on indrelid = relation.oid
    union all
    select format('%%s %%s %%s', relname, relpersistence, relacl) from relation
    union all
    select format('%%s %%s', relname, pg_get_viewdef(oid)) from relation where relkind = 'v'
    union all
    select format('%%s dumps %%s %%s', extversion, dumped.id::regclass, dumped.condition)
    from pg_extension, unnest(extconfig, extcondition) as dumped (id, condition)
    where extname = 'pgflow_worker'
    order by 1
"""


@pytest.fixture(params=RELEASES)
def former(
    server: PostgreSQLExecutor, migrations: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The name of a database with a released version."""
    with new_database(server, "template0") as name:
        install(server, name, migrations, request.param)
        yield name


def update(session: Session) -> None:
    session.run("alter extension pgflow_worker update")


def test_there_is_a_script_from_every_release() -> None:
    changes = {path.name.partition("--")[0] for path in (ROOT / "extension/upgrade").iterdir()}
    assert RELEASES
    assert changes == set(RELEASES)


def test_an_update_gives_what_a_new_installation_gives(
    session: Session, server: PostgreSQLExecutor, former: str
) -> None:
    with connect_to(server, former) as connection:
        updated = Session(connection)
        update(updated)
        assert updated.rows(CATALOGUE) == session.rows(CATALOGUE)


def test_an_update_while_a_worker_runs_loses_nothing(
    server: PostgreSQLExecutor, former: str, background: Background
) -> None:
    with connect_to(server, former) as one, connect_to(server, former) as another:
        session, worker = Session(one), Session(another)
        session.deploy(FLOW)
        call = background(worker.work, "f", mode="wait", max_duration="4 s")
        first = session.start("f", 1)
        session.until("select status = 'completed' from pgflow.runs where run_id = %s", first)
        update(session)
        for number in range(20):
            session.start("f", number)
        assert call.result()["failed"] == 0
        # The next call, in a session that has the former version's package, has this one's.
        report = worker.work("f", mode="drain")
        assert report["failed"] == 0
        outputs = session.rows("select output ->> 'second' from pgflow.runs order by started_at")
        assert [int(output) for (output,) in outputs] == [2, *range(1, 21)]
        assert session.deploy(FLOW) == [("f", "verified", [])]
        control = (ROOT / "extension/pgflow_worker.control").read_text()
        version = session.value(
            "select extversion from pg_extension where extname = 'pgflow_worker'"
        )
        assert re.search(rf"default_version = '{version}'", control)
        assert counts(worker.work("f", mode="drain")) == {}
