"""Conditions: what they mean, what a wrong one is told, and what run_flow makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_worker import Fail, Flow
from pgflow_worker.conditions import UNCONDITIONAL, Conditions, contains
from pgflow_worker.errors import FlowError
from pgflow_worker.testing import Run, run_flow
from tests.unit import flows


def defined(source: str) -> Flow:
    return flows.defined(source, max_attempts=2)


def conditions_of(source: str, slug: str) -> Conditions:
    return defined(source).steps[slug].conditions


# What they mean

WEBSITE = """
@flow.step("fetchPage")
def website(): ...
"""
CHAPTERS = """
@flow.step
def chapters(): ...
@flow.map("translateAll", over=chapters)
def translate(chapter): ...
"""


def test_without_conditions_a_step_has_pgflows_defaults() -> None:
    conditions = conditions_of(WEBSITE, "fetchPage")
    assert conditions == Conditions(None, None, "skip", "fail")
    assert conditions.are_default


@pytest.mark.parametrize(
    "options", ["if_={}", "if_not={}", 'when_exhausted="skip"', 'when_exhausted="skip-cascade"']
)
def test_any_condition_needs_a_pgflow_that_knows_conditions(options: str) -> None:
    assert not conditions_of(f"@flow.step({options})\ndef a(): ...", "a").are_default


@pytest.mark.parametrize(
    "options",
    ["if_=None", "when_unmet=None", "when_exhausted=None", 'when_exhausted="fail"'],
)
def test_what_is_written_out_as_it_is_anyway_changes_nothing(options: str) -> None:
    assert conditions_of(f"@flow.step({options})\ndef a(): ...", "a").are_default


@pytest.mark.parametrize("decorator", ["step", "array", "map"])
def test_every_decorator_takes_conditions(decorator: str) -> None:
    element = "element" if decorator == "map" else ""
    over = "over=first, " if decorator == "map" else "after=[first], "
    conditions = conditions_of(
        f"""
@flow.array
def first(): ...
@flow.{decorator}({over}if_={{"first": [1]}}, if_not={{"first": [2]}}, when_unmet="fail",
                  when_exhausted="skip")
