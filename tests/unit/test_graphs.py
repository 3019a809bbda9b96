"""Random flows: their steps' order and dependencies, and circles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_worker.errors import FlowError
from pgflow_worker.flow import Flow


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
