"""What is measured: every workload with its contestants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import psycopg

from bench.cluster import Cluster, Database
from bench.contestants import (
    Contestant,
    External,
    Library,
    Loop,
    Notifying,
    PgflowWorker,
    Work,
    deploy,
)
from bench.latency import idle_calls, pick_up
from bench.offload import offloaded
from bench.series import Entry, Series, measure, take_turns
from bench.templates import library_template

LOOP_PER_TASK = "PL/pgSQL loop, commit per task"
LOOP_PER_BATCH = "PL/pgSQL loop, commit per batch"
LOOP_ANALYZE_TWICE = "PL/pgSQL loop, ANALYZE after two batches"
LOOP_ANALYZE_EACH = "PL/pgSQL loop, ANALYZE after each batch"
WORKER = "pgflow_worker, no tx"
WORKER_TX = "pgflow_worker, tx"
PSYCOPG_100 = "psycopg, batches of 100"
PSYCOPG_10 = "psycopg, batches of 10"
ASYNC = "pgflow_worker, async def"
THREAD = "pgflow_worker, thread=True"

ONE_STEP = "one-step runs"
SLOW_COMMITS = "one-step runs, commits 2 ms slower"
EVENTS = "one-step runs, pgflow.notify"
CHAIN = "three-step chains"
MAP = "map elements"
IO = "I/O tasks of 100 ms"

# The time of the loops is quadratic in the elements: more would take them minutes.
QUADRATIC_ELEMENTS = 2000


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    repetitions: int = 5
    runs: int = 2000
    chains: int = 700
    elements: tuple[int, ...] = (500, 1000, 2000, 4000, 10_000)
    io_tasks: int = 200
    max_concurrent: int = 50
    cpu_tasks: int = 100
    no_ops: int = 200
    pick_ups: int = 50
    idle_seconds: float = 10.0
    idle_pairs: int = 50
    maps: int = 2
    stored_runs: int = 10_000
    idle_flows: int = 20


QUICK = Sizes(
    repetitions=1,
    runs=100,
    chains=30,
    elements=(50, 100),
    io_tasks=20,
    max_concurrent=5,
    cpu_tasks=10,
    no_ops=20,
    pick_ups=4,
    idle_seconds=1.0,
    idle_pairs=5,
    maps=1,
    stored_runs=200,
    idle_flows=3,
)


class Workloads:
    """The workloads, by the names that --only knows."""

    def __init__(self, cluster: Cluster, pgflow: Database, sizes: Sizes) -> None:
        self._cluster = cluster
        self._pgflow = pgflow
        self._sizes = sizes
        self._loops = (
            Loop(LOOP_PER_TASK, pgflow, commit_per_task=True),
            Loop(LOOP_PER_BATCH, pgflow, commit_per_task=False),
        )
        self._workers = (PgflowWorker(WORKER, pgflow), PgflowWorker(WORKER_TX, pgflow, tx=True))
        self._external = External(PSYCOPG_100, pgflow, batch_size=100)

    @staticmethod
    def names() -> list[str]:
        """What --only may name."""
        pgflow = ["one_step", "slow_commits", "events", "chain", "map", "io"]
        return [*pgflow, "offload", "latency", "idle_call"]

    def run(self, name: str) -> list[Series]:
        """Measure one of them."""
        measure_workload: Callable[[], Iterator[list[Series]]] = getattr(self, f"_{name}")
        return [series for part in measure_workload() for series in part]

    def _one_step(self) -> Iterator[list[Series]]:
        several = [
            PgflowWorker(f"{name}, {workers} workers", self._pgflow, tx=tx, workers=workers)
            for name, tx in ((WORKER, False), (WORKER_TX, True))
            for workers in (2, 4)
        ]
        contestants: list[Contestant] = [
            *self._loops,
            *self._workers,
            *several,
            self._external,
            External(PSYCOPG_10, self._pgflow, batch_size=10),
            *self._libraries("procrastinate", "absurd", "dbos"),
        ]
        yield self._throughput(ONE_STEP, Work("one_step", self._sizes.runs), contestants)

    def _slow_commits(self) -> Iterator[list[Series]]:
        yield self._throughput(
            SLOW_COMMITS,
            Work("one_step", self._sizes.runs),
            [*self._loops, *self._workers, self._external],
            commit_delay_ms=2,
        )

    def _events(self) -> Iterator[list[Series]]:
        work = Work("one_step", self._sizes.runs)
        for tx, workers in product((False, True), (1, 4)):
            off = PgflowWorker("off", self._pgflow, tx=tx, workers=workers)
            on, heard = (
                Notifying(name, self._pgflow, tx=tx, workers=workers, listener=listener)
                for name, listener in (("on", False), ("on, and a session listens", True))
            )
            name = f"{EVENTS}: {WORKER_TX if tx else WORKER}, {workers} at once"
            yield self._throughput(name, work, [off, on, heard])

    def _chain(self) -> Iterator[list[Series]]:
        work = Work("chain", self._sizes.chains, steps=3)
        contestants: list[Contestant] = [
            *self._loops,
            *self._workers,
            self._external,
            *self._libraries("absurd", "dbos"),
        ]
        yield self._throughput(CHAIN, work, contestants)

    def _map(self) -> Iterator[list[Series]]:
        # Two batches: then there are tasks that wait and tasks that are completed. Later, ANALYZE
        # does harm: when most are completed, PostgreSQL chooses the plan of the plain loop again.
        twice, each = (
            Loop(name, self._pgflow, commit_per_task=False, analyzed_batches=batches)
            for name, batches in ((LOOP_ANALYZE_TWICE, 2), (LOOP_ANALYZE_EACH, 1_000_000))
        )
        for elements in self._sizes.elements:
            contestants: list[Contestant] = [self._workers[0]]
            if elements <= 2 * QUADRATIC_ELEMENTS:
                contestants.insert(0, twice)
            if elements <= QUADRATIC_ELEMENTS:
                contestants += [self._workers[1], each, self._loops[1]]
            work = Work("elements", 1, elements=elements)
            yield self._throughput(MAP, work, contestants)

    def _io(self) -> Iterator[list[Series]]:
        sizes = self._sizes
        flows = {ASYNC: "async_io"}
        if threads := self._has_threads():
            flows[THREAD] = "thread_io"
        limit = self._entry(IO, self._loops[1], Work("one_step", sizes.io_tasks))
        limit.series.note = "waits for nothing: the limit's time for as many tasks"
        waiting = [
            self._entry(
                IO,
                PgflowWorker(name, self._pgflow),
                Work(flow, sizes.io_tasks, batch_size=200, max_concurrent=sizes.max_concurrent),
            )
            for name, flow in flows.items()
        ]
        yield take_turns([limit, *waiting], sizes.repetitions)
        if not threads:
            note = "not measured: this version has no thread=True"
            yield [Series(IO, THREAD, sizes.io_tasks, sizes.io_tasks, note=note)]

    def _has_threads(self) -> bool:
        with self._cluster.copy(self._pgflow) as database:
            try:
                deploy(database, "thread_io")
            except psycopg.Error as error:
                if "thread" not in str(error):
                    raise
                return False
        return True

    def _offload(self) -> Iterator[list[Series]]:
        sizes = self._sizes
        numbers = sizes.cpu_tasks, sizes.no_ops, sizes.repetitions
        yield from offloaded(self._cluster, self._pgflow, *numbers)

    def _latency(self) -> Iterator[list[Series]]:
        sizes = self._sizes
        flows = ("one_step", "chain")
        yield pick_up(self._cluster, self._pgflow, flows, sizes.pick_ups, sizes.idle_seconds)

    def _idle_call(self) -> Iterator[list[Series]]:
        yield idle_calls(self._cluster, self._pgflow, self._sizes.idle_pairs)

    def _libraries(self, *names: str) -> list[Contestant]:
        known = {
            "procrastinate": (
                "Procrastinate",
                "select count(*) from procrastinate_jobs where status = 'succeeded'",
            ),
            "absurd": (
                "Absurd",
                "select count(*) from absurd.t_default where state = 'completed'",
            ),
            "dbos": (
                "DBOS Transact",
                "select count(*) from dbos.workflow_status where status = 'SUCCESS'",
            ),
        }
        return [
            Library(title, self._library(name), f"{name}_jobs", finished)
            for name, (title, finished) in known.items()
            if name in names
        ]

    def _library(self, name: str) -> Database:
        return library_template(self._cluster, f"{name}_jobs")

    def _throughput(
        self,
        workload: str,
        work: Work,
        contestants: list[Contestant],
        commit_delay_ms: int = 0,
    ) -> list[Series]:
        entries = [
            self._entry(workload, contestant, work, commit_delay_ms) for contestant in contestants
        ]
        return take_turns(entries, self._sizes.repetitions)

    def _entry(
        self, workload: str, contestant: Contestant, work: Work, commit_delay_ms: int = 0
    ) -> Entry:
        size = work.elements or work.runs
        return Entry(
            Series(workload, contestant.name, size, work.tasks),
            partial(measure, self._cluster, contestant, work, commit_delay_ms=commit_delay_ms),
        )
