"""One worker for all flows: work() without a flow."""

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


def deploy(session: Session, *slugs: str) -> None:
    for slug in slugs:
        session.deploy(
            f"""
            flow = Flow("{slug}", max_attempts=1)

            @flow.step
            def first(flow_input):
                return flow_input

            @flow.step
            def second(first):
                return first
            """,
            module=f"module_{slug}",
        )


def work(session: Session, mode: str, **arguments: Any) -> dict[str, Any]:
    named = "".join(f", {name} => %s" for name in arguments)
    report: dict[str, Any] = session.value(
        f"call pgflow_worker.work(mode => %s{named})", mode, *arguments.values()
    )
    return report


def test_a_batch_is_of_the_flow_whose_task_is_oldest(session: Session) -> None:
    deploy(session, "a", "b")
    session.start("b")
    session.start("a")
    reports = [work(session, "batch") for _ in range(5)]
    assert [report["flows"] for report in reports] == [["b"], ["a"], ["b"], ["a"], []]
    assert [report["completed"] for report in reports] == [1, 1, 1, 1, 0]
    report = reports[0]
    assert (report["status"], report["flow_slug"], report["worker_id"]) == ("completed", None, None)


def test_drain_goes_on_until_no_flow_has_anything_ready(session: Session) -> None:
    deploy(session, "a", "b", "c")
    for slug in ("c", "a"):
        session.start(slug)
    report = work(session, "drain")
    assert (report["flows"], counts(report)) == (["c", "a"], {"completed": 4})
    assert session.rows("select distinct status from pgflow.runs") == [("completed",)]
    # Each flow's part is recorded as a call for that flow is.
    assert session.rows(
        "select flow_slug, report ->> 'completed' from pgflow_worker.invocations order by 1"
    ) == [("a", "2"), ("c", "2")]


def test_wait_takes_what_arrives_for_any_flow(
    session: Session, other: Session, background: Background
) -> None:
    deploy(session, "a", "b")
    call = background(work, other, "wait", max_duration="3 s")
    for slug in ("b", "a"):
        run = session.start(slug)
        session.until("select status = 'completed' from pgflow.runs where run_id = %s", run)
    report = call.result()
    assert (report["flows"], report["completed"]) == (["b", "a"], 4)
    assert 2_900 < report["duration_ms"] < 6_000


def test_a_long_backlog_does_not_keep_other_flows_waiting(session: Session) -> None:
    session.deploy("""
        import time
        long = Flow("long")

        @long.map
        def nap(second):
            time.sleep(second)
    """)
    deploy(session, "short")
    session.start("long", [0.4] * 20)
    session.start("short")
    report = work(session, "drain")
    assert counts(report) == {"completed": 22}
    assert session.value("""
        select (select max(completed_at) from pgflow.step_tasks where flow_slug = 'short')
            < (select max(completed_at) from pgflow.step_tasks where flow_slug = 'long')""")


@pytest.mark.parametrize("mode", ["batch", "drain"])
def test_a_flow_that_cannot_work_keeps_no_other_waiting(session: Session, mode: str) -> None:
    """Its error is raised when they are done, and recorded."""
    deploy(session, "broken", "fine")
    session.start("broken")
    session.start("fine")
    session.run("""update pgflow_worker.modules set source = 'import no_such_module'
        where module = 'module_broken'""")
    with pytest.raises(psycopg.Error) as caught:
        work(session, mode)
    assert caught.value.sqlstate == "PW005"
    done = session.value("select count(*) from pgflow.step_tasks where status = 'completed'")
    assert done == {"batch": 1, "drain": 2}[mode]
    statuses = session.rows(
        "select flow_slug, report ->> 'status' from pgflow_worker.invocations order by 1"
    )
    assert statuses == [("broken", "error"), ("fine", "completed")]


