"""Conditions: what becomes of a run in pgflow 0.14, and that run_flow() says the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgflow_worker import Flow
from pgflow_worker.testing import Run, run_flow
from tests.database.conftest import Session, counts, flow_of


@pytest.fixture
def version() -> str:
    """The first version that has conditions."""
    return "0.14.1"


def deploy(session: Session, source: str) -> Flow:
    session.deploy(source, allow_data_loss=True)
    return flow_of(source)


@dataclass
class Seen:
    """What became of a run. Of a failed one only that: how far it came is a matter of timing."""

    status: str
    output: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def seen_in_database(session: Session, flow: Flow, flow_input: object) -> Seen:
    run_id = session.start(flow.slug, flow_input)
    session.work(flow.slug, mode="drain", batch_size=3)
    [[status, output]] = session.rows(
        "select status, output from pgflow.runs where run_id = %s", run_id
    )
    assert session.value(f"select count(*) from pgmq.q_{flow.slug}") == 0
    if status == "failed":
        return Seen(status)
    steps = session.rows(
        "select step_slug, status, skip_reason, output from pgflow.step_states where run_id = %s",
        run_id,
    )
    return Seen(
        status,
        output or {},
        {slug: output for slug, status, _, output in steps if status == "completed"},
        {slug: reason for slug, status, reason, _ in steps if status == "skipped"},
    )


def seen_by_run_flow(run: Run) -> Seen:
    if run.status == "failed":
        return Seen(run.status)
    return Seen(run.status, run.output, run.outputs, run.skipped)


def same(session: Session, source: str, flow_input: object = None) -> Seen:
    """What became of a run in the database and without it."""
    flow_input = {} if flow_input is None else flow_input
    flow = deploy(session, source)
    seen = seen_in_database(session, flow, flow_input)
    assert seen_by_run_flow(run_flow(flow, flow_input)) == seen
    return seen


BRANCHES = """
    flow = Flow("f")

    @flow.step(if_={"plan": "free"})
    def free(): return 0

    @flow.step(if_not={"plan": "free"})
    def paid(): return 9

    @flow.step
    def price(free=None, paid=None): return [free, paid]
"""


@pytest.mark.parametrize(("plan", "price"), [("free", [0, None]), ("gold", [None, 9])])
def test_one_of_two_branches(session: Session, plan: str, price: list[Any]) -> None:
    seen = same(session, BRANCHES, {"plan": plan})
    assert seen.output == {"price": price}
    assert list(seen.skipped.values()) == ["condition_unmet"]


CASCADE = """
    flow = Flow("f")

    @flow.step({conditions})
    def first(): return 1

    @flow.step
    def second(first): return first

    @flow.map(over=second)
    def third(element): return element

    @flow.step
    def other(): return 2
