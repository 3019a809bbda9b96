"""One task: the transactions around its handler, and the order of locks in each."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import pytest

from pgflow_worker import Context, DatabaseError, Fail, Flow, Transaction
from pgflow_worker.errors import QueryCanceled
from pgflow_worker.flow import Handler
from pgflow_worker.pgflow import Claim, Pgflow, Task
from pgflow_worker.registry import Registry
from pgflow_worker.runner import TaskRunner
from tests.unit.fakes import Answer, FakeDatabase

RUN_ID = "12345678-1234-5678-1234-567812345678"
CLAIM = Claim(RUN_ID, "only", 0, "worker", 1, 1_700_000_000_000_000, 42, 3, 60)
TASK = Task(CLAIM, '{"run": {"url": "http://x"}}')

# Short names for what the worker says to pgflow; the first that fits an event is its name.
NAMES = {
    "from pgflow.runs where run_id = $1 for update": "lock run",
    "select task.message_id from pgflow.step_tasks": "lock claim",
    "pgflow.complete_task": "complete",
    "pgflow.fail_task": "fail",
    "update pgflow.step_tasks set attempts_count": "set attempts",
    "insert into pgflow_worker.attempts": "record",
    "set constraints all immediate": "check constraints",
}
WELL: dict[str, Answer] = {
    "from pgflow.runs where run_id = $1 for update": [{"status": "started"}],
    "select task.message_id from pgflow.step_tasks": [{"message_id": 42}],
    "pgflow.complete_task": [{"status": "completed"}],
    "pgflow.fail_task": [{"status": "queued"}],
}
RECORDED = "insert into pgflow_worker.attempts"


def run(
    handler: Handler, answers: Mapping[str, Answer] | None = None, task: Task = TASK
) -> tuple[str, FakeDatabase]:
    database = FakeDatabase(WELL | dict(answers or {}))
    return run_on(database, handler, task), database


def run_on(database: FakeDatabase, handler: Handler, task: Task = TASK) -> str:
    flow = Flow("f")
    flow.step("only")(handler)
    runner = TaskRunner(database, flow, Pgflow(database, "f"), Registry(database))
    return runner.run(task)


def told(database: FakeDatabase) -> list[str]:
    """What was done, in short names."""
    return [
        next((name for text, name in NAMES.items() if text in event), event)
        for event in database.events
    ]


def recorded(database: FakeDatabase) -> list[tuple[object, object]]:
    """Outcome and error of the attempts that were stored."""
    return [(args[6], args[8]) for args in database.ran(RECORDED)]


def once(error: BaseException, rows: list[dict[str, Any]]) -> Callable[..., list[dict[str, Any]]]:
    """Raises the error at its first call, then returns the rows."""
    errors = [error]

    def answer(*args: object) -> list[dict[str, Any]]:
        if errors:
            raise errors.pop()
        return rows

    return answer


def plain(flow_input: Any) -> Any:
    return flow_input


def failing(flow_input: Any) -> NoReturn:
    raise ValueError("broken")


def saving(flow_input: Any, tx: Transaction) -> Any:
    tx.execute("insert into t default values")
    return flow_input


def failing_with_tx(tx: Transaction) -> NoReturn:
    tx.execute("insert into t default values")
    raise ValueError("broken")


STORED = ["[begin]", "lock run", "lock claim"]


# Without tx


def test_a_task_is_completed_after_its_handler() -> None:
    outcome, database = run(plain)
    assert outcome == "completed"
    assert told(database) == [*STORED, "complete", "record", "[commit]"]
    assert database.ran("complete_task") == [(RUN_ID, "only", 0, '{"url":"http://x"}')]
    assert recorded(database) == [("completed", None)]


def test_the_claim_is_checked_whole() -> None:
    _, database = run(plain)
    assert database.ran("select task.message_id") == [
        (RUN_ID, "only", 0, "worker", 1, 1_700_000_000_000_000)
    ]


def test_a_failed_attempt_is_reported_with_its_traceback() -> None:
    outcome, database = run(failing)
    assert outcome == "retried"
    assert told(database) == [*STORED, "fail", "record", "[commit]"]
    [(_, _, _, error)] = database.ran("fail_task")
    assert str(error).startswith("ValueError: broken (test_runner.py:")
    [args] = database.ran(RECORDED)
    assert "Traceback (most recent call last)" in str(args[9])


def test_the_last_attempt_is_failed_for_good() -> None:
    outcome, _ = run(failing, {"pgflow.fail_task": [{"status": "failed"}]})
    assert outcome == "failed"


def test_fail_takes_the_attempts_that_are_left() -> None:
    def handler() -> None:
        raise Fail("never")

    outcome, database = run(handler, {"pgflow.fail_task": [{"status": "failed"}]})
    assert outcome == "failed"
    assert told(database) == [
        *STORED,
        "set attempts",
        "fail",
        "set attempts",
        "record",
        "[commit]",
    ]
    assert [args[3] for args in database.ran("set attempts_count")] == [3, 1]


def test_a_lost_claim_is_discarded() -> None:
    outcome, database = run(plain, {"select task.message_id from pgflow.step_tasks": []})
    assert outcome == "discarded"
    assert told(database) == [*STORED, "record", "[commit]"]
    assert recorded(database) == [("discarded", "another worker had taken the task")]


@pytest.mark.parametrize("status", ["failed", "completed"])
def test_a_run_that_has_ended_gets_no_completion(status: str) -> None:
    outcome, database = run(
        plain, {"from pgflow.runs where run_id = $1 for update": [{"status": status}]}
    )
    assert outcome == "discarded"
    assert "complete" not in told(database)
    assert recorded(database) == [
        ("discarded", f"the run had ended ({status}) before the handler did")
    ]


@pytest.mark.parametrize("rows", [[], [{"status": "failed"}], [{"status": "started"}]])
def test_a_completion_that_pgflow_refuses_silently_is_a_failed_attempt(
    rows: list[dict[str, str]],
) -> None:
    outcome, database = run(plain, {"pgflow.complete_task": rows})
    assert outcome == "retried"
    assert told(database) == [
        *STORED,
        "complete",
        "[rollback]",
        *STORED,
        "fail",
        "record",
        "[commit]",
    ]
    assert recorded(database) == [("failed", 'result of step "only": pgflow refused it')]


def test_a_result_that_postgresql_refuses_is_a_failed_attempt() -> None:
    refusal = DatabaseError("string too long to represent as jsonb string", "54000")
    outcome, database = run(plain, {"pgflow.complete_task": refusal})
    assert outcome == "retried"
    assert recorded(database) == [
        ("failed", 'result of step "only": string too long to represent as jsonb string')
    ]


def test_a_deadlock_stores_again_without_running_the_handler_again() -> None:
    calls: list[int] = []

    def handler() -> int:
        calls.append(1)
        return len(calls)

    deadlock = DatabaseError("deadlock detected", "40P01")
    outcome, database = run(
        handler, {"pgflow.complete_task": once(deadlock, [{"status": "completed"}])}
    )
    assert (outcome, calls) == ("completed", [1])
    assert told(database).count("[rollback]") == 1


@pytest.mark.parametrize("sqlstate", ["53100", "55P03", "57P03", "XX000", "42501"])
def test_trouble_of_the_servers_ends_the_call(sqlstate: str) -> None:
    with pytest.raises(DatabaseError, match="trouble"):
        run(plain, {"pgflow.complete_task": DatabaseError("trouble", sqlstate)})


@pytest.mark.parametrize("sqlstate", ["22P02", "23514", "54000", "P0001"])
def test_a_completion_that_fails_is_the_tasks_failure(sqlstate: str) -> None:
    outcome, database = run(plain, {"pgflow.complete_task": DatabaseError("no", sqlstate)})
    assert outcome == "retried"
    assert recorded(database) == [("failed", 'result of step "only": no')]


def test_a_cancel_fails_the_attempt_and_ends_the_call() -> None:
    def handler() -> None:
        raise QueryCanceled("canceling statement due to user request")

    database = FakeDatabase(WELL)
    with pytest.raises(QueryCanceled):
        run_on(database, handler)
    assert told(database) == [*STORED, "fail", "record", "[commit]"]
    assert recorded(database) == [("failed", "canceled: canceling statement due to user request")]


def test_a_cancel_that_comes_late_does_not_lose_the_result() -> None:
    cancel = once(QueryCanceled("late"), [{"status": "started"}])
    database = FakeDatabase(WELL | {"from pgflow.runs where run_id = $1 for update": cancel})
    with pytest.raises(QueryCanceled):
        run_on(database, plain)
    assert recorded(database) == [("completed", None)]


def test_an_input_that_cannot_be_read_is_the_tasks_failure() -> None:
    outcome, database = run(plain, task=Task(CLAIM, '{"run": ' + "1" * 5000 + "}"))
    assert outcome == "retried"
    [(kind, error)] = recorded(database)
    assert kind == "failed"
    assert str(error).startswith("the input cannot be read as JSON")


def test_a_handler_is_told_about_its_task_and_its_log_is_kept() -> None:
    def handler(ctx: Context) -> list[object]:
        ctx.log.info("hello \0")
        return [str(ctx.run_id), ctx.flow_slug, ctx.step_slug, ctx.attempt, ctx.max_attempts]

    _, database = run(handler)
    [args] = database.ran("complete_task")
    assert json.loads(str(args[3])) == [RUN_ID, "f", "only", 1, 3]
    [args] = database.ran(RECORDED)
    assert str(args[10]).endswith("INFO hello \\0")


def test_a_map_tasks_run_input_comes_beside_its_element() -> None:
    flow = Flow("f")

    @flow.map("only")
    def each(element: Any, flow_input: Any) -> list[Any]:
        return [element, flow_input]

    database = FakeDatabase(WELL)
    runner = TaskRunner(database, flow, Pgflow(database, "f"), Registry(database))
    assert runner.run(Task(CLAIM, '"element"', '["element"]')) == "completed"
    [args] = database.ran("complete_task")
    assert args[3] == '["element",["element"]]'


# With tx


def test_a_handlers_sql_and_its_completion_are_one_transaction() -> None:
    outcome, database = run(saving)
    assert outcome == "completed"
    assert told(database) == [
        "[begin]",
        "[savepoint]",
        "[caller's settings]",
        "check constraints",
        "[our settings]",
        "lock run",
        "lock claim",
        "complete",
        "record",
        "[release]",
        "[commit]",
    ]
    assert database.queries == [("insert into t default values", [])]


ROLLED_BACK = ["[rollback to savepoint]", "[rollback]"]


def test_a_failed_handlers_sql_is_rolled_back_before_the_failure_is_stored() -> None:
    outcome, database = run(failing_with_tx)
    assert outcome == "retried"
    events = told(database)
    start = events.index("[rollback to savepoint]")
    assert events[start:] == [*ROLLED_BACK, *STORED, "fail", "record", "[commit]"]
    assert "complete" not in events


def test_a_lost_claim_rolls_the_handlers_sql_back() -> None:
    outcome, database = run(saving, {"select task.message_id from pgflow.step_tasks": []})
    assert outcome == "discarded"
    events = told(database)
    assert "[release]" not in events
    start = events.index("[rollback to savepoint]")
    assert events[start:] == [*ROLLED_BACK, *STORED, "record", "[commit]"]


def test_a_deferred_constraint_is_the_handlers_failure() -> None:
    violation = DatabaseError("violates foreign key constraint", "23503")
    outcome, database = run(saving, {"set constraints": violation})
    assert outcome == "retried"
    [(kind, error)] = recorded(database)
    assert kind == "failed"
    assert str(error).startswith("DatabaseError: violates foreign key constraint")
    assert "complete" not in told(database)


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_after_a_conflict_the_handler_runs_again(sqlstate: str) -> None:
    calls: list[int] = []

    def handler(tx: Transaction) -> int:
        calls.append(1)
        if len(calls) < 3:
            raise DatabaseError("conflict", sqlstate)
        return len(calls)

    outcome, database = run(handler)
    assert (outcome, len(calls)) == ("completed", 3)
    assert recorded(database) == [("completed", None)]


def test_a_conflict_that_stays_is_a_failed_attempt() -> None:
    def handler(tx: Transaction) -> None:
        raise DatabaseError("conflict", "40P01")

    outcome, database = run(handler)
    assert outcome == "retried"
    [(_, error)] = recorded(database)
    assert str(error).startswith("DatabaseError: conflict")


def test_tx_is_closed_when_its_handler_has_returned() -> None:
    kept: list[Transaction] = []

    def handler(tx: Transaction) -> None:
        kept.append(tx)

    run(handler)
    with pytest.raises(RuntimeError, match="tx was used after its handler had returned"):
        kept[0].execute("select 1")


def test_a_cancel_in_a_handlers_sql_fails_the_attempt_and_ends_the_call() -> None:
    def handler(tx: Transaction) -> None:
        raise QueryCanceled("canceling statement")

    database = FakeDatabase(WELL)
    with pytest.raises(QueryCanceled):
        run_on(database, handler)
    assert recorded(database) == [("failed", "canceled: canceling statement")]
    assert told(database)[-1] == "[commit]"
