"""Handlers that take the whole server down, and a server that crashes for other reasons."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bench.cluster import Cluster, Database, throw_away_cluster
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

FLOW = """
import ctypes, os, signal, time

flow = Flow("f", max_attempts=3, base_delay=1)

@flow.step
def step(flow_input, tx: Transaction):
    tx.execute("insert into written values ($1)", [flow_input["n"]])
    if flow_input["how"]:
        exec(flow_input["how"])
"""
HOW = {
    "os._exit": "os._exit(0)",
    "a segmentation fault": "ctypes.string_at(0)",
    "an abort": "os.abort()",
    "the kernel's out-of-memory killer": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with throw_away_cluster(os.environ.get("PG_CONFIG", "pg_config")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def crash_template(cluster: Cluster, migrations: Path) -> Database:
    return cluster.create_with_pgflow("template", migrations)


class Crashing:
    """A database in a server that crashes: every session is a new one."""

    def __init__(self, cluster: Cluster, database: Database) -> None:
        self.cluster = cluster
        self._database = database
        self._sessions: list[psycopg.Connection[Any]] = []

    @property
    def session(self) -> Session:
        deadline = time.monotonic() + 60
        while True:
            try:
                self._sessions.append(self._database.connect(prepare_threshold=None))
                return Session(self._sessions[-1])
            except psycopg.OperationalError:  # still recovering
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def work(self, flow_slug: str = "f", **arguments: Any) -> Any:
        return self.session.work(flow_slug, **arguments)

    def crash(self, **arguments: Any) -> None:
        """Work, and wait until the server has recovered from it."""
        before = self.checkpointer()
        with pytest.raises(psycopg.OperationalError):
            self.work(**arguments)
        self.wait_for_another(before)

    def wait_for_another(self, checkpointer: object) -> None:
        deadline = time.monotonic() + 60
        while self.checkpointer() in (None, checkpointer):
            assert time.monotonic() < deadline, "the server has not restarted"
            time.sleep(0.05)

    def checkpointer(self) -> object:
        """Its start tells when the server has restarted; None while it cannot be asked."""
        try:
            with self._database.connect() as connection:
                row = connection.execute(
                    "select backend_start from pg_stat_activity where backend_type = 'checkpointer'"
                ).fetchone()
                return row and row[0]
        except psycopg.OperationalError:
            return None

    def close(self) -> None:
        """Close the sessions, when the server has recovered and can drop the database."""
        self.session.value("select 1")
        for connection in self._sessions:
            connection.close()


@pytest.fixture
def crashing(cluster: Cluster, crash_template: Database) -> Iterator[Crashing]:
    with cluster.copy(crash_template) as database:
        database.run("create table written (n int)")
        crashing = Crashing(cluster, database)
        yield crashing
        crashing.close()


def sleep_in_a_worker(crashing: Crashing, background: Background) -> "Future[Any]":
    """A call whose handler sleeps."""
    session = crashing.session
    session.deploy("""
        import time
        flow = Flow("f", max_attempts=2)

        @flow.step
        def step(flow_input):
            time.sleep(flow_input["seconds"])
    """)
    session.start("f", {"seconds": 100})
    call = background(crashing.work, "f")
    session.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    return call


def wake_it(crashing: Crashing) -> Session:
    """Let the next call take the task back, whose handler does not sleep any more."""
    session = crashing.session
    session.run("""update pgflow.runs set input = '{"seconds": 0}'""")
    assert counts(session.work("f")) == {"rescued": 1, "completed": 1}
    return session


def outcomes(session: Session) -> list[tuple[Any, ...]]:
    return session.rows("select outcome from pgflow_worker.attempts order by attempt_id")


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_after_a_crash_of_the_server_the_next_call_takes_the_task_back(
    crashing: Crashing, how: str
) -> None:
    session = crashing.session
    session.deploy(FLOW)
    session.start("f", {"n": 1, "how": how})
    crashing.crash()
    session = crashing.session
    assert session.rows("select status from pgflow.step_tasks") == [("started",)]
    session.deploy(FLOW.replace("exec(", "print("))
    assert counts(session.work("f")) == {"rescued": 1, "completed": 1}
    assert outcomes(session) == [("crashed",), ("completed",)]
    assert session.rows("select n from written") == [(1,)]


def test_a_task_that_crashes_the_server_twice_fails_and_pauses_its_flow(
    crashing: Crashing,
) -> None:
    session = crashing.session
    session.deploy(FLOW)
    for n in range(3):
        session.start("f", {"n": n, "how": HOW["os._exit"] if n == 1 else ""})
    crashing.crash()
    # The first is done, the second has crashed it, the third was only read.
    crashing.crash()
    session = crashing.session
    report = session.work("f")
    assert counts(report) == {"failed": 1}
    [reason] = report["notes"]
    assert reason.startswith('the server crashed 2 times while step "step" ran (run ')
    assert session.value("select error_message from pgflow.step_tasks where status = 'failed'") == (
        "the server crashed while this task was started (attempt 1); crashes: 2"
    )
    assert session.work("f")["status"] == "paused"

    session.run("select pgflow_worker.resume('f'); update pgmq.q_f set vt = now()")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.rows("select status, count(*) from pgflow.runs group by 1 order by 1") == [
        ("completed", 2),
        ("failed", 1),
    ]
    assert session.rows("select n from written order by n") == [(0,), (2,)]


def test_a_crash_blames_nobody_of_several(crashing: Crashing) -> None:
    session = crashing.session
    session.deploy("""
        import os
        flow = Flow("f", max_attempts=3, base_delay=1)

        @flow.step
        def step(flow_input):
            if flow_input["n"] == 5:
                os._exit(0)
    """)
    for n in range(8):
        session.start("f", {"n": n})
    crashing.crash(batch_size=20)
    session = crashing.session
    # A step that is not known yet starts one task, then what will be done within a second.
    started = session.value("select count(*) from pgflow.step_tasks where status = 'started'")
    assert started == 7
    session.run("update pgmq.q_f set vt = now()")
    crashing.crash(batch_size=20)
    session = crashing.session
    assert session.rows(
        "select outcome, count(*) from pgflow_worker.attempts group by 1 order by 1"
    ) == [("completed", 5), ("crashed", 7)]
    report = session.work("f", batch_size=20)
    assert counts(report) == {"failed": 1}
    assert report["notes"][0].startswith("the server crashed 2 times")
    session.run("select pgflow_worker.resume('f'); update pgmq.q_f set vt = now()")
    assert counts(session.work("f", batch_size=20)) == {"completed": 2}


def test_suspects_of_a_crash_run_one_at_a_time_whatever_their_flow(
    crashing: Crashing, background: Background
) -> None:
    session = crashing.session
    waiting = """
        flow = Flow("{0}", max_attempts=3, base_delay=1)

        @flow.step
        def step_{0}(flow_input, tx: Transaction):
            tx.execute("select pg_advisory_xact_lock(1)")
    """
    for flow in ("f", "g"):
        session.deploy(waiting.format(flow), module=f"module_{flow}")
        session.start(flow)
    session.run("select pg_advisory_lock(1)")
    calls = [background(crashing.work, flow) for flow in ("f", "g")]
    session.until("select count(*) = 2 from pgflow.step_tasks where status = 'started'")
    crashing.cluster.restart("immediate")
    for call in calls:
        with pytest.raises(psycopg.OperationalError):
            call.result()

    session = crashing.session
    session.run("select pg_advisory_lock(1)")
    call = background(crashing.work, "f")
    session.until("select count(*) = 1 from pg_stat_activity where wait_event_type = 'Lock'")
    # The other flow's suspect is taken back, and waits.
    assert counts(crashing.work("g")) == {"rescued": 1}
    session.run("select pg_advisory_unlock(1)")
    assert counts(call.result()) == {"rescued": 1, "completed": 1}
    session.run("update pgmq.q_g set vt = now()")
    assert counts(crashing.work("g")) == {"completed": 1}


@pytest.mark.parametrize(("mode", "outcome"), [("immediate", "crashed"), ("fast", "died")])
def test_a_restart_of_the_server(
    crashing: Crashing, background: Background, mode: str, outcome: str
) -> None:
    session = crashing.session
    call = sleep_in_a_worker(crashing, background)
    started = time.monotonic()
    # A fast shutdown waits for the backends: this one is in Python.
    crashing.cluster.restart(mode)
    assert time.monotonic() - started < 60
    with pytest.raises(psycopg.OperationalError):
        call.result()
    session = wake_it(crashing)
    assert outcomes(session) == [(outcome,), ("completed",)]


def test_an_attempt_is_durable_even_if_the_roles_commits_are_not(crashing: Crashing) -> None:
    session = crashing.session
    session.deploy(FLOW)
    session.start("f", {"n": 1, "how": HOW["os._exit"]})
    session.run("alter role postgres set synchronous_commit = off")
    try:
        crashing.crash()
    finally:
        crashing.session.run("alter role postgres reset synchronous_commit")
    assert crashing.session.rows("select status, attempts_count from pgflow.step_tasks") == [
        ("started", 1)
    ]


def test_a_killed_backend_of_another_session_takes_the_worker_with_it(
    crashing: Crashing, background: Background
) -> None:
    session = crashing.session
    call = sleep_in_a_worker(crashing, background)
    before = crashing.checkpointer()
    os.kill(session.connection.info.backend_pid, signal.SIGKILL)
    with pytest.raises(psycopg.OperationalError):
        call.result()
    crashing.wait_for_another(before)
    session = wake_it(crashing)
    assert outcomes(session) == [("crashed",), ("completed",)]


def test_a_worker_that_waits_lets_another_run_a_suspect(
    crashing: Crashing, background: Background
) -> None:
    session = crashing.session
    for flow in ("f", "g"):
        session.deploy(
            f'flow = Flow("{flow}", max_attempts=3)\n@flow.step\ndef step_{flow}(): pass\n',
            module=f"module_{flow}",
        )
        run_id = session.start(flow)
        session.run(
            """insert into pgflow_worker.attempts
                (flow_slug, run_id, step_slug, task_index, attempt, outcome)
            values (%s, %s, %s, 0, 1, 'crashed')""",
            flow,
            run_id,
            f"step_{flow}",
        )
    call = background(crashing.work, "f", mode="wait", max_duration="20 s")
    session.until("select count(*) = 1 from pgflow.runs where status = 'completed'")
    assert counts(crashing.work("g", mode="wait", max_duration="3 s")) == {"completed": 1}
    session.run("select pgflow_worker.pause()")
    assert counts(call.result()) == {"completed": 1}
