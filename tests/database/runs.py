"""Flows and calls of the tests that handle runs as an operator does."""

import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.database.conftest import Session

ECHO = """
    flow = Flow("echo", max_attempts=1)

    @flow.step
    def echo(flow_input):
        if flow_input == "bad":
            raise Fail("as told")
        return flow_input
"""
EACH = 'flow = Flow("each")\n@flow.map\ndef double(n): return 2 * n\n'


def error_of(session: Session, statement: str, *args: Any) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        session.run(statement, *args)
    return caught.value


def said(error: psycopg.Error) -> tuple[str | None, str | None]:
    return error.sqlstate, error.diag.message_primary


def start(session: Session, flow_slug: str, flow_input: str = "{}") -> str:
    return str(session.value("select pgflow_worker.start_flow(%s, %s)", flow_slug, flow_input))


WAIT = "select from pgflow_worker.wait_for_run(%s)"


def wait_for(session: Session, run: str, timeout: str = "20 s") -> tuple[Any, ...]:
    [row] = session.rows("select * from pgflow_worker.wait_for_run(%s, %s)", run, timeout)
    return row


# A step that hangs, and says before that it runs.
HANGING = """
    import asyncio, time

    flow = Flow("f", max_attempts=2, timeout=500)

    def began(path):
        with open(path, "a") as file:
            file.write("x")

    @flow.step
    {signature}
        began(flow_input["path"])
        if flow_input.get("hangs", True):
            {body}
        return 1

    @flow.step(after=[step])
    def afterwards(flow_input): pass
"""
WAYS = {
    "python": ("def step(flow_input):", "while True: pass"),
    "tx": ("def step(flow_input, tx: Transaction):", "time.sleep(600)"),
    "sql": ("def step(flow_input, tx: Transaction):", "tx.execute('select pg_sleep(600)')"),
    "async": ("async def step(flow_input):", "await asyncio.sleep(600)"),
}


def hanging(way: str) -> str:
    signature, body = WAYS[way]
    return HANGING.format(signature=signature, body=body)


def until_begun(path: Path, times: int = 1) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or len(path.read_text()) < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cancel(session: Session, run: str, *reason: str) -> tuple[int, list[int]]:
    [row] = session.rows(
        f"select * from pgflow_worker.cancel_run(%s{', %s' * len(reason)})", run, *reason
    )
    return row[0], row[1]


def prune(session: Session, *args: Any) -> dict[str, int]:
    result: dict[str, int] = session.value(
        f"call pgflow_worker.prune_data_older_than({', '.join(['%s'] * len(args))})", *args
    )
    return {part: number for part, number in result.items() if number}
