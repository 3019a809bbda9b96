"""One attempt: what a handler returned, and how what went wrong is described."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest

from pgflow_worker import attempt
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.context import Context
from pgflow_worker.errors import (
    DatabaseError,
    Fail,
    Interrupted,
    QueryCanceled,
    Retry,
    Snooze,
    TimeIsUp,
)
from pgflow_worker.flow import Flow, Handler, Step

EMPTY: dict[str, str] = {}


def step_of(handler: Handler) -> Step:
    flow = Flow("f")
    flow.step("only")(handler)
    return flow.steps["only"]


def context(timeout: float = 60, clock: Callable[[], float] = time.monotonic) -> Context:
    run_id = "12345678-1234-5678-1234-567812345678"
    return Context(run_id=run_id, flow_slug="f", step_slug="only", timeout=timeout, clock=clock)


def run(handler: Handler, **task_input: object) -> Success | Failure:
    return attempt.run(step_of(handler), task_input, None, context(), None)


def failed(handler: Handler) -> Failure:
    outcome = run(handler)
    assert isinstance(outcome, Failure)
    return outcome


def location(handler: Handler, line: int = 1) -> str:
    """Where a failure of a function of this file is: so many lines after its `def`."""
    code = handler.__code__
    return f"test_attempt.py:{code.co_firstlineno + line}, in {code.co_name}"


def raising(error: BaseException | type[BaseException]) -> Callable[[], NoReturn]:
    def handler() -> NoReturn:
        raise error

    return handler


def raising_async(error: BaseException | type[BaseException]) -> Callable[[], Awaitable[NoReturn]]:
    async def handler() -> NoReturn:
        await asyncio.sleep(0)
        raise error

    return handler


# Results


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}, [0], {"a": None}])
def test_a_result_is_json(value: object) -> None:
    assert run(lambda: value) == Success(json.dumps(value, separators=(",", ":")))


def test_an_async_handler_is_awaited() -> None:
    async def handler() -> str:
        await asyncio.sleep(0)
        return "done"

    assert run(handler) == Success('"done"')


def test_what_a_handler_returns_is_awaited_if_it_can_be() -> None:
    async def inner() -> str:
        return "done"

    assert run(lambda: inner()) == Success('"done"')


def test_every_argument_reaches_the_handler() -> None:
    flow = Flow("f")

    @flow.step
    def first() -> None: ...

    @flow.step
    def second(first: Any, flow_input: Any, ctx: Context) -> list[object]:
        return [first, flow_input, ctx.attempt]

    context = Context(run_id=None, flow_slug="f", step_slug="second", attempt=2)  # type: ignore[arg-type]
    outcome = attempt.run(flow.steps["second"], {"first": 1}, "input", context, None)
    assert outcome == Success('[1,"input",2]')


def test_another_handler_takes_the_place_of_the_steps() -> None:
    step = step_of(raising(ValueError))
    assert attempt.run(step, {}, None, context(), None, lambda: 1) == Success("1")


def test_a_result_that_is_not_json_is_the_tasks_failure() -> None:
    assert run(lambda: {"a": [float("nan")]}) == Failure('result of step "only": $.a[0] is NaN')


@pytest.mark.parametrize("error", [LookupError("lost"), SystemExit("lost"), MemoryError("lost")])
def test_a_result_that_breaks_while_it_is_written_is_the_tasks_failure(
    error: BaseException,
) -> None:
    class Broken(dict[str, int]):
        def items(self) -> NoReturn:
            raise error

    outcome = run(lambda: Broken())
    assert isinstance(outcome, Failure)
    assert "lost" in outcome.error


def test_a_result_whose_key_cannot_be_shown_is_the_tasks_failure() -> None:
    class Key:
        def __repr__(self) -> str:
            raise LookupError("lost")

    assert isinstance(run(lambda: {Key(): 1}), Failure)


def test_a_cancel_while_a_result_is_written_passes_through() -> None:
    class Canceled(dict[str, int]):
        def items(self) -> NoReturn:
            raise QueryCanceled("now")

    with pytest.raises(QueryCanceled):
        run(lambda: Canceled())


def test_a_result_too_deep_for_the_stack_is_the_tasks_failure() -> None:
    value: list[Any] = []
    for _ in range(390):
        value = [value]

    def deeper(levels: int) -> Success | Failure:
        return deeper(levels - 1) if levels else run(lambda: value)

    assert isinstance(deeper(400), Success | Failure)


def test_the_description_of_a_result_is_bounded_and_can_be_stored() -> None:
    class Key:
        def __repr__(self) -> str:
            return "\0\ud800" + "k" * 100_000

    outcome = run(lambda: {Key(): 1})
    assert isinstance(outcome, Failure)
    assert len(outcome.error) < 2 * attempt.MAX_ERROR
    assert "\0" not in outcome.error
    outcome.error.encode()


@pytest.mark.parametrize("value", [None, 0, "abc", {"a": 1}])
def test_an_array_must_return_a_list(value: object) -> None:
    flow = Flow("f")
    flow.array("tags")(lambda: value)
    outcome = attempt.run(flow.steps["tags"], {}, None, context(), None)
    assert outcome == Failure(f'step "tags" returned {type(value).__name__}, not a list')


def test_a_step_that_feeds_a_map_must_return_a_list() -> None:
    flow = Flow("f")

    @flow.step
    def chapters() -> dict[str, int]:
        return {"one": 1}

    @flow.map(over=chapters)
    def translate(chapter: str) -> None: ...

    outcome = attempt.run(flow.steps["chapters"], {}, None, context(), None)
    assert outcome == Failure(
        'step "chapters" returned dict, not a list, and map step "translate" needs a list'
    )


@pytest.mark.parametrize("value", [[], (), [1], (1, 2)])
def test_lists_and_tuples_are_lists(value: object) -> None:
    flow = Flow("f")
    flow.array("tags")(lambda: value)
    outcome = attempt.run(flow.steps["tags"], {}, None, context(), None)
    assert outcome == Success(json.dumps(value, separators=(",", ":")))


# How a failure reads


def test_an_error_names_its_type_its_text_and_its_place() -> None:
    def handler() -> object:
        return EMPTY["url"]

    assert failed(handler).error == f"KeyError: 'url' ({location(handler)})"


def test_an_error_without_a_text_is_its_type() -> None:
    def handler() -> None:
        raise ValueError

    assert failed(handler).error == f"ValueError ({location(handler)})"


def test_the_place_is_the_innermost_line_of_ones_own_code() -> None:
    def helper() -> None:
        json.loads("{")

    def handler() -> None:
        helper()

    failure = failed(handler)
    assert failure.error.startswith("JSONDecodeError: Expecting property name")
    assert failure.error.endswith(f"({location(helper)})")


def test_the_place_of_an_async_handlers_error() -> None:
    async def handler() -> None:
        await asyncio.sleep(0)
        raise ValueError("late")

    assert failed(handler).error == f"ValueError: late ({location(handler, 2)})"


def test_a_call_that_does_not_fit_has_no_place_of_its_own() -> None:
    outcome = attempt.run(step_of(lambda: 1), {}, None, context(), None, lambda x: x)
    assert isinstance(outcome, Failure)
    assert outcome.error.startswith("TypeError: ")
    assert "attempt.py" not in outcome.error
    assert "flow.py" not in outcome.error


def test_a_handler_without_a_module_can_fail() -> None:
    namespace: dict[str, Any] = {}
    exec(compile("def handler(): raise ValueError('here')", "bare.py", "exec"), {}, namespace)
    namespace["handler"].__module__ = None
    assert failed(namespace["handler"]).error == "ValueError: here (bare.py:1, in handler)"


# Fail


def test_fail_is_final_and_is_the_users_own_text() -> None:
    def handler() -> None:
        raise Fail("no such page: HTTP 404")

    assert failed(handler).error == f"no such page: HTTP 404 ({location(handler)})"
    assert failed(handler).final


def test_a_subclass_of_fail_is_final_too() -> None:
    class Gone(Fail):
        pass

    failure = failed(raising(Gone("gone")))
    assert failure.error.startswith("gone (")
    assert failure.final


@pytest.mark.parametrize("error", [Fail, Fail("")])
def test_fail_without_a_reason_says_that_much(error: Fail | type[Fail]) -> None:
    failure = failed(raising(error))
    assert failure.error.startswith("Fail (")
    assert failure.final


def test_other_errors_are_not_final_even_if_fail_caused_them() -> None:
    def handler() -> None:
        try:
            raise Fail("inner")
        except Fail as error:
            raise ValueError("outer") from error

    assert not failed(handler).final


# Retry and Snooze


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
@pytest.mark.parametrize(("kind", "is_snooze"), [(Retry, False), (Snooze, True)])
def test_a_handler_chooses_when_it_is_called_again(
    make: Callable[[BaseException], Handler], kind: type[Retry], is_snooze: bool
) -> None:
    failure = failed(make(kind("the page is not ready", after=1.5)))
    assert failure.error.startswith("the page is not ready (test_attempt.py:")
    assert (failure.after, failure.is_snooze, failure.final) == (1.5, is_snooze, False)
    assert failed(make(kind(after=60))).error.startswith("again after 60 s (")


def test_at_once_is_a_choice_too() -> None:
    assert failed(raising(Retry(after=0))).after == 0


def test_a_wrong_choice_is_an_error_like_others() -> None:
    failure = failed(lambda: Retry(after=-1))
    assert failure.error.startswith(
        "ValueError: after must be a number of seconds from 0 to 315,360,000"
    )
    assert failure.after is None


@pytest.mark.parametrize("error", [ValueError("x"), Fail("x"), MemoryError()])
def test_other_errors_choose_nothing(error: BaseException) -> None:
    failure = failed(raising(error))
    assert (failure.after, failure.is_snooze) == (None, False)
    assert failure.out_of_memory is isinstance(error, MemoryError)


# What a handler may raise


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SystemExit(3), "SystemExit: 3 ("),
        (SystemExit(), "SystemExit ("),
        (KeyboardInterrupt(), "KeyboardInterrupt ("),
        (GeneratorExit(), "GeneratorExit ("),
        (asyncio.CancelledError(), "CancelledError ("),
        (MemoryError(), "MemoryError ("),
        (BaseException("bare"), "BaseException: bare ("),
        (ExceptionGroup("both", [ValueError(1)]), "ExceptionGroup: both (1 sub-exception) ("),
    ],
)
def test_whatever_is_raised_is_the_tasks_failure(
    make: Callable[[BaseException], Handler], error: BaseException, text: str
) -> None:
    failure = failed(make(error))
    assert failure.error.startswith(text)
    assert not failure.final


def test_stop_iteration_is_the_tasks_failure() -> None:
    assert failed(raising(StopIteration())).error.startswith("StopIteration (")
    # Python's own rule for coroutines.
    assert failed(raising_async(StopIteration())).error.startswith("RuntimeError: coroutine raised")


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
@pytest.mark.parametrize("kind", [QueryCanceled, Interrupted])
def test_query_canceled_passes_through(
    make: Callable[[BaseException], Handler], kind: type[QueryCanceled]
) -> None:
    with pytest.raises(kind, match="canceling statement"):
        run(make(kind("canceling statement")))


def test_query_canceled_is_not_caught_by_except_exception() -> None:
    def handler() -> None:
        try:
            raise QueryCanceled("canceling statement")
        except Exception:
            pass

    with pytest.raises(QueryCanceled):
        run(handler)


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
def test_a_database_error_keeps_its_sqlstate(make: Callable[[BaseException], Handler]) -> None:
    failure = failed(make(DatabaseError("duplicate key", "23505", "Key (id)=(1) exists.")))
    assert failure.error.startswith("DatabaseError: duplicate key (")
    assert failure.sqlstate == "23505"


def test_other_errors_have_no_sqlstate() -> None:
    assert failed(raising(ValueError("x"))).sqlstate is None


def test_an_error_without_a_text_of_its_own_is_described_nevertheless() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise LookupError

    class NotTextError(Exception):
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    for error in (BrokenError, NotTextError):
        failure = failed(raising(error()))
        assert failure.error.startswith(f"{error.__name__}: (its text cannot be made) (")
        assert failure.traceback


def test_an_error_whose_text_ends_the_program_does_not_end_the_worker() -> None:
    class ExitsError(Exception):
        def __str__(self) -> str:
            raise SystemExit

    assert failed(raising(ExitsError())).error.startswith("ExitsError: (its text cannot be made) (")


@pytest.mark.parametrize("error", [ValueError, Fail])
def test_a_text_that_postgresql_cannot_store_is_escaped(error: type[Exception]) -> None:
    failure = failed(raising(error("nul \0, surrogate \ud800, letter ä, smile 😀")))
    assert "nul \\0, surrogate \\ud800, letter ä, smile 😀 (" in failure.error
    for text in (failure.error, failure.traceback):
        assert "\0" not in text
        text.encode()
    assert "nul \\0, surrogate \\ud800" in failure.traceback


def test_a_long_text_is_cut_and_its_place_kept() -> None:
    failure = failed(raising(ValueError("x" * 1_000_000)))
    assert failure.error.startswith("ValueError: xxx")
    assert failure.error.endswith(", in handler)")
    assert len(failure.error) < attempt.MAX_ERROR + 100
    assert len(failure.traceback) == attempt.MAX_TRACEBACK


def test_a_recursion_error_is_an_error_like_others() -> None:
    def handler() -> None:
        handler()

    failure = failed(handler)
    assert failure.error == (
        f"RecursionError: maximum recursion depth exceeded ({location(handler)})"
    )
    assert "[Previous line repeated" in failure.traceback
    assert len(failure.traceback) <= attempt.MAX_TRACEBACK


# Tracebacks


def test_a_traceback_shows_the_handler_and_not_the_worker() -> None:
    def helper() -> NoReturn:
        raise ValueError("deep")

    def handler() -> None:
        helper()

    lines = failed(handler).traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith(f"line {handler.__code__.co_firstlineno + 1}, in handler")
    assert lines[2].strip() == "helper()"
    assert 'raise ValueError("deep")' in [line.strip() for line in lines]
    assert lines[-1] == "ValueError: deep"


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
def test_no_frame_of_the_worker_is_in_a_traceback(make: Callable[[BaseException], Handler]) -> None:
    traceback = failed(make(ValueError("x"))).traceback
    assert "in handler" in traceback
    assert str(attempt.__file__) not in traceback
    assert "asyncio" not in traceback.replace("test_", "")


def test_a_chain_of_errors_is_told_whole_and_named_by_its_last() -> None:
    def handler() -> None:
        try:
            EMPTY["url"]
        except KeyError as error:
            raise ValueError("no url given") from error

    failure = failed(handler)
    assert failure.error == f"ValueError: no url given ({location(handler, 4)})"
    assert "KeyError: 'url'" in failure.traceback
    assert "The above exception was the direct cause" in failure.traceback
    assert str(attempt.__file__) not in failure.traceback


def test_notes_are_in_the_traceback() -> None:
    error = ValueError("x")
    error.add_note("while reading page 3")
    assert "while reading page 3" in failed(raising(error)).traceback


def test_the_streams_and_the_interpreter_are_left_alone() -> None:
    before = sys.getrecursionlimit(), sys.stdout, sys.excepthook
    failed(raising(SystemExit("bye")))
    assert (sys.getrecursionlimit(), sys.stdout, sys.excepthook) == before


# Time


def test_a_handler_is_called_by_who_is_to_watch_it() -> None:
    called: list[object] = []

    def call(function: Callable[[], object]) -> object:
        called.append(function())
        return 2

    step = step_of(lambda: 1)
    assert attempt.run(step, {}, None, context(), None, call=call) == Success("2")
    assert called == [1]


@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
def test_a_handler_that_took_too_long_is_told_where_it_was(
    make: Callable[[BaseException], Handler],
) -> None:
    def call(function: Callable[[], object]) -> object:
        try:
            return function()
        except BaseException as error:
            raise TimeIsUp from error

    step = step_of(make(Interrupted("canceling statement")))
    outcome = attempt.run(step, {}, None, context(3), None, call=call)
    assert isinstance(outcome, Failure)
    assert outcome.error == 'step "only" took longer than 3 s'
    assert "in handler" in outcome.traceback
    assert str(attempt.__file__) not in outcome.traceback
    assert not outcome.final


def test_a_handler_that_ended_too_late_by_itself_was_nowhere() -> None:
    def call(_: Callable[[], object]) -> object:
        raise TimeIsUp

    outcome = attempt.run(step_of(lambda: 1), {}, None, context(0.5), None, call=call)
    assert outcome == Failure('step "only" took longer than 0.5 s')


def test_where_a_handler_was_is_bounded() -> None:
    failure = attempt.took_too_long("only", 3, ValueError("x" * 100_000))
    assert len(failure.traceback) == attempt.MAX_TRACEBACK


# On the event loop


def run_async(
    handler: Handler, ctx: Context | None = None, other: Handler | None = None
) -> Success | Failure:
    ctx = ctx or context()
    return asyncio.run(attempt.run_async(step_of(handler), {}, None, ctx, other))


async def endless() -> None:
    await asyncio.Event().wait()


TIMED_OUT = 'step "only" took longer than 3 s'


def expired() -> Context:
    """A context whose three seconds are over."""
    now = [0.0]
    ctx = context(3, lambda: now[0])
    now[0] = 3.0
    return ctx


def test_an_async_handlers_result_on_the_loop() -> None:
    async def handler() -> list[int]:
        await asyncio.sleep(0)
        return [1]

    assert run_async(handler) == Success("[1]")


def test_an_async_handlers_wrong_result_on_the_loop() -> None:
    async def handler() -> float:
        return float("nan")

    assert run_async(handler) == Failure('result of step "only": $ is NaN')


@pytest.mark.parametrize("value", [1, [1]])
def test_another_handler_on_the_loop_need_not_be_async(value: object) -> None:
    assert run_async(endless, other=lambda: value) == Success(json.dumps(value))


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError, Fail, SystemExit, KeyboardInterrupt, asyncio.CancelledError, QueryCanceled),
        Interrupted,
    ],
)
def test_whatever_is_raised_on_the_loop_is_the_tasks_failure(error: type[BaseException]) -> None:
    failure = run_async(raising_async(error("lost")))
    assert isinstance(failure, Failure)
    assert "lost" in failure.traceback
    assert failure.final is (error is Fail)


def test_a_traceback_from_the_loop_shows_the_handler_alone() -> None:
    failure = run_async(raising_async(ValueError("x")))
    assert isinstance(failure, Failure)
    assert failure.error.startswith("ValueError: x (test_attempt.py:")
    assert "in handler" in failure.traceback
    assert str(attempt.__file__) not in failure.traceback


def test_an_async_handler_that_takes_too_long_is_cancelled() -> None:
    ended: list[str] = []

    async def handler() -> None:
        try:
            await endless()
        finally:
            ended.append("cancelled")

    assert run_async(handler, expired()) == Failure(TIMED_OUT)
    assert ended == ["cancelled"]


def test_the_time_of_the_world_counts() -> None:
    failure = run_async(endless, context(0.02))
    assert failure == Failure('step "only" took longer than 0.02 s')


def test_a_handler_that_swallows_the_cancellation_is_timed_out_all_the_same() -> None:
    async def handler() -> str:
        try:
            await endless()
        except asyncio.CancelledError:
            return "done"
        return "never"

    assert run_async(handler, expired()) == Failure(TIMED_OUT)


def test_a_handler_that_turns_the_cancellation_into_an_error_is_timed_out_all_the_same() -> None:
    async def handler() -> None:
        try:
            await endless()
        except asyncio.CancelledError:
            raise ValueError("interrupted") from None

    assert run_async(handler, expired()) == Failure(TIMED_OUT)


def stepping(*told: float) -> Callable[[], float]:
    """A clock that tells these times, the last of them for ever."""
    times = list(told)
    return lambda: times.pop(0) if len(times) > 1 else times[0]


def test_time_in_which_the_clock_stands_still_does_not_count() -> None:
    looks: list[int] = []
    enough = asyncio.Event()

    def still() -> float:
        looks.append(1)
        if len(looks) == 5:
            enough.set()
        return 0.0

    async def handler() -> str:
        await enough.wait()
        return "done"

    # Its timeout is over three times, as the world counts.
    assert run_async(handler, context(0.01, still)) == Success('"done"')


def test_a_clock_that_goes_on_after_standing_still_ends_the_handler() -> None:
    failure = run_async(endless, context(0.01, stepping(0.0, 0.0, 0.0, 0.005, 0.005, 1.0)))
    assert failure == Failure('step "only" took longer than 0.01 s')


def test_a_handler_that_is_in_time_is_watched_no_more() -> None:
    async def handler() -> str:
        return "done"

    async def afterwards() -> Success | Failure:
        now = [0.0]
        outcome = await attempt.run_async(step_of(handler), {}, None, context(0.01, lambda: now[0]))
        now[0] = 1.0
        await asyncio.sleep(0.03)
        return outcome

    assert asyncio.run(afterwards()) == Success('"done"')


def test_a_timeout_ends_one_handler_and_not_those_beside_it() -> None:
    over = expired()

    async def handler() -> str:
        await timed_out.wait()
        return "done"

    async def both() -> tuple[Success | Failure, Success | Failure]:
        slow = asyncio.create_task(attempt.run_async(step_of(endless), {}, None, over))
        slow.add_done_callback(lambda _: timed_out.set())
        return await asyncio.gather(slow, attempt.run_async(step_of(handler), {}, None, context()))

    timed_out = asyncio.Event()
    outcomes = asyncio.run(both())
    assert [type(outcome) for outcome in outcomes] == [Failure, Success]