def a({element}): ...
""",
        "a",
    )
    assert conditions == Conditions({"first": [1]}, {"first": [2]}, "fail", "skip")


def test_a_root_steps_pattern_is_over_the_runs_input() -> None:
    source = WEBSITE + '@flow.step(if_={"website": 1, "x": {"y": [None]}})\ndef a(): ...'
    assert conditions_of(source, "a").if_ == {"website": 1, "x": {"y": [None]}}


def test_a_dependents_pattern_names_steps_by_their_function() -> None:
    source = WEBSITE + '@flow.step(if_={"website": {"website": 1}})\ndef a(website): ...'
    assert conditions_of(source, "a").if_ == {"fetchPage": {"website": 1}}


def test_a_pattern_may_name_a_step_without_its_data_and_one_defined_later() -> None:
    source = """
        @flow.step(after=[], if_not={"later": 1})
        def a(later): ...
        @flow.step
        def later(): ...
        @flow.step(after=[later], if_={"later": 1})
        def b(): ...
    """
    assert conditions_of(source, "a").if_not == {"later": 1}
    assert conditions_of(source, "b").if_ == {"later": 1}


def test_a_maps_pattern_is_over_the_step_that_it_maps() -> None:
    source = CHAPTERS + '@flow.map(over=translate, if_={"translate": ["x"]})\ndef a(line): ...'
    assert conditions_of(source, "a").if_ == {"translateAll": ["x"]}


def test_a_pattern_is_written_as_results_are() -> None:
    source = """
        from datetime import date
        from decimal import Decimal
        @flow.step(if_={"since": date(2025, 1, 2), "price": Decimal("1.5"), "pair": (1, 2)})
        def a(): ...
    """
    expected = {"since": "2025-01-02", "price": 1.5, "pair": [1, 2]}
    assert conditions_of(source, "a").if_ == expected


# Wrong ones

GAP = """
@flow.step({})
def summary(): ...
@flow.step
def publish(summary): ...
"""

WRONG = [
    pytest.param(
        WEBSITE
        + '@flow.step\ndef run_it(): ...\n@flow.step(if_not={"run": 1})\ndef publish(website): ...',
        'step "publish": if_not names "run", which is not one of its dependencies',
        "Its dependencies: website.",
        id="unknown name",
    ),
    pytest.param(
        WEBSITE + '@flow.step(if_={"webiste": 1})\ndef publish(website): ...',
        'step "publish": if_ names "webiste", which is not one of its dependencies',
        'Did you mean "website"?',
        id="a name misspelt",
    ),
    pytest.param(
        WEBSITE + '@flow.step(if_={"fetchPage": 1})\ndef publish(website): ...',
        'step "publish": if_ names "fetchPage", which is not one of its dependencies',
        'A pattern names a step by its function: write "website".',
        id="a slug instead of a function's name",
    ),
    pytest.param(
        WEBSITE + '@flow.step\ndef a(): ...\n@flow.step(if_={"website": 1})\ndef publish(a): ...',
        'step "publish": if_ names "website", which is not one of its dependencies',
        "Make it one: give the step after=[website].",
        id="a step that it does not depend on",
    ),
    pytest.param(
        WEBSITE + '@flow.step\ndef a(): ...\n@flow.step(if_={"fetchPage": 1})\ndef publish(a): ...',
        'step "publish": if_ names "fetchPage", which is not one of its dependencies',
        "Make it one: give the step after=[website].",
        id="the slug of a step that it does not depend on",
    ),
    pytest.param(
        WEBSITE + '@flow.step(if_={"flow_input": {"a": 1}})\ndef publish(website): ...',
        'step "publish": if_ names "flow_input", which is not one of its dependencies',
        "Only a step without dependencies is compared with the run's input: let one of the "
        "dependencies return what the pattern is about.",
        id="flow_input",
    ),
    pytest.param(
        '@flow.step(if_=["a"])\ndef a(): ...',
        "step \"a\": if_ must be a JSON object, not ['a']",
        'Write a dict, such as if_={"plan": ...}.',
        id="a list",
    ),
    pytest.param(
        WEBSITE + "@flow.step(if_not='website')\ndef a(website): ...",
        "step \"a\": if_not must be a JSON object, not 'website'",
        'Write a dict, such as if_not={"website": ...}.',
        id="a text",
    ),
    pytest.param(
        '@flow.step(if_={"a": {"b": [1, float("nan")]}})\ndef a(): ...',
        'step "a": if_ is not JSON: $.a.b[1] is NaN',
        "A pattern is compared with JSON: write what a result may be.",
        id="NaN",
    ),
    pytest.param(
        '@flow.step(if_={"a": {1, 2}})\ndef a(): ...',
        'step "a": if_ is not JSON: $.a is of type set, which JSON does not have',
        "A pattern is compared with JSON: write what a result may be.",
        id="a set",
    ),
    pytest.param(
        '@flow.step(if_not={"a": {1: 2}})\ndef a(): ...',
        'step "a": if_not is not JSON: $.a has the key 1, and JSON\'s keys are text',
        "A pattern is compared with JSON: write what a result may be.",
        id="a key that is no text",
    ),
    pytest.param(
        '@flow.map(if_={"a": 1})\ndef each(element): ...',
        'step "each": if_ is never met: it is an object, and the run\'s input is an array, because '
        'of map step "each"',
        "Let the run's input be an object, and map with over= the result of a step.",
        id="a map of the run's input",
    ),
    pytest.param(
        '@flow.map\ndef each(element): ...\n@flow.step(if_not={"a": 1})\ndef a(): ...',
        'step "a": if_not is always met: it is an object, and the run\'s input is an array, '
        'because of map step "each"',
        "Let the run's input be an object, and map with over= the result of a step.",
        id="a step beside a map of the run's input",
    ),
    pytest.param(
        CHAPTERS + '@flow.step(if_={"translate": {"ok": True}})\ndef a(translate): ...',
        'step "a": if_ is never met: the result of step "translateAll" is a list, and the pattern '
        "for it is not",
        'Write if_={"translate": [...]}: a list contains the elements named.',
        id="an object for a map's result",
    ),
    pytest.param(
        CHAPTERS + '@flow.step(if_not={"chapters": {}})\ndef a(chapters): ...',
        'step "a": if_not is always met: the result of step "chapters" is a list, and the pattern '
        "for it is not",
        'Write if_not={"chapters": [...]}: a list contains the elements named.',
        id="an object for what is mapped",
    ),
    pytest.param(
        '@flow.step(when_unmet="skip")\ndef a(): ...',
        'step "a": when_unmet has no effect without if_ or if_not',
        "Leave it out, or say what is to be met. What becomes of a step whose attempts have all "
        "failed is when_exhausted.",
        id="when_unmet alone",
    ),
    pytest.param(
        '@flow.step(if_={}, when_unmet="skip_cascade")\ndef a(): ...',
        "step \"a\": when_unmet must be one of the known values, not 'skip_cascade'",
        "Known values: skip, skip-cascade, fail.",
        id="an unknown when_unmet",
    ),
    pytest.param(
        "@flow.step(when_exhausted=[])\ndef a(): ...",
        'step "a": when_exhausted must be one of the known values, not []',
        "Known values: skip, skip-cascade, fail.",
        id="an unknown when_exhausted",
    ),
    pytest.param(
        GAP.format('if_={"a": 1}'),
        'step "publish": parameter "summary" needs a default, because step "summary" may be '
        "skipped",
        'Write summary=None, or give step "summary" when_unmet="skip-cascade".',
        id="a gap left by a pattern",
    ),
    pytest.param(
        GAP.format('if_not={"a": 1}, when_unmet="skip-cascade", when_exhausted="skip"'),
        'step "publish": parameter "summary" needs a default, because step "summary" may be '
        "skipped",
        'Write summary=None, or give step "summary" when_exhausted="skip-cascade".',
        id="a gap left by failures",
    ),
    pytest.param(
        GAP.format('if_not={"a": 1}, when_exhausted="skip"'),
        'step "publish": parameter "summary" needs a default, because step "summary" may be '
        "skipped",
        'Write summary=None, or give step "summary" when_unmet="skip-cascade" and '
        'when_exhausted="skip-cascade".',
        id="a gap left by both",
    ),
]


@pytest.mark.parametrize(("source", "message", "hint"), WRONG)
def test_a_wrong_condition_is_told_what_to_do(source: str, message: str, hint: str) -> None:
    with pytest.raises(FlowError) as caught:
        _ = defined(source).steps
    assert (str(caught.value), caught.value.hint) == (f'flow "f", {message}', hint)


@pytest.mark.parametrize(
    "source",
    [
        GAP.format('if_={"a": 1}, when_unmet="skip-cascade"'),
        GAP.format('if_={"a": 1}, when_unmet="fail"'),
        GAP.format('when_exhausted="skip-cascade"'),
        GAP.format('if_={"a": 1}').replace("publish(summary)", "publish(summary=None)"),
        GAP.format('if_={"a": 1}').replace("publish(summary)", "publish(*, summary={})"),
        '@flow.step(if_={"a": 1})\ndef a(): ...\n@flow.step(after=[a])\ndef b(): ...',
        '@flow.array(if_={"a": 1})\ndef a(): ...\n@flow.map(over=a)\ndef b(element): ...',
    ],
)
def test_no_default_is_needed_where_nothing_is_missing(source: str) -> None:
    assert len(defined(source).steps) == 2


# Containment

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, "", "a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_everything_contains_itself(value: object) -> None:
    assert contains(value, value)


@given(st.dictionaries(st.sampled_from("abc"), JSON), st.dictionaries(st.sampled_from("de"), JSON))
def test_an_object_contains_what_it_has_and_no_more(
    pattern: dict[str, object], more: dict[str, object]
) -> None:
    assert contains(pattern | more, pattern)
    assert contains(pattern, pattern | more) == (not more)


@given(st.lists(JSON, max_size=4), st.randoms())
def test_an_array_contains_its_elements_in_any_order_and_number(
    value: list[object], random: Any
) -> None:
    assert contains({"a": value}, {"a": random.choices(value, k=6) if value else []})


@pytest.mark.parametrize(
    ("value", "pattern", "met"),
    [
        ({"plan": "gold", "n": 1}, {"plan": "gold"}, True),
        ({"plan": "gold"}, {"plan": "silver"}, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": 0}, {"a": False}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": None}, {"a": None}, True),
        ({}, {"a": None}, False),
        ({"a": None}, {"a": {}}, False),
        ({"a": [1]}, {"a": {}}, False),
        ({"a": {"b": 1}}, {"a": {}}, True),
        ({"a": [1, 2]}, {"a": 1}, False),
        ({"a": [[1, 2], [3]]}, {"a": [[1]]}, True),
        ({"a": [[1], [2]]}, {"a": [[1, 2]]}, False),
        ({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]}, True),
        ([1, 2], {}, False),
        (None, {}, False),
        ([1, 2], 1, True),
        ([[1]], 1, False),
        (1, [1], False),
    ],
)
def test_containment(value: object, pattern: object, met: bool) -> None:
    assert contains(value, pattern) is met


def test_both_patterns_have_to_agree() -> None:
    conditions = Conditions({"a": 1}, {"b": 1})
    inputs: list[object] = [{"a": 1}, {"a": 1, "b": 1}, {"b": 1}, {}]
    assert [conditions.are_met(given) for given in inputs] == [True, False, False, False]
    assert UNCONDITIONAL.are_met(None)


# run_flow


def summary_of(run: Run) -> tuple[str, dict[str, Any], dict[str, str]]:
    return run.status, run.output, run.skipped


def test_a_skipped_dependency_arrives_as_the_default() -> None:
    flow = defined("""
        @flow.step(if_={"plan": "gold"})
        def discount(): return 5
        @flow.step(after=[discount])
        def price(discount=0): return 10 - discount
    """)
    skipped = {"discount": "condition_unmet"}
    assert summary_of(run_flow(flow, {"plan": "free"})) == ("completed", {"price": 10}, skipped)
    assert summary_of(run_flow(flow, {"plan": "gold"})) == ("completed", {"price": 5}, {})


def test_a_pattern_does_not_find_a_skipped_dependency() -> None:
    flow = defined("""
        @flow.step(if_={"plan": "gold"})
        def first(): return {"ok": True}
        @flow.step(after=[first], if_not={"first": {}})
        def fallback(): return "instead"
        @flow.step(after=[first], if_={"first": {"ok": True}})
        def more(): return "more"
    """)
    run = run_flow(flow, {})
    assert run.output == {"fallback": "instead"}
    assert run.skipped == {"first": "condition_unmet", "more": "condition_unmet"}
    assert run_flow(flow, {"plan": "gold"}).output == {"more": "more"}


def test_a_map_over_a_skipped_step_is_empty() -> None:
    flow = defined("""
        @flow.array(if_={"plan": "gold"})
        def items(): return [1]
        @flow.map(over=items)
        def each(item): return item
        @flow.map(over=each)
        def again(item): return item
    """)
    run = run_flow(flow, {})
    assert (run.outputs, run.output) == ({"each": [], "again": []}, {"again": []})
    assert run.attempts == {"items": 0, "each": 0, "again": 0}


CHAIN = """
    @flow.step(if_={"a": 1}, when_unmet="%s", when_exhausted="%s")
    def first(flow_input):
        if "failing" in flow_input: raise ValueError("failing")
    @flow.step
    def second(first=None): return "second"
    @flow.step(after=[second])
    def third(): return "third"
    @flow.step
    def other(): return "other"
