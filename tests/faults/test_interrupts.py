"""Handlers end when PostgreSQL or their step's timeout wants them to, whatever they are doing."""

import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

# What a handler can be doing for ever. `begun()` tells the test that it does.
HANGING = {
    "sleep": "time.sleep(600)",
    "loop": "while True: pass",
    "socket": "pair = socket.socketpair(); pair[0].recv(1)",
    "lock": "queue.Queue().get()",
    "process": "subprocess.run(['sleep', '600'], check=True)",
    "expression": "re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "swallowed": """
        while True:
            try:
                time.sleep(600)
            except Exception:
                pass
    """,
    "logging": "while True: ctx.log.info('again')",
}
IN_SQL = {
    "sql": "tx.execute('select pg_sleep(600)')",
    "stream": "list(tx.stream('select pg_sleep(600)'))",
    "swallowed sql": """
        try:
            tx.execute('select pg_sleep(600)')
        except BaseException:
            pass
    """,
    "python with tx": "time.sleep(600)",
}
SIGNATURES = (
    dict.fromkeys(HANGING, "def step(flow_input, ctx: Context):")
    | dict.fromkeys(IN_SQL, "def step(flow_input, tx: Transaction):")
    | {"async": "async def step(flow_input):", "awaited": "def step(flow_input):"}
)
BODIES = (
    HANGING | IN_SQL | {"async": "await asyncio.sleep(600)", "awaited": "return asyncio.sleep(600)"}
)
FLOW = """
import asyncio, os, queue, re, socket, subprocess, time

flow = Flow("f", max_attempts=2, base_delay=1, timeout=500)

def begun(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))

@flow.step
{signature}
    {first}
    begun(flow_input["begun"])
{body}
"""


def source(doing: str) -> str:
    signature = SIGNATURES[doing]
    first = "tx.execute('insert into written values (1)')" if " tx:" in signature else "pass"
    body = textwrap.indent(textwrap.dedent(BODIES[doing]).strip(), "    ")
    return FLOW.format(signature=signature, first=first, body=body)


class Hanging:
    """A worker in another session whose handler has begun something that never ends."""

    def __init__(self, session: Session, worker: Session, background: Background, begun: Path):
        self.session = session
        self.pid = worker.connection.info.backend_pid
        session.start("f", {"begun": str(begun)})
        self.call = background(worker.work, "f", max_concurrent=1)
        deadline = time.monotonic() + 20
        while not (begun.exists() and begun.read_text()):
            if self.call.done():
                pytest.fail(f"the call has ended: {self.call.result()} {attempts(session)}")
            assert time.monotonic() < deadline, "the handler did not begin"
            time.sleep(0.01)

    def seconds_to_end(self) -> float:
        """How long it takes from now until the call's backend is free or gone."""
        started = time.monotonic()
        self.call.exception(timeout=20)
        return time.monotonic() - started


@pytest.fixture
def hang(
    session: Session, connect: Callable[..., Connection], background: Background, tmp_path: Path
) -> Callable[..., Hanging]:
    session.run("create table written (id int)")

    def begin(doing: str, timeout: int = 500, setting: str = "select") -> Hanging:
        session.deploy(source(doing))
        session.run("update pgflow.flows set opt_timeout = %s", timeout)
        worker = Session(connect())
        worker.run(setting)
        return Hanging(session, worker, background, tmp_path / "begun")

    return begin


def attempts(session: Session) -> list[tuple[Any, ...]]:
    return session.rows("select status, attempts_count, error_message from pgflow.step_tasks")


@pytest.mark.parametrize("doing", BODIES)
def test_a_cancel_ends_the_handler_and_the_call(
    session: Session, hang: Callable[..., Hanging], doing: str
) -> None:
    hanging = hang(doing)
    session.run("select pg_cancel_backend(%s)", hanging.pid)
    hanging.seconds_to_end()
    with pytest.raises(psycopg.errors.QueryCanceled, match="due to user request"):
        hanging.call.result()
    assert attempts(session) == [("queued", 1, "canceled: canceling statement due to user request")]
    assert session.rows("select from written") == []
    assert session.rows("select from pg_locks where locktype = 'advisory'") == []
    assert session.value("select report ->> 'status' from pgflow_worker.invocations") == "error"


@pytest.mark.parametrize("doing", ["sleep", "loop", "sql", "async"])
def test_statement_timeout_ends_the_handler_and_the_call(
    session: Session, hang: Callable[..., Hanging], doing: str
) -> None:
    hanging = hang(doing, setting="set statement_timeout = '1500ms'")
    hanging.seconds_to_end()
    with pytest.raises(psycopg.errors.QueryCanceled, match="due to statement timeout"):
        hanging.call.result()
    assert attempts(session) == [
        ("queued", 1, "canceled: canceling statement due to statement timeout")
    ]


@pytest.mark.parametrize("doing", BODIES)
def test_a_terminated_worker_ends_and_the_next_call_takes_its_task_back(
    session: Session, hang: Callable[..., Hanging], doing: str
) -> None:
    hanging = hang(doing)
    # True when the backend is gone; false after the timeout.
    assert session.value("select pg_terminate_backend(%s, 10000)", hanging.pid)
    with pytest.raises(psycopg.OperationalError):
        hanging.call.result()
    assert attempts(session) == [("started", 1, None)]
    session.deploy(source(doing).replace("begun(flow_input", "return 1\n    begun(flow_input"))
    assert counts(session.work("f")) == {"rescued": 1, "completed": 1}
    expected = 1 if doing in IN_SQL else 0
    assert session.value("select count(*) from written") == expected


@pytest.mark.parametrize("doing", BODIES)
def test_a_steps_timeout_ends_the_handler(
    session: Session, hang: Callable[..., Hanging], doing: str
) -> None:
    hanging = hang(doing, timeout=1)
    report = hanging.call.result(timeout=20)
    assert counts(report) == {"retried": 1}
    assert attempts(session) == [("queued", 1, 'step "step" took longer than 1 s')]
    assert session.rows("select from written") == []
    duration = session.value("select duration_ms from pgflow_worker.attempts")
    assert 1_000 <= duration < 10_000
    # Nothing is left over that would cancel what the session does next.
    session.run("select pg_sleep(0.2)")
