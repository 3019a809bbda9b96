"""run_flow: a flow in plain pytest, the way pgflow would run it."""

import asyncio
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pgflow_worker import Context, DatabaseError, Fail, Flow, Retry, Transaction
from pgflow_worker.codec import NotJson
from pgflow_worker.errors import FlowError
from pgflow_worker.testing import Executed, RecordingTransaction, run_flow


def test_the_example_of_its_docstring() -> None:
    flow = Flow("greet")

    @flow.step
    def hello(flow_input: Any) -> str:
        return f"Hello, {flow_input['name']}"

    run = run_flow(flow, {"name": "Ada"})
    assert run.output == {"hello": "Hello, Ada"}
    assert (run.flow_slug, run.status, run.error, run.traceback) == (
        "greet",
        "completed",
        None,
        None,
    )


def test_outputs_go_to_the_steps_that_name_them_and_leaves_are_the_output() -> None:
    flow = Flow("f")

    @flow.step("one")
    def first() -> int:
        return 1

    @flow.step
    def second(first: int) -> int:
        return first + 1

    @flow.step
    def left(first: int, second: int) -> list[int]:
        return [first, second]

    @flow.step(after=[second])
    def right(flow_input: str) -> str:
        return flow_input

    run = run_flow(flow, "x")
    assert run.outputs == {"one": 1, "second": 2, "left": [1, 2], "right": "x"}
    assert run.output == {"left": [1, 2], "right": "x"}
    assert run.attempts == {"one": 1, "second": 1, "left": 1, "right": 1}


def test_maps() -> None:
    flow = Flow("f")

    @flow.map
    def double(number: int) -> int:
        return 2 * number

    @flow.map(over=double)
    def told(number: int, flow_input: list[int], ctx: Context) -> str:
        return f"{ctx.task_index}: {number} of {flow_input}"

    @flow.step
    def total(double: list[int], told: list[str]) -> int:
        return sum(double) + len(told)

    run = run_flow(flow, [1, 2])
    assert run.outputs["double"] == [2, 4]
    assert run.outputs["told"] == ["0: 2 of [1, 2]", "1: 4 of [1, 2]"]
    assert run.output == {"total": 8}
    assert run.attempts == {"double": 2, "told": 2, "total": 1}


def test_a_map_over_nothing() -> None:
    flow = Flow("f")
    flow.map("each")(lambda element: element)
    run = run_flow(flow, [])
    assert (run.status, run.output, run.attempts) == ("completed", {"each": []}, {"each": 0})


def test_a_map_over_a_runs_input_that_is_no_list_is_the_callers_mistake() -> None:
    flow = Flow("f")
    flow.map("each")(lambda element: element)
    with pytest.raises(TypeError, match="maps the run's input, which must be a list"):
        run_flow(flow, {"a": 1})


def test_async_handlers() -> None:
    flow = Flow("f")

    @flow.step
    async def hello(flow_input: str) -> str:
        return f"Hello, {flow_input}"

    assert run_flow(flow, "Ada").output == {"hello": "Hello, Ada"}


def test_async_and_thread_handlers_run_where_they_would_in_the_server() -> None:
    flow = Flow("f")

    def where() -> list[object]:
        return [threading.current_thread().name, blocked_signals() >= {signal.SIGINT}]

    @flow.step
    def main() -> object:
        return where()

    @flow.step(thread=True)
    def thread(flow_input: Any, main: Any, ctx: Context) -> object:
        return where()

    @flow.map
    async def loop(element: int) -> object:
        return [*where(), id(asyncio.get_running_loop())]

    run = run_flow(flow, [1, 2])
    assert run.status == "completed"
    assert run.outputs["main"] == [threading.current_thread().name, False]
    assert run.outputs["thread"] == ["pgflow_worker_0", True]
    first, second = run.outputs["loop"]
    assert first == second
    assert first[:2] == ["pgflow_worker event loop", True]


def blocked_signals() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def test_what_a_run_needed_ends_with_it() -> None:
    flow = Flow("f", max_attempts=1)
    left: list[asyncio.Task[None]] = []

    @flow.step
    async def leaving() -> None:
        left.append(asyncio.create_task(asyncio.sleep(60)))

    @flow.step(thread=True)
    def failing(leaving: None) -> None:
        raise ValueError

    assert run_flow(flow, None).status == "failed"
    assert [task.cancelled() for task in left] == [True]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("pgflow_worker")]


