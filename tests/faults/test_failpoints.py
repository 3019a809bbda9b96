"""A fault between any two steps of the protocol loses nothing, and nothing happens twice.

The product knows nothing of it: triggers on the tables that a step writes raise an error there, or
wait for a lock of the test's until the backend is canceled, terminated or killed.
"""

import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_postgresql import factories
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import (
    SOCKET_DIRECTORY,
    Connection,
    connect_to,
    connections,
    make_template,
    new_database,
    pg_ctl,
)
from tests.database.conftest import WAITING, Session

Background = Callable[..., "Future[Any]"]
Connect = Callable[..., Connection]


@dataclass(frozen=True)
class Trigger:
    """Strikes when a row is written, or when that is committed."""

    table: str
    event: str
    when: str = "true"
    at_commit: bool = False


@dataclass(frozen=True)
class Lock:
    """Strikes where a worker waits for a lock; an error is that the table is not there."""

    statement: str
    table: str | None = None


def table_lock(table: str) -> Lock:
    return Lock(f"lock table {table} in access exclusive mode", table)


WRITE = Trigger("public.effects", "insert")
RETRIED = "old.status = 'started' and new.status = 'queued'"
POINTS: dict[str, Trigger | Lock] = {
    "gate": table_lock("pgflow_worker.pauses"),
    "slot": table_lock("pgflow.deps"),
    "read_message": Trigger("pgmq.q_f", "update", "new.read_ct > old.read_ct"),
    "read_commit": Trigger("pgmq.q_f", "update", "new.read_ct > old.read_ct", at_commit=True),
    "start_worker": Trigger("pgflow.workers", "insert"),
    "start_task": Trigger("pgflow.step_tasks", "update", "new.status = 'started'"),
    "start_visibility": Trigger("pgmq.q_f", "update", "new.read_ct = old.read_ct"),
    "start_commit": Trigger(
        "pgflow.step_tasks", "update", "new.status = 'started'", at_commit=True
    ),
    "run_sql": WRITE,
    "run_constraint": Trigger("public.effects", "insert", at_commit=True),
    "complete_lock": Lock("select from pgflow.runs for update"),
    "complete_task": Trigger("pgflow.step_tasks", "update", "new.status = 'completed'"),
    "complete_archive": Trigger("pgmq.q_f", "delete"),
    "complete_next": Trigger("pgmq.q_f", "insert"),
    "complete_run": Trigger("pgflow.runs", "update", "new.status = 'completed'"),
    "complete_attempt": Trigger("pgflow_worker.attempts", "insert", "new.outcome = 'completed'"),
    "complete_commit": Trigger(
        "pgflow_worker.attempts", "insert", "new.outcome = 'completed'", at_commit=True
    ),
    "retry_task": Trigger("pgflow.step_tasks", "update", RETRIED),
    "retry_delay": Trigger("pgmq.q_f", "update", "new.vt > old.vt and new.read_ct = old.read_ct"),
    "fail_task": Trigger("pgflow.step_tasks", "update", "new.status = 'failed'"),
    "fail_run": Trigger("pgflow.runs", "update", "new.status = 'failed'"),
    "fail_archive": Trigger("pgmq.q_f", "delete"),
    "fail_attempt": Trigger("pgflow_worker.attempts", "insert", "new.outcome = 'failed'"),
    "fail_commit": Trigger(
        "pgflow_worker.attempts", "insert", "new.outcome = 'failed'", at_commit=True
    ),
    "discard_attempt": Trigger("pgflow_worker.attempts", "insert", "new.outcome = 'discarded'"),
    "discard_commit": Trigger(
        "pgflow_worker.attempts", "insert", "new.outcome = 'discarded'", at_commit=True
    ),
    "rescue_attempt": Trigger(
        "pgflow_worker.attempts", "insert", "new.outcome not in ('completed', 'failed')"
    ),
    "rescue_task": Trigger("pgflow.step_tasks", "update", RETRIED),
    "rescue_visibility": Trigger("pgmq.q_f", "update", "new.read_ct = old.read_ct"),
    "rescue_commit": Trigger("pgflow.step_tasks", "update", RETRIED, at_commit=True),
    "give_back_task": Trigger("pgflow.step_tasks", "update", RETRIED),
    "give_back_commit": Trigger("pgflow.step_tasks", "update", RETRIED, at_commit=True),
    "close_worker": Trigger("pgflow.workers", "update", "new.deprecated_at is not null"),
    "close_commit": Trigger(
        "pgflow.workers", "update", "new.deprecated_at is not null", at_commit=True
    ),
    "report": Trigger("pgflow_worker.invocations", "insert"),
    "report_commit": Trigger("pgflow_worker.invocations", "insert", at_commit=True),
}

