"""Less than a minute of `make soak`."""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from bench.cluster import Database, throw_away_cluster
from tests.faults.books import Counts, wrong
from tests.faults.soak import soak

pytestmark = pytest.mark.timeout(900)

Soaked = tuple[Database, Counts]


@pytest.fixture(scope="module")
def soaked(migrations: Path) -> Iterator[Soaked]:
    """A database after the soak, and what that has found. The server is its own: it crashes."""
    with throw_away_cluster(os.environ.get("PG_CONFIG", "pg_config")) as cluster:
        database = cluster.create_with_pgflow("soak", migrations)
        counts = soak(cluster, database, seconds=30, kill_every=2, seed=1)
        print(counts)
        yield database, counts


def test_nothing_is_lost_and_no_sql_happens_twice(soaked: Soaked) -> None:
    _, counts = soaked
    assert counts.is_clean, counts
    # It has done what it is for.
    assert counts.runs["completed"] > 0
    assert sum(counts.attempts[outcome] for outcome in ("died", "suspected", "crashed")) > 0


def test_the_checks_find_what_must_not_be(soaked: Soaked) -> None:
    database, _ = soaked
    runs = [
        run_id
        for (run_id,) in database.rows(
            "select run_id from pgflow.runs where flow_slug = 'orders' and status = 'completed'"
        )
    ]

    def of(number: int, step_slug: str = "book") -> str:
        return f"where run_id = '{runs[number]}' and step_slug = '{step_slug}'"

    database.run(
        f"""update pgflow.runs set status = 'started', completed_at = null
        where run_id = '{runs[0]}'""",
        f"""update pgflow.runs set status = 'failed', completed_at = null, failed_at = now()
        where run_id = '{runs[1]}'""",
        f"insert into effects select * from effects {of(2)}",
        f"delete from effects {of(3)}",
        f"insert into effects values ('{uuid4()}', 'book', 0, 1)",
        f"""update pgflow.step_tasks set status = 'started', completed_at = null, output = null
        {of(4)}""",
        f"update pgflow.step_tasks set attempts_count = 5 {of(5)}",
        f"delete from pgflow_worker.attempts {of(6)}",
        f"update pgflow.step_tasks set error_message = 'wrong input: 1' {of(7)}",
        f"""select pgmq.send('orders', '{{"run_id": "{runs[8]}"}}')""",
    )
    found = wrong(
        database,
        acknowledged=[uuid4()],
        sent=["twice", "twice"],
        log=["LOG:  server process (PID 1) was terminated by signal 11: Segmentation fault"],
    )
    assert [name for name, examples in found.items() if not examples] == []
