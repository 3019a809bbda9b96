"""Queues, flows, workers and code that are changed under a worker."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts
from tests.faults.conftest import STEPS, go_on, outputs

Background = Callable[..., "Future[Any]"]


# Queues


def test_a_queue_dropped_while_tasks_wait(session: Session) -> None:
    """PW004 says to deploy again; that makes the queue and sends the lost messages again."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.start("f", "two")
    assert counts(session.work("f", batch_size=1)) == {"completed": 1}
    session.run("select pgmq.drop_queue('f')")
    with pytest.raises(psycopg.Error, match='the queue of flow "f" does not exist') as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW004"
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 2"])]
    assert session.deploy(STEPS) == [("f", "verified", [])]
    session.start("f", "three")
    assert counts(session.work("f", mode="drain")) == {"completed": 5}
    assert outputs(session) == ["one", "two", "three"]


def test_a_queue_dropped_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The call ends with PostgreSQL's error, the next one with PW004; deploying again mends it."""
    other.run("select pgmq.drop_queue('f')")
    go_on(other)
    with pytest.raises(psycopg.errors.UndefinedTable, match=r'"pgmq\.q_f" does not exist'):
        waiting.result()
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW004"
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 2"])]
    assert counts(session.work("f", mode="drain")) == {"rescued": 1, "completed": 4}
    assert outputs(session) == ["wait", "behind"]


@pytest.mark.parametrize("kind", ["step", "map"])
def test_a_queue_that_counts_from_one_again(session: Session, kind: str) -> None:
    """Old tasks that share their messages' numbers with new ones get their own inputs."""
    parameter = {"step": "flow_input", "map": "element"}[kind]
    session.deploy(f"""
        flow = Flow("f")

        @flow.{kind}
        def step({parameter}): return {parameter}
    """)
    for text in ("old one", "old two"):
        session.start("f", [text])
    session.run("select pgmq.drop_queue('f'), pgmq.create('f')")
    for text in ("new one", "new two"):
        session.start("f", [text])
    assert counts(session.work("f", mode="drain")) == {"completed": 4}
    for given, output in session.rows("select input, output -> 'step' from pgflow.runs"):
        assert output == given


def test_a_queue_purged_while_tasks_wait(session: Session) -> None:
    """The calls find nothing to do, and say nothing; deploying again sends the messages again."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.run("select pgmq.purge_queue('f')")
    assert session.work("f", mode="drain")["notes"] == []
    assert outputs(session) == [None]
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["one"]


def test_a_queue_purged_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """Nothing: what a call has read it finishes, and a completed step sends new messages."""
    other.run("select pgmq.purge_queue('f')")
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}
    assert outputs(session) == ["wait", "behind"]


def test_a_retry_whose_message_was_purged(session: Session) -> None:
    """It waits for ever, until the module is deployed again."""
    source = """
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(ctx: Context):
            if ctx.attempt == 1:
                raise ValueError("the first time")
    """
    session.deploy(source)
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    session.run("select pgmq.purge_queue('f')")
    assert session.deploy(source) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f")) == {"completed": 1}


def test_a_task_without_a_message(session: Session) -> None:
    """Deploying again sends its message again, and leaves the others' alone."""
    session.deploy(STEPS)
    session.start("f", "one")
    session.start("f", "two")
    session.run("delete from pgmq.q_f where msg_id = 1")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == [None, "two"]
    assert session.deploy(STEPS) == [("f", "verified", ["messages sent again: 1"])]
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["one", "two"]


NO_TASKS = (
    '{"run_id": "none", "step_slug": "first", "task_index": "none"}',
    '{"run_id": null, "step_slug": "first", "task_index": 99999999999}',
    '{"step_slug": "first", "run_id": "00000000-0000-0000-0000-000000000001"}',
)
NO_STEPS = ('{"hello": "world"}', '"text"', "null", "[]", '{"step_slug": null}')


@pytest.mark.parametrize("messages", [NO_TASKS, NO_STEPS], ids=["no task", "no step"])
def test_messages_that_are_not_pgflows(session: Session, messages: tuple[str, ...]) -> None:
    """They are archived, which a note says, and the tasks behind them run."""
    session.deploy(STEPS)
    # Among deaths, which are looked up for every message.
    session.run("""
        insert into pgflow_worker.attempts
            (flow_slug, run_id, step_slug, task_index, attempt, outcome, worker_id)
        select 'f', gen_random_uuid(), 'first', n, 1, 'died', gen_random_uuid()
        from generate_series(1, 10) as n
    """)
    for message in messages:
        session.run("select pgmq.send('f', %s::jsonb)", message)
    session.start("f", "behind")
    report = session.work("f", mode="drain")
    assert outputs(session) == ["behind"]
    assert report["notes"] == ["messages whose task was over or gone were archived"]
    assert session.value("select count(*) from pgmq.q_f") == 0


