"""The flow language: what a definition means, and what a wrong one is told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgflow_worker
from pgflow_worker.errors import FlowError
from pgflow_worker.flow import Flow, Handler, Options, Step
from pgflow_worker.parameters import Role

if TYPE_CHECKING:
    import pgflow_worker as worker
    from pgflow_worker import Context, Transaction


def defined(source: str, slug: str = "f") -> Flow:
    """The flow that a module's text defines, as a user would write it."""
    namespace: dict[str, Any] = {
        "__name__": "defined",
        "flow": Flow(slug),
        "Context": pgflow_worker.Context,
        "Transaction": pgflow_worker.Transaction,
        "pgflow_worker": pgflow_worker,
        "Any": Any,
    }
    exec(compile(dedent(source), "defined.py", "exec", dont_inherit=True), namespace)
    flow = namespace["flow"]
    assert isinstance(flow, Flow)
    return flow


def error_of(source: str) -> FlowError:
    with pytest.raises(FlowError) as caught:
        _ = defined(source).steps
    return caught.value


def roles(step: Step) -> dict[str, Role]:
    return {parameter.name: parameter.role for parameter in step.parameters}


# What a definition means


def test_decorators_return_the_function_unchanged() -> None:
    flow = Flow("f")

    def one() -> None: ...
    def two() -> None: ...
    def three() -> None: ...
    def four(element: Any) -> None: ...
    def five(element: Any) -> None: ...
    def six() -> None: ...

    assert flow.step(one) is one
    assert flow.step("second", max_attempts=2)(two) is two
    assert flow.array(three) is three
    assert flow.map(four) is four
    assert flow.map(over=three)(five) is five
    assert flow.array(after=[one])(six) is six
    assert list(flow.steps) == ["one", "second", "three", "four", "five", "six"]


def test_a_step_can_be_called_like_any_function() -> None:
    flow = Flow("f")

    @flow.step
    def hello(flow_input: dict[str, str]) -> str:
        return f"Hello, {flow_input['name']}"

    assert hello({"name": "Ada"}) == "Hello, Ada"


def test_a_parameter_names_a_step_by_its_function_and_the_slug_is_what_pgflow_sees() -> None:
    flow = defined("""
        @flow.step("fetchPage")
        def website(): ...
        @flow.step
        def summary(website): ...
    """)
    assert list(flow.steps) == ["fetchPage", "summary"]
    assert flow.steps["summary"].dependencies == ("fetchPage",)
    [parameter] = flow.steps["summary"].parameters
    assert (parameter.name, parameter.dependency) == ("website", "fetchPage")


def test_dependencies_are_sorted_and_named_once() -> None:
    flow = defined("""
        @flow.step
        def b(): ...
        @flow.step
        def a(): ...
        @flow.step(after=[b, a])
        def c(b): ...
    """)
    assert flow.steps["c"].dependencies == ("a", "b")


def test_after_is_order_without_data() -> None:
    flow = defined("""
        @flow.step
        def notify(): ...
        @flow.step(after=[notify])
        def save(flow_input): ...
        @flow.step(after=notify)
        def log(): ...
    """)
    assert flow.steps["save"].dependencies == ("notify",)
    assert roles(flow.steps["save"]) == {"flow_input": Role.FLOW_INPUT}
    assert flow.steps["log"].dependencies == ("notify",)


def test_flow_input_can_be_asked_for_anywhere() -> None:
    flow = defined("""
        @flow.array
        def root(flow_input): ...
        @flow.map(over=root)
        def each(element, flow_input): ...
        @flow.step
        def last(flow_input, each): ...
    """)
    assert [step.wants(Role.FLOW_INPUT) for step in flow.steps.values()] == [True, True, True]
    assert flow.steps["each"].dependencies == ("root",)


