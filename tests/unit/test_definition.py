"""The flow in the code and the one in the database."""

import pytest

from pgflow_worker.database import Row
from pgflow_worker.definition import Definition, with_defaults
from pgflow_worker.dialect import Dialect
from pgflow_worker.flow import Flow, Options
from tests.unit.fakes import FakeDatabase


def definition(database: FakeDatabase, flow: Flow) -> Definition:
    return Definition(database, flow, Dialect(database))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), Options(3, 5, 60)),
        (Options(max_attempts=1), Options(1, 5, 60)),
        (Options(base_delay=1, timeout=3), Options(3, 1, 3)),
    ],
)
def test_defaults_are_those_of_create_flow(options: Options, expected: Options) -> None:
    assert with_defaults(options) == expected


def test_a_flow_that_the_database_does_not_have() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    [difference] = definition(FakeDatabase(), flow).differences()
    assert difference.text == 'flow "f" is in the code, not in the database'
    assert difference.matters


def test_a_step_that_only_the_database_has_can_wait() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    rows: list[Row] = [
        {"step_slug": slug, "step_type": "single", "dependencies": [], "queue_name": "f"}
        for slug in ("a", "b")
    ]
    database = FakeDatabase({"select opt_max_attempts": [{}], "select step.step_slug": rows})
    [difference] = definition(database, flow).differences()
    assert difference.text == 'step "b" is in the database, not in the code'
    assert not difference.matters


def test_a_step_with_a_queue_of_its_own_would_wait_for_ever() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    row: Row = {"step_slug": "a", "step_type": "single", "dependencies": [], "queue_name": "f_a"}
    database = FakeDatabase({"select opt_max_attempts": [{}], "select step.step_slug": [row]})
    [difference] = definition(database, flow).differences()
    assert difference.text == (
        'step "a" has a queue of its own in the database, "f_a", which no worker here reads'
    )
    assert difference.matters
