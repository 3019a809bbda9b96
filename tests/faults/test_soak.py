"""A minute of the soak test: `make soak` goes on for longer."""

import os
from pathlib import Path

import pytest

from bench.cluster import throw_away_cluster
from tests.faults.soak import soak


@pytest.mark.timeout(900)
def test_nothing_is_lost_and_no_sql_happens_twice(migrations: Path) -> None:
    # A server of its own: this one crashes.
    with throw_away_cluster(os.environ.get("PG_CONFIG", "pg_config")) as cluster:
        database = cluster.create_with_pgflow("soak", migrations)
        counts = soak(cluster, database, seconds=30, kill_every=2, seed=1)
    print(counts)
    assert counts.is_clean, counts
    # It has done what it is for.
    assert counts.runs["completed"] > 0
    assert counts.attempts["died"] + counts.attempts["suspected"] > 0