def test_a_map_with_over_and_one_over_the_runs_input() -> None:
    flow = defined("""
        @flow.map
        def shout(word): ...
        @flow.map("count", over=shout)
        def count_letters(word, ctx: Context): ...
    """)
    shout, count = flow.steps["shout"], flow.steps["count"]
    assert (shout.kind, shout.type, shout.dependencies) == ("map", "map", ())
    assert (count.kind, count.type, count.dependencies) == ("map", "map", ("shout",))
    assert roles(count) == {"word": Role.ELEMENT, "ctx": Role.CONTEXT}


def test_a_maps_element_may_have_the_name_of_a_step_and_be_positional_only() -> None:
    flow = defined("""
        @flow.array
        def word(): ...
        @flow.map(over=word)
        def shout(word, /): ...
    """)
    assert roles(flow.steps["shout"]) == {"word": Role.ELEMENT}


def test_an_array_is_a_single_step_for_pgflow_and_must_return_a_list() -> None:
    step = defined("@flow.array\ndef tags(): ...").steps["tags"]
    assert (step.kind, step.type, step.must_return_list) == ("array", "single", True)


def test_a_step_that_feeds_a_map_must_return_a_list() -> None:
    flow = defined("""
        @flow.step
        def chapters(): ...
        @flow.map(over=chapters)
        def translate(chapter): ...
        @flow.map(over=translate)
        def publish(chapter): ...
        @flow.step
        def done(publish): ...
    """)
    assert {slug: step.must_return_list for slug, step in flow.steps.items()} == {
        "chapters": True,
        "translate": False,  # pgflow makes the list
        "publish": False,
        "done": False,
    }
    assert flow.steps["chapters"].feeds_map == "translate"


def test_a_parameter_with_a_default_may_have_been_skipped() -> None:
    step = defined("""
        @flow.step
        def tags(): ...
        @flow.step
        def summary(): ...
        @flow.step
        def save(summary, tags=()): ...
    """).steps["save"]
    assert [(p.name, p.optional) for p in step.parameters] == [("summary", False), ("tags", True)]
    assert step.dependencies == ("summary", "tags")


def test_a_step_may_use_one_that_is_defined_after_it() -> None:
    flow = defined("""
        @flow.step
        def last(first, middle): ...
        @flow.step
        def middle(first): ...
        @flow.step
        def unrelated(): ...
        @flow.step
        def first(): ...
    """)
    assert list(flow.steps) == ["unrelated", "first", "middle", "last"]


def test_a_step_added_later_is_seen() -> None:
    flow = defined("@flow.step\ndef a(): ...")
    assert list(flow.steps) == ["a"]

    @flow.step
    def b(a: Any) -> None: ...

    assert list(flow.steps) == ["a", "b"]


def test_a_wrapped_function_has_the_parameters_of_what_it_wraps() -> None:
    flow = defined("@flow.step\ndef website(): ...")

    def logged(function: Handler) -> Handler:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @flow.step
    @logged
    def summary(website: str) -> str:
        return website.upper()

    step = flow.steps["summary"]
    assert step.dependencies == ("website",)
    assert step.call({"website": "page"}, None, None, None) == "PAGE"


def test_one_function_can_be_a_step_of_two_flows() -> None:
    first, second = Flow("first"), Flow("second")

    @first.step
    @second.step("other")
    def shared() -> None: ...

    assert list(first.steps) == ["shared"]
    assert list(second.steps) == ["other"]


def test_repr_names_the_flow() -> None:
    assert repr(Flow("greet")) == "Flow('greet')"


# Context and Transaction


def test_context_and_transaction_are_recognised_when_imported_for_types_only() -> None:
    # This file has `from __future__ import annotations` and imports them under TYPE_CHECKING.
    flow = Flow("f")

    @flow.step
    def save(tx: Transaction, ctx: Context) -> None: ...

    @flow.step
    def load(tx: worker.Transaction, ctx: worker.Context) -> None: ...

    for step in flow.steps.values():
        assert roles(step) == {"tx": Role.TRANSACTION, "ctx": Role.CONTEXT}