@pytest.mark.parametrize("error", [ValueError, Fail, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "thread"])
def test_a_concurrent_handlers_error_is_a_failed_attempt(
    error: type[BaseException], is_async: bool
) -> None:
    flow = Flow("f", max_attempts=2)

    async def on_loop() -> None:
        raise error

    def in_thread() -> None:
        raise error

    flow.step("only", thread=not is_async)(on_loop if is_async else in_thread)
    run = run_flow(flow, None)
    assert (run.status, run.attempts) == ("failed", {"only": 1 if error is Fail else 2})
    assert run.error is not None
    assert run.error.startswith(f"{error.__name__} (test_testing.py:")


def test_async_and_thread_handlers_can_be_replaced_by_others() -> None:
    flow = Flow("f")

    @flow.step
    async def loop() -> None:
        raise AssertionError

    @flow.step(thread=True)
    def thread() -> None:
        raise AssertionError

    async def one() -> int:
        return 1

    run = run_flow(flow, None, handlers={"loop": lambda: 1, "thread": one})
    assert run.output == {"loop": 1, "thread": 1}
    assert run_flow(flow, None, handlers={"loop": one, "thread": lambda: 1}).output == run.output


# Attempts


def flaky_flow(failures: int, **options: int) -> Flow:
    """A flow whose only step fails so many times."""
    flow = Flow("flaky", max_attempts=options.pop("flow_max_attempts", None))
    calls: list[int] = []

    @flow.step(max_attempts=options.get("max_attempts"))
    def fetch(ctx: Context) -> str:
        calls.append(ctx.attempt)
        ctx.log.info("attempt %d of %d", ctx.attempt, ctx.max_attempts)
        if len(calls) <= failures:
            raise ConnectionError(f"attempt {ctx.attempt}")
        return "done"

    return flow


def test_a_failed_attempt_is_followed_by_another() -> None:
    run = run_flow(flaky_flow(2), None)
    assert (run.status, run.output, run.attempts) == ("completed", {"fetch": "done"}, {"fetch": 3})
    assert run.error is not None
    assert run.error.startswith("ConnectionError: attempt 2 (test_testing.py:")
    assert run.traceback is not None
    assert run.traceback.endswith("ConnectionError: attempt 2\n")
    assert [line.rpartition("INFO ")[2] for line in run.log] == [
        "attempt 1 of 3",
        "attempt 2 of 3",
        "attempt 3 of 3",
    ]


@pytest.mark.parametrize(
    ("options", "attempts"),
    [
        ({}, 3),
        ({"flow_max_attempts": 2}, 2),
        ({"max_attempts": 4}, 4),
        ({"flow_max_attempts": 5, "max_attempts": 1}, 1),
    ],
)
def test_the_number_of_attempts_is_the_steps_else_the_flows_else_pgflows(
    options: dict[str, int], attempts: int
) -> None:
    run = run_flow(flaky_flow(99, **options), None)
    assert (run.status, run.output, run.outputs) == ("failed", {}, {})
    assert run.attempts == {"fetch": attempts}
    assert run.error is not None
    assert f"attempt {attempts} " in run.error


def test_fail_ends_the_attempts() -> None:
    flow = Flow("f")

    @flow.step(max_attempts=9)
    def fetch() -> None:
        raise Fail("no such page")

    run = run_flow(flow, None)
    assert (run.status, run.attempts) == ("failed", {"fetch": 1})
    assert run.error is not None
    assert run.error.startswith("no such page (")


def test_nothing_runs_after_a_failed_step() -> None:
    flow = Flow("f")

    @flow.step
    def first() -> int:
        return 1

    @flow.step(max_attempts=1)
    def second(first: int) -> None:
        raise ValueError(first)

    @flow.step
    def third(second: None) -> None:
        raise AssertionError

    run = run_flow(flow, None)
    assert (run.status, run.outputs, run.output) == ("failed", {"first": 1}, {})
    assert run.attempts == {"first": 1, "second": 1, "third": 0}


def test_a_wrong_result_is_a_failed_attempt() -> None:
    flow = Flow("f")
    results: list[object] = [{"not": "a list"}, float("nan"), [1]]
    flow.array("tags")(lambda: results.pop(0))
    run = run_flow(flow, None)
    assert (run.status, run.outputs, run.attempts) == ("completed", {"tags": [1]}, {"tags": 3})


def test_every_attempt_gets_values_of_its_own() -> None:
    flow = Flow("f")

    @flow.step
    def first() -> list[int]:
        return []

    @flow.step
    def second(first: list[int], flow_input: list[int], ctx: Context) -> list[list[int]]:
        first.append(1)
        flow_input.append(1)
        if ctx.attempt == 1:
            raise ValueError
        return [first, flow_input]

    given = [0]
    run = run_flow(flow, given)
    assert run.outputs["second"] == [[1], [0, 1]]
    assert run.outputs["first"] == []
    assert given == [0]


