"""What a task costs a server, what it leaves there; with sessions.py: docs/scaling.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from bench.cluster import Cluster, Database
from bench.contestants import PgflowWorker, Work, deploy, start_runs
from bench.latency import cpu_seconds
from bench.report import Part
from bench.sessions import CALL, MEGABYTE, idle, memory
from bench.workloads import Sizes

ELEMENTS = 1000
# Runs are started and worked on in rounds, with a VACUUM after each, as autovacuum would.
ROUNDS = 10

OUR_TABLES = "schemaname in ('pgflow', 'pgmq', 'pgflow_worker') and relname <> 'meta'"
# Row versions that died; of those of HOT updates an index knows nothing.
DEAD, HOT = (
    f"""select regexp_replace(relname, '^q_.*', 'pgmq''s queue'), {counted}
    from pg_stat_user_tables where {OUR_TABLES}"""
    for counted in ("n_tup_upd + n_tup_del", "n_tup_hot_upd")
)
TABLE_SIZES = f"""select schemaname || '.' || relname, pg_total_relation_size(relid)
    from pg_stat_user_tables where {OUR_TABLES}"""
WAL = "select (pg_current_wal_insert_lsn() - '0/0')::bigint"


@dataclass
class Cost:
    """What some work took. dead, hot: row versions, by table."""

    seconds: float
    cpu: float
    wal: int
    commits: int
    dead: Counter[str]
    hot: Counter[str]


def scaling(cluster: Cluster, template: Database, sizes: Sizes) -> Iterator[Part]:
    """All the tables."""
    yield from _costs(cluster, template, sizes)
    yield from _growth(cluster, template, sizes)
    yield memory(cluster, template, sizes)
    yield idle(cluster, template, sizes)


# What a task costs


class _Starter:
    """Somebody who starts runs, each in a transaction of its own, as applications do."""

    def enqueue(self, database: Database, work: Work) -> None:
        deploy(database, work.flow)

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        with database.connect() as connection:

            def start_all() -> None:
                for _ in range(work.runs):
                    connection.execute("select pgflow.start_flow(%s, '{}')", [work.flow])

            yield start_all


def _costs(cluster: Cluster, template: Database, sizes: Sizes) -> Iterator[Part]:
    plain, tx = PgflowWorker("", template), PgflowWorker("", template, tx=True)
    one_step = Work("one_step", sizes.runs)
    works: dict[str, tuple[PgflowWorker | _Starter, Work]] = {
        "start_flow()": (_Starter(), one_step),
        "one-step runs": (plain, one_step),
        "one-step runs, tx": (tx, one_step),
        "chains of three": (plain, Work("chain", sizes.chains, steps=3)),
        f"maps of {ELEMENTS}": (plain, Work("elements", sizes.maps, elements=ELEMENTS)),
    }
    whole: dict[str, list[Cost]] = {name: [] for name in works}
    first: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(sizes.repetitions):
        for name, (who, work) in works.items():
            whole[name].append(_cost(cluster, template, who, work, full_page_writes=False))
            first[name].append(_cost(cluster, template, who, work, full_page_writes=True))

    rows = []
    for name, (_, work) in works.items():
        cpu = median(cost.cpu for cost in whole[name]) / work.tasks
        rows.append([
            name,
            f"{work.tasks / median(cost.seconds for cost in whole[name]):.0f}",
            f"{1000 * cpu:.2f}",
            f"{1 / cpu:.0f}",
            f"{median(cost.wal for cost in whole[name]) / work.tasks:.0f}",
            f"{median(cost.wal for cost in first[name]) / work.tasks:.0f}",
            f"{median(cost.dead.total() for cost in whole[name]) / work.tasks:.2f}",
            f"{median(cost.commits for cost in whole[name]) / work.tasks:.2f}",
        ])  # fmt: skip
    header = ("", "tasks/s", "CPU, ms", "tasks/s of a core", "WAL, bytes",
              "WAL after a checkpoint", "dead rows", "commits")  # fmt: skip
    yield "what a task costs, one worker", header, rows

    # The last time will do: they hardly differ.
    last = {name: costs[-1] for name, costs in whole.items()}
    tables = sorted({table for cost in last.values() for table in +cost.dead})
    rows = [
        [table, *(_dead(cost, table, works[name][1].tasks) for name, cost in last.items())]
        for table in tables
    ]
    yield "dead rows of a task, and how many of them by HOT updates", ("", *works), rows


def _dead(cost: Cost, table: str, tasks: int) -> str:
    dead, hot = cost.dead[table], cost.hot[table]
    return f"{dead / tasks:.2f}, {100 * hot / dead:.0f} %" if dead >= tasks / 100 else ""


def _cost(
    cluster: Cluster,
    template: Database,
    who: PgflowWorker | _Starter,
    work: Work,
    *,
    full_page_writes: bool,
) -> Cost:
    """Have the work done in a new, analysed database, just after a checkpoint."""
    cluster.maintenance.run(
        f"alter system set full_page_writes = {'on' if full_page_writes else 'off'}",
        "select pg_reload_conf()",
    )
    with cluster.copy(template) as database:
        who.enqueue(database, work)
        database.run("analyze", "checkpoint")
        commits = cluster.commits(database)
        dead, hot = _counted(database, DEAD), _counted(database, HOT)
        with who.ready(database, work) as go:
            [[pid]] = database.rows(
                """select pid from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend'
                    and pid <> pg_backend_pid()"""
            )
            [[wal]] = database.rows(WAL)
            cpu, started = cpu_seconds(pid), time.perf_counter()
            go()
            seconds, cpu = time.perf_counter() - started, cpu_seconds(pid) - cpu
            [[wal_after]] = database.rows(WAL)
        commits = cluster.commits(database) - commits
        return Cost(seconds, cpu, wal_after - wal, commits,
                    _counted(database, DEAD) - dead, _counted(database, HOT) - hot)  # fmt: skip


def _counted(database: Database, query: str) -> Counter[str]:
    return Counter(dict(database.rows(query)))


# What stays


def _growth(cluster: Cluster, template: Database, sizes: Sizes) -> Iterator[Part]:
    runs = sizes.stored_runs
    full, pruned, removals = [], [], []
    with cluster.copy(template) as database:
        deploy(database, "hundred_bytes")
        empty = _counted(database, TABLE_SIZES)
        for _ in range(3):
            for _ in range(ROUNDS):
                start_runs(database, "hundred_bytes", Work("hundred_bytes", runs // ROUNDS))
                database.rows(CALL, "hundred_bytes")
                database.run("vacuum")
            full.append(_counted(database, TABLE_SIZES))
            removals.append(_remove(database))
            pruned.append(_counted(database, TABLE_SIZES))
    grown = full[0] - empty
    total = "together"
    for counted in (grown, *full, *pruned):
        counted[total] = counted.total()
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


def _remove(database: Database) -> tuple[float, float, float, float]:
    """Prune and vacuum everything: seconds, CPU seconds, megabytes of WAL; seconds."""
    with database.connect() as connection:
        pid = connection.info.backend_pid
        [[wal]] = database.rows(WAL)
        cpu, started = cpu_seconds(pid), time.perf_counter()
        connection.execute("call pgflow_worker.prune_data_older_than('0 days')")
        seconds, cpu = time.perf_counter() - started, cpu_seconds(pid) - cpu
        [[wal_after]] = database.rows(WAL)
    started = time.perf_counter()
    database.run("vacuum")
    return seconds, cpu, (wal_after - wal) / MEGABYTE, time.perf_counter() - started
