"""pgflow's events outside Supabase: notifications that the stand-in for realtime.send sends."""

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session

Events = Callable[[], list[dict[str, Any]]]

CHAIN = """
    flow = Flow("chain", max_attempts=1)

    @flow.step
    def first(flow_input):
        return flow_input

    @flow.step
    def second(first):
        if first == "bad":
            raise ValueError("a secret")
        return first
"""


@pytest.fixture
def events(connect: Callable[..., Connection]) -> Events:
    """What a session that listens has been told; all that was committed before has arrived."""
    listener = connect()
    listener.execute("listen pgflow")

    def arrived() -> list[dict[str, Any]]:
        # A session is told everything that was committed before its statement ends.
        listener.execute("select")
        return [json.loads(notify.payload) for notify in listener.notifies(timeout=0)]

    return arrived


@pytest.fixture
def worker(session: Session, connect: Callable[..., Connection]) -> Session:
    """A session of a database that has pgflow.notify = on."""
    set_notify(session, "on")
    return Session(connect())


def set_notify(session: Session, value: str) -> None:
    session.run(f"alter database {session.connection.info.dbname} set pgflow.notify = '{value}'")


def test_the_events_of_a_run_come_in_order(worker: Session, events: Events) -> None:
    worker.deploy(CHAIN)
    run = worker.start("chain")
    worker.work("chain", mode="drain")

    def of_run(status: str) -> dict[str, str]:
        what = {"event_type": f"run:{status}", "run_id": run}
        return {**what, "flow_slug": "chain", "status": status}

    def of_step(slug: str, status: str) -> dict[str, str]:
        what = {"event_type": f"step:{status}", "run_id": run}
        return {**what, "step_slug": slug, "status": status}

    assert events() == [
        of_run("started"),
        of_step("first", "started"),
        of_step("first", "completed"),
        of_step("second", "started"),
        of_step("second", "completed"),
        of_run("completed"),
    ]


def test_a_failure_is_told_without_its_error(worker: Session, events: Events) -> None:
    worker.deploy(CHAIN)
    run = worker.start("chain", "bad")
    worker.work("chain", mode="drain")
    assert events()[-2:] == [
        {"event_type": "step:failed", "run_id": run, "step_slug": "second", "status": "failed"},
        {"event_type": "run:failed", "run_id": run, "flow_slug": "chain", "status": "failed"},
    ]


def test_results_may_be_of_any_size(worker: Session, events: Events) -> None:
    worker.deploy(CHAIN)
    worker.start("chain", "long" * 10_000)
    assert worker.work("chain", mode="drain")["completed"] == 2
    assert [event["event_type"] for event in events()][-1] == "run:completed"


def test_slugs_of_any_length_fit(worker: Session, events: Events) -> None:
    flow, step = "f" * 47, "s" * 128
    worker.deploy(f'flow = Flow("{flow}")\n@flow.step("{step}")\ndef step(flow_input): pass\n')
    worker.start(flow)
    worker.work(flow)
    assert [event["step_slug"] for event in events() if "step_slug" in event] == [step, step]


def test_what_is_rolled_back_is_not_told(worker: Session, events: Events) -> None:
    worker.deploy(CHAIN)
    with worker.connection.transaction(force_rollback=True):
        worker.start("chain")
        worker.work_batch("chain")
    assert events() == []


@pytest.mark.parametrize("value", [None, "off", "false", "", "onn", "2", "'; select 1"])
def test_nobody_is_told_unless_notify_is_on(
    session: Session, connect: Callable[..., Connection], events: Events, value: str | None
) -> None:
    if value is not None:
        set_notify(session, value.replace("'", "''"))
    worker = Session(connect())
    worker.deploy(CHAIN)
    worker.start("chain")
    assert worker.work("chain", mode="drain")["completed"] == 2
    assert events() == []


@pytest.mark.parametrize("value", ["on", "ON", "true", "yes", "1"])
def test_notify_is_on_in_every_usual_way_of_saying_so(
    session: Session, events: Events, value: str
) -> None:
    session.run(f"set pgflow.notify = {value}")
    session.deploy(CHAIN)
    session.start("chain")
    assert [event["event_type"] for event in events()] == ["run:started", "step:started"]


def test_what_is_not_pgflows_is_not_told(worker: Session, events: Events) -> None:
    worker.run("select realtime.send('{\"status\": \"mine\"}', 'mine', 'room:1', false)")
    worker.run("select realtime.send('{\"status\": \"its\"}', 'its', 'pgflow:run:1', false)")
    assert events() == [{"status": "its"}]


def test_search_path_does_not_matter(worker: Session, events: Events) -> None:
    worker.run("""
        create schema trap;
        create function trap.fall(jsonb, text) returns text language plpgsql
        as 'begin raise ''trapped''; end';
        create operator trap.->> (function = trap.fall, leftarg = jsonb, rightarg = text);
        create function trap.lower(text) returns text language plpgsql
        as 'begin raise ''trapped''; end';
        create function trap.equals(text, text) returns boolean language plpgsql
        as 'begin raise ''trapped''; end';
        create operator trap.= (function = trap.equals, leftarg = text, rightarg = text);
        create domain trap.text as pg_catalog.text check (value = 'trapped');
        set search_path = trap, pg_catalog;
    """)
    with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
        worker.run("select lower('A')")
    worker.run("""select realtime.send(
        '{"status": "its"}', 'its'::pg_catalog.text, 'pgflow:run:1'::pg_catalog.text, false)""")
    assert events() == [{"status": "its"}]


def test_a_worker_that_is_no_superuser_tells_too(
    worker: Session, role: Callable[[str | None], Session], events: Events
) -> None:
    worker.deploy(CHAIN)
    operator = role("operate")
    operator.start("chain")
    operator.work("chain", mode="drain")
    assert events()[-1]["event_type"] == "run:completed"