"""


def test_a_cascade_skips_everything_behind_it() -> None:
    run = run_flow(defined(CHAIN % ("skip-cascade", "fail")), {})
    assert run.output == {"other": "other"}
    assert run.skipped == {
        "first": "condition_unmet",
        "second": "dependency_skipped",
        "third": "dependency_skipped",
    }


def test_a_condition_can_fail_the_run_before_anything_runs() -> None:
    run = run_flow(defined(CHAIN % ("fail", "skip")), {})
    assert summary_of(run) == ("failed", {}, {})
    assert (run.error, run.traceback) == ('condition of step "first" not met', None)
    assert set(run.attempts.values()) == {0}


@pytest.mark.parametrize(
    ("mode", "output", "skipped"),
    [
        ("skip", {"third": "third", "other": "other"}, {"first": "handler_failed"}),
        (
            "skip-cascade",
            {"other": "other"},
            {
                "first": "handler_failed",
                "second": "dependency_skipped",
                "third": "dependency_skipped",
            },
        ),
    ],
)
def test_a_step_without_attempts_left_can_be_skipped(
    mode: str, output: dict[str, Any], skipped: dict[str, str]
) -> None:
    run = run_flow(defined(CHAIN % ("fail", mode)), {"a": 1, "failing": 1})
    assert summary_of(run) == ("completed", output, skipped)
    assert run.attempts["first"] == 2
    assert run.error is not None
    assert run.error.startswith("ValueError: failing")


def test_fail_leaves_no_attempt_either() -> None:
    flow = Flow("f")

    @flow.step(when_exhausted="skip")
    def gone() -> None:
        raise Fail("the page is gone")

    run = run_flow(flow, None)
    assert summary_of(run) == ("completed", {}, {"gone": "handler_failed"})
    assert run.attempts == {"gone": 1}


def test_a_map_is_skipped_with_its_first_exhausted_task() -> None:
    flow = defined("""
        @flow.map(when_exhausted="skip")
        def each(number): return 1 / number
        @flow.step
        def last(each="nothing"): return each
    """)
    run = run_flow(flow, [1, 0, 1])
    assert summary_of(run) == ("completed", {"last": "nothing"}, {"each": "handler_failed"})
    assert run.attempts["each"] == 3


def test_a_condition_behind_a_map_of_nothing_is_not_looked_at() -> None:
    """As in pgflow 0.14: tests/versions compares."""
    flow = defined("""
        @flow.array
        def items(flow_input): return flow_input["items"]
        @flow.map(over=items)
        def each(item): return item
        @flow.step(if_={"each": ["a"]})
        def last(each): return each
    """)
    assert run_flow(flow, {"items": []}).output == {"last": []}
    assert run_flow(flow, {"items": ["b"]}).output == {}


def test_what_fails_the_run_goes_before_what_skips() -> None:
    flow = defined("""
        @flow.step(if_={"a": 1})
        def first(): ...
        @flow.step(if_={"a": 1}, when_unmet="fail")
        def second(): ...
    """)
    assert summary_of(run_flow(flow, {})) == ("failed", {}, {})
