"""Stored modules: namespaces of their own, imports among them, and what a failure tells."""

import calendar
import linecache
import sys
from collections.abc import Callable, Iterator
from textwrap import dedent
from typing import Any

import pytest

from pgflow_worker import attempt
from pgflow_worker.attempt import Failure
from pgflow_worker.context import Context
from pgflow_worker.errors import FlowError, ModuleFailed, QueryCanceled, WorkerError
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules

Store = Callable[..., StoredModules]

CONTEXT = Context(run_id="12345678-1234-5678-1234-567812345678", flow_slug="f", step_slug="only")

FLOW = """
from pgflow_worker import Flow
flow = Flow("greet")
@flow.step
def hello(flow_input):
    return f"Hello, {flow_input}"
"""


@pytest.fixture
def store() -> Iterator[Store]:
    """Makes sets of stored modules: store(name=source, ...)."""
    made: list[StoredModules] = []

    def make(**sources: str) -> StoredModules:
        made.append(StoredModules({name: dedent(text) for name, text in sources.items()}))
        return made[-1]

    before = set(sys.modules)
    yield make
    for modules in made:
        modules.forget()
    assert not [name for name in set(sys.modules) - before if name.startswith("_pgflow_worker_")]


def slugs(modules: StoredModules, name: str) -> list[str]:
    return [flow.slug for flow in modules.flows(name)]


def call(flow: Flow, slug: str) -> Any:
    return flow.steps[slug].call({}, "you", None, None)


def failed(modules: StoredModules, name: str) -> ModuleFailed:
    with pytest.raises(ModuleFailed) as caught:
        modules.flows(name)
    return caught.value


# Flows


def test_a_modules_flows(store: Store) -> None:
    [flow] = store(greetings=FLOW).flows("greetings")
    assert flow.slug == "greet"
    assert call(flow, "hello") == "Hello, you"


def test_a_module_may_define_several_flows_or_none(store: Store) -> None:
    modules = store(
        many="""
            from pgflow_worker import Flow
            first, second = Flow("first"), Flow("second")
            again = first
        """,
        none="answer = 42",
    )
    assert slugs(modules, "many") == ["first", "second"]
    assert slugs(modules, "none") == []


def test_a_flow_belongs_to_the_module_that_defines_it(store: Store) -> None:
    modules = store(
        a="from pgflow_worker import Flow\nfrom b import flow as other\nflow = Flow('of_a')",
        b="from pgflow_worker import Flow\nflow = Flow('of_b')",
    )
    assert slugs(modules, "a") == ["of_a"]
    assert slugs(modules, "b") == ["of_b"]


def test_a_flow_of_modules_that_import_each_other_belongs_to_its_definer(store: Store) -> None:
    modules = store(
        a="from pgflow_worker import Flow\nflow = Flow('of_a')\nimport b",
        b="from a import flow",
    )
    assert slugs(modules, "a") == ["of_a"]
    assert slugs(modules, "b") == []


def test_a_module_is_executed_once(store: Store) -> None:
    modules = store(
        a="import shared\nshared.seen.append('a')",
        b="import shared\nshared.seen.append('b')",
        shared="from pgflow_worker import Flow\nseen = []\nflow = Flow('shared')",
    )
    for _ in range(2):
        for name in ("a", "b", "shared"):
            modules.flows(name)
    [flow] = modules.flows("shared")
    assert flow is modules.flows("shared")[0]
    assert modules.imported == ["shared", "a", "b"]


# Imports


def test_stored_modules_import_each_other_in_every_way(store: Store) -> None:
    modules = store(
        texts="HELLO = 'Hello'",
        flows="""
            import texts
            import texts as other_name
            from texts import HELLO
            from texts import *
            from pgflow_worker import Flow
            flow = Flow("f")
            @flow.step
            def hello():
                import texts as late
                return [texts.HELLO, other_name.HELLO, HELLO, late.HELLO]
        """,
    )
    [flow] = modules.flows("flows")
    assert call(flow, "hello") == ["Hello"] * 4


