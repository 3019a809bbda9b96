"""pgflow's SQL: what its answers mean."""

import pytest

from pgflow_worker.database import Row
from pgflow_worker.dialect import TESTED_BODIES
from pgflow_worker.errors import DatabaseError, QueryCanceled
from pgflow_worker.pgflow import (
    Claim,
    Completion,
    Message,
    Pgflow,
    Task,
)
from tests.unit.fakes import Answer, FakeDatabase

CLAIM = Claim("run", "step", 0, "worker", 2, 1, 42, 3, 60)


def test_messages_are_read_with_their_step() -> None:
    rows: list[Row] = [
        {"msg_id": 1, "step_slug": "a", "seconds_ahead": -1.0, "crashed": None},
        {"msg_id": 2, "step_slug": None, "seconds_ahead": 1.5, "crashed": False},
        {"msg_id": 3, "step_slug": "b", "seconds_ahead": -1.0, "crashed": True},
    ]
    database = FakeDatabase({"pgmq.read": rows})
    messages = Pgflow(database, "f").read(10, 60)
    assert messages == [
        Message(1, "a", -1.0),
        Message(2, None, 1.5, suspect=True),
        Message(3, "b", -1.0, suspect=True, crashed=True),
    ]
    assert database.ran("pgmq.read") == [("f", 60, 10)]


@pytest.mark.parametrize("ready", [True, False])
def test_the_queue_is_asked_by_its_name_in_lower_case(ready: bool) -> None:
    database = FakeDatabase({'from pgmq."q_myflow" where vt': [{"ready": ready}]})
    assert Pgflow(database, "myFlow").is_ready() is ready


def test_no_message_needs_no_statement_to_become_visible() -> None:
    database = FakeDatabase()
    Pgflow(database, "f").set_visibility([], [])
    assert database.events == []


# Starting


def started(number: int, step_slug: str = "a", run_id: str = "run") -> Row:
    """A row that says that this call started the task of a message."""
    return {
        "message_id": number,
        "run_id": run_id,
        "step_slug": step_slug,
        "task_index": number,
        "worker_id": "worker",
        "attempts_count": 1,
        "started_us": 5,
        "max_attempts": 3,
        "timeout": 60,
    }


def starting(*rows: Row, **answers: Answer) -> FakeDatabase:
    """Where these tasks start; the input of each is its message's number."""

    def inputs(_: str, ids: list[int], __: str) -> list[Row]:
        return [
            row | {"input": str(row["message_id"]), "flow_input": None}
            for row in rows
            if row["message_id"] in ids
        ]

    return FakeDatabase(
        {
            "_start_map_tasks": answers.get("in_sets", inputs),
            "pgflow.start_tasks": inputs,
            "task.last_worker_id = $3": rows,
            "select input::text from pgflow.runs": lambda run: [{"input": f'"{run}"'}],
        }
    )


def messages(*step_slugs: str) -> list[Message]:
    return [Message(number, slug) for number, slug in enumerate(step_slugs)]


def test_only_what_this_call_started_is_ours() -> None:
    # Another session started the first, and both get its record.
    database = starting(started(1))
    [task], _ = Pgflow(database, "f").start(messages("a", "a"), "worker", with_run_input={"a"})
    assert task == Task(Claim("run", "a", 1, "worker", 1, 5, 1, 3, 60), "1", '"run"')
    assert database.ran("pgflow.start_tasks") == [("f", [0, 1], "worker")]
    # pgflow does not make it invisible for as long as it may run.
    assert database.ran("_set_visibility") == [("f", [1], [90])]


def test_a_task_whose_input_has_the_runs_gets_no_other() -> None:
    database = starting(started(0), started(1, "b"))
    tasks, _ = Pgflow(database, "f").start(messages("a", "b"), "worker", with_run_input={"b"})
    assert [task.run_input for task in tasks] == [None, '"run"']


def test_a_runs_input_is_read_once_for_tasks_that_follow_each_other() -> None:
    runs = ["one", "one", "two", "one"]
    database = starting(*(started(n, run_id=run) for n, run in enumerate(runs)))
    tasks, _ = Pgflow(database, "f").start(messages(*"aaaa"), "worker", with_run_input={"a"})
    assert [task.run_input for task in tasks] == ['"one"', '"one"', '"two"', '"one"']
    assert database.ran("select input::text") == [("one",), ("two",), ("one",)]


