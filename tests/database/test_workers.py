"""Several workers on one flow, and one worker on many tasks."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

MAPS = """
    flow = Flow("maps", max_attempts=2, base_delay=1)

    @flow.map
    def each(element, ctx: Context{tx}):
        {body}
        if element % 50 == 0 and ctx.attempt == 1:
            raise ValueError("not at once")
"""
WITH_TX = {
    "tx": ", tx: Transaction",
    "body": 'tx.execute("insert into done values ($1)", [element])',
}
WITHOUT_TX = {"tx": "", "body": "pass"}


@pytest.mark.parametrize("handler", [WITH_TX, WITHOUT_TX], ids=["tx", "no tx"])
@pytest.mark.parametrize("runs", [4, 1])
def test_workers_share_the_tasks_of_few_runs(
    session: Session,
    connect: Callable[..., Connection],
    background: Background,
    handler: dict[str, str],
    runs: int,
) -> None:
    session.run("create table done (element int)")
    session.deploy(MAPS.format(**handler))
    session.run("update pgflow_worker.flows set workers = 4")
    deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
    before = session.value(deadlocks)
    tasks = 2000 // runs
    for run in range(runs):
        session.start("maps", list(range(run * tasks, (run + 1) * tasks)))
    done = {"completed": 0, "retried": 0}
    for _ in range(2):
        calls = [
            background(Session(connect()).work, "maps", batch_size=50, mode="drain")
            for _ in range(4)
        ]
        for call in calls:
            for name, number in counts(call.result()).items():
                done[name] += number
        session.run("update pgmq.q_maps set vt = now()")  # delays of retries
    # No task was run twice by two workers: 40 were told to fail once.
    assert done == {"completed": 2000, "retried": 40}
    assert session.rows("select distinct status from pgflow.runs") == [("completed",)]
    assert session.value("select count(*) from pgflow_worker.attempts") == 2040
    if handler is WITH_TX:
        assert session.rows("select count(*), count(distinct element) from done") == [(2000, 2000)]
    assert session.value("select count(distinct worker_id) > 1 from pgflow_worker.attempts")
    session.run("select pg_stat_clear_snapshot()")
    assert session.value(deadlocks) == before


def test_a_worker_leaves_slow_tasks_to_another(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy("""
        import os, time
        flow = Flow("slow", max_attempts=1)

        @flow.step
        def step(flow_input):
            time.sleep(0.5)
            while not os.path.exists(flow_input["file"]):
                time.sleep(0.01)
            return os.getpid()
    """)
    session.run("update pgflow_worker.flows set workers = 2")
    # Nobody waits for twenty of these.
    for n in range(20):
        session.start("slow", {"file": str(tmp_path / ("go" if n else ""))})
    call = background(other.work, "slow", mode="drain", batch_size=20)
    visible = "select count(*) from pgmq.q_slow where vt <= clock_timestamp()"
    # The first one has told how long it takes, the second one runs.
    session.until(f"select ({visible}) between 5 and 17")
    (tmp_path / "go").touch()
    report = session.work("slow", mode="drain", max_duration="2 seconds")
    assert report["completed"] > 1
    call.result()


def test_a_failing_task_among_workers_leaves_nothing_started(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.map
        def each(element):
            if element == 700:
                raise ValueError("told to")
    """)
    session.run("update pgflow_worker.flows set workers = 4")
    for _ in range(3):
        session.start("f", list(range(1000)))
    calls = [
        background(Session(connect()).work, "f", batch_size=20, mode="drain") for _ in range(4)
    ]
    for call in calls:
        call.result()
    assert session.rows("select distinct status from pgflow.runs") == [("failed",)]
    assert session.value("select count(*) from pgflow.step_tasks where status = 'started'") == 0
    assert session.value("select count(*) from pgmq.q_f") == 0
    # The step counts what was completed before.
    assert (
        session.rows("""
        select state.initial_tasks - state.remaining_tasks = count(*)
        from pgflow.step_states as state join pgflow.step_tasks as task using (run_id)
        where task.status = 'completed' group by run_id, initial_tasks, remaining_tasks
    """)
        == [(True,)] * 3
    )


# Statistics

OUTGROWN = """
    alter table pgflow.step_tasks set (autovacuum_enabled = off);
    alter table pgflow.step_states set (autovacuum_enabled = off);
    alter table pgflow.runs set (autovacuum_enabled = off);
"""


def test_tables_that_have_outgrown_their_statistics_are_analyzed(session: Session) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): return element\n')
    session.run(OUTGROWN)
    session.start("f", [1])
    session.work("f")
    rows = "select reltuples::int from pg_class where oid = 'pgflow.step_tasks'::regclass"
    assert session.value(rows) == -1  # too small to matter
    session.start("f", list(range(3000)))
    session.work("f", batch_size=50)
    assert session.value(rows) > 2500
    last = "select last_analyze from pg_stat_all_tables where relid = 'pgflow.step_tasks'::regclass"
    analyzed = session.until(last)
    session.work("f", batch_size=50)
    session.run("select pg_stat_clear_snapshot()")
    assert session.value(last) == analyzed  # it has hardly grown since


def test_tables_that_grow_while_a_call_works_are_analyzed(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.step
        def few(flow_input):
            time.sleep(1)
            return list(range(3000))

        @flow.map(over=few)
        def many(element): pass
    """)
    session.run(OUTGROWN)
    session.start("f")
    assert counts(session.work("f", mode="drain", batch_size=100)) == {"completed": 3001}
    assert session.value(
        "select reltuples > 2500 from pg_class where oid = 'pgflow.step_tasks'::regclass"
    )


# Memory


def test_many_tasks_take_no_more_memory_than_few(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.map
        def each(element, ctx: Context):
            if element % 1000:
                return element
            ctx.log.info("measured")
            with open("/proc/self/statm") as file:
                return {"kilobytes": 4 * (int((f := file.read().split())[1]) - int(f[2]))}
    """)
    session.start("f", list(range(12_000)))
    assert counts(session.work("f", mode="drain", batch_size=100)) == {"completed": 12_000}
    kilobytes = [
        number
        for (number,) in session.rows(
            "select (output ->> 'kilobytes')::int from pgflow.step_tasks "
            "where task_index %% 1000 = 0 order by task_index"
        )
    ]
    assert kilobytes[-1] - kilobytes[2] < 4_000, kilobytes