@pytest.mark.parametrize(
    "annotation",
    [
        "Context",
        "pgflow_worker.Context",
        "'Context'",
        '"pgflow_worker.Context"',
        "pgflow_worker.context.Context",
    ],
)
@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_context_is_recognised_however_it_is_written(annotation: str, future: str) -> None:
    source = f"{future}\n@flow.step\ndef a(anything: {annotation}): ..."
    assert roles(defined(source).steps["a"]) == {"anything": Role.CONTEXT}


def test_transaction_is_recognised_under_an_alias() -> None:
    step = defined("Tx = Transaction\n@flow.step\ndef a(db: Tx): ...").steps["a"]
    assert roles(step) == {"db": Role.TRANSACTION}


def test_an_annotation_goes_before_a_steps_name() -> None:
    flow = defined("""
        @flow.step
        def ctx(): ...
        @flow.step
        def a(ctx: Context): ...
        @flow.step
        def b(ctx): ...
    """)
    assert roles(flow.steps["a"]) == {"ctx": Role.CONTEXT}
    assert roles(flow.steps["b"]) == {"ctx": Role.DEPENDENCY}


# Calling a handler


def test_a_handler_gets_what_its_parameters_ask_for() -> None:
    step = defined("""
        @flow.step("fetch")
        def website(): ...
        @flow.step
        def save(tx: Transaction, website, flow_input, ctx: Context): return locals()
    """).steps["save"]
    context, transaction = object(), object()
    assert step.call({"fetch": "page"}, "input", context, transaction) == {
        "tx": transaction,
        "website": "page",
        "flow_input": "input",
        "ctx": context,
    }


def test_a_map_handler_gets_its_element() -> None:
    step = defined("""
        @flow.map
        def each(element, flow_input): return [element, flow_input]
    """).steps["each"]
    assert step.call({"a": 1}, "input", None, None) == [{"a": 1}, "input"]


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_falsy_results_arrive_as_they_are(value: object) -> None:
    step = defined("""
        @flow.step
        def a(): ...
        @flow.step
        def b(a=1): return a
    """).steps["b"]
    assert step.call({"a": value}, None, None, None) == value


def test_a_skipped_dependency_leaves_its_default() -> None:
    step = defined("""
        @flow.step
        def a(): ...
        @flow.step
        def b(a="skipped"): return a
    """).steps["b"]
    assert step.call({}, None, None, None) == "skipped"


def test_a_missing_dependency_without_a_default_is_an_error() -> None:
    step = defined("""
        @flow.step
        def a(): ...
        @flow.step
        def b(a): return a
    """).steps["b"]
    with pytest.raises(KeyError, match="'a'"):
        step.call({}, None, None, None)


def test_another_handler_can_be_called_in_its_place() -> None:
    step = defined("@flow.step\ndef a(flow_input): ...").steps["a"]
    assert step.call({}, 1, None, None, lambda flow_input: flow_input + 1) == 2


# Options


def test_options_are_kept_and_none_means_pgflows_default() -> None:
    flow = Flow("f", max_attempts=1, base_delay=2, timeout=3)
    assert flow.options == Options(max_attempts=1, base_delay=2, timeout=3)

    @flow.step(max_attempts=4, base_delay=5, timeout=6, start_delay=0)
    def a() -> None: ...

    @flow.step
    def b() -> None: ...

    assert flow.steps["a"].options == Options(4, 5, 6, 0)
    assert flow.steps["b"].options == Options(None, None, None, None)


@pytest.mark.parametrize("decorator", ["step", "array", "map"])
def test_every_decorator_takes_options(decorator: str) -> None:
    parameter = "element" if decorator == "map" else ""
    flow = defined(f"@flow.{decorator}(timeout=7)\ndef a({parameter}): ...")
    assert flow.steps["a"].options.timeout == 7


LEAST = {"max_attempts": 1, "base_delay": 1, "timeout": 3, "start_delay": 0}


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_the_least_value_of_a_steps_option_is_pgflows(name: str, least: int) -> None:
    flow = defined(f"@flow.step({name}={least})\ndef a(): ...")
    assert getattr(flow.steps["a"].options, name) == least
    error = error_of(f"@flow.step({name}={least - 1})\ndef a(): ...")
    assert str(error) == f'flow "f", step "a": {name} must be at least {least}, not {least - 1}'