"""


def test_a_cascade_skips_everything_behind_it(session: Session) -> None:
    source = CASCADE.replace("{conditions}", 'if_={"a": 1}, when_unmet="skip-cascade"')
    seen = same(session, source)
    assert seen.output == {"other": 2}
    assert seen.skipped == {
        "first": "condition_unmet",
        "second": "dependency_skipped",
        "third": "dependency_skipped",
    }


def test_a_condition_can_fail_the_run(session: Session) -> None:
    source = CASCADE.replace("{conditions}", 'if_={"a": 1}, when_unmet="fail"')
    assert same(session, source).status == "failed"
    assert session.value("select count(*) from pgflow.step_tasks") == 0


@pytest.mark.parametrize(
    ("mode", "skipped"),
    [
        ("skip", {"each": "handler_failed"}),
        (
            "skip-cascade",
            {"each": "handler_failed", "again": "dependency_skipped", "last": "dependency_skipped"},
        ),
    ],
)
def test_a_map_is_skipped_with_its_first_exhausted_task(
    session: Session, mode: str, skipped: dict[str, str]
) -> None:
    seen = same(
        session,
        f"""
        flow = Flow("f", max_attempts=1)

        @flow.array
        def numbers(): return [0, 1, 2, 3, 4, 5]

        @flow.map(over=numbers, when_exhausted="{mode}")
        def each(number):
            if number == 1:
                raise ValueError
            return number

        @flow.map(over=each)
        def again(number): return number

        @flow.step
        def last(again, each=None): return [again, each]
        """,
    )
    assert seen.skipped == skipped
    assert seen.output == ({"last": [[], None]} if mode == "skip" else {})


def test_a_run_whose_leaves_are_all_skipped(session: Session) -> None:
    seen = same(
        session,
        """
        flow = Flow("f")

        @flow.step
        def first(): return {"n": 1}

        @flow.step(if_={"first": {"n": 2}})
        def second(first): return first
        """,
    )
    assert (seen.status, seen.output, seen.outputs) == ("completed", {}, {"first": {"n": 1}})


def test_a_condition_behind_an_empty_map(session: Session) -> None:
    seen = same(
        session,
        """
        flow = Flow("f")

        @flow.array
        def numbers(): return []

        @flow.map(over=numbers)
        def each(number): return number

        @flow.step(if_={"each": [1]})
        def last(each): return each
        """,
    )
    assert seen.output == {"last": []}


# Random flows

PATTERNS_OF_INPUT = [{"plan": "free"}, {"plan": "gold"}, {}, {"tags": ["a"]}, {"tags": ["a", "c"]}]
LISTS: list[Any] = [[], [1], [1, 2], [{"a": 1}], [[1], None, "x"]]
VALUES: list[Any] = [None, 0, 1, 1.0, True, "a", {}, {"a": 1}, {"a": [1, 2]}, *LISTS]
INPUTS = [{"plan": "free", "tags": ["a", "b"]}, {"plan": "gold"}, [], ["x", "y"], 5, None]


@dataclass
class Step:
    name: str
    kind: str
    dependencies: Sequence[str]
    outcome: Any  # "raise", or what it returns
    options: dict[str, Any]

    def source(self) -> str:
        options = dict(self.options)
        arguments = [f"{key}={value!r}" for key, value in options.items()]
        if self.kind == "map":
            arguments += [f"over={name}" for name in self.dependencies]
            parameters = "element"
        else:
            parameters = ", ".join(f"{name}='none'" for name in self.dependencies)
        body = "raise ValueError" if self.outcome == "raise" else f"return {self.outcome!r}"
        return (
            f"@flow.{self.kind}({', '.join(arguments)})\ndef {self.name}({parameters}): {body}\n\n"
        )


def pattern_for(draw: st.DrawFn, step: Step) -> Any:
    """A pattern for the result of a step."""
    return draw(st.sampled_from(VALUES if step.kind == "step" else LISTS))


@st.composite
def sources(draw: st.DrawFn) -> tuple[str, object]:
    """A flow and an input for its run."""
    steps: list[Step] = []
    root_map = draw(st.booleans()) and draw(st.booleans())
    for number in range(draw(st.integers(1, 6))):
        lists = [step.name for step in steps if step.kind != "step"]
        kind = draw(st.sampled_from(["step", "step", "array", *(["map"] if lists else [])]))
        if kind == "map" or (number == 0 and root_map):
            kind, names = "map", [draw(st.sampled_from(lists))] if lists else []
        else:
            earlier = [step.name for step in steps]
            names = (
                draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)) if steps else []
            )
        options: dict[str, Any] = {}
        for option in ("if_", "if_not"):
            if draw(st.integers(0, 2)) or (not names and root_map):
                continue
            if names:
                about = [step for step in steps if step.name in names]
                some = draw(st.lists(st.sampled_from(about), unique_by=id, max_size=2))
                options[option] = {step.name: pattern_for(draw, step) for step in some}
            else:
                options[option] = draw(st.sampled_from(PATTERNS_OF_INPUT))
        if options:
            options["when_unmet"] = draw(st.sampled_from(["skip", "skip", "skip-cascade", "fail"]))
        options["when_exhausted"] = draw(st.sampled_from(["skip", "skip-cascade", "fail"]))
        outcome = draw(st.sampled_from([*(LISTS if kind == "array" else VALUES), "raise"]))
        steps.append(Step(f"step{number}", kind, names, outcome, options))
    flow_input = draw(st.sampled_from([i for i in INPUTS if isinstance(i, list) or not root_map]))
    source = 'flow = Flow("f", max_attempts=1)\n\n' + "".join(step.source() for step in steps)
    return source, flow_input


def test_run_flow_does_what_pgflow_does(session: Session) -> None:
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(sources())
    def same_everywhere(example: tuple[str, object]) -> None:
        same(session, *example)

    same_everywhere()


def test_tasks_that_end_after_their_step_was_skipped_are_discarded(session: Session) -> None:
    session.deploy("""
        import asyncio
        flow = Flow("f", max_attempts=1)

        @flow.array
        def numbers(flow_input):
            return [0, 1, 1, 2]

        @flow.map(over=numbers, when_exhausted="skip")
        async def each(number):
            if number == 0:
                raise Fail("on purpose")
            await asyncio.sleep(number)  # two are stored together, and one alone
            return number

        @flow.step
        async def meanwhile(flow_input):
            await asyncio.sleep(3)
    """)
    session.start("f")
    assert counts(session.work("f", mode="drain")) == {"completed": 2, "failed": 1, "discarded": 3}
    assert session.rows(
        "select distinct error from pgflow_worker.attempts where outcome = 'discarded'"
    ) == [("the step had ended (skipped) before the handler did",)]
    assert session.value("select count(*) from pgflow.step_tasks where status = 'started'") == 0
    assert session.value("select status from pgflow.runs") == "completed"
    assert counts(session.work("f")) == {}


def test_skipped_steps_are_drawn(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step(if_={"wanted": True}, when_unmet="skip-cascade")
        def unwanted(flow_input):
            return [1]

        @flow.map(over=unwanted)
        def after(number):
            return number

        @flow.step(when_exhausted="skip")
        def broken(flow_input):
            raise Fail("on purpose")

        @flow.step
        def slow(flow_input, tx: Transaction):
            tx.execute("select pg_sleep(0.5)")
    """)
    run_id = session.start("f")
    session.work("f", mode="drain")
    diagram = session.value("select pgflow_worker.run_diagram(%s)", run_id)
    timeline = session.value("select pgflow_worker.run_timeline(%s)", run_id)

    assert '"unwanted<br>skipped: condition unmet"]:::skipped' in diagram
    assert '"after<br>skipped: dependency skipped"]]:::skipped' in diagram
    assert '"broken<br>skipped: handler failed"]:::skipped' in diagram
    lines = {line.split()[0]: line.split("|")[1:] for line in timeline.splitlines()[4:]}
    assert [lines[name][1].strip() for name in ("unwanted", "after")] == ["skipped", "skipped"]
    assert lines["broken"][1].endswith("failed")
    assert lines["broken"][0].rstrip().endswith("x")
    assert lines["broken"][0].endswith("  ")  # it waits no longer
    assert lines["slow"][0].endswith("#")


def test_a_replay_gets_what_was_not_skipped(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step(if_={"plan": "free"})
        def free():
            return "nothing"

        @flow.step(if_={"plan": "paid"})
        def paid():
            return "something"

        @flow.step
        def bill(free=None, paid=None):
            return [free, paid]
    """)
    run = session.start("f", {"plan": "paid"})
    session.work("f", mode="drain")
    replay = "select output, input from pgflow_worker.replay_task(%s, %s)"
    assert session.rows(replay, run, "bill") == [
        ([None, "something"], {"run": {"plan": "paid"}, "paid": "something"})
    ]
    # What was skipped can be tried as well.
    assert session.rows(replay, run, "free") == [("nothing", {"run": {"plan": "paid"}})]
