"""What runs leave behind, how it is removed, and what it does to the write-ahead log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from statistics import median

from bench.cluster import Cluster, Database
from bench.contestants import Work, deploy, must_be, start_runs
from bench.latency import cpu_seconds
from bench.report import Part
from bench.sessions import CALL, MEGABYTE
from bench.workloads import Sizes

FLOW = "hundred_bytes"
# Runs are started and worked on in rounds, with a VACUUM after each, as autovacuum would.
ROUNDS = 10

OUR_TABLES = "schemaname in ('pgflow', 'pgmq', 'pgflow_worker') and relname <> 'meta'"
TABLE_SIZES = f"""select schemaname || '.' || relname, pg_total_relation_size(relid)
    from pg_stat_user_tables where {OUR_TABLES}"""
WAL = "select (pg_current_wal_insert_lsn() - '0/0')::bigint"

RANDOM_ID = "gen_random_uuid()"
# As uuidv7() of PostgreSQL 18: the first 48 bits are the time in milliseconds.
TIMED_ID = """(
    lpad(to_hex((1000 * extract(epoch from clock_timestamp()))::bigint), 12, '0')
    || right(replace(gen_random_uuid()::text, '-', ''), 20)
)::uuid"""


def counted(database: Database, query: str) -> Counter[str]:
    """The answer to a query for names and numbers."""
    return Counter(dict(database.rows(query)))


def growth(cluster: Cluster, template: Database, sizes: Sizes) -> Iterator[Part]:
    """How the tables grow, and shrink."""
    runs = sizes.stored_runs
    full, pruned, removals = [], [], []
    with cluster.copy(template) as database:
        deploy(database, FLOW)
        empty = counted(database, TABLE_SIZES)
        for _ in range(3):
            for _ in range(ROUNDS):
                start_runs(database, FLOW, Work(FLOW, runs // ROUNDS))
                database.rows(CALL, FLOW)
                database.run("vacuum")
            full.append(counted(database, TABLE_SIZES))
            removals.append(_remove(database, runs))
            pruned.append(counted(database, TABLE_SIZES))
    grown = full[0] - empty
    total = "together"
    for at in (grown, *full, *pruned):
        at[total] = at.total()
    yield (
        f"what {runs} one-step runs leave, outputs of 100 bytes",
        ("", "bytes/run", "MB", "pruned, vacuumed", "three times as many, pruned in between"),
        [
            [
                table,
                f"{size / runs:.0f}",
                *(f"{at[table] / MEGABYTE:.1f}" for at in (full[0], pruned[0], full[2])),
            ]
            for table, size in sorted(grown.items(), key=lambda item: (item[0] == total, item[0]))
            if size >= 10 * runs
        ],
    )
    names = ("prune, s", "prune, CPU s", "prune, WAL MB", "VACUUM, s")
    yield (
        f"prune_data_older_than() of {runs} such runs, and VACUUM afterwards",
        names,
        [[f"{median(values):.2f}" for values in zip(*removals, strict=True)]],
    )


def _remove(database: Database, runs: int) -> tuple[float, float, float, float]:
    """Prune and vacuum everything: seconds, CPU seconds, megabytes of WAL; seconds."""
    with database.connect() as connection:
        pid = connection.info.backend_pid
        [[wal]] = database.rows(WAL)
        cpu, started = cpu_seconds(pid), time.perf_counter()
        [[removed]] = connection.execute("call pgflow_worker.prune_data_older_than('0 days')")
        seconds, cpu = time.perf_counter() - started, cpu_seconds(pid) - cpu
        [[wal_after]] = database.rows(WAL)
    must_be("prune_data_older_than()", removed["runs"], runs)
    started = time.perf_counter()
    database.run("vacuum")
    return seconds, cpu, (wal_after - wal) / MEGABYTE, time.perf_counter() - started


def history(cluster: Cluster, template: Database, sizes: Sizes) -> Part:
    """WAL after a checkpoint: the more runs are stored, the more pages are written anew."""
    rows = []
    for ids, run_id in (("random", RANDOM_ID), ("beginning with the time", TIMED_ID)):
        with cluster.copy(template) as database:
            deploy(database, FLOW)
            stored = 0
            for wanted in (0, sizes.stored_runs, 5 * sizes.stored_runs):
                while stored < wanted:
                    _run(database, run_id, sizes.stored_runs)
                    stored += sizes.stored_runs
                database.run("vacuum analyze")
                for compression in ("off", "lz4"):
                    cluster.maintenance.run(
                        f"alter system set wal_compression = {compression}",
                        "select pg_reload_conf()",
                    )
                    samples = []
                    for _ in range(3):
                        with cluster.copy(database) as copy:
                            samples.append(_run(copy, run_id, sizes.runs))
                    rows.append([ids, f"{stored}", compression, f"{median(samples):.0f}"])
    cluster.maintenance.run("alter system reset wal_compression", "select pg_reload_conf()")
    header = ("run_ids", "runs stored", "wal_compression", "WAL, bytes per run")
    return "WAL of one-step runs, started and completed, just after a checkpoint", header, rows


def _run(database: Database, run_id: str, runs: int) -> float:
    """Start and complete runs after a checkpoint. Returns how much WAL each has made."""
    database.run("checkpoint")
    [[wal]] = database.rows(WAL)
    database.run(
        f"""select count(*) from (
            select pgflow.start_flow('{FLOW}', '{{}}', {run_id}) from generate_series(1, {runs})
        ) as started"""
    )
    database.rows(CALL, FLOW)
    [[wal_after]] = database.rows(WAL)
    return float(wal_after - wal) / runs