@pytest.mark.parametrize("value", ["True", "False", "3.0", "'3'", "[]"])
@pytest.mark.parametrize("name", LEAST)
def test_an_option_that_is_no_whole_number_is_refused(name: str, value: str) -> None:
    error = error_of(f"@flow.step({name}={value})\ndef a(): ...")
    assert str(error) == f'flow "f", step "a": {name} must be a whole number, not {value}'


def test_a_flows_options_are_checked_at_once() -> None:
    with pytest.raises(FlowError, match="timeout must be at least 3, not 2"):
        Flow("f", timeout=2)
    with pytest.raises(FlowError, match="max_attempts must be a whole number"):
        Flow("f", max_attempts=True)


# Wrong definitions: the slug


@pytest.mark.parametrize("slug", ["a", "_", "A1", "a" * 47])
def test_slugs_of_flows(slug: str) -> None:
    assert Flow(slug).slug == slug


# Where a handler runs


@pytest.mark.parametrize("decorator", ["step", "array", "map"])
@pytest.mark.parametrize(
    ("options", "keyword", "is_async", "is_concurrent"),
    [
        ("", "def", False, False),
        ("thread=False", "def", False, False),
        ("thread=True", "def", False, True),
        ("thread=True, timeout=5", "def", False, True),
        ("", "async def", True, True),
        ("thread=False", "async def", True, True),
    ],
)
def test_async_and_thread_handlers_run_beside_others(
    decorator: str, options: str, keyword: str, is_async: bool, is_concurrent: bool
) -> None:
    element = "element" if decorator == "map" else ""
    step = defined(f"@flow.{decorator}({options})\n{keyword} a({element}): ...").steps["a"]
    assert (step.is_async, step.is_concurrent) == (is_async, is_concurrent)
    assert step.thread is (is_concurrent and not is_async)
    assert not step.is_transactional


def test_a_handler_with_tx_runs_alone() -> None:
    step = defined("@flow.step\ndef a(tx: Transaction): ...").steps["a"]
    assert step.is_transactional
    assert not step.is_concurrent


def test_a_step_that_feeds_a_map_runs_where_it_did() -> None:
    flow = defined(
        """
        @flow.step(thread=True)
        def chapters(): ...

        @flow.map(over=chapters)
        async def translate(chapter): ...
        """
    )
    assert flow.steps["chapters"].is_concurrent
    assert flow.steps["translate"].is_async


@pytest.mark.parametrize("decorator", ["step", "array", "map"])
@pytest.mark.parametrize("value", ["1", "0", "None", "'yes'"])
def test_thread_is_true_or_false(decorator: str, value: str) -> None:
    error = error_of(f"@flow.{decorator}(thread={value})\ndef a(element): ...")
    assert str(error) == f'flow "f": thread must be True or False, not {value}'


IN_LETTERS = "a slug has letters, digits and underscores and does not start with a digit"


@pytest.mark.parametrize(
    ("slug", "problem"),
    [
        ("a" * 48, "the slug has 48 characters, the limit is 47"),
        ("run", 'the slug "run" is reserved by pgflow'),
        ("", IN_LETTERS),
        ("1st", IN_LETTERS),
        ("my-flow", IN_LETTERS),
        ("my flow", IN_LETTERS),
        ("flöw", IN_LETTERS),
        ("flow\n", IN_LETTERS),
        (5, "the slug must be text, not 5"),
    ],
)
def test_a_wrong_slug_of_a_flow(slug: Any, problem: str) -> None:
    with pytest.raises(FlowError) as caught:
        Flow(slug)
    assert str(caught.value) == f'flow "{slug}": {problem}'