def test_results_pass_through_json() -> None:
    flow = Flow("f")

    @flow.step
    def first() -> tuple[int, int]:
        return (1, 2)

    @flow.step
    def second(first: object) -> str:
        return type(first).__name__

    assert run_flow(flow, None).outputs == {"first": [1, 2], "second": "list"}


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_falsy_results_arrive_as_they_are(value: object) -> None:
    flow = Flow("f")

    @flow.step
    def first() -> object:
        return value

    @flow.step
    def second(first: object) -> list[object]:
        return [first]

    assert run_flow(flow, None).output == {"second": [value]}


# Replaced handlers


def test_a_handler_can_be_replaced_by_its_slug() -> None:
    flow = Flow("f")

    @flow.step("fetchPage")
    def website(flow_input: str) -> str:
        raise AssertionError

    @flow.map(over=website)
    def shout(letter: str) -> str:
        raise AssertionError

    run = run_flow(
        flow,
        "http://x",
        handlers={"fetchPage": lambda flow_input: [flow_input], "shout": str.upper},
    )
    assert run.output == {"shout": ["HTTP://X"]}


def test_a_replacement_of_an_unknown_step_is_a_mistake() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    with pytest.raises(KeyError, match='flow "f" has no step "b"'):
        run_flow(flow, None, handlers={"b": lambda: 1})


def test_a_wrong_flow_is_an_error() -> None:
    with pytest.raises(FlowError, match='flow "f" has no steps'):
        run_flow(Flow("f"), None)


def test_an_input_that_is_no_json_is_an_error() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    with pytest.raises(NotJson, match="a is NaN"):
        run_flow(flow, {"a": float("nan")})


# Transactions


def saving_flow() -> Flow:
    flow = Flow("f")

    @flow.step(max_attempts=2)
    def save(flow_input: Any, tx: Transaction, ctx: Context) -> Any:
        rows = tx.execute("insert into t values ($1) returning id", [flow_input])
        if ctx.attempt == 1 and flow_input == "flaky":
            raise ValueError
        return rows

    return flow


def test_statements_are_recorded_and_answered_with_no_rows() -> None:
    run = run_flow(saving_flow(), "x")
    assert run.executed == [Executed("insert into t values ($1) returning id", ("x",))]
    assert run.output == {"save": []}


def test_statements_of_failed_attempts_are_rolled_back() -> None:
    run = run_flow(saving_flow(), "flaky")
    assert run.attempts == {"save": 2}
    assert len(run.executed) == 1


def test_answers_are_rows_or_errors() -> None:
    asked: list[tuple[str, Sequence[object]]] = []

    def answers(sql: str, args: Sequence[object]) -> Sequence[Mapping[str, Any]] | Exception:
        asked.append((sql, args))
        if len(asked) == 1:
            return DatabaseError("duplicate key", "23505")
        return [{"id": 7}]

    run = run_flow(saving_flow(), "x", answers=answers)
    assert asked == [("insert into t values ($1) returning id", ["x"])] * 2
    assert run.output == {"save": [{"id": 7}]}
    assert run.error is not None
    assert run.error.startswith("DatabaseError: duplicate key (")


def test_a_step_without_tx_gets_none() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    assert run_flow(flow, None, answers=lambda *_: []).executed == []


def test_a_recording_transaction_alone() -> None:
    tx = RecordingTransaction(lambda *_: [{"n": n} for n in range(3)])
    rows = tx.execute("select 1")
    rows[0]["n"] = 99
    assert list(tx.stream("select 2", [1], size=2)) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert tx.executed == [Executed("select 1", ()), Executed("select 2", (1,))]
    with pytest.raises(ValueError, match="size must be at least 1"):
        list(tx.stream("select 3", size=0))


def test_an_async_handler_that_cancels_itself_has_failed() -> None:
    flow = Flow("f", max_attempts=1)

    @flow.step
    async def step() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    run = run_flow(flow, {})
    assert (run.status, run.error) == ("failed", "the handler cancelled itself")


def test_a_handler_that_chooses_when_it_is_tried_again_is_tried_again_at_once() -> None:
    flow = Flow("f", max_attempts=3)

    @flow.step
    def picky(ctx: Context) -> int:
        if ctx.attempt < 3:
            raise Retry("busy", after=3600)
        return ctx.attempt

    run = run_flow(flow, None)
    assert (run.status, run.output, run.attempts) == ("completed", {"picky": 3}, {"picky": 3})
    assert run.error is not None
    assert run.error.startswith("busy (test_testing.py:")
