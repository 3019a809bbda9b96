"""Workers that are gone, or seem to be: zombies, other kinds of workers, pgflow's own reaper."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

QUICK = """
    flow = Flow("f", max_attempts=2, base_delay=1)

    @flow.step
    def step(flow_input):
        pass
"""
WAITS = """
    import os, time
    flow = Flow("f", max_attempts=2, base_delay=1)

    @flow.step
    def step(flow_input):
        while not os.path.exists(flow_input["file"]):
            time.sleep(0.01)
"""


@pytest.fixture
def psql(
    server: PostgreSQLExecutor, database: str, session: Session, background: Background
) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts psql with a call of work(), and waits until a handler runs."""
    clients: list[subprocess.Popen[bytes]] = []

    def start(options: str = "") -> "subprocess.Popen[bytes]":
        where = {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": server.user}
        command = ["psql", "-X", "-d", database, "-c", "call pgflow_worker.work('f')"]
        client = subprocess.Popen(
            command,
            env=os.environ | where | {"PGOPTIONS": options},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        clients.append(client)
        session.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
        return client

    yield start
    for client in clients:
        client.kill()
        client.wait()


def test_a_zombie_keeps_its_slot_and_is_named(
    session: Session, psql: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    session.deploy(WAITS)
    for _ in range(2):
        session.start("f", {"file": str(tmp_path / "go")})
    client = psql()
    client.kill()
    client.wait()
    report = session.work("f")
    pid = session.value("select pid from pg_locks where locktype = 'advisory'")
    assert report["status"] == "skipped"
    [note] = report["notes"]
    assert note.startswith(f'slot 1 is held by pid {pid}: step "step" for ')
    # It does what it was called for, though nobody hears of it.
    (tmp_path / "go").touch()
    session.until("select count(*) = 2 from pgflow.runs where status = 'completed'")


def test_client_connection_check_interval_is_honoured_between_tasks(
    session: Session, psql: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    session.deploy(WAITS)
    for n in range(2):
        session.start("f", {"file": str(tmp_path / ("go" if n == 0 else "never"))})
    client = psql("-c client_connection_check_interval=10ms")
    client.kill()
    client.wait()
    time.sleep(0.1)
    (tmp_path / "go").touch()
    session.until("select count(*) = 0 from pg_locks where locktype = 'advisory'")
    (tmp_path / "never").touch()
    session.run("update pgmq.q_f set vt = now()")
    session.work("f", mode="drain")
    assert session.rows("select status, count(*) from pgflow.runs group by 1") == [("completed", 2)]


EDGE_WORKER = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def start_elsewhere(session: Session) -> Callable[..., None]:
    """Lets another kind of worker start the flow's task: so long ago, last heard of so long ago."""

    def start(age: int, silence: int | None) -> None:
        session.deploy(QUICK)
        session.run("update pgflow.flows set opt_timeout = 60")
        session.start("f")
        session.run(
            """insert into pgflow.workers (worker_id, queue_name, function_name, last_heartbeat_at)
            values (%s, 'f', 'an Edge Function', now() - make_interval(secs => %s))""",
            EDGE_WORKER,
            silence or 0,
        )
        session.run(
            "select pgflow.start_tasks('f', array_agg(msg_id), %s) from pgmq.q_f", EDGE_WORKER
        )
        session.run(
            """update pgflow.step_tasks set queued_at = now() - interval '1 day',
                started_at = now() - make_interval(secs => %s)""",
            age,
        )
        # Far in the future: it is not the message that brings the worker.
        session.run("update pgmq.q_f set vt = now() + interval '1 hour'")
        if silence is None:
            session.run("delete from pgflow.workers")

    return start


@pytest.mark.parametrize(("age", "silence"), [(95, 65), (95, None)], ids=["silent", "deleted"])
def test_a_strangers_task_is_taken_back_when_its_time_is_up(
    session: Session, start_elsewhere: Callable[..., None], age: int, silence: int | None
) -> None:
    start_elsewhere(age, silence)
    assert counts(session.work("f")) == {"rescued": 1, "completed": 1}
    assert session.rows(
        "select outcome, error, worker_id::text from pgflow_worker.attempts order by attempt_id"
    )[0] == (
        "suspected",
        "another worker left this task started (attempt 1)",
        None if silence is None else EDGE_WORKER,
    )
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [
        ("completed", 1)
    ]


@pytest.mark.parametrize(
    ("age", "silence"), [(85, 3600), (3600, 30), (85, None)], ids=["young", "beats", "no row"]
)
def test_a_strangers_task_is_left_alone_before(
    session: Session, start_elsewhere: Callable[..., None], age: int, silence: int | None
) -> None:
    start_elsewhere(age, silence)
    assert counts(session.work("f")) == {}
    assert session.rows("select status from pgflow.step_tasks") == [("started",)]


# As pgflow 0.13.2 and later do once a minute, but without their limit of three times: by the
# flow's timeout and 30 seconds, whoever has the task.
REAPER = """
    create function pgflow.requeue_stalled_tasks() returns integer language sql as $$
        with stalled as (
            update pgflow.step_tasks as task
            set status = 'queued', started_at = null, last_worker_id = null
            from pgflow.flows as flow
            where flow.flow_slug = task.flow_slug and task.status = 'started'
                and task.started_at < clock_timestamp()
                    - make_interval(secs => flow.opt_timeout + 30)
            returning 1
        )
        select count(*)::integer from stalled
    $$
"""


def test_a_step_that_pgflows_reaper_would_take_is_refused(session: Session) -> None:
    source = """
        flow = Flow("f", timeout=60)

        @flow.step(timeout={0})
        def slow(flow_input):
            pass
    """
    session.deploy(source.format(3600))  # a pgflow without a reaper
    session.run(REAPER)
    session.deploy(source.format(80))
    with pytest.raises(psycopg.Error, match='step "slow" of flow "f" may take 81 s') as raised:
        session.deploy(source.format(81))
    assert raised.value.diag.sqlstate == "PW006"
    assert "Raise the timeout of the flow" in str(raised.value.diag.message_hint)


def test_pgflows_reaper_does_not_take_a_living_handlers_task(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.run(REAPER)
    session.deploy(WAITS.replace("@flow.step", "@flow.step(timeout=80)"))
    session.start("f", {"file": str(tmp_path / "go")})
    call = background(session.work, "f")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    # As it is when the step's time is nearly up. The claim is the worker's own no more.
    other.run(
        """update pgflow.step_tasks set queued_at = now() - interval '1 day',
            started_at = started_at - interval '80 s'"""
    )
    assert other.value("select pgflow.requeue_stalled_tasks()") == 0
    (tmp_path / "go").touch()
    call.result()


def test_a_thread_whose_time_is_up_is_abandoned_and_its_result_discarded(
    session: Session, other: Session, connect: Callable[..., Connection], tmp_path: Path
) -> None:
    session.deploy("""
        import os, time
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step(thread=True)
        def step(flow_input):
            open(flow_input["file"] + ".begun", "a").write("x")
            while not os.path.exists(flow_input["file"]):
                time.sleep(0.01)
    """)
    session.run("update pgflow.flows set opt_timeout = 1")
    session.start("f", {"file": str(tmp_path / "go")})
    started = time.monotonic()
    report = session.work("f", mode="wait")
    assert time.monotonic() - started < 20  # and not the 55 s of a call that waits
    assert counts(report) == {"retried": 1}
    assert report["notes"] == [
        "a handler whose time was up could not be stopped: the call ended, and the next one has "
        "a new process"
    ]
    assert session.rows("select status, error_message from pgflow.step_tasks") == [
        ("queued", 'step "step" took longer than 1 s')
    ]
    (tmp_path / "go").touch()
    session.run("select pg_sleep(0.1)")
    assert session.rows("select status from pgflow.step_tasks") == [("queued",)]
    session.run("update pgmq.q_f set vt = now()")
    assert counts(Session(connect()).work("f")) == {"completed": 1}


def test_an_async_handler_that_refuses_to_end_is_abandoned(session: Session) -> None:
    session.deploy("""
        import asyncio, time
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        async def step(flow_input):
            until = time.monotonic() + 8
            while time.monotonic() < until:
                try:
                    await asyncio.sleep(0.1)
                except BaseException:
                    pass
    """)
    session.run("update pgflow.flows set opt_timeout = 1")
    session.start("f")
    report = session.work("f")
    assert counts(report) == {"retried": 1}
    assert "could not be stopped" in report["notes"][0]


def test_a_terminated_worker_with_threads_ends(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.deploy("""
        import re, time
        flow = Flow("f", max_attempts=2)

        @flow.step(thread=True)
        def sleeping(flow_input):
            time.sleep(600)

        @flow.step(thread=True)
        def computing(flow_input):
            while True:
                sum(range(1000))
    """)
    session.start("f")
    worker = Session(connect())
    call = background(worker.work, "f")
    session.until("select count(*) = 2 from pgflow.step_tasks where status = 'started'")
    session.run("select pg_sleep(0.2)")
    assert session.value(
        "select pg_terminate_backend(%s, 20000)", worker.connection.info.backend_pid
    )
    with pytest.raises(psycopg.OperationalError):
        call.result()
    # The server was not taken down by threads that still ran.
    assert session.value("select 1") == 1