@pytest.mark.parametrize(
    ("slug", "problem"),
    [
        ("a" * 129, "the slug has 129 characters, the limit is 128"),
        ("run", 'the slug "run" is reserved by pgflow'),
        ("", IN_LETTERS),
        ("save-to-db", IN_LETTERS),
    ],
)
def test_a_wrong_slug_of_a_step(slug: str, problem: str) -> None:
    error = error_of(f"@flow.step({slug!r})\ndef a(): ...")
    assert str(error) == f'flow "f", step "{slug}": {problem}'


def test_the_longest_slug_of_a_step() -> None:
    slug = "a" * 128
    assert list(defined(f"@flow.step('{slug}')\ndef a(): ...").steps) == [slug]


def test_a_function_named_run_needs_a_slug_of_its_own() -> None:
    assert "reserved" in str(error_of("@flow.step\ndef run(): ..."))
    assert list(defined("@flow.step('go')\ndef run(): ...").steps) == ["go"]


# Wrong definitions: message and hint, as a user meets them

WEBSITE = """
@flow.step
def website(): ...
"""
CHAPTERS = """
@flow.array
def chapters(): ...
"""

WRONG = [
    pytest.param(
        WEBSITE + "@flow.step\ndef summary(webiste): ...",
        'step "summary": parameter "webiste" names no step of this flow',
        'Did you mean "website"?',
        id="a step's name misspelt",
    ),
    pytest.param(
        "@flow.step\ndef website(flowinput): ...",
        'step "website": parameter "flowinput" names no step of this flow',
        'Did you mean "flow_input"?',
        id="flow_input misspelt",
    ),
    pytest.param(
        WEBSITE + "@flow.step\ndef summary(x): ...",
        'step "summary": parameter "x" names no step of this flow',
        "Known names: flow_input, website.",
        id="unknown name",
    ),
    pytest.param(
        "@flow.step('saveToDb')\ndef save_to_db(): ...\n@flow.step\ndef last(saveToDb): ...",
        'step "last": parameter "saveToDb" names no step of this flow',
        'A parameter names a step by its function: write "save_to_db".',
        id="a slug instead of a function's name",
    ),
    pytest.param(
        "@flow.step\ndef a(ctx): ...",
        'step "a": parameter "ctx" has no annotation',
        "Write ctx: Context, with: from pgflow_worker import Context",
        id="ctx without annotation",
    ),
    pytest.param(
        "@flow.step\ndef a(tx): ...",
        'step "a": parameter "tx" has no annotation',
        "Write tx: Transaction, with: from pgflow_worker import Transaction",
        id="tx without annotation",
    ),
    pytest.param(
        "@flow.step\nasync def a(tx: Transaction): ...",
        'step "a": an async handler cannot have a transaction',
        "Write def, or save the result in a step of its own.",
        id="async with tx",
    ),
    pytest.param(
        "@flow.step(thread=True)\ndef a(tx: Transaction): ...",
        'step "a": a handler in a thread cannot have a transaction',
        "Leave out thread=True, or save the result in a step of its own.",
        id="thread with tx",
    ),
    pytest.param(
        "@flow.map(thread=True)\ndef a(element, tx: Transaction): ...",
        'step "a": a handler in a thread cannot have a transaction',
        "Leave out thread=True, or save the result in a step of its own.",
        id="a map's thread with tx",
    ),
    pytest.param(
        "@flow.step(thread=True)\nasync def a(): ...",
        'step "a": an async handler runs on the event loop, not in a thread',
        "Leave out thread=True, or write def.",
        id="thread with async",
    ),
    pytest.param(
        "@flow.step(thread=True)\nasync def a(tx: Transaction): ...",
        'step "a": an async handler runs on the event loop, not in a thread',
        "Leave out thread=True, or write def.",
        id="thread with async and tx",
    ),
    pytest.param(
        "@flow.step\ndef a(*args): ...",
        'step "a": parameter "*args" names no step',
        "Name each step that the handler needs as a parameter of its own.",
        id="*args",
    ),
    pytest.param(
        "@flow.step\ndef a(**outputs): ...",
        'step "a": parameter "**outputs" names no step',
        "Name each step that the handler needs as a parameter of its own.",
        id="**kwargs",
    ),
    pytest.param(
        "@flow.map\ndef a(*elements): ...",
        'step "a": parameter "*elements" names no step',
        "Name each step that the handler needs as a parameter of its own.",
        id="a map's *args",
    ),
    pytest.param(
        WEBSITE + "@flow.step\ndef summary(website, /): ...",
        'step "summary": parameter "website" is positional-only',
        'Remove the "/" from the parameters: they are passed by name.',
        id="positional-only",
    ),
    pytest.param(
        CHAPTERS + WEBSITE + "@flow.map(over=chapters)\ndef translate(chapter, website): ...",
        'step "translate": a map step cannot depend on step "website"',
        "pgflow gives a map step one dependency, the list it maps: name it with over=, and let "
        "that step put what else is needed into its elements.",
        id="a map that depends on another step",
    ),
    pytest.param(
        CHAPTERS + "@flow.map(over=chapters)\ndef translate(): ...",
        'step "translate": a map step\'s first parameter is the element, and this one has none',
        "Add it before the others: def handler(element, flow_input, ...).",
        id="a map without a parameter",
    ),
    pytest.param(
        WEBSITE + "@flow.step('website')\ndef page(): ...",
        'step "website": the slug is taken by another step',
        'Give one of them a slug of its own: @flow.step("another_slug").',
        id="a slug twice",
    ),
    pytest.param(
        WEBSITE + "@flow.step('webSite')\ndef page(): ...",
        'step "webSite": the slug is taken by another step, but for upper and lower case',
        'Give one of them a slug of its own: @flow.step("another_slug").',
        id="slugs that differ by case",
    ),
    pytest.param(
        "@flow.step('first')\ndef page(): ...\n@flow.step('second')\ndef page(): ...",
        'step "second": its function has the name of step "first"\'s, "page"',
        "Parameters name steps by their function: rename one of the two.",
        id="two functions with one name",
    ),
    pytest.param(
        "@flow.step\ndef a(c): ...\n@flow.step\ndef b(a): ...\n@flow.step\ndef c(b): ...",
        "steps depend on each other in a circle: ",
        "Remove one of these dependencies.",
        id="a circle",
    ),
]


