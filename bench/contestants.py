"""Who takes part: everybody does the same work, and is checked to have done it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from bench.child import Child
from bench.cluster import Connection, Database

FLOWS = Path(__file__).parent / "flows"
FLOWS_OF_TX = "_tx"  # how the slugs of flows end whose handlers have a transaction


class WrongResultError(Exception):
    """A contestant did not do all of its work: its time means nothing."""


@dataclass(frozen=True)
class Work:
    """What is to be done: runs of a flow, each with so many steps and elements to map.

    flow: the slug; for other libraries the kind of job. The rest are arguments of work().
    """

    flow: str
    runs: int
    steps: int = 1
    elements: int = 0
    batch_size: int = 100
    max_concurrent: int = 5

    @property
    def tasks(self) -> int:
        """How many tasks that makes."""
        return self.runs * (self.steps + self.elements)


class Contestant(Protocol):
    """Somebody who can be measured.

    `enqueue` and `check` are called before and after; what `ready` yields is timed. What a
    process does once (connecting, importing) belongs into `ready` itself.
    """

    @property
    def name(self) -> str: ...
    @property
    def template(self) -> Database: ...
    def enqueue(self, database: Database, work: Work) -> None: ...
    def ready(
        self, database: Database, work: Work
    ) -> AbstractContextManager[Callable[[], None]]: ...
    def check(self, database: Database, work: Work) -> None: ...


class _OfPgflow:
    """What those who work on pgflow's schema have in common."""

    def __init__(self, name: str, template: Database) -> None:
        self.name = name
        self.template = template

    def flow(self, work: Work) -> str:
        return work.flow

    def enqueue(self, database: Database, work: Work) -> None:
        deploy(database, self.flow(work))
        start_runs(database, self.flow(work), work)

    def check(self, database: Database, work: Work) -> None:
        [[runs]] = database.rows(
            "select count(*) from pgflow.runs where flow_slug = %s and status = 'completed'",
            self.flow(work),
        )
        [[tasks]] = database.rows(
            """select count(*) from pgflow.step_tasks
            where flow_slug = %s and status = 'completed' and attempts_count = 1""",
            self.flow(work),
        )
        must_be(self.name, (runs, tasks), (work.runs, work.tasks))


def deploy(database: Database, flow_slug: str) -> None:
    """Deploy one of the flows.

    Each database has only the flow that is measured: the more flows there are, the worse the
    plans that PostgreSQL makes for pgflow's functions.
    """
    source = (FLOWS / f"{flow_slug}.py").read_text()
    database.rows("select 1 from pgflow_worker.deploy(%s, %s)", f"bench_{flow_slug}", source)


def start_runs(database: Database, flow_slug: str, work: Work) -> None:
    """Start the runs of a flow."""
    database.rows(
        """select count(*) from (
            select pgflow.start_flow(
                %s, (select coalesce(jsonb_agg(n), '{}') from generate_series(1, %s) as n)
            )
            from generate_series(1, %s)
        ) as started""",
        flow_slug,
        work.elements,
        work.runs,
    )


def must_be(contestant: str, done: object, expected: object) -> None:
    """Raise WrongResultError unless everything was done."""
    if done != expected:
        raise WrongResultError(f"{contestant}: done {done}, expected {expected}")


class Loop(_OfPgflow):
    """The limit: a procedure in PL/pgSQL, without handlers.

    analyzed_batches: after how many batches, from the first one on, it runs ANALYZE.
    """

    def __init__(
        self, name: str, template: Database, *, commit_per_task: bool, analyzed_batches: int = 0
    ) -> None:
        super().__init__(name, template)
        self._arguments = commit_per_task, analyzed_batches

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        with database.connect() as connection:

            def call() -> None:
                connection.execute("call bench.loop(%s, %s, %s)", [work.flow, *self._arguments])

            yield call


class PgflowWorker(_OfPgflow):
    """This worker: one session, or several at once, in `drain`."""

    def __init__(
        self, name: str, template: Database, *, tx: bool = False, workers: int = 1
    ) -> None:
        super().__init__(name, template)
        self._suffix = FLOWS_OF_TX if tx else ""
        self._workers = workers

    def flow(self, work: Work) -> str:
        return work.flow + self._suffix

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        database.rows(
            "update pgflow_worker.flows set workers = %s where flow_slug = %s returning 1",
            self._workers,
            self.flow(work),
        )
        with ExitStack() as stack:
            connections = [stack.enter_context(database.connect()) for _ in range(self._workers)]
            pool = stack.enter_context(ThreadPoolExecutor(self._workers))

            def call(connection: Connection) -> dict[str, Any]:
                [[report]] = connection.execute(
                    """call pgflow_worker.work(%s, batch_size => %s, max_concurrent => %s,
                        mode => 'drain', max_duration => '10 minutes')""",
                    [self.flow(work), work.batch_size, work.max_concurrent],
                )
                return dict(report)

            def all_call() -> None:
                reports = list(pool.map(call, connections))
                for report in reports:
                    must_be(f"status of {self.name}", report["status"], "completed")
                completed = sum(report["completed"] for report in reports)
                must_be(f"reports of {self.name}", completed, work.tasks)

            yield all_call


class Notifying(PgflowWorker):
    """The worker where pgflow's events are notifications, and somebody listens or nobody."""

    def __init__(
        self, name: str, template: Database, *, tx: bool, workers: int, listener: bool
    ) -> None:
        super().__init__(name, template, tx=tx, workers=workers)
        self._listener = listener

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        database.run(f"alter database {database.name} set pgflow.notify = on")
        with ExitStack() as stack:
            if self._listener:
                stack.enter_context(_listener(database))
            yield stack.enter_context(super().ready(database, work))


@contextmanager
def _listener(database: Database) -> Iterator[None]:
    """A session that listens to pgflow's events, and is told some."""
    over = Event()

    def listen(connection: Connection) -> int:
        heard = 0
        while not over.is_set():
            heard += sum(1 for _ in connection.notifies(timeout=0.2))
        return heard

    with database.connect() as connection, ThreadPoolExecutor(1) as pool:
        connection.execute("listen pgflow")
        heard = pool.submit(listen, connection)
        try:
            yield
        finally:
            over.set()
    if not heard.result():
        raise WrongResultError("a session that listened was told nothing")


class External(_OfPgflow):
    """A worker outside the database: Python and psycopg, in a process of its own."""

    def __init__(self, name: str, template: Database, *, batch_size: int) -> None:
        super().__init__(name, template)
        self._batch_size = batch_size

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        with Child("pgflow_psycopg", database, work.flow, self._batch_size).ready() as go:
            yield go


class Library:
    """Another library of the field, on its own schema, in a process of its own."""

    def __init__(self, name: str, template: Database, module: str, finished: str) -> None:
        self.name = name
        self.template = template
        self._module = module
        self._finished = finished

    def enqueue(self, database: Database, work: Work) -> None:
        Child(self._module, database, work.flow, work.runs).run("enqueue")

    @contextmanager
    def ready(self, database: Database, work: Work) -> Iterator[Callable[[], None]]:
        with Child(self._module, database, work.flow, work.runs).ready() as go:
            yield go

    def check(self, database: Database, work: Work) -> None:
        [[finished]] = database.rows(self._finished)
        must_be(self.name, finished, work.runs)
