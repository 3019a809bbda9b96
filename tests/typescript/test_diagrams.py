"""flow_diagram() and run_diagram(), as Mermaid reads them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.database.conftest import Session

Mermaid = Callable[[str], Any]

# Words of Mermaid's, of YAML's and of JavaScript's.
WORDS = [
    "end",
    "graph",
    "flowchart",
    "subgraph",
    "class",
    "classDef",
    "click",
    "call",
    "href",
    "style",
    "linkStyle",
    "direction",
    "default",
    "interpolate",
    "title",
    "accTitle",
    "accDescr",
    "TB",
    "TD",
    "BT",
    "RL",
    "LR",
    "x",
    "o",
    "v",
    "_",
    "__",
    "___",
    "_a_",
    "__init__",
    "s0",
    "s1",
    "null",
    "true",
    "no",
    "y",
    "constructor",
    "prototype",
    "__proto__",
    "hasOwnProperty",
    "toString",
]
words = st.sampled_from(WORDS).flatmap(
    lambda word: st.sampled_from([word, word.upper(), word.lower(), word.capitalize()])
)


def slugs(longest: int) -> st.SearchStrategy[str]:
    """What pgflow's is_valid_slug() lets through."""
    names = st.from_regex(rf"[a-zA-Z_][a-zA-Z0-9_]{{0,{longest - 1}}}", fullmatch=True)
    return (words | names | st.sampled_from("xX_").map(lambda letter: letter * longest)).filter(
        lambda slug: slug != "run"
    )


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, dict[str, tuple[str, list[str]]]]:
    """A flow's slug, and its steps: type and dependencies by slug."""
    steps: dict[str, tuple[str, list[str]]] = {}
    for slug in draw(st.lists(slugs(128), min_size=1, max_size=8, unique=True)):
        before = list(steps)
        several = (
            st.lists(st.sampled_from(before), unique=True, max_size=4) if before else st.just([])
        )
        deps: list[str] = draw(several)
        kind = draw(st.sampled_from(["single", "map"])) if len(deps) < 2 else "single"
        steps[slug] = (kind, deps)
    return draw(slugs(47)), steps


def expected(steps: dict[str, tuple[str, list[str]]]) -> tuple[Any, Any]:
    place = {slug: f"s{number}" for number, slug in enumerate(steps)}
    shapes = {"single": "square", "map": "subroutine"}
    return (
        [[place[slug], slug, shapes[kind]] for slug, (kind, _) in steps.items()],
        sorted([place[dep], place[slug]] for slug, (_, deps) in steps.items() for dep in deps),
    )


def drawn(diagram: Any) -> tuple[Any, Any]:
    """Of a diagram: id, slug and shape of its boxes, and its arrows."""
    nodes = [[place, label.split("<br>")[0], shape] for place, label, shape, _ in diagram["nodes"]]
    return sorted(nodes, key=lambda node: int(node[0][1:])), sorted(diagram["edges"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(graph=graphs())
def test_whatever_its_slugs_a_flow_is_drawn_as_it_is(
    session: Session, mermaid: Mermaid, graph: tuple[str, dict[str, tuple[str, list[str]]]]
) -> None:
    flow_slug, steps = graph
    with session.connection.transaction(force_rollback=True):
        session.run("select pgflow.create_flow(%s)", flow_slug)
        for slug, (kind, deps) in steps.items():
            session.run(
                "select pgflow.add_step(%s, %s, %s, step_type => %s)", flow_slug, slug, deps, kind
            )
        flow = mermaid(session.value("select pgflow_worker.flow_diagram(%s)", flow_slug))
        run_id = session.start(flow_slug, [])
        run = mermaid(session.value("select pgflow_worker.run_diagram(%s)", run_id))
    assert drawn(flow) == expected(steps)
    assert drawn(run) == expected(steps)


def test_mermaid_finds_a_class_for_every_state(session: Session, mermaid: Mermaid) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def good(flow_input):
            return 1

        @flow.step
        def bad(good):
            raise ValueError("on purpose")

        @flow.step(start_delay=3600)
        def late(good):
            return 1

        @flow.step
        def last(bad):
            return 1
    """)
    run_id = session.start("f")

    def classes() -> list[str]:
        diagram = mermaid(session.value("select pgflow_worker.run_diagram(%s)", run_id))
        used = [name for _, _, _, names in diagram["nodes"] for name in names]
        assert sorted(set(used)) == sorted(diagram["classes"])
        return used

    assert classes() == ["queued", "created", "created", "created"]
    session.work("f")
    assert classes() == ["completed", "queued", "queued", "created"]
    session.work("f")
    assert classes() == ["completed", "failed", "cancelled", "cancelled"]


def test_mermaid_reads_the_diagrams_of_the_documentation(mermaid: Mermaid) -> None:
    text = (ROOT / "docs/operating.md").read_text()
    diagrams = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert diagrams
    for diagram in diagrams:
        assert mermaid(diagram)["nodes"]


def test_a_broken_diagram_is_noticed(mermaid: Mermaid) -> None:
    with pytest.raises(AssertionError, match="Parse error"):
        mermaid("flowchart TD\n    end --> graph\n")