@pytest.mark.parametrize(("source", "message", "hint"), WRONG)
def test_a_wrong_definition_is_told_what_to_do(source: str, message: str, hint: str | None) -> None:
    error = error_of(source)
    if message.endswith(": "):
        assert str(error).startswith(f'flow "f": {message}')
    else:
        assert str(error) == f'flow "f", {message}'
    assert error.hint == hint
    assert error.sqlstate == "PW006"


def test_a_circle_is_shown_from_step_to_dependency() -> None:
    error = error_of("""
        @flow.step
        def a(c): ...
        @flow.step
        def b(a): ...
        @flow.step
        def c(b): ...
        @flow.step
        def outside(a): ...
    """)
    circle = str(error).rpartition(": ")[2]
    assert circle in ("a -> c -> b -> a", "c -> b -> a -> c", "b -> a -> c -> b")


def test_a_step_that_depends_on_itself() -> None:
    error = error_of("@flow.step\ndef a(a): ...")
    assert str(error) == 'flow "f": steps depend on each other in a circle: a -> a'


def test_an_empty_flow() -> None:
    error = error_of("")
    assert str(error) == 'flow "f" has no steps'
    assert error.hint == "Decorate a function with @flow.step."


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("step(after=[{}])", "other", "<function other at "),
        ("step(after={})", "other", "<function other at "),
        ("step(after=[{}])", "'website'", "'website'"),
        ("step(after='{}')", "website", "'website'"),
        ("step(after={})", "5", "5"),
        ("step(after=[{}])", "None", "None"),
        ("map(over={})", "other", "<function other at "),
        ("map(over={})", "'website'", "'website'"),
        ("map(over={})", "[website]", "[<function website at "),
    ],
)
def test_after_and_over_take_step_functions_of_the_flow(
    option: str, value: str, shown: str
) -> None:
    decorator = option.format(value)
    kind, _, name = option.partition("(")
    name = name.partition("=")[0]
    parameter = "element" if kind == "map" else ""
    error = error_of(f"{WEBSITE}\ndef other(): ...\n@flow.{decorator}\ndef a({parameter}): ...")
    assert str(error).startswith(
        f'flow "f", step "a": {name}= must be given step functions of this flow, not {shown}'
    )


