"""What handlers get, what may come back, and what is kept of a failure."""

import sys
from typing import Any

import pytest

from tests.database.conftest import Session, counts


def run_step(session: Session, source: str, flow_input: object = None) -> dict[str, int]:
    session.deploy(source)
    session.start("f", flow_input)
    return counts(session.work("f"))


@pytest.mark.parametrize(
    "value", ["None", "0", "False", '""', "[]", "{}", "0.0", '"0"', "[None]", '{"a": None}']
)
def test_falsy_results_arrive_as_they_are(session: Session, value: str) -> None:
    session.deploy(f"""
        flow = Flow("f")

        @flow.step
        def a(): return {value}

        @flow.step
        def b(a): return [a, repr(a)]
    """)
    session.start("f")
    session.work("f", mode="drain")
    expected = eval(value)
    output = session.value("select output -> 'b' from pgflow.runs")
    assert output == [expected, repr(expected)]


def test_the_context(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=4, timeout=17)

        @flow.map
        def each(element, flow_input, ctx: Context):
            ctx.log.info("element %s", element)
            return [element, flow_input, str(ctx.run_id), ctx.flow_slug, ctx.step_slug,
                    ctx.task_index, ctx.attempt, ctx.max_attempts, 16 < ctx.remaining() <= 17,
                    ctx.idempotency_key]
    """)
    run = session.start("f", ["a", "b"])
    session.work("f")
    output = session.value("select output -> 'each' from pgflow.runs")
    assert output == [
        [letter, ["a", "b"], run, "f", "each", index, 1, 4, True, f"{run}/each/{index}"]
        for index, letter in enumerate("ab")
    ]
    log = session.value("select log from pgflow_worker.attempts where task_index = 1")
    assert log.endswith(" INFO element b")


def test_an_error_names_its_place_and_is_kept_with_traceback_and_log(session: Session) -> None:
    outcome = run_step(
        session,
        """
        flow = Flow("f", max_attempts=1)

        @flow.step
        def summary(flow_input, ctx: Context):
            ctx.log.warning("no url?")
            return helper(flow_input)

        def helper(flow_input):
            return flow_input["url"]
        """,
    )
    assert outcome == {"failed": 1}
    error = "KeyError: 'url' (flows_of_test.py:11, in helper)"
    assert session.value("select error_message from pgflow.step_tasks") == error
    [(kept, traceback, log)] = session.rows(
        "select error, traceback, log from pgflow_worker.attempts"
    )
    assert kept == error
    assert traceback.splitlines()[0] == "Traceback (most recent call last):"
    assert 'return flow_input["url"]' in traceback
    assert "attempt.py" not in traceback
    assert log.endswith("WARNING no url?")


def test_fail_makes_no_more_attempts(session: Session) -> None:
    outcome = run_step(
        session,
        """
        flow = Flow("f", max_attempts=5)

        @flow.step
        def step(): raise Fail("the page is gone")
        """,
    )
    assert outcome == {"failed": 1}
    assert session.rows("select status, attempts_count, error_message from pgflow.step_tasks") == [
        ("failed", 1, "the page is gone (flows_of_test.py:6, in step)")
    ]
    assert session.value("select status from pgflow.runs") == "failed"
    assert session.value("select count(*) from pgmq.q_f") == 0


def test_a_failed_attempt_is_retried_after_pgflows_delay(session: Session) -> None:
    source = """
        flow = Flow("f", max_attempts=2, base_delay=100)

        @flow.step
        def step(): raise ValueError("no")
    """
    assert run_step(session, source) == {"retried": 1}
    assert session.value("select vt - now() between '190 s' and '210 s' from pgmq.q_f")


@pytest.mark.parametrize(
    ("result", "kind"), [("{}", "dict"), ("None", "NoneType"), ('"ab"', "str")]
)
def test_what_feeds_a_map_must_be_a_list(session: Session, result: str, kind: str) -> None:
    source = f"""
        flow = Flow("f", max_attempts=2)

        @flow.step
        def pages(): return {result}

        @flow.map(over=pages)
        def page(element): pass
    """
    assert run_step(session, source) == {"retried": 1}
    assert session.value("select error_message from pgflow.step_tasks") == (
        f'step "pages" returned {kind}, not a list, and map step "page" needs a list'
    )
    assert session.value("select status from pgflow.runs") == "started"


def test_maps_of_maps_and_empty_maps(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.array
        def numbers(flow_input): return flow_input

        @flow.map(over=numbers)
        def double(n): return 2 * n

        @flow.map(over=double)
        def text(n): return str(n)

        @flow.step
        def joined(text): return ",".join(text)
    """)
    for flow_input in ([1, 2, 3], []):
        session.start("f", flow_input)
    session.work("f", mode="drain")
    outputs = session.rows("select output from pgflow.runs order by started_at")
    assert outputs == [({"joined": "2,4,6"},), ({"joined": ""},)]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise SystemExit(3)", "SystemExit: 3 (flows_of_test.py:6, in step)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (flows_of_test.py:6, in step)"),
        ("return object()", 'result of step "step": $ is of type object, which JSON does not have'),
        ('return {1: "x"}', 'result of step "step": $ has the key 1, and JSON\'s keys are text'),
        (
            'return ["a", "\\\\0"]',
            'result of step "step": $[1] has the character \\u0000, which PostgreSQL cannot store',
        ),
        (
            'raise ValueError("\\\\0\\\\ud800")',
            "ValueError: \\0\\ud800 (flows_of_test.py:6, in step)",
        ),
        ("return 10 ** 5000", None),
    ],
)
def test_bad_results_and_exceptions_are_the_tasks_failure(
    session: Session, body: str, error: str | None
) -> None:
    source = f"""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(): {body}
    """.replace("\\\\", "\\")
    session.deploy(source)
    session.start("f")
    session.start("f")
    assert counts(session.work("f")) == {"failed": 2}
    found = session.value("select error_message from pgflow.step_tasks limit 1")
    assert found == error if error is not None else found.startswith('result of step "step": ')