def test_a_name_that_is_missing_in_a_stored_module_is_an_import_error(store: Store) -> None:
    modules = store(texts="", flows="from texts import HELLO")
    assert "ImportError: cannot import name 'HELLO'" in str(failed(modules, "flows"))


@pytest.mark.parametrize(
    "statement",
    [
        "from shared.texts import HELLO",
        "import shared.texts as texts; HELLO = texts.HELLO",
        "import shared.texts; HELLO = shared.texts.HELLO",
        "from shared import texts; HELLO = texts.HELLO",
    ],
)
def test_a_stored_module_with_a_dotted_name_is_imported_like_any(
    store: Store, statement: str
) -> None:
    modules = store(**{"shared.texts": "HELLO = 'Hello'"}, flows=f"{statement}\nassert HELLO")
    assert slugs(modules, "flows") == []
    assert modules.imported == ["shared.texts", "flows"]


def test_other_imports_are_pythons_own(store: Store) -> None:
    modules = store(
        a="""
            import os.path, xml.etree.ElementTree as tree
            from collections import abc
            assert os.path.join("a", "b") and tree.Element and abc.Mapping
        """
    )
    assert slugs(modules, "a") == []


def test_a_namespace_is_private(store: Store) -> None:
    counter = """
        from pgflow_worker import Flow
        flow = Flow("count")
        numbers = []
        @flow.step
        def count():
            numbers.append(1)
            return len(numbers)
    """
    first, second = store(counter=counter), store(counter=counter)
    [one], [two] = first.flows("counter"), second.flows("counter")
    assert [call(one, "count"), call(one, "count"), call(two, "count")] == [1, 2, 1]
    assert "counter" not in sys.modules


def test_a_stored_module_is_nothing_to_the_rest_of_python(store: Store) -> None:
    modules = store(calendar="stored = True", user="import calendar\nassert calendar.stored")
    modules.flows("user")
    assert sys.modules["calendar"] is calendar
    assert not hasattr(calendar, "stored")
    assert "user" not in sys.modules
    # What imports it elsewhere finds Python's own.
    assert __import__("calendar") is calendar
    modules = store(a="import html.parser, calendar\nassert calendar.month_name")
    assert slugs(modules, "a") == []


def test_annotations_are_text_only_where_the_module_says_so(store: Store) -> None:
    source = "def f(x: int): ...\nassert f.__annotations__ == {{'x': {}}}"
    future = "from __future__ import annotations\n"
    modules = store(a=source.format("int"), b=future + source.format("'int'"))
    assert slugs(modules, "a") == slugs(modules, "b") == []


def test_builtins_are_as_they_were(store: Store) -> None:
    before = __import__
    modules = store(a="import b", b="")
    modules.flows("a")
    assert __import__ is before


def test_dataclasses_work_with_annotations_as_text(store: Store) -> None:
    modules = store(
        a="""
            from __future__ import annotations
            from dataclasses import dataclass, field
            from typing import ClassVar, NamedTuple, get_type_hints
            from pgflow_worker import Context, Flow
            flow = Flow("f")
            @dataclass
            class Page:
                kind: ClassVar[str] = "page"
                title: str = ""
                tags: list[str] = field(default_factory=list)
            assert get_type_hints(Page)["title"] is str
            @flow.step
            def page(ctx: Context) -> Page:
                return Page("Home")
        """
    )
    [flow] = modules.flows("a")
    outcome = attempt.run(flow.steps["page"], {}, None, CONTEXT, None)
    assert outcome == attempt.Success('{"title":"Home","tags":[]}')


# Who imports whom


def test_importers_are_direct_and_indirect(store: Store) -> None:
    modules = store(
        base="",
        middle="import base",
        top="from middle import *",
        both="import base, middle",
        alone="import json",
        late="def f():\n    import base",
    )
    for name in modules.sources:
        modules.flows(name)
    assert sorted(modules.importers("base")) == ["both", "middle", "top"]
    assert sorted(modules.importers("middle")) == ["both", "top"]
    assert modules.importers("top") == []
    assert modules.importers("alone") == []


