"""pgflow's SQL: what its answers mean."""

import pytest

from pgflow_worker.database import Row
from pgflow_worker.flow import Flow, Options
from pgflow_worker.pgflow import Claim, Pgflow, with_defaults
from tests.unit.fakes import FakeDatabase

CLAIM = Claim("run", "step", 0, "worker", 2, 1, 42, 3, 60)


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


def test_messages_are_read_with_their_step() -> None:
    rows: list[Row] = [
        {"msg_id": 1, "step_slug": "a", "too_new": False},
        {"msg_id": 2, "step_slug": None, "too_new": True},
    ]
    database = FakeDatabase({"pgmq.read": rows})
    messages = Pgflow(database, "f").read(10, 60)
    assert [(m.message_id, m.step_slug, m.too_new) for m in messages] == [
        (1, "a", False),
        (2, None, True),
    ]
    assert database.ran("pgmq.read") == [("f", 60, 10)]


def test_no_message_needs_no_statement_to_become_visible() -> None:
    database = FakeDatabase()
    Pgflow(database, "f").set_visibility([], [])
    assert database.events == []


def test_only_what_this_call_started_is_ours() -> None:
    started = {
        "message_id": 2,
        "run_id": "run",
        "step_slug": "a",
        "task_index": 0,
        "attempts_count": 1,
        "started_us": 5,
        "max_attempts": 3,
        "timeout": 60,
    }
    database = FakeDatabase(
        {
            # Another session started the first, and both get its record.
            "pgflow.start_tasks": [{"msg_id": n, "input": f"[{n}]"} for n in (1, 2)],
            "task.last_worker_id = $3": [started],
            "select input::text from pgflow.runs": [{"input": '"run input"'}],
        }
    )
    pgflow = Pgflow(database, "f")
    [task] = pgflow.start([1, 2], "worker", with_run_input={"a"})
    assert task.claim == Claim("run", "a", 0, "worker", 1, 5, 2, 3, 60)
    assert (task.input, task.run_input) == ("[2]", '"run input"')
    # pgflow does not make it invisible for as long as it may run.
    assert database.ran("set_vt_batch") == [("f", [2], [90])]
    [task] = pgflow.start([1, 2], "worker", with_run_input=set())
    assert task.run_input is None


def test_a_runs_input_is_read_once_for_tasks_that_follow_each_other() -> None:
    rows = [
        {
            "message_id": n,
            "run_id": run,
            "step_slug": "a",
            "task_index": n,
            "attempts_count": 1,
            "started_us": 5,
            "max_attempts": 3,
            "timeout": 60,
        }
        for n, run in enumerate(["one", "one", "two", "one"])
    ]
    database = FakeDatabase(
        {
            "pgflow.start_tasks": [{"msg_id": n, "input": "0"} for n in range(4)],
            "task.last_worker_id = $3": rows,
            "select input::text from pgflow.runs": lambda run: [{"input": run}],
        }
    )
    tasks = Pgflow(database, "f").start([0, 1, 2, 3], "worker", with_run_input={"a"})
    assert [task.run_input for task in tasks] == ["one", "one", "two", "one"]
    assert database.ran("select input::text") == [("one",), ("two",), ("one",)]


@pytest.mark.parametrize(
    ("rows", "completed"),
    [
        ([{"status": "completed"}], True),
        ([{"status": "failed"}], False),
        ([{"status": "started"}], False),
        ([], False),
    ],
)
def test_completed_means_that_a_completed_row_came_back(
    rows: list[dict[str, str]], completed: bool
) -> None:
    database = FakeDatabase({"complete_task": rows})
    assert Pgflow(database, "f").complete(CLAIM, "null") is completed


@pytest.mark.parametrize(
    ("rows", "failed"), [([{"status": "queued"}], False), ([{"status": "failed"}], True)]
)
def test_a_task_that_is_queued_again_has_not_failed(
    rows: list[dict[str, str]], failed: bool
) -> None:
    database = FakeDatabase({"fail_task": rows})
    assert Pgflow(database, "f").fail(CLAIM, "error", final=False) is failed
    assert not database.ran("attempts_count = $4")


def test_a_final_failure_takes_the_attempts_that_are_left_and_gives_the_number_back() -> None:
    database = FakeDatabase({"fail_task": [{"status": "failed"}]})
    assert Pgflow(database, "f").fail(CLAIM, "error", final=True)
    assert [args[3] for args in database.ran("attempts_count = $4")] == [3, 2]


def test_at_the_last_attempt_a_final_failure_is_one_like_others() -> None:
    last = Claim("run", "step", 0, "worker", 3, 1, 42, 3, 60)
    database = FakeDatabase({"fail_task": [{"status": "failed"}]})
    assert Pgflow(database, "f").fail(last, "error", final=True)
    assert len(database.events) == 1


@pytest.mark.parametrize("rows", [[], [{"message_id": 42}]])
def test_a_requeued_tasks_message_is_visible_at_once(rows: list[dict[str, int]]) -> None:
    database = FakeDatabase({"set status = 'queued'": rows})
    assert Pgflow(database, "f").requeue(CLAIM) is bool(rows)
    assert database.ran("set_vt_batch") == [("f", [42], [0])] * len(rows)


def test_a_flow_that_the_database_does_not_have() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    [difference] = Pgflow(FakeDatabase(), "f").differences(flow)
    assert difference.text == 'flow "f" is in the code, not in the database'
    assert difference.matters


def test_a_step_that_only_the_database_has_can_wait() -> None:
    flow = Flow("f")
    flow.step("a")(lambda: 1)
    rows: list[Row] = [
        {"step_slug": slug, "step_type": "single", "dependencies": []} for slug in ("a", "b")
    ]
    database = FakeDatabase({"select opt_max_attempts": [{}], "select step.step_slug": rows})
    [difference] = Pgflow(database, "f").differences(flow)
    assert difference.text == 'step "b" is in the database, not in the code'
    assert not difference.matters