def test_every_flow_has_an_event_loop_of_its_own(session: Session) -> None:
    """What modules keep is forgotten with the loop, and loaded again for the next flow."""
    for slug in ("a", "b"):
        session.deploy(
            f"""
            import asyncio
            flow = Flow("{slug}", max_attempts=1)
            lock = asyncio.Lock()

            @flow.step
            async def step(flow_input):
                async with lock:
                    return await asyncio.sleep(0.01, "done")
            """,
            module=f"module_{slug}",
        )
        session.start(slug)
    report = work(session, "drain")
    assert (report["flows"], counts(report)) == (["a", "b"], {"completed": 2})


def test_a_process_that_is_not_trusted_any_more_serves_no_other_flow(session: Session) -> None:
    session.deploy("""
        flow = Flow("greedy", max_attempts=1)

        @flow.step
        def step(flow_input):
            raise MemoryError
    """)
    deploy(session, "next")
    session.start("greedy")
    session.start("next")
    report = work(session, "drain")
    assert (report["flows"], counts(report)) == (["greedy"], {"failed": 1})
    assert "the call ended" in report["notes"][0]
    assert work(session, "drain")["flows"] == ["next"]


def test_a_flow_without_its_queue_is_an_error_of_the_call(session: Session) -> None:
    deploy(session, "broken", "fine")
    session.start("fine")
    session.run("select pgmq.drop_queue('broken')")
    with pytest.raises(psycopg.Error, match='the queue of flow "broken" does not exist') as caught:
        work(session, "drain")
    assert caught.value.sqlstate == "PW004"
    assert session.value("select status from pgflow.runs") == "completed"


def test_paused_flows_are_passed_over(session: Session) -> None:
    deploy(session, "a", "b")
    for slug in ("a", "b"):
        session.start(slug)
    session.run("select pgflow_worker.pause('a', 'why not')")
    report = work(session, "drain")
    assert (report["status"], report["flows"], report["notes"]) == (
        *("completed", ["b"]),
        ["a: why not"],
    )
    session.run("select pgflow_worker.pause()")
    for mode in ("drain", "wait"):
        report = work(session, mode)
        assert (report["status"], report["flows"], len(report["notes"])) == ("paused", [], 2)


def test_a_flow_whose_slot_is_taken_is_skipped(session: Session, other: Session) -> None:
    deploy(session, "a")
    session.start("a")
    key = session.value("select lock_key from pgflow_worker._slots('a') where slot = 1")
    other.run("select pg_advisory_lock(%s)", key)
    report = work(session, "drain")
    assert report["status"] == "skipped"
    assert report["notes"][0].startswith("a: slot 1 is held by pid ")


def test_a_dead_workers_task_is_taken_back(session: Session, other: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2)

        @flow.step
        def step(tx: Transaction):
            if tx.execute("select from attempted") == []:
                tx.execute("select pg_terminate_backend(pg_backend_pid())")
    """)
    session.run("create table attempted ()")
    session.start("f")
    with pytest.raises(psycopg.Error):
        other.work("f")
    session.run("insert into attempted default values")
    report = work(session, "drain")
    assert (report["flows"], counts(report)) == (["f"], {"completed": 1, "rescued": 1})


def test_an_idle_call_starts_no_python(
    session: Session, connect: Callable[..., Connection]
) -> None:
    assert work(session, "drain")["notes"] == ["no flow is deployed"]
    deploy(session, "a", "b")
    fresh = Session(connect())
    report = work(fresh, "drain")
    assert (report["status"], report["flows"], report["notes"]) == ("completed", [], [])
    maps = Path(f"/proc/{fresh.connection.info.backend_pid}/maps").read_text()
    assert "plpython3" not in maps


@pytest.mark.parametrize("mode", ["drain", "wait"])
def test_inside_a_transaction_the_error_says_what_to_do(session: Session, mode: str) -> None:
    deploy(session, "a")
    session.start("a")
    with pytest.raises(psycopg.Error) as caught, session.connection.transaction():
        work(session, mode)
    assert caught.value.sqlstate == "PW011"


def test_an_idle_wait_can_be_canceled(
    session: Session, other: Session, background: Background
) -> None:
    deploy(session, "a")
    pid = other.value("select pg_backend_pid()")
    call = background(work, other, "wait")
    time.sleep(0.3)
    session.run("select pg_cancel_backend(%s)", pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result(timeout=10)