def test_importers_of_modules_that_import_each_other(store: Store) -> None:
    modules = store(a="import b", b="import a")
    modules.flows("a")
    assert modules.importers("a") == ["b"]
    assert modules.importers("b") == ["a"]


def test_imported_is_in_an_order_in_which_they_can_be_deployed(store: Store) -> None:
    modules = store(a="import c, b", b="import c", c="", unused="")
    modules.flows("a")
    assert modules.imported == ["c", "b", "a"]


# Failures


def test_a_failing_import_leaves_nothing_behind(store: Store) -> None:
    before = set(sys.modules)
    modules = store(a="x = 1\nraise ValueError('broken')")
    failed(modules, "a")
    assert set(sys.modules) == before
    assert modules.imported == []
    assert str(failed(modules, "a")) == str(failed(modules, "a"))


def test_after_a_failure_a_module_starts_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when a package was missing at one call of work() and is there at the next.
    monkeypatch.setattr(calendar, "calls", [], raising=False)
    source = (
        f"{FLOW}\nimport b, calendar\ncalendar.calls.append(flow)\n1 / (len(calendar.calls) - 1)"
    )
    modules = store(a=source, b="")
    failed(modules, "a")
    [flow] = modules.flows("a")
    assert flow is calendar.calls[1]  # type: ignore[attr-defined]


def test_a_failure_names_the_module_and_shows_its_lines(store: Store) -> None:
    error = failed(store(broken="x = 1\n\ndef f():\n    return {}['url']\n\nf()\n"), "broken")
    assert str(error) == "module \"broken\" cannot be imported: KeyError: 'url'"
    assert error.sqlstate == "PW005"
    assert error.hint == "Mend the module and deploy it again."
    assert error.detail is not None
    lines = [line.strip() for line in error.detail.splitlines()]
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1:3] == ['File "broken.py", line 6, in <module>', "f()"]
    assert 'File "broken.py", line 4, in f' in lines
    assert "return {}['url']" in lines
    assert lines[-1] == "KeyError: 'url'"
    assert isinstance(error.__cause__, KeyError)


def test_a_failure_in_an_imported_module_is_told_without_the_workers_frames(store: Store) -> None:
    error = failed(store(top="import middle\n", middle="import base\n", base="1 / 0\n"), "top")
    assert str(error) == 'module "top" cannot be imported: ZeroDivisionError: division by zero'
    assert error.detail is not None
    files = [line.strip() for line in error.detail.splitlines() if line.startswith('  File "')]
    assert files == [f'File "{name}.py", line 1, in <module>' for name in ("top", "middle", "base")]


def test_a_syntax_error_shows_its_line(store: Store) -> None:
    error = failed(store(a="x = 1\ndef f(:\n"), "a")
    assert str(error).startswith('module "a" cannot be imported: SyntaxError: invalid syntax')
    assert error.detail is not None
    assert 'File "a.py", line 2' in error.detail
    assert "def f(:" in error.detail


@pytest.mark.parametrize("source", ["x = '\0'", "x = '\ud800'"], ids=["NUL", "surrogate"])
def test_a_source_that_is_no_text_is_refused(store: Store, source: str) -> None:
    assert str(failed(store(a=source), "a")).startswith('module "a" cannot be imported: ')


@pytest.mark.parametrize("error", ["SystemExit(1)", "KeyboardInterrupt()", "GeneratorExit()"])
def test_whatever_a_module_raises_is_its_failure(store: Store, error: str) -> None:
    assert str(failed(store(a=f"raise {error}"), "a")).startswith(
        f'module "a" cannot be imported: {error.partition("(")[0]}'
    )


def test_a_cancel_passes_through(store: Store) -> None:
    modules = store(a="from pgflow_worker.errors import QueryCanceled\nraise QueryCanceled('now')")
    with pytest.raises(QueryCanceled, match="now"):
        modules.flows("a")


