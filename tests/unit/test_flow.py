"""The flow language: what a definition means, and what a wrong one is told."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest

from pgflow_worker.errors import FlowError
from pgflow_worker.flow import Flow, Handler, Options
from pgflow_worker.parameters import Role
from tests.unit.flows import defined, error_of, roles

if TYPE_CHECKING:
    pass


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


@pytest.mark.parametrize(
    ("resources", "problem"),
    [
        ("['GPU']", "resources must be names with quantities, not ['GPU']"),
        ("{'GPU': 0}", "resource 'GPU' must be text with a positive number, not 0"),
        ("{'GPU': True}", "resource 'GPU' must be text with a positive number, not True"),
        ("{'GPU': '1'}", "resource 'GPU' must be text with a positive number, not '1'"),
        ("{1: 1}", "resource 1 must be text with a positive number, not 1"),
    ],
)
def test_resources_are_names_with_quantities(resources: str, problem: str) -> None:
    error = error_of(f"@flow.step(thread=True, resources={resources})\ndef a(): ...")
    assert str(error) == f'flow "f", step "a": {problem}'


def test_resources_are_for_what_may_run_on_a_cluster() -> None:
    error = error_of("@flow.step(resources={'GPU': 1})\ndef a(): ...")
    assert str(error) == (
        'flow "f", step "a": resources are for handlers that may run on a cluster'
    )
    flow = Flow("f")
    flow.map("each", thread=True, resources={"GPU": 0.5})(lambda element: element)
    [step] = flow.steps.values()
    assert step.resources == {"GPU": 0.5}


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