def test_messages_of_brief_tasks_are_left_as_they_are() -> None:
    database = starting(started(0), started(1, "b"), started(2))
    Pgflow(database, "f").start(messages("a", "b", "a"), "worker", set(), brief={"a"})
    assert database.ran("_set_visibility") == [("f", [1], [90])]
    tasks, _ = Pgflow(database, "f").start(messages("a", "b", "a"), "worker", set(), "ab")
    assert len(tasks) == 3
    assert len(database.ran("_set_visibility")) == 1


# Tasks of maps in sets

BODIES: list[Row] = [{"name": name, "body": body} for name, body in TESTED_BODIES[0]]


def in_sets(database: FakeDatabase, *steps: str) -> Pgflow:
    pgflow = Pgflow(database, "f")
    pgflow.in_sets = frozenset(steps)
    return pgflow


def test_sets_are_allowed_with_bodies_that_were_tested_in_any_order() -> None:
    for bodies in (BODIES, BODIES[::-1]):
        pgflow = Pgflow(FakeDatabase({"md5": bodies}), "f")
        pgflow.allow_sets(["a", "b"])
        assert pgflow.in_sets == {"a", "b"}


@pytest.mark.parametrize(
    "bodies",
    [
        [],
        BODIES[1:],
        [*BODIES, BODIES[0]],
        [BODIES[0] | {"body": "another"}, *BODIES[1:]],
    ],
    ids=["none", "one is missing", "one is overloaded", "one is another"],
)
def test_sets_are_not_allowed_with_other_bodies(bodies: list[Row]) -> None:
    pgflow = Pgflow(FakeDatabase({"md5": bodies}), "f")
    pgflow.allow_sets(["a"])
    assert pgflow.in_sets == set()


def test_a_flow_without_maps_does_not_ask() -> None:
    database = FakeDatabase()
    Pgflow(database, "f").allow_sets([])
    assert database.events == []


def test_the_tasks_of_maps_are_started_in_sets_beside_the_others() -> None:
    database = starting(*(started(n, step) for n, step in enumerate("abcab")))
    tasks, _ = in_sets(database, "a", "c").start(messages(*"abcab"), "worker", set())
    assert database.ran("_start_map_tasks") == [("f", [0, 2, 3], "worker")]
    assert database.ran("pgflow.start_tasks") == [("f", [1, 4], "worker")]
    assert [(task.claim.step_slug, task.input) for task in tasks] == [
        (step, str(n)) for n, step in enumerate("abcab")
    ]


def test_the_tasks_of_maps_alone_need_no_other_statement() -> None:
    database = starting(started(0))
    [task], _ = in_sets(database, "a").start(messages("a"), "worker", set())
    assert task.input == "0"
    assert database.ran("pgflow.start_tasks") == []


def test_a_set_that_cannot_be_started_is_started_by_pgflow() -> None:
    notes: list[str] = []
    database = starting(
        started(0), started(1, "b"), in_sets=DatabaseError("no such column", "42703")
    )
    pgflow = Pgflow(database, "f", notes.append)
    pgflow.in_sets = frozenset("a")
    tasks, _ = pgflow.start(messages("a", "b"), "worker", set())
    assert [task.input for task in tasks] == ["0", "1"]
    assert sorted(database.ran("pgflow.start_tasks")[0][1]) == [0, 1]  # type: ignore[call-overload]
    assert notes == ["map tasks could not be started in sets: no such column"]
    assert pgflow.in_sets == frozenset()


def test_another_statement_that_fails_is_an_error() -> None:
    database = starting(started(0), in_sets=QueryCanceled("now"))
    with pytest.raises(QueryCanceled):
        in_sets(database, "a").start(messages("a"), "worker", set())


# Completing


def completion(index: int, log: str = "", run_id: str = "run") -> Completion:
    claim = CLAIM._replace(task_index=index, run_id=run_id)
    return Completion(claim, f'"{index}"', 1.5, log)