def test_a_missing_package_has_two_ways_out(store: Store) -> None:
    error = failed(store(a="import no_such_package"), "a")
    assert str(error) == (
        "module \"a\" cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert error.hint == (
        'Deploy "no_such_package" first if it is a module of yours; for a third-party package, '
        "install it into the environment named with pgflow_worker.set_environment()."
    )


def test_a_note_does_not_hide_the_error(store: Store) -> None:
    source = "error = ValueError('reason')\nerror.add_note('a note')\nraise error"
    error = failed(store(a=source), "a")
    assert str(error) == 'module "a" cannot be imported: ValueError: reason'
    assert error.detail is not None
    assert "a note" in error.detail


def test_a_wrong_flow_keeps_its_message_and_its_hint(store: Store) -> None:
    modules = store(
        a="""
            from pgflow_worker import Flow
            flow = Flow("f")
            @flow.step
            def a(): ...
            @flow.step("a")
            def b(): ...
        """
    )
    with pytest.raises(WorkerError) as caught:
        modules.flows("a")
    assert 'flow "f", step "a": the slug is taken by another step' in str(caught.value)
    assert "pgflow_worker.errors" not in str(caught.value)
    assert caught.value.hint == ('Give one of them a slug of its own: @flow.step("another_slug").')


def test_a_flow_that_cannot_be_ordered_is_found_when_its_steps_are_asked_for(store: Store) -> None:
    [flow] = store(a=FLOW.replace("flow_input", "unknown", 1)).flows("a")
    with pytest.raises(FlowError, match='parameter "unknown" names no step'):
        _ = flow.steps


def test_a_handlers_failure_names_the_file_and_shows_its_lines(store: Store) -> None:
    modules = store(
        helpers="def fetch(url):\n    raise ValueError(url)\n",
        site="""
            from helpers import fetch
            from pgflow_worker import Flow
            flow = Flow("site")
            @flow.step
            def page(flow_input):
                return fetch(flow_input)
        """,
    )
    [flow] = modules.flows("site")
    outcome = attempt.run(flow.steps["page"], {}, "http://x", CONTEXT, None)
    assert isinstance(outcome, Failure)
    assert outcome.error == "ValueError: http://x (helpers.py:2, in fetch)"
    assert "raise ValueError(url)" in outcome.traceback
    assert "return fetch(flow_input)" in outcome.traceback


def test_a_traceback_shows_the_version_that_runs(store: Store) -> None:
    first, second = (
        store(a=FLOW.replace("return", f"raise ValueError('{version}') #"))
        for version in ("first", "second")
    )
    [flow] = first.flows("a")
    second.flows("a")  # as a dry run of deploy() does in a session that has run the first
    second.forget()
    outcome = attempt.run(flow.steps["hello"], {}, "x", CONTEXT, None)
    assert isinstance(outcome, Failure)
    assert "raise ValueError('first')" in outcome.traceback


# Forgetting


def test_forget_takes_the_modules_out_of_sys_modules(store: Store) -> None:
    before = set(sys.modules)
    modules = store(a="import b", b="")
    modules.flows("a")
    assert len(set(sys.modules) - before) == 2
    modules.forget()
    assert set(sys.modules) == before
    modules.forget()


def test_forget_takes_the_source_lines_out_of_linecache(store: Store) -> None:
    modules = store(good="", bad="1 / 0")
    modules.flows("good")
    for _ in range(2):
        failed(modules, "bad")
    assert {"good.py", "bad.py"} <= set(linecache.cache)
    modules.forget()
    assert not {"good.py", "bad.py"} & set(linecache.cache)


def test_forget_leaves_other_sets_alone(store: Store) -> None:
    first, second = store(a=FLOW), store(a=FLOW)
    first.flows("a")
    [flow] = second.flows("a")
    first.forget()
    assert call(flow, "hello") == "Hello, you"
    assert [name for name in sys.modules if name.endswith(".a") and "_pgflow_worker_" in name]