# What pgflow knows


def test_a_flow_deleted_while_a_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The result is discarded, the next call says PW003 while there is anything to do."""
    other.run("""
        delete from pgflow.step_tasks; delete from pgflow.step_states; delete from pgflow.runs;
        delete from pgflow.deps; delete from pgflow.steps; delete from pgflow.flows;
    """)
    go_on(other)
    assert counts(waiting.result()) == {"discarded": 1}
    session.run("select pgmq.send('f', '{}')")
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW003"
    [[_, status, _]] = session.deploy(STEPS)
    assert status == "compiled"
    session.start("f", "anew")
    session.work("f", mode="drain")
    assert outputs(session) == ["anew"]


def test_a_workers_row_deleted_while_its_call_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The result is discarded, because the claim is gone; the task is taken back and run again."""
    other.run("delete from pgflow.workers")
    go_on(other)
    report = waiting.result()
    assert counts(report) == {"discarded": 1, "completed": 2}
    session.run("""update pgflow.step_tasks
        set queued_at = queued_at - interval '1 hour', started_at = started_at - interval '1 hour'
        where status = 'started'""")
    session.run("update pgmq.q_f set vt = now()")
    session.work("f", mode="drain")
    assert outputs(session) == ["wait", "behind"]


# Code


def test_new_code_while_two_workers_run(
    session: Session,
    other: Session,
    third: Session,
    connect: Callable[..., Connection],
    background: Background,
) -> None:
    """Both calls end after the task they are at and say so; the next ones run the new code."""
    session.deploy(STEPS)
    session.run("update pgflow_worker.flows set workers = 2")
    for _ in range(6):
        session.start("f", "wait")
    other.run("select pg_advisory_lock(1)")
    calls = [background(Session(connect()).work, "f", mode="wait", batch_size=1) for _ in range(2)]
    third.until(WAITING, 2)
    assert third.deploy(STEPS.replace("return first", 'return [first, "new"]')) == [
        ("f", "verified", [])
    ]
    other.run("select pg_advisory_unlock(1)")
    note = "new code was deployed: the call ended for the next one to run it"
    assert [call.result()["notes"] for call in calls] == [[note], [note]]
    assert "new" not in str(outputs(session))
    session.work("f", mode="drain")
    assert outputs(session) == [["wait", "new"]] * 6


def test_two_workers_that_deploy(
    session: Session, connect: Callable[..., Connection], background: Background
) -> None:
    """A handler that deploys its own module waits for the other one; nothing is lost."""
    source = """
        flow = Flow("f", max_attempts=3, base_delay=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            [row] = tx.execute("select source from pgflow_worker.modules where current")
            tx.execute(
                "select pgflow_worker.deploy('flows_of_test', $1)",
                [row["source"] + f"# {flow_input}\\n"],
            )
    """
    session.deploy(source)
    session.run("update pgflow_worker.flows set workers = 2")
    for number in range(6):
        session.start("f", number)
    workers = [Session(connect()) for _ in range(2)]

    def work_until_nothing_is_left(worker: Session) -> None:
        while worker.value("select count(*) > 0 from pgmq.q_f where vt <= clock_timestamp()"):
            worker.work("f", mode="drain")

    for call in [background(work_until_nothing_is_left, worker) for worker in workers]:
        call.result()
    assert session.rows("select distinct status, attempts_count from pgflow.step_tasks") == [
        ("completed", 1)
    ]
    [(versions, newest)] = session.rows(
        "select count(*), max(source) filter (where current) from pgflow_worker.modules"
    )
    # Each has read what the other one has not yet committed, so that not every line must be there.
    assert versions == 7
    assert "# " in newest


def test_a_step_renamed_while_a_call_runs(
    session: Session, other: Session, third: Session, waiting: "Future[Any]"
) -> None:
    """PW003 refuses the new code with the ways out; the call and the run go on with the old."""
    with pytest.raises(psycopg.Error) as caught:
        third.deploy(STEPS.replace("def second", "def renamed"))
    assert caught.value.sqlstate == "PW003"
    assert '@flow.step("old_name")' in (caught.value.diag.message_hint or "")
    renamed = STEPS.replace("@flow.step\n    def second", '@flow.step("second")\n    def renamed')
    assert renamed != STEPS
    assert third.deploy(renamed) == [("f", "verified", [])]
    go_on(other)
    assert counts(waiting.result()) == {"completed": 1}
    assert counts(session.work("f", mode="drain")) == {"completed": 3}
    assert outputs(session) == ["wait", "behind"]
