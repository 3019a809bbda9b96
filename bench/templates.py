"""Databases that measurements get copies of."""

from __future__ import annotations

from pathlib import Path

from bench.child import Child
from bench.cluster import Cluster, Database

HERE = Path(__file__).parent


def pgflow_template(cluster: Cluster, migrations: Path) -> Database:
    """pgmq, pgflow, pgflow_worker and the loop; no flows."""
    database = cluster.create_with_pgflow("bench_pgflow", migrations)
    database.run((HERE / "sql/loop.sql").read_text())
    return database


def library_template(cluster: Cluster, module: str) -> Database:
    """The schema of a library; made once."""
    database = Database(cluster.maintenance.socket, f"bench_{module}")
    if not cluster.maintenance.rows("select from pg_database where datname = %s", database.name):
        cluster.create(database.name)
        Child(module, database).run("install")
    return database