@pytest.mark.parametrize("thing", ["5", "functools.partial(print)", "[]"])
def test_only_a_function_is_a_step(thing: str) -> None:
    error = error_of(f"import functools\nflow.step({thing})")
    assert str(error).startswith('flow "f": a step is a function, not ')


@pytest.mark.parametrize("slug", ["", "'x'"])
def test_what_is_no_function_is_refused_behind_a_slug_too(slug: str) -> None:
    error = error_of(f"flow.step({slug})(5)")
    assert str(error) == 'flow "f": a step is a function, not 5'


@pytest.mark.parametrize(
    ("decorator", "option"),
    [
        ("step(max_attempt=3)", "max_attempt"),
        ("step(over=None)", "over"),
        ("map(after=[])", "after"),
        ("array(over=None)", "over"),
    ],
)
def test_an_unknown_option_is_named_with_its_flow(decorator: str, option: str) -> None:
    error = error_of(f"@flow.{decorator}\ndef a(element=None): ...")
    assert str(error).startswith('flow "f"')
    assert f'"{option}"' in str(error)
    assert "a array" not in str(error)
    assert error.hint is not None
    assert "max_attempts, base_delay, timeout, start_delay" in error.hint


@pytest.mark.parametrize("annotation", ["Any", "object", "'Context | None'"])
def test_a_wrong_annotation_is_not_called_a_missing_one(annotation: str) -> None:
    error = error_of(f"@flow.step\ndef a(ctx: {annotation}): ...")
    assert 'parameter "ctx"' in str(error)
    assert "has no annotation" not in str(error)
    assert error.hint == "Write ctx: Context, with: from pgflow_worker import Context"


@pytest.mark.parametrize(
    "parameters",
    ["*, element", "flow_input", "ctx: Context", "tx: Transaction", "tx: Transaction, element"],
)
def test_a_maps_first_parameter_can_only_be_the_element(parameters: str) -> None:
    error = error_of(f"@flow.map\ndef a({parameters}): ...")
    assert str(error).startswith('flow "f", step "a": a map step\'s first parameter is the element')


def test_a_step_is_not_suggested_to_itself() -> None:
    error = error_of("@flow.step\ndef summary(sumary): ...")
    assert 'Did you mean "summary"' not in (error.hint or "")


# Random graphs


