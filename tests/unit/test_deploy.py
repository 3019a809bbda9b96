"""Deploy: which names are refused, what is written, and what a mismatch is told."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgflow_worker.deploy import Deployed, Deployment
from pgflow_worker.errors import (
    FlowBusy,
    FlowError,
    FlowMismatch,
    InvalidArgument,
    ModuleFailed,
    NameRefused,
    WorkerError,
)
from tests.unit.fakes import Answer, FakeDatabase

FLOW = """
from pgflow_worker import Flow
flow = Flow("greet", max_attempts=2)
@flow.step
def hello(flow_input): ...
@flow.step(timeout=9)
def bye(hello): ...
"""

# The flow above, as pgflow has it.
OPTIONS = {"max_attempts": None, "base_delay": None, "timeout": None, "start_delay": None}
HELLO: dict[str, object] = {
    "step_slug": "hello",
    "step_type": "single",
    "dependencies": [],
    "queue_name": "greet",
    "if_": None,
    "if_not": None,
    "when_unmet": "skip",
    "when_exhausted": "fail",
    **OPTIONS,
}
BYE: dict[str, object] = {
    "step_slug": "bye",
    "step_type": "single",
    "dependencies": ["hello"],
    "queue_name": "greet",
    "if_": None,
    "if_not": None,
    "when_unmet": "skip",
    "when_exhausted": "fail",
    **OPTIONS,
    "timeout": 9,
}
COMPILED: dict[str, Answer] = {
    "select opt_max_attempts": [{"max_attempts": 2, "base_delay": 5, "timeout": 60}],
    "select step.step_slug, step.step_type": [HELLO, BYE],
    "as runs": [{"runs": 7}],
    "_send_missing": [{"sent": 0}],
    "as feature": [
        {"feature": feature} for feature in ("steps.opt_start_delay", "step_task_record.task_index")
    ],
}
WRITES = ("insert", "update", "delete", "create_flow", "add_step", "drop_queue", "_send_missing")


@pytest.fixture(autouse=True)
def nothing_stays_imported() -> Iterator[None]:
    before = set(sys.modules)
    yield
    assert not [n for n in set(sys.modules) - before if n.startswith("_pgflow_worker_")]


def deploy(
    database: FakeDatabase,
    source: str | None = FLOW,
    module: str = "greetings",
    *,
    dry_run: bool = False,
    allow_data_loss: bool = False,
) -> list[Deployed]:
    deployment = Deployment(database, dry_run=dry_run, allow_data_loss=allow_data_loss)
    return deployment.deploy(module, source)


def refused(
    database: FakeDatabase, source: str | None = FLOW, module: str = "greetings"
) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        deploy(database, source, module)
    return caught.value


def writes(database: FakeDatabase) -> list[str]:
    return [sql for sql in database.events if any(word in sql for word in WRITES)]


# Names


@pytest.mark.parametrize(
    "module", ["", "1st", "my-flows", "my flows", "flows.", ".flows", "a..b", "flöws", "x;y", None]
)
def test_what_is_no_name_for_a_module(module: str) -> None:
    database = FakeDatabase()
    error = refused(database, FLOW, module)
    assert isinstance(error, NameRefused)
    assert str(error) == f'"{module}" is not a name for a module'
    assert database.events == []


def test_a_name_that_is_too_long_is_shown_in_part() -> None:
    error = refused(FakeDatabase(), FLOW, "a" * 201)
    assert isinstance(error, NameRefused)
    assert str(error) == (
        f'the name of module "{"a" * 40}..." has 201 characters, the limit is 200'
    )
    assert error.hint


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("json", "is part of Python"),
        ("json.flows", "is part of Python"),
        ("os.path", "is part of Python"),
        ("pgflow_worker", "exists already in this server's Python"),
        ("pytest", "exists already in this server's Python"),
    ],
)
def test_a_name_that_python_has_already(module: str, problem: str) -> None:
    database = FakeDatabase()
    error = refused(database, FLOW, module)
    assert isinstance(error, NameRefused)
    assert str(error) == f'module "{module}" {problem}'
    assert not any("insert" in str(event) for event in database.events)


def test_the_standard_librarys_text_is_not_deployed() -> None:
    error = refused(FakeDatabase(), None, "json")
    assert isinstance(error, NameRefused)
    assert str(error) == 'module "json" is part of Python'


@pytest.mark.parametrize("module", ["no_such_module", "no_such.module"])
def test_without_a_text_the_module_must_be_importable(module: str) -> None:
    error = refused(FakeDatabase(), None, module)
    assert isinstance(error, InvalidArgument)
    assert str(error) == f'no module "{module}" can be imported here'
    assert error.hint is not None
    assert "\\set source" in error.hint


def test_without_a_text_that_of_the_importable_module_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flows_of_mine.py").write_text(FLOW)
    monkeypatch.syspath_prepend(tmp_path)
    database = FakeDatabase()
    assert [row.status for row in deploy(database, None, "flows_of_mine")] == ["compiled"]
    assert database.ran("insert into pgflow_worker.modules") == [("flows_of_mine", FLOW)]
    assert "flows_of_mine" not in sys.modules


def test_a_module_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "namespace_of_mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(refused(FakeDatabase(), None, "namespace_of_mine"), InvalidArgument)


def test_a_flow_of_another_module() -> None:
    database = FakeDatabase({"from pgflow_worker.flows": [{"flow_slug": "greet", "module": "old"}]})
    error = refused(database)
    assert isinstance(error, NameRefused)
    assert str(error) == 'flow "greet" of module "greetings" belongs to module "old"'
    assert error.hint is not None
    assert "select pgflow_worker.undeploy('old');" in error.hint
    assert writes(database) == []


def test_a_flow_that_differs_from_another_by_case() -> None:
    database = FakeDatabase({"pg_catalog.lower(flow_slug)": [{"flow_slug": "Greet"}]})
    assert str(refused(database)) == 'flow "greet" and flow "Greet" differ by case only'
    assert writes(database) == []


def test_two_flows_of_one_module_that_differ_by_case() -> None:
    error = refused(FakeDatabase(), f"{FLOW}\ntwin = Flow('GREET')\ntwin.step(hello)")
    assert isinstance(error, NameRefused)
    assert "differ by case only" in str(error)


# What is written


def test_a_new_flow_is_compiled() -> None:
    database = FakeDatabase()
    assert deploy(database) == [Deployed("greet", "compiled", ['step "hello"', 'step "bye"'])]
    assert database.ran("insert into pgflow_worker.modules") == [("greetings", FLOW)]
    assert database.ran("create_flow") == [("greet", 2, 5, 60)]
    assert database.ran("add_step") == [
        ("greet", "hello", [], None, None, None, None, "single"),
        ("greet", "bye", ["hello"], None, None, 9, None, "single"),
    ]
    assert database.ran("insert into pgflow_worker.flows") == [("greet", "greetings")]
    assert database.events[0].startswith("lock table pgflow_worker.modules")


def test_an_unchanged_flow_is_verified() -> None:
    database = FakeDatabase(COMPILED)
    assert deploy(database) == [Deployed("greet", "verified", [])]
    assert not database.ran("add_step")
    assert not database.ran("update pgflow.")


def test_a_queue_that_is_missing_is_made_again() -> None:
    # What create_flow finds it leaves as it is.
    database = FakeDatabase(COMPILED)
    deploy(database)
    assert database.ran("create_flow") == [("greet", 2, 5, 60)]


def test_an_unchanged_module_is_not_stored_again() -> None:
    stored: dict[str, Answer] = {
        "select module, source": [{"module": "greetings", "source": FLOW}],
        "from pgflow_worker.flows": [{"flow_slug": "greet", "module": "greetings"}],
    }
    database = FakeDatabase(COMPILED | stored)
    deploy(database)
    assert database.ran("insert into pgflow_worker.modules") == []


def test_changed_options_are_written_in_place_and_listed() -> None:
    database = FakeDatabase(COMPILED)
    source = FLOW.replace("max_attempts=2", "max_attempts=4, timeout=30").replace(
        "@flow.step\n", "@flow.step(base_delay=2)\n"
    )
    [row] = deploy(database, source)
    assert row.status == "updated"
    assert row.changes == [
        "max_attempts: 2 -> 4",
        "timeout: 60 -> 30",
        "hello.base_delay: the flow's -> 2",
    ]
    assert database.ran("update pgflow.flows") == [("greet", 4, 5, 30)]
    assert database.ran("update pgflow.steps") == [
        ("greet", "hello", None, 2, None, None, None, None, "skip", "fail"),
        ("greet", "bye", None, None, 9, None, None, None, "skip", "fail"),
    ]


def test_a_start_delay_has_no_value_of_the_flow() -> None:
    [row] = deploy(FakeDatabase(COMPILED), FLOW.replace("timeout=9", "timeout=9, start_delay=1"))
    assert row.changes == ["bye.start_delay: 0 -> 1"]


def test_a_changed_shape_is_a_mismatch_with_three_ways_out() -> None:
    database = FakeDatabase(COMPILED)
    source = FLOW.replace("def bye(hello)", "def ciao()").replace(
        "@flow.step\ndef hello(flow_input)", "@flow.map\ndef hello(name)"
    )
    error = refused(database, source)
    assert isinstance(error, FlowMismatch)
    assert str(error) == 'flow "greet" differs from the database'
    assert error.detail == (
        'step "hello" is a map step in the code, a single step in the database; '
        'step "ciao" is in the code, not in the database; '
        'step "bye" is in the database, not in the code.'
    )
    assert error.hint is not None
    ways = ['"greet_v2"', '@flow.step("old_name")', "allow_data_loss => true", "(7)"]
    positions = [error.hint.index(way) for way in ways]
    assert positions == sorted(positions)


def test_changed_dependencies_are_a_mismatch() -> None:
    error = refused(FakeDatabase(COMPILED), FLOW.replace("bye(hello)", "bye()"))
    assert error.detail == ('step "bye" depends on [] in the code, on [hello] in the database.')


def test_with_allow_data_loss_the_flow_is_made_anew() -> None:
    database = FakeDatabase(COMPILED)
    [row] = deploy(database, FLOW.replace("bye(hello)", "bye()"), allow_data_loss=True)
    assert row.status == "recompiled"
    assert row.changes[-1] == "runs deleted: 7"
    order = ["drop_queue", "delete from pgflow.flows", "create_flow", "add_step"]
    positions = [next(i for i, e in enumerate(database.events) if word in e) for word in order]
    assert positions == sorted(positions)


def test_a_flow_with_a_running_worker_is_not_deleted() -> None:
    slot = {"slot": 1, "enabled": True, "worker_id": "w", "lock_key": 1, "pid": 4711}
    database = FakeDatabase(COMPILED | {"_slots($1)": [slot]})
    with pytest.raises(FlowBusy) as caught:
        deploy(database, FLOW.replace("bye(hello)", "bye()"), allow_data_loss=True)
    assert str(caught.value) == 'flow "greet" has a running worker, pid 4711'
    assert caught.value.hint is not None
    assert "select pgflow_worker.pause('greet');" in caught.value.hint
    assert not database.ran("drop_queue")


@pytest.mark.parametrize(
    ("answers", "source", "status"),
    [
        ({}, FLOW, "compiled"),
        (COMPILED, FLOW, "verified"),
        (COMPILED, FLOW.replace("timeout=9", "timeout=8"), "updated"),
        (COMPILED, FLOW.replace("bye(hello)", "bye()"), "mismatch"),
        ({}, "answer = 42", "stored"),
    ],
)
def test_a_dry_run_tells_and_writes_nothing(
    answers: dict[str, Answer], source: str, status: str
) -> None:
    database = FakeDatabase(answers)
    assert [row.status for row in deploy(database, source, dry_run=True)] == [status]
    assert writes(database) == []


def test_messages_that_were_lost_are_sent_again() -> None:
    database = FakeDatabase({**COMPILED, "_send_missing": [{"sent": 2}]})
    assert deploy(database) == [Deployed("greet", "verified", ["messages sent again: 2"])]
    # Not before there is a queue again.
    events = [sql for sql in database.events if "create_flow" in sql or "_send_missing" in sql]
    assert "create_flow" in events[0]
    assert len(events) == 2


def test_a_dry_run_with_allow_data_loss_deletes_nothing() -> None:
    database = FakeDatabase(COMPILED)
    source = FLOW.replace("bye(hello)", "bye()")
    [row] = deploy(database, source, dry_run=True, allow_data_loss=True)
    assert row.status == "recompiled"
    assert writes(database) == []


def test_a_flow_that_is_no_longer_defined_is_removed() -> None:
    owned = [
        {"flow_slug": slug, "module": module}
        for slug, module in [("greet", "greetings"), ("gone", "greetings"), ("x", "other")]
    ]
    database = FakeDatabase({**COMPILED, "select flow_slug, module": owned})
    assert deploy(database, FLOW) == [
        Deployed("greet", "verified", []),
        Deployed("gone", "removed"),
    ]
    assert database.ran("delete from pgflow_worker.flows") == [("gone",)]


def test_a_module_does_not_lose_all_its_flows() -> None:
    owned = [{"flow_slug": "greet", "module": "greetings"}]
    database = FakeDatabase({"select flow_slug, module": owned})
    error = refused(database, "answer = 42")
    assert str(error) == 'module "greetings" has no flow any more'
    assert database.ran("delete from pgflow_worker.flows") == []


# Modules that import it


def test_flows_of_modules_that_import_it_are_brought_up_to_date() -> None:
    stored = [
        {"module": "helpers", "source": "LIMIT = 5"},
        {"module": "greetings", "source": "import helpers\n" + FLOW},
        {"module": "unrelated", "source": "import no_such_package"},
    ]
    owned = [{"flow_slug": "greet", "module": "greetings"}]
    database = FakeDatabase(
        {"select module, source": stored, "select flow_slug, module": owned, **COMPILED}
    )
    assert deploy(database, "LIMIT = 6", "helpers") == [Deployed("greet", "verified", [])]


@pytest.mark.parametrize(
    "broken",
    [
        "import no_such_package",
        "1 / 0",
        "from pgflow_worker import Flow\nflow = Flow('not a slug')",
        "from pgflow_worker import Flow\nflow = Flow('no_steps')",
    ],
)
def test_a_module_that_is_broken_already_is_no_obstacle(broken: str) -> None:
    database = FakeDatabase({"select module, source": [{"module": "unrelated", "source": broken}]})
    assert [row.status for row in deploy(database)] == ["compiled"]


def test_a_module_that_would_break_another_is_refused() -> None:
    stored = [
        {"module": "helpers", "source": "LIMIT = 5"},
        {"module": "greetings", "source": "from helpers import LIMIT"},
    ]
    database = FakeDatabase({"select module, source": stored})
    error = refused(database, "LIMITS = 5", "helpers")
    assert isinstance(error, ModuleFailed)
    assert str(error).startswith('module "greetings" cannot be imported: ImportError')
    assert writes(database) == []


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def f(:", ModuleFailed),
        ("1 / 0", ModuleFailed),
        (FLOW.replace("bye(hello)", "bye(helo)"), FlowError),
        ("from pgflow_worker import Flow\nflow = Flow('empty')", FlowError),
    ],
)
def test_a_wrong_module_is_not_stored(source: str, error: type[WorkerError]) -> None:
    database = FakeDatabase()
    assert isinstance(refused(database, source), error)
    assert not database.ran("create_flow")