INSERT = """
        tx.execute(
            "insert into public.effects values ($1::text::uuid, $2, $3)",
            [ctx.run_id, ctx.step_slug, ctx.task_index],
        )
"""


@dataclass(frozen=True)
class Scenario:
    """A flow and its runs, and the points at which faults happen to it.

    writers: the steps that write. ends: the statuses that its runs may have in the end. strike:
    which time at the point counts. crash: a worker has died in the flow's handler. full: the disk
    is full when a handler writes for the second time.
    """

    source: str
    points: str
    max_attempts: int = 3
    array: bool = False
    runs: int = 1
    writers: tuple[str, ...] = ()
    ends: tuple[str, ...] = ("completed",)
    strike: int = 1
    crash: bool = False
    full: bool = False


WRITER = f"""
    @flow.step
    def only(tx: Transaction, ctx: Context): {INSERT}
"""
SCENARIOS = {
    # Two steps whose handlers write in the transaction that completes their task.
    "tx": Scenario(
        f"""
    @flow.step
    def first(tx: Transaction, ctx: Context): {INSERT}

    @flow.step
    def second(first, tx: Transaction, ctx: Context): {INSERT}
    """,
        "gate slot read_message read_commit start_worker start_task start_visibility start_commit "
        "run_sql run_constraint complete_lock complete_task complete_archive complete_next "
        "complete_run complete_attempt complete_commit close_worker close_commit report "
        "report_commit",
        writers=("first", "second"),
    ),
    # Of three tasks without `tx` the first is started alone; the others share a commit.
    "shared": Scenario(
        """
    @flow.step
    def only(): pass
    """,
        "complete_task complete_archive complete_attempt complete_commit",
        runs=3,
        strike=2,
    ),
    # The same, but the others are started and completed as a set.
    "map": Scenario(
        f"""
    @flow.map
    def each(element): return element

    @flow.step
    def last(each, tx: Transaction, ctx: Context): {INSERT}
    """,
        "start_task start_commit complete_task complete_archive complete_attempt complete_commit",
        array=True,
        strike=2,
        writers=("last",),
    ),
    "retry": Scenario(
        f"""{WRITER}
        if ctx.attempt == 1:
            raise ValueError("not at once")
    """,
        "retry_task retry_delay fail_attempt fail_commit",
        writers=("only",),
    ),
    "fail": Scenario(
        f"""{WRITER}
        raise Fail("never")

    @flow.step
    def another(): pass
    """,
        "fail_task fail_run fail_archive fail_attempt fail_commit",
        ends=("failed",),
    ),
    # The second task fails the run, while the third is started already.
    "discard": Scenario(
        f"""
    @flow.map
    def only(element, tx: Transaction, ctx: Context): {INSERT}
        if element == 2:
            raise Fail("never")
    """,
        "discard_attempt discard_commit",
        array=True,
        writers=("only",),
        ends=("failed",),
    ),
    # A handler that must not begin twice, whatever happens; its run may fail instead.
    "once": Scenario(
        """
    @flow.step
    def only(flow_input):
        with open(flow_input["begun"], "a") as file:
            file.write("x")
    """,
        "start_task start_commit complete_task complete_attempt complete_commit",
        max_attempts=1,
        ends=("completed", "failed"),
    ),
    "rescue": Scenario(
        WRITER,
        "rescue_attempt rescue_task rescue_visibility rescue_commit",
        writers=("only",),
        crash=True,
    ),
    "give_back": Scenario(
        WRITER, "give_back_task give_back_commit", runs=3, writers=("only",), full=True
    ),
}
# disk_full ends the call, check_violation is taken for the fault of the handler or its result.
# errors: not once, but until the call has ended.
ERRORS = {"error": "53100", "errors": "53100", "violation": "23514"}

