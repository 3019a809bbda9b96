"""What a task costs a server; with stored.py and sessions.py: docs/scaling.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from bench.cluster import Cluster, Database
from bench.contestants import PgflowWorker, Work, deploy
from bench.latency import cpu_seconds
from bench.report import Part
from bench.series import measure
from bench.sessions import idle, memory
from bench.stored import OUR_TABLES, WAL, counted, growth, history
from bench.workloads import Sizes

ELEMENTS = 1000

# Row versions that died; of those of HOT updates an index knows nothing.
DEAD, HOT = (
    f"""select regexp_replace(relname, '^q_.*', 'pgmq''s queue'), {number}
    from pg_stat_user_tables where {OUR_TABLES}"""
    for number in ("n_tup_upd + n_tup_del", "n_tup_hot_upd")
)


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
    yield _commits(cluster, template, sizes)
    yield from growth(cluster, template, sizes)
    yield history(cluster, template, sizes)
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
        "one-step runs, batch_size 10": (plain, Work("one_step", sizes.runs, batch_size=10)),
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
    tables = sorted({table for cost in last.values() for table in cost.dead})
    rows = [
        [table, *(_dead(cost, table, works[name][1].tasks) for name, cost in last.items())]
        for table in tables
    ]
    rows = [row for row in rows if any(row[1:])]
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
        dead, hot = counted(database, DEAD), counted(database, HOT)
        with who.ready(database, work) as go:
            [[pid]] = database.rows(
                """select pid from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend'
                    and pid <> pg_backend_pid()
                order by backend_start desc limit 1"""
            )
            [[wal]] = database.rows(WAL)
            cpu, started = cpu_seconds(pid), time.perf_counter()
            go()
            seconds, cpu = time.perf_counter() - started, cpu_seconds(pid) - cpu
            [[wal_after]] = database.rows(WAL)
        commits = cluster.commits(database) - commits
        return Cost(seconds, cpu, wal_after - wal, commits,
                    counted(database, DEAD) - dead, counted(database, HOT) - hot)  # fmt: skip


def _commits(cluster: Cluster, template: Database, sizes: Sizes) -> Part:
    """How many tasks with `tx` workers complete, each with a commit, under settings for commits."""
    kinds = {
        "PostgreSQL's defaults": [],
        "commit_delay = 500, commit_siblings = 1": ["commit_delay = 500", "commit_siblings = 1"],
        "synchronous_commit = off": ["synchronous_commit = off"],
    }
    workers = {n: PgflowWorker("", template, tx=True, workers=n) for n in (1, 2, 4)}
    work = Work("one_step", sizes.runs)
    seconds: dict[tuple[str, int], list[float]] = {(kind, n): [] for kind in kinds for n in workers}
    for _ in range(sizes.repetitions):
        for (kind, n), values in seconds.items():
            changes = [f"alter system set {setting}" for setting in kinds[kind]]
            cluster.maintenance.run("alter system reset all", *changes, "select pg_reload_conf()")
            values.append(measure(cluster, workers[n], work).value)
    cluster.maintenance.run("alter system reset all", "select pg_reload_conf()")
    rows = [
        [kind, *(f"{work.tasks / median(seconds[kind, n]):.0f}" for n in workers)] for kind in kinds
    ]
    header = ("", *(f"{n} workers" if n > 1 else "1 worker" for n in workers))
    return "one-step runs, tx, tasks/s", header, rows
