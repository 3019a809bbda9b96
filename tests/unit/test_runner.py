"""What a task's handler gets, and what is kept of its attempt."""

import asyncio
import json
import time
from typing import Any, NoReturn

import pytest

from pgflow_worker import Context, Flow, Transaction
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.errors import QueryCanceled
from pgflow_worker.flow import Handler
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.process import Process
from pgflow_worker.runner import Result, Runner
from pgflow_worker.transaction import DatabaseTransaction
from tests.unit.fakes import FakeDatabase, process_with

RUN_ID = "12345678-1234-5678-1234-567812345678"
CLAIM = Claim(RUN_ID, "only", 7, "worker", 2, 1_700_000_000_000_000, 42, 3, 60)
TASK = Task(CLAIM, '{"run": {"url": "http://x"}}')


def flow_of(handler: Handler, **options: Any) -> Flow:
    flow = Flow("f")
    flow.step("only", **options)(handler)
    return flow


def run(handler: Handler, task: Task = TASK, database: FakeDatabase | None = None) -> Result:
    transaction = None if database is None else DatabaseTransaction(database)
    with process_with() as process:
        return Runner(flow_of(handler), process, time.monotonic).run(task, transaction)


def run_async(handler: Handler, task: Task = TASK) -> Result:
    with process_with() as process:
        return asyncio.run(Runner(flow_of(handler), process, time.monotonic).run_async(task))


def output(result: Result) -> Any:
    assert isinstance(result.outcome, Success)
    return json.loads(result.outcome.output)


def test_a_result_belongs_to_its_claim() -> None:
    result = run(lambda flow_input: flow_input)
    assert result.claim is CLAIM
    assert output(result) == {"url": "http://x"}
    assert result.log == ""


def test_an_async_handlers_result_belongs_to_its_claim() -> None:
    async def handler(flow_input: Any) -> Any:
        await asyncio.sleep(0)
        return flow_input

    result = run_async(handler)
    assert result.claim is CLAIM
    assert output(result) == {"url": "http://x"}


def test_a_failure_is_a_result() -> None:
    def handler() -> NoReturn:
        raise ValueError("broken")

    result = run(handler)
    assert isinstance(result.outcome, Failure)
    assert result.outcome.error.startswith("ValueError: broken (test_runner.py:")
    assert "Traceback (most recent call last)" in result.outcome.traceback


def test_a_handler_is_told_about_its_task() -> None:
    def handler(ctx: Context) -> list[object]:
        place = [ctx.run_id, ctx.flow_slug, ctx.step_slug, ctx.task_index]
        return [*place, ctx.attempt, ctx.max_attempts, ctx.timeout]

    assert output(run(handler)) == [RUN_ID, "f", "only", 7, 2, 3, 60]


def test_a_dependencys_result_comes_beside_the_runs_input(process: Process) -> None:
    flow = Flow("f")

    @flow.step
    def first() -> None: ...

    @flow.step("only")
    def second(first: Any, flow_input: Any) -> Any:
        return [first, flow_input]

    task = Task(CLAIM, '{"run": "input", "first": "result"}')
    assert output(Runner(flow, process, time.monotonic).run(task)) == ["result", "input"]


def test_a_map_tasks_run_input_comes_beside_its_element(process: Process) -> None:
    flow = Flow("f")

    @flow.map("only")
    def each(element: Any, flow_input: Any) -> list[Any]:
        return [element, flow_input]

    runner = Runner(flow, process, time.monotonic)
    assert output(runner.run(Task(CLAIM, '"element"', '["element"]'))) == ["element", ["element"]]
    assert output(runner.run(Task(CLAIM, '{"run": 1}', "[2]"))) == [{"run": 1}, [2]]


@pytest.mark.parametrize("text", ["1" * 5000, "1e999"])
@pytest.mark.parametrize("task", [Task(CLAIM, '{"run": %s}'), Task(CLAIM, "0", "%s")])
def test_an_input_that_cannot_be_read_is_the_tasks_failure(task: Task, text: str) -> None:
    def handler() -> NoReturn:
        raise AssertionError

    async def async_handler() -> NoReturn:
        raise AssertionError

    run_input = task.run_input and task.run_input.replace("%s", text)
    unreadable = Task(CLAIM, task.input.replace("%s", text), run_input)
    for result in (run(handler, unreadable), run_async(async_handler, unreadable)):
        assert result.claim is CLAIM
        assert isinstance(result.outcome, Failure)
        assert result.outcome.error.startswith("the input cannot be read as JSON")


def test_a_log_is_kept_as_postgresql_can_store_it() -> None:
    def handler(ctx: Context) -> NoReturn:
        ctx.log.info("hello \0")
        raise ValueError

    async def async_handler(ctx: Context) -> NoReturn:
        handler(ctx)

    for result in (run(handler), run_async(async_handler)):
        assert result.log.endswith("INFO hello \\0")


def test_tx_is_the_transaction_it_was_given() -> None:
    def handler(tx: Transaction) -> None:
        tx.execute("select 1")

    database = FakeDatabase()
    run(handler, database=database)
    assert database.queries == [("select 1", [])]


def test_a_cancel_passes_through() -> None:
    def handler() -> NoReturn:
        raise QueryCanceled("canceling statement")

    with pytest.raises(QueryCanceled, match="canceling statement"):
        run(handler)


# Time


def test_how_long_a_handler_took_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def handler() -> None:
        now[0] += 1.5

    async def async_handler() -> None:
        handler()

    assert run(handler).duration_ms == 1500
    assert run_async(async_handler).duration_ms == 1500


def test_concurrent_handlers_have_the_clock_that_can_stand_still(process: Process) -> None:
    def remaining(ctx: Context) -> float:
        now[0] += 10
        return ctx.remaining()

    async def remaining_async(ctx: Context) -> float:
        return remaining(ctx)

    now = [100.0]
    in_thread = Runner(flow_of(remaining, thread=True), process, lambda: now[0])
    on_loop = Runner(flow_of(remaining_async), process, lambda: now[0])
    assert output(in_thread.run_in_thread(TASK)) == 50
    assert output(asyncio.run(on_loop.run_async(TASK))) == 50


def test_a_handler_in_the_main_thread_has_the_time_of_the_world(process: Process) -> None:
    def remaining(ctx: Context) -> float:
        return ctx.remaining()

    def clock() -> NoReturn:
        pytest.fail("this clock is for other threads")

    runner = Runner(flow_of(remaining), process, clock)
    assert 59 < output(runner.run(TASK)) < 60


def test_an_async_handler_has_its_steps_timeout() -> None:
    async def handler() -> None:
        await asyncio.Event().wait()

    task = TASK._replace(claim=CLAIM._replace(timeout=0))
    assert run_async(handler, task).outcome == Failure('step "only" took longer than 0 s')