RESET = """
    select pg_terminate_backend(pid, 10000) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid();
    drop sequence if exists public.fault, public.disk_full;
    drop function if exists public.strike, public.defer cascade;  -- and their triggers
    create function public.strike() returns trigger language plpgsql as $$
    begin
        -- A sequence counts what is rolled back too.
        if nextval(('public.' || tg_name)::regclass) <@ tg_argv[0]::int8range then
            if tg_argv[1] = 'wait' then
                perform pg_advisory_xact_lock(1);
            else
                raise exception using errcode = tg_argv[1], message = 'struck';
            end if;
        end if;
        return coalesce(new, old);
    end $$;
    create function public.defer() returns trigger language plpgsql as $$
    begin
        -- The worker has made constraints immediate after the handler.
        set constraints all deferred;
        return coalesce(new, old);
    end $$;
    delete from public.effects;
    delete from pgflow.step_tasks; delete from pgflow.step_states; delete from pgflow.runs;
    delete from pgflow.workers; delete from pgmq.q_f; delete from pgmq.a_f;
    delete from pgflow_worker.attempts; delete from pgflow_worker.invocations;
"""


class Databases:
    """One for each scenario, made when it is first asked for; a Scene empties it again."""

    def __init__(self, server: PostgreSQLExecutor, template: str, stack: ExitStack) -> None:
        self._server = server
        self._template = template
        self._stack = stack
        self._sessions: dict[Scenario, Session] = {}

    @contextmanager
    def open(self, scenario: Scenario) -> Iterator[tuple[Session, Connect]]:
        """A session that has worked before, unless it was killed; others can be opened."""
        session = self._sessions.get(scenario)
        if session is None:
            name = self._stack.enter_context(new_database(self._server, self._template))
            session = self._connect(name)
            session.run("create table effects (run_id uuid, step_slug text, task_index int)")
            session.deploy(
                f'flow = Flow("f", max_attempts={scenario.max_attempts}, base_delay=1)\n'
                + textwrap.dedent(scenario.source)
            )
        name = session.connection.info.dbname
        if session.connection.closed:
            session = self._connect(name)
        self._sessions[scenario] = session
        with connections(self._server, name) as connect:
            yield session, connect

    def _connect(self, name: str) -> Session:
        connection = connect_to(self._server, name)
        self._stack.callback(connection.close)
        return Session(connection)