@pytest.mark.parametrize("answer", ["completed", "refused", "lost"])
def test_what_pgflow_says_to_a_completion(answer: str) -> None:
    database = FakeDatabase({"_complete_task(": [{"answer": answer}]})
    assert Pgflow(database, "f").complete(completion(7, "log")) == answer
    assert database.ran("_complete_task(") == [
        ("f", "worker", "run", "step", 7, 2, 1, '"7"', 1.5, "log")
    ]


def test_an_empty_log_is_not_stored() -> None:
    database = FakeDatabase({"_complete_": [{"answer": "completed", "place": 1}]})
    pgflow = Pgflow(database, "f")
    pgflow.complete(completion(0))
    pgflow.complete_several([completion(0)])
    pgflow.complete_map([completion(0)])
    assert [args[-1] for args in database.ran("_complete_")] == [None, [None], [None]]


@pytest.mark.parametrize("one_map", [False, True])
def test_several_completions_have_an_answer_each(one_map: bool) -> None:
    answers: list[Row] = [{"place": 4, "answer": "refused"}, {"place": 1, "answer": "completed"}]
    statement = "_complete_map_tasks(" if one_map else "_complete_tasks("
    database = FakeDatabase({statement: answers})
    pgflow = Pgflow(database, "f")
    complete = pgflow.complete_map if one_map else pgflow.complete_several
    run = "run" if one_map else "another run"
    given = [completion(5), completion(6, "log", run), completion(7), completion(8)]
    assert complete(given) == ["completed", "lost", "lost", "refused"]
    assert database.ran(statement) == [
        (
            *("f", "worker", ["run", run, "run", "run"], ["step"] * 4, [5, 6, 7, 8], [2] * 4),
            *([1] * 4, ['"5"', '"6"', '"7"', '"8"'], [1.5] * 4, [None, "log", None, None]),
        )
    ]


def test_tables_that_have_outgrown_their_statistics_are_named() -> None:
    names = ["pgflow.runs", 'pgmq."q_F"']
    database = FakeDatabase({"relpages": [{"name": name} for name in names]})
    assert Pgflow(database, "F").outgrown() == names
    assert database.ran("relpages") == [("F",)]


# Failing and giving back


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


@pytest.mark.parametrize(("after", "seconds"), [(0, 0), (0.1, 1), (60, 60), (60.5, 61)])
def test_a_task_that_is_queued_again_can_wait_for_as_long_as_it_chooses(
    after: float, seconds: int
) -> None:
    database = FakeDatabase({"fail_task": [{"status": "queued"}]})
    assert not Pgflow(database, "f").fail(CLAIM, "error", after=after)
    assert database.ran("_set_visibility") == [("f", [42], [seconds])]


@pytest.mark.parametrize(("status", "after"), [("queued", None), ("failed", 60)])
def test_otherwise_it_waits_for_pgflows_delay(status: str, after: float | None) -> None:
    database = FakeDatabase({"fail_task": [{"status": status}]})
    Pgflow(database, "f").fail(CLAIM, "error", after=after)
    assert database.ran("_set_visibility") == []


def test_a_task_can_be_given_back_for_later() -> None:
    database = FakeDatabase({"set status = 'queued'": [{"message_id": 42}]})
    assert Pgflow(database, "f").requeue(CLAIM, 1.5)
    assert database.ran("_set_visibility") == [("f", [42], [2])]


def test_what_is_started_under_a_name_or_left_by_others_is_a_claim_with_its_worker() -> None:
    rows = [started(1), started(2) | {"worker_id": None}]
    for text, claims in (
        ("task.last_worker_id = $2", lambda pgflow: pgflow.orphans("worker")),
        ("_stalled_tasks($1)", Pgflow.stalled),
    ):
        found = claims(Pgflow(FakeDatabase({text: rows}), "f"))
        assert [claim.worker_id for claim in found] == ["worker", None]
        assert [claim.fence[3] for claim in found] == ["worker", None]


@pytest.mark.parametrize("rows", [[], [{"message_id": 42}]])
def test_a_requeued_tasks_message_is_visible_at_once(rows: list[dict[str, int]]) -> None:
    database = FakeDatabase({"set status = 'queued'": rows})
    assert Pgflow(database, "f").requeue(CLAIM) is bool(rows)
    assert database.ran("_set_visibility") == [("f", [42], [0])] * len(rows)