@dataclass
class Node:
    """A step of a random flow: what it is called and what it depends on, by function name."""

    name: str
    slug: str
    kind: str = "single"
    parameters: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    over: str | None = None

    @property
    def dependencies(self) -> set[str]:
        return {*self.parameters, *self.after, *([self.over] if self.over else [])}

    def function(self) -> Callable[..., Any]:
        names = ", ".join([*(["element"] if self.kind == "map" else []), *self.parameters])
        namespace: dict[str, Any] = {"__name__": "random"}
        exec(f"def {self.name}({names}): return locals()", namespace)
        function: Callable[..., Any] = namespace[self.name]
        return function


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Steps in a random order of definition, without circles."""
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 9))):
        earlier = [node.name for node in nodes]
        node = Node(f"step_{number}", f"slug_{number}" if draw(st.booleans()) else f"step_{number}")
        node.kind = draw(st.sampled_from(["single", "single", "array", "map"]))
        some = st.lists(st.sampled_from(earlier), unique=True) if earlier else st.just([])
        if node.kind == "map":
            node.over = draw(st.sampled_from([None, *earlier]))
        else:
            node.parameters, node.after = draw(some), draw(some)
        nodes.append(node)
    return draw(st.permutations(nodes))


def flow_of(nodes: Sequence[Node]) -> Flow:
    flow = Flow("random")
    functions = {node.name: node.function() for node in nodes}
    for node in nodes:
        after = [functions[name] for name in node.after]
        if node.kind == "map":
            over = functions[node.over] if node.over else None
            flow.map(node.slug, over=over)(functions[node.name])
        elif node.kind == "array":
            flow.array(node.slug, after=after)(functions[node.name])
        else:
            flow.step(node.slug, after=after)(functions[node.name])
    return flow


def expected_order(nodes: Sequence[Node]) -> list[str]:
    """Always the first defined step whose dependencies have been placed."""
    left, placed = list(nodes), list[str]()
    while left:
        following = next(node for node in left if node.dependencies <= set(placed))
        left.remove(following)
        placed.append(following.name)
    return placed


@given(graphs())
def test_a_flow_has_the_steps_types_and_dependencies_that_were_written(nodes: list[Node]) -> None:
    steps = flow_of(nodes).steps
    slugs = {node.name: node.slug for node in nodes}
    fed = {node.over for node in nodes}
    assert len(steps) == len(nodes)
    for node in nodes:
        step = steps[node.slug]
        assert step.slug == node.slug
        assert step.kind == node.kind
        assert step.type == ("map" if node.kind == "map" else "single")
        assert step.dependencies == tuple(sorted(slugs[name] for name in node.dependencies))
        assert step.must_return_list == (
            node.kind == "array" or (node.kind == "single" and node.name in fed)
        )


@given(graphs())
def test_every_step_follows_its_dependencies(nodes: list[Node]) -> None:
    placed: set[str] = set()
    for slug, step in flow_of(nodes).steps.items():
        assert placed.issuperset(step.dependencies)
        placed.add(slug)


@given(graphs())
def test_the_order_of_definition_is_kept_where_it_is_valid(nodes: list[Node]) -> None:
    slugs = {node.name: node.slug for node in nodes}
    steps = list(flow_of(nodes).steps)
    assert steps == [slugs[name] for name in expected_order(nodes)]
    # In this order it can be defined again, and then nothing has to be moved.
    by_slug = {node.slug: node for node in nodes}
    assert list(flow_of([by_slug[slug] for slug in steps]).steps) == steps


@given(graphs())
def test_every_handler_gets_the_outputs_it_names(nodes: list[Node]) -> None:
    slugs = {node.name: node.slug for node in nodes}
    for node in nodes:
        step = flow_of(nodes).steps[node.slug]
        task_input: object = {slug: f"output of {slug}" for slug in step.dependencies}
        expected: dict[str, object] = {name: f"output of {slugs[name]}" for name in node.parameters}
        if node.kind == "map":
            expected = {"element": task_input}
        assert step.call(task_input, None, None, None) == expected


@st.composite
def circular_graphs(draw: st.DrawFn) -> list[Node]:
    """Steps of which some depend on each other in a circle."""
    nodes = [Node(f"s{number}", f"s{number}") for number in range(draw(st.integers(1, 8)))]
    names = [node.name for node in nodes]
    for node in nodes:
        node.parameters = draw(st.lists(st.sampled_from(names), unique=True, max_size=2))
    circle = draw(st.lists(st.sampled_from(nodes), unique_by=id, min_size=1))
    for node, following in zip(circle, [*circle[1:], circle[0]], strict=True):
        if following.name not in node.parameters:
            node.parameters.append(following.name)
    return nodes


@given(circular_graphs())
def test_a_circle_is_refused_and_shown(nodes: list[Node]) -> None:
    with pytest.raises(FlowError, match="in a circle") as caught:
        _ = flow_of(nodes).steps
    circle = str(caught.value).rpartition(": ")[2].split(" -> ")
    depends_on = {node.name: node.parameters for node in nodes}
    assert len(circle) > 1
    assert circle[0] == circle[-1]
    assert all(b in depends_on[a] for a, b in pairwise(circle))