class Scene:
    """The flow of a scenario, which is called `f`, with new runs, and the faults they meet."""

    def __init__(
        self,
        session: Session,
        connect: Connect,
        background: Background,
        scenario: Scenario,
        begun: Path,
    ) -> None:
        self._session = session
        self._connect = connect
        self._background = background
        self._scenario = scenario
        self._begun = begun
        self._session.run(RESET)
        for n in range(scenario.runs):
            flow_input = [1, 2, 3] if scenario.array else {"begun": f"{begun}{n}"}
            self._session.start("f", flow_input)
        if scenario.crash:
            self._interrupt(WRITE, 1, "terminate")
            self._session.run("drop trigger fault on effects; drop sequence fault")
        if scenario.full:
            self._set("disk_full", WRITE, 2, ERRORS["error"])

    def meet(self, point: Trigger | Lock, kind: str) -> None:
        """Let a worker meet the fault, and see that it did."""
        if kind in ERRORS:
            self._raise(point, kind)
        else:
            self._interrupt(point, self._scenario.strike, kind)

    def bring_to_end(self) -> None:
        """Work until every run has ended, each time when what has waited is visible again."""
        for _ in range(10):
            self._session.run("update pgmq.q_f set vt = clock_timestamp()")
            self._session.work("f", mode="drain")
            if not self._session.value("select count(*) from pgflow.runs where status = 'started'"):
                return
        pytest.fail("ten calls have not brought every run to its end")

    def check(self) -> None:
        """Nothing is lost, nothing has happened twice."""
        rows, value, scenario = self._session.rows, self._session.value, self._scenario
        ends = [status for (status,) in rows("select status from pgflow.runs")]
        assert len(ends) == scenario.runs
        assert set(ends) <= set(scenario.ends)
        assert value("select count(*) from pgflow.step_tasks where status = 'started'") == 0
        assert value("select max(attempts_count) from pgflow.step_tasks") <= scenario.max_attempts
        assert value("select count(*) from pgmq.q_f") == 0
        completed = rows(
            "select run_id, step_slug, task_index from pgflow.step_tasks "
            "where status = 'completed' order by 1, 2, 3"
        )
        assert completed == rows(
            "select run_id, step_slug, task_index from pgflow_worker.attempts "
            "where outcome = 'completed' order by 1, 2, 3"
        )
        written = [task for task in completed if task[1] in scenario.writers]
        assert written == rows("select * from effects order by 1, 2, 3")
        if scenario.max_attempts == 1:
            for path in self._begun.parent.iterdir():
                assert path.read_text() == "x"

    def _raise(self, point: Trigger | Lock, kind: str) -> None:
        worker = self._worker()
        if isinstance(point, Trigger):
            self._set("fault", point, self._scenario.strike, ERRORS[kind], once=kind != "errors")
            # Whether the call fails, or only an attempt, depends on what it was doing.
            with suppress(psycopg.Error):
                worker.work("f", mode="drain")
            strikes = self._session.value("select max(last_value) from fault where is_called")
            assert strikes >= self._scenario.strike
            self._session.run(f"drop trigger fault on {point.table}")
        else:
            schema, _, table = str(point.table).partition(".")
            self._session.run(f"alter table {schema}.{table} rename to gone")
            with pytest.raises(psycopg.errors.UndefinedTable):
                worker.work("f", mode="drain")
            self._session.run(f"alter table {schema}.gone rename to {table}")
        self._check_session(worker)

    def _interrupt(self, point: Trigger | Lock, strike: int, kind: str) -> None:
        holder, worker = Session(self._connect()), self._worker()
        if kind == "kill":
            # Then a crash forgets what was committed last, but for the start of a task.
            worker.run("set synchronous_commit = off")
        if isinstance(point, Trigger):
            self._set("fault", point, strike, "wait")
            holder.run("select pg_advisory_lock(1)")
        else:
            holder.run("begin")
            holder.run(point.statement)
        call = self._background(worker.work, "f", mode="drain")
        self._session.until(WAITING, 1)
        pid = worker.connection.info.backend_pid
        if kind == "cancel":
            self._session.run("select pg_cancel_backend(%s)", pid)
            # The cancel is there first; the bookkeeping after it may need the lock.
            holder.connection.close()
            with pytest.raises(psycopg.Error):
                call.result()
            self._check_session(worker)
        elif kind == "terminate":
            self._session.run("select pg_terminate_backend(%s, 10000)", pid)
            with pytest.raises(psycopg.OperationalError):
                call.result()
        else:
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                call.result()
            self._session = self._after_restart()
        holder.connection.close()

    def _set(
        self, name: str, point: Trigger, strike: int, action: str, *, once: bool = True
    ) -> None:
        """Set a trigger that strikes once, or from then on."""
        run = self._session.run
        run(f"create sequence {name}")
        if point.at_commit:
            run(
                f"create trigger defer before {point.event} on {point.table} "
                "for each row execute function defer()"
            )
            created = f"create constraint trigger {name} after {point.event} on {point.table} "
            created += "deferrable initially deferred"
        else:
            created = f"create trigger {name} before {point.event} on {point.table}"
        run(
            f"{created} for each row when ({point.when}) "
            f"execute function strike('[{strike},{strike if once else ''}]', '{action}')"
        )

    def _worker(self) -> Session:
        """A session with settings that the worker cannot use."""
        worker = Session(self._connect())
        worker.run(
            "set default_transaction_isolation = 'repeatable read'; set datestyle = 'German'"
        )
        return worker

    def _check_session(self, worker: Session) -> None:
        """A worker's session is as it was before the call that has failed."""
        assert worker.value("show default_transaction_isolation") == "repeatable read"
        assert worker.value("show datestyle") == "German, DMY"
        assert not self._session.value(
            "select count(*) from pg_locks where locktype = 'advisory' and pid = %s",
            worker.connection.info.backend_pid,
        )

    def _after_restart(self) -> Session:
        """A session with the server, which ends all others when one of them is killed."""
        while not self._session.connection.broken:
            with suppress(psycopg.OperationalError):
                self._session.run("select pg_sleep(0.01)")
        while True:
            try:
                return Session(self._connect())
            except psycopg.OperationalError:
                time.sleep(0.02)


