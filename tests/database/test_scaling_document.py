"""docs/scaling.md: its functions of PL/Proxy, with two databases as the shards."""

import json
import re
from collections.abc import Iterator

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import ROOT, connect_to, new_database
from tests.database.conftest import Session

# Every key has its place by hashtext(key), everywhere.
KEYS = {"k1": 0, "customer 42": 1}


@pytest.fixture
def proxy(server: PostgreSQLExecutor) -> Iterator[Session]:
    """A database that has PL/Proxy and nothing else."""
    with (
        new_database(server, "template0") as name,
        connect_to(server, name) as connection,
    ):
        session = Session(connection)
        if not session.rows("select from pg_available_extensions where name = 'plproxy'"):
            pytest.skip("PL/Proxy is not installed")
        yield session


@pytest.fixture
def shards(server: PostgreSQLExecutor, template: str) -> Iterator[list[Session]]:
    """Two databases with README's first flow to come."""
    with (
        new_database(server, template) as one,
        new_database(server, template) as two,
        connect_to(server, one) as of_one,
        connect_to(server, two) as of_two,
    ):
        sessions = [Session(of_one), Session(of_two)]
        for session in sessions:
            session.run("create table greetings (text text)")
        yield sessions


@pytest.fixture
def setup(server: PostgreSQLExecutor, proxy: Session, shards: list[Session]) -> None:
    """What the document has the proxy run, connected to our shards."""
    text = (ROOT / "docs/scaling.md").read_text()
    blocks = re.findall(r"```sql\n(create (?:extension|function) .*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for number, shard in enumerate(shards, 1):
        name = shard.value("select current_database()")
        ours = f"'host={server.host} port={server.port} dbname={name}'"
        blocks[0], found = re.subn(rf"'host=\S+ dbname=app{number}'", ours, blocks[0])
        assert found == 1
    for block in blocks:
        proxy.run(block)


def greet() -> str:
    readme = (ROOT / "README.md").read_text()
    [source] = re.findall(r"Save this as `greet.py`:\n\n```python\n(.*?)```", readme, re.DOTALL)
    return str(source)


def test_runs_go_to_the_shard_of_their_key(
    setup: None, proxy: Session, shards: list[Session]
) -> None:
    names = [shard.value("select current_database()") for shard in shards]
    for dry in (True, False):
        deployed = proxy.rows("select * from flows.deploy('greet', %s, %s)", greet(), dry)
        assert {(row[0], row[2]) for row in deployed} == {(name, "compiled") for name in names}
    start = "select flows.start_flow(%s, 'greet', %s, %s)"
    for key, place in KEYS.items():
        run = proxy.value("select gen_random_uuid()")
        assert proxy.value(start, key, json.dumps({"names": [key]}), run) == run
        assert shards[place].work("greet", mode="drain")["completed"] == 3
        ended = proxy.rows("select * from flows.wait_for_run(%s, %s, '1 minute')", key, run)
        assert ended == [("completed", {"save": 1}, None)]
        found = proxy.rows("select shard, status from flows.find_run(%s)", run)
        assert found == [(names[place], "completed")]
        assert shards[place].value("select text from greetings") == f"Hello, {key}!"


def test_a_shard_commits_whatever_becomes_of_the_caller(
    setup: None, proxy: Session, shards: list[Session]
) -> None:
    proxy.rows("select * from flows.deploy('greet', %s, false)", greet())
    run = proxy.value("select gen_random_uuid()")
    by_id = "select flows.start_flow('greet', '{\"names\": []}', %s)"
    proxy.run("begin")
    proxy.rows(by_id, run)
    proxy.run("rollback")
    assert proxy.value("select status from flows.find_run(%s)", run) == "started"
    # By its id a run is found again, so that it is not started twice.
    with pytest.raises(psycopg.Error, match=f"run {run} exists already") as refused:
        proxy.rows(by_id, run)
    assert refused.value.sqlstate == "PW002"


def test_every_shard_is_told(setup: None, proxy: Session, shards: list[Session]) -> None:
    proxy.rows("select * from flows.deploy('greet', %s, false)", greet())
    names = [shard.value("select current_database()") for shard in shards]
    assert sorted(proxy.rows("select flows.pause('greet', 'moving')")) == [
        (name,) for name in names
    ]
    for shard in shards:
        shard.start("greet", {"names": []})
        assert shard.work("greet")["status"] == "paused"
    assert len(proxy.rows("select flows.resume('greet')")) == 2
    assert {row[:4] for row in proxy.rows("select * from flows.flow_status()")} == {
        (name, "greet", 0, 1) for name in names
    }