RETURNS_NOTHING = """
    flow = Flow("f", max_attempts=1)

    @flow.step
    def step(flow_input): pass
"""


def test_inputs_that_python_cannot_hold_are_the_tasks_failure(session: Session) -> None:
    session.deploy(RETURNS_NOTHING)
    session.run("select pgflow.start_flow('f', %s::jsonb)", '{"n": ' + "9" * 5000 + "}")
    assert counts(session.work("f")) == {"failed": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    assert error.startswith("the input cannot be read as JSON: ")


def test_inputs_nested_too_deeply_for_python_are_the_tasks_failure(session: Session) -> None:
    session.deploy(RETURNS_NOTHING)
    nested = '{"n": ' + "[" * 12_000 + "]" * 12_000 + "}"
    session.run("select pgflow.start_flow('f', %s::jsonb)", nested)
    if sys.version_info >= (3, 14):  # it counts the stack's bytes, as PostgreSQL does
        assert counts(session.work("f")) == {"completed": 1}
    else:
        assert counts(session.work("f")) == {"failed": 1}
        error = session.value("select error_message from pgflow.step_tasks")
        assert error.startswith("the input cannot be read as JSON: ")


def test_async_handlers_are_awaited(session: Session) -> None:
    source = """
        import asyncio
        flow = Flow("f")

        @flow.step
        async def step(flow_input):
            await asyncio.sleep(0.01)
            return flow_input
    """
    assert run_step(session, source, {"n": 1}) == {"completed": 1}
    assert session.value("select output from pgflow.step_tasks") == {"n": 1}


def test_order_without_data(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")
        order = []

        @flow.step
        def notify(): order.append("notify")

        @flow.step("last", after=[notify])
        def archive(): return list(order)
    """)
    session.start("f")
    session.work("f", mode="drain")
    expected: Any = {"last": ["notify"]}
    assert session.value("select output from pgflow.runs") == expected


def test_tasks_of_several_runs_get_their_own_runs_input(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.map
        def each(element, flow_input): return [element, flow_input]
    """)
    for flow_input in (["a"], ["b"]):
        session.start("f", flow_input)
    session.work("f")
    assert session.rows("select output from pgflow.step_tasks order by message_id") == [
        (["a", ["a"]],),
        (["b", ["b"]],),
    ]
