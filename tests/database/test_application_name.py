"""What pg_stat_activity shows of a worker."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session

Background = Callable[..., "Future[Any]"]

PURE = """
    import time, os

    flow = Flow("f")

    @flow.step
    def first(flow_input):
        wait_for(flow_input)

    @flow.step
    def second(first, flow_input):
        wait_for(flow_input)

    def wait_for(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        os.remove(path)
"""
NAME = 'tx.execute("select current_setting(\'application_name\') as name")[0]["name"]'
SHOWN = "select application_name = %s from pg_stat_activity where pid = %s"


@pytest.fixture
def named(connect: Callable[..., Connection]) -> Session:
    """A session with an application_name of its own."""
    return Session(connect(application_name="it's me"))


def name_of(session: Session) -> Any:
    return session.value("select current_setting('application_name')")


def outputs(session: Session) -> list[Any]:
    return [
        row[0]
        for row in session.rows(
            "select task.output from pgflow.step_tasks as task "
            "join pgflow.steps using (flow_slug, step_slug) order by step_index, task_index"
        )
    ]


def test_others_see_flow_and_step(
    session: Session, named: Session, background: Background, tmp_path: Any
) -> None:
    session.deploy(PURE)
    go = tmp_path / "go"
    session.start("f", str(go))
    pid = named.connection.info.backend_pid
    call = background(named.work, "f", mode="drain")
    for step in ("first", "second"):
        session.until(SHOWN, f"pgflow_worker f/{step}", pid)
        status = "select state, step, task from pgflow_worker.worker_status"
        assert session.rows(status) == [("working", step, 0)]
        go.touch()
    call.result()
    assert name_of(named) == "it's me"


def test_a_worker_that_waits_shows_its_flow_only(
    session: Session, named: Session, background: Background
) -> None:
    session.deploy(f"""
        flow = Flow("f")
        @flow.step
        def step(tx: Transaction): return {NAME}
    """)
    session.start("f")
    call = background(named.work, "f", mode="wait", max_duration="20 s")
    session.until("select status = 'completed' from pgflow.runs")
    session.until(SHOWN, "pgflow_worker f", named.connection.info.backend_pid)
    assert outputs(session) == ["pgflow_worker f/step"]
    session.run("select pgflow_worker.pause()")
    call.result()
    assert name_of(named) == "it's me"


def test_a_step_is_shown_although_what_came_before_was_rolled_back(named: Session) -> None:
    named.deploy(f"""
        from pgflow_worker import Retry
        flow = Flow("f")

        @flow.step
        def first(tx: Transaction):
            return {NAME}

        @flow.step
        def second(first, tx: Transaction, ctx: Context):
            if ctx.attempt == 1:
                raise Retry("rolled back", after=0)
            return {NAME}
    """)
    named.start("f")
    named.work("f", mode="drain")
    assert outputs(named) == ["pgflow_worker f/first", "pgflow_worker f/second"]


def test_what_a_handler_sets_is_taken_back(named: Session) -> None:
    named.deploy(f"""
        flow = Flow("f")

        @flow.step
        def first(tx: Transaction):
            tx.execute("set application_name = 'mine'")

        @flow.map
        def second(element, tx: Transaction):
            tx.execute("set application_name = 'mine'") if element else None
            return {NAME}
    """)
    named.start("f", [0, 1, 0])
    named.work("f", mode="drain")
    shown = "pgflow_worker f/second"
    assert outputs(named)[1:] == [shown, "mine", shown]
    assert name_of(named) == "it's me"


@pytest.mark.parametrize("tx", ["", "tx: Transaction"])
def test_it_is_restored_after_a_handlers_error(named: Session, tx: str) -> None:
    named.deploy(f"""
        flow = Flow("f")
        @flow.step
        def step({tx}): raise Fail("no")
    """)
    named.start("f")
    named.work("f")
    assert name_of(named) == "it's me"


@pytest.mark.parametrize(
    "handler", ["def step(): time.sleep(60)", "def step(tx: Transaction): time.sleep(60)"]
)
def test_it_is_restored_after_a_cancel(
    session: Session, named: Session, background: Background, handler: str
) -> None:
    session.deploy(f"""
        import time
        flow = Flow("f")
        @flow.step
        {handler}
    """)
    session.start("f")
    pid = named.connection.info.backend_pid
    call = background(named.work, "f")
    session.until(SHOWN, "pgflow_worker f/step", pid)
    session.run("select pg_cancel_backend(%s)", pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result()
    assert name_of(named) == "it's me"


def test_it_is_restored_after_an_error_of_the_call(named: Session) -> None:
    named.deploy("""
        flow = Flow("f")
        @flow.step
        def step(): pass
    """)
    named.start("f")
    named.run(
        "create function public.refuse() returns trigger language plpgsql "
        "as $$begin raise 'no' using errcode = '58000'; end$$"
    )
    named.run(
        "create trigger refuse before update on pgflow.step_tasks for each row "
        "when (new.status = 'completed') execute function public.refuse()"
    )
    with pytest.raises(psycopg.errors.SystemError):
        named.work("f")
    assert name_of(named) == "it's me"


def test_in_a_callers_transaction_it_is_restored_and_the_callers_set_stays(
    named: Session,
) -> None:
    named.deploy(f"""
        flow = Flow("f")
        @flow.step
        def step(tx: Transaction): return {NAME}
    """)
    named.start("f")
    with named.connection.transaction():
        named.run("set application_name = 'another'")
        named.work_batch("f")
        assert name_of(named) == "another"
    assert name_of(named) == "another"
    assert outputs(named) == ["pgflow_worker f/step"]


def test_handlers_that_run_at_the_same_time_are_shown_together(
    session: Session, named: Session, background: Background, tmp_path: Any
) -> None:
    session.deploy("""
        import asyncio, os, time

        flow = Flow("f")

        @flow.step
        async def one(flow_input):
            while not os.path.exists(flow_input):
                await asyncio.sleep(0.01)

        @flow.step(thread=True)
        def two(flow_input):
            while not os.path.exists(flow_input):
                time.sleep(0.01)
    """)
    go = tmp_path / "go"
    session.start("f", str(go))
    call = background(named.work, "f")
    session.until(SHOWN, "pgflow_worker f/one,two", named.connection.info.backend_pid)
    assert session.value("select step from pgflow_worker.worker_status") == "one,two"
    go.touch()
    call.result()
    assert name_of(named) == "it's me"


def test_a_long_name_is_cut_and_the_view_has_all_of_it(
    session: Session, named: Session, background: Background, tmp_path: Any
) -> None:
    slug = "a_step_with_a_name_that_is_longer_than_application_name"
    session.deploy(PURE.replace("first", slug))
    go = tmp_path / "go"
    session.start("f", str(go))
    call = background(named.work, "f")
    shown = f"pgflow_worker f/{slug}"[:63]
    session.until(SHOWN, shown, named.connection.info.backend_pid)
    assert session.value("select step from pgflow_worker.worker_status") == slug
    go.touch()
    call.result()