@pytest.fixture(scope="module")
def databases(server: PostgreSQLExecutor, template: str) -> Iterator[Databases]:
    with ExitStack() as stack:
        yield Databases(server, template, stack)


@pytest.mark.parametrize(
    ("scenario", "point", "kind"),
    [
        pytest.param(scenario, POINTS[point], kind, id=f"{name}-{point}-{kind}")
        for name, scenario in SCENARIOS.items()
        for point in scenario.points.split()
        for kind in (*ERRORS, "cancel", "terminate")
        if not (point == "complete_lock" and kind in ERRORS)
        if kind != "errors" or not point.startswith(("gate", "slot", "run", "close", "report"))
        if kind != "violation" or point.startswith(("run", "complete", "retry", "fail"))
    ],
)
def test_a_fault_between_two_steps(
    databases: Databases,
    background: Background,
    tmp_path: Path,
    scenario: Scenario,
    point: Trigger | Lock,
    kind: str,
) -> None:
    with databases.open(scenario) as (session, connect):
        scene = Scene(session, connect, background, scenario, tmp_path / "begun")
        scene.meet(point, kind)
        scene.bring_to_end()
        scene.check()


# A server of its own, because all its sessions end when one of them is killed.
mortal_server = factories.postgresql_proc(
    executable=pg_ctl(),
    port=None,
    unixsocketdir=SOCKET_DIRECTORY,
    startparams="-w",
    postgres_options="-c fsync=off -c restart_after_crash=on",
)


@pytest.fixture(scope="module")
def mortal_databases(mortal_server: PostgreSQLExecutor, migrations: Path) -> Iterator[Databases]:
    with ExitStack() as stack:
        yield Databases(mortal_server, make_template(mortal_server, migrations), stack)


CRASHES = {
    # One of each, and all that may not repeat the handler.
    (point if scenario.max_attempts > 1 else f"once-{point}"): (scenario, POINTS[point])
    for scenario in reversed(SCENARIOS.values())
    for point in scenario.points.split()
}


@pytest.mark.parametrize(("scenario", "point"), CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_of_the_server_between_two_steps(
    mortal_databases: Databases,
    background: Background,
    tmp_path: Path,
    scenario: Scenario,
    point: Trigger | Lock,
) -> None:
    with mortal_databases.open(scenario) as (session, connect):
        scene = Scene(session, connect, background, scenario, tmp_path / "begun")
        scene.meet(point, "kill")
        scene.bring_to_end()
        scene.check()
