"""A session that deploys flows, starts runs and works, in the words of the tests."""

import json
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from pgflow_worker import Flow
from tests.conftest import Connection

Report = dict[str, Any]
# How many sessions of the test wait for a lock.
WAITING = (
    "select count(*) = %s from pg_stat_activity "
    "where wait_event_type = 'Lock' and datname = current_database()"
)
PREAMBLE = "from pgflow_worker import Context, DatabaseError, Fail, Flow, Transaction\n"


class Session:
    """A connection with the calls that most tests make."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def rows(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, args).fetchall()

    def value(self, query: str, *args: Any) -> Any:
        [row] = self.rows(query, *args)
        return row[0]

    def run(self, statement: str, *args: Any) -> None:
        self.connection.execute(statement, args)

    def deploy(self, source: str, module: str = "flows_of_test", **options: bool) -> list[Any]:
        more = "".join(f", {name} => {value}" for name, value in options.items())
        return self.rows(
            f"select * from pgflow_worker.deploy(%s, %s{more})",
            module,
            PREAMBLE + textwrap.dedent(source),
        )

    def start(self, flow_slug: str, flow_input: object = None) -> str:
        return str(
            self.value(
                "select run_id from pgflow.start_flow(%s, %s)",
                flow_slug,
                json.dumps({} if flow_input is None else flow_input),
            )
        )

    def work(self, flow_slug: str, **arguments: Any) -> Report:
        named = "".join(f", {name} => %s" for name in arguments)
        report: Report = self.value(
            f"call pgflow_worker.work(%s{named})", flow_slug, *arguments.values()
        )
        return report

    def work_batch(self, flow_slug: str, **arguments: Any) -> Report:
        named = "".join(f", {name} => %s" for name in arguments)
        report: Report = self.value(
            f"select pgflow_worker.work_batch(%s{named})", flow_slug, *arguments.values()
        )
        return report

    def until(self, query: str, *args: Any) -> Any:
        """Ask until the answer is true; the answer."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            rows = self.rows(query, *args)
            if rows and rows[0][0]:
                return rows[0][0]
            time.sleep(0.01)
        pytest.fail(f"still not true after 20 s: {query}")


def flow_of(source: str) -> Flow:
    """The flow "flow" of a module's text, in this process."""
    namespace: dict[str, Any] = {"__name__": "flows_of_test"}
    exec(compile(PREAMBLE + textwrap.dedent(source), "flows_of_test.py", "exec"), namespace)
    flow = namespace["flow"]
    assert isinstance(flow, Flow)
    return flow


def counts(report: Report) -> dict[str, int]:
    """What a report counts, without the zeros."""
    names = ("completed", "retried", "snoozed", "failed", "discarded", "rescued", "parked")
    return {name: report[name] for name in names if report[name]}


@pytest.fixture
def session(db: Connection) -> Session:
    return Session(db)


@pytest.fixture
def other(connect: Callable[..., Connection]) -> Session:
    """A second session, for what happens at the same time."""
    return Session(connect())


@pytest.fixture
def background() -> Iterator[Callable[..., "Future[Any]"]]:
    """Runs a call in a thread: background(session.work, "flow")."""
    pool = ThreadPoolExecutor()
    calls: list[Future[Any]] = []

    def submit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        calls.append(pool.submit(function, *args, **kwargs))
        return calls[-1]

    yield submit
    # Before its connection is closed under it. One that hangs ends when the database is dropped.
    wait(calls, timeout=30)
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def role(
    session: Session, connect: Callable[..., Connection]
) -> Iterator[Callable[[str | None], Session]]:
    """A session of a new role with a level of grant_usage(): role("operate"); None: with none."""
    names: list[str] = []

    def make(level: str | None) -> Session:
        name = f"{level or 'nobody'}_{session.connection.info.dbname}"
        session.run(f"create role {name} login")
        names.append(name)
        if level is not None:
            session.run("select pgflow_worker.grant_usage(%s, %s)", name, level)
        return Session(connect(user=name))

    yield make
    for name in names:
        session.run(f"drop owned by {name} cascade; drop role {name}")


@pytest.fixture
def notices(session: Session) -> list[str]:
    """What the session is told by notices, as it comes."""
    heard: list[str] = []
    session.connection.add_notice_handler(lambda diag: heard.append(diag.message_primary or ""))
    return heard
